"""Models on Apple's MLX, through the model definitions of mlx_lm: MLX's folders, checkpoint folders, GGUF files.

A GGUF is read by llmkit (packing.py) and its text by llama.cpp's own vocabulary, so tokens are the same on both
backends; a folder by folder.py and hf_tokenizer.py. On a CPU everything is computed in float32; a GPU computes
folders in what they are stored in. Run on Linux CPUs only: Metal and CUDA are untested.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import checkpoint, engine, gguf, mlx_engine
from ...errors import EngineError, Unsupported
from ...progress import OnProgress, ignore
from .. import Grammar, ModelInfo, Pooling, Rows, TokenKind, hf_tokenizer
from ..hf_tokenizer import HfTokenizer
from ..llamacpp import LlamaCpp, vetting
from . import folder as folders
from . import model as models
from . import packing
from .session import MlxSession, one_at_a_time, require

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


def load(
    path: Path, *, n_threads: int | None = None, gpu_layers: int | None = None, on_progress: OnProgress = ignore
) -> MlxBackend:
    """Load the folder or GGUF file `path`. MLX chooses its threads; `gpu_layers` 0 keeps it off the GPU.

    Errors as `backends.load`.
    """
    mlx = mlx_engine.load()
    device = "cpu" if gpu_layers == 0 else mlx.device
    if path.is_dir():
        parts = folders.read(path, on_progress)
        tokenizer = hf_tokenizer.read(path, int(parts.arguments["vocab_size"]))
        return MlxBackend(path, parts, tokenizer, device=device)
    file = gguf.read(path)
    parts = packing.read(file, on_progress)
    return MlxBackend(path, parts, _vocabulary(file), device=device)


def _describe(folder: Path, parts: models.Parts, tokenizer: HfTokenizer, engine_name: str) -> ModelInfo:
    """What is known of a folder; of a GGUF the engine tells."""
    origin, ends, arguments = checkpoint.origin_of(folder), tokenizer.ends, parts.arguments
    return ModelInfo(
        architecture=parts.module.removesuffix("_text"),
        name=origin.repo.rpartition("/")[2] if origin else folder.resolve().name,
        n_layer=int(arguments["num_hidden_layers"]),
        n_embd=int(arguments["hidden_size"]),
        n_vocab=tokenizer.n_vocab,
        n_ctx_train=int(arguments["max_position_embeddings"]),
        n_params=parts.n_params,
        weight_nbytes=parts.weight_nbytes,
        chat_template=tokenizer.chat_template,
        bos=ends.bos,
        eos=ends.eos,
        eos_token=ends.eos_token,
        add_bos=ends.add_bos,
        n_head=int(arguments["num_attention_heads"]),
        engine=engine_name,
    )


def _vocabulary(file: gguf.GgufFile) -> LlamaCpp:
    """llama.cpp with the file's vocabulary and header, and none of its weights (vocab_only tells too little)."""
    safe = engine.safe_model_params()
    vetting.vet(file, safe)
    loaded = engine.load()
    model_params = loaded.llama.llama_model_default_params()
    for name, value in safe.items():
        setattr(model_params, name, value)
    model_params.no_alloc, model_params.load_mode = True, loaded.llama.LLAMA_LOAD_MODE_NONE
    model_params.n_gpu_layers = 0
    with loaded.capture_log() as lines, engine.held_interrupts():
        model = loaded.llama.llama_model_load_from_file(os.fsencode(file.path), model_params)
    if not model:
        raise loaded.error(f"{file.path}: the engine cannot load its vocabulary", lines)
    return LlamaCpp(file, model, 1)


