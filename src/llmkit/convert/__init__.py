"""Checkpoint → GGUF, without PyTorch and transformers: a draft, whose weights are read when they are written.

open_draft(folder or file) → quantize.plan(draft, [Recipe(quant("Q4_K_M"))], …) → quantize.run(plan)
"""

from __future__ import annotations

from pathlib import Path

from .. import checkpoint, gguf
from ..errors import ModelNotFound
from .draft import GgufDraft, from_checkpoint, from_gguf


def open_draft(path: Path, *, pre: str | None = None, tokenizer: bool = True) -> GgufDraft:
    """The draft of a checkpoint folder or of a GGUF file; see from_checkpoint. Raises what reading and mapping
    raise."""
    try:
        is_file = path.is_file()
    except OSError as error:  # a name no file can have
        raise ModelNotFound(f"{str(path)[:200]}: {error.strerror}") from None
    if is_file:
        return from_gguf(gguf.read(path))
    return from_checkpoint(checkpoint.read(path), pre=pre, tokenizer=tokenizer)


__all__ = ["GgufDraft", "from_checkpoint", "from_gguf", "open_draft"]
