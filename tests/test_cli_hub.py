"""Quantize, convert, inspect and chat against the stand-in Hub, over HTTP, with every form of MODEL."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import desks
from desks import (
    BIG,
    ODD,
    PATIENCE,
    QUANTIZED,
    TINY,
    Desk,
    Silence,
    files,
    leftovers,
    shards_of,
    size,
    wait_until,
    weights,
)
from llmkit import gguf
from standin_faults import Trickle
from standin_hub import Hub

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
root, serving, desk, silence = desks.root, desks.serving, desks.desk, desks.silence
ANSWER = ("--prompt", "hi", "--threads", "1", "--max-tokens", "8", "--temperature", "0")


def tensor_bytes(path: Path) -> dict[str, bytes]:
    file = gguf.read(path)
    whole = {part: part.read_bytes() for part in file.paths}
    return {t.name: whole[t.path][t.offset : t.offset + t.nbytes] for t in file.tensors.values()}


# --- quantize --------------------------------------------------------------------------------------------------------


def test_a_dry_run_fetches_headers_and_tells_the_truth(desk: Desk, root: Path) -> None:
    planned = json.loads(desk.ok("quantize", TINY, "Q4_K_M", "Q8_0", "--dry-run", "--json").stdout)
    total = size(root / TINY, "*.safetensors")
    assert 0 < sum(request.sent for request in weights(desk.hub)) < 300_000 < total / 50
    small = size(root / TINY) - total
    assert planned["fetch_nbytes"] == total + small
    files_asked = desk.hub.requests("GET", contains="/resolve/")
    assert planned["fetched_nbytes"] == sum(request.sent for request in files_asked) >= small
    assert not files(desk.out) and not leftovers(desk.home)
    shown = desk.ok("quantize", TINY, "Q4_K_M", "--dry-run")
    assert "Nothing was written" in shown.stderr and "licence apache-2.0" in shown.stderr
    assert re.search(r"fetch +[\d.]+ MB in \d+ of \d+ files", shown.stderr)
    assert re.search(r"write +[\d.]+ MB to tiny-Q4_K_M.gguf\nneed +[\d.]+ MB of disk in all", shown.stderr)

    made = json.loads(desk.ok("quantize", TINY, "Q4_K_M", "Q8_0", "--json").stdout)
    for expected, found in zip(planned["outputs"], made, strict=True):
        file = gguf.read(desk.out / found["path"])
        assert expected["path"] == found["path"]
        assert expected["nbytes"] == found["nbytes"] == file.path.stat().st_size
        assert expected["types"] == {name: tensor.type.name for name, tensor in file.tensors.items()}
        assert (file.get("llmkit.source.repo"), file.get("general.name")) == (TINY, "tiny")
    fetched = [request for request in weights(desk.hub) if request.range is None]
    assert len(fetched) == len({request.path for request in fetched}) == 5
    assert not leftovers(desk.home)


def test_what_is_made_or_here_needs_no_hub(desk: Desk, silence: Silence) -> None:
    desk.ok("quantize", f"{TINY}:Q4_K_M")
    first = files(desk.out)
    assert list(first) == ["tiny-Q4_K_M.gguf"]
    desk.hub.clear()
    again = desk.ok("quantize", TINY, "Q4_K_M")
    assert "made already" in again.stderr and files(desk.out) == first
    nowhere = {"HF_ENDPOINT": silence.address}
    more = desk.ok("quantize", TINY, "Q4_K_M", "Q8_0", **nowhere)
    assert more.stderr.count("made already") == 1 and len(files(desk.out)) == 2
    desk.ok("quantize", TINY, "Q6_K", "--dry-run", **nowhere)
    desk.ok("quantize", f"{TINY}@main", "Q6_K", HF_HUB_OFFLINE="1", **nowhere)
    assert not silence.was_called() and desk.hub.log == []
    (commit,) = desk.snapshots.iterdir()
    assert "made already" in desk.ok("quantize", commit, "Q4_K_M").stderr, "the same model by its folder"


def test_outputs_are_looked_at_before_weights_are_fetched(desk: Desk) -> None:
    (desk.out / "tiny-Q4_K_M.gguf").write_bytes(b"mine")
    for more in ([], ["--low-disk"]):
        assert "exists and is something else" in desk.refused("quantize", TINY, "Q4_K_M", *more)
    assert sum(request.sent for request in weights(desk.hub)) < 600_000
    assert files(desk.out) == {"tiny-Q4_K_M.gguf": b"mine"} and not leftovers(desk.home)


@pytest.mark.parametrize("words", [("quantize", ODD, "Q4_K_M"), ("convert", ODD), ("chat", f"{ODD}:Q8_0")])
def test_what_cannot_be_made_is_refused_from_headers(desk: Desk, words: tuple[str, ...]) -> None:
    said = desk.refused(*words)
    assert "llmkit: error: org/odd: architecture 'OddForCausalLM' is not supported" in said
    assert sum(request.sent for request in weights(desk.hub)) < 300_000
    assert not files(desk.out) and not leftovers(desk.home)


# --- low disk --------------------------------------------------------------------------------------------------------


class Disk:
    """Measures what folders take on the disk, all the while: in a thread, and at each request."""

    def __init__(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folders = (desk.home / "streams", desk.cache, desk.out)
        self.peak = 0
        self._over = threading.Event()
        noting = desk.hub.noting

        @contextmanager
        def measured(record: Any) -> Iterator[None]:
            self.measure()
            with noting(record):
                yield
            self.measure()

        monkeypatch.setattr(desk.hub, "noting", measured)

    def measure(self) -> None:
        blocks: dict[tuple[int, int], int] = {}
        for folder in self.folders:
            for parent, _, names in os.walk(folder):
                for name in names:
                    try:
                        facts = os.lstat(os.path.join(parent, name))
                    except FileNotFoundError:
                        continue
                    blocks[facts.st_dev, facts.st_ino] = facts.st_blocks * 512
        self.peak = max(self.peak, sum(blocks.values()))

    def __enter__(self) -> Disk:
        def watch() -> None:
            while not self._over.wait(0.004):
                self.measure()

        self._thread = threading.Thread(target=watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture(scope="module")
def ordinary(serving: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run writes that has everything on the disk."""
    desk = Desk(serving, tmp_path_factory.mktemp("ordinary"))
    desk.out.mkdir()
    desk.ok("quantize", BIG, "Q4_K_M")
    return files(desk.out)


