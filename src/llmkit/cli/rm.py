"""Delete models from this machine, after asking.

org/name deletes all of it, in the Hugging Face cache and in llmkit's own folder; org/name@revision that revision,
org/name:Q4_K_M that file. A path is deleted when it lies in one of these places, or is a .gguf file. What another
revision needs too stays, and is named.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import output

if TYPE_CHECKING:
    from ..hub.inventory import File
    from ..hub.removal import Plan

EXAMPLES = (
    "llmkit rm org/name --dry-run",
    "llmkit rm org/name:Q4_K_M org/other@refs/pr/1",
    "llmkit rm ./model-Q4_K_M.gguf --yes",
)
KEPT = "What was not deleted yet is kept."
_MOST_PATHS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, and whether to ask."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as `llmkit list` names them, or a path")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="show what would be deleted; delete nothing")
    parser.add_argument("--json", action="store_true", help="print what goes as JSON (deletes only with --yes)")


def run(args: argparse.Namespace) -> int:
    """Show what would go, ask, delete."""
    from ..errors import LlmkitError
    from ..hub import removal

    planned = removal.plan(args.models)
    if not args.json:
        _show(planned)
    if args.dry_run:
        output.note("Nothing was deleted.")
    else:
        question = f"Delete {_files(len(planned.files))}, {output.size(planned.nbytes)}?"
        if not (args.yes or (not args.json and output.confirm(question))):
            raise LlmkitError("nothing was deleted", "Add --yes to delete without asking.")
        removal.remove(planned)
        output.note(f"Deleted; {output.size(planned.nbytes)} freed.")
    if args.json:
        output.emit_json(_described(planned, deleted=not args.dry_run))
    return 0


def _files(number: int) -> str:
    return f"{number} file{'s' * (number != 1)}"


def _show(planned: Plan) -> None:
    rows: list[tuple[object, ...]] = []
    for each in planned.removals:
        named = [path for path in each.paths if path.parent.name != "blobs"] or list(each.paths)
        rows.append((each.what, named[0], len(each.files), output.size(_nbytes(each.files))))
        rows += [("", path, "", "") for path in named[1:_MOST_PATHS]]
        if len(named) > _MOST_PATHS:
            rows.append(("", f"and {len(named) - _MOST_PATHS} more", "", ""))
    output.table(("model", "deletes", "files", "size"), rows, "llrr")
    for each in planned.removals:
        for words in each.stays:
            output.note(f"{output.one_line(each.what)}: stays: {output.one_line(words)}")
    if planned.linked_nbytes:
        output.note(f"{output.size(planned.linked_nbytes)} stay on the disk: these files have other names (hard links)")
    output.note(f"This frees {output.size(planned.nbytes)} in {_files(len(planned.files))}.")


def _nbytes(files: dict[str, File]) -> int:
    from ..hub.inventory import total_nbytes

    return total_nbytes(files)


def _described(planned: Plan, *, deleted: bool) -> dict[str, object]:
    rows = [
        {
            "model": each.what,
            "paths": each.paths,
            "files": {path: file.nbytes for path, file in each.files.items()},
            "stays": each.stays,
        }
        for each in planned.removals
    ]
    return {"removals": rows, "nbytes": planned.nbytes, "linked_nbytes": planned.linked_nbytes, "deleted": deleted}
