"""Have an answer again from its receipt, token by token, or see where and why it differs.

FILE is the JSON or the HTML page that /receipt writes in a chat. The exit code is 0 when every token came again, 1 when
one did not. Without --model the file is looked for beside the receipt, here, and under its name on the Hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AccessDenied, LlmkitError, ModelNotFound
from . import models, output

if TYPE_CHECKING:
    from ..inspection.receipt import Receipt
    from ..inspection.replay import Candidate, Parting, Report

EXAMPLES = (
    "llmkit replay answer.html",
    "llmkit replay answer.json --model model-Q4_K_M.gguf",
    "llmkit replay answer.json --model org/name:Q8_0 --json",
)
_BACKENDS = (("MLX", "mlx"), ("transformers", "transformers"))  # engines as receipts name them
_MOST_NBYTES = 256 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE and the model."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a receipt: .json or .html")
    parser.add_argument("--model", metavar="MODEL", help=f"{models.RUN_HELP} (default: what the receipt names)")
    models.add_backend_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Read the receipt, load the model, replay."""
    from ..inspection import receipt as receipts
    from ..inspection import replay

    text = _read(args.file)
    try:
        facts = receipts.facts_in(text)
        receipt = receipts.from_json(facts)
    except LlmkitError as error:
        error.message = f"{args.file}: {error.message}"
        raise
    if args.threads is None:
        args.threads = receipt.threads
    args.context = receipt.context
    if args.backend == "auto":
        args.backend = next((name for word, name in _BACKENDS if receipt.engine.startswith(word)), "auto")
    with models.opened(args, args.model or _model_of(receipt, args.file)) as backend:
        with output.ProgressBar() as bar:
            report = replay.replay(receipt, backend, facts=facts, on_progress=bar)
    if args.json:
        output.emit_json(report)
    else:
        show(receipt, report)
    return 0 if report.equal else 1


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_NBYTES:
            raise LlmkitError(f"{path}: is {path.stat().st_size:,} bytes, too much for a receipt")
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ModelNotFound(f"{path}: no such file", "In a chat, /receipt FILE writes one.") from None
    except PermissionError:
        raise AccessDenied(f"{path}: may not be read") from None
    except OSError as error:
        raise LlmkitError(f"{path}: cannot be read: {error.strerror}") from error


def _model_of(receipt: Receipt, file: Path) -> str:
    """What to load for a receipt when nobody says. Raises ModelNotFound."""
    names = [each.name for each in receipt.files if each.name.endswith(".gguf") and Path(each.name).name == each.name]
    for folder in (file.parent, Path()):
        if names and (folder / names[0]).is_file():
            return str(folder / names[0])
    if receipt.source:
        return receipt.source
    what = f"{receipt.model} ({', '.join(each.name for each in receipt.files) or 'no file named'})"
    raise ModelNotFound(f"{file}: where is the model {what}?", "Name it: --model FILE.")


# ── showing ──


def show(receipt: Receipt, report: Report) -> None:
    """The verdict, what differs around it, and the place where it parts."""
    answer = receipt.answer
    if report.equal:
        given = f" ({report.given} of them set, as then)" if report.given else ""
        output.emit(f"The same: all {report.tokens} tokens came again{given}.")
    else:
        output.emit(f"It differs: {report.same} of {report.tokens} tokens came again, then another one.")
    for line in report.why:
        output.emit(f"  {line}")
    if report.parting:
        output.emit()
        _show_parting(report.parting, b"".join(step.piece for step in answer.steps[: report.same]))
    if report.circumstances:
        output.emit()
        rows = [(each.what, each.recorded, each.found, each.meaning) for each in report.circumstances]
        output.table(("not as it was", "receipt", "here", "meaning"), rows)


def _show_parting(parting: Parting, before: bytes) -> None:
    text = before.decode("utf-8", "replace")
    output.emit(f"Token {parting.position + 1}, after {text[-60:]!r}:")
    rows = [
        ("in the receipt", *_cells(parting.recorded)),
        ("the same token here", *_cells(parting.recorded_here)),
        ("drawn here", *_cells(parting.found)),
    ]
    output.table(("", "token", "id", "raw probability", "sampled probability"), rows, "llrrr")


def _cells(each: Candidate) -> tuple[object, ...]:
    raw = "-" if each.raw_probability != each.raw_probability else f"{each.raw_probability:.3%}"
    return each.piece, each.id, raw, "-" if each.sampled_probability is None else f"{each.sampled_probability:.3%}"
