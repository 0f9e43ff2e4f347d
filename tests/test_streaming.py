"""Low-disk quantizing: the same bytes as ever, one shard on the disk at a time, and runs that are killed go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shards_material
from conftest import GgufOf, TinyCheckpoint, cli_environment
from llmkit import checkpoint, convert, gguf, quantize, store
from llmkit.convert import tensors
from llmkit.convert.tensors import LazyTensor
from llmkit.errors import InvalidModel, LlmkitError, NotEnoughRoom, Unsupported
from llmkit.progress import Progress
from llmkit.quantize import Recipe, onepass, streaming
from llmkit.quants import F32, quant
from shards_material import COMMIT, REPO, Copies, in_cache, plan_of, shadow_of, shards

SLACK = 512 * 1024  # small files, headers, journals, whole blocks; far less than a shard
MOMENTS = ("fetching", "making", "releasing", "released")


@pytest.fixture(scope="module")
def real(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_checkpoint("llama", width=512, layers=4, shards=5)
    return in_cache(folder, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def source(real: Path, tmp_path: Path) -> Copies:
    (tmp_path / "out").mkdir()
    return Copies(real, shadow_of(real, tmp_path / "shadow"), tmp_path / "out", tmp_path / "log")


def ordinary(real: Path, out: Path, *names: str, split: int | None = None) -> dict[str, bytes]:
    """What a run writes that has everything on the disk."""
    out.mkdir()
    quantize.run(plan_of(real, out, *names, split=split), threads=2)
    return files(out)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def limit(source: Copies, planned: quantize.Plan) -> int:
    """Outputs and the largest shard; one more of any size would be noticed."""
    sizes = [path.stat().st_size for path in source.real.glob("*.safetensors")]
    assert len(sizes) == 5 and min(sizes) > 2 * SLACK
    return planned.nbytes + max(sizes) + SLACK


# --- origin ----------------------------------------------------------------------------------------------------------


def test_origin_is_what_the_library_reads(real: Path) -> None:
    """huggingface_hub's own scan of the cache: repository, revision, and the blob of every file."""
    import huggingface_hub

    (repo,) = huggingface_hub.scan_cache_dir(real.parents[2]).repos
    (revision,) = repo.revisions
    origin = checkpoint.read(real).origin
    assert origin is not None
    assert (origin.repo, origin.commit) == (repo.repo_id, revision.commit_hash)
    assert origin.hashes == {file.file_name: file.blob_path.name for file in revision.files}
    assert origin.hashes.keys() > {"config.json", *shards(real)}


