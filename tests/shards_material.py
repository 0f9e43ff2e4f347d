"""A sharded checkpoint as the Hugging Face cache keeps it, its header-only shadow, and a source that copies shards.

Run as a program: a low-disk run that kills itself. python shards_material.py MOMENT REAL SHADOW OUT LOG
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llmkit import convert, quantize
from llmkit.progress import OnProgress, Progress
from llmkit.quantize import Recipe, streaming
from llmkit.quants import quant

REPO, COMMIT = "org/tiny-llama", "0123456789abcdef0123456789abcdef01234567"


def blob_name(path: Path) -> str:
    """As the Hub has it: sha256 of LFS files, git's sha1 of the others."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def in_cache(folder: Path, root: Path, repo: str = REPO) -> Path:
    """The folder's files as huggingface_hub keeps them under `root`; the snapshot's folder."""
    place = root / "--".join(["models", *repo.split("/")])
    snapshot = place / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir()
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    for path in folder.iterdir():
        name = blob_name(path)
        shutil.copy(path, place / "blobs" / name)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    return snapshot


def shadow_of(snapshot: Path, root: Path) -> Path:
    """The same tree, but of each shard only the header is there."""
    place = root / snapshot.parent.parent.name
    shutil.copytree(snapshot.parent.parent, place, symlinks=True)
    for path in (place / "snapshots" / COMMIT).glob("*.safetensors"):
        hollow(path)
    return place / "snapshots" / COMMIT


def hollow(path: Path) -> None:
    """Replace the blob behind a link by its header and a hole."""
    blob = path.resolve()
    made = blob.with_suffix(".hollow")
    with open(blob, "rb") as file:
        start = file.read(8)
        made.write_bytes(start + file.read(int.from_bytes(start, "little")))
    os.truncate(made, blob.stat().st_size)
    made.replace(blob)


def taken(folder: Path) -> int:
    """Bytes that the files in a tree take on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@dataclass
class Copies:
    """A ShardSource that copies shards from the whole repository, keeps a log on the disk, and measures the disk."""

    real: Path
    shadow: Path
    out: Path
    log: Path
    peak: int = 0
    on_event: Callable[[str, int], None] = field(default=lambda word, count: None)

    def fetch(self, path: Path, on_progress: OnProgress) -> None:
        """Half by half, so that something may happen in between."""
        if self.is_real(path):
            self.note("kept", path)
            return
        content, blob = (self.real / path.name).read_bytes(), path.resolve()
        part = blob.with_suffix(".partial")
        part.write_bytes(content[: len(content) // 2])
        self.note("fetching", path)
        with open(part, "ab") as file:
            file.write(content[len(content) // 2 :])
        on_progress(Progress("fetch", len(content), len(content), detail=path.name))
        self.measure()
        part.replace(blob)
        self.note("fetched", path)

    def release(self, path: Path) -> None:
        self.note("releasing", path)
        hollow(path)
        self.note("released", path)

    def is_real(self, path: Path) -> bool:
        return path.stat().st_blocks * 512 >= path.stat().st_size

    def note(self, word: str, path: Path) -> None:
        with open(self.log, "a") as file:
            file.write(f"{word} {path.name}\n")
        self.measure()
        self.on_event(word, len(self.names(word)))

    def names(self, word: str) -> list[str]:
        """The shards that something happened to, in order; over all runs with this log."""
        lines = [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [name for other, name in lines if other == word]

    def measure(self, _: Progress | None = None) -> None:
        self.peak = max(self.peak, taken(self.shadow.parents[1]) + taken(self.out))


def plan_of(folder: Path, out: Path, *names: str, split: int | None = None) -> quantize.Plan:
    return quantize.plan(convert.open_draft(folder), [Recipe(quant(name)) for name in names], out, split_nbytes=split)


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


# --- the run that gets killed ----------------------------------------------------------------------------------------


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(moment: str, real: Path, shadow: Path, out: Path, log: Path) -> None:
    """A low-disk run that ends itself: while the third shard is fetched, made, before or after it is released."""
    source = Copies(real, shadow, out, log)
    source.on_event = lambda word, count: die() if (word, count) == (moment, 3) else None
    planned = plan_of(source.shadow, source.out, "Q4_K_M", "Q8_0")

    def on_progress(progress: Progress) -> None:
        if moment == "making" and progress.detail and len(source.names("fetched")) == 3 and progress.stage != "fetch":
            die()

    streaming.run_low_disk(planned, source, threads=1, on_progress=on_progress)


if __name__ == "__main__":
    run(sys.argv[1], *map(Path, sys.argv[2:]))
