"""GGUF models through llama.cpp: our own binding of model, context and batch on the engine's C functions.

A file never seen before is first loaded without its weights in a child process, where the engine may crash as it
likes. What the KV cache can take back is asked of the engine (sliding windows and recurrent states cannot rewind
freely). Hidden states come through the scheduler's callback, see tap.py.
"""

from __future__ import annotations

import ctypes as C
import os
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import engine, gguf, settings
from ..errors import EngineError, InvalidModel, Unsupported
from ..progress import OnProgress, Progress, ignore
from . import Eval, ModelInfo, Rows, vetting
from .tap import Tap

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_BATCH = 512  # tokens per call of the engine
# Rows of logits per call: the engine reserves this many × vocabulary × 4 bytes
_OUTPUT_ROWS = 64
_MAX_CONTEXT = 2**31 - 1  # the engine's position type is int32; what is larger would wrap
_NO_VOCABULARY = 0  # LLAMA_VOCAB_TYPE_NONE


def load(
    path: Path, *, n_threads: int | None = None, gpu_layers: int | None = None, on_progress: OnProgress = ignore
) -> LlamaCpp:
    """Load the GGUF file `path` (the first part of a split one). Errors as `backends.load`."""
    file = gguf.read(path)
    params = engine.safe_model_params()
    vetting.vet(file, params)
    return LlamaCpp(file, _load_model(file, params, gpu_layers, on_progress), n_threads or settings.threads())


def _load_model(file: gguf.GgufFile, params: dict[str, bool], gpu_layers: int | None, on_progress: OnProgress) -> Any:
    loaded = engine.load()
    llama = loaded.llama
    model_params = llama.llama_model_default_params()
    for name, value in params.items():
        setattr(model_params, name, value)
    if gpu_layers is not None:
        model_params.n_gpu_layers = gpu_layers
    total = sum(tensor.nbytes for tensor in file.tensors.values())
    raised: list[BaseException] = []
    with loaded.capture_log() as lines, engine.held_interrupts() as held:

        def report(share: float, _: Any) -> bool:
            try:
                on_progress(Progress("loading", round(share * total), total))
            except BaseException as error:  # must not pass through C
                raised.append(error)
            return not raised and not held  # False ends the loading

        model_params.progress_callback = llama.llama_progress_callback(report)
        model = llama.llama_model_load_from_file(os.fsencode(file.path), model_params)
        if model and (raised or held):
            llama.llama_model_free(model)
    if raised:
        raise raised[0]
    if not model:
        raise loaded.error(f"{file.path}: the engine cannot load it", lines)
    return model


