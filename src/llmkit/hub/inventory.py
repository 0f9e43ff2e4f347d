"""What is on this machine: models in the Hugging Face cache and in llmkit's own folders, whole or in part. No network.

The cache is read here and not by huggingface_hub's scan_cache_dir: that leaves out a repository for one broken link,
and gives up the whole scan for one folder it may not read. Links are followed to the cache's own blobs and no further.
Deleting is removal.py.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from .. import settings
from ..model import ModelRef, quant_label
from . import client
from .contents import describe, gguf_groups, some

# unfinished files, their notes and locks: ours, then huggingface_hub's
LEFTOVERS = (".partial", ".partial.json", ".partial.json.new", ".partial.lock", ".journal", ".incomplete")
CACHE, OURS = "cache", "llmkit"
ANOTHER_HOME = "LLMKIT_HOME names another folder for what llmkit keeps."

_LARGEST_REF = 200
_NO_HOLE = 1 << 20  # a file may take this much less than its size: file systems keep small ones elsewhere


@dataclass(frozen=True)
class Holding:
    """A model on this machine (one revision of it), or what is left of one.

    `name` is what verbs take. `place`: "cache" (Hugging Face's) or "llmkit". `state`: "whole", "part" (`faults` say
    what is missing) or "unfinished" (bytes of downloads and conversions broken off, blobs nothing leads to).
    `nbytes` on disk; `shared_nbytes` of them belong to another revision too. `used`: seconds since 1970.
    """

    name: str
    place: str
    path: Path
    state: str
    formats: tuple[str, ...] = ()
    quants: tuple[str, ...] = ()
    n_weights: int | None = None
    nbytes: int = 0
    shared_nbytes: int = 0
    n_files: int = 0
    revision: str | None = None
    refs: tuple[str, ...] = ()
    used: float | None = None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inventory:
    """All there is. `nbytes` counts every byte once; `other_nbytes` lie in the cache's data sets and spaces."""

    holdings: tuple[Holding, ...]
    nbytes: int
    other_nbytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class File:
    """A regular file, seen without following links."""

    path: str
    nbytes: int
    inode: tuple[int, int]
    n_links: int
    used: float


@dataclass(frozen=True)
class Tree:
    """Everything below a folder: files and links by path, what may not be read."""

    files: dict[str, File] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)


def models_folder() -> Path:
    """Where the models llmkit makes on demand lie."""
    return settings.home() / "models"


def made_folder(ref: ModelRef) -> Path:
    """Where those of a repository lie: <org>--<name>/, and below it those of a revision that was named."""
    folder = models_folder() / str(ref.repo).replace("/", "--")
    return folder / ref.revision.replace("/", "--") if ref.revision else folder


def streams_folder() -> Path:
    """Where conversions with --low-disk keep what they have fetched."""
    return settings.home() / "streams"


def look() -> Inventory:
    """Everything on this machine, by name. Raises MissingDependency; what cannot be read becomes a note or a fault."""
    root = Path(os.path.realpath(client.cache_folder()))
    notes: list[str] = []
    holdings: list[Holding] = []
    seen: dict[tuple[int, int], int] = {}
    others: dict[tuple[int, int], int] = {}
    shared = walk(root / "blobs")
    for folder in _folders(root, notes):
        if folder.name in ("blobs", ".locks"):
            continue
        tree = walk(folder)
        notes += tree.troubles
        is_model = folder.name.startswith("models--")
        (seen if is_model else others).update((file.inode, file.nbytes) for file in tree.files.values())
        if is_model:
            holdings += _repository(folder, tree, shared)
    seen.update((file.inode, file.nbytes) for file in shared.files.values())
    for found, tree in chain(_ours(notes), _streams(notes)):
        holdings += found
        seen.update((file.inode, file.nbytes) for file in tree.files.values())
    ordered = tuple(sorted(holdings, key=lambda each: (each.name.lower(), each.revision or "", str(each.path))))
    return Inventory(ordered, sum(seen.values()), sum(others.values()), tuple(notes))


# ── folders ──