class MlxBackend:
    """A Backend. Made by `load`."""

    def __init__(self, path: Path, parts: models.Parts, text: LlamaCpp | HfTokenizer, *, device: str) -> None:
        self.path = path
        self.mlx = mlx_engine.load()
        self.module: Any = mlx_engine.architecture(parts.module)
        self._text = text
        self.device = device
        self._device = self.mlx.core.cpu if device == "cpu" else self.mlx.core.gpu
        self._sessions: weakref.WeakSet[MlxSession] = weakref.WeakSet()
        with self._on_device():
            self._model: Any = models.build(parts, path, float32=device == "cpu")
        kinds = {str(each.dtype).rpartition(".")[2] for each in self.mlx.flatten(self._model.parameters()).values()}
        floats = sorted(kind for kind in kinds if "float" in kind)
        self._entering = models.embedding_factor(parts) if floats == ["float32"] else 1.0
        engine_name = f"MLX {self.mlx.version} ({device}, {' and '.join(floats)})"
        if isinstance(text, LlamaCpp):
            self.info = replace(text.info, engine=engine_name)
        else:
            self.info = _describe(path, parts, text, engine_name)

    @property
    def model(self) -> Any:
        """mlx_lm's model. Raises EngineError after `close`."""
        if self._model is None:
            raise EngineError(f"{self.path}: the model has been closed")
        return self._model

    @property
    def inner(self) -> Any:
        """The model without its head: embedding, layers, norm."""
        return self.model.model

    # ── text ──

    def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """See Backend."""
        return self._text.encode(text, special=special, bos=bos)

    def piece(self, token: int) -> bytes:
        """See Backend. Raises ValueError for ids outside the vocabulary."""
        return self._text.piece(token)

    def kind(self, token: int) -> TokenKind:
        """See Backend."""
        return self._text.kind(token)

    def grammar(self, text: str) -> Grammar:
        """See Backend: llama.cpp's, of a GGUF; folders have none."""
        if not isinstance(self._text, LlamaCpp):
            raise Unsupported(
                f"{self.path}: there are no grammars for folders on the backend mlx", "Use a GGUF: llama.cpp has them."
            )
        return self._text.grammar(text)

    # ── numbers ──

    def session(self, context: int, *, inspect: bool = False, sequences: int = 1) -> MlxSession:
        """See Backend. The context is a promise kept by counting: caches grow as they are filled."""
        require(context, sequences)
        session = MlxSession(self, context, inspect, sequences)
        self._sessions.add(session)
        return session

    def make_cache(self) -> list[Any]:
        """An empty KV cache: one a layer."""
        if hasattr(self.model, "make_cache"):
            made: list[Any] = self.model.make_cache()
            return made
        kind = mlx_engine.architecture("cache").KVCache
        return [kind() for _ in self.model.layers]

    def forward(self, tokens: Sequence[int], cache: list[Any] | None, wanted: Rows) -> Any:
        """Logits [rows, V] of a pass, not evaluated yet; the head sees only the rows `wanted`."""
        core = self.mlx.core
        with self._on_device():
            hidden = self._normed(tokens, cache)
            rows = {"all": hidden, "last": hidden[-1:], "none": hidden[:0]}[wanted]
            if wanted == "none":
                return core.zeros((0, self.info.n_vocab))
            return self._head(rows)

    def _normed(self, tokens: Sequence[int], cache: list[Any] | None) -> Any:
        """The last layer's output after the final norm, [T, d]."""
        ids = self.mlx.core.array([list(tokens)])
        entering = self.inner.embed_tokens(ids)
        if self._entering != 1.0:
            entering = entering * self._entering
        return self.inner(ids, cache, input_embeddings=entering)[0]

    def _head(self, rows: Any) -> Any:
        head = self.model.get("lm_head")
        return head(rows) if head is not None else self.inner.embed_tokens.as_linear(rows)

    def evaluate(self, arrays: Sequence[Any]) -> None:
        """Compute `arrays`. Raises EngineError with MLX's words."""
        try:
            with self._on_device():
                self.mlx.core.eval(arrays)
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"{self.path}: MLX failed: {error}") from error

    def _on_device(self) -> AbstractContextManager[Any]:
        stream: AbstractContextManager[Any] = self.mlx.core.stream(self._device)
        return stream

    def embed(self, tokens: Sequence[int]) -> Floats:
        """See Backend. Raises ValueError for ids outside the table."""
        self._check(tokens)
        if not tokens:
            return np.empty((0, self.info.n_embd), np.float32)
        with one_at_a_time, self._on_device():
            return self._array(self.inner.embed_tokens(self.mlx.core.array(list(tokens))))

    def unembed(self, hidden: Floats) -> Floats:
        """See Backend: exact, quantized output matrices included."""
        rows = np.ascontiguousarray(hidden, np.float32)
        if not len(rows):
            return np.empty((0, self.info.n_vocab), np.float32)
        with one_at_a_time, self._on_device():
            return self._array(self._head(self.inner.norm(self.mlx.core.array(rows))))

    def pool(self, tokens: Sequence[int], how: Pooling | None = None) -> Floats:
        """See Backend."""
        self._check(tokens)
        if not tokens:
            raise ValueError("expected one or more tokens")
        with one_at_a_time, self._on_device():
            rows = self._array(self._normed(tokens, None))
        chosen = how or self.info.pooling or "mean"
        pooled: Floats = rows.mean(0, dtype=np.float32) if chosen == "mean" else rows[0 if chosen == "cls" else -1]
        return pooled

    def _check(self, tokens: Sequence[int]) -> None:
        if any(not 0 <= token < self.info.n_vocab for token in tokens):
            raise ValueError(f"a token is not in a vocabulary of {self.info.n_vocab}")

    def _array(self, values: Any) -> Floats:
        copied: Floats = self.mlx.to_numpy(values)
        return copied

    def close(self) -> None:
        """See Backend. A second call does nothing."""
        for session in list(self._sessions):
            session.close()
        if self._model is not None:
            self._model = None
            self.mlx.core.clear_cache()
        if isinstance(self._text, LlamaCpp):
            self._text.close()
