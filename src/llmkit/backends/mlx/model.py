"""A model of mlx_lm made from its parts, wherever they came from: a GGUF file or a folder.

On a CPU everything is computed in float32: in 16 bits MLX is several times slower there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import mlx_engine
from ...errors import InvalidModel, Unsupported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# what mlx_lm's models raise on arguments they cannot take
_ARGUMENTS = (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, IndexError)


@dataclass
class Parts:
    """A model before it is one: `module` of mlx_lm.models, its arguments in the words of config.json, its weights.

    `quantization`: path of a matrix → bits, group_size, mode.
    """

    module: str
    arguments: Mapping[str, Any]
    weights: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, dict[str, Any]] = field(default_factory=dict)
    rope_divisors: NDArray[np.float32] | None = None
    n_params: int = 0
    weight_nbytes: int = 0


def build(parts: Parts, path: Path, *, float32: bool) -> Any:
    """The model, its weights in memory. Raises Unsupported, InvalidModel, each naming `path`."""
    mlx, module = mlx_engine.load(), mlx_engine.architecture(parts.module)
    try:
        model = module.Model(module.ModelArgs.from_dict(dict(parts.arguments)))
    except _ARGUMENTS as error:
        raise Unsupported(f"{path}: mlx_lm's {parts.module} cannot be made from its settings: {error}") from error
    if float32:
        for name, array in parts.weights.items():
            if array.dtype in (mlx.core.float16, mlx.core.bfloat16):
                parts.weights[name] = array.astype(mlx.core.float32)
                mlx.core.eval(parts.weights[name])  # one after another: the 16-bit one is let go
    weights = model.sanitize(parts.weights)
    try:
        mlx.nn.quantize(model, class_predicate=lambda name, _: parts.quantization.get(name, False))
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        raise InvalidModel(f"{path}: its tensors are not those of a {parts.module}: {_short(error)}") from error
    if parts.rope_divisors is not None:
        _set_divisors(model, parts)
    parts.weights.clear()
    model.eval()
    mlx.core.eval(model.parameters())
    return model


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:299]}…"


def _set_divisors(model: Any, parts: Parts) -> None:
    """Rotary frequencies divided by what the file gives for each (llama.cpp: rope_freqs.weight, Llama 3)."""
    import numpy as np

    core, arguments = mlx_engine.load().core, parts.arguments
    dims = arguments["head_dim"]
    wavelengths = np.float64(arguments["rope_theta"]) ** (np.arange(0, dims, 2) / dims)
    turned = core.array((wavelengths * np.asarray(parts.rope_divisors, np.float64)).astype(np.float32))
    for layer in model.layers:
        layer.self_attn.rope._freqs = turned


def embedding_factor(parts: Parts) -> float:
    """What float32 embeddings are multiplied with beforehand, so that Gemma's own factor is not rounded to bfloat16."""
    if parts.module != "gemma3_text":
        return 1.0
    core = mlx_engine.load().core
    exact = sqrt(parts.arguments["hidden_size"])
    return float(exact / core.array(exact, core.bfloat16).astype(core.float32).item())
