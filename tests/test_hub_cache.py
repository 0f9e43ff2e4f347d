"""The cache we share with huggingface_hub and transformers: what one has fetched, the other finds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fetching
import standin_hub
from conftest import TinyCheckpoint
from fetching import REPO, WEIGHTS, Client, assert_holds, checkpoint, run_code
from llmkit import hub, model
from llmkit.errors import OutputExists
from llmkit.hub.cache import write

FILES = checkpoint(300_000)
EXTRA = {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx"}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Client]:
    """A client whose cache is the one that children with HF_HOME=tmp_path/hf use; FILES and more as org/tiny."""
    with fetching.in_process(monkeypatch, tmp_path / "root", tmp_path / "hf" / "hub") as found:
        found.hub.add_synthetic(REPO, FILES | EXTRA)
        yield found


def library(here: Client, home: Path, code: str, **changes: str) -> str:
    """Run huggingface_hub's code in a child with the same HF_HOME."""
    return run_code(f"from huggingface_hub import *\n{code}", fetching.environment(here.hub, home, **changes)).strip()


# ── what we fetched ──


@pytest.mark.slow
def test_transformers_finds_what_we_fetched(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "root" / REPO)
    with standin_hub.serve(tmp_path / "root") as server:
        environ = fetching.environment(server, tmp_path)
        assert fetching.start(REPO, environ).finish().code == 0
        server.clear()
        code = f"""
from transformers import AutoConfig, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({REPO!r}, local_files_only=True)
print(AutoConfig.from_pretrained({REPO!r}, local_files_only=True).model_type)
print(tokenizer.decode(tokenizer("Hello world").input_ids, skip_special_tokens=True))
"""
        assert run_code(code, environ).split("\n")[:2] == ["llama", "Hello world"]
        assert server.requests(contains=REPO) == []
        code = code.replace(", local_files_only=True", "")
        assert run_code(code, environ | {"HF_HUB_OFFLINE": "1"}).split("\n")[0] == "llama"
        assert server.requests(contains=REPO) == []


def test_huggingface_hub_finds_what_we_fetched(here: Client, tmp_path: Path) -> None:
    path = here.fetch().path
    here.hub.clear()
    found = library(
        here, tmp_path, f"print(snapshot_download({REPO!r}, local_files_only=True, allow_patterns={list(FILES)}))"
    )
    assert found == str(path)
    assert library(here, tmp_path, f"print(hf_hub_download({REPO!r}, {WEIGHTS!r}, local_files_only=True))") == str(
        path / WEIGHTS if path else ""
    )
    assert here.hub.requests(contains=REPO) == []
    rows = library(here, tmp_path, "print([(r.repo_id, r.nb_files, r.size_on_disk) for r in scan_cache_dir().repos])")
    assert rows == str([(REPO, len(FILES), sum(map(len, FILES.values())))])
    assert library(here, tmp_path, "print(len(scan_cache_dir().warnings))") == "0"


def test_huggingface_hub_fetches_the_rest_only(here: Client, tmp_path: Path) -> None:
    here.fetch()
    here.hub.clear()
    library(here, tmp_path, f"snapshot_download({REPO!r})")
    fetched = {request.path.partition("/resolve/")[2].partition("/")[2] for request in here.hub.requests("GET")}
    assert fetched - {""} == set(EXTRA)


# ── what huggingface_hub fetched ──


@pytest.mark.parametrize("revision", [None, "v1"])
def test_we_find_what_huggingface_hub_fetched(here: Client, tmp_path: Path, revision: str | None) -> None:
    text = REPO if revision is None else f"{REPO}@{revision}"
    (tmp_path / "v1").mkdir()
    for name, content in FILES.items():
        (tmp_path / "v1" / name).write_bytes(content)
    here.hub.add_revision(REPO, "v1", tmp_path / "v1")
    path = library(here, tmp_path, f"print(snapshot_download({REPO!r}, revision={revision!r}))")
    here.hub.clear()
    assert str(hub.find(model.parse(text), here.cache)) == path
    assert here.hub.log == []
    outcome = here.fetch(text)
    assert {each.state for each in outcome.plan.files} == {"here"} and str(outcome.path) == path
    assert here.hub.requests(contains="/resolve/") == []
    commit = Path(path).name
    assert str(hub.find(model.parse(f"{REPO}@{commit}"), here.cache)) == path


