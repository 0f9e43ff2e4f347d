"""What a model takes in memory, part by part, for quants that need not exist and models that need not be here.

    variants(draft, quants) → [Variant]            types and file sizes, from the engine's dry run
    estimate(draft, variants, settings) → table    the engine asked (tier "exact"), else closed forms

Each part says how its figure was got: "measured" by the engine's own layout (no_alloc), "derived", or "looked up".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

from ..convert.draft import GgufDraft
from ..errors import EngineError
from ..gguf import Array, Value
from ..gguf_writer import header_bytes, padded, tensor_nbytes
from ..quantize import Recipe
from ..quantize.oracle import Choice
from ..quantize.oracle import ask as ask_types
from ..quantize.plan import provenance
from ..quants import QUANTS, QUANTS_BY_FTYPE, TensorType
from ..roles import ROLES, role_of
from . import fallback, oracle, resident
from .parts import DERIVED, EXACT, MEASURED, REPACKED_PAGES, MemoryEstimate, Part, Variant
from .setting import Setting

COPY = "COPY"  # the quant that is the model as it is
_REPACKED = "_REPACK"


def variants(draft: GgufDraft, labels: Sequence[str]) -> list[Variant]:
    """The model in each quant of QUANTS; COPY is the model as it is, of which the engine is asked nothing.

    An importance matrix changes some types of many quants: it is taken for granted where the engine insists on one.
    Raises EngineError, Unsupported.
    """
    asked = [label for label in labels if label != COPY]
    made = dict(zip(asked, _choices(draft, asked, has_imatrix=False), strict=True)) if asked else {}
    needy = [label for label, choice in made.items() if choice.needs_imatrix]
    if needy:
        made |= zip(needy, _choices(draft, needy, has_imatrix=True), strict=True)
    as_it_is = {tensor.name: tensor.type for tensor in draft.tensors}
    return [_variant(draft, label, made[label].types if label in made else as_it_is) for label in labels]


def _choices(draft: GgufDraft, labels: Sequence[str], *, has_imatrix: bool) -> list[Choice]:
    return ask_types(draft, [Recipe(QUANTS[label]) for label in labels], has_imatrix=has_imatrix)


def _variant(draft: GgufDraft, label: str, types: Mapping[str, TensorType]) -> Variant:
    rows = [(tensor.name, tensor.shape, types[tensor.name]) for tensor in draft.tensors]
    data = sum(padded(tensor_nbytes(shape, kind)) for _, shape, kind in rows)
    bits = Fraction(8 * sum(tensor_nbytes(shape, kind) for _, shape, kind in rows), max(1, draft.n_weights))
    header, _ = header_bytes(_file_metadata(draft, label), rows)
    return Variant(label, types, len(header) + data, bits)


def _file_metadata(draft: GgufDraft, label: str) -> dict[str, Value]:
    """What a file that llmkit makes says of itself: the model's metadata, and where it comes from."""
    kept = {key: value for key, value in draft.metadata.items() if not key.startswith("llmkit.")}
    numbers = dict.fromkeys(("general.quantization_version", "general.file_type"), Value.uint32(0))
    return {**numbers, **kept, **provenance(draft, label)}


def estimate(draft: GgufDraft, chosen: Sequence[Variant], settings: Sequence[Setting]) -> list[list[MemoryEstimate]]:
    """The memory of each variant in each setting. Where the engine cannot be asked, closed forms answer.

    Raises LlmkitError when neither can.
    """
    try:
        asked = [replace(each, output_rows=each.rows) for each in settings if each.rows < each.reserved_rows]
        layouts = oracle.ask(draft, [variant.types for variant in chosen], settings, first=asked)
    except EngineError as error:
        return fallback.closed(draft, chosen, settings, error)
    reduced = iter(layouts[0][len(settings) :])
    untouched = [
        _untouched(layout, next(reduced)) if each.rows < each.reserved_rows else 0
        for each, layout in zip(settings, layouts[0], strict=False)
    ]
    return [
        [
            _exact(draft, variant, setting, layout, spare)
            for setting, layout, spare in zip(settings, row, untouched, strict=False)
        ]
        for variant, row in zip(chosen, layouts, strict=True)
    ]


def _untouched(reserved: oracle.Layout | str, asked: oracle.Layout | str) -> int:
    """Bytes of the compute buffer that are reserved for rows of logits beyond those asked for."""
    if isinstance(reserved, str) or isinstance(asked, str):
        return 0
    return max(0, sum(reserved.compute.values()) - sum(asked.compute.values()))


def _exact(
    draft: GgufDraft, variant: Variant, setting: Setting, layout: oracle.Layout | str, untouched: int
) -> MemoryEstimate:
    if isinstance(layout, str):
        return MemoryEstimate(variant, setting, EXACT, setting.context, (), layout)
    weights = placed(draft, variant)
    parts = [
        *_weights(draft, variant, setting, layout, weights),
        *_caches(layout),
        Part("compute buffer", sum(layout.compute.values()), MEASURED),
        # logits on the host (llama-context.cpp, output_reserve)
        Part("output buffer", 4 * n_vocab(draft) * setting.rows, DERIVED),
        Part("work buffer", _work_nbytes(draft, setting, layout, weights), DERIVED),
        resident.overhead(draft.metadata, n_tokens=n_vocab(draft), n_tensors=len(draft.tensors)),
    ]
    kept = tuple(part for part in parts if part.nbytes)
    return MemoryEstimate(variant, setting, EXACT, layout.n_ctx, kept, kv=layout.kv, untouched=untouched)


