"""A checkpoint folder as a model for MLX: written by MLX (packed weights, scales, biases), or the original."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ... import checkpoint, mlx_engine
from ...errors import InvalidModel, Unsupported
from ...mlx_engine import arguments
from ...progress import OnProgress, Progress, ignore
from .model import Parts

Stored = Mapping[str, checkpoint.StoredTensor]
# dtype of the scales, bits, group → mode; only affine keeps scales as floats
_MODES = {("U8", 4, 16): "nvfp4", ("U8", 4, 32): "mxfp4", ("U8", 8, 32): "mxfp8"}


def read(folder: Path, on_progress: OnProgress = ignore) -> Parts:
    """The model in `folder`. Raises ModelNotFound, InvalidModel, Unsupported, MissingDependency."""
    found = checkpoint.read(folder)
    settings = arguments.of(found.config, folder)
    stored = arguments.text_tensors(found.tensors, tied=bool(settings["tie_word_embeddings"]))
    table = stored.get("model.embed_tokens.weight")
    if table is None:
        raise InvalidModel(f"{folder}: has no tensor 'model.embed_tokens.weight'")
    settings["vocab_size"] = table.shape[0]
    parts = Parts(settings["model_type"], settings)
    parts.quantization = _quantization(folder, found.config, settings, stored)
    parts.n_params = sum(_count(name, tensor, parts.quantization) for name, tensor in stored.items())
    parts.weight_nbytes = sum(tensor.nbytes for tensor in stored.values())
    names = {tensor.name: name for name, tensor in stored.items()}
    core, done = mlx_engine.load().core, 0
    for path in found.paths:
        try:
            arrays = core.load(str(path))
        except (RuntimeError, ValueError) as error:
            raise InvalidModel(f"{path}: MLX cannot read it: {error}") from error
        parts.weights |= {names[name]: array for name, array in arrays.items() if name in names}
        done += sum(tensor.nbytes for tensor in stored.values() if tensor.path == path)
        on_progress(Progress("loading", done, parts.weight_nbytes, detail=path.name))
    return parts


def _quantization(
    folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any], stored: Stored
) -> dict[str, dict[str, Any]]:
    """Path → bits, group and mode, from the shapes themselves: config.json may be silent about exceptions."""
    told = config.get("quantization") or config.get("quantization_config") or {}
    if not isinstance(told, dict) or (told and not {"group_size", "bits"} <= told.keys()):
        method = told.get("quant_method") if isinstance(told, dict) else told
        raise Unsupported(
            f"{folder}: is quantized by '{method}', which the backend mlx does not read",
            "Give the original checkpoint, or one that MLX has quantized.",
        )
    widths, found = arguments.widths(settings), {}
    for name, scales in stored.items():
        path = name.removesuffix(".scales")
        if path == name:
            continue
        packed, width = stored.get(f"{path}.weight"), widths.get(path.rpartition(".")[2])
        if packed is None or packed.dtype != "U32" or not width or not scales.shape or not scales.shape[-1]:
            raise InvalidModel(f"{folder}: '{name}' has no packed weights that belong to it")
        bits, group = packed.shape[-1] * 32 // width, width // scales.shape[-1]
        mode = "affine" if scales.dtype != "U8" else _MODES.get((scales.dtype, bits, group))
        if mode is None or packed.shape[-1] * 32 != bits * width or scales.shape[-1] * group != width:
            raise InvalidModel(
                f"{folder}: '{path}' has {packed.shape[-1]} words and {scales.shape[-1]} scales a row, which no"
                f" quantization of MLX makes of {width} weights"
            )
        found[path] = {"bits": bits, "group_size": group, "mode": mode}
    if told and not found:
        raise InvalidModel(f"{folder}: config.json says that it is quantized, but no tensor has scales")
    return found


def _count(name: str, tensor: checkpoint.StoredTensor, quantization: Mapping[str, dict[str, Any]]) -> int:
    """Weights in a tensor; scales and biases of packed ones are none."""
    path, _, kind = name.rpartition(".")
    if path not in quantization or kind == "bias":
        return prod(tensor.shape)
    return prod(tensor.shape) * 32 // int(quantization[path]["bits"]) if kind == "weight" else 0
