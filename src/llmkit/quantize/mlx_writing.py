"""A planned folder for MLX is written: a few rows at a time, under a .partial name until it is whole."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .. import checkpoint, mlx_engine, store
from ..errors import InvalidModel, LlmkitError, OutputExists
from ..progress import OnProgress, Progress, ignore
from .mlx import MlxPlan, TensorPlan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CHUNK_WEIGHTS = 1 << 23  # quantized at a time
_SHARD_NBYTES = 5_000_000_000
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "tekken.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md",
)  # fmt: skip


@dataclass(frozen=True)
class MlxResult:
    """A folder that was written. `weight_nbytes` and `bits_per_weight` are measured: read back from its files."""

    path: Path
    weight_nbytes: int
    file_nbytes: int
    bits_per_weight: float
    seconds: float


def run(planned: MlxPlan, *, force: bool = False, on_progress: OnProgress = ignore) -> MlxResult:
    """Write the folder. Raises OutputExists, NotEnoughRoom, AccessDenied, InvalidModel (a weight that is no number)."""
    check_output(planned, force=force)
    started, path = time.monotonic(), planned.path
    store.make_folder(path.parent)
    store.require_room(path.parent, planned.nbytes + sum(file.stat().st_size for file in _copies(planned.source)))
    partial = store.partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir()
        _write(planned, partial, on_progress)
        _replace(partial, path)
    except OSError as error:
        raise LlmkitError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _measured(planned, time.monotonic() - started)


def check_output(planned: MlxPlan, *, force: bool) -> None:
    """Raise OutputExists, or MissingDependency without MLX: before anything is fetched."""
    mlx_engine.load()
    path = planned.path
    if path.exists() and not (force and path.is_dir()):
        hint = "Use --force to replace it, or another --out." if path.is_dir() else "Use another --out."
        raise OutputExists(f"{path}: exists", hint)


def _write(planned: MlxPlan, folder: Path, on_progress: OnProgress) -> None:
    shards = _shards(planned.tensors)
    total, done = sum(tensor.source.nbytes for tensor in planned.tensors), 0
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(folder / name, "wb") as file:
            offsets = _write_header(file, tensors)
            for tensor in tensors:
                on_progress(Progress("quantizing", done, total, detail=tensor.name))
                _write_tensor(file, tensor, offsets)
                done += tensor.source.nbytes
                index |= {array.name: name for array in tensor.arrays}
            _sync(file)
    on_progress(Progress("quantizing", total, total))
    texts = {"config.json": planned.config}
    if len(shards) > 1:
        texts["model.safetensors.index.json"] = {"metadata": {"total_size": planned.nbytes}, "weight_map": index}
    for name, value in texts.items():
        with open(folder / name, "wb") as file:
            file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
            _sync(file)
    for source in _copies(planned.source):
        shutil.copyfile(source, folder / source.name)
    store.sync_folder(folder)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _copies(source: Path) -> list[Path]:
    """The files that go along: tokenizer, template, licence."""
    return [source / name for name in _COPIED if (source / name).is_file()]


def _shards(tensors: tuple[TensorPlan, ...]) -> list[list[TensorPlan]]:
    """Tensors in files of at most 5 GB, as mlx_lm cuts them."""
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > _SHARD_NBYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_header(file: BinaryIO, tensors: list[TensorPlan]) -> dict[str, int]:
    """The safetensors header; where each array begins in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offsets, position = {}, 0
    for array in (array for tensor in tensors for array in tensor.arrays):
        header[array.name] = {
            "dtype": array.dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        offsets[array.name] = position
        position += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + position)
    return {name: 8 + len(text) + offset for name, offset in offsets.items()}


def _write_tensor(file: BinaryIO, tensor: TensorPlan, offsets: Mapping[str, int]) -> None:
    """Its arrays, a few rows at a time: memory stays bounded whatever the size of the tensor."""
    begins = [offsets[array.name] for array in tensor.arrays]
    for blocks in _blocks(tensor):
        for number, block in enumerate(blocks):
            file.seek(begins[number])
            file.write(block)
            begins[number] += len(block)


def _blocks(tensor: TensorPlan) -> Iterator[tuple[bytes, ...]]:
    """The bytes of each of the tensor's arrays, for some rows."""
    import numpy as np

    source, packing = tensor.source, tensor.packing
    n_rows = source.shape[0] if len(source.shape) > 1 else 1
    if not source.nbytes:
        return
    stored = np.memmap(source.path, np.uint8, "r", source.offset, (n_rows, source.nbytes // n_rows))
    step = max(1, _CHUNK_WEIGHTS * n_rows // max(1, prod(source.shape)))
    core = mlx_engine.load().core
    dtype = {"F32": core.float32, "F16": core.float16, "BF16": core.bfloat16}[source.dtype]
    for start in range(0, n_rows, step):
        raw = np.ascontiguousarray(stored[start : start + step])
        if packing is None:
            yield (raw.tobytes(),)
            continue
        rows = core.array(raw).view(dtype)
        if not core.all(core.isfinite(rows)).item():
            raise InvalidModel(f"{source.path}: tensor '{source.name}' holds a weight that is no finite number")
        made = core.quantize(rows, group_size=packing.group, bits=packing.bits, mode=packing.mode)
        core.eval(made)
        yield tuple(_bytes(core, each) for each in made)


def _bytes(core: Any, array: Any) -> bytes:
    import numpy as np

    plain: NDArray[np.generic] = np.array(array.view(core.uint16) if array.dtype == core.bfloat16 else array)
    return plain.tobytes()


def _replace(partial: Path, path: Path) -> None:
    """Give the whole folder its final name; one that is in the way makes room first and comes back if that fails."""
    old = path.with_name(path.name + ".old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    try:
        os.replace(partial, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    store.sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _measured(planned: MlxPlan, seconds: float) -> MlxResult:
    written = checkpoint.read(planned.path)
    weight_nbytes = sum(tensor.nbytes for tensor in written.tensors.values())
    files = sum(path.stat().st_size for path in written.paths)
    return MlxResult(planned.path, weight_nbytes, files, 8 * weight_nbytes / max(1, planned.n_weights), seconds)