def test_single_files_of_huggingface_hub_are_found_too(here: Client, tmp_path: Path) -> None:
    """As transformers fetches them: without a kept listing, and without the card."""
    here.hub.add_synthetic(REPO, FILES | EXTRA | {"README.md": b"# card", "LICENSE": b"terms"})
    for number, name in enumerate(FILES):
        assert hub.find(model.parse(REPO), here.cache) is None, f"after {number} files"
        library(here, tmp_path, f"hf_hub_download({REPO!r}, {name!r})")
    found = hub.find(model.parse(REPO), here.cache)
    assert found is not None
    assert_holds(found, FILES)
    planned = here.plan()
    states = {each.file.path: each.state for each in planned.files}
    assert states == {**dict.fromkeys(FILES, "here"), "README.md": "missing", "LICENSE": "missing"}


def test_what_only_people_read_is_not_needed_to_run(here: Client) -> None:
    here.hub.add_synthetic(REPO, FILES | EXTRA | {"README.md": b"# card", "LICENSE": b"terms"})
    path = here.fetch(exclude=["README.md", "LICENSE"]).path
    assert (here.cache.folder(REPO) / "trees").is_dir(), "the listing that is kept names them"
    assert hub.find(model.parse(REPO), here.cache) == path
    here.hub.stop()
    assert here.fetch().path == path


def test_a_cache_without_links(here: Client, tmp_path: Path) -> None:
    """As on systems where huggingface_hub may make no links: files lie in the snapshot itself."""
    path = here.fetch().path
    assert path is not None
    for name in FILES:
        real = (path / name).resolve()
        (path / name).unlink()
        real.rename(path / name)
    assert hub.find(model.parse(REPO), here.cache) == path
    here.hub.clear()
    assert {each.state for each in here.fetch().plan.files} == {"here"}
    assert here.hub.requests(contains="/resolve/") == []
    here.hub.stop()
    assert here.fetch().path == path
    shutil.rmtree(here.cache.folder(REPO) / "trees")
    assert here.fetch().path == path


def test_a_new_commit_fetches_what_changed(here: Client) -> None:
    old = here.fetch().path
    changed = FILES | {"config.json": b'{"model_type": "qwen3"}'}
    here.hub.add_synthetic(REPO, changed)
    here.hub.clear()
    outcome = here.fetch()
    assert outcome.path is not None and outcome.path != old
    assert_holds(outcome.path, changed)
    assert {path: done.how for path, done in outcome.done.items()} == {
        "config.json": "fetched", "tokenizer.json": "linked", WEIGHTS: "linked"
    }  # fmt: skip
    assert here.ranges() == []
    assert hub.find(model.parse(REPO), here.cache) == outcome.path
    assert old is not None
    assert hub.find(model.parse(f"{REPO}@{old.name}"), here.cache) == old


def test_the_branch_moves_only_when_all_is_there(here: Client) -> None:
    old = here.fetch().path
    here.hub.add_synthetic(REPO, checkpoint(seed=1))
    here.break_off()
    assert hub.find(model.parse(REPO), here.cache) == old
    here.fetch()
    assert hub.find(model.parse(REPO), here.cache) != old


@pytest.mark.parametrize("path", ["trees", "refs"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b'{"format_version": 1, "files": {"x": 1}}', b"../../x"]
)
def test_a_cache_that_is_broken_is_not_believed(here: Client, path: str, content: bytes) -> None:
    whole = here.fetch().path
    assert whole is not None
    folder = here.cache.folder(REPO)
    (folder / "refs" / "main" if path == "refs" else folder / "trees" / f"{whole.name}.json").write_bytes(content)
    assert hub.find(model.parse(REPO), here.cache) in ((None,) if path == "refs" else (whole, None))
    assert here.fetch().path == whole


def test_a_kept_listing_with_unsafe_names_is_not_believed(here: Client) -> None:
    whole = here.fetch().path
    assert whole is not None
    tree = here.cache.folder(REPO) / "trees" / f"{whole.name}.json"
    listing = json.loads(tree.read_text())
    listing["files"]["../../../x.json"] = listing["files"]["config.json"]
    tree.write_text(json.dumps(listing))
    assert hub.find(model.parse(REPO), here.cache) is None