class LlamaCpp:
    """A Backend. Made by `load`."""

    def __init__(self, file: gguf.GgufFile, model: Any, n_threads: int) -> None:
        self.engine = engine.load()
        self.n_threads = n_threads
        self.file = file
        self._model: Any = model
        self._vocab = self.engine.llama.llama_model_get_vocab(model)
        self._sessions: weakref.WeakSet[LlamaCppSession] = weakref.WeakSet()
        self._pieces: dict[int, bytes] = {}
        self.info = self._describe()

    def _describe(self) -> ModelInfo:
        llama, model, vocab = self.engine.llama, self._model, self._vocab
        n_vocab = llama.llama_vocab_n_tokens(vocab)
        bos, eos = llama.llama_vocab_bos(vocab), llama.llama_vocab_eos(vocab)
        template = self.file.get("tokenizer.chat_template")
        has_vocabulary = llama.llama_vocab_type(vocab) != _NO_VOCABULARY
        ends = filter(lambda token: llama.llama_vocab_is_eog(vocab, token), range(n_vocab if has_vocabulary else 0))
        return ModelInfo(
            architecture=str(self.file.get("general.architecture", "")),
            name=str(self.file.get("general.name") or self.file.path.stem),
            n_layer=llama.llama_model_n_layer(model),
            n_embd=llama.llama_model_n_embd(model),
            n_vocab=n_vocab,
            n_ctx_train=llama.llama_model_n_ctx_train(model),
            n_params=llama.llama_model_n_params(model),
            weight_nbytes=llama.llama_model_size(model),
            chat_template=template if isinstance(template, str) else None,
            bos=bos if bos >= 0 else None,
            eos=frozenset(ends),
            eos_token=eos if eos >= 0 else None,
            add_bos=bool(llama.llama_vocab_get_add_bos(vocab)),
        )

    @property
    def model(self) -> Any:
        """The engine's pointer. Raises EngineError after `close`."""
        if self._model is None:
            raise EngineError(f"{self.file.path}: the model has been closed")
        return self._model

    def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """See Backend. Raises Unsupported for files without a vocabulary (the engine would abort)."""
        self._require_vocabulary()
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8  # a token is at least a byte, but a leading space may be added
        tokens = (C.c_int32 * room)()
        count = self.engine.llama.llama_tokenize(self._vocab, raw, len(raw), tokens, room, False, special)
        if count < 0:
            tokens = (C.c_int32 * -count)()
            count = self.engine.llama.llama_tokenize(self._vocab, raw, len(raw), tokens, -count, False, special)
        start = [self.info.bos] if bos and self.info.add_bos and self.info.bos is not None else []
        return start + tokens[: max(0, count)]

    def piece(self, token: int) -> bytes:
        """See Backend. Raises ValueError for ids outside the vocabulary."""
        found = self._pieces.get(token)
        if found is None:
            self._require_vocabulary()
            if not 0 <= token < self.info.n_vocab:
                raise ValueError(f"token {token} is not in a vocabulary of {self.info.n_vocab}")
            found = self._pieces[token] = self._read_piece(token)
        return found

    def _read_piece(self, token: int) -> bytes:
        to_piece, size = self.engine.llama.llama_token_to_piece, 64
        buffer = C.create_string_buffer(size)
        count = to_piece(self._vocab, token, buffer, size, 0, True)
        if count < 0:
            buffer = C.create_string_buffer(-count)
            count = to_piece(self._vocab, token, buffer, -count, 0, True)
        return buffer.raw[: max(0, count)]

    def _require_vocabulary(self) -> None:
        if self.engine.llama.llama_vocab_type(self.engine.llama.llama_model_get_vocab(self.model)) == _NO_VOCABULARY:
            raise Unsupported(f"{self.file.path}: has no vocabulary, so text cannot be turned into tokens")

    def session(self, context: int, *, inspect: bool = False) -> LlamaCppSession:
        """See Backend. Raises EngineError when the context does not fit into memory, Unsupported for encoders."""
        session = LlamaCppSession(self, context, Tap(self.engine) if inspect else None)
        self._sessions.add(session)
        return session

    def embed(self, tokens: Sequence[int]) -> Floats:
        """See Backend. Read from the file, not from the engine, so no evaluation is needed."""
        info, rows = self._embeddings
        if any(not 0 <= token < info.shape[0] for token in tokens):
            raise ValueError(f"a token is not in a vocabulary of {info.shape[0]}")
        blocks = rows[np.asarray(tokens, np.int64)]
        found = np.empty((len(tokens), info.shape[1]), np.float32)
        if found.size:
            self.engine.to_float(info.type.ggml_id, blocks.ctypes.data, found.ctypes.data, found.size)
        return found

    @cached_property
    def _embeddings(self) -> tuple[gguf.TensorInfo, NDArray[np.uint8]]:
        info = self.file.tensors.get("token_embd.weight")
        if info is None or len(info.shape) != 2:
            raise InvalidModel(f"{self.file.path}: has no table token_embd.weight")
        shape = (info.shape[0], info.nbytes // info.shape[0])
        return info, np.memmap(info.path, np.uint8, "r", info.offset, shape)

    def close(self) -> None:
        """See Backend. A second call does nothing."""
        for session in list(self._sessions):
            session.close()
        if self._model is not None:
            self.engine.llama.llama_model_free(self._model)
            self._model = None


class LlamaCppSession:
    """A Session. Made by `LlamaCpp.session`."""

    def __init__(self, backend: LlamaCpp, context: int, tap: Tap | None) -> None:
        if not 1 <= context <= _MAX_CONTEXT:
            raise Unsupported(f"a context of {context} tokens: expected 1 to {_MAX_CONTEXT}")
        self.n = 0
        self.context = context
        self._backend = backend
        self._engine = backend.engine
        self._tap = tap
        self._context = self._make_context()
        llama = self._engine.llama
        self._memory = llama.llama_get_memory(self._context)
        self._n_swa = llama.llama_model_n_swa(backend.model)
        self._batch = llama.llama_batch_init(_BATCH, 0, 1)
        for i in range(_BATCH):
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, 0
        if not self._memory:
            self.close()
            raise Unsupported(f"{backend.file.path}: {backend.info.architecture} models do not generate text")

    def _make_context(self) -> Any:
        llama = self._engine.llama
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self.context, _BATCH, _BATCH
        params.n_outputs_max = _OUTPUT_ROWS
        params.n_threads = params.n_threads_batch = self._backend.n_threads
        params.swa_full = False  # keep only the window of sliding-window layers
        if self._tap is not None:
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it hides the attention weights
            params.cb_eval = self._tap.callback
        with self._engine.capture_log() as lines, engine.held_interrupts():
            context = llama.llama_init_from_model(self._backend.model, params)
        if not context:
            what = f"{self._backend.file.path}: the engine cannot make a context of {self.context} tokens"
            raise self._engine.error(what, lines, "Try a smaller context.")
        made = llama.llama_n_ctx(context)
        if made < self.context:
            llama.llama_free(context)
            what = f"{self._backend.file.path}: asked for a context of {self.context} tokens, the engine made {made}"
            raise self._engine.error(what, lines, "Try a smaller context.")
        return context

    def eval(self, tokens: Sequence[int], *, logits: Rows = "last", layers: Sequence[int] = ()) -> Eval:
        """See Session. After an error or Ctrl-C the session holds what it held before the failed batch."""
        self._check(tokens, layers)
        all_rows = logits == "all" or bool(layers)  # the last layer computes only the rows asked for
        size = _OUTPUT_ROWS if all_rows else _BATCH
        parts: list[Floats] = []
        if self._tap is not None:
            self._tap.want([layer for layer in layers if layer >= 0])
        for start in range(0, len(tokens), size):
            chunk = tokens[start : start + size]
            last = start + len(chunk) == len(tokens)
            self._decode(chunk, "all" if all_rows else "last" if last and logits == "last" else "none")
            if logits == "all":
                parts.append(self._logits(len(chunk)))
            elif logits == "last" and last:
                parts.append(self._logits(len(chunk) if all_rows else 1)[-1:])
        rows = np.concatenate(parts) if parts else np.empty((0, self._backend.info.n_vocab), np.float32)
        return Eval(rows, self._hidden(tokens, layers))

    def _check(self, tokens: Sequence[int], layers: Sequence[int]) -> None:
        if self._context is None:
            raise EngineError(f"{self._backend.file.path}: the session has been closed")
        info = self._backend.info
        if not tokens or any(not 0 <= token < info.n_vocab for token in tokens):
            raise ValueError(f"expected one or more tokens of a vocabulary of {info.n_vocab}")
        if layers and self._tap is None:
            raise ValueError("layers can be asked for only in a session made with inspect=True")
        if any(not -1 <= layer < info.n_layer for layer in layers):
            raise ValueError(f"layers {list(layers)}: expected -1 (the embeddings) to {info.n_layer - 1}")
        if self.n + len(tokens) > self.context:
            raise EngineError(
                f"the context is full: it holds {self.n} of {self.context} tokens, {len(tokens)} more were to follow",
                "Use a larger context, or begin anew.",
            )

    def _decode(self, tokens: Sequence[int], rows: Rows) -> None:
        """One call of the engine: at most _BATCH tokens, logits of `rows` of them."""
        batch = self._batch
        batch.n_tokens = count = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self.n + i
            batch.logits[i] = rows == "all" or (rows == "last" and i == count - 1)
        with self._engine.capture_log() as lines, engine.held_interrupts() as held:
            code = (
                self._interruptible_decode(held)
                if count > 15
                else self._engine.llama.llama_decode(self._context, batch)
            )
            if code == 0:
                self.n += count
            elif not self.rewind(self.n):
                self.rewind(0)
        if code != 0:
            raise self._engine.error(f"the engine failed to evaluate {count} tokens (llama_decode: {code})", lines)
        if self._tap is not None:
            self._tap.check()

    def _interruptible_decode(self, held: list[int]) -> int:
        """llama_decode, given up within the batch when an interrupt is held (CPUs only; single tokens are short)."""
        llama = self._engine.llama
        abort = llama.ggml_abort_callback(lambda _: bool(held))
        llama.llama_set_abort_callback(self._context, abort, None)
        code = int(llama.llama_decode(self._context, self._batch))
        llama.llama_set_abort_callback(self._context, llama.ggml_abort_callback(), None)
        return code

    def _logits(self, rows: int) -> Floats:
        """A copy of the `rows` rows of logits of the last call."""
        pointer = self._engine.llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (rows, self._backend.info.n_vocab)).copy()

    def _hidden(self, tokens: Sequence[int], layers: Sequence[int]) -> dict[int, Floats]:
        if self._tap is None or not layers:
            return {}
        found = self._tap.take(len(tokens))
        if -1 in layers:
            found[-1] = self._backend.embed(tokens)
        return {layer: found[layer] for layer in layers}

    def rewind(self, n: int) -> bool:
        """See Session. The engine is asked what it still holds: a window that has slid on cannot slide back."""
        if not 0 <= n <= self.n:
            raise ValueError(f"cannot rewind {self.n} tokens to {n}")
        llama = self._engine.llama
        if n == 0:
            llama.llama_memory_clear(self._memory, True)
        elif n < self.n or llama.llama_memory_seq_pos_max(self._memory, 0) >= n:
            oldest = llama.llama_memory_seq_pos_min(self._memory, 0)
            if oldest > max(0, n - max(1, self._n_swa)) or not llama.llama_memory_seq_rm(self._memory, 0, n, -1):
                return False
        self.n = n
        return True

    def close(self) -> None:
        """See Session. A second call does nothing."""
        if self._context is not None:
            self._engine.llama.llama_batch_free(self._batch)
            self._engine.llama.llama_free(self._context)
            self._context = None
