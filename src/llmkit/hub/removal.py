"""Deleting models: first what would go and what stays, then, on a yes, just that.

Only what lies in the Hugging Face cache or in llmkit's own folders is deleted, and single GGUF files anywhere. Links
are removed, never followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import AccessDenied, LlmkitError, ModelNotFound, nearest_hint
from ..gguf import SPLIT_NAME
from ..model import ModelRef, parse, quant_label
from . import cache_removal, client, inventory
from .cache import Cache
from .cache_removal import Removal, delete, link, refuse_claimed
from .contents import gguf_groups
from .inventory import LEFTOVERS, File, file_at, total_nbytes, walk

_SEE = "See what there is: `llmkit list`."
_OURS_ONLY = "`llmkit rm` deletes only what lies in the Hugging Face cache or in llmkit's own folders, and GGUF files."
_BESIDE = tuple(suffix for suffix in LEFTOVERS if suffix != ".incomplete")  # what llmkit leaves beside its files


@dataclass(frozen=True)
class Plan:
    """Removals to be made together."""

    removals: tuple[Removal, ...]

    @property
    def files(self) -> dict[str, File]:
        """Every file that goes."""
        return {path: file for removal in self.removals for path, file in removal.files.items()}

    @property
    def nbytes(self) -> int:
        """Bytes this frees."""
        shared = sum(removal.shared_nbytes for removal in self.removals)
        return total_nbytes(self.files) - self.linked_nbytes + shared

    @property
    def linked_nbytes(self) -> int:
        """Bytes of files that go but have other names elsewhere (hard links), which keep the content."""
        names: dict[tuple[int, int], list[File]] = {}
        for file in self.files.values():
            names.setdefault(file.inode, []).append(file)
        return sum(same[0].nbytes for same in names.values() if len(same) < same[0].n_links)


def plan(texts: Sequence[str]) -> Plan:
    """What deleting the models `texts` would mean.

    Raises ModelNotFound (nothing of that name here, with the nearest), LlmkitError (not ours to delete, in work).
    """
    found = {removal.paths: removal for text in texts for removal in _removals(text)}
    return Plan(
        tuple(
            removal
            for removal in found.values()
            if not any(other is not removal and _covers(other, removal) for other in found.values())
        )
    )


def _covers(other: Removal, removal: Removal) -> bool:
    """Whether all that `removal` deletes goes with `other` anyway."""
    return all(any(path == each or each in path.parents for each in other.paths) for path in removal.paths)


def remove(planned: Plan) -> None:
    """Delete. Raises AccessDenied naming what could not be deleted; what went before it stays gone."""
    for removal in planned.removals:
        for path in removal.paths:
            refuse_claimed(removal.what, path)
    for removal in planned.removals:
        try:
            removal.act()
        except OSError as error:
            raise AccessDenied(f"{removal.what}: {error.filename}: cannot be deleted: {error.strerror}") from error
        if left := [path for path in removal.paths if os.path.lexists(path)]:
            more = f", and {len(left) - 1} more" if len(left) > 1 else ""
            raise AccessDenied(f"{removal.what}: {left[0]} cannot be deleted{more}", "Are you its owner?")


def _removals(text: str) -> Iterator[Removal]:
    path = Path(os.path.expanduser(text))
    if text and (os.path.lexists(path) or text[0] in "./~" or text.lower().endswith(".gguf")):
        yield _of_path(text, path)
        return
    ref = ModelRef(repo=text) if text and "/" not in text and _folder(text).is_dir() else parse(text)
    found = [*_in_cache(ref), *_in_ours(ref)]
    if not found:
        raise ModelNotFound(f"{ref}: is not on this machine", _nearest(ref))
    yield from found


def _nearest(ref: ModelRef) -> str:
    """What is here under names like this one."""
    holdings = inventory.look().holdings
    if same := [each for each in holdings if each.name.partition(":")[0].partition("@")[0] == ref.repo]:
        here = dict.fromkeys(word for each in same for word in ((each.revision or "")[:8], *each.quants) if word)
        return f"Of {ref.repo} are here: {', '.join(here) or 'unfinished files'}."
    return nearest_hint(str(ref.repo), {each.name for each in holdings}) if holdings else _SEE


# ── names ──


def _root() -> Path:
    return Path(os.path.realpath(client.cache_folder()))


def _folder(name: str) -> Path:
    return Cache(_root()).folder(name)


def _in_cache(ref: ModelRef) -> Iterator[Removal]:
    folder = _folder(str(ref.repo))
    if not os.path.lexists(folder):
        return
    if ref.revision is None and ref.quant is None:
        yield cache_removal.repository(str(ref), folder)
        return
    tree = walk(folder)
    snapshots = {path.name: path for path in map(Path, tree.folders) if path.parent == folder / "snapshots"}
    commits = sorted(snapshots) if ref.revision is None else _commits(ref, folder, snapshots)
    if ref.quant is None:
        yield from (cache_removal.revision(str(ref), folder, commit) for commit in commits)
        return
    chosen: list[Path] = []
    for start in (f"{snapshots[commit]}{os.sep}" for commit in commits):
        names = [path[len(start) :] for path in (*tree.files, *tree.links) if path.startswith(start)]
        chosen += [Path(start + name) for parts in gguf_groups(names) if _is(ref, parts[0]) for name in parts]
    if chosen:
        yield cache_removal.files(str(ref), folder, chosen)


def _is(ref: ModelRef, name: str) -> bool:
    return quant_label(name) == ref.quant


def _commits(ref: ModelRef, folder: Path, snapshots: Iterable[str]) -> list[str]:
    """The commit here that the revision names, a branch, a tag or the beginning of a commit; empty for none."""
    revision = str(ref.revision)
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    found = [each for each in snapshots if each == commit or (len(commit) >= 7 and each.startswith(commit))]
    return found if len(found) == 1 else []


def _in_ours(ref: ModelRef) -> Iterator[Removal]:
    folder, stream = inventory.made_folder(ref), Cache(inventory.streams_folder()).folder(str(ref.repo))
    if ref.quant is None:
        places = (folder, stream) if ref.revision is None else (folder,)
        yield from (_plain(str(ref), [place]) for place in places if os.path.lexists(place))
        return
    names = [path[len(str(folder)) + 1 :] for path in walk(folder).files]
    bare = {name.removesuffix(suffix) for name in names for suffix in ("", *_BESIDE) if name.endswith(suffix)}
    yield from (_gguf(str(ref), folder / parts[0]) for parts in gguf_groups(bare) if _is(ref, parts[0]))


# ── paths ──


def _of_path(text: str, path: Path) -> Removal:
    """What a path means. Links in its folder's path are resolved; if it is one itself, that is what is deleted."""
    path = (
        Path(os.path.realpath(path.parent), path.name) if path.name not in ("", "..") else Path(os.path.realpath(path))
    )
    root = _root()
    if root == path or root in path.parents:
        return _of_cached_path(text, root, path)
    if _names_gguf(path):
        return _gguf(text, path)
    if not os.path.lexists(path):
        raise ModelNotFound(f"{text}: no such file or folder", _SEE)
    if any(Path(os.path.realpath(own)) in path.parents for own in _own_folders()):
        return _plain(text, [path])
    raise LlmkitError(f"{text}: is a {'folder' if path.is_dir() else 'file'} of your own, and not deleted", _OURS_ONLY)


