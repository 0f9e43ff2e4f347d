"""What a folder's model files are, by their names and headers: formats, quants, parameters, and what is missing.

Knows nothing of caches. Looking at a file does not make it used: its time of last access is put back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .. import checkpoint, gguf
from ..errors import LlmkitError
from ..gguf import SPLIT_NAME
from ..model import quant_label
from ..quants import QUANTS_BY_FTYPE
from .choice import INDEX
from .search import formats_of


@dataclass(frozen=True)
class Contents:
    """What the files are. `n_weights` is None when it is not known; `faults` say why the model is not whole."""

    formats: tuple[str, ...]
    quants: tuple[str, ...]
    n_weights: int | None
    faults: tuple[str, ...]


def describe(folder: Path, names: Collection[str]) -> Contents:
    """The model files `names` (paths below `folder`); no others are looked at."""
    faults: list[str] = []
    found = [_gguf(folder, parts, faults) for parts in gguf_groups(names)]
    if shards := _shards(folder, names, faults):
        found.insert(0, _safetensors(folder, shards, faults))
    formats = formats_of(names)
    if "config.json" in names and not formats:
        faults.append("holds no weights")
    quants = tuple(dict.fromkeys(label for label, _ in found if label))
    return Contents(formats, quants, next((count for _, count in found if count), None), tuple(faults))


def gguf_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The GGUF files among `names`: each with all its parts that are there, in order."""
    groups: dict[str, list[str]] = {}
    for name in sorted(name for name in names if name.lower().endswith(".gguf")):
        match = SPLIT_NAME.match(name)
        groups.setdefault(f"{match['stem']}\0{match['count']}" if match else name, []).append(name)
    return [tuple(parts) for parts in groups.values()]


def some(names: list[str]) -> str:
    """The first names of many."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _gguf(folder: Path, parts: tuple[str, ...], faults: list[str]) -> tuple[str | None, int | None]:
    """Quant and parameters of one GGUF, by its header, else by its name."""
    match = SPLIT_NAME.match(parts[0])
    if match and len(parts) < int(match["count"]):
        faults.append(f"{len(parts)} of {int(match['count'])} parts of {match['stem']} are here")
        return quant_label(parts[0]), None
    try:
        with _unnoticed([folder / part for part in parts]):
            file = gguf.read(folder / parts[0])
    except LlmkitError as error:
        faults.append(error.message.removeprefix(f"{folder}{os.sep}"))
        return quant_label(parts[0]), None
    stated = QUANTS_BY_FTYPE.get(file.get("general.file_type"))
    label = stated.name if stated and stated.default else quant_label(parts[0])
    if file.get("general.type", "model") != "model":  # an adapter, an importance matrix, a projector of images
        return label, None
    return label, sum(prod(info.shape) for info in file.tensors.values())


def _shards(folder: Path, names: Collection[str], faults: list[str]) -> list[str]:
    """The safetensors of the model at the top of the folder; what its index names and is not here is a fault."""
    here = sorted(name for name in names if os.sep not in name and name.endswith(".safetensors"))
    if INDEX not in names:
        return ["model.safetensors"] if "model.safetensors" in names else here
    try:
        with _unnoticed([folder / INDEX]):
            wanted = {str(name) for name in checkpoint.read_json(folder / INDEX)["weight_map"].values()}
    except (LlmkitError, KeyError, AttributeError):
        faults.append(f"{INDEX} cannot be read")
        return here
    if missing := sorted(wanted.difference(names)):
        faults.append(f"{len(missing)} of {len(wanted)} shards are missing: {some(missing)}")
    return [name for name in here if name in wanted]


def _safetensors(folder: Path, shards: list[str], faults: list[str]) -> tuple[str | None, int | None]:
    """Dtype of the first matrix, and parameters; None when a shard cannot be read or is missing."""
    label, count = None, 0
    for shard in shards:
        try:
            with _unnoticed([folder / shard]):
                tensors = list(checkpoint.read_safetensors(folder / shard))
        except LlmkitError as error:
            faults.append(error.message.removeprefix(f"{folder}{os.sep}"))
            continue
        label = label or next((tensor.dtype.partition("_")[0] for tensor in tensors if len(tensor.shape) > 1), None)
        count += sum(prod(tensor.shape) for tensor in tensors)
    return label, None if faults else count


@contextlib.contextmanager
def _unnoticed(paths: list[Path]) -> Iterator[None]:
    """Read `paths` and leave them as used before: looking at a model is not using it."""
    before = {path: os.stat(path) for path in paths if os.path.isfile(path)}
    try:
        yield
    finally:
        for path, facts in before.items():
            with contextlib.suppress(OSError):  # another user's file, a disk that may not be written
                now = os.stat(path)
                if now.st_atime_ns != facts.st_atime_ns and now.st_mtime_ns == facts.st_mtime_ns:
                    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
