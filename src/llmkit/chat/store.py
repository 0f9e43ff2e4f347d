"""Conversations kept in one SQLite file: whole trees with their answers, found again by id, name or words.

    store = Store()
    store.save(chat.conversation)          one transaction; again after every answer
    chat.resume(store.load("holidays"))

Several processes may use it at once. One that saves a conversation another has gone on with meanwhile makes a
conversation of its own of it: nothing is overwritten. Words are indexed by FTS5 where the build of SQLite has it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import settings
from ..errors import AccessDenied, InvalidModel, LlmkitError, ModelNotFound, OutputExists, nearest_hint
from .answer import Answer, dropped_from_json
from .record import Conversation, shortened
from .sampler_settings import Sampling
from .streams import whole
from .tree import Tree

VERSION = 1  # of the tables
_WAIT = 10.0  # seconds for another process
_MOST = 50  # findings of a search

_TABLES = """
CREATE TABLE conversation (
  id INTEGER PRIMARY KEY AUTOINCREMENT, revision INTEGER NOT NULL, name TEXT UNIQUE, title TEXT NOT NULL,
  model TEXT NOT NULL, system TEXT, persona TEXT, sampling TEXT NOT NULL, dropped TEXT NOT NULL, head INTEGER,
  made REAL NOT NULL, changed REAL NOT NULL, indexed INTEGER NOT NULL DEFAULT 0);
CREATE TABLE node (
  row INTEGER PRIMARY KEY, conversation INTEGER NOT NULL REFERENCES conversation(id) ON DELETE CASCADE,
  id INTEGER NOT NULL, parent INTEGER, role TEXT NOT NULL, text TEXT NOT NULL, thinking TEXT NOT NULL,
  made REAL NOT NULL, UNIQUE (conversation, id));
CREATE TABLE answer (
  conversation INTEGER NOT NULL, node INTEGER NOT NULL, json BLOB NOT NULL, PRIMARY KEY (conversation, node),
  FOREIGN KEY (conversation, node) REFERENCES node(conversation, id) ON DELETE CASCADE);
"""
_WORDS = "CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(text, tokenize = 'unicode61 remove_diacritics 2')"


@dataclass(frozen=True)
class Saved:
    """Where a conversation was saved; `forked`: another process had gone on with the one it was loaded from."""

    id: int
    forked: bool = False


@dataclass(frozen=True)
class Summary:
    """A kept conversation, without its content. `messages` counts all branches."""

    id: int
    name: str | None
    title: str
    model: str
    messages: int
    made: float
    changed: float


@dataclass(frozen=True)
class Found:
    """A message that has the words, and the words' surroundings."""

    id: int
    title: str
    node: int
    role: str
    excerpt: str
    changed: float


