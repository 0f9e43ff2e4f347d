"""Tell what a model takes in memory, to the byte, before it is made or fetched.

The engine itself lays the model out without its weights, in a child process, so the figures are those llama.cpp will
allocate. With no QUANT all bit widths are compared; with one its parts are shown. Of a model of the Hub only headers
are fetched. MODEL may also be a mere count of parameters, such as 7B: then the rule of thumb answers.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from . import memory_arguments, memory_views, models, output
from .memory_arguments import MLX, USUAL_CONTEXT
from .quantize import count_argument

if TYPE_CHECKING:
    from ..convert import GgufDraft
    from ..memory.setting import Setting
    from ..memory.table import Row
    from .memory_arguments import Place
    from .models import Source

EXAMPLES = (
    "llmkit estimate Qwen/Qwen3-8B",
    "llmkit estimate Qwen/Qwen3-8B Q4_K_M --context 32768 --techniques",
    "llmkit estimate model-Q4_K_M.gguf --runtime llama-server --kv-type q8_0",
    "llmkit estimate Qwen/Qwen3-8B --fit 'RTX 4060 Ti' --gpu-layers auto",
    "llmkit estimate model-Q4_K_M.gguf --verify",
    "llmkit estimate 70B",
)
_COUNT = re.compile(r"(\d+x)?\d+(\.\d+)?[KMBTkmbt]")
_USUAL = "Q4_K_M"
_MOST_CONTEXT = 1 << 26


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, quants, and how it will be run."""
    parser.add_argument("model", metavar="MODEL", help=f"{models.MODEL_HELP}; or a count: 7B")
    parser.add_argument("quants", nargs="*", metavar="QUANT", help="compare these (default: one for each bit width)")
    parser.add_argument(
        "--context", type=_context, default=USUAL_CONTEXT, metavar="N|max", help="tokens (default 4096)"
    )
    parser.add_argument(
        "--fit", metavar="SIZE|DEVICE", help="memory there is: 8GB, 'RTX 4090', 'M2 Max 64GB' (default: this machine)"
    )
    parser.add_argument(
        "--runtime", default="llmkit", metavar="NAME", help="llmkit, llama-server, llama-cpp-python, ollama, mlx"
    )
    parser.add_argument("--kv-type", metavar="TYPE", help="type of the KV cache: f16, q8_0, q4_0 …")
    parser.add_argument("--batch", type=count_argument, metavar="N", help="tokens handed over at once")
    parser.add_argument("--ubatch", type=count_argument, metavar="N", help="tokens worked on at once")
    parser.add_argument("--parallel", type=count_argument, metavar="N", help="conversations at the same time")
    parser.add_argument(
        "--flash-attention", action=argparse.BooleanOptionalAction, help="with or without it (default: as the runtime)"
    )
    parser.add_argument("--no-mmap", action="store_true", help="load the file instead of mapping it")
    parser.add_argument(
        "--gpu-layers", type=_layers, metavar="N|auto", help="split over the GPUs of --fit (commas between several)"
    )
    parser.add_argument("--cpu-moe", action="store_true", help="with --gpu-layers: experts stay on the CPU")
    parser.add_argument("--projector", type=Path, metavar="FILE", help="a multimodal projector (mmproj) beside it")
    parser.add_argument("--draft", type=Path, metavar="FILE", help="a draft model beside it, for speculative decoding")
    parser.add_argument("--techniques", action="store_true", help="what each way of saving memory saves on this model")
    parser.add_argument("--verify", action="store_true", help="load it for real and compare; exit 1 on a difference")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory against context, as .png or .svg")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _context(text: str) -> int | str:
    if text == "max":
        return text
    # laying a context out takes memory for each token, though no cache is made
    if (count := count_argument(text)) > _MOST_CONTEXT:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {_MOST_CONTEXT:,} tokens: no model has such a context")
    return count


def _layers(text: str) -> int | str:
    return text if text == "auto" else count_argument(text, least=0)


def run(args: argparse.Namespace) -> int:
    """Measure and show."""
    from ..errors import LlmkitError

    if args.cpu_moe and args.gpu_layers is None:
        raise LlmkitError("--cpu-moe is about GPUs: it needs --gpu-layers", "For example --gpu-layers auto.")
    if args.plot:
        from ..memory import plot

        plot.check(args.plot)
    place = memory_arguments.place(args.fit)
    if _COUNT.fullmatch(args.model) and not Path(args.model).exists():
        return _rough(args, place)
    from ..memory import estimate as memory

    with models.outline(args.model) as source:
        draft = _draft(source)
        if draft is None:
            return _closed(args, source, place)
        trained = memory.trained_context(draft) or USUAL_CONTEXT
        if args.runtime.lower() == MLX:
            return _mlx(args, draft, trained, place)
        setting = memory_arguments.setting(args, trained)
        if args.verify:
            return _verify(args, source, setting)
        return _exact(args, source, draft, setting, place)


