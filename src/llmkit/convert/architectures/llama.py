"""Llama 1 to 3.x, Mistral, SmolLM: RMS norm, gated SiLU, grouped attention, rotary pairs (not halves).

The engine's llama graph (llama.cpp src/models/llama.cpp) rotates neighbouring elements, so the rows of q and k are
interleaved. Llama 3's frequency scaling becomes a tensor of divisors, rope_freqs.weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import pi

import numpy as np

from ...errors import InvalidModel
from ...gguf import Value
from .. import metadata
from ..config import Config
from ..tensors import LazyTensor, from_array, interleave_rope_halves
from . import Architecture, Row


def _query(tensor: LazyTensor, config: Config) -> LazyTensor:
    return interleave_rope_halves(tensor, config.n_head)


def _key(tensor: LazyTensor, config: Config) -> LazyTensor:
    return interleave_rope_halves(tensor, config.n_head_kv)


def _metadata(config: Config) -> Mapping[str, Value]:
    found = metadata.decoder(config, "llama")
    if window := _window(config):
        found["llama.context_length"] = Value.uint32(window)
    return found


def _window(config: Config) -> int | None:
    """Mistral 7B v0.1's sliding window, when it is shorter than the context."""
    if not config.values.get("sliding_window"):
        return None
    window: int = config.number("sliding_window")
    return window if window < config.context else None


def check(config: Config) -> tuple[str, ...]:
    """Refuse what the engine's llama graph cannot express; tell what was adapted."""
    config.require("hidden_act", "silu", "swish")
    config.require("partial_rotary_factor", 1, 1.0)
    config.require("is_causal", True)
    config.require("rope_interleaved", False)
    if window := _window(config):
        return (f"the engine has no sliding window for this family: context_length is set to the window, {window}",)
    return ()


def _rope_freqs(config: Config) -> tuple[LazyTensor, ...]:
    """Divisors of the rotary frequencies for rope type llama3 (transformers modeling_rope_utils, llama3).

    Wavelengths shorter than original/high are kept (1), longer than original/low divided by factor, others blended.
    """
    rope = config.rope()
    if rope.type != "llama3":
        return ()
    settings = Config(rope.settings, config.path)
    low, high = (settings.number(f"{end}_freq_factor", kind=float) for end in ("low", "high"))
    original = settings.number("original_max_position_embeddings")
    if low >= high:
        raise InvalidModel(f"{config.path}: 'low_freq_factor' {low} is not below 'high_freq_factor' {high}")
    dims = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    wavelength = 2 * pi * np.float32(rope.theta).astype(np.float64) ** dims.astype(np.float64)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (from_array("rope_freqs.weight", 1 / ((1 - smooth) / rope.factor + smooth)),)


def block(source: str, target: str, *shape: str, **options: object) -> Row:
    """A row for a tensor of every block: names inside the block, without the block's own name."""
    return Row(f"model.layers.{{}}.{source}", f"blk.{{}}.{target}", shape, **options)  # type: ignore[arg-type]


EMBEDDING_AND_OUTPUT = (
    Row("model.embed_tokens.weight", "token_embd.weight", ("vocab", "embd")),
    Row("model.norm.weight", "output_norm.weight", ("embd",)),
    Row("lm_head.weight", "output.weight", ("vocab", "embd"), optional=True),
)
FEED_FORWARD = (
    block("mlp.gate_proj.weight", "ffn_gate.weight", "ff", "embd"),
    block("mlp.up_proj.weight", "ffn_up.weight", "ff", "embd"),
    block("mlp.down_proj.weight", "ffn_down.weight", "embd", "ff"),
)
NORMS = (
    block("input_layernorm.weight", "attn_norm.weight", "embd"),
    block("post_attention_layernorm.weight", "ffn_norm.weight", "embd"),
)

ARCHITECTURE = Architecture(
    name="llama",
    rows=(
        *EMBEDDING_AND_OUTPUT,
        *NORMS,
        *FEED_FORWARD,
        block("self_attn.q_proj.weight", "attn_q.weight", "q", "embd", operation=_query),
        block("self_attn.k_proj.weight", "attn_k.weight", "kv", "embd", operation=_key),
        block("self_attn.v_proj.weight", "attn_v.weight", "kv", "embd"),
        block("self_attn.o_proj.weight", "attn_output.weight", "embd", "q"),
        block("self_attn.q_proj.bias", "attn_q.bias", "q", operation=_query, optional=True),
        block("self_attn.k_proj.bias", "attn_k.bias", "kv", operation=_key, optional=True),
        block("self_attn.v_proj.bias", "attn_v.bias", "kv", optional=True),
        block("self_attn.o_proj.bias", "attn_output.bias", "embd", optional=True),
        block("mlp.gate_proj.bias", "ffn_gate.bias", "ff", optional=True),
        block("mlp.up_proj.bias", "ffn_up.bias", "ff", optional=True),
        block("mlp.down_proj.bias", "ffn_down.bias", "embd", optional=True),
    ),
    metadata=lambda config: {
        **_metadata(config),
        "general.file_type": Value.uint32(0),
        "llama.vocab_size": Value.uint32(config.n_vocab),
        "llama.rope.dimension_count": Value.uint32(config.head_dim),
    },
    check=check,
    extra=_rope_freqs,
    defaults={"rms_norm_eps": 1e-6},
)
