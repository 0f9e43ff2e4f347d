"""Downloads that were killed, and several at once: what was on the disk is gone on with, and nobody harms another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fetching
from fetching import NBYTES, REPO, STOP, WEIGHTS, Client, Outcome, assert_holds, checkpoint, size, unfinished
from llmkit import hub, model, store
from llmkit.errors import InvalidModel
from llmkit.hub import claim as claim_module
from llmkit.hub import transfer
from llmkit.hub.claim import claim, lock_path, owner
from llmkit.hub.repository import RemoteFile
from standin_faults import FlipBytes, Trickle

FILES = checkpoint()
# what may be on its way in the buffers of two sockets when a process dies
IN_FLIGHT = 8_000_000


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Client]:
    """A client, and a stand-in that holds FILES as org/tiny."""
    with fetching.in_process(monkeypatch, tmp_path / "root", tmp_path / "cache") as found:
        found.hub.add_synthetic(REPO, FILES)
        yield found


def blob(here: Client) -> Path:
    """Where the weights go in the cache."""
    return here.cache.folder(REPO) / "blobs" / here.hub.snapshot(REPO).entries[WEIGHTS].etag


def whole(here: Client) -> Outcome:
    outcome = here.fetch()
    assert outcome.path is not None
    assert_holds(outcome.path, FILES)
    assert unfinished(outcome.path) + unfinished(here.cache.root) == []
    return outcome


# ── kill -9 ──


@pytest.mark.parametrize("folder", [None, "out"], ids=["cache", "folder"])
def test_killed_in_the_middle_of_a_file(here: Client, tmp_path: Path, folder: str | None) -> None:
    here.hub.fail(REPO, WEIGHTS, Trickle(4_000_000), times=None)
    environ = fetching.environment(here.hub, tmp_path)
    options: dict[str, Any] = {"to": tmp_path / folder} if folder else {}
    blobs = tmp_path / "hf" / "hub" / "models--org--tiny" / "blobs"
    partial = store.partial_path(tmp_path / folder / WEIGHTS if folder else blobs / blob(here).name)
    total = 0
    for stop in (500_000, 1_200_000, 2_000_000):
        child = fetching.start(REPO, environ, **options)
        fetching.wait_for(lambda stop=stop: size(partial) > stop, f"{stop} bytes")  # type: ignore[misc]
        child.process.kill()
        child.process.communicate()
        kept = size(partial)
        assert kept > stop
        total += here.hub.sent()
        here.hub.clear()
    here.hub.heal()
    report = fetching.start(REPO, environ, **options).finish()
    assert_holds(report.path, FILES)
    assert report.hows[WEIGHTS] == "resumed"
    assert here.ranges() == [f"bytes={kept}-"], "from exactly where the file on the disk ends"
    assert total + here.hub.sent() < NBYTES * 1.2, "a slow link loses next to nothing"
    assert unfinished(tmp_path / "hf") == [] and not partial.exists()


@pytest.mark.slow
def test_killed_at_full_speed_loses_only_what_was_on_its_way(here: Client, tmp_path: Path) -> None:
    nbytes = 100_000_000
    here.hub.add_synthetic(REPO, {"config.json": b"{}", WEIGHTS: fetching.content(nbytes)})
    environ = fetching.environment(here.hub, tmp_path)
    partial = store.partial_path(tmp_path / "hf" / "hub" / "models--org--tiny" / "blobs" / blob(here).name)
    lost = 0
    for stop in (10_000_000, 30_000_000, 60_000_000):
        before = size(partial)
        here.hub.clear()
        child = fetching.start(REPO, environ)
        fetching.wait_for(lambda stop=stop: size(partial) > stop, f"{stop} bytes")  # type: ignore[misc]
        child.process.kill()
        child.process.communicate()
        got = size(partial) - before
        lost += sum(request.sent for request in here.hub.requests("GET", suffix=WEIGHTS)) - got
        assert here.ranges() == [f"bytes={before}-" if before else None]
    assert lost < 3 * IN_FLIGHT
    path = fetching.start(REPO, environ).finish().path
    assert transfer.digest_of(path / WEIGHTS, _listed(here)) == _listed(here).sha256


def _listed(here: Client) -> RemoteFile:
    return next(file for file in here.plan().repository.files if file.path == WEIGHTS)


def test_killed_between_the_last_byte_and_the_name(here: Client) -> None:
    here.break_off()
    store.partial_path(blob(here)).write_bytes(FILES[WEIGHTS])
    outcome = whole(here)
    assert here.ranges() == [], "all bytes were here: they are only checked"
    assert outcome.done[WEIGHTS].nbytes == 0


def test_the_plan_knows_what_is_kept(here: Client) -> None:
    here.break_off()
    planned = {each.file.path: each for each in here.plan().files}[WEIGHTS]
    assert (planned.state, planned.kept_nbytes, planned.fetch_nbytes) == ("partial", STOP, NBYTES - STOP)
    outcome = whole(here)
    assert here.ranges() == [f"bytes={STOP}-"]
    assert outcome.done[WEIGHTS].how == "resumed" and outcome.done[WEIGHTS].nbytes == NBYTES - STOP


# ── what may have happened to the kept bytes ──


def _change_note(here: Client, **facts: object) -> None:
    note = transfer.note_path(blob(here))
    note.write_text(json.dumps(json.loads(note.read_text()) | facts))


def test_after_a_power_cut_only_what_was_synced_counts(here: Client) -> None:
    here.break_off()
    partial = store.partial_path(blob(here))
    with partial.open("r+b") as file:  # what was not synced may be anything
        file.seek(400_000)
        file.write(bytes(STOP - 400_000))
    _change_note(here, boot="another", synced=400_000)
    outcome = whole(here)
    assert here.ranges() == ["bytes=400000-"]
    assert outcome.done[WEIGHTS].nbytes == NBYTES - 400_000


def test_after_a_power_cut_with_nothing_synced(here: Client) -> None:
    here.break_off()
    _change_note(here, boot="another", synced=0)
    outcome = whole(here)
    assert here.ranges() == [None]
    assert not any("another version" in remark for remark in outcome.remarks), "that would not be true"


def test_synced_bytes_are_noted_while_they_come(here: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_SYNC_NBYTES", 300_000)
    here.break_off()
    note = json.loads(transfer.note_path(blob(here)).read_text())
    assert 300_000 <= note["synced"] <= STOP and note["nbytes"] == NBYTES
    boot = Path("/proc/sys/kernel/random/boot_id")
    assert not boot.exists() or note["boot"] == boot.read_text().strip()


@pytest.mark.parametrize("at", [0, STOP // 2, STOP - 1])
def test_bytes_that_went_bad_on_the_disk_are_noticed(here: Client, at: int) -> None:
    here.break_off()
    with store.partial_path(blob(here)).open("r+b") as file:
        file.seek(at)
        file.write(bytes([FILES[WEIGHTS][at] ^ 1]))
    outcome = whole(here)
    assert here.ranges() == [f"bytes={STOP}-", None], "once to the end, then once more from the start"
    assert any("was damaged: starting this file again" in remark for remark in outcome.remarks)
    assert outcome.progress[-1].done == outcome.progress[-1].total


def test_bytes_that_went_bad_on_the_disk_and_on_the_wire(here: Client) -> None:
    here.break_off()
    store.partial_path(blob(here)).write_bytes(bytes(STOP))
    here.hub.fail(REPO, WEIGHTS, FlipBytes(NBYTES - 1), times=None)
    with pytest.raises(InvalidModel, match="content is damaged"):
        here.fetch()
    assert here.ranges() == [f"bytes={STOP}-", None], "it does not go round for ever"


@pytest.mark.parametrize(
    "note",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}", b'{"hash": 1, "nbytes": [], "synced": "x", "boot": null}'],
    ids=repr,
)
def test_a_note_that_is_none(here: Client, note: bytes) -> None:
    here.break_off()
    transfer.note_path(blob(here)).write_bytes(note)
    whole(here)
    assert here.ranges() == [None]


def test_a_note_with_numbers_that_cannot_be(here: Client) -> None:
    for synced in (-5, 10**12, "1e3", None, [1]):
        here.break_off()
        _change_note(here, boot="another", synced=synced)
        kept = transfer.kept_nbytes(blob(here), _listed(here))
        assert 0 <= kept <= STOP, synced
        whole(here)
        (here.cache.folder(REPO) / "snapshots").rename(here.cache.root / f"old-{synced}")
        blob(here).unlink()
        here.hub.clear()


def test_a_note_of_other_content(here: Client) -> None:
    here.break_off()
    _change_note(here, hash="0" * 64)
    outcome = whole(here)
    assert here.ranges() == [None]
    assert any("another version" in remark for remark in outcome.remarks)


def test_no_note_at_all(here: Client) -> None:
    here.break_off()
    transfer.note_path(blob(here)).unlink()
    whole(here)
    assert here.ranges() == [None]


def test_a_partial_that_is_longer_than_the_file(here: Client) -> None:
    here.break_off()
    store.partial_path(blob(here)).write_bytes(FILES[WEIGHTS] + b"more")
    whole(here)
    assert here.ranges() == [None]


def test_a_note_without_bytes(here: Client) -> None:
    here.break_off()
    store.partial_path(blob(here)).unlink()
    whole(here)
    assert here.ranges() == [None]


# ── several at once ──


@pytest.mark.parametrize("n_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_that_fetch_the_same(here: Client, tmp_path: Path, n_processes: int) -> None:
    many = FILES | {f"extra-{number}.json": fetching.content(200_000, number) for number in range(6)}
    here.hub.add_synthetic(REPO, many)
    here.hub.fail(REPO, "*", Trickle(600_000), times=None)
    environ = fetching.environment(here.hub, tmp_path)
    partial = store.partial_path(tmp_path / "hf" / "hub" / "models--org--tiny" / "blobs" / blob(here).name)
    children = [fetching.start(REPO, environ)]
    fetching.wait_for(lambda: size(partial) > 0, "the first to be under way")  # else they might never meet
    children += [fetching.start(REPO, environ) for _ in range(n_processes - 1)]
    reports = [child.finish() for child in children]
    for report in reports:
        assert_holds(report.path, many)
    assert {name: here.ranges(name) for name in many} == {name: [None] for name in many}, "each file came once"
    assert any("is being fetched by process" in remark for report in reports for remark in report.said("remark"))
    assert unfinished(tmp_path / "hf") == []


def test_processes_that_fetch_the_same_into_a_folder(here: Client, tmp_path: Path) -> None:
    here.hub.fail(REPO, "*", Trickle(4_000_000), times=None)
    environ = fetching.environment(here.hub, tmp_path)
    children = [fetching.start(REPO, environ, to=tmp_path / "out") for _ in range(2)]
    for child in children:
        assert child.finish().code == 0
    assert_holds(tmp_path / "out", FILES)
    assert here.ranges() == [None]


def test_the_one_that_waits_goes_on_when_the_other_is_killed(here: Client, tmp_path: Path) -> None:
    here.hub.fail(REPO, WEIGHTS, Trickle(1_000_000))
    environ = fetching.environment(here.hub, tmp_path)
    partial = store.partial_path(tmp_path / "hf" / "hub" / "models--org--tiny" / "blobs" / blob(here).name)
    first = fetching.start(REPO, environ)
    fetching.wait_for(lambda: size(partial) > 200_000, "the first to be under way")
    second = fetching.start(REPO, environ)
    assert second.process.stdout is not None
    said = iter(second.process.stdout.readline, "")
    waiting = next(line for line in said if "is being fetched by process" in line)
    assert f"process {first.process.pid}: waiting" in waiting
    first.process.kill()
    first.process.communicate()
    kept = size(partial)
    report = second.finish()
    assert_holds(report.path, FILES)
    assert here.ranges() == [None, f"bytes={kept}-"] and report.hows[WEIGHTS] == "resumed"


def test_equal_content_under_two_names_is_fetched_once(here: Client) -> None:
    twins = {"config.json": b"{}", WEIGHTS: FILES[WEIGHTS], "1_Dense/model.safetensors": FILES[WEIGHTS]}
    here.hub.add_synthetic("org/twins", twins)
    here.hub.fail("org/twins", "*", Trickle(10_000_000), times=None)
    planned = here.plan("org/twins")
    assert planned.fetch_nbytes == NBYTES + 2, "it comes once, and needs room once"
    outcome = Outcome(planned)
    here.carry_out(outcome)
    assert outcome.path is not None
    assert_holds(outcome.path, twins)
    assert len(here.hub.requests("GET", suffix=WEIGHTS)) == 1
    assert outcome.progress[-1].done == outcome.progress[-1].total == 2 * NBYTES + 2
    assert outcome.remarks == []


# ── locks ──


def test_the_lock_of_a_dead_process_is_no_obstacle(here: Client) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    here.break_off()
    lock_path(blob(here)).write_text(dead.stdout)
    assert owner(blob(here)) is None
    outcome = whole(here)
    assert not any("waiting" in remark for remark in outcome.remarks)


HOLD = """
import sys, time
from pathlib import Path
from llmkit.hub.claim import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_that_is_held_makes_us_wait_and_say_so(here: Client) -> None:
    here.break_off()
    environ = fetching.environment(here.hub, here.cache.root)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(blob(here))], env=environ, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert owner(blob(here)) == holder.pid
        outcome = Outcome(here.plan())
        fetcher = threading.Thread(target=here.carry_out, args=(outcome,))
        fetcher.start()
        fetching.wait_for(lambda: outcome.remarks, "a word about the wait")
        assert outcome.remarks == [f"{WEIGHTS}: is being fetched by process {holder.pid}: waiting for it"]
        fetcher.join(0.5)
        assert fetcher.is_alive() and here.ranges() == []
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    fetcher.join(20)
    assert outcome.path is not None
    assert_holds(outcome.path, FILES)
    assert here.ranges() == [f"bytes={STOP}-"]


def test_a_claim_is_one_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            with claim(tmp_path / "x") as ours:
                assert ours
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(most) == 20 and max(most) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_while_we_took_it_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = claim_module._lock
    removals = iter([True, False])

    def late(descriptor: int, lock: Path) -> bool:
        if next(removals, False):
            lock.unlink()  # its last owner lets go between our opening it and our locking it
        return take(descriptor, lock)

    monkeypatch.setattr(claim_module, "_lock", late)
    with claim(tmp_path / "x") as ours:
        assert ours and owner(tmp_path / "x") == os.getpid()


def test_a_wait_ends_when_it_is_to_stop(tmp_path: Path) -> None:
    with claim(tmp_path / "x"), claim(tmp_path / "x", stopped=lambda: True) as ours:
        assert not ours
    with claim(tmp_path / "x") as ours:
        assert ours


def test_find_does_not_take_a_file_under_way_for_whole(here: Client) -> None:
    here.break_off()
    assert hub.find(model.parse(REPO), here.cache) is None
    whole(here)
    assert hub.find(model.parse(REPO), here.cache) is not None