def _exact(args: argparse.Namespace, source: Source, draft: GgufDraft, setting: Setting, place: Place) -> int:
    from ..memory import estimate as memory
    from ..memory import table

    trained = memory.trained_context(draft) or USUAL_CONTEXT
    rows = table.rows(
        draft, memory_arguments.labels(args, draft), setting, trained=trained, budget=place.nbytes, device=place.device
    )
    if why := rows[0].estimate.why_not_asked:
        memory_arguments.only_for_the_engine(args, "this model")
        output.note(f"note: the engine could not be asked, so closed forms answer: {why}")
    rows = _with_companions(args, rows, setting, place)
    if args.plot:
        memory_views.plot(args.plot, draft, rows, setting, trained, place.nbytes, place.name)
    facts: dict[str, object] = {
        "fetched_nbytes": source.shadow.fetched_nbytes if source.shadow else 0,
        "context_trained": trained,
    }
    one = rows[0] if len(rows) == 1 else None
    if args.techniques:
        facts["techniques"] = _techniques(args, draft, one or _usual(rows), setting, place)
    if args.gpu_layers is not None:
        facts["split"] = _split(args, draft, one or _usual(rows), place)
    if args.json:
        output.emit_json(_facts(args, setting, place, rows) | facts)
        return 0
    if not (args.techniques or args.gpu_layers is not None):
        if one:
            memory_views.parts(one, _label(one, draft), place.name, on_gpu=bool(place.gpus))
        else:
            memory_views.table(rows, setting, on_gpu=bool(place.gpus))
        _close(args, draft, rows, setting, place)
    return 0


def _label(row: Row, draft: GgufDraft) -> str:
    """The quant in words; of a file taken as it is the one it is in."""
    from ..memory import estimate as memory

    label = row.estimate.variant.label
    return f"{memory.own_label(draft)}, as it is" if label == memory.COPY else label


def _usual(rows: list[Row]) -> Row:
    """The row techniques are shown on when several were asked for: the usual quant, else the first."""
    return next((row for row in rows if row.estimate.variant.label == _USUAL), rows[0])


def _draft(source: Source) -> GgufDraft | None:
    """The model's outline; with its tokenizer where that is here, which makes the figures exact to the last token.

    None where nobody here knows the architecture: config.json alone has to do then.
    """
    from .. import convert
    from ..errors import ModelNotFound, Unsupported

    try:
        return convert.open_draft(source.path, tokenizer=source.shadow is None)
    except ModelNotFound as error:
        if source.shadow is not None or not (source.path / "config.json").is_file():
            raise
        output.note(f"note: {error.message}; measured without it")
        return convert.open_draft(source.path, tokenizer=False)
    except Unsupported as error:
        if not source.path.is_dir():
            raise
        output.note(f"note: {error.message}; so closed forms answer, from config.json alone")
        return None


def _with_companions(args: argparse.Namespace, rows: list[Row], setting: Setting, place: Place) -> list[Row]:
    """The rows with a projector and a draft model beside them, where they were named."""
    from dataclasses import replace

    from ..memory import companions

    for path, role in ((args.projector, companions.PROJECTOR), (args.draft, companions.DRAFT)):
        if path is None:
            continue
        added = companions.companion(path, role, setting)
        for remark in added.remarks:
            output.note(f"note: {remark}")
        both = [replace(row.estimate, parts=(*row.estimate.parts, *added.parts)) for row in rows]
        rows = [
            replace(row, estimate=each, longest=None, fits=each.needed_nbytes <= place.nbytes)
            for row, each in zip(rows, both, strict=True)
        ]
    return rows


# ── other questions ──


def _techniques(args: argparse.Namespace, draft: GgufDraft, row: Row, setting: Setting, place: Place) -> object:
    from ..memory import techniques

    found = techniques.techniques(draft, row.estimate.variant, setting, gpus=place.gpus)
    if not args.json:
        memory_views.techniques(found, row, _label(row, draft), args.model)
    return found


def _split(args: argparse.Namespace, draft: GgufDraft, row: Row, place: Place) -> object:
    from ..errors import LlmkitError
    from ..memory import split

    gpus = place.gpus
    if not gpus and args.gpu_layers != 0:
        hint = "Name one: --fit 'RTX 4090', or two: --fit 'A100,A100'."
        raise LlmkitError("--gpu-layers: there is no GPU here", hint)
    metal = any(device.kind == "apple" for device in place.devices)
    count = None if args.gpu_layers == "auto" else args.gpu_layers
    found = split.split(
        draft,
        row.estimate,
        gpus,
        gpu_layers=count,
        cpu_experts=args.cpu_moe,
        context_nbytes=(0, 0) if metal else split.CUDA_CONTEXT,
    )
    if not args.json:
        memory_views.split(found, _label(row, draft))
    return found


def _verify(args: argparse.Namespace, source: Source, setting: Setting) -> int:
    """Load for real and compare. A checkpoint is quantized to a temporary file first."""
    import tempfile

    from ..errors import LlmkitError
    from ..memory import reality

    if source.shadow is not None:
        raise LlmkitError(f"{args.model}: is not on this machine", f"llmkit download {output.shell_word(args.model)}")
    with tempfile.TemporaryDirectory(prefix="llmkit-") as folder:
        path = source.path
        if path.is_dir():
            names = memory_arguments.names(args.quants)
            if len(names) != 1:
                raise LlmkitError("--verify of a checkpoint needs one QUANT to make and load", "For example Q4_K_M.")
            output.note(f"Quantizing to {names[0]} in a temporary folder …")
            path = models.made_in(path, names[0], Path(folder))
        found = reality.verify(path, setting)
    if args.json:
        output.emit_json(
            {"model": args.model, "setting": setting, "differences": found, "holds": [f.holds for f in found]}
        )
    else:
        memory_views.differences(found)
    return 0 if all(each.holds for each in found) else 1


