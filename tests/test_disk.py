"""Disks that are full, read-only, or refuse: the words, and that all goes on afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import desks
import fetching
from desks import BIG, Desk, shards_of, size, weights
from fetching import REPO, WEIGHTS, Client, Outcome, assert_holds, checkpoint
from llmkit import hub, model
from llmkit.errors import AccessDenied, LlmkitError, NotEnoughRoom
from llmkit.hub import Cache
from llmkit.progress import Progress
from standin_faults import Trickle

FILES = checkpoint()
root, serving, desk = desks.root, desks.serving, desks.desk


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Client]:
    """A client, and a stand-in that holds FILES as org/tiny."""
    with fetching.in_process(monkeypatch, tmp_path / "root", tmp_path / "cache") as found:
        found.hub.add_synthetic(REPO, FILES)
        yield found


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own, for those who may mount one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # no such command here
        pytest.skip("no small disk can be made: there is no mount")
    if done.returncode:
        pytest.skip(f"no small disk can be made: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(here: Client, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "size=8m") as small:
        _fill_while_fetching(here, small)


def _fill_while_fetching(here: Client, small: Path) -> None:
    tight = Client(here.hub, Cache(small / "cache"))
    filler = small / "filler"
    filler.write_bytes(bytes(6_000_000))
    with pytest.raises(NotEnoughRoom, match=r"0\.00 GB are to come|are free"):
        tight.fetch()
    assert here.hub.requests("GET", contains="/resolve/") == [], "said before the first byte"
    filler.unlink()
    here.hub.fail(REPO, WEIGHTS, Trickle(3_000_000))
    outcome = Outcome(tight.plan())

    def fill(progress: Progress) -> None:
        if progress.done > 500_000 and not filler.exists():
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    with pytest.raises(NotEnoughRoom, match="the disk is full") as caught:
        hub.fetch(outcome.plan, on_progress=fill)
    assert "Free some room" in (caught.value.hint or "")
    with pytest.raises(NotEnoughRoom):
        tight.fetch()
    filler.unlink()
    here.hub.clear()
    again = tight.fetch()
    assert again.path is not None
    assert_holds(again.path, FILES)
    assert again.done[WEIGHTS].how == "resumed" and here.ranges() != [None]


def test_a_limit_on_the_size_of_files(here: Client, tmp_path: Path) -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))\n" + fetching.DRIVER
    environ = fetching.environment(here.hub, tmp_path)
    report = fetching.start(REPO, environ, driver=limited).finish()
    assert report.code == 1 and "cannot be written: File too large" in report.said("error")[0]
    here.hub.clear()
    again = fetching.start(REPO, environ).finish()
    assert_holds(again.path, FILES)
    assert here.ranges() == ["bytes=1500000-"]


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(here: Client, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(AccessDenied, match="closed"):
        here.fetch(to=closed / "out")


@pytest.mark.parametrize("to", ["file", "file/below"])
def test_a_file_where_a_folder_is_needed(here: Client, tmp_path: Path, to: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LlmkitError, match="file"):
        here.fetch(to=tmp_path / to)


def test_a_read_only_cache_will_do_when_all_is_here(here: Client, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=8m") as disk:
        reader = Client(here.hub, Cache(disk / "cache"))
        path = reader.fetch().path
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert reader.fetch().path == path
        assert hub.find(model.parse(REPO), reader.cache) == path
        here.hub.add_synthetic(REPO, checkpoint(seed=1))
        with pytest.raises(LlmkitError, match="[Rr]ead-only"):
            reader.fetch()


def test_the_room_for_the_whole_way(desk: Desk, root: Path, tmp_path: Path) -> None:
    """A plan asks for what comes and for what is written together; so do those who begin."""
    come = size(root / BIG)
    made = json.loads(desk.ok("quantize", BIG, "Q8_0", "--dry-run", "--json").stdout)["needed_nbytes"]
    for share, words in ((0.5, "NOT enough"), (1.5, "free: enough")):
        with small_disk(tmp_path / "disk", f"size={int(come + share * made)}") as disk:
            there = {"HF_HUB_CACHE": str(disk / "cache"), "LLMKIT_HOME": str(disk / "home")}
            shown = desk.ok("quantize", BIG, "Q8_0", "--out", disk, "--dry-run", **there).stderr
            assert f"{words}. Nothing was written." in shown
            if share < 1:
                shutil.rmtree(disk / "cache")
                desk.hub.clear()
                assert "are needed" in desk.refused("quantize", BIG, "Q8_0", "--out", disk, **there)
                assert "llmkit rm" in desk.refused("chat", f"{BIG}:Q8_0", "--prompt", "x", **there)
                assert shards_of(weights(desk.hub)) == [], "said before the first shard"


def test_no_room_for_another_name(here: Client, tmp_path: Path) -> None:
    """A disk may hold bytes enough and no more files: whatever is the first to be refused, the words are right."""
    for n_files in range(4, 21):
        with small_disk(tmp_path / "disk", f"size=8m,nr_inodes={n_files}") as disk:
            outcome = Outcome(Client(here.hub, Cache(disk / "cache")).plan())
            try:
                here.carry_out(outcome, workers=1)
            except NotEnoughRoom as error:
                assert re.search("the disk is full", error.message)
            except LlmkitError as error:
                assert re.search("cannot be written: No space", error.message)
            else:
                assert outcome.path is not None
                assert_holds(outcome.path, FILES)
                assert n_files > 10
                return
    raise AssertionError("never enough")
