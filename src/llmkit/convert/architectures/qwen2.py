"""Qwen2 and Qwen2.5: as Llama with biases on q, k and v, and rotary halves as Hugging Face has them."""

from __future__ import annotations

from ...errors import Unsupported
from ...gguf import Value
from .. import metadata
from ..config import Config
from . import Architecture, llama
from .llama import block


def check(config: Config) -> tuple[str, ...]:
    """Refuse what the engine's qwen2 and qwen3 graphs cannot express."""
    config.require("hidden_act", "silu", "swish")
    config.require("partial_rotary_factor", 1, 1.0)
    config.require("is_causal", True)
    if config.rope().type == "llama3":
        raise Unsupported(
            f"{config.path}: rope type 'llama3'; the engine can only express default, linear or yarn here"
        )
    config.require("use_mrope", False)
    config.require("dual_chunk_attention_config")
    if window := _window(config):
        raise Unsupported(
            f"{config.path}: 'use_sliding_window' with a window of {window}; the engine has none for this family"
        )
    return ()


def _window(config: Config) -> int | None:
    """The sliding window, when a layer has one that is shorter than the context (transformers Qwen2Config)."""
    if config.layer_types:
        slides = "sliding_attention" in config.layer_types
    else:
        full = config.values.get("max_window_layers", 28)  # so many layers keep full attention
        slides = config.values.get("use_sliding_window") is True and isinstance(full, int) and full < config.n_layer
    window: int = config.number("sliding_window", default=4096) if slides else config.context
    return window if window < config.context else None


ATTENTION = (
    block("self_attn.q_proj.weight", "attn_q.weight", "q", "embd"),
    block("self_attn.k_proj.weight", "attn_k.weight", "kv", "embd"),
    block("self_attn.v_proj.weight", "attn_v.weight", "kv", "embd"),
    block("self_attn.o_proj.weight", "attn_output.weight", "embd", "q"),
)

ARCHITECTURE = Architecture(
    name="qwen2",
    rows=(
        *llama.EMBEDDING_AND_OUTPUT,
        *llama.NORMS,
        *llama.FEED_FORWARD,
        *ATTENTION,
        block("self_attn.q_proj.bias", "attn_q.bias", "q", optional=True),
        block("self_attn.k_proj.bias", "attn_k.bias", "kv", optional=True),
        block("self_attn.v_proj.bias", "attn_v.bias", "kv", optional=True),
    ),
    metadata=lambda config: {**metadata.decoder(config, "qwen2"), "general.file_type": Value.uint32(0)},
    check=check,
)
