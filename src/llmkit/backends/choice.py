"""Which backend runs what lies at a path: the automatic choice, as a function.

GGUF file                               llamacpp (mlx where it is asked for)
folder that MLX has written             mlx
any other checkpoint folder             transformers, only where it is asked for: quantizing is the usual way
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import LlmkitError, ModelNotFound, Unsupported, nearest_hint
from . import BACKENDS

AUTO = "auto"
LLAMACPP, MLX, TRANSFORMERS = "llamacpp", "mlx", "transformers"
NAMES = (AUTO, LLAMACPP, MLX, TRANSFORMERS)
_OF_FOLDERS = (MLX, TRANSFORMERS)


def choose(path: Path, wanted: str = AUTO) -> str:
    """The backend, a key of BACKENDS, for the file or folder `path`.

    Raises ModelNotFound where llama.cpp would have to run a folder, Unsupported for other impossible wishes.
    """
    if wanted not in NAMES:
        raise Unsupported(f"unknown backend '{wanted}'", nearest_hint(wanted, NAMES))
    chosen = wanted
    if path.is_dir():
        if wanted == AUTO:
            chosen = MLX if is_mlx_folder(path) else LLAMACPP
        if chosen == LLAMACPP:
            raise folder_needs_a_choice(path, wanted)
    elif wanted == AUTO:
        chosen = LLAMACPP
    elif wanted == TRANSFORMERS:
        if not path.exists():
            raise ModelNotFound(f"{path}: no such folder", "Give a checkpoint folder.")
        raise Unsupported(
            f"{path}: is a file, and the backend transformers runs checkpoint folders",
            "Name the folder with config.json, or leave --backend out.",
        )
    if chosen not in BACKENDS:
        raise Unsupported(f"the backend {chosen} is not part of this version", nearest_hint(chosen, BACKENDS))
    return chosen


def runs_folders(wanted: str) -> bool:
    """Whether that wish means a checkpoint folder as it is."""
    return wanted in _OF_FOLDERS


def is_mlx_folder(folder: Path) -> bool:
    """Whether `folder` holds a model that MLX has quantized."""
    try:
        return is_mlx((folder / "config.json").read_bytes())
    except OSError:
        return False


def is_mlx(config: bytes) -> bool:
    """Whether a config.json is of a model that MLX has quantized: it tells bits and group size."""
    try:
        told = json.loads(config)
    except (ValueError, RecursionError):
        return False
    quantization = told.get("quantization") if isinstance(told, dict) else None
    return isinstance(quantization, dict) and {"bits", "group_size"} <= quantization.keys()


def folder_needs_a_choice(folder: Path, wanted: str) -> LlmkitError:
    """The error for a folder that llama.cpp cannot run, with what to do about it."""
    import shlex

    word = shlex.quote(str(folder))
    files = sorted(folder.glob("*.gguf"))
    if files:
        return ModelNotFound(f"{folder}: is a folder, a GGUF file is needed", f"Give a file: {files[0]}")
    if not (folder / "config.json").is_file():
        return ModelNotFound(f"{folder}: is a folder without a model: no .gguf, no config.json", "Give a .gguf file.")
    hint = f"Make one first: llmkit quantize {word} Q4_K_M"
    if wanted == AUTO:
        hint += "; or run the checkpoint as it is, by PyTorch: --backend transformers"
    return ModelNotFound(f"{folder}: is a folder, a GGUF file is needed", hint)
