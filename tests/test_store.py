"""chat/store.py: conversations in SQLite, whole, found again, never overwritten, whatever happens to the file."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import cli_environment
from llmkit import settings
from llmkit.backends.scripted import Scripted
from llmkit.chat import Chat, Conversation, Dropped, Sampling, Store, store
from llmkit.errors import AccessDenied, InvalidModel, LlmkitError, ModelNotFound, OutputExists

GREEDY = Sampling(temperature=0)


@pytest.fixture
def kept(tmp_path: Path) -> Store:
    return Store(tmp_path / "new" / "chats.sqlite")


def talked(*questions: str, answers: tuple[str, ...] = ("naïve 🙂", "Two.", "Three.")) -> Chat:
    chat = Chat(Scripted(answers), system="Be brief.", sampling=GREEDY, context=300)
    for question in questions or ("a", "b"):
        list(chat.say(question))
    return chat


def same(one: Conversation, other: Conversation) -> bool:
    return one.to_json() == other.to_json()


def test_where_it_is(llmkit_home: Path) -> None:
    assert Store().path == settings.chats() == llmkit_home / "chats.sqlite"


def test_where_it_is_when_nobody_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMKIT_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert settings.chats() == tmp_path / "llmkit" / "chats.sqlite"  # not in a cache, which may be emptied
    monkeypatch.delenv("XDG_DATA_HOME")
    assert settings.chats() == Path.home() / ".local" / "share" / "llmkit" / "chats.sqlite"


def test_a_conversation_comes_back_whole(kept: Store) -> None:
    chat = talked()
    list(chat.retry())
    list(chat.instead(1, 1, 66))
    chat.conversation.dropped[2] = Dropped((0, 1), 9, "They met.")
    saved = kept.save(chat.conversation)
    assert saved == store.Saved(1) and chat.conversation.id == 1
    again = Store(kept.path).load(1)
    assert same(again, chat.conversation) and again.tree == chat.tree and again.answers.keys() == {1, 3, 4, 5}
    assert again.answers[1].steps == chat.answers[1].steps  # to the last bit
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600


def test_it_is_saved_after_every_answer_and_only_what_is_new(kept: Store) -> None:
    chat = talked("a")
    kept.save(chat.conversation)
    blobs = dict(sqlite3.connect(kept.path).execute("SELECT node, json FROM answer"))
    changes = []
    original = store._packed
    store._packed = lambda value: changes.append(value["node"]) or original(value)  # type: ignore[func-returns-value]
    try:
        list(chat.say("b"))
        assert kept.save(chat.conversation) == store.Saved(1)
        chat.switch(1)
        kept.save(chat.conversation)
    finally:
        store._packed = original
    assert changes == [3]
    now = dict(sqlite3.connect(kept.path).execute("SELECT node, json FROM answer"))
    assert now.keys() == {1, 3} and now[1] == blobs[1]
    again = kept.load(1)
    assert same(again, chat.conversation) and again.tree.head == 1


def test_an_answer_that_grew_is_saved_anew(kept: Store) -> None:
    chat = Chat(Scripted(["One. Two."]), sampling=Sampling(temperature=0, max_tokens=4), context=200)
    list(chat.say("a"))
    kept.save(chat.conversation)
    list(chat.go_on())
    kept.save(chat.conversation)
    again = kept.load(1)
    assert again.tree.nodes[1].text == "One. Two" and len(again.answers[1].steps) == 8
    assert [found.excerpt for found in kept.search("two")] == ["One. Two"]


def test_a_loaded_conversation_goes_on(kept: Store) -> None:
    chat = talked("a")
    kept.save(chat.conversation)
    other = Store(kept.path)
    again = Chat(Scripted(["One.", "Two."]), context=200, conversation=other.load(1))
    assert "".join(step.text for step in again.say("b")) == "Two."
    assert other.save(again.conversation) == store.Saved(1)
    assert same(kept.load(1), again.conversation)


# ── names ──


def test_names_and_titles(kept: Store) -> None:
    chat = talked("What is\n the capital of France, and why " + "so " * 40)
    kept.save(chat.conversation)
    (row,) = kept.list()
    assert row.name is None and row.title.startswith("What is the capital of France") and len(row.title) <= 60
    assert (row.id, row.model, row.messages) == (1, "scripted", 2)
    kept.rename(1, "holidays")
    assert kept.load("holidays").name == "holidays" and kept.list()[0].title == "holidays"
    other = talked("b").conversation
    other.name = "holidays"
    with pytest.raises(OutputExists, match="'holidays'"):
        kept.save(other)
    assert other.id is None and len(kept.list()) == 1
    other.name = "work"
    kept.save(other)
    with pytest.raises(OutputExists):
        kept.rename("work", "holidays")
    assert [each.title for each in kept.list()] == ["work", "holidays"]  # the last changed first


def test_a_name_given_meanwhile_stays(kept: Store) -> None:
    chat = talked("a")
    kept.save(chat.conversation)
    Store(kept.path).rename(1, "holidays")
    list(chat.say("b"))
    assert kept.save(chat.conversation) == store.Saved(1) and chat.conversation.name == "holidays"
    assert kept.list()[0].title == "holidays"


def test_halves_of_characters_can_be_kept(kept: Store) -> None:
    chat = talked("a\udc80")
    chat.conversation.name, chat.conversation.model = "n\udcff", "folder/\udce9.gguf"
    chat.conversation.system = "\ud800"
    kept.save(chat.conversation)
    again = kept.load("n\ufffd")
    assert again.model == "folder/\ufffd.gguf" and again.system == "\ufffd" and again.tree.nodes[0].text == "a\ufffd"


def test_a_file_moved_away_is_begun_anew(kept: Store) -> None:
    chat = talked("a")
    kept.save(chat.conversation)
    list(chat.say("b"))
    kept.save(chat.conversation)
    for path in kept.path.parent.iterdir():
        path.unlink()
    for _ in range(2):
        assert kept.save(chat.conversation) == store.Saved(1)
        assert same(kept.load(1), chat.conversation) and kept.load(1).answers.keys() == {1, 3}


@pytest.mark.parametrize("wanted", ["holyday", 7, "99", 1 << 80, "'; DROP TABLE node; --"])
def test_unknown_conversations_show_the_nearest(kept: Store, wanted: int | str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        kept.load(wanted)
    assert caught.value.hint == "Nothing has been kept yet."
    chat = talked("a")
    chat.conversation.name = "holiday"
    kept.save(chat.conversation)
    with pytest.raises(ModelNotFound) as caught:
        kept.delete(wanted)
    assert caught.value.hint is not None and "holiday" in caught.value.hint


def test_delete(kept: Store) -> None:
    for question in ("apples", "pears"):
        kept.save(talked(question).conversation)
    assert kept.search("apples")
    kept.delete(1)
    assert [each.id for each in kept.list()] == [2] and kept.search("apples") == ()
    base = sqlite3.connect(kept.path)
    assert {id for (id,) in base.execute("SELECT conversation FROM node")} == {2}
    assert {id for (id,) in base.execute("SELECT conversation FROM answer")} == {2}
    assert kept.save(talked("plums").conversation).id == 3  # numbers are not used twice


def test_a_conversation_deleted_meanwhile_is_kept_anew(kept: Store) -> None:
    chat = talked("a")
    kept.save(chat.conversation)
    Store(kept.path).delete(1)
    list(chat.say("b"))
    assert kept.save(chat.conversation) == store.Saved(2)
    assert same(kept.load(2), chat.conversation) and kept.load(2).answers.keys() == {1, 3}


# ── search ──


@pytest.mark.parametrize("fts", [True, False])
def test_search(kept: Store, fts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fts:  # a build of SQLite without it
        monkeypatch.setattr(store, "_WORDS", "CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts17(text)")
    assert kept.search("anything") == ()
    kept.save(talked("Where is the lighthouse of Łeba?", answers=("On the Baltic coast.",)).conversation)
    kept.save(talked("東京の天気は?", answers=('Sunny "today" (I think) AND warm.',)).conversation)
    assert [(found.id, found.node, found.role) for found in kept.search("lighthouse")] == [(1, 0, "user")]
    assert [found.node for found in kept.search("BALTIC coast")] == [1]
    assert [found.id for found in kept.search("light łeb")] == [1]  # beginnings will do
    assert [found.id for found in kept.search("天気")] == [2]
    assert [found.id for found in kept.search('"today" AND')] == [2]
    assert kept.search("baltic sunny") == () == kept.search("   ")
    assert "*" not in kept.search("sunny")[0].excerpt and "today" in kept.search("sunny")[0].excerpt
    chat = Chat(Scripted(["a", "On the moon."]), context=300, conversation=kept.load(1), sampling=GREEDY)
    list(chat.say("And another?"))
    kept.save(chat.conversation)
    assert [found.node for found in kept.search("moon")] == [3] and len(kept.search("on the")) == 2


def test_an_excerpt_is_about_the_word() -> None:
    text = "start " + "word " * 50 + "needle\n" + "more " * 50
    cut = store.excerpt(text, ["needle"])
    assert "needle" in cut and cut.startswith("…") and cut.endswith("…") and len(cut) < 130 and "\n" not in cut


# ── several at once ──


def test_two_who_go_on_with_one_conversation(kept: Store) -> None:
    first = talked("a")
    first.conversation.name = "shared"
    kept.save(first.conversation)
    second = Chat(Scripted(["One.", "Two."]), context=200, conversation=Store(kept.path).load("shared"))
    list(first.say("from the first"))
    list(second.say("from the second"))
    kept.save(first.conversation)
    saved = Store(kept.path).save(second.conversation)
    assert saved == store.Saved(2, forked=True) and second.conversation.name is None
    assert kept.load("shared").tree.nodes[2].text == "from the first"
    assert kept.load(2).tree.nodes[2].text == "from the second" and len(kept.load(2).answers) == 2
    list(second.say("more"))
    assert Store(kept.path).save(second.conversation) == store.Saved(2)


def test_many_at_once(kept: Store) -> None:
    """Eight threads and two processes, on a file that none of them has made before."""
    program = (
        "import sys; from llmkit.backends.scripted import Scripted; from llmkit.chat import Chat, Store\n"
        "for n in range(5):\n"
        "    chat = Chat(Scripted(['One.', 'Two.']), context=200)\n"
        "    for question in 'ab':\n"
        "        list(chat.say(question)); Store(sys.argv[1]).save(chat.conversation)\n"
    )
    command = [sys.executable, "-c", program, str(kept.path)]
    children = [subprocess.Popen(command, env=cli_environment()) for _ in range(2)]
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(3):
                chat = talked("a")
                kept.save(chat.conversation)
                list(chat.say("b"))
                kept.save(chat.conversation)
                kept.search("a")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [child.wait() for child in children] == [0, 0] and errors == []
    rows = kept.list()
    assert len(rows) == 2 * 5 + 8 * 3 and all(row.messages == 4 for row in rows)
    assert all(len(kept.load(row.id).answers) == 2 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_process_killed_while_it_saves(kept: Store) -> None:
    """Whenever it dies, the file holds a whole number of turns, and can be written."""
    program = (
        "import sys; from llmkit.backends.scripted import Scripted; from llmkit.chat import Chat, Store\n"
        "chat = Chat(Scripted(['x' * 50] * 99), context=4000); store = Store(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "for n in range(40):\n"
        "    list(chat.say('q')); store.save(chat.conversation)\n"
    )
    for delay in (0.01, 0.03, 0.07, 0.12):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(kept.path)], env=cli_environment(), stdout=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        for row in kept.list():
            again = kept.load(row.id)
            assert len(again.answers) * 2 == row.messages == len(again.tree.nodes) > 0
    assert kept.save(talked("after").conversation)


# ── damage ──


def test_a_damaged_file(kept: Store, tmp_path: Path) -> None:
    chat = talked()
    kept.path.parent.mkdir()
    kept.path.write_bytes(b"this is no database" * 99)
    before = chat.conversation.to_json()
    for attempt in (lambda: kept.save(chat.conversation), kept.list, lambda: kept.search("a"), lambda: kept.load(1)):
        with pytest.raises(InvalidModel, match=r"chats\.sqlite: is damaged, or not llmkit's") as caught:
            attempt()
        assert "Move it away" in (caught.value.hint or "")
    assert chat.conversation.to_json() == before and chat.conversation.id is None
    assert kept.path.read_bytes().startswith(b"this is")  # left as it is
    kept.path.rename(tmp_path / "away")
    assert kept.save(chat.conversation).id == 1 and same(kept.load(1), chat.conversation)


def test_a_file_cut_short(kept: Store) -> None:
    for n in range(12):
        kept.save(talked(f"question {n} " * 10).conversation)
    base = sqlite3.connect(kept.path)
    base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    base.close()
    with kept.path.open("r+b") as file:
        file.truncate(kept.path.stat().st_size // 2)
    with pytest.raises(LlmkitError, match="damaged"):
        for row in kept.list():
            kept.load(row.id)


def test_one_damaged_conversation_leaves_the_others(kept: Store) -> None:
    for question in "ab":
        kept.save(talked(question).conversation)
    base = sqlite3.connect(kept.path)
    base.execute("UPDATE answer SET json = x'0011' WHERE conversation = 1")
    base.execute("UPDATE conversation SET sampling = '[' WHERE id = 1")
    base.commit()
    base.close()
    with pytest.raises(InvalidModel, match="conversation 1 is damaged") as caught:
        kept.load(1)
    assert caught.value.hint == "The others can still be loaded."
    assert kept.load(2).title == "b" and len(kept.list()) == 2
    kept.delete(1)


def test_a_newer_version_is_left_alone(kept: Store) -> None:
    kept.save(talked().conversation)
    base = sqlite3.connect(kept.path)
    base.execute("PRAGMA user_version = 7")
    base.close()
    with pytest.raises(LlmkitError, match="written by a newer llmkit .version 7, this one reads 1") as caught:
        kept.save(talked().conversation)
    assert "Update llmkit" in (caught.value.hint or "")


def test_another_programs_file(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    base = sqlite3.connect(path)
    base.execute("CREATE TABLE recipes (name TEXT)")
    base.close()
    with pytest.raises(InvalidModel, match="another program"):
        Store(path).save(talked().conversation)
    assert sqlite3.connect(path).execute("SELECT name FROM sqlite_master").fetchall() == [("recipes",)]


def test_nowhere_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AccessDenied, match="cannot be kept here"):
        Store(tmp_path / "file" / "chats.sqlite").save(talked().conversation)
    (tmp_path / "folder").mkdir()
    with pytest.raises(AccessDenied, match="cannot be kept here"):
        Store(tmp_path / "folder").save(talked().conversation)


def test_a_locked_file_says_so(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = talked()
    kept.save(chat.conversation)
    monkeypatch.setattr(store, "_WAIT", 0.05)
    holder = sqlite3.connect(kept.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(LlmkitError, match="another process holds it"):
        kept.save(chat.conversation)
    assert kept.load(1).answers.keys() == {1, 3}  # reading goes on
    holder.execute("ROLLBACK")
    holder.close()
    assert kept.save(chat.conversation) == store.Saved(1)


def test_listing_makes_no_file(kept: Store) -> None:
    assert kept.list() == () == kept.search("a") and not kept.path.exists()
