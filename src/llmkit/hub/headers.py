"""Headers of files that are not here: their first bytes, fetched into a file of the full size whose data is a hole.

`checkpoint.read` and `gguf.read` then see the true names, shapes, types and offsets. Such a file looks whole by its
size and is not: it must lie in a folder of its own, where nothing takes it for a model.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .. import checkpoint, gguf, store
from ..errors import InvalidModel, LlmkitError

ReadRange = Callable[[int, int], bytes]  # (start, stop) → those bytes; fewer only at the end of the file

_SAFETENSORS_GUESS = 1 << 18  # holds the headers of most files
_GGUF_GUESS = 1 << 20  # vocabularies make headers of 1 to 16 MiB
_LONGEST_SAFETENSORS = 100_000_000  # the format's own limit
_LONGEST_GGUF = 256 << 20


def safetensors_header(read_range: ReadRange, nbytes: int, path: Path, guess: int = _SAFETENSORS_GUESS) -> int:
    """Write the header of a safetensors file of `nbytes` bytes to `path`, data a hole. Returns the bytes fetched.

    One request for `guess` bytes, a second for a header that is longer. Raises InvalidModel as
    checkpoint.read_safetensors does, and leaves nothing at `path` then; LlmkitError when the disk fails; whatever
    `read_range` raises.
    """
    start = _fetch(read_range, 0, min(nbytes, guess), path)
    fetched = len(start)
    if nbytes >= 8:
        end = 8 + int(struct.unpack_from("<Q", start)[0])
        if end <= min(nbytes, 8 + _LONGEST_SAFETENSORS):  # else it is refused below, in the reader's words
            start += _fetch(read_range, fetched, max(end, fetched), path)
            fetched, start = len(start), start[:end]
    _write_sparse(path, start, nbytes)
    try:
        checkpoint.read_safetensors(path)
    except LlmkitError:
        path.unlink()
        raise
    return fetched


def gguf_header(read_range: ReadRange, nbytes: int, path: Path) -> int:
    """Write the header of a GGUF file (or part) of `nbytes` bytes to `path`, data a hole. Returns the bytes fetched.

    Twice as much is asked for until the header is whole, each byte once. Raises InvalidModel as gguf.read does, or for
    a header above 256 MiB; LlmkitError when the disk fails; whatever `read_range` raises.
    """
    start = bytearray()
    wanted = _GGUF_GUESS
    while True:
        start += _fetch(read_range, len(start), min(wanted, nbytes), path)
        try:
            header = gguf.read_start(path, bytes(start), nbytes)
            break
        except gguf.Truncated as error:
            if error.needed > _LONGEST_GGUF:
                raise InvalidModel(f"{path}: its header is longer than {_LONGEST_GGUF >> 20} MiB") from None
            wanted = min(max(2 * len(start), error.needed), _LONGEST_GGUF)
    data = min((tensor.offset for tensor in header.tensors.values()), default=len(start))
    _write_sparse(path, bytes(start[:data]), nbytes)
    return len(start)


def _fetch(read_range: ReadRange, start: int, stop: int, path: Path) -> bytes:
    if start >= stop:
        return b""
    found = read_range(start, stop)
    if len(found) != stop - start:
        raise InvalidModel(
            f"{path}: {len(found)} bytes came for the range {start} to {stop}, so its size is not what was announced"
        )
    return found


def _write_sparse(path: Path, start: bytes, nbytes: int) -> None:
    unfinished = path.with_name(f"{path.name}.header")  # not .partial: that may be a download to go on with
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(start)
            file.truncate(nbytes)
        store.finish(unfinished, path)
    except (OSError, OverflowError) as error:  # a size that no file can have
        raise LlmkitError(f"{path}: {nbytes} bytes cannot be written: {getattr(error, 'strerror', error)}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()  # gone already, when all went well
