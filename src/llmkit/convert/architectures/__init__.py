"""One file a family, named by its GGUF architecture; this table says which Hugging Face classes it serves.

To add a family: write its file with an ARCHITECTURE, add its classes here, add a row to scripts/make_tiny_model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ...checkpoint import Checkpoint
from ...errors import InvalidModel, Unsupported, nearest
from ...gguf import Value
from ..config import Config
from ..tensors import LazyTensor

CLASSES = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
}

Operation = Callable[[LazyTensor, Config], LazyTensor]


@dataclass(frozen=True)
class Row:
    """One tensor: its name in the checkpoint and in GGUF ({} is the block), its shape, what is done to it.

    `shape` names sizes of Config.sizes, as the checkpoint has them. `optional` ones may be absent.
    """

    source: str
    target: str
    shape: tuple[str, ...]
    operation: Operation | None = None
    optional: bool = False


@dataclass(frozen=True)
class Architecture:
    """A family. `metadata` gives its keys, `extra` tensors that are computed, `check` refuses what cannot be expressed.

    `defaults` fill config.json where transformers leaves a key out; tensors under `skipped` prefixes are no part of the
    text model. `prefixes` are what may stand before the names in `rows`. `add_space_prefix`: see convert/vocab.
    """

    name: str
    rows: tuple[Row, ...]
    metadata: Callable[[Config], Mapping[str, Value]]
    check: Callable[[Config], tuple[str, ...]]
    extra: Callable[[Config], tuple[LazyTensor, ...]] = lambda _: ()
    defaults: Mapping[str, Any] | None = None
    prefixes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    trims_embedding: bool = False
    add_space_prefix: bool | None = None


def find(checkpoint: Checkpoint) -> Architecture:
    """The family of a checkpoint, by config.json's architectures. Raises Unsupported with the nearest names."""
    names = checkpoint.config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InvalidModel(f"{checkpoint.folder / 'config.json'}: 'architectures' is {names!r}, expected a class name")
    name = names[0]
    if name not in CLASSES:
        near = nearest(name, CLASSES)
        supported = f"Supported: {', '.join(CLASSES)}."
        raise Unsupported(
            f"{checkpoint.folder}: architecture '{name}' is not supported",
            f"Nearest: {', '.join(near)}. {supported}" if near else supported,
        )
    found: Architecture = import_module(f"{__name__}.{CLASSES[name]}").ARCHITECTURE
    return found


def open_config(checkpoint: Checkpoint, architecture: Architecture) -> Config:
    """The checkpoint's config with the family's defaults under it."""
    return Config(checkpoint.config, checkpoint.folder / "config.json", architecture.defaults)
