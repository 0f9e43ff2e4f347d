"""One vector of a text: the rows of the last layer's normed output, averaged, or one of them.

The engine gives the rows (pooling NONE), the pooling is ours: its own takes each batch for a whole text. Encoders see
a text in both directions, so it goes to the engine in one batch.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import engine
from ...errors import LlmkitError, Unsupported
from .. import Pooling
from .session import Batch, Piece

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import LlamaCpp

    Floats = NDArray[np.float32]

# Tokens per call for models with an output matrix: the engine computes logits for each row, wanted or not
_DECODER_BATCH = 64


def vector(backend: LlamaCpp, tokens: Sequence[int], how: Pooling) -> Floats:
    """[d]. Raises Unsupported for models of another kind, LlmkitError for a text longer than an encoder reads."""
    if backend.engine.llama.llama_model_has_encoder(backend.model):
        raise Unsupported(f"{backend.file.path}: {backend.architecture} models (encoder and decoder) are not supported")
    if backend.info.pooling is not None:
        tokens = whole(backend, tokens)
    if not len(tokens) or not (0 <= min(tokens) and max(tokens) < backend.info.n_vocab):
        raise ValueError(f"expected one or more tokens of a vocabulary of {backend.info.n_vocab}")
    rows = _rows(backend, tokens)
    if how == "mean":
        return np.asarray(rows.mean(axis=0), np.float32)
    return np.array(rows[0 if how == "cls" else -1])


def whole(backend: LlamaCpp, tokens: Sequence[int]) -> list[int]:
    """`tokens` with the marks the vocabulary puts around a text (llama_tokenize, add_special), where missing."""
    llama, vocab = backend.engine.llama, backend.engine.llama.llama_model_get_vocab(backend.model)
    found = list(tokens)
    begins, ends = llama.llama_vocab_bos(vocab), -1
    if llama.llama_vocab_get_add_sep(vocab):
        ends = llama.llama_vocab_sep(vocab)
    elif llama.llama_vocab_get_add_eos(vocab):
        ends = llama.llama_vocab_eos(vocab)
    if llama.llama_vocab_get_add_bos(vocab) and begins >= 0 and found[:1] != [begins]:
        found.insert(0, begins)
    if ends >= 0 and found[-1:] != [ends]:
        found.append(ends)
    return found


def _rows(backend: LlamaCpp, tokens: Sequence[int]) -> Floats:
    """The last layer's normed output [T, d]."""
    size = _DECODER_BATCH if backend.info.generates else len(tokens)
    if not backend.info.generates and len(tokens) > backend.info.n_ctx_train:
        raise LlmkitError(
            f"the text is {len(tokens)} tokens long, this model reads at most {backend.info.n_ctx_train}",
            "Give it a shorter text, or parts of it.",
        )
    context = _context(backend, len(tokens), size)
    try:
        batch = Batch(backend.engine.llama, size)
        parts = [_evaluate(backend, context, batch, start, tokens[start : start + size])
                 for start in range(0, len(tokens), size)]  # fmt: skip
    finally:
        backend.engine.llama.llama_free(context)
    return np.concatenate(parts)


def _context(backend: LlamaCpp, n_tokens: int, size: int) -> Any:
    llama = backend.engine.llama
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_outputs_max = n_tokens, size, size, size
    params.n_threads = params.n_threads_batch = backend.n_threads
    params.embeddings, params.pooling_type = True, llama.LLAMA_POOLING_TYPE_NONE
    params.swa_full = False
    return backend.make_context(params, f"a context of {n_tokens} tokens", n_tokens)


def _evaluate(backend: LlamaCpp, context: Any, batch: Batch, start: int, tokens: Sequence[int]) -> Floats:
    llama = backend.engine.llama
    batch.fill([Piece(0, 0, tokens, len(tokens))], [start])
    with backend.engine.capture_log() as lines, engine.held_interrupts():
        code = llama.llama_decode(context, batch.struct)
        pointer = llama.llama_get_embeddings(context) if code == 0 else None
        if not pointer:
            raise backend.engine.error(f"the engine failed to read {len(tokens)} tokens (llama_decode: {code})", lines)
        rows = np.empty((len(tokens), llama.llama_model_n_embd_out(backend.model)), np.float32)
        C.memmove(rows.ctypes.data, pointer, rows.nbytes)
    return rows
