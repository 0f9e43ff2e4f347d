"""Fetch a model from the Hub: only what is needed, several files at once, each one verified.

A plan comes first. A fetch that was broken off, even by a power cut, goes on where it stopped. Files go to the Hugging
Face cache, where other tools find them too, or to the folder named by --to; what the cache holds already is linked.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from . import models, output
from .quantize import count_argument

if TYPE_CHECKING:
    from ..hub import DownloadPlan, FileDone

EXAMPLES = (
    "llmkit download HuggingFaceTB/SmolLM2-135M-Instruct --dry-run",
    "llmkit download Qwen/Qwen3-0.6B-GGUF:Q8_0 --to models",
    "llmkit download org/name@v1.0 --exclude '*.md'",
    "llmkit download --sweep",
)
KEPT = "What came is kept: run the same command again to go on."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and what to take of it."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="org/name, org/name@revision, org/name:Q4_K_M")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder for the files (default: the Hugging Face cache)")
    parser.add_argument("--include", action="append", default=[], metavar="GLOB", help="take these files instead")
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave these files out")
    parser.add_argument("--workers", type=count_argument, default=4, metavar="N", help="files at once (default 4)")
    parser.add_argument("--sweep", action="store_true", help="delete what killed downloads have left, of any tool")
    parser.add_argument("--yes", action="store_true", help="with --sweep: do not ask")
    parser.add_argument("--dry-run", action="store_true", help="show the plan, fetch no file")
    parser.add_argument("--json", action="store_true", help="print the plan or the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan, then fetch."""
    from .. import hub, model
    from ..errors import LlmkitError

    if args.sweep:
        return _sweep(args)
    if args.model is None:
        raise LlmkitError("no model was named", "llmkit download org/name")
    ref = model.parse(args.model)
    planned = hub.plan(ref, to=args.to, include=args.include, exclude=args.exclude, on_wait=output.note)
    if args.dry_run:
        show_plan(planned, as_json=args.json)
        return 0
    models.tell_plan(planned)
    done: list[FileDone] = []
    path = models.fetch(planned, workers=args.workers, on_file=done.append)
    if args.json:
        output.emit_json({**_facts(planned), "path": path, "files": done, "wire_nbytes": sum(f.nbytes for f in done)})
    else:
        output.emit(str(path))
    _suggest(args.model, path, planned)
    return 0


def _facts(planned: DownloadPlan) -> dict[str, object]:
    repository = planned.repository
    return {
        "model": str(planned.ref),
        "commit": repository.commit,
        "kind": planned.choice.kind,
        "licence": repository.licence,
        "gated": repository.gated,
        "private": repository.private,
        "folder": planned.folder,
        "nbytes": planned.nbytes,
        "fetch_nbytes": planned.fetch_nbytes,
        "free_nbytes": planned.free_nbytes,
    }


def show_plan(planned: DownloadPlan, *, as_json: bool) -> None:
    """Files, bytes, room on the disk, terms."""
    if as_json:
        rows = [
            {"path": each.file.path, "nbytes": each.file.nbytes, "state": each.state, "kept_nbytes": each.kept_nbytes,
             "hash": each.file.hash}
            for each in planned.files
        ]  # fmt: skip
        output.emit_json({**_facts(planned), "path": planned.path, "left_out": planned.choice.left_out, "files": rows})
        return
    words = {"here": "here", "cached": "in the cache, to be linked", "unchecked": "here, to be checked"}
    output.table(
        ("file", "size", "state"),
        [
            (
                each.file.path,
                output.size(each.file.nbytes),
                words.get(each.state)
                or (f"{output.size(each.kept_nbytes)} here, to be gone on with" if each.kept_nbytes else "to fetch"),
            )
            for each in planned.files
        ],
        "lrl",
    )
    models.tell_plan(planned)
    output.note("Nothing was fetched.")


def _suggest(typed: str, path: Path, planned: DownloadPlan) -> None:
    where = output.shell_word(path if planned.to else typed)
    if planned.choice.kind == "gguf":
        output.next_command(f"llmkit chat {where}")
    elif planned.choice.kind == "checkpoint":
        made = planned.choice.to_make
        named = "" if made and not planned.to else f" {made or 'Q4_K_M'}"  # what was typed names it already
        output.next_command(f"llmkit quantize {where}{named}")


def _sweep(args: argparse.Namespace) -> int:
    from ..errors import LlmkitError
    from ..hub import sweep

    gone: list[sweep.Leftover] = []
    leftovers = sweep.find([args.to] if args.to else [])
    free, busy = [each for each in leftovers if not each.busy], [each for each in leftovers if each.busy]
    if free and not args.json:
        rows = [(each.path, output.size(each.nbytes), each.what, output.duration(each.age_seconds)) for each in free]
        output.table(("leftover", "size", "of", "age"), rows, "lrlr")
    total = sum(each.nbytes for each in free)
    question = f"Delete {len(free)} leftover{'s' * (len(free) != 1)}, {output.size(total)}?"
    if busy:
        output.note(f"{len(busy)} more belong to downloads that run now and stay.")
    if not free:
        output.note("Nothing to sweep.")
    elif args.dry_run:
        output.note(f"{output.size(total)} could be freed. Nothing was deleted.")
    elif args.yes or (not args.json and output.confirm(question)):
        gone = sweep.delete(free)
        output.note(f"{output.size(sum(each.nbytes for each in gone))} freed.")
    else:
        raise LlmkitError("nothing was deleted", "Add --yes to delete without asking.")
    if args.json:
        output.emit_json({"leftovers": leftovers, "nbytes": total, "deleted": bool(gone)})
    return 0
