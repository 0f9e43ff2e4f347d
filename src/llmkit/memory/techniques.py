"""The techniques that make a model need less memory, each tried on this very model: bytes saved, price, command.

Each figure is the difference of two estimates of the engine's own layout: of another setting, other types, or a model
with fewer blocks or tokens, which is laid out though nobody has made it. What llmkit cannot do yet says so; its bytes
are told all the same. In commands MODEL is what was asked about, FILE a GGUF of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction

from ..convert.draft import GgufDraft
from ..convert.tensors import LazyTensor
from ..errors import LlmkitError
from ..gguf_writer import padded, tensor_nbytes
from ..quantize import Recipe
from ..quantize.oracle import ask as ask_types
from ..quants import QUANTS, TensorType
from . import estimate as memory
from . import knobs
from .knobs import Knob
from .parts import DERIVED, EXACT, MEASURED, REPACKED_PAGES, MemoryEstimate, Variant
from .published import SOURCE, hint
from .setting import Setting
from .split import split
from .surgery import n_layer_of, with_tokens, without_blocks

AVAILABLE, IN_USE, NOT_HERE, NOT_THIS_MODEL = "available", "in use", "not available here", "not for this model"
_LADDER = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")  # the usual steps down
_USUAL = "Q4_K_M"
_COUNTS = {"ubatch": "tokens at once", "parallel": "conversations", "output_rows": "rows of logits reserved"}
_GIB = 1 << 30
_ROOMY = 1 << 60  # a device that everything fits on


@dataclass(frozen=True)
class Technique:
    """`before` and `after`: bytes needed without and with it, None where nobody can tell. `how` they were got.

    `state`: AVAILABLE, IN_USE (then `before` is without it), NOT_HERE or NOT_THIS_MODEL; `why` in words. `what` is the
    change on this model, `cost` its price, `command` does it.
    """

    name: str
    what: str
    cost: str
    state: str
    before: int | None = None
    after: int | None = None
    command: str = ""
    why: str = ""
    how: str = MEASURED

    @property
    def saved(self) -> int | None:
        """Bytes saved; None where nobody can tell."""
        return None if self.before is None or self.after is None else self.before - self.after

    @property
    def available(self) -> bool:
        """Whether llmkit, or a program it names, can do it."""
        return self.state in (AVAILABLE, IN_USE)


def techniques(
    draft: GgufDraft, variant: Variant, setting: Setting, *, gpus: Sequence[tuple[str, int]] = ()
) -> list[Technique]:
    """Every technique on `draft` as `variant` in `setting`; what can be done first, the largest saving first.

    `gpus`: (name, free bytes) of those the engine can use. Raises LlmkitError where the setting itself is refused.
    """
    asked = _setting_rows(setting)
    mapped = replace(setting, mmap=True)
    settings = list(dict.fromkeys([setting, mapped, *(each for _, _, each in asked)]))
    answers = dict(zip(settings, memory.estimate(draft, [variant], settings)[0], strict=True))
    now = answers[setting]
    if now.error is not None:
        raise LlmkitError(f"the engine refuses this setting: {now.error}")
    found = [*_of_settings(now, asked, answers), _mapped(now, answers[mapped])]
    others: tuple[_Maker, ...] = (
        ("weight quantization", lambda: _quantization(draft, now)),
        ("offloading layers", lambda: [_offloading(draft, now, gpus)]),
        ("experts on CPU", lambda: [_experts(draft, now, gpus)]),
        ("pruning blocks", lambda: [_pruning(draft, now)]),
        ("smaller vocabulary", lambda: [_vocabulary(draft, now)]),
    )
    with ThreadPoolExecutor(len(others)) as pool:  # each waits for the engine in processes of its own
        for rows in pool.map(_told, others):
            found += rows
    order = (AVAILABLE, IN_USE, NOT_HERE, NOT_THIS_MODEL)
    return sorted(found, key=lambda row: (order.index(row.state), -(row.saved or 0)))


_Maker = tuple[str, Callable[[], Iterable[Technique]]]


def _told(maker: _Maker) -> list[Technique]:
    """What a maker says; where the model it needs cannot be laid out, that is what there is to tell."""
    name, make = maker
    try:
        return list(make())
    except LlmkitError as error:
        why = f"not to be told for this model: {error.message.splitlines()[0]}"
        return [Technique(name, "", "", NOT_HERE, why=why)]


# ── settings ──

_Asked = tuple[Knob, bool, Setting]


def _setting_rows(setting: Setting) -> list[_Asked]:
    """(knob, whether undone, the setting to ask about)."""
    rows: list[_Asked] = []
    for knob in (*knobs.KNOBS, knobs.half_context(setting)):
        rows.append((knob, False, replace(setting, **knob.changes)))
        if knob.undone:
            rows.append((knob, True, replace(setting, **knob.undone)))
    return rows


def _of_settings(
    now: MemoryEstimate, asked: Sequence[_Asked], answers: Mapping[Setting, MemoryEstimate]
) -> Iterator[Technique]:
    without = {knob.name: answers[setting] for knob, undone, setting in asked if undone}
    for knob, undone, setting in asked:
        row = None if undone else _of_knob(knob, now, answers[setting], without.get(knob.name))
        if row is not None:
            yield row


def _of_knob(
    knob: Knob, now: MemoryEstimate, turned: MemoryEstimate, undone: MemoryEstimate | None
) -> Technique | None:
    row = Technique(knob.name, _change(knob, now.setting), knob.cost, AVAILABLE, command=knob.command, how=_how(now))
    saved = _needed(now) - _needed(turned) if turned.error is None else 0
    if saved > (0 if knob.undone else knobs.TRIFLE * _needed(now)):
        return replace(row, before=_needed(now), after=_needed(turned))
    if undone is None:
        return None  # of the knobs nobody would call a technique, those that save something are worth a line
    if undone.error is not None:
        return replace(row, state=IN_USE, why="this setting does not go without it")
    if _needed(undone) > _needed(now):
        why = "the setting saves more already" if saved < 0 else ""
        return replace(row, state=IN_USE, before=_needed(undone), after=_needed(now), why=why)
    why = "changes nothing on this model" if "swa_full" not in knob.changes else "it has no sliding windows"
    return replace(row, state=NOT_THIS_MODEL, why=why)


def _change(knob: Knob, setting: Setting) -> str:
    """What the knob does to this setting, in words."""
    if "kv_k" in knob.changes:
        needs = ", with flash attention, which it needs" if setting.flash_attention is False else ""
        return f"{setting.kv_k} → {knob.changes['kv_k']}{needs}"
    if "context" in knob.changes:
        return f"{setting.context:,} → {knob.changes['context']:,} tokens"
    for key, what in _COUNTS.items():
        if key in knob.changes:
            return f"{getattr(setting, key):,} → {knob.changes[key]:,} {what}"
    return "only what the windows see is kept" if "swa_full" in knob.changes else "scores of attention are not kept"


def _mapped(now: MemoryEstimate, mapped: MemoryEstimate) -> Technique:
    """What the system may drop when memory is short: all weights that are used as they lie in the file."""
    repacked = mapped.part(REPACKED_PAGES)
    cost = "when memory is short, weights are read from the disk again and again: slow"
    if repacked:
        cost += f"; {repacked / _GIB:.2f} GiB of weights are kept rearranged, which cannot be dropped"
    after = _needed(mapped) - mapped.part("weights") + repacked
    state = IN_USE if now.setting.mmap else AVAILABLE
    what = "weights are pages of the file, which the system may drop"
    return Technique(
        "mapped instead of loaded", what, cost, state, _needed(now), after, "llmkit chat FILE", how=DERIVED
    )


# ── other types ──


def _quantization(draft: GgufDraft, now: MemoryEstimate) -> Iterator[Technique]:
    """The usual quant, or the next smaller one; and it with fewer bits in the middle."""
    steps = [label for label in _LADDER if label == _USUAL or _LADDER.index(label) > _LADDER.index(_USUAL)]
    made = {each.label: each for each in memory.variants(draft, steps)}
    smaller = [each for each in made.values() if each.file_nbytes < 0.97 * now.variant.file_nbytes]
    name, again = "weight quantization", _requantize(draft)
    if not smaller:
        yield Technique(name, "", "", NOT_THIS_MODEL, why=f"{now.variant.label} is as small as the usual quants get")
        target = made[_LADDER[-1]]
    else:
        target = smaller[0]
    mixed = _mix(draft, target)
    asked = [target, *([mixed[0]] if mixed else [])]
    found = [row[0] for row in memory.estimate(draft, asked, [now.setting])]
    if smaller:
        own = memory.own_label(draft) if now.variant.label == memory.COPY else now.variant.label
        yield Technique(
            name, f"{own} → {target.label}", _published(target.label) + again[1], AVAILABLE, _needed(now),
            _needed(found[0]), f"llmkit quantize MODEL {target.label}{again[0]}", how=_how(found[0]),
        )  # fmt: skip
    if mixed:
        _, kind, pattern, blocks = mixed
        saves = _needed(found[1]) < _needed(found[0])
        yield Technique(
            "mixed (adaptive) bits", f"{target.label} → with {kind.name} in the feed-forward of {blocks}",
            "nobody has measured which blocks of this model bear it; those in the middle usually do" + again[1],
            AVAILABLE if saves else NOT_THIS_MODEL, _needed(found[0]), _needed(found[1]),
            f"llmkit quantize MODEL {target.label} --tensor-type '{pattern}={kind.name}'{again[0]}",
            "" if saves else f"its rows do not divide into smaller {kind.name} blocks", _how(found[1]),
        )  # fmt: skip


def _mix(draft: GgufDraft, plain: Variant) -> tuple[Variant, TensorType, str, str] | None:
    """The quant with the next smaller type in the feed-forward of the middle two thirds of blocks; None for Q2_K."""
    below = _LADDER[_LADDER.index(plain.label) + 1 :]
    n_layer = n_layer_of(draft)
    middle = range(n_layer // 6, n_layer - n_layer // 6)
    kind = QUANTS[below[0]].default if below else None
    if kind is None or not middle:
        return None
    pattern = rf"blk\.({_numbers(middle)})\.ffn_(gate|up|down)(_exps)?\."
    try:
        types = ask_types(draft, [Recipe(QUANTS[plain.label], ((pattern, kind),))], has_imatrix=True)[0].types
    except LlmkitError:
        return None
    more = sum(_nbytes(tensor, types) - _nbytes(tensor, plain.types) for tensor in draft.tensors)
    bits = plain.bits_per_weight + Fraction(8 * more, max(1, draft.n_weights))
    mixed = Variant(f"{plain.label} mixed", types, plain.file_nbytes + more, bits)
    return mixed, kind, pattern, f"blocks {middle[0]} to {middle[-1]}"


def _nbytes(tensor: LazyTensor, types: Mapping[str, TensorType]) -> int:
    return padded(tensor_nbytes(tensor.shape, types[tensor.name]))


def _numbers(span: range) -> str:
    """A regular expression of the numbers in `span`, by tens."""
    tens: dict[int, list[int]] = {}
    for number in span:
        tens.setdefault(number // 10, []).append(number % 10)
    return "|".join(
        f"{ten or ''}{units[0] if len(units) == 1 else f'[{units[0]}-{units[-1]}]'}" for ten, units in tens.items()
    )


def _requantize(draft: GgufDraft) -> tuple[str, str]:
    """What a source that is quantized already adds to command and price."""
    if any(tensor.type.quantized for tensor in draft.tensors):
        return " --requantize", "; from a quantized file errors add up: better from the original"
    return "", ""


def _published(label: str) -> str:
    known = hint(label)
    if known is None:
        return "no published figure"
    return f"{known.word}: a KL divergence of {known.divergence:.3f} nats ({SOURCE}); small models lose more"


# ── other places ──


def _offloading(draft: GgufDraft, now: MemoryEstimate, gpus: Sequence[tuple[str, int]]) -> Technique:
    """Layers on GPUs: those that fit, or where there is no GPU what all of them would take."""
    spread = split(draft, now, gpus or [("a GPU", _ROOMY)])
    held = sum(place.nbytes for place in spread.devices)
    row = Technique(
        "offloading layers", f"{spread.gpu_layers} of {spread.n_layer + 1} layers to the GPU",
        f"{held / _GIB:.2f} GiB of the GPU's memory", AVAILABLE, _needed(now), spread.host.nbytes,
        f"llmkit chat FILE --gpu-layers {spread.gpu_layers}", how=DERIVED,
    )  # fmt: skip
    if not gpus:
        return replace(row, state=NOT_HERE, why="the engine finds no GPU on this machine")
    return row if spread.gpu_layers else replace(row, state=NOT_HERE, why="not one layer fits on the GPU")


def _experts(draft: GgufDraft, now: MemoryEstimate, gpus: Sequence[tuple[str, int]]) -> Technique:
    """Experts in the CPU's memory: what that saves on a GPU that has all layers."""
    row = Technique(
        "experts on CPU", "all layers on the GPU but their experts",
        "experts are read at the speed of the CPU's memory", AVAILABLE,
        command="llama-server -m FILE -ngl all --cpu-moe", how=DERIVED,
    )  # fmt: skip
    if not any("_exps." in tensor.name for tensor in draft.tensors):
        return replace(row, state=NOT_THIS_MODEL, what="", why="it has no experts")
    roomy = [("a GPU", _ROOMY)]
    before = split(draft, now, roomy).devices[0].nbytes
    after = split(draft, now, roomy, cpu_experts=True).devices[0].nbytes
    row = replace(row, before=before, after=after, what=f"{row.what}; bytes are the GPU's")
    return row if gpus else replace(row, state=NOT_HERE, why="the engine finds no GPU on this machine")


