"""MLX, owned here: the only package that imports mlx and mlx_lm.

    load()                 mlx.core and mlx.nn of this process
    architecture(name)     a module of mlx_lm.models: Model and ModelArgs of a family
    arguments.of(…)        config.json as the arguments of such a model

Knows arrays and the words of configurations; files, text and conversations are backends/ and quantize/.
"""

from __future__ import annotations

from .library import Mlx, architecture, install_command, load

__all__ = ["Mlx", "architecture", "install_command", "load"]