def _own_folders() -> tuple[Path, Path]:
    return inventory.models_folder(), inventory.streams_folder()


def _names_gguf(path: Path) -> bool:
    return path.name.lower().endswith(".gguf") and (path.is_symlink() or not path.is_dir())


def _of_cached_path(text: str, root: Path, path: Path) -> Removal:
    parts = path.relative_to(root).parts
    if not os.path.lexists(path):
        raise ModelNotFound(f"{text}: no such file or folder", _SEE)
    if parts and parts[0].startswith("models--"):
        folder = root / parts[0]
        if len(parts) == 1:
            return cache_removal.repository(text, folder)
        if parts[1] == "snapshots" and len(parts) == 3 and path.is_dir() and not path.is_symlink():
            return cache_removal.revision(text, folder, parts[2])
        if parts[1] == "snapshots" and len(parts) > 3 and (path.is_symlink() or path.is_file()):
            return cache_removal.files(text, folder, _parts(path) if _names_gguf(path) else [path])
        if parts[1] == "blobs" and len(parts) == 3 and path.name.endswith(LEFTOVERS):
            return _plain(text, [path])
    raise LlmkitError(f"{text}: is a part of the Hugging Face cache that is no model", "See the models: `llmkit list`.")


def _parts(path: Path) -> list[Path]:
    """All the parts of the split GGUF that `path` is one of, or itself."""
    match = SPLIT_NAME.match(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def _gguf(what: str, path: Path) -> Removal:
    """A GGUF with all its parts, and what runs that were broken off left beside them."""
    every = [part.with_name(part.name + suffix) for part in _parts(path) for suffix in ("", *_BESIDE)]
    here = [each for each in every if each.is_symlink() or each.is_file()]
    if not here:
        raise ModelNotFound(f"{what}: no such file", _SEE)
    return _plain(what, here)


def _plain(what: str, paths: Sequence[Path]) -> Removal:
    """Files, links and folders that are no part of the Hugging Face cache, or that it does not know."""
    files: dict[str, File] = {}
    for path in paths:
        refuse_claimed(what, Path(str(path).removesuffix(".partial")))
        files |= walk(path).files if path.is_dir() and not path.is_symlink() else file_at(path)
    if len(paths) == 1 and paths[0].is_symlink():
        return link(what, paths[0])
    return Removal(what, tuple(paths), files, lambda: delete(paths))
