"""Low-disk quantizing: shards are fetched, converted and released one after another, so that few lie on disk at once.

The plan is made from a folder whose shards are sparse: true headers and true sizes, holes where weights belong. Rows
are written in place at known offsets, so the order of shards does not show. Who fetches them is not known here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from .. import checkpoint, store
from ..convert.draft import GgufDraft
from ..convert.tensors import LazyTensor
from ..errors import InvalidModel, LlmkitError, Unsupported
from ..progress import OnProgress, ignore
from . import onepass
from .plan import Plan, allocated_nbytes


class ShardSource(Protocol):
    """Where shards come from. A file changes by rename only, so that whoever has it open reads what he opened."""

    def fetch(self, path: Path, on_progress: OnProgress) -> None:
        """Make the sparse file at `path` whole and verified; does nothing when it is. Raises LlmkitError."""

    def release(self, path: Path) -> None:
        """Make the file sparse again, header only; does nothing when it is, or when it is somebody else's to keep."""


@dataclass(frozen=True)
class Step:
    """Fetch these files, make these tensors, release these files: those that no later step reads."""

    fetch: tuple[Path, ...]
    tensors: tuple[LazyTensor, ...]
    release: tuple[Path, ...]


@dataclass(frozen=True)
class LowDiskPlan:
    """What a low-disk run does, sizes in bytes: `shards` in the order of their fetching, `held` at most at once."""

    shards: tuple[Path, ...]
    fetched_nbytes: int
    held_nbytes: int
    output_nbytes: int

    @property
    def peak_nbytes(self) -> int:
        """Bytes on the disk at most: the outputs, whose room is taken first, and the shards held at once. Derived."""
        return self.output_nbytes + self.held_nbytes


def low_disk_plan(plan: Plan) -> LowDiskPlan:
    """The plan of a low-disk run that begins anew. Raises what `run_low_disk` raises before its first byte."""
    _require_hashes(plan.draft)
    planned = steps(plan.draft.tensors)
    shards = tuple(path for step in planned for path in step.fetch)
    sizes = {path: path.stat().st_size for path in shards}
    return LowDiskPlan(shards, sum(sizes.values()), _held(planned, sizes), plan.nbytes)


def describe(low: LowDiskPlan) -> dict[str, object]:
    """The plan as plain data, for --dry-run --json."""
    return {
        "shards": [path.name for path in low.shards],
        "fetched_nbytes": low.fetched_nbytes,
        "held_nbytes": low.held_nbytes,
        "peak_nbytes": low.peak_nbytes,
    }


def run_low_disk(
    plan: Plan, source: ShardSource, *, threads: int | None = None, on_progress: OnProgress = ignore
) -> list[onepass.Result]:
    """Write the plan's outputs, the same bytes as `run` writes, with no more shards on the disk than tensors need.

    A shard is released when its tensors are on the disk and in the journal; a broken-off run leaves those it held, and
    the next one goes on with them. Raises what `run` and `source` raise, Unsupported (the source is a GGUF),
    LlmkitError (the shards' hashes are not known), NotEnoughRoom, InvalidModel (a shard has another header now).
    """
    _require_hashes(plan.draft)
    if not plan.outputs:
        return []
    _require_room(plan)

    def rounds(left: tuple[LazyTensor, ...]) -> Iterator[onepass.Round]:
        present = _present(plan.draft.paths)
        planned = steps(left, present)
        for path in sorted(present.difference(*(step.fetch for step in planned))):
            source.release(path)
        for step in planned:
            prepare = partial(_fetch, source, step.fetch, on_progress)
            yield onepass.Round(step.tensors, prepare, partial(_release, source, step.release))

    return onepass.run(plan, threads=threads, on_progress=on_progress, rounds=rounds)


def steps(tensors: Sequence[LazyTensor], present: Collection[Path] = ()) -> tuple[Step, ...]:
    """The tensors in steps, each with as few new files as possible.

    Files that are held are finished first, so that they can go, then those that are `present`, then by name.
    """
    left = sorted(tensors, key=lambda tensor: tensor.paths)
    held: set[Path] = set()
    found = []
    while left:
        # a tensor that reads no file is no reason for a step of its own
        wanted = min(
            (tensor for tensor in left if tensor.paths),
            key=lambda tensor: (held.isdisjoint(tensor.paths), not any(path in present for path in tensor.paths)),
            default=left[0],
        )
        fetch = tuple(path for path in dict.fromkeys(wanted.paths) if path not in held)
        held.update(fetch)
        made = tuple(tensor for tensor in left if held.issuperset(tensor.paths))
        left = [tensor for tensor in left if not held.issuperset(tensor.paths)]
        release = held.difference(*(tensor.paths for tensor in left))
        held -= release
        found.append(Step(fetch, made, tuple(sorted(release))))
    return tuple(found)


def _held(planned: Sequence[Step], sizes: dict[Path, int]) -> int:
    """The most bytes of files that are held at once."""
    most = now = 0
    for step in planned:
        now += sum(sizes[path] for path in step.fetch)
        most = max(most, now)
        now -= sum(sizes[path] for path in step.release)
    return most


def _require_hashes(draft: GgufDraft) -> None:
    """Raise unless every byte is told without being here: a hole that is sampled gives another fingerprint."""
    if other := next((path for path in draft.paths if path.suffix != ".safetensors"), None):
        raise Unsupported(
            f"{other}: only checkpoints of safetensors files can be quantized shard by shard", "Leave out --low-disk."
        )
    if draft.sampled:
        raise LlmkitError(f"{draft.sampled[0]}: its content hash is not known, so it cannot be fetched when needed")


def _require_room(plan: Plan) -> None:
    """Raise NotEnoughRoom unless outputs and held shards fit, together where they share a disk."""
    planned = steps(plan.draft.tensors, _present(plan.draft.paths))
    lacking = {path: max(0, path.stat().st_size - allocated_nbytes(path)) for path in plan.draft.paths}
    needs = [(path.resolve().parent, _held(planned, lacking)) for path in plan.draft.paths[:1]]
    for file in (file for output in plan.outputs for file in output.files):
        missing = max(0, file.nbytes - allocated_nbytes(store.partial_path(file.path)))
        needs.append((file.path.parent, missing))
    store.require_rooms(needs)


def _present(paths: Sequence[Path]) -> frozenset[Path]:
    """Files that are on the disk, not only their headers; compression is no hole."""
    return frozenset(path for path in paths if 2 * allocated_nbytes(path) >= path.stat().st_size)


def _fetch(source: ShardSource, paths: Sequence[Path], on_progress: OnProgress) -> None:
    for path in paths:
        planned = tuple(checkpoint.read_safetensors(path))
        source.fetch(path, on_progress)
        if tuple(checkpoint.read_safetensors(path)) != planned:
            raise InvalidModel(
                f"{path}: its header is not the one that was read before the file was fetched",
                "Its source contradicts itself; nothing can be made from it.",
            )


def _release(source: ShardSource, paths: Sequence[Path]) -> None:
    for path in paths:
        source.release(path)
