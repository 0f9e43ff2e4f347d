"""What `llmkit list` finds and `llmkit rm` deletes: caches made by huggingface_hub itself, against the disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import standin_hub
from conftest import Cli, TinyCheckpoint, cli_environment
from llmkit import gguf_writer
from llmkit.errors import AccessDenied, LlmkitError, ModelNotFound
from llmkit.gguf import Value
from llmkit.hub import claim, client, inventory, removal
from llmkit.hub.inventory import Holding
from llmkit.quants import BF16, QUANTS

SNAPSHOT = """
import sys, huggingface_hub
for word in sys.argv[1:]:
    huggingface_hub.snapshot_download(word.split("@")[0], revision=word.split("@")[1])
"""


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache and an llmkit home of the test's own; returns the cache, which is not there yet."""
    import huggingface_hub.constants

    root = tmp_path / "hf" / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setenv("HF_HOME", str(root.parent))  # for children
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path / "home"))
    return root


def gguf_bytes(quant: str, folder: Path, n_rows: int = 8) -> bytes:
    """A small GGUF of that file type: n_rows x 256 weights."""
    path = folder / "made.gguf"
    kind = QUANTS[quant].default or BF16
    metadata = {"general.architecture": Value.string("llama"), "general.file_type": Value.uint32(QUANTS[quant].ftype)}
    data = bytes(kind.row_nbytes(256) * n_rows)
    gguf_writer.write(path, metadata, [("token_embd.weight", (n_rows, 256), kind, data)])
    return path.read_bytes()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoint) -> Path:
    """A cache made by snapshot_download of the real library, in a child, from the stand-in Hub."""
    folder = tmp_path_factory.mktemp("original")
    first = shutil.copytree(tiny_checkpoint("llama"), folder / "served" / "org" / "tiny")
    second = shutil.copytree(first, folder / "v2")
    (second / "README.md").write_text("another card\n")
    (folder / "served" / "org" / "quants").mkdir()
    for name in ("Q4_K_M", "Q8_0"):
        (folder / "served" / "org" / "quants" / f"m-{name}.gguf").write_bytes(gguf_bytes(name, folder))
    with standin_hub.serve(folder / "served") as hub:
        hub.add_revision("org/tiny", "v2", second)
        environment = cli_environment() | {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
        environment["HF_HUB_CACHE"] = str(folder / "cache")
        del environment["HF_HUB_OFFLINE"], environment["TRANSFORMERS_OFFLINE"]
        wanted = ("org/tiny@main", "org/tiny@v2", "org/quants@main")
        subprocess.run([sys.executable, "-c", SNAPSHOT, *wanted], env=environment, check=True, timeout=120)
    return folder / "cache"


@pytest.fixture
def fetched(places: Path, original: Path) -> Path:
    """A cache with org/tiny (a checkpoint, main and v2, which shares its weights) and org/quants (two GGUFs)."""
    return shutil.copytree(original, places, symlinks=True)


def du(*folders: Path) -> int:
    """Apparent bytes of all regular files, as GNU du counts them (hard links once), without the folders themselves."""
    out = subprocess.run(
        ["find", *map(str, folders), "-type", "f", "-printf", "%i %s\\n"], capture_output=True, text=True, check=True
    ).stdout
    return sum({line.split()[0]: int(line.split()[1]) for line in out.splitlines()}.values())


def models(root: Path) -> list[Path]:
    return sorted(root.glob("models--*"))


def rows(name: str | None = None) -> list[Holding]:
    return [each for each in inventory.look().holdings if name in (None, each.name)]


def tree(folder: Path) -> dict[str, int]:
    """Every path below a folder with its mode: what deleting must leave alone."""
    return {str(path): path.lstat().st_mode for path in folder.rglob("*")}


def delete(*texts: str) -> removal.Plan:
    """Plan and remove; what was freed must be what was said."""
    planned = removal.plan(texts)
    places = [client.cache_folder(), inventory.models_folder(), inventory.streams_folder()]
    before = du(*(place for place in places if place.exists()))
    removal.remove(planned)
    assert before - du(*(place for place in places if place.exists())) == planned.nbytes
    return planned


# ── listing ──


def test_a_listing_is_what_the_disk_and_the_library_say(fetched: Path) -> None:
    import huggingface_hub

    found = inventory.look()
    info = huggingface_hub.scan_cache_dir(fetched)
    assert not info.warnings
    expected = {
        (repo.repo_id, revision.commit_hash): (revision.size_on_disk, tuple(sorted(revision.refs)), len(revision.files))
        for repo in info.repos
        for revision in repo.revisions
    }
    assert len(expected) == 3
    assert {(each.name, each.revision): (each.nbytes, each.refs, each.n_files) for each in found.holdings} == expected
    assert {each.state for each in found.holdings} == {"whole"} and not any(each.faults for each in found.holdings)
    assert found.nbytes == du(*models(fetched)) and found.other_nbytes == 0 and not found.notes


def test_headers_tell_quants_and_parameters(fetched: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    from safetensors import safe_open

    folder = tiny_checkpoint("llama")
    with safe_open(folder / "model.safetensors", "np") as file:
        n_weights = sum(_product(file.get_slice(name).get_shape()) for name in file.keys())
    (quants,) = rows("org/quants")
    assert quants.quants == ("Q4_K_M", "Q8_0") and quants.formats == ("gguf",) and quants.n_weights == 8 * 256
    for each in rows("org/tiny"):
        assert each.quants == ("BF16",) and each.formats == ("safetensors",) and each.n_weights == n_weights


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def test_revisions_share_blobs_and_the_total_counts_them_once(fetched: Path) -> None:
    both = rows("org/tiny")
    cards = sum(path.stat().st_size for each in both for path in [each.path / "README.md"] if path.exists())
    assert len(both) == 2 and all(each.shared_nbytes for each in both)
    assert sum(each.nbytes - each.shared_nbytes for each in both) == cards
    blobs = du(fetched / "models--org--tiny" / "blobs")
    assert sum(each.nbytes for each in both) - both[0].shared_nbytes == blobs


def test_looking_is_not_using(fetched: Path) -> None:
    """Even where every access is noted: the time of last access, which tells `used`, is put back."""
    blobs = [path for folder in models(fetched) for path in (folder / "blobs").iterdir()]
    for path in blobs:
        os.utime(path, (1_000_000_000, 1_100_000_000))
    assert {each.used for each in rows()} == {1_100_000_000}
    for path in blobs:
        os.utime(path, (1_200_000_000, 1_100_000_000))
    rows()
    assert {path.stat().st_atime for path in blobs} == {1_200_000_000}
    assert {each.used for each in rows()} == {1_200_000_000}


def test_nothing_there(places: Path) -> None:
    assert inventory.look() == inventory.Inventory((), 0, 0, ())
    places.parent.mkdir(parents=True)
    places.write_text("a file where the cache should be")
    assert inventory.look().holdings == () and "cannot be read" in inventory.look().notes[0]


def test_what_is_missing_is_said(fetched: Path) -> None:
    """A shard of the index, a part of a split GGUF, a blob, the end of a file."""
    snapshot = rows("org/tiny")[0].path
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    quants = rows("org/quants")[0].path
    (quants / "m-F16-00001-of-00003.gguf").symlink_to((quants / "m-Q8_0.gguf").resolve())
    (quants / "m-Q4_K_M.gguf").resolve().unlink()
    whole = (quants / "m-Q8_0.gguf").resolve()
    whole.write_bytes(whole.read_bytes()[:-100])
    parts = {each.path: " | ".join(each.faults) for each in rows() if each.state == "part"}
    assert "1 of 2 shards are missing: model-00002-of-00002.safetensors" in parts[snapshot]
    assert "m-Q4_K_M.gguf: the content is gone" in parts[quants]
    assert "1 of 3 parts of m-F16 are here" in parts[quants]
    assert "m-Q8_0.gguf: tensor 'token_embd.weight' ends at byte" in parts[quants]
    assert len(parts) == 2
    assert inventory.look().nbytes == du(*models(fetched))


def test_unfinished_files_are_listed_with_what_they_take(places: Path) -> None:
    blobs = places / "models--org--half" / "blobs"
    blobs.mkdir(parents=True)
    with open(blobs / f"{'a' * 64}.partial", "wb") as file:
        file.write(bytes(range(256)) * 4096)
        file.truncate(1 << 32)  # a hole of 4 GB: room that is not taken
    (blobs / f"{'a' * 64}.partial.json").write_text("{}")
    (blobs / f"{'b' * 64}.0a1b2c3d.incomplete").write_bytes(bytes(5000))
    (blobs / ("c" * 64)).write_bytes(bytes(7000))
    (row,) = rows()
    assert (row.name, row.state, row.n_files) == ("org/half", "unfinished", 4)
    assert row.nbytes == (blobs / f"{'a' * 64}.partial").stat().st_blocks * 512 + 2 + 5000 + 7000
    assert sorted(row.faults) == [
        "1 x blob that no revision uses",
        "1 x download to go on with",
        "1 x orphan of a killed download (`llmkit download --sweep`)",
    ]


def test_damaged_caches_are_listed(fetched: Path) -> None:
    """Where huggingface_hub leaves a repository out, or raises, the rows are there all the same."""
    import huggingface_hub

    (fetched / "models--org--empty").mkdir()
    (fetched / "models--org--file" / "snapshots").mkdir(parents=True)
    (fetched / "models--org--file" / "snapshots" / "stray").write_text("no folder")
    refs = fetched / "models--org--quants" / "refs"
    (refs / "binary").write_bytes(b"\xff\xfe" * 20)
    (refs / "gone").write_text("0" * 40)
    with pytest.raises(ValueError):
        huggingface_hub.scan_cache_dir(fetched)
    names = [each.name for each in rows()]
    assert names == ["org/empty", "org/file", "org/quants", "org/tiny", "org/tiny"]
    assert rows("org/empty")[0].faults == ("holds no files",)
    assert rows("org/quants")[0].state == "whole"


@pytest.fixture
def foreign(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache, looked at by a user who is not root: root may read and delete everything."""
    import huggingface_hub.constants

    rows()  # imports what it needs: that user may not read the packages
    removal.plan(["org/quants"])
    folder = Path(tempfile.mkdtemp(prefix="llmkit-"))
    root = shutil.copytree(fetched, folder / "hub", symlinks=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setenv("LLMKIT_HOME", str(folder / "home"))
    if as_root := os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534, follow_symlinks=False)
        os.seteuid(65534)
    try:
        yield root
    finally:
        if as_root:
            os.seteuid(0)
        subprocess.run(["chmod", "-R", "u+rwX", folder], check=True)
        shutil.rmtree(folder)


def test_unreadable_folders_are_noted(foreign: Path) -> None:
    (foreign / "models--org--quants" / "snapshots").chmod(0)
    found = inventory.look()
    assert found.notes == (f"{foreign}/models--org--quants/snapshots: cannot be read: Permission denied",)
    assert [each.name for each in found.holdings] == ["org/quants", "org/tiny", "org/tiny"]
    (foreign / "models--org--quants").chmod(0)
    foreign.chmod(0)
    assert inventory.look().notes == (f"{foreign}: cannot be read: Permission denied",)


def test_what_cannot_be_deleted_is_said(foreign: Path, capfd: pytest.CaptureFixture[str]) -> None:
    foreign.chmod(0o500)
    with pytest.raises(AccessDenied, match="org/quants: .*models--org--quants"):
        removal.remove(removal.plan(["org/quants"]))
    (foreign / "models--org--tiny" / "blobs").chmod(0o500)
    (foreign / "models--org--tiny" / "refs").chmod(0o500)
    with pytest.raises(AccessDenied, match="org/tiny@v2: .*/blobs/.* cannot be deleted, and 1 more"):
        removal.remove(removal.plan(["org/tiny@v2"]))
    assert "Traceback" not in capfd.readouterr().err


def test_links_out_of_the_cache_are_not_followed(fetched: Path, tmp_path: Path) -> None:
    outside = tmp_path / "precious.gguf"
    outside.write_bytes(bytes(10_000_000))
    quants = rows("org/quants")[0]
    (quants.path / "evil.gguf").symlink_to(outside)
    (quants.path / "loop").symlink_to(quants.path)
    after = rows("org/quants")[0]
    assert after.nbytes == quants.nbytes and after.n_files == quants.n_files
    assert after.state == "part" and "evil.gguf" in after.faults[0] and "leads out of the cache" in after.faults[0]


def test_shared_blobs_of_xet_count_once(fetched: Path) -> None:
    """huggingface_hub keeps blobs it fetched by xet once for all repositories: links lead to links."""
    from huggingface_hub.utils import _shared_blobs

    before = inventory.look()
    weights = next(each.path for each in before.holdings if each.name == "org/tiny") / "model.safetensors"
    twin = fetched / "models--other--tiny"
    shutil.copytree(fetched / "models--org--tiny", twin, symlinks=True)
    size = weights.stat().st_size
    for blob in (weights.resolve(), twin / "blobs" / weights.resolve().name):
        assert _shared_blobs.publish_blob_to_shared_store(
            blob_path=str(blob), xet_hash="ab" * 32, cache_dir=fetched, expected_size=size
        )
        assert blob.is_symlink()
    after = inventory.look()
    assert [each.nbytes for each in after.holdings if each.name.startswith("org/")] == [
        each.nbytes for each in before.holdings
    ]
    assert all(each.state == "whole" for each in after.holdings)
    assert after.nbytes == du(*models(fetched), fetched / "blobs")
    planned = removal.plan(["other/tiny"])
    assert planned.nbytes == du(twin), "the weights stay: org/tiny has them too"
    removal.remove(planned)
    assert weights.stat().st_size == size and not twin.exists()
    planned = removal.plan(["org/tiny"])
    assert planned.nbytes == du(fetched / "models--org--tiny") + size
    removal.remove(planned)
    assert not list((fetched / "blobs").rglob("ab" * 32))


def test_data_sets_count_apart(fetched: Path) -> None:
    (fetched / "datasets--org--text" / "blobs").mkdir(parents=True)
    (fetched / "datasets--org--text" / "blobs" / "x").write_bytes(bytes(12345))
    assert inventory.look().other_nbytes == 12345
    assert inventory.look().nbytes == du(*models(fetched))


def test_ours_and_what_conversions_left(tmp_path: Path) -> None:
    made = inventory.models_folder() / "org--name"
    (made / "v1").mkdir(parents=True)
    for path in (made / "name-Q4_K_M.gguf", made / "v1" / "name-Q8_0.gguf"):
        path.write_bytes(gguf_bytes(path.stem.partition("-")[2], tmp_path))
    (made / "name-Q5_K_M.gguf.partial").write_bytes(bytes(3000))
    (made / "name-Q5_K_M.gguf.journal").write_bytes(b"{}\n")
    stream = inventory.streams_folder() / "models--org--big" / "blobs"
    stream.mkdir(parents=True)
    with open(stream / ("d" * 64), "wb") as file:
        file.write(bytes(4096))
        file.truncate(1 << 33)
    listed = {(each.name, each.state): each for each in rows()}
    assert set(listed) == {
        ("org/name:Q4_K_M", "whole"),
        ("org/name@v1:Q8_0", "whole"),
        ("org/name", "unfinished"),
        ("org/big", "unfinished"),
    }
    assert listed["org/name:Q4_K_M", "whole"].quants == ("Q4_K_M",)
    assert listed["org/name", "unfinished"].nbytes == 3003
    assert listed["org/big", "unfinished"].nbytes < 1 << 20
    assert [each.place for each in listed.values()] == ["llmkit"] * 4


def test_ten_thousand_files(places: Path) -> None:
    """In seconds, and exact."""
    import time

    folder = places / "models--org--many"
    snapshot = folder / "snapshots" / ("a" * 40)
    (folder / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number in range(10_000):
        (folder / "blobs" / f"{number:040x}").write_bytes(b"x" * (number % 7))
        (snapshot / f"{number}.txt").symlink_to(f"../../blobs/{number:040x}")
    start = time.process_time()
    (row,) = rows()
    assert time.process_time() - start < 5
    assert row.n_files == 10_000 and row.nbytes == sum(number % 7 for number in range(10_000))
    assert delete("org/many").nbytes == row.nbytes


# ── deleting ──


def test_a_repository_goes_whole(fetched: Path) -> None:
    others = {path: mode for path, mode in tree(fetched).items() if "org--tiny" not in path}
    planned = delete("org/tiny")
    assert planned.nbytes > 0 and not (fetched / "models--org--tiny").exists()
    assert {path: mode for path, mode in tree(fetched).items() if "org--tiny" not in path} == others
    assert [each.name for each in rows()] == ["org/quants"]


def test_a_revision_goes_and_shared_blobs_stay(fetched: Path) -> None:
    import huggingface_hub

    kept = next(each for each in rows("org/tiny") if each.refs == ("main",))
    contents = {path.name: path.read_bytes() for path in kept.path.iterdir()}
    planned = delete("org/tiny@v2")
    assert planned.nbytes < 1000, "a card and a ref"
    (stays,) = planned.removals[0].stays
    assert f"revision {kept.path.name[:8]} has them too" in stays
    assert {path.name: path.read_bytes() for path in kept.path.iterdir()} == contents
    assert [each.refs for each in rows("org/tiny")] == [("main",)]
    assert not huggingface_hub.scan_cache_dir(fetched).warnings


def test_the_beginning_of_a_commit_will_do(fetched: Path) -> None:
    commit = next(each.path.name for each in rows("org/tiny") if each.refs == ("v2",))
    delete(f"org/tiny@{commit[:8]}")
    assert commit not in {each.path.name for each in rows("org/tiny")}


def test_the_last_revision_takes_the_repository(fetched: Path) -> None:
    delete("org/quants@main")
    assert not (fetched / "models--org--quants").exists()


def test_one_commit_in_two_repositories(fetched: Path) -> None:
    """A renamed repository is in the cache twice, with the same commits: only the one that was named goes."""
    for twin in "abcdef":
        shutil.copytree(fetched / "models--org--tiny", fetched / f"models--{twin}--tiny", symlinks=True)
    delete("c/tiny@v2")
    assert {name: len(rows(f"{name}/tiny")) for name in "abcdef"} == {"c": 1, **dict.fromkeys("abdef", 2)}


def test_one_quant_goes(fetched: Path) -> None:
    blob = (rows("org/quants")[0].path / "m-Q4_K_M.gguf").resolve()
    size = blob.stat().st_size
    assert delete("org/quants:Q4_K_M").nbytes == size and not blob.exists()
    (row,) = rows("org/quants")
    assert row.quants == ("Q8_0",) and row.state == "whole"


def test_a_path_in_the_cache(fetched: Path) -> None:
    snapshot = rows("org/quants")[0].path
    delete(str(snapshot / "m-Q8_0.gguf"))
    assert [path.name for path in snapshot.iterdir()] == ["m-Q4_K_M.gguf"]
    delete(str(snapshot))
    assert not (fetched / "models--org--quants").exists()


def test_ours_go_by_name_and_quant(fetched: Path, tmp_path: Path) -> None:
    """org/name:QUANT takes a file that was made here, its leftovers, and the same quant in the cache."""
    made = inventory.models_folder() / "org--quants"
    made.mkdir(parents=True)
    for name in ("Q4_K_M.gguf", "Q4_K_M.gguf.partial", "Q4_K_M.gguf.journal", "Q8_0.gguf"):
        (made / f"quants-{name}").write_bytes(gguf_bytes("Q4_K_M", tmp_path))
    delete("org/quants:Q4_K_M")
    assert [path.name for path in made.iterdir()] == ["quants-Q8_0.gguf"]
    assert {quant for each in rows("org/quants") if each.place == "cache" for quant in each.quants} == {"Q8_0"}
    delete("org/quants")
    assert rows("org/quants") == [] and not made.exists()


def test_a_gguf_anywhere_with_all_its_parts(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    going = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "m-00001-of-00002.gguf.journal"]
    staying = ["m-00001-of-00003.gguf", "m.gguf", "other.gguf.partial", "notes.txt"]
    for name in going + staying:
        (folder / name).write_bytes(bytes(1000))
    planned = removal.plan([str(folder / "m-00002-of-00002.gguf")])
    removal.remove(planned)
    assert planned.nbytes == 3000 and sorted(path.name for path in folder.iterdir()) == sorted(staying)


def test_a_link_to_a_gguf_is_deleted_and_not_what_it_leads_to(tmp_path: Path) -> None:
    target = tmp_path / "target.gguf"
    target.write_bytes(b"precious")
    (tmp_path / "link.gguf").symlink_to(target)
    planned = removal.plan([str(tmp_path / "link.gguf")])
    assert planned.nbytes == 0 and str(target) in planned.removals[0].stays[0]
    removal.remove(planned)
    assert not (tmp_path / "link.gguf").is_symlink() and target.read_bytes() == b"precious"


def test_hard_links_keep_the_content_and_are_said(fetched: Path, tmp_path: Path) -> None:
    """`download --to` links files of the cache: deleting one name frees nothing."""
    blob = (rows("org/quants")[0].path / "m-Q8_0.gguf").resolve()
    os.link(blob, tmp_path / "mine.gguf")
    planned = removal.plan(["org/quants:Q8_0"])
    removal.remove(planned)
    assert planned.nbytes == 0 and planned.linked_nbytes == (tmp_path / "mine.gguf").stat().st_size
    assert rows("org/quants")[0].quants == ("Q4_K_M",)


def test_links_are_never_followed_out_of_the_cache(fetched: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("v2", "main"):
        snapshot = next(each.path for each in rows("org/tiny") if name in each.refs)
        for link in (f"{name}.json", f"{name}-Q2_K.gguf"):
            (outside / link).write_bytes(b"precious")
            (snapshot / link).symlink_to(outside / link)
        (snapshot / "folder").symlink_to(outside)
    before = tree(outside)
    assert "outside of the cache" in delete("org/tiny:Q2_K").removals[0].stays[0]
    assert "outside of the cache" in delete("org/tiny@v2").removals[0].stays[-1]
    delete("org/tiny")
    assert tree(outside) == before and len(before) == 4 and rows("org/tiny") == []


def test_a_repository_that_is_a_link(fetched: Path, tmp_path: Path) -> None:
    """Moved to another disk by its owner: listed; deleting removes the link."""
    shutil.move(fetched / "models--org--tiny", tmp_path / "moved")
    (fetched / "models--org--tiny").symlink_to(tmp_path / "moved")
    before = tree(tmp_path / "moved")
    assert len(rows("org/tiny")) == 2
    planned = removal.plan(["org/tiny"])
    removal.remove(planned)
    assert planned.nbytes == 0 and tree(tmp_path / "moved") == before and rows("org/tiny") == []


@pytest.mark.parametrize(
    "words",
    [
        "{cache}", "{cache}/..", "{cache}/models--org--tiny/blobs", "{cache}/models--org--tiny/refs/main", "{home}",
        "{home}/models", "{home}/models/..", "{home}/models/../../mine", "{home}/models/out/mine", "{mine}",
        "{mine}/notes.txt", "/", ".", "..", "{cache}/datasets--org--text", "{cache}/models--org--tiny/../../../mine",
        "{link}",
    ],
)  # fmt: skip
def test_what_is_not_ours_is_refused(words: str, fetched: Path, tmp_path: Path) -> None:
    home, mine, link = tmp_path / "home", tmp_path / "mine", tmp_path / "link"
    mine.mkdir()
    (mine / "notes.txt").write_text("precious")
    (home / "models").mkdir(parents=True)
    (home / "models" / "out").symlink_to(tmp_path)  # leads out of llmkit's folder
    link.symlink_to(mine)
    (fetched / "datasets--org--text").mkdir()
    before = tree(tmp_path)
    with pytest.raises(LlmkitError, match="not deleted|no model"):
        removal.remove(removal.plan([words.format(cache=fetched, home=home, mine=mine, link=link)]))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["org/..", "../..", "org/name@../../x", "org--tiny/..", "..", "~nobody-there/x"])
def test_names_that_try_to_escape(name: str, fetched: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(LlmkitError):
        removal.plan([name])
    assert tree(tmp_path) == before


def test_what_is_not_here_gets_the_nearest_name(fetched: Path) -> None:
    with pytest.raises(ModelNotFound) as error:
        removal.plan(["org/tinny"])
    assert str(error.value.hint).startswith("Nearest: org/tiny")
    with pytest.raises(ModelNotFound) as error:
        removal.plan(["org/quants:Q2_K"])
    assert "Q4_K_M, Q8_0" in str(error.value.hint)
    with pytest.raises(ModelNotFound) as error:
        removal.plan(["org/tiny@v3"])
    assert rows("org/tiny")[0].path.name[:8] in str(error.value.hint)


def test_a_damaged_repository_can_go_whole_only(fetched: Path) -> None:
    (rows("org/quants")[0].path / "m-Q8_0.gguf").resolve().unlink()
    with pytest.raises(LlmkitError, match="single revisions and files") as error:
        removal.plan(["org/quants:Q4_K_M"])
    assert "llmkit rm org/quants" in str(error.value.hint)
    delete("org/quants")
    assert rows("org/quants") == []


Hold = Callable[[Path, str], "subprocess.Popen[str]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts a process that holds a lock until the test ends: hold(path, "claim" or "flock")."""
    running: list[subprocess.Popen[str]] = []
    wait = "print('held', flush=True); time.sleep(60)"
    code = {
        "claim": f"from llmkit.hub.claim import claim\nwith claim(pathlib.Path(sys.argv[1])): {wait}",
        "flock": f"import fcntl\nfile = open(sys.argv[1], 'a')\nfcntl.flock(file, fcntl.LOCK_EX)\n{wait}",
    }

    def hold(path: Path, how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", f"import pathlib, sys, time\n{code[how]}", str(path)]
        process = subprocess.Popen(command, env=cli_environment(), stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in running:
        process.kill()
        process.wait()


def test_what_is_being_fetched_is_refused(fetched: Path, hold: Hold) -> None:
    blob = fetched / "models--org--tiny" / "blobs" / ("e" * 64)
    planned = removal.plan(["org/tiny"])
    process = hold(blob, "claim")
    assert claim.owner(blob) == process.pid
    for text in ("org/tiny", "org/tiny@v2"):
        with pytest.raises(LlmkitError, match=f"is being written by process {process.pid}"):
            removal.plan([text])
    with pytest.raises(LlmkitError, match="is being written"):
        removal.remove(planned)  # it began after the plan
    assert len(rows("org/tiny")) >= 2
    process.kill()
    process.wait()
    delete("org/tiny")
    assert rows("org/tiny") == []


def test_the_locks_of_the_library_and_of_conversions_count(fetched: Path, hold: Hold) -> None:
    locks = fetched / ".locks" / "models--org--quants"
    locks.mkdir(parents=True, exist_ok=True)
    hold(locks / f"{'f' * 64}.lock", "flock")
    with pytest.raises(LlmkitError, match="is being written by another process"):
        removal.plan(["org/quants"])
    made = inventory.models_folder() / "org--made"
    made.mkdir(parents=True)
    (made / "made-Q8_0.gguf.partial").write_bytes(bytes(10))
    hold(made / "made-Q8_0.gguf.journal", "flock")
    for text in ("org/made", "org/made:Q8_0", str(made / "made-Q8_0.gguf")):
        with pytest.raises(LlmkitError, match="is being written by another process"):
            removal.plan([text])


# ── the verbs ──


def test_list_speaks_without_a_network(fetched: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens; nobody is asked
    monkeypatch.delenv("HF_HUB_OFFLINE")
    done = cli("list", "--sort", "size")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["model", "format", "quants", "parameters", "revision", "size", "used", "state"]
    assert [line.split()[0] for line in lines[1:-1]] == ["org/tiny", "org/tiny", "org/quants"]
    assert lines[-1].endswith("counted once") and "Q4_K_M Q8_0" in done.stdout and "(main)" in done.stdout
    told = json.loads(cli("list", "--json").stdout)
    assert told["nbytes"] == du(*models(fetched)) and len(told["models"]) == 3
    assert cli("list", "--sort", "used").returncode == 0


def test_list_of_nothing(cli: Cli) -> None:
    done = cli("list")
    assert done.returncode == 0 and done.stdout == "" and "No models in" in done.stderr
    assert json.loads(cli("list", "--json").stdout)["models"] == []


def test_rm_asks_first(fetched: Path, cli: Cli) -> None:
    """Not on a terminal it needs --yes; a dry run and JSON alone delete nothing."""
    before = tree(fetched)
    for words in (["--dry-run"], ["--dry-run", "--json"], ["--dry-run", "--yes"]):
        done = cli("rm", "org/quants", *words)
        assert done.returncode == 0 and tree(fetched) == before, done.stderr
    for refused in ([], ["--json"]):
        done = cli("rm", "org/quants", *refused, input="y\n")
        assert done.returncode == 1 and "--yes" in done.stderr and tree(fetched) == before
    size = du(fetched / "models--org--quants")
    done = cli("rm", "org/quants", "--yes", "--json")
    assert done.returncode == 0 and not (fetched / "models--org--quants").exists()
    told = json.loads(done.stdout)
    assert told["nbytes"] == size and told["deleted"] is True


@pytest.mark.parametrize(
    ("answer", "deleted"), [("y\n", True), ("yes\n", True), ("n\n", False), ("\n", False), ("\x04", False)]
)
def test_rm_on_a_terminal(answer: str, deleted: bool, fetched: Path) -> None:
    """Asked on a pseudo-terminal; only y and yes delete, the end of input (^D) does not."""
    import pty

    master, slave = pty.openpty()
    command = [sys.executable, "-m", "llmkit", "rm", "org/quants"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=cli_environment(), close_fds=True)
    os.close(slave)
    shown = b""
    while b"[y/N]" not in shown:
        shown += os.read(master, 4096)
    assert b"Delete " in shown and b"org/quants" in shown
    os.write(master, answer.encode())
    process.wait(timeout=60)
    os.close(master)
    assert (process.returncode == 0) is deleted
    assert (fetched / "models--org--quants").exists() is not deleted


def test_overlapping_names_count_once(fetched: Path) -> None:
    whole = removal.plan(["org/quants"])
    both = removal.plan(["org/quants:Q8_0", "org/quants", "org/quants"])
    assert both.nbytes == whole.nbytes and len(both.removals) == 1