@pytest.mark.slow
def test_low_disk_holds_one_shard(
    desk: Desk, root: Path, ordinary: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [path.stat().st_size for path in (root / BIG).glob("*.safetensors")]
    slack = 1_500_000  # small files, headers, the journal; a second shard would be noticed
    assert len(sizes) == 7 and min(sizes) > 2 * slack
    planned = json.loads(desk.ok("quantize", BIG, "Q4_K_M", "--low-disk", "--dry-run", "--json").stdout)
    desk.hub.clear()
    desk.hub.fail(BIG, "*.safetensors", Trickle(40e6), times=None)
    with Disk(desk, monkeypatch) as disk:
        done = desk.ok("quantize", BIG, "Q4_K_M", "--low-disk")
    (output,) = files(desk.out).values()
    assert files(desk.out) == ordinary
    assert len(output) + max(sizes) // 2 < disk.peak <= len(output) + max(sizes) + slack
    assert disk.peak <= planned["low_disk"]["peak_nbytes"] + slack
    assert shards_of(weights(desk.hub)) == planned["low_disk"]["shards"] == sorted(set(shards_of(weights(desk.hub))))
    assert not leftovers(desk.home), "the shadow is gone"
    assert done.stderr.count("fetched, verified") == 7 and re.search("need .* at most .derived.: the out", done.stderr)
    desk.hub.clear()
    again = desk.ok("quantize", BIG, "Q4_K_M", "--low-disk")
    assert "made already" in again.stderr and shards_of(weights(desk.hub)) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_low_disk_goes_on(desk: Desk, ordinary: dict[str, bytes], number: signal.Signals) -> None:
    desk.hub.fail(BIG, "model-00004-*", Trickle(1e6), times=None)

    def in_the_middle() -> bool:
        return any("model-00004" in each.path and each.sent > 500_000 for each in weights(desk.hub))

    with desk.running("quantize", BIG, "Q4_K_M", "--low-disk") as process:
        wait_until(in_the_middle, process)
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=PATIENCE)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "Interrupted." in said and "run the same command again" in said
        assert "Traceback" not in said
    before = shards_of(weights(desk.hub))
    assert [name[:11] for name in before] == ["model-00001", "model-00002", "model-00003", "model-00004"]
    assert list(files(desk.out)) != list(ordinary) and leftovers(desk.home)
    desk.hub.heal()
    desk.hub.clear()
    done = desk.ok("quantize", BIG, "Q4_K_M", "--low-disk")
    assert files(desk.out) == ordinary and not leftovers(desk.home)
    assert [name[:11] for name in shards_of(weights(desk.hub))] == ["model-00005", "model-00006", "model-00007"]
    (rest,) = (request for request in weights(desk.hub) if request.range)
    assert "model-00004" in rest.path and re.fullmatch(r"bytes=[1-9]\d{5,}-", str(rest.range))
    assert "gone on with, verified" in done.stderr and re.search(r"resumed, [1-9]\d* tensors", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--low-disk",)])
def test_two_at_once(desk: Desk, ordinary: dict[str, bytes], options: tuple[str, ...]) -> None:
    """The second waits and says for whom; nothing is fetched twice, and the output is made once."""
    # slow enough that the second meets the first; without --low-disk several shards come at once
    desk.hub.fail(BIG, "*.safetensors", Trickle(10e6 if options else 1e6), times=None)
    with desk.running("quantize", BIG, "Q4_K_M", *options) as first:
        wait_until(lambda: bool(shards_of(weights(desk.hub))), first)
        second = desk.run("quantize", BIG, "Q4_K_M", *options)
        _, said = first.communicate(timeout=PATIENCE)
    assert f"process {first.pid}: waiting" in second.stderr
    for code, words in ((first.returncode, said), (second.returncode, second.stderr)):
        # once all had come both may have begun to write, and one of them is told so; shard by shard they take turns
        assert code == 0 or (code == 1 and not options and "another run is writing it" in words), words
    assert 0 in (first.returncode, second.returncode)
    assert "made already" in desk.ok("quantize", BIG, "Q4_K_M", *options).stderr
    assert files(desk.out) == ordinary and not leftovers(desk.home)
    assert sorted(shards_of(weights(desk.hub))) == sorted(set(shards_of(weights(desk.hub))))


def test_low_disk_uses_what_the_cache_has(desk: Desk, root: Path) -> None:
    """And leaves it there."""
    first = "model-00001-of-00005.safetensors"
    desk.ok("download", TINY, "--include", first)
    desk.hub.clear()
    desk.ok("quantize", TINY, "Q8_0", "--low-disk")
    assert len(shards_of(weights(desk.hub))) == 4 and first not in shards_of(weights(desk.hub))
    (commit,) = desk.snapshots.iterdir()
    assert (commit / first).read_bytes() == (root / TINY / first).read_bytes()
    assert list(commit.glob("*.safetensors")) == [commit / first] and not leftovers(desk.home)


# --- inspect, convert, chat ------------------------------------------------------------------------------------------


def test_inspect_fetches_headers_only(desk: Desk, root: Path) -> None:
    parts = sorted((root / QUANTIZED).glob("*-F16-*"))
    assert len(parts) > 2
    for quant, path in (("Q8_0", root / QUANTIZED / "tiny-Q8_0.gguf"), ("f16", parts[0])):
        desk.hub.clear()
        there = json.loads(desk.ok("inspect", f"{QUANTIZED}:{quant}", "--json").stdout)
        asked = weights(desk.hub)
        assert [request.range for request in asked] == ["bytes=0-1048575"] * len(gguf.read(path).paths)
        here = json.loads(desk.ok("inspect", path, "--json").stdout)
        assert here["summary"].pop("path") == str(path)
        assert there["summary"].pop("path") == f"{QUANTIZED}: {path.name}", "a folder that is gone helps nobody"
        assert there == here
    assert not leftovers(desk.home)
    shown = desk.ok("inspect", f"{QUANTIZED}:Q8_0")
    assert f"{QUANTIZED}: tiny-Q8_0.gguf" in shown.stdout and f"llmkit chat {QUANTIZED}:Q8_0" in shown.stderr


def test_which_gguf_of_several(desk: Desk) -> None:
    for word in ("", ":Q3_K_M"):
        said = desk.refused("inspect", f"{QUANTIZED}{word}")
        assert all(re.search(rf"{quant} \(\d+ MB\)", said) for quant in ("F16", "Q4_K_M", "Q8_0")), said
    assert weights(desk.hub) == []


def test_convert(desk: Desk, root: Path) -> None:
    desk.ok("convert", TINY, "--type", "f16", "--out", "it.gguf", "--low-disk")
    assert list(files(desk.out)) == ["it.gguf"]
    assert tensor_bytes(desk.out / "it.gguf") == tensor_bytes(next((root / QUANTIZED).glob("*F16-00001-*")))
    desk.ok("convert", TINY, "--type", "f16", "--out", "again.gguf")
    assert (desk.out / "again.gguf").read_bytes() == (desk.out / "it.gguf").read_bytes()


def test_convert_makes_no_quants(desk: Desk) -> None:
    assert f"llmkit quantize {TINY} Q4_K_M" in desk.refused("convert", f"{TINY}:Q4_K_M")
    assert "no quant was named" in desk.refused("quantize", TINY)
    assert desk.hub.log == []


def test_chat_with_a_gguf_of_the_hub(desk: Desk, root: Path, silence: Silence) -> None:
    first = desk.ok("chat", f"{QUANTIZED}:q4_k_m", *ANSWER)
    assert [request.range for request in weights(desk.hub)] == [None] and first.stdout.strip()
    again = desk.ok("chat", f"{QUANTIZED}:Q4_K_M", *ANSWER, HF_ENDPOINT=silence.address)
    assert again.stdout == first.stdout
    assert desk.ok("chat", root / QUANTIZED / "tiny-Q4_K_M.gguf", *ANSWER).stdout == first.stdout
    assert not silence.was_called()
    assert len(weights(desk.hub)) == 1


def test_chat_makes_a_quant_once(desk: Desk, root: Path, silence: Silence) -> None:
    assert f"For instance {TINY}:Q4_K_M" in desk.refused("chat", TINY, *ANSWER)
    assert "nearest" in desk.refused("chat", f"{TINY}:Q4_K_N", *ANSWER).lower()
    assert weights(desk.hub) == []
    first = desk.ok("chat", f"{TINY}:Q4_K_M", *ANSWER)
    made = desk.home / "models" / "org--tiny" / "tiny-Q4_K_M.gguf"
    assert tensor_bytes(made) == tensor_bytes(root / QUANTIZED / "tiny-Q4_K_M.gguf")
    before = made.stat()
    again = desk.ok("chat", f"{TINY}:Q4_K_M", *ANSWER, HF_ENDPOINT=silence.address)
    assert again.stdout == first.stdout and os.path.samestat(made.stat(), before)
    assert f"For instance {TINY}:Q4_K_M" in desk.refused("chat", TINY, *ANSWER), "nor when it is here"
    assert not silence.was_called()
    assert len(shards_of(weights(desk.hub))) == 5 and not leftovers(desk.home)


def test_chat_with_paths(desk: Desk, root: Path) -> None:
    first, second = sorted((root / QUANTIZED).glob("*-F16-*"))[:2]
    assert desk.ok("chat", first, *ANSWER).stdout.strip()
    said = desk.refused("chat", second, *ANSWER)
    assert "later part" in said and f"'{first}'" in said
    assert "llmkit quantize" in desk.refused("chat", root / TINY, *ANSWER)
    assert str(first) in desk.refused("chat", root / QUANTIZED, *ANSWER)
    assert "no such file" in desk.refused("chat", "nosuch.gguf", *ANSWER)
    assert desk.hub.log == []
