"""What a tensor is for, told by its GGUF name (llama.cpp: src/llama-arch.cpp, tensor names)."""

from __future__ import annotations

import re

# role ← tensor name; the first match counts
_ROLES = (
    ("norms", re.compile(r"norm")),
    ("token embeddings", re.compile(r"^(per_layer_)?(token|position)_embd|^token_types")),
    ("output", re.compile(r"^output(_b)?\.")),
    ("experts", re.compile(r"_(ch)?exps\.|_shexp\.|ffn_gate_inp")),
    ("attention", re.compile(r"\.attn_")),
    ("feed-forward", re.compile(r"\.ffn_")),
    ("state space", re.compile(r"\.ssm_")),
    ("rope factors", re.compile(r"rope_(freqs|factors)")),
    ("other", re.compile(r"")),
)
ROLES = tuple(role for role, _ in _ROLES)


def role_of(name: str) -> str:
    """One of ROLES."""
    return next(role for role, pattern in _ROLES if pattern.search(name))
