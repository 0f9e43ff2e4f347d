"""Explain a term in three plain sentences, with a number from your own model.

Without TERM all terms are listed. The number comes from the model that chat used last, or from --model.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import models, output

if TYPE_CHECKING:
    from pathlib import Path

    from ..inspection.explain import Explanation
    from ..inspection.term_facts import Subject

EXAMPLES = (
    "llmkit explain",
    "llmkit explain KV cache",
    "llmkit explain softmax --json",
    "llmkit explain bits per weight --model SmolLM2-135M-Instruct-Q8_0.gguf",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The term, and which model to tell of."""
    parser.add_argument("term", nargs="*", metavar="TERM", help="a word or several: temperature, KV cache, Q4_K")
    parser.add_argument("--model", metavar="MODEL", help=f"{models.MODEL_HELP} (default: the one used last)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Explain, or list."""
    from ..inspection import explain

    if not args.term:
        _list(args.json)
        return 0
    word = " ".join(args.term)
    explain.find(word)  # before a model is looked for
    subject, typed = _subject(args.model)
    found = explain.explain(word, subject, typed)
    if args.json:
        output.emit_json(found)
    else:
        _show(found)
    return 0


def _list(as_json: bool) -> None:
    from ..inspection import explain

    if as_json:
        output.emit_json({area: [term.name for term in terms] for area, terms in explain.by_area().items()})
        return
    for area, terms in explain.by_area().items():
        output.emit(output.paint(area, bold=True))
        for term in terms:
            output.emit(f"  {term.name:<30}  {output.one_line(term.first, 86)}")
        output.emit()
    output.next_command('llmkit explain "KV cache"')


def _show(found: Explanation) -> None:
    output.emit(output.paint(found.term, bold=True) + f"  ({found.area.lower()})")
    for sentence in found.sentences:
        output.emit(f"  {sentence}")
    if found.fact:
        output.emit()
        output.emit(f"  {found.model}: {found.fact.text}  ({found.fact.how})")
    output.next_command(found.command)


# ── the model ──


def _subject(typed: str | None) -> tuple[Subject | None, str | None]:
    """What to tell of and how commands call it: the model named, else the one used last, else none."""
    from .. import store
    from ..errors import LlmkitError

    if typed is not None:
        with models.outline(typed) as source:
            if source.path.is_dir():
                return _of_checkpoint(source.path, typed), output.shell_word(typed)
            return _of_file(source.path, typed if source.download else source.path.name), output.shell_word(typed)
    path = store.last_model()
    if path is None:
        return None, None
    try:
        found = _of_checkpoint(path, path.name) if path.is_dir() else _of_file(path, path.name)
    except LlmkitError:  # it has changed since, or is no kind that is read here: the term can be explained without
        found = None
    return found, output.shell_word(path)


def _of_file(path: Path, name: str) -> Subject:
    from .. import gguf
    from ..inspection.term_facts import subject_of

    return subject_of(gguf.read(path), name)


def _of_checkpoint(folder: Path, name: str) -> Subject:
    """As the GGUF it would become."""
    from .. import checkpoint, convert
    from ..inspection.term_facts import Subject, Tensor

    draft = convert.from_checkpoint(checkpoint.read(folder), tokenizer=False)
    tensors = (Tensor(each.name, each.shape, each.type.row_nbytes(each.width) * each.n_rows) for each in draft.tensors)
    return Subject(name, draft.metadata, tuple(tensors))
