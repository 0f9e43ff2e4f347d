"""Downloads: what lands where, content that is not what was listed, hostile names, full disks, nobody there."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fetching
from fetching import FILES, NBYTES, REPO, WEIGHTS, Client, Outcome, assert_holds, checkpoint, whole
from llmkit import hub, model
from llmkit.errors import (
    InvalidModel,
    NotEnoughRoom,
    OutputExists,
    Unreachable,
)
from llmkit.hub import Cache
from standin_faults import (
    ChangeContent,
    FlipBytes,
    LyingTree,
    MissingFile,
    Status,
    UnsafeName,
    WrongETag,
    XetHeaders,
)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Client]:
    """A client, and a stand-in that holds FILES as org/tiny."""
    with fetching.in_process(monkeypatch, tmp_path / "root", tmp_path / "cache") as found:
        found.hub.add_synthetic(REPO, FILES)
        yield found


# ── all is well ──


def test_everything_lands_where_the_cache_has_it(here: Client) -> None:
    outcome = whole(here)
    commit = here.hub.snapshot(REPO).commit
    folder = here.cache.root / "models--org--tiny"
    assert outcome.path == folder / "snapshots" / commit
    assert (folder / "refs" / "main").read_text() == commit
    blobs = {path.name for path in (folder / "blobs").iterdir()}
    assert blobs == {entry.etag for entry in here.hub.snapshot(REPO).entries.values()}
    assert here.ranges() == [None]
    assert {done.how for done in outcome.done.values()} == {"fetched"}


def test_a_second_time_nothing_is_fetched(here: Client) -> None:
    whole(here)
    here.hub.clear()
    outcome = whole(here)
    assert here.hub.requests("GET", contains="/resolve/") == []
    assert {done.how for done in outcome.done.values()} == {"here"} and outcome.plan.fetch_nbytes == 0


def test_find_asks_nobody(here: Client) -> None:
    assert hub.find(model.parse(REPO), here.cache) is None
    outcome = whole(here)
    here.hub.clear()
    assert hub.find(model.parse(REPO), here.cache) == outcome.path
    assert here.hub.log == []


def test_odd_but_honest_names_and_empty_files(here: Client) -> None:
    files = {
        "config.json": b"",
        "a b.json": b"1",
        "ü – 模型.json": b"2",
        "100%#1?.json": b"3",
        "additional_chat_templates/tool use.jinja": b"4",
        WEIGHTS: b"",
    }
    here.hub.add_synthetic("org/odd", files)
    outcome = here.fetch("org/odd")
    assert outcome.path is not None
    assert_holds(outcome.path, files)


def test_into_a_folder_with_nested_files(here: Client, tmp_path: Path) -> None:
    files = {"a/b/c/d.txt": b"deep", "a/b/e.txt": b"", "f.txt": b"flat"}
    here.hub.add_synthetic("org/nested", files)
    here.fetch("org/nested", to=tmp_path / "out", include=["*"])
    assert_holds(tmp_path / "out", files)


def test_the_longest_names_allowed_can_be_written(here: Client, tmp_path: Path) -> None:
    longest = next(n for n in range(250, 0, -1) if _accepts(here, "x" * n + ".json"))
    assert longest > 200
    files = {"x" * longest + ".json": b"1", WEIGHTS: b"2"}
    here.hub.add_synthetic("org/long", files)
    for to in (None, tmp_path / "out"):
        outcome = here.fetch("org/long", to=to)
        assert outcome.path is not None
        assert_holds(outcome.path, files)


def _accepts(here: Client, name: str) -> bool:
    here.hub.add_synthetic("org/long", {name: b"1", WEIGHTS: b"2"})
    try:
        here.plan("org/long")
    except InvalidModel:
        return False
    return True


def test_ten_thousand_files(here: Client) -> None:
    many = {f"checkpoints/step-{number:05d}/state.json": b"%d" % number for number in range(10_000)}
    here.hub.add_synthetic("org/many", many | FILES)
    began = time.monotonic()
    planned = here.plan("org/many")
    assert time.monotonic() - began < 10
    assert len(here.hub.requests("GET", contains="/tree/")) > 10, "the listing came in pages"
    assert {each.file.path for each in planned.files} == set(FILES)
    assert sum(planned.choice.left_out.values()) == 10_000
    outcome = Outcome(planned)
    here.carry_out(outcome)
    assert outcome.path is not None
    assert_holds(outcome.path, FILES)
    here.hub.stop()
    began = time.monotonic()
    assert hub.find(model.parse("org/many"), here.cache) == outcome.path
    assert time.monotonic() - began < 3


# ── content that is not what was listed ──


def test_a_wrong_etag_is_refused_before_a_byte_is_kept(here: Client) -> None:
    here.hub.fail(REPO, WEIGHTS, WrongETag(), times=None)
    with pytest.raises(InvalidModel, match=r"model\.safetensors: the Hub lists the content .* announces 0{64}"):
        here.fetch()
    _nothing_of_it(here)


def test_flipped_bytes_are_refused_and_not_kept(here: Client) -> None:
    here.hub.fail(REPO, WEIGHTS, FlipBytes(at=NBYTES - 5), times=None)
    with pytest.raises(InvalidModel, match=r"model\.safetensors: its content is damaged"):
        here.fetch()
    _nothing_of_it(here)
    here.hub.heal()
    whole(here)


def _nothing_of_it(here: Client) -> None:
    etag = hashlib.sha256(FILES[WEIGHTS]).hexdigest()
    folder = here.cache.root / "models--org--tiny"
    left = [path for path in folder.rglob("*") if path.name == WEIGHTS or (etag in path.name and fetching.size(path))]
    assert [path for path in left if not path.name.endswith(".json")] == []
    assert hub.find(model.parse(REPO), here.cache) is None


def test_flipped_bytes_of_an_index(here: Client) -> None:
    here.hub.add_synthetic(REPO, _sharded())
    here.hub.fail(REPO, "*.index.json", FlipBytes())
    with pytest.raises(InvalidModel, match=r"index\.json is damaged on its way"):
        here.plan()


@pytest.mark.parametrize("listed", [NBYTES - 1, NBYTES + 1, 0])
def test_a_tree_whose_sizes_lie(here: Client, listed: int) -> None:
    here.hub.fail(REPO, WEIGHTS, LyingTree(listed))
    with pytest.raises(InvalidModel, match=rf"model\.safetensors: .*{listed:,}|content is damaged"):
        here.fetch()
    _nothing_of_it(here)


def test_a_tree_that_lists_more_than_the_disk_holds(here: Client) -> None:
    here.hub.fail(REPO, WEIGHTS, LyingTree(10**17))
    outcome = Outcome(here.plan())
    here.hub.clear()
    with pytest.raises(NotEnoughRoom, match=r"100000000\.\d+ GB are to come"):
        here.carry_out(outcome)
    assert here.hub.log == []


def _sharded() -> dict[str, bytes]:
    names = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    index = {"metadata": {}, "weight_map": {f"tensor.{number}": name for number, name in enumerate(names)}}
    shards = {name: fetching.content(500_000, seed) for seed, name in enumerate(names)}
    return {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(), **shards}


def test_an_index_that_names_a_missing_shard(here: Client) -> None:
    here.hub.add_synthetic(REPO, _sharded())
    here.hub.fail(REPO, "*-00002-*", MissingFile())
    with pytest.raises(InvalidModel, match=r"names 1 shard.*model-00002-of-00002\.safetensors"):
        here.fetch()
    fetched = here.hub.requests("GET", contains="/resolve/")
    assert [request.path.rpartition("/")[2] for request in fetched] == ["model.safetensors.index.json"]


def test_xet_headers_change_nothing(here: Client) -> None:
    here.hub.fail(REPO, WEIGHTS, XetHeaders())
    assert whole(here).plan.repository.files[-1].xet_hash or any(f.xet_hash for f in here.plan().repository.files)
    assert here.hub.requests(contains="xet") == []


@pytest.mark.parametrize(
    "name",
    [
        "../x", "x/../../y", "/etc/passwd", "C:\\x", "C:/x", "a\\..\\b", "NUL", "con.json", "aux/x.json", "x.", "x ",
        "a/ b./c", "", "a//b", "./x", "x\nrm", "x\x1b[2J", "x\x9b2J", ".git/config", "config.json.partial",
        "CONFIG.json", "config.json/x", "y" * 300,
    ],
    ids=repr,
)  # fmt: skip
def test_unsafe_names_are_refused(here: Client, tmp_path: Path, name: str) -> None:
    here.hub.fail(REPO, "config.json", UnsafeName(name))
    before = sorted(tmp_path.rglob("*"))
    for to in (None, tmp_path / "out"):
        with pytest.raises(InvalidModel, match="org/tiny: ") as caught:
            here.plan(include=["*"], to=to)
        assert caught.value.message.isprintable()
    assert sorted(tmp_path.rglob("*")) == before
    assert here.hub.requests(contains="/resolve/") == []


def test_names_that_are_one_on_some_file_systems(here: Client) -> None:
    for pair in (("é.json", "e\u0301.json"), ("straße.json", "STRASSE.json")):
        here.hub.add_synthetic("org/pair", {pair[0]: b"1", pair[1]: b"2", WEIGHTS: b"3"})
        with pytest.raises(InvalidModel, match="would be one file"):
            here.plan("org/pair")


# ── the content changes between two runs ──


@pytest.mark.parametrize("folder", [None, "out"], ids=["cache", "folder"])
def test_content_that_changed_is_fetched_anew(here: Client, tmp_path: Path, folder: str | None) -> None:
    changed = FILES | {WEIGHTS: fetching.content(NBYTES, seed=1)}
    to = tmp_path / folder if folder else None
    here.break_off(to=to)
    here.hub.fail(REPO, WEIGHTS, ChangeContent(changed[WEIGHTS]))
    outcome = here.fetch(to=to)
    assert here.ranges() == [None], "nothing of the old content is gone on with"
    assert outcome.path is not None
    assert_holds(outcome.path, changed)
    assert to is None or any("another version" in remark for remark in outcome.remarks)


def test_a_file_that_changed_after_it_was_whole_is_replaced(here: Client, tmp_path: Path) -> None:
    here.fetch(to=tmp_path / "out")
    changed = checkpoint(seed=1)
    here.hub.add_synthetic(REPO, changed)
    here.hub.clear()
    here.fetch(to=tmp_path / "out")
    assert_holds(tmp_path / "out", changed)
    assert here.ranges("config.json") == [], "only what changed is fetched"


def test_a_file_of_the_user_s_is_not_replaced(here: Client, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for mine in (b"mine", bytes(len(FILES["config.json"]))):  # of another size, of the same
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "config.json").write_bytes(mine)
        with pytest.raises(OutputExists, match=r"config\.json"):
            here.fetch(to=out)
        assert (out / "config.json").read_bytes() == mine


# ── nobody there ──


def test_nobody_listens(here: Client) -> None:
    here.hub.stop()
    began = time.monotonic()
    with pytest.raises(Unreachable, match=f"org/tiny: the Hub at {here.hub.address} cannot be reached") as caught:
        here.fetch()
    assert time.monotonic() - began < 3
    assert "llmkit list" in (caught.value.hint or "")


def test_nobody_listens_and_all_is_here(here: Client, tmp_path: Path) -> None:
    path = whole(here).path
    here.hub.stop()
    began = time.monotonic()
    outcome = here.fetch()
    assert time.monotonic() - began < 3
    assert outcome.path == path and {done.how for done in outcome.done.values()} == {"here"}
    assert any("cannot be reached" in remark and "whole copy" in remark for remark in outcome.plan.remarks)
    here.fetch(to=tmp_path / "out")
    assert_holds(tmp_path / "out", FILES)


def test_out_of_order_and_all_is_here(here: Client) -> None:
    path = whole(here).path
    here.hub.fail_route("api/*", Status(503), times=None)
    outcome = here.fetch()
    assert outcome.path == path and "(503)" in outcome.plan.remarks[0]


def test_a_part_of_a_model_is_not_taken_for_the_whole(here: Client) -> None:
    here.break_off()
    here.hub.stop()
    assert hub.find(model.parse(REPO), here.cache) is None
    with pytest.raises(Unreachable):
        here.plan()


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_by_wish(here: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, switch: str) -> None:
    path = whole(here).path
    here.hub.clear()
    monkeypatch.setenv(switch, "1")
    assert not hub.reachable()
    assert hub.find(model.parse(REPO), here.cache) == path
    outcome = here.fetch()
    assert outcome.path == path and switch in outcome.plan.remarks[0]
    with pytest.raises(Unreachable, match=switch):
        hub.plan(model.parse(REPO), cache=Cache(tmp_path / "empty"))
    assert here.hub.log == []


def test_reachable_is_about_the_endpoint(here: Client) -> None:
    assert hub.reachable()
    here.hub.stop()
    assert not hub.reachable(), "nobody listens any more"


@pytest.mark.parametrize("address", ["nonsense", "http://", "http://[::", "ftp://127.0.0.1", "http://127.0.0.1:x"])
def test_an_endpoint_that_is_none(here: Client, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert not hub.reachable()
    with pytest.raises(Unreachable):
        here.plan()
