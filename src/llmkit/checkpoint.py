"""A Hugging Face checkpoint folder: config.json and the headers of its safetensors files; weights stay on disk.

Format (github.com/huggingface/safetensors, README "Format"): u64 header length, JSON header, data. Nothing in a header
is believed before it is checked against the file: lengths, offsets, overlaps, duplicates, dtypes, shapes. An index
(model.safetensors.index.json) is verified both ways. Pickle files are never opened.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from .errors import AccessDenied, InvalidModel, LlmkitError, ModelNotFound

_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_JSON = 256_000_000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the checkpoint stores it. `offset` counts from the start of `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Origin:
    """Where a folder of the Hugging Face cache comes from. `hashes`: file name → sha256, or git's sha1 of the blob.

    Hashes are the names of the blobs: whoever put them there has verified them. Copied files have none.
    """

    repo: str
    commit: str
    hashes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A folder: its config, its tensors' headers, the safetensors files they lie in, and its origin where it shows."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    paths: tuple[Path, ...]
    origin: Origin | None = None


def read(folder: str | Path) -> Checkpoint:
    """Read `folder`'s config and safetensors headers.

    Raises ModelNotFound (no folder, no config, no safetensors, a shard missing), InvalidModel (anything inconsistent).
    """
    folder = Path(folder)
    try:
        return _read(folder)
    except OSError as error:  # a name that no file can have, a disk that fails
        raise LlmkitError(f"{str(folder)[:200]}: cannot be read: {error.strerror}") from error


def _read(folder: Path) -> Checkpoint:
    if not folder.exists():
        raise ModelNotFound(f"{folder}: no such folder", "Give a checkpoint folder or a .gguf file.")
    if not folder.is_dir():
        raise ModelNotFound(f"{folder}: is a file, expected a checkpoint folder")
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"{folder}: has no config.json, so it is not a Hugging Face checkpoint", _look_inside(folder)
        )
    config = read_json(folder / "config.json")
    paths, index = _shards(folder)
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in read_safetensors(path):
            if other := tensors.get(tensor.name):
                raise InvalidModel(f"{path}: tensor '{tensor.name}' is also in {other.path.name}")
            tensors[tensor.name] = tensor
    if index is not None:
        _verify_index(folder, index, tensors)
    return Checkpoint(folder, config, tensors, paths, origin_of(folder))


def origin_of(folder: Path) -> Origin | None:
    """The origin of a folder that is …/models--ORG--NAME/snapshots/COMMIT with links to ../../blobs/HASH; else None."""
    folder = folder.resolve()
    repository = folder.parent.parent
    kind, *parts = repository.name.split("--")
    if folder.parent.name != "snapshots" or kind != "models" or not parts or not _COMMIT.fullmatch(folder.name):
        return None
    try:
        links = {path.name: os.readlink(path) for path in folder.iterdir() if path.is_symlink()}
    except OSError:  # may be entered, not listed
        links = {}
    # one link only, not what it leads to in the end: blobs may be links themselves
    blobs = {name: Path(os.path.normpath(folder / link)) for name, link in links.items()}
    known = {name: blob.name for name, blob in blobs.items() if blob.parent == repository / "blobs"}
    hashes = {name: blob for name, blob in known.items() if _HASH.fullmatch(blob)}
    return Origin("/".join(parts), folder.name, hashes)


def _look_inside(folder: Path) -> str:
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return f"The folder holds GGUF files: give one, such as {folder / ggufs[0]}."
    return "A checkpoint folder holds config.json, *.safetensors and a tokenizer."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object. Raises InvalidModel otherwise."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise InvalidModel(f"{path}: is {path.stat().st_size} bytes, too much for a JSON file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelNotFound(f"{path}: no such file") from None
    except PermissionError:
        raise AccessDenied(f"{path}: may not be read") from None
    except OSError as error:
        raise LlmkitError(f"{path}: cannot be read: {error.strerror}") from error
    return _parse_object(data, str(path))


def _parse_object(data: bytes, what: str) -> dict[str, Any]:
    """JSON bytes → object; duplicate keys, other roots and absurd nesting are refused."""
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except _DuplicateKey as error:
        raise InvalidModel(f"{what}: key '{error}' occurs twice") from None
    except (ValueError, RecursionError) as error:
        if data.startswith(b"version https://git-lfs"):
            raise InvalidModel(f"{what}: is a Git LFS pointer, not the file itself", "Run `git lfs pull`.") from None
        raise InvalidModel(f"{what}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidModel(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value


class _DuplicateKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def _shards(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The safetensors files to read, and the index's tensor → file map when there is one."""
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InvalidModel(f"{index_path}: expected 'weight_map' to map tensor names to files")
        names = sorted(set(weight_map.values()))
        if not names:
            raise InvalidModel(f"{index_path}: 'weight_map' is empty, so the index names no tensors")
        if bad := next((name for name in names if Path(name).name != name), None):
            raise InvalidModel(f"{index_path}: names a file outside the folder: {bad!r}")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelNotFound(
                f"{folder}: the index names {len(missing)} missing file(s): {', '.join(missing[:5])}",
                "Download the missing shards.",
            )
        return tuple(folder / name for name in names), weight_map
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",), None
    paths = tuple(sorted(folder.glob("*.safetensors")))
    if len(paths) == 1:
        return paths, None
    if paths:
        raise ModelNotFound(f"{folder}: has {len(paths)} safetensors files but no model.safetensors.index.json")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ModelNotFound(
            f"{folder}: has only pickled weights, which can run code when opened", "Get the safetensors version."
        )
    raise ModelNotFound(f"{folder}: has no safetensors files", _look_inside(folder))


