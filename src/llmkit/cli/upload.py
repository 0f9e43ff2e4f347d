"""Send GGUF files to a repository of the Hub, with a model card that is measured on them.

The repository is made if it is not there. The card names the base model, its licence, a table of the quants and the
command that makes each again; text of your own around it is kept. Nothing is sent without a yes: on a terminal you are
asked, elsewhere --yes is needed. --dry-run shows the card and what would be sent.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LlmkitError
from . import output

if TYPE_CHECKING:
    from ..hub.upload import Uploaded, UploadPlan
    from ..publish import Row

EXAMPLES = (
    "llmkit upload SmolLM2-135M-Instruct-Q4_K_M.gguf --to me/SmolLM2-135M-Instruct-GGUF --dry-run",
    "llmkit upload quants/*.gguf --to me/SmolLM2-135M-Instruct-GGUF --private",
    "llmkit upload model-IQ4_XS.gguf imatrix.gguf --to me/model-GGUF --yes",
)
KEPT = "Files sent whole are not sent again: run the same command again to go on."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE…, --to and the rest."""
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="GGUF files of one model (split ones by their first part), and its importance matrix",
    )
    parser.add_argument("--to", required=True, metavar="ORG/NAME", help="the repository; made if it is not there")
    parser.add_argument("--private", action="store_true", help="a new repository is for you alone")
    parser.add_argument("--message", metavar="TEXT", help="the commit's message")
    parser.add_argument("--yes", action="store_true", help="send without asking")
    parser.add_argument("--dry-run", action="store_true", help="show the card and what would be sent; send nothing")
    parser.add_argument("--json", action="store_true", help="print the plan, or the result, as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan, ask, send."""
    from ..hub import upload

    name = repository_name(args.to)
    if not (args.dry_run or args.yes or (sys.stdin.isatty() and sys.stderr.isatty())):
        raise LlmkitError(
            f"{name}: nothing is uploaded without a yes", "Add --yes; --dry-run shows what would be sent."
        )
    planned, rows = _plan(args, name)
    if args.dry_run or not args.json:
        _show_plan(planned, card=args.dry_run, as_json=args.json)
    if args.dry_run:
        output.note("Nothing was sent.")
        return 0
    if planned.nothing:
        output.note(f"{name}: everything is there already; nothing to send")
        return _show_result(planned, None, args.json)
    if not (args.yes or output.confirm(question(planned))):
        raise LlmkitError("nothing was sent", "Answer y on a terminal, or add --yes.")
    message = args.message or f"Upload {', '.join(row.label for row in rows)} with llmkit"
    with output.ProgressBar() as bar:
        bars = sys.stderr.isatty() and not args.quiet
        done = upload.upload(planned, message=message, on_progress=bar, library_bars=bars)
    return _show_result(planned, done, args.json)


def repository_name(text: str) -> str:
    """`text` as org/name. Raises LlmkitError for all other forms of naming a model."""
    from .. import model

    try:  # a revision, so that a folder of the same name is not meant
        ref = model.parse(text if "@" in text or ":" in text else f"{text}@main")
    except LlmkitError as fault:
        raise LlmkitError(f"--to {fault.message.replace('@main', '')}", fault.hint) from None
    if ref.repo is None or ref.repo != text:
        raise LlmkitError(
            f"--to '{text}': expected org/name and nothing else", f"For example: --to {ref.repo or 'me/x'}"
        )
    return ref.repo


def _plan(args: argparse.Namespace, name: str) -> tuple[UploadPlan, tuple[Row, ...]]:
    """Headers first, then the Hub, then the long part: every byte for the hashes."""
    from .. import publish
    from ..hub import upload

    release = publish.read(args.files)
    if not args.dry_run:
        upload.require_login()
    destination = upload.look(name, private=args.private)
    with output.ProgressBar() as bar:
        files = upload.hashed(release.paths, on_progress=bar)
    rows = publish.rows(release, {file.path: file.sha256 for file in files})
    card = publish.compose(release, rows, name=name, existing=destination.card, remote=destination.hashes)
    return upload.plan(destination, files, card), rows


def _where(planned: UploadPlan) -> str:
    kind = "private" if planned.destination.private else "public"
    return f"{planned.destination.name} ({'new, ' if planned.is_new else ''}{kind})"


def question(planned: UploadPlan) -> str:
    """What the user is asked before anything is sent."""
    count = len(planned.files)
    what = f"{count} file{'s' * (count != 1)}, {output.size(planned.nbytes)}," if count else "the card"
    return f"Upload {what} to {_where(planned)}?"


def _show_plan(planned: UploadPlan, *, card: bool, as_json: bool) -> None:
    if as_json:
        output.emit_json(_described(planned) | {"card": planned.card})
        return
    rows = [(file.name, output.size(file.nbytes), file.sha256[:12], "send") for file in planned.files]
    rows += [(file.name, output.size(file.nbytes), file.sha256[:12], "is there") for file in planned.present]
    rows.append(
        ("README.md", output.size(len(planned.card.encode())), "", "send" if planned.card_changes else "is there")
    )
    output.table(("file", "size", "sha256", ""), rows, "lr")
    output.note(f"{_where(planned)}: {output.size(planned.nbytes)} to send")
    if card:
        output.emit()
        output.emit(output.printable(planned.card), end="")


def _described(planned: UploadPlan) -> dict[str, object]:
    files = [(file, True) for file in planned.files] + [(file, False) for file in planned.present]
    return {
        "to": planned.destination.name,
        "new": planned.is_new,
        "private": planned.destination.private,
        "nbytes": planned.nbytes,
        "card_changes": planned.card_changes,
        "files": [
            {"name": file.name, "path": str(file.path), "nbytes": file.nbytes, "sha256": file.sha256, "send": send}
            for file, send in files
        ],
    }


def _show_result(planned: UploadPlan, done: Uploaded | None, as_json: bool) -> int:
    if as_json:
        found = {"commit": done.commit if done else None, "url": done.url if done else None}
        output.emit_json(_described(planned) | found)
    elif done:
        output.emit(done.url)
        output.next_command(f"llmkit download {output.shell_word(planned.destination.name)} --dry-run")
    return 0