def walk(folder: Path | str) -> Tree:
    """Everything below `folder`, links not followed. What cannot be read is told in `troubles`.

    Sizes are those of the content, without the holes of unfinished files.
    """
    tree = Tree()
    waiting = [str(folder)]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        tree.links[entry.path] = os.readlink(entry.path)
                    elif entry.is_dir(follow_symlinks=False):
                        tree.folders.append(entry.path)
                        waiting.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        tree.files[entry.path] = _file(entry.path, entry.stat(follow_symlinks=False))
        except FileNotFoundError:
            continue  # nothing there, or it went while we looked
        except OSError as error:
            tree.troubles.append(f"{here}: cannot be read: {error.strerror}")
    return tree


def file_at(path: Path) -> dict[str, File]:
    """The file at `path` as walk would find it; nothing for a link."""
    return {} if path.is_symlink() else {str(path): _file(str(path), os.lstat(path))}


def _file(path: str, facts: os.stat_result) -> File:
    nbytes = facts.st_size
    holes = nbytes - getattr(facts, "st_blocks", nbytes // 512) * 512
    if holes > _NO_HOLE:
        nbytes -= holes
    return File(path, nbytes, (facts.st_dev, facts.st_ino), facts.st_nlink, max(facts.st_atime, facts.st_mtime))


def _folders(root: Path, notes: list[str]) -> list[Path]:
    """The folders in `root` in order, also those that are links to folders."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{root}: cannot be read: {error.strerror}")
        return []


def total_nbytes(files: Mapping[str, File]) -> int:
    """Bytes of the files, hard links counted once."""
    return sum({file.inode: file.nbytes for file in files.values()}.values())


def _used(files: Mapping[str, File]) -> float | None:
    return max((file.used for file in files.values()), default=None)


def _described(holding: Holding, files: Mapping[str, File]) -> Holding:
    """The holding with what the names and headers of its files tell; `files` by their names below its folder."""
    folder = holding.path if holding.path.is_dir() else holding.path.parent
    found = describe(folder, files)
    return replace(
        holding, state="part" if found.faults else "whole", formats=found.formats, quants=found.quants,
        n_weights=found.n_weights, nbytes=total_nbytes(files), n_files=len(files), used=_used(files),
        faults=found.faults,
    )  # fmt: skip


# ── the Hugging Face cache ──


def repository_name(folder: Path) -> str:
    """models--org--name → org/name."""
    return folder.name.partition("--")[2].replace("--", "/", 1)


def _repository(folder: Path, tree: Tree, shared: Tree) -> Iterator[Holding]:
    """A row for each revision, and one for bytes that belong to none."""
    name, refs = repository_name(folder), _refs(folder, tree)
    snapshots = sorted(path for path in tree.folders if os.path.dirname(path) == str(folder / "snapshots"))
    contents = {path: _snapshot(path, tree, shared) for path in snapshots}
    users = Counter(inode for found, _ in contents.values() for inode in {file.inode for file in found.values()})
    for path, (found, faults) in contents.items():
        holding = _described(Holding(name, CACHE, Path(path), "whole", revision=os.path.basename(path)), found)
        common = {key: file for key, file in found.items() if users[file.inode] > 1}
        all_faults = (*holding.faults, *faults)
        yield replace(
            holding, faults=all_faults, state="part" if all_faults else "whole",
            shared_nbytes=total_nbytes(common), refs=refs.get(os.path.basename(path), ()),
        )  # fmt: skip
    loose = {
        path: file
        for path, file in tree.files.items()
        if os.path.dirname(path) == str(folder / "blobs") and file.inode not in users
    }
    if loose or not snapshots:
        nothing = () if loose else ("holds no files",)
        yield Holding(
            name, CACHE, folder, "unfinished", nbytes=total_nbytes(loose), n_files=len(loose),
            used=_used(loose), faults=(*_leftovers(loose), *nothing, *tree.troubles),
        )  # fmt: skip


def _refs(folder: Path, tree: Tree) -> dict[str, tuple[str, ...]]:
    """commit → the branches and tags that were there when they were last asked for."""
    start = str(folder / "refs") + os.sep
    found: dict[str, tuple[str, ...]] = {}
    for path, file in sorted(tree.files.items()):
        if path.startswith(start) and file.nbytes <= _LARGEST_REF:
            with contextlib.suppress(OSError, ValueError):
                commit = Path(path).read_text().strip()
                found[commit] = (*found.get(commit, ()), path[len(start) :].replace(os.sep, "/"))
    return found


def _snapshot(path: str, tree: Tree, shared: Tree) -> tuple[dict[str, File], list[str]]:
    """The files of one snapshot by their names in the repository, and what is wrong with its links."""
    start = path + os.sep
    found: dict[str, File] = {}
    broken, outside = [], []
    for file in (file for file in tree.files if file.startswith(start)):
        found[file[len(start) :]] = tree.files[file]
    for link in (link for link in tree.links if link.startswith(start)):
        content = resolve(link, tree, shared)
        if content is not None:
            found[link[len(start) :]] = content
        elif os.path.exists(link):
            outside.append(link[len(start) :])
        else:
            broken.append(link[len(start) :])
    faults = [
        f"{some(names)}: {words}" for names, words in ((broken, "the content is gone"), (outside, _OUTSIDE)) if names
    ]
    return found, faults


_OUTSIDE = "leads out of the cache"


def resolve(link: str, tree: Tree, shared: Tree) -> File | None:
    """The cache's own file that a link of a snapshot leads to: a blob, or through it one of the shared blobs."""
    target = _target(link, tree.links[link])
    if target in tree.links:
        return shared.files.get(_target(target, tree.links[target]))
    return tree.files.get(target)


def _target(link: str, words: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(link), words))


