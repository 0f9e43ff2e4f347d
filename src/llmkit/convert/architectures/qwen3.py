"""Qwen3, dense: as Qwen2 without biases, with a norm on each head's q and k, and head_dim stated on its own."""

from __future__ import annotations

from ...gguf import Value
from .. import metadata
from . import Architecture, llama, qwen2
from .llama import block

ARCHITECTURE = Architecture(
    name="qwen3",
    rows=(
        *llama.EMBEDDING_AND_OUTPUT,
        *llama.NORMS,
        *llama.FEED_FORWARD,
        *qwen2.ATTENTION,
        block("self_attn.q_norm.weight", "attn_q_norm.weight", "head"),
        block("self_attn.k_norm.weight", "attn_k_norm.weight", "head"),
    ),
    metadata=lambda config: {**metadata.decoder(config, "qwen3"), "general.file_type": Value.uint32(0)},
    check=qwen2.check,
    defaults={"head_dim": 128},
)