def _verify_index(folder: Path, index: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    for name, file in index.items():
        found = tensors.get(name)
        if found is None:
            raise InvalidModel(f"{folder}: the index says tensor '{name}' is in {file}, but no shard holds it")
        if found.path.name != file:
            raise InvalidModel(f"{folder}: the index says tensor '{name}' is in {file}, it is in {found.path.name}")
    if extra := sorted(tensors.keys() - index.keys()):
        raise InvalidModel(f"{folder}: {tensors[extra[0]].path.name} holds '{extra[0]}', which the index does not name")


def read_safetensors(path: Path) -> Iterator[StoredTensor]:
    """The tensors of one file in the order of its header. Raises InvalidModel, AccessDenied."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            _check_start(path, start, size, file)
            (length,) = struct.unpack("<Q", start)
            header = file.read(length)
    except PermissionError:
        raise AccessDenied(f"{path}: may not be read") from None
    except OSError as error:
        raise LlmkitError(f"{path}: cannot be read: {error.strerror}") from error
    rows = _parse_object(header, f"{path} (header)")
    metadata = rows.pop("__metadata__", {})
    if not isinstance(metadata, (dict, type(None))):  # MLX writes null
        raise InvalidModel(f"{path}: __metadata__ is not an object")
    tensors = [_tensor(path, name, row, 8 + length) for name, row in rows.items()]
    _check_extents(path, tensors, 8 + length, size)
    return iter(tensors)


def _check_start(path: Path, start: bytes, size: int, file: Any) -> None:
    if len(start) < 8:
        raise InvalidModel(f"{path}: has {size} bytes, too few for a safetensors file")
    (length,) = struct.unpack("<Q", start)
    if length <= min(size - 8, _MAX_HEADER):
        return
    beginning = start + file.read(64)
    if beginning.startswith(b"version https://git-lfs"):
        raise InvalidModel(f"{path}: is a Git LFS pointer, not the weights", "Run `git lfs pull`, or download it.")
    if beginning.lstrip()[:1] == b"<":
        raise InvalidModel(f"{path}: is an HTML or XML page, not a safetensors file", "Download it again.")
    raise InvalidModel(f"{path}: announces a header of {length} bytes, but has {size} bytes", "Download it again.")


def _tensor(path: Path, name: str, row: Any, start: int) -> StoredTensor:
    def broken(what: str) -> InvalidModel:
        return InvalidModel(f"{path}: tensor '{name}': {what}")

    if not isinstance(row, dict):
        raise broken(f"expected an object, found {type(row).__name__}")
    dtype, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise broken(f"unknown dtype {dtype!r}, expected one of {', '.join(DTYPE_BITS)}")
    if not _is_naturals(shape):
        raise broken(f"shape {shape!r} is not a list of natural numbers")
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise broken(f"data_offsets {offsets!r} are not [begin, end]")
    nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
    if offsets[1] - offsets[0] != nbytes:
        raise broken(f"{offsets[1] - offsets[0]} bytes for {dtype} {shape}, expected {nbytes}")
    return StoredTensor(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def _is_naturals(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > 16:
        return False
    return all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _check_extents(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """No overlap, no hole, nothing past the end (the format demands all three)."""
    position = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset + tensor.nbytes > size:
            raise InvalidModel(
                f"{path}: tensor '{tensor.name}' ends at byte {tensor.offset + tensor.nbytes}, but the file has {size}:"
                " it is cut short",
                "Download the file again.",
            )
        if tensor.offset != position:
            what = "overlaps the one before it" if tensor.offset < position else f"leaves a hole at byte {position}"
            raise InvalidModel(f"{path}: tensor '{tensor.name}' {what}")
        position += tensor.nbytes
    if position != size:
        raise InvalidModel(f"{path}: {size - position} bytes after the last tensor")