# ── folders ──


def test_a_model_in_the_cache_is_linked_into_the_folder(here: Client, tmp_path: Path) -> None:
    path = here.fetch().path
    assert path is not None
    here.hub.clear()
    outcome = here.fetch(to=tmp_path / "out")
    assert outcome.path == tmp_path / "out"
    assert_holds(tmp_path / "out", FILES)
    for name in FILES:
        assert (tmp_path / "out" / name).stat().st_ino == (path / name).stat().st_ino
    assert here.hub.requests(contains="/resolve/") == []
    assert {done.how for done in outcome.done.values()} == {"linked"}
    assert {done.how for done in here.fetch(to=tmp_path / "out").done.values()} == {"here"}


def test_a_new_version_in_the_folder_leaves_the_cache_s_file_alone(here: Client, tmp_path: Path) -> None:
    path = here.fetch().path
    assert path is not None
    here.fetch(to=tmp_path / "out")
    changed = checkpoint(300_000, seed=1)
    here.hub.add_synthetic(REPO, changed)
    here.fetch(to=tmp_path / "out")
    assert_holds(tmp_path / "out", changed)
    assert_holds(path, FILES)


def test_huggingface_hub_knows_our_folder(here: Client, tmp_path: Path) -> None:
    out = tmp_path / "out"
    here.fetch(to=out)
    here.hub.clear()
    library(here, tmp_path, f"snapshot_download({REPO!r}, local_dir={str(out)!r}, allow_patterns={list(FILES)})")
    assert here.hub.requests("GET", contains="/resolve/") == []
    assert_holds(out, FILES)


def test_we_know_huggingface_hub_s_folder(here: Client, tmp_path: Path) -> None:
    out = tmp_path / "out"
    library(here, tmp_path, f"snapshot_download({REPO!r}, local_dir={str(out)!r})")
    here.hub.clear()
    outcome = here.fetch(to=out)
    assert {each.state for each in outcome.plan.files} == {"here"}
    assert here.hub.requests("GET", contains="/resolve/") == []
    assert_holds(out, FILES | EXTRA)


def test_files_nobody_noted_are_checked_and_taken(here: Client, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, content in FILES.items():
        (out / name).write_bytes(content)
    outcome = here.fetch(to=out)
    assert {each.state for each in outcome.plan.files} == {"unchecked"}
    assert {done.how for done in outcome.done.values()} == {"here"} and here.ranges() == []
    assert {each.state for each in here.plan(to=out).files} == {"here"}


def test_a_file_changed_by_hand_is_noticed(here: Client, tmp_path: Path) -> None:
    out = tmp_path / "out"
    here.fetch(to=out)
    config = out / "config.json"
    config.unlink()  # a hard link is not to be written through
    config.write_bytes(FILES["config.json"].replace(b"llama", b"LLAMA"))
    os.utime(config, ns=(config.stat().st_atime_ns, config.stat().st_mtime_ns + 10**10))
    with pytest.raises(OutputExists, match=r"config\.json"):
        here.fetch(to=out)


# ── settings, and disks that do not want ──


def test_the_environment_says_where_all_is(here: Client, tmp_path: Path) -> None:
    for name, changes in {"home": {}, "cache": {"HF_HUB_CACHE": str(tmp_path / "elsewhere")}}.items():
        environ = fetching.environment(here.hub, tmp_path / name, **changes)
        path = fetching.start(REPO, environ).finish().path
        assert path.is_relative_to(tmp_path / ("elsewhere" if changes else "home/hf/hub"))
        assert fetching.start(REPO, environ, find=True).finish().path == path
        here.hub.clear()
        report = fetching.start(REPO, environ | {"HF_HUB_OFFLINE": "1"}).finish()
        assert report.path == path and "HF_HUB_OFFLINE" in report.said("remarks")[0][0]
        assert here.hub.log == []


def test_many_may_write_the_same_note_at_once(tmp_path: Path) -> None:
    path = tmp_path / "note"
    texts = [str(number) * 50_000 for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            list(threads.map(lambda text: write(path, text), texts))
            assert path.read_text() in texts
    assert [found.name for found in tmp_path.iterdir()] == ["note"]
