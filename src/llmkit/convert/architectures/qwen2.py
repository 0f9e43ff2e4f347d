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
    layer_types = config.values.get("layer_types") or []
    if config.values.get("use_sliding_window") or "sliding_attention" in layer_types:
        window = config.number("sliding_window")
        raise Unsupported(
            f"{config.path}: 'use_sliding_window' with a window of {window}; the engine has none for this family"
        )
    return ()


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
