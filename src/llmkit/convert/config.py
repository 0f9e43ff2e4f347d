"""config.json read with types: what a family needs, under the names any generation of transformers gives it.

transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters (Gemma 3: one a kind of layer).
A setting that the engine cannot express is refused by name; a missing or mistyped one is an InvalidModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidModel, Unsupported

_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_REQUIRED = object()
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS, llama.cpp src/llama-hparams.h


@dataclass(frozen=True)
class Rope:
    """Rotary position settings of one kind of layer. `type` is one of default, linear, yarn, llama3."""

    theta: float
    type: str = "default"
    factor: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)


class Config:
    """Typed reads of a config.json; for multimodal ones of its text_config."""

    def __init__(self, values: Mapping[str, Any], path: Path, defaults: Mapping[str, Any] | None = None) -> None:
        text = values.get("text_config")
        self.values: dict[str, Any] = {**(defaults or {}), **values, **(text if isinstance(text, dict) else {})}
        self.path = path

    def number(self, *keys: str, default: Any = _REQUIRED, kind: type = int) -> Any:
        """The first of `keys` that is there, a positive number."""
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)) or not value > 0:
                raise InvalidModel(f"{self.path}: '{key}' is {value!r}, expected a positive number")
            if value > 2**31 - 1:
                raise InvalidModel(f"{self.path}: '{key}' is {value!r}, which is beyond reason")
            return kind(value)
        if default is _REQUIRED:
            raise InvalidModel(f"{self.path}: lacks '{keys[0]}'")
        return default

    def require(self, key: str, *accepted: Any, default: Any = None) -> None:
        """Refuse any value of `key` but the accepted ones: the engine has no way to express another."""
        value = self.values.get(key, default)
        if value is None and default is None:
            return
        if value not in accepted:
            expected = " or ".join(repr(item) for item in accepted) or "its absence"
            raise Unsupported(
                f"{self.path}: '{key}' is {value!r}; the engine can only express {expected} for this family"
            )

    @property
    def n_layer(self) -> int:
        """Blocks. Raises Unsupported beyond what the engine can hold."""
        count = int(self.number("num_hidden_layers", "n_layer"))
        if count > _MAX_LAYERS:
            raise Unsupported(f"{self.path}: 'num_hidden_layers' is {count}; the engine holds at most {_MAX_LAYERS}")
        return count

    @property
    def n_embd(self) -> int:
        """Width of the residual stream."""
        return int(self.number("hidden_size", "n_embd"))

    @property
    def n_ff(self) -> int:
        """Width of the feed-forward layer."""
        return int(self.number("intermediate_size"))

    @property
    def n_head(self) -> int:
        """Query heads."""
        return int(self.number("num_attention_heads", "n_head"))

    @property
    def n_head_kv(self) -> int:
        """Key and value heads."""
        return int(self.number("num_key_value_heads", default=self.n_head))

    @property
    def head_dim(self) -> int:
        """Width of a head: stated, or hidden size over heads."""
        if self.values.get("head_dim") is not None:
            return int(self.number("head_dim"))
        if self.n_embd % self.n_head:
            raise InvalidModel(f"{self.path}: hidden_size {self.n_embd} does not divide by {self.n_head} heads")
        return self.n_embd // self.n_head

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding."""
        return int(self.number("vocab_size"))

    @property
    def context(self) -> int:
        """Positions the model was trained for."""
        return int(self.number("max_position_embeddings", "n_positions"))

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding."""
        tied = self.values.get("tie_word_embeddings") or False
        if not isinstance(tied, bool):
            raise InvalidModel(f"{self.path}: 'tie_word_embeddings' is {tied!r}, expected true or false")
        return tied

    @property
    def layer_types(self) -> list[str]:
        """What kind of attention each block has, where config.json says so; else empty."""
        kinds = self.values.get("layer_types")
        if kinds is None:
            return []
        named = isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
        if not named or len(kinds) != self.n_layer:
            raise InvalidModel(f"{self.path}: 'layer_types' is not a list of {self.n_layer} names, one a block")
        return list(kinds)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that tensor shapes are written in."""
        return {
            "vocab": self.n_vocab, "embd": self.n_embd, "ff": self.n_ff, "head": self.head_dim,
            "q": self.n_head * self.head_dim, "kv": self.n_head_kv * self.head_dim,
        }  # fmt: skip

    def rope(self, layers: str = "full_attention") -> Rope:
        """The rotary settings of `layers` ("full_attention" or "sliding_attention"), of either generation.

        Raises Unsupported for scalings the engine has no keys for in these families.
        """
        both = self.values.get("rope_parameters")
        if isinstance(both, dict) and ("full_attention" in both or "sliding_attention" in both):
            scaling = both.get(layers) or {}
        elif both:
            scaling = both
        else:
            scaling = self.values.get("rope_scaling") or {}
        if not isinstance(scaling, dict):
            raise InvalidModel(f"{self.path}: the rope settings are {scaling!r}, expected an object")
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind not in _ROPE_TYPES:
            raise Unsupported(f"{self.path}: rope type {kind!r}; the engine can only express {', '.join(_ROPE_TYPES)}")
        inner = Config(scaling, self.path)
        theta = inner.number("rope_theta", default=None, kind=float) or self.number(
            "rope_theta", default=10000.0, kind=float
        )
        factor = inner.number("factor", default=_REQUIRED if kind != "default" else 1.0, kind=float)
        if kind == "yarn":
            _refuse_yarn_details(inner, factor)
        inner.require("partial_rotary_factor", 1, 1.0)
        inner.require("llama_4_scaling_beta")
        return Rope(theta, kind, factor, scaling)


def _refuse_yarn_details(scaling: Config, factor: float) -> None:
    """The engine reads factor and original context; its other YaRN constants are the paper's (arXiv 2309.00071)."""
    from math import isclose, log

    scaling.require("beta_fast", 32, 32.0)
    scaling.require("beta_slow", 1, 1.0)
    scaling.require("truncate", True)
    for key in ("mscale", "mscale_all_dim", "extrapolation_factor"):
        scaling.require(key, 1, 1.0)
    for key in ("attention_factor", "attn_factor"):
        value = scaling.values.get(key)
        if value is not None and not (
            isinstance(value, (int, float)) and isclose(value, 0.1 * log(factor) + 1, rel_tol=1e-4)
        ):
            raise Unsupported(f"{scaling.path}: YaRN '{key}' is {value!r}; the engine always uses 0.1·ln(factor) + 1")
