"""A model's metadata in GGUF's words, in the order llama.cpp's converter writes it.

Key names: llama.cpp gguf-py/gguf/constants.py. Names guessed from folder names (basename, finetune, version) are left
out: what is not known is not written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, read_json
from ..errors import InvalidModel
from ..gguf import Value
from .config import Config

# generation_config.json key(s) → general.sampling.* key, in the converter's order
_SAMPLING = (
    (("top_k",), "top_k", int),
    (("top_p",), "top_p", float),
    (("min_p",), "min_p", float),
    (("temperature",), "temp", float),
    (("penalty_last_n",), "penalty_last_n", int),
    (("penalty_repeat", "repetition_penalty"), "penalty_repeat", float),
)

# field of the model card → key, in the converter's order
_LICENCE = {
    "license": "general.license", "license_name": "general.license.name", "license_link": "general.license.link",
}  # fmt: skip


def general(checkpoint: Checkpoint, architecture: str, *, name: str, n_weights: int) -> dict[str, Value]:
    """general.*: architecture, recommended sampling, name, size, licence."""
    found = {"general.architecture": Value.string(architecture), "general.type": Value.string("model")}
    found |= _sampling(checkpoint.folder)
    found["general.name"] = Value.string(name)
    found["general.size_label"] = Value.string(size_label(n_weights))
    for field, key in _LICENCE.items():
        if text := _card_field(checkpoint.folder, field):
            found[key] = Value.string(text)
    return found


def _sampling(folder: Path) -> dict[str, Value]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        values = read_json(path)
    except InvalidModel:
        return {}  # only a recommendation: a broken one is as good as none
    found = {}
    for keys, name, kind in _SAMPLING:
        number = next((values[key] for key in keys if values.get(key) is not None), None)
        if isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 2**31:
            value = Value.int32(int(number)) if kind is int else Value.float32(number)
            found[f"general.sampling.{name}"] = value
    return found


def _card_field(folder: Path, name: str) -> str | None:
    """A field of the YAML block that opens README.md: one plain or quoted word, or an address."""
    try:
        text = (folder / "README.md").read_text("utf-8", "replace")
    except OSError:
        return None
    block = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    line = block and re.search(rf"^{name}:[ \t]*(['\"]?)([\w.+:/?=&%~#-]+)\1[ \t]*$", block[1], re.MULTILINE)
    return line[2] if line else None


def size_label(n_weights: int) -> str:
    """135M, 1.2B: the parameter count, two digits at least (gguf-py/gguf/utility.py)."""
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
    unit, suffix = next((row for row in units if n_weights > row[0]), (1e3, "K"))
    scaled = n_weights / unit
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{suffix}"


def decoder(config: Config, architecture: str) -> dict[str, Value]:
    """The hyperparameters every decoder of these families has: {architecture}.*"""
    rope = config.rope()
    found: dict[str, Any] = {
        "block_count": Value.uint32(config.n_layer),
        "context_length": Value.uint32(config.context),
        "embedding_length": Value.uint32(config.n_embd),
        "feed_forward_length": Value.uint32(config.n_ff),
        "attention.head_count": Value.uint32(config.n_head),
        "attention.head_count_kv": Value.uint32(config.n_head_kv),
    }
    if rope.type in ("linear", "yarn"):
        found["rope.scaling.type"] = Value.string(rope.type)
        found["rope.scaling.factor"] = Value.float32(rope.factor)
    if rope.type == "yarn":
        original = Config(rope.settings, config.path).number("original_max_position_embeddings", default=config.context)
        found["rope.scaling.original_context_length"] = Value.uint32(original)
    found["rope.freq_base"] = Value.float32(rope.theta)
    found["attention.layer_norm_rms_epsilon"] = Value.float32(config.number("rms_norm_eps", default=1e-6, kind=float))
    if config.values.get("head_dim") is not None:
        found["attention.key_length"] = found["attention.value_length"] = Value.uint32(config.head_dim)
    return {f"{architecture}.{key}": value for key, value in found.items()}