def test_origin_of_other_folders(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    plain = tiny_checkpoint("llama")
    assert checkpoint.read(plain).origin is None
    short = checkpoint.read(in_cache(plain, tmp_path, repo="gpt2")).origin
    assert short is not None and short.repo == "gpt2"


def test_copied_files_have_no_hash(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Where links cannot be made, huggingface_hub copies: weights are then sampled, and times matter, as elsewhere."""
    snapshot = in_cache(tiny_checkpoint("llama", shards=3), tmp_path)
    copied = snapshot / shards(snapshot)[1]
    content = copied.read_bytes()
    copied.unlink()
    copied.write_bytes(content)
    draft = convert.open_draft(snapshot)
    assert draft.origin and draft.origin.repo == REPO and copied.name not in draft.origin.hashes
    assert draft.sampled == (copied,)
    copied.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert convert.open_draft(snapshot).fingerprint != draft.fingerprint


def test_the_fingerprint_needs_no_weights(real: Path, source: Copies) -> None:
    assert convert.open_draft(source.shadow).fingerprint == convert.open_draft(real).fingerprint
    link = source.shadow / shards(source.shadow)[0]
    blob = link.resolve().rename(link.resolve().with_name("f" * 64))
    link.unlink()
    link.symlink_to(f"../../blobs/{blob.name}")
    assert convert.open_draft(source.shadow).fingerprint != convert.open_draft(real).fingerprint


def test_times_of_hashed_files_do_not_matter(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    snapshot = in_cache(tiny_checkpoint("llama", width=256), tmp_path / "cache")

    def stop(progress: Progress) -> None:
        if 2 * progress.done > progress.total:
            raise KeyboardInterrupt

    def touch(seconds: float) -> None:
        for path in snapshot.iterdir():
            os.utime(path, (time.time() + seconds, time.time() + seconds))

    planned = plan_of(snapshot, tmp_path, "Q8_0")
    with pytest.raises(KeyboardInterrupt):
        quantize.run(planned, threads=1, on_progress=stop)
    touch(60)
    assert quantize.run(planned, threads=1)[0].resumed > 0
    touch(120)
    assert quantize.check_outputs(planned, force=False).outputs == ()


def test_provenance_names_repository_and_revision(
    real: Path, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path
) -> None:
    ordinary(real, tmp_path / "out", "COPY")
    made = gguf.read(next((tmp_path / "out").iterdir()))
    assert (made.get("llmkit.source.repo"), made.get("llmkit.source.revision")) == (REPO, COMMIT)
    assert made.get("general.name") == "tiny-llama"
    assert "llmkit.source.repo" not in gguf.read(gguf_of(tiny_checkpoint("llama"), "bf16")).metadata


# --- the order of shards ---------------------------------------------------------------------------------------------


def lazy(name: str, *paths: str) -> LazyTensor:
    """A tensor that is only looked at, not read."""
    return LazyTensor(
        name, (1, 32), F32, lambda start, stop: np.zeros((stop - start, 32)), None, tuple(map(Path, paths))
    )


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), unique=True, max_size=3), max_size=12),
    st.sets(st.sampled_from("abcdef")),
)
def test_steps(paths: list[list[str]], present: set[str]) -> None:
    """Each tensor is made once, with all its files there; each file is fetched once, and gone at the end."""
    wanted = [lazy(str(number), *each) for number, each in enumerate(paths)]
    found = streaming.steps(wanted, {Path(name) for name in present})
    held: set[Path] = set()
    for step in found:
        assert step.tensors and held.isdisjoint(step.fetch)
        held.update(step.fetch)
        assert all(held.issuperset(tensor.paths) for tensor in step.tensors)
        assert held.issuperset(step.release)
        held.difference_update(step.release)
    assert not held
    assert sorted(tensor.name for step in found for tensor in step.tensors) == sorted(tensor.name for tensor in wanted)
    fetched = [path for step in found for path in step.fetch]
    assert sorted(fetched) == sorted({path for tensor in wanted for path in tensor.paths})


def fetches(found: tuple[streaming.Step, ...]) -> list[str]:
    return ["".join(map(str, step.fetch)) for step in found]


def test_shards_go_by_name_and_those_at_hand_first() -> None:
    wanted = [lazy("1", "c"), lazy("2", "a"), lazy("3", "b"), lazy("4", "a"), lazy("5")]
    assert fetches(streaming.steps(wanted)) == ["a", "b", "c"]
    assert {tensor.name for tensor in streaming.steps(wanted)[0].tensors} == {"2", "4", "5"}
    assert fetches(streaming.steps(wanted, [Path("c")])) == ["c", "a", "b"]


def test_what_is_held_is_finished_first() -> None:
    """By name alone a, b and c would be held together before d is there."""
    wanted = [*(lazy(name, name) for name in "abcdef"), lazy("1", "d", "a"), lazy("2", "e", "b"), lazy("3", "f", "c")]
    assert fetches(streaming.steps(wanted)) == ["a", "d", "b", "e", "c", "f"]


def test_a_plan_for_people(real: Path, source: Copies) -> None:
    planned = plan_of(source.shadow, source.out, "Q4_K_M")
    low = streaming.low_disk_plan(planned)
    sizes = {path.name: path.stat().st_size for path in real.glob("*.safetensors")}
    assert [path.name for path in low.shards] == sorted(sizes) and low.fetched_nbytes == sum(sizes.values())
    assert low.peak_nbytes == planned.nbytes + max(sizes.values())
    assert json.loads(json.dumps(streaming.describe(low)))["peak_nbytes"] == low.peak_nbytes
    assert not source.log.exists() and not list(source.out.iterdir())


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "split"),
    [(("Q4_K_M", "Q8_0"), None), (("COPY",), None), (("Q4_0",), 2_000_000)],
    ids=["two quants", "copied rows", "split"],
)
def test_the_same_bytes_from_one_shard_at_a_time(
    names: tuple[str, ...], split: int | None, real: Path, source: Copies, tmp_path: Path
) -> None:
    whole = ordinary(real, tmp_path / "ordinary", *names, split=split)
    planned = plan_of(source.shadow, source.out, *names, split=split)
    seen: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        source.measure()
        seen.append(progress)

    results = streaming.run_low_disk(planned, source, threads=2, on_progress=on_progress)
    assert files(source.out) == whole and len(whole) >= len(names)
    assert source.names("fetched") == source.names("released") == shards(real)
    words = [line.split()[0] for line in source.log.read_text().splitlines()]
    assert words == ["fetching", "fetched", "releasing", "released"] * 5
    assert planned.nbytes < source.peak <= limit(source, planned)
    passed = [each.done for each in seen if each.stage == "quantize"]
    assert passed == sorted(passed) and passed[0] == 0
    assert {each.total for each in seen if each.stage == "quantize"} == {passed[-1]}
    assert sum(each.stage == "fetch" for each in seen) == 5
    assert [result.resumed for result in results] == [0] * len(names)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_runs_go_on(moment: str, real: Path, source: Copies, tmp_path: Path) -> None:
    """kill -9 around the third shard: what is finished is not fetched again, whenever it happens."""
    whole = ordinary(real, tmp_path / "ordinary", "Q4_K_M", "Q8_0")
    command = [
        sys.executable,
        shards_material.__file__,
        moment,
        str(real),
        str(source.shadow),
        str(source.out),
        str(source.log),
    ]
    child = subprocess.run(command, env=cli_environment(), capture_output=True, text=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr
    before = source.names("fetched")
    assert len(before) == (2 if moment == "fetching" else 3) and not list(source.out.glob("*.gguf"))
    planned = plan_of(source.shadow, source.out, "Q4_K_M", "Q8_0")
    results = streaming.run_low_disk(planned, source, threads=2, on_progress=source.measure)
    assert all(result.resumed > 0 for result in results)
    assert files(source.out) == whole
    assert source.names("fetched") == shards(real), "each shard once, over both runs"
    assert source.names("kept") == ([shards(real)[2]] if moment == "making" else [])
    assert source.peak <= limit(source, planned)
    assert not any(source.is_real(path) for path in source.shadow.glob("*.safetensors"))


def test_a_shard_left_by_other_work_is_used_first(real: Path, source: Copies) -> None:
    """Broken off in the third shard, and run again for another quant, which needs all of them."""

    def stop(progress: Progress) -> None:
        if progress.stage == "quantize" and len(source.names("fetched")) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streaming.run_low_disk(plan_of(source.shadow, source.out, "Q4_0"), source, threads=1, on_progress=stop)
    shutil.rmtree(source.out)
    source.out.mkdir()
    planned, names = plan_of(source.shadow, source.out, "Q8_0"), shards(real)
    streaming.run_low_disk(planned, source, threads=1, on_progress=source.measure)
    assert source.names("kept") == [names[2]]
    assert source.names("fetched")[3:] == [*names[:2], *names[3:]]
    assert source.peak <= limit(source, planned)


def over_two_shards(folder: Path) -> convert.GgufDraft:
    """A draft in which one tensor has the upper half of its rows from another shard."""
    draft = convert.open_draft(folder)
    first, other = (next(t for t in draft.tensors if t.name == f"blk.{i}.ffn_down.weight") for i in (0, 3))
    half = first.n_rows // 2

    def read(start: int, stop: int) -> tensors.Rows:
        parts = [first.read(start, min(stop, half))] if start < half else []
        parts += [other.read(max(start, half), stop)] if stop > half else []
        return np.concatenate(parts)

    joined = replace(first, read=read, span=None, paths=(*first.paths, *other.paths))
    assert len(set(joined.paths)) == 2
    return replace(draft, tensors=tuple(joined if each is first else each for each in draft.tensors))


def test_a_tensor_of_two_shards(real: Path, source: Copies, tmp_path: Path) -> None:
    recipes = [Recipe(quant("Q5_K_M"))]
    (tmp_path / "ordinary").mkdir()
    quantize.run(quantize.plan(over_two_shards(real), recipes, tmp_path / "ordinary"), threads=2)
    planned = quantize.plan(over_two_shards(source.shadow), recipes, source.out)
    streaming.run_low_disk(planned, source, threads=2, on_progress=source.measure)
    assert files(source.out) == files(tmp_path / "ordinary")
    assert sorted(source.names("fetched")) == sorted(source.names("released")) == shards(real)
    assert source.peak <= streaming.low_disk_plan(planned).peak_nbytes + SLACK
    sizes = sorted(path.stat().st_size for path in real.glob("*.safetensors"))
    assert streaming.low_disk_plan(planned).held_nbytes <= sum(sizes[-2:])


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_shard_that_is_not_the_announced_one(source: Copies, tmp_path: Path) -> None:
    """The header read beforehand named other places: the weights would be read from the wrong ones."""
    planned = plan_of(source.shadow, source.out, "Q8_0")
    other = shutil.copytree(source.real, tmp_path / "other")
    path = other / shards(other)[1]
    content = path.read_bytes()
    names = b"self_attn.k_proj", b"self_attn.v_proj"
    swapped = content.replace(names[0], b"@" * 16).replace(names[1], names[0]).replace(b"@" * 16, names[1])
    assert swapped != content and len(swapped) == len(content)
    path.write_bytes(swapped)
    with pytest.raises(InvalidModel, match=f"{path.name}: its header is not"):
        streaming.run_low_disk(planned, replace(source, real=other), threads=1)
    assert not list(source.out.glob("*.gguf"))


def test_a_shard_that_is_gone_when_it_is_needed(source: Copies) -> None:
    planned = plan_of(source.shadow, source.out, "Q8_0")
    last = source.shadow / shards(source.shadow)[-1]
    source.on_event = lambda word, count: last.unlink() if (word, count) == ("fetched", 5) else None
    with pytest.raises(LlmkitError, match=f"{last.name}: cannot be read: No such file"):
        streaming.run_low_disk(planned, source, threads=1)
    assert not list(source.out.glob("*.gguf")) and len(source.names("released")) == 4


def test_sources_that_cannot_be_fetched(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, source: Copies) -> None:
    plain = tiny_checkpoint("llama", width=256)
    for folder, error in ((plain, LlmkitError), (gguf_of(plain, "bf16"), Unsupported)):
        planned = plan_of(folder, source.out, "Q8_0")
        for refused in (streaming.low_disk_plan, lambda each: streaming.run_low_disk(each, source)):
            with pytest.raises(error, match="hash is not known|safetensors"):
                refused(planned)


def test_room_for_outputs_and_a_shard_together(source: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of a size of our choice, for which even outputs and shard by themselves would be small enough."""
    planned = plan_of(source.shadow, source.out, "Q8_0")
    peak = streaming.low_disk_plan(planned).peak_nbytes
    monkeypatch.setattr(store, "free_nbytes", lambda folder: peak - SLACK)
    with pytest.raises(NotEnoughRoom):
        streaming.run_low_disk(planned, source, threads=1)
    assert not source.log.exists() and not list(source.out.iterdir())
    monkeypatch.setattr(store, "free_nbytes", lambda folder: peak)
    streaming.run_low_disk(planned, source, threads=1)


def test_rounds_that_leave_something_out(source: Copies) -> None:
    """A file with holes never gets its final name."""
    planned = plan_of(source.real, source.out, "Q8_0")
    with pytest.raises(LlmkitError, match="in no round"):
        onepass.run(planned, threads=1, rounds=lambda left: onepass.all_at_once(left[1:]))
    assert not list(source.out.glob("*.gguf"))