class Store:
    """The conversations in `path`, else in settings.chats(). The file is made when something is saved.

    Every method raises LlmkitError where the file is damaged, of a newer version, locked for long or not writable;
    the conversation in hand is not touched by that.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = Path(path) if path is not None else settings.chats()
        self._written: dict[tuple[int, int], Answer] = {}  # what of a conversation is in the file already

    def save(self, conversation: Conversation) -> Saved:
        """Keep it, whole, and give it its `id`. Raises OutputExists when another one has its name."""
        with self._open() as base:
            base.execute("BEGIN IMMEDIATE")
            known = base.execute("SELECT revision, name FROM conversation WHERE id = ?", (conversation.id,)).fetchone()
            forked = known is not None and known["revision"] != conversation.revision
            id = conversation.id if known is not None and not forked else None
            name = None if forked else conversation.name or (known["name"] if known else None)
            name = None if name is None else whole(name)
            other = base.execute("SELECT id FROM conversation WHERE name = ?", (name,)).fetchone()
            if other is not None and other[0] != id:
                raise OutputExists(f"another conversation is called '{name}'", "Choose another name.")
            revision = 1 if id is None else conversation.revision + 1
            id, answers = self._write(base, replace(conversation, id=id, name=name, revision=revision))
            base.execute("COMMIT")
        self._written.update({(id, answer.node): answer for answer in answers})
        conversation.id, conversation.name, conversation.revision = id, name, revision
        return Saved(id, forked)

    def _write(self, base: sqlite3.Connection, conversation: Conversation) -> tuple[int, list[Answer]]:
        """All of it that is not there yet; a new one for no id. The id, and the answers that were written."""
        id, new = conversation.id, conversation.id is None
        texts = (conversation.name, conversation.title, conversation.model, conversation.system, conversation.persona)
        values = (
            conversation.revision, *(None if text is None else whole(text) for text in texts),
            _packed_text(conversation.sampling.to_json()),
            _packed_text({str(node): asdict(event) for node, event in conversation.dropped.items()}),
            conversation.tree.head, conversation.made, conversation.changed or time.time(),
        )  # fmt: skip
        columns = "revision, name, title, model, system, persona, sampling, dropped, head, made, changed"
        if id is None:
            marks = ", ".join("?" * len(values))
            id = int(base.execute(f"INSERT INTO conversation ({columns}) VALUES ({marks})", values).lastrowid or 0)
        else:
            sets = ", ".join(f"{column} = ?" for column in columns.split(", "))
            base.execute(f"UPDATE conversation SET {sets} WHERE id = ?", (*values, id))
        there = set(map(tuple, base.execute("SELECT id, text, thinking FROM node WHERE conversation = ?", (id,))))
        changed = [
            node for node in conversation.tree.nodes.values() if (node.id, node.text, node.thinking) not in there
        ]
        base.executemany(
            "INSERT INTO node (conversation, id, parent, role, text, thinking, made) VALUES (?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (conversation, id) DO UPDATE SET text = excluded.text, thinking = excluded.thinking",
            [(id, node.id, node.parent, node.role, node.text, node.thinking, node.made) for node in changed],
        )
        answers = [
            answer
            for node, answer in conversation.answers.items()
            if new or self._written.get((id, node)) is not answer
        ]
        base.executemany(
            "INSERT OR REPLACE INTO answer (conversation, node, json) VALUES (?, ?, ?)",
            [(id, answer.node, _packed(answer.to_json())) for answer in answers],
        )
        if changed:
            base.execute("UPDATE conversation SET indexed = 0 WHERE id = ?", (id,))
        return id, answers

    def load(self, id_or_name: int | str) -> Conversation:
        """The conversation of that id or name. Raises ModelNotFound with the nearest names, InvalidModel if damaged."""
        with self._open() as base:
            id = self._id(base, id_or_name)
            row = base.execute("SELECT * FROM conversation WHERE id = ?", (id,)).fetchone()
            nodes = base.execute("SELECT * FROM node WHERE conversation = ? ORDER BY id", (id,)).fetchall()
            blobs = base.execute("SELECT json FROM answer WHERE conversation = ? ORDER BY node", (id,)).fetchall()
        try:
            answers = [Answer.from_json(json.loads(zlib.decompress(blob["json"]))) for blob in blobs]
            dropped = {int(node): dropped_from_json(event) for node, event in json.loads(row["dropped"]).items()}
            found = Conversation(
                tree=Tree.from_json({"head": row["head"], "nodes": [dict(node) for node in nodes]}),
                answers={answer.node: answer for answer in answers},
                sampling=Sampling.from_json(json.loads(row["sampling"])),
                dropped=dropped,
                **{
                    name: row[name]
                    for name in ("system", "name", "model", "persona", "id", "revision", "made", "changed")
                },
            )
        except (zlib.error, ValueError, TypeError, KeyError, AttributeError, LlmkitError) as error:
            raise InvalidModel(
                f"{self.path}: conversation {id} is damaged: {error}", "The others can still be loaded."
            ) from error
        self._written.update({(id, answer.node): answer for answer in answers})
        return found

    def list(self) -> tuple[Summary, ...]:
        """All conversations, the last changed first."""
        if not self.path.exists():
            return ()
        with self._open() as base:
            rows = base.execute(
                "SELECT c.id, c.name, c.title, c.model, count(n.id), c.made, c.changed FROM conversation c "
                "LEFT JOIN node n ON n.conversation = c.id GROUP BY c.id ORDER BY c.changed DESC, c.id DESC"
            ).fetchall()
        return tuple(Summary(*row) for row in rows)

    def rename(self, id_or_name: int | str, name: str) -> None:
        """Give it a name. Raises ModelNotFound, OutputExists."""
        with self._open() as base:
            id = self._id(base, id_or_name)
            try:
                base.execute("UPDATE conversation SET name = ?, title = ? WHERE id = ?", (name, name, id))
            except sqlite3.IntegrityError as error:
                raise OutputExists(f"another conversation is called '{name}'", "Choose another name.") from error

    def delete(self, id_or_name: int | str) -> None:
        """Forget it, with all its branches. Raises ModelNotFound."""
        with self._open() as base:
            id = self._id(base, id_or_name)
            base.execute("BEGIN IMMEDIATE")
            if _has_words(base):
                base.execute("DELETE FROM words WHERE rowid IN (SELECT row FROM node WHERE conversation = ?)", (id,))
            base.execute("DELETE FROM conversation WHERE id = ?", (id,))
            base.execute("COMMIT")

    def search(self, words: str) -> tuple[Found, ...]:
        """Messages that have all the words, or words that begin so; the best first."""
        wanted = words.split()
        if not wanted or not self.path.exists():
            return ()
        with self._open() as base:
            rows = _by_index(base, wanted) if _has_words(base) else []
            rows = rows or _by_reading(base, wanted)
        return tuple(
            Found(id, title, node, role, excerpt(text, wanted), changed)
            for id, title, node, role, text, changed in rows
        )

    def _id(self, base: sqlite3.Connection, id_or_name: int | str) -> int:
        row = base.execute("SELECT id FROM conversation WHERE name = ?", (str(id_or_name),)).fetchone()
        if row is None and str(id_or_name).isdecimal():
            row = base.execute("SELECT id FROM conversation WHERE id = ?", (int(id_or_name) & 2**63 - 1,)).fetchone()
        if row is None:
            known = [str(name or id) for id, name in base.execute("SELECT id, name FROM conversation")]
            hint = nearest_hint(str(id_or_name), known) if known else "Nothing has been kept yet."
            raise ModelNotFound(f"there is no conversation '{id_or_name}'", hint)
        return int(row[0])

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection to tables of our version. An error rolls back, and becomes an LlmkitError."""
        base = None
        try:
            if not self.path.exists():
                self._make()
            base = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None)
            base.row_factory = sqlite3.Row
            base.execute("PRAGMA foreign_keys = ON")
            self._check_version(base)
            yield base
        except (sqlite3.Error, OSError) as error:
            raise self._told(error) from error
        finally:
            if base is not None:
                base.close()  # what was not committed is rolled back

    def _make(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))  # what people say is nobody else's business

    def _check_version(self, base: sqlite3.Connection) -> None:
        version = base.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            base.execute("BEGIN IMMEDIATE")
            if base.execute("PRAGMA user_version").fetchone()[0] == 0:  # not made by another process meanwhile
                if base.execute("SELECT name FROM sqlite_master").fetchone() is not None:
                    raise InvalidModel(f"{self.path}: is another program's SQLite file", "Set LLMKIT_HOME elsewhere.")
                for statement in filter(str.strip, _TABLES.split(";")):
                    base.execute(statement)
                base.execute(f"PRAGMA user_version = {VERSION}")
            base.execute("COMMIT")
            with suppress(sqlite3.OperationalError):  # somebody reads already: then it is slower, that is all
                base.execute("PRAGMA journal_mode = WAL")
        elif version > VERSION:
            raise LlmkitError(
                f"{self.path}: was written by a newer llmkit (version {version}, this one reads {VERSION})",
                "Update llmkit; the file is left as it is.",
            )

    def _told(self, error: sqlite3.Error | OSError) -> LlmkitError:
        """An error of SQLite in words, with what to do."""
        words = str(error)
        if isinstance(error, OSError) or "readonly" in words or "unable to open" in words:
            return AccessDenied(
                f"{self.path}: conversations cannot be kept here: {words}", "Set LLMKIT_HOME elsewhere."
            )
        if "locked" in words or "busy" in words:
            return LlmkitError(f"{self.path}: another process holds it for longer than {_WAIT:.0f} s", "Try again.")
        if "full" in words:
            return LlmkitError(f"{self.path}: the disk is full", "Make room and save again.")
        if type(error) is sqlite3.DatabaseError or "malformed" in words:
            return InvalidModel(
                f"{self.path}: is damaged, or not llmkit's: {words}",
                "Move it away and save again: a new file is begun. `sqlite3 FILE .recover` may get back what it held.",
            )
        return LlmkitError(f"{self.path}: {words}", "If it is not llmkit's file, move it away.")


