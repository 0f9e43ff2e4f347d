"""List the conversations that were kept, search them, delete one.

`llmkit chat MODEL --load NAME` goes on with one. WORDS are looked for in every message, on every branch.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import output

if TYPE_CHECKING:
    from ..chat.store import Store

EXAMPLES = (
    "llmkit chats",
    "llmkit chats entropy softmax",
    "llmkit chats --json",
    "llmkit chats --delete 3",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """WORDS, or what to delete."""
    parser.add_argument("words", metavar="WORDS", nargs="*", help="show the conversations that say all of these")
    parser.add_argument("--delete", metavar="NAME", help="delete a conversation by its number or name, after asking")
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(args: argparse.Namespace) -> int:
    """Show what is kept, or delete."""
    from ..chat.store import Store
    from .chat.archive import show_kept

    store = Store()
    if args.delete is not None:
        return _delete(store, args.delete, args.yes)
    words = " ".join(args.words)
    if args.json:
        output.emit_json(store.search(words) if words else store.list())
        return 0
    show_kept(store, words)
    if not words and (kept := store.list()):
        model = output.shell_word(kept[0].model or "MODEL")
        name = output.shell_word(kept[0].name or kept[0].id)
        output.next_command(output.one_line(f"llmkit chat {model} --load {name}"))
    return 0


def _delete(store: Store, name: str, sure: bool) -> int:
    found = store.load(name)
    if not sure and not output.confirm(f"Delete {found.title!r}, {len(found.tree.nodes)} messages?"):
        output.note("Nothing was deleted (--yes deletes without asking).")
        return 1
    store.delete(name)
    output.note(f"Deleted: {output.one_line(found.title)}")
    return 0
