"""MLX and the model definitions of mlx_lm, imported when first asked for, and what to install where they are absent.

Importing the package mlx_lm itself lowers the process's limit of open files for good (its utils.py calls setrlimit)
and takes seconds, as it brings transformers. So its folder `models` is loaded as a package of its own name, which
needs neither: nothing of mlx_lm outside that folder is run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import MissingDependency

_PACKAGE = "llmkit_mlx_models"  # what the folder mlx_lm/models is called here


@dataclass(frozen=True)
class Mlx:
    """`core` is mlx.core, `nn` is mlx.nn; `device` is where MLX computes unless told otherwise: "cpu" or "gpu"."""

    core: Any
    nn: Any
    version: str
    device: str

    def to_numpy(self, array: Any) -> Any:
        """A float32 copy as a numpy array (numpy has no bfloat16)."""
        import numpy as np

        return np.array(array.astype(self.core.float32), np.float32)

    def flatten(self, tree: Any) -> dict[str, Any]:
        """Dotted name → array, of a module's parameters()."""
        from mlx.utils import tree_flatten

        return dict(tree_flatten(tree))


_lock = threading.Lock()
_loaded: list[Mlx] = []


def load() -> Mlx:
    """MLX of this process. Raises MissingDependency when it is absent or has no backend here."""
    with _lock:
        if not _loaded:
            _loaded.append(_load())
        return _loaded[0]


def _load() -> Mlx:
    try:
        import mlx.core as core
        import mlx.nn as nn
    except (ImportError, OSError) as error:
        raise MissingDependency(f"MLX cannot be loaded: {error}", install_command()) from error
    return Mlx(core, nn, importlib.metadata.version("mlx"), "cpu" if core.default_device() == core.cpu else "gpu")


def install_command(platform: str = sys.platform) -> str:
    """What to run to get MLX on this kind of machine; plain `mlx` has no backend on Linux."""
    if platform == "darwin":
        return "Run: pip install mlx mlx-lm (on Apple silicon, macOS 14 or newer)"
    if platform.startswith("linux"):
        return 'Run: pip install "mlx[cpu]" mlx-lm (with an NVIDIA GPU "mlx[cuda13]")'
    return "MLX runs on macOS and Linux; use llama.cpp here: --backend llamacpp"


def architecture(name: str) -> ModuleType:
    """The module `name` of mlx_lm.models. Raises MissingDependency when mlx-lm is absent or has no such module."""
    load()
    with _lock:
        if _PACKAGE not in sys.modules:
            sys.modules[_PACKAGE] = _models_package()
    try:
        return importlib.import_module(f"{_PACKAGE}.{name}")
    except ImportError as error:
        raise MissingDependency(f"mlx-lm's models.{name} cannot be loaded: {error}", install_command()) from error


def _models_package() -> ModuleType:
    """mlx_lm/models as a package: found on disk, its parent not run."""
    found = importlib.util.find_spec("mlx_lm")
    for place in (found.submodule_search_locations or []) if found else []:
        folder = Path(place) / "models"
        if folder.is_dir():
            spec = importlib.util.spec_from_file_location(
                _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
            if spec and spec.loader:
                package = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(package)
                return package
    raise MissingDependency("mlx-lm, which defines the models for MLX, is not installed", install_command())