# ── other models ──


def _pruning(draft: GgufDraft, now: MemoryEstimate) -> Technique:
    n_layer = n_layer_of(draft)
    count = max(1, n_layer // 4)
    after = _estimated(without_blocks(draft, count), now)
    return Technique(
        "pruning blocks", f"{count} of {n_layer} blocks left out",
        "questions are answered nearly as before once the rest is trained again (Gromov et al. 2025); arithmetic and "
        "reasoning do not come back (arXiv 2602.01997)",
        NOT_HERE, _needed(now), _needed(after), why="llmkit cannot prune yet", how=_how(after),
    )  # fmt: skip


def _vocabulary(draft: GgufDraft, now: MemoryEstimate) -> Technique:
    n_tokens = memory.n_vocab(draft)
    after = _estimated(with_tokens(draft, n_tokens // 2), now)
    return Technique(
        "smaller vocabulary", f"{n_tokens // 2:,} of {n_tokens:,} tokens kept",
        "text in the languages that are cut takes more tokens, or cannot be written; needs a new tokenizer",
        NOT_HERE, _needed(now), _needed(after), why="llmkit cannot cut vocabularies yet", how=_how(after),
    )  # fmt: skip


def _estimated(draft: GgufDraft, now: MemoryEstimate) -> MemoryEstimate:
    """The same quant and setting on another draft."""
    found = memory.estimate(draft, memory.variants(draft, [now.variant.label]), [now.setting])[0][0]
    if found.error is not None:
        raise LlmkitError(found.error)
    return found


# ── words ──


def _needed(estimate: MemoryEstimate) -> int:
    return estimate.needed_nbytes


def _how(estimate: MemoryEstimate) -> str:
    return MEASURED if estimate.tier == EXACT else DERIVED