def _packed(value: Any) -> bytes:
    return zlib.compress(_packed_text(value).encode(), 6)


def _packed_text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


# ── search ──

_MESSAGES = (
    "SELECT n.conversation, c.title, n.id, n.role, n.text, c.changed FROM node n JOIN conversation c "
    "ON c.id = n.conversation "
)


def _has_words(base: sqlite3.Connection) -> bool:
    """Whether there is an index of words, made if this SQLite can."""
    try:
        base.execute(_WORDS)
        base.execute("SELECT rowid FROM words LIMIT 1").fetchone()
    except sqlite3.OperationalError as error:
        if "no such module" in str(error):
            return False
        raise
    return True


def _by_index(base: sqlite3.Connection, words: list[str]) -> list[sqlite3.Row]:
    """Index what has changed, then ask the index."""
    base.execute("BEGIN IMMEDIATE")
    for (id,) in base.execute("SELECT id FROM conversation WHERE NOT indexed").fetchall():
        base.execute("DELETE FROM words WHERE rowid IN (SELECT row FROM node WHERE conversation = ?)", (id,))
        base.execute("INSERT INTO words (rowid, text) SELECT row, text FROM node WHERE conversation = ?", (id,))
        base.execute("UPDATE conversation SET indexed = 1 WHERE id = ?", (id,))
    base.execute("COMMIT")
    query = " ".join('"{}"*'.format(word.replace('"', '""')) for word in words)
    return base.execute(
        f"{_MESSAGES} JOIN words w ON w.rowid = n.row WHERE words MATCH ? ORDER BY w.rank LIMIT {_MOST}", (query,)
    ).fetchall()


def _by_reading(base: sqlite3.Connection, words: list[str]) -> list[sqlite3.Row]:
    """Every message: for an SQLite without FTS5, and for scripts that do not part words by spaces."""
    base.create_function("has", 1, lambda text: all(word in text.casefold() for word in folded), deterministic=True)
    folded = [word.casefold() for word in words]
    return base.execute(f"{_MESSAGES} WHERE has(n.text) ORDER BY c.changed DESC, n.id LIMIT {_MOST}").fetchall()


def excerpt(text: str, words: list[str], around: int = 60) -> str:
    """One line of `text` about the first of `words` in it."""
    line = " ".join(text.split())
    places = [at for word in words if (at := line.casefold().find(word.casefold())) >= 0]
    start = max(0, min(places, default=0) - around // 2)
    return ("…" if start else "") + shortened(line[start:], 2 * around)