def _leftovers(files: Mapping[str, File]) -> tuple[str, ...]:
    """What unfinished files are, in words."""
    kinds = Counter(
        "download to go on with" if path.endswith(".partial")
        else "orphan of a killed download (`llmkit download --sweep`)" if path.endswith(".incomplete")
        else "" if path.endswith(LEFTOVERS)
        else "blob that no revision uses"
        for path in files
    )  # fmt: skip
    return tuple(f"{count} x {kind}" for kind, count in kinds.items() if kind)


# ── llmkit's own ──


def _ours(notes: list[str]) -> Iterator[tuple[list[Holding], Tree]]:
    for folder in _folders(models_folder(), notes):
        tree = walk(folder)
        notes += tree.troubles
        yield list(_made(folder, tree)), tree


def _made(folder: Path, tree: Tree) -> Iterator[Holding]:
    """A row for each GGUF, one for a checkpoint, one for what is unfinished. A revision that was named has a folder."""
    name = folder.name.replace("--", "/", 1)
    names = {path[len(str(folder)) + 1 :]: file for path, file in tree.files.items()}
    unfinished = {key: file for key, file in names.items() if key.endswith(LEFTOVERS)}
    groups = gguf_groups(key for key in names if key not in unfinished)
    for parts in groups:
        found = {os.path.basename(key): names[key] for key in parts}
        holding = _described(Holding(name, OURS, folder / parts[0], "whole"), found)
        revision, label = os.path.dirname(parts[0]).replace("--", "/"), quant_label(parts[0])
        mark = f"@{revision}" if revision else ""
        yield replace(holding, name=f"{name}{mark}:{label}" if label else str(holding.path))
    taken = {key for parts in groups for key in parts} | unfinished.keys()
    if rest := {key: file for key, file in names.items() if key not in taken}:
        yield _described(Holding(name, OURS, folder, "whole"), rest)
    if unfinished:
        yield Holding(
            name, OURS, folder, "unfinished", nbytes=total_nbytes(unfinished), n_files=len(unfinished),
            used=_used(unfinished), faults=("of a conversion that was broken off: the same command goes on",),
        )  # fmt: skip


def _streams(notes: list[str]) -> Iterator[tuple[list[Holding], Tree]]:
    """Laid out as the Hugging Face cache; what is linked from there is not counted here."""
    for folder in _folders(streams_folder(), notes):
        tree = walk(folder)
        notes += tree.troubles
        names = Counter(file.inode for file in tree.files.values())
        own = {path: file for path, file in tree.files.items() if names[file.inode] >= file.n_links}
        yield [
            Holding(
                repository_name(folder), OURS, folder, "unfinished", nbytes=total_nbytes(own), n_files=len(own),
                used=_used(own), faults=("left by a conversion with --low-disk: the same command goes on",),
            )
        ], tree  # fmt: skip