def placed(draft: GgufDraft, variant: Variant) -> list[resident.Weight]:
    """The tensors where they will lie: a file that is taken as it is keeps its order, else it is ours."""
    spans = [tensor.span for tensor in draft.tensors]
    if variant.label == COPY and all(path.suffix == ".gguf" for path in draft.paths) and all(spans):
        places = [span for span in spans if span]
    else:
        offsets = accumulate(
            (padded(tensor_nbytes(tensor.shape, variant.types[tensor.name])) for tensor in draft.tensors), initial=0
        )
        places = [(Path(), offset) for offset, _ in zip(offsets, draft.tensors, strict=False)]
    return [
        resident.Weight(tensor.name, tensor.shape, variant.types[tensor.name], *place)
        for tensor, place in zip(draft.tensors, places, strict=True)
    ]


def _weights(
    draft: GgufDraft, variant: Variant, setting: Setting, layout: oracle.Layout, placed: Sequence[resident.Weight]
) -> Iterator[Part]:
    """The model's buffers, by role; what the engine adds to the tensors' bytes is alignment.

    Mapped weights span the file from the first to the last of them, so pages of repacked ones stay mapped as well.
    """
    total = sum(layout.weights.values())
    repacked = sum(nbytes for name, nbytes in layout.weights.items() if name.endswith(_REPACKED))
    again = 0
    if setting.mmap:
        mapped = resident.mapped_nbytes(placed, repacked)
        again = repacked if mapped is None else mapped + repacked - total
        total += min(0, again)  # nothing stands behind the last tensor of a file
    by_role = dict.fromkeys(ROLES, 0)
    for tensor in draft.tensors:
        by_role[role_of(tensor.name)] += tensor_nbytes(tensor.shape, variant.types[tensor.name])
    parts = [Part(role, nbytes, DERIVED) for role, nbytes in by_role.items() if nbytes]
    if rest := total - sum(part.nbytes for part in parts):
        parts.append(Part("alignment and the engine's own tensors", rest, DERIVED))
    yield Part("weights", total, MEASURED, tuple(parts))
    yield Part(REPACKED_PAGES, max(0, again), DERIVED, evictable=True)


def _work_nbytes(draft: GgufDraft, setting: Setting, layout: oracle.Layout, placed: Sequence[resident.Weight]) -> int:
    """The CPU's work buffer in this setting."""
    ubatch = min(setting.ubatch, setting.batch, layout.n_ctx)
    cells = max((cache.cells for cache in layout.kv), default=0)
    # the engine lets flash attention on where it may decide, on CPUs
    scores = cells * ubatch * _each(draft, "attention.head_count") if setting.flash_attention is False else 0
    used = max(1, _each(draft, "expert_used_count"))
    return resident.work_nbytes(placed, ubatch=ubatch, scores=scores, experts_used=used)


def _each(draft: GgufDraft, key: str) -> int:
    """A number of the model's header, the largest where each layer has its own; 0 when it has none."""
    value = draft.metadata.get(f"{draft.metadata['general.architecture'].data}.{key}")
    if value is None:
        return 0
    found = list(value.data) if isinstance(value.data, Array) else [value.data]
    return max((int(each) for each in found if isinstance(each, (int, float))), default=0)


def _caches(layout: oracle.Layout) -> Iterator[Part]:
    """KV cache and recurrent state. The total is exact; its split over kinds of layers is from the log's figures."""
    total = sum(layout.context.values())
    recurrent = min(total, sum(cache.nbytes for cache in layout.recurrent))
    if layout.recurrent and not layout.kv:
        recurrent = total
    kv = total - recurrent
    if kv:
        cells = max((cache.cells for cache in layout.kv), default=0)
        kinds = [
            (
                f"{cache.layers} layers, {cache.cells} tokens" + ("" if cache.cells == cells else " (window)"),
                cache.nbytes,
            )
            for cache in layout.kv
        ]
        if len(kinds) > 1:
            kinds[-1] = (kinds[-1][0], kv - sum(nbytes for _, nbytes in kinds[:-1]))
            yield Part("KV cache", kv, MEASURED, tuple(Part(name, nbytes, MEASURED) for name, nbytes in kinds))
        else:
            yield Part("KV cache", kv, MEASURED)
    if recurrent:
        yield Part("recurrent state", recurrent, MEASURED)


def own_label(draft: GgufDraft) -> str:
    """The quant the model is in: as its header says, else the type of its first matrix."""
    stated = draft.metadata.get("general.file_type")
    named = QUANTS_BY_FTYPE.get(stated.data) if stated and isinstance(stated.data, int) else None
    return named.name if named else draft.own_type.name


def trained_context(draft: GgufDraft) -> int | None:
    """Tokens the model was trained for, None where its header does not say."""
    return _each(draft, "context_length") or None


def n_vocab(draft: GgufDraft) -> int:
    """Tokens of the vocabulary: those listed, else the rows of the embedding."""
    tokens = draft.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and isinstance(tokens.data, Array):
        return len(tokens.data)
    return next((tensor.shape[0] for tensor in draft.tensors if tensor.name == "token_embd.weight"), 0)