def _mlx(args: argparse.Namespace, draft: GgufDraft, trained: int, place: Place) -> int:
    from ..memory import mlx_estimate

    memory_arguments.only_for_the_engine(args, "MLX")
    if not any(device.kind == "apple" for device in place.devices):
        output.note("note: how much macOS lets a model have depends on the Mac: name one, --fit 'M2 Max 64GB'")
    context = trained if args.context == "max" else args.context
    found = mlx_estimate.rows(draft, context)
    if args.json:
        output.emit_json({"model": args.model, "runtime": "mlx", "budget_nbytes": place.nbytes, "rows": found})
    else:
        memory_views.mlx(found, place.nbytes, place.words)
    return 0


def _closed(args: argparse.Namespace, source: Source, place: Place) -> int:
    """Tier B from config.json alone."""
    from .. import checkpoint, model
    from ..memory import fallback, table
    from ..memory.closed_form import shape

    memory_arguments.only_for_the_engine(args, "a model known by its config.json alone")
    found = shape.of_config(checkpoint.read_json(source.path / "config.json"))
    setting = memory_arguments.setting(args, found.context_trained or USUAL_CONTEXT)
    labels = memory_arguments.names(args.quants or [model.parse(args.model).quant]) or list(table.LABELS)
    rows = table.without_engine(fallback.of_shape(found, labels, setting), place.nbytes)
    if args.json:
        fetched = source.shadow.fetched_nbytes if source.shadow else 0
        output.emit_json(_facts(args, setting, place, rows) | {"fetched_nbytes": fetched})
    elif len(rows) == 1:
        memory_views.parts(rows[0], rows[0].estimate.variant.label, place.name, on_gpu=bool(place.gpus))
    else:
        memory_views.table(rows, setting, on_gpu=bool(place.gpus))
    return 0


def _rough(args: argparse.Namespace, place: Place) -> int:
    """Tier C from a count."""
    from ..memory import closed_form, fallback, table

    memory_arguments.only_for_the_engine(args, "a mere count")
    if args.context != USUAL_CONTEXT:
        output.note(
            f"note: a mere count says nothing of contexts: the known bounds are those of {USUAL_CONTEXT:,} tokens"
        )
        args.context = USUAL_CONTEXT
    setting = memory_arguments.setting(args, USUAL_CONTEXT)
    rules = fallback.rules(closed_form.parse_count(args.model), memory_arguments.names(args.quants))
    if args.json:
        rows = table.without_engine(fallback.of_rules(rules, setting), place.nbytes)
        output.emit_json(_facts(args, setting, place, rows) | {"rules": rules})
    else:
        memory_views.rough(rules, place.nbytes, place.words)
    return 0


# ── closing ──


def _close(args: argparse.Namespace, draft: GgufDraft, rows: list[Row], setting: Setting, place: Place) -> None:
    """The best that fits, why, which knobs would help, and the next command."""
    from ..memory import knobs, table
    from ..memory.estimate import COPY

    chosen = table.best(rows)
    asked = chosen or rows[-1]
    if args.fit and not asked.estimate.why_not_asked:
        found = knobs.of(draft, asked.estimate.variant, setting)[:4]
        if found:
            output.note(f"What would help most ({_label(asked, draft)}):")
        for knob in found:
            output.note(f"  {output.size(knob.saved, binary=True):>10}  {knob.name} ({knob.option}); costs {knob.cost}")
    if chosen is None:
        output.note(f"{'It does not fit' if len(rows) == 1 else 'None of them fits'}: {place.words}.")
        return
    label = _label(chosen, draft)
    longest = f", up to {chosen.longest:,} tokens" if chosen.longest else ""
    why = "" if len(rows) == 1 else " the least published loss of those that fit;"
    output.note(
        f"{label}:{why} {place.words}, {output.size(chosen.estimate.needed_nbytes, binary=True)} needed{longest}."
    )
    if chosen.estimate.why_not_asked:  # what the engine cannot lay out it cannot run
        return
    word, made = output.shell_word(args.model), chosen.estimate.variant.label
    context = "" if setting.context == USUAL_CONTEXT else f" --context {setting.context}"
    output.next_command(f"llmkit chat {word}{context}" if made == COPY else f"llmkit quantize {word} {made}")


def _facts(args: argparse.Namespace, setting: Setting, place: Place, rows: list[Row]) -> dict[str, object]:
    return {
        "model": args.model,
        "runtime": args.runtime.lower(),
        "setting": setting,
        "budget_nbytes": place.nbytes,
        "devices": [device.name for device in place.devices],
        "rows": [memory_views.row_facts(row) for row in rows],
    }
