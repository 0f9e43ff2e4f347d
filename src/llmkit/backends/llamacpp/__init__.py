"""GGUF models through llama.cpp: our own binding of the model on the engine's C functions.

A file never seen before is first loaded without its weights in a child process, where the engine may crash as it
likes. Contexts are in session.py, what may be seen of layers in layers.py, the way from the residual
stream to logits in head.py, vectors of texts in pooling.py, grammars in grammars.py.
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

from ... import engine, gguf, settings
from ...errors import EngineError, InvalidModel, Unsupported
from ...progress import OnProgress, Progress, ignore
from .. import ModelInfo, Pooling, TokenKind
from . import grammar as grammars
from . import layers, pooling, vetting
from .head import Head
from .session import LlamaCppSession
from .table import Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_NO_VOCABULARY = 0  # LLAMA_VOCAB_TYPE_NONE
# Architectures the engine gives no memory, so that they cannot continue a text (llama.cpp: llama_model::create_memory)
_MEMORYLESS = frozenset(
    "bert jina-bert-v2 jina-bert-v3 nomic-bert nomic-bert-moe neo-bert eurobert modern-bert gemma-embedding"
    " wavtokenizer-dec dream llada llada-moe rnd1".split()
)
_POOLINGS: dict[object, Pooling] = {1: "mean", 2: "cls", 3: "last"}  # llama_pooling_type
# llama_token_attr, the first that is set
_KINDS: tuple[tuple[int, TokenKind], ...] = (
    (1 << 0, "unknown"), (1 << 1, "unused"), (1 << 3, "control"), (1 << 4, "user"), (1 << 5, "byte"),
)  # fmt: skip


def load(
    path: Path,
    *,
    n_threads: int | None = None,
    gpu_layers: int | None = None,
    on_progress: OnProgress = ignore,
    vocabulary_only: bool = False,
) -> LlamaCpp:
    """Load the GGUF file `path` (the first part of a split one). Errors as `backends.load`.

    With `vocabulary_only` no weights: text, tokens, embeddings and grammars, but nothing that must be evaluated.
    """
    file = gguf.read(path)
    params: dict[str, Any] = dict(engine.safe_model_params())
    vetting.vet(file, params)
    if vocabulary_only:  # not vocab_only: then the engine aborts when asked for its number of heads
        params |= {"no_alloc": True, "load_mode": engine.load().llama.LLAMA_LOAD_MODE_NONE}
        gpu_layers = 0
    model = _load_model(file, params, gpu_layers, on_progress)
    return LlamaCpp(file, model, n_threads or settings.threads(), vocabulary_only=vocabulary_only)


def _load_model(file: gguf.GgufFile, params: dict[str, Any], gpu_layers: int | None, on_progress: OnProgress) -> Any:
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

    def __init__(self, file: gguf.GgufFile, model: Any, n_threads: int, *, vocabulary_only: bool = False) -> None:
        self.engine = engine.load()
        self.n_threads = n_threads
        self.file = file
        self.vocabulary_only = vocabulary_only
        self._model: Any = model
        self._vocab = self.engine.llama.llama_model_get_vocab(model)
        self._has_vocabulary = self.engine.llama.llama_vocab_type(self._vocab) != _NO_VOCABULARY
        self._sessions: weakref.WeakSet[LlamaCppSession | grammars.LlamaCppGrammar] = weakref.WeakSet()
        self._pieces: dict[int, bytes] = {}
        self.info = self._describe()

    def _describe(self) -> ModelInfo:
        llama, model, vocab = self.engine.llama, self._model, self._vocab
        n_vocab = llama.llama_vocab_n_tokens(vocab)
        bos, eos = llama.llama_vocab_bos(vocab), llama.llama_vocab_eos(vocab)
        template = self.file.get("tokenizer.chat_template")
        tokens = range(n_vocab if self._has_vocabulary else 0)
        ends = filter(lambda token: llama.llama_vocab_is_eog(vocab, token), tokens)
        return ModelInfo(
            architecture=self.architecture,
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
            n_head=llama.llama_model_n_head(model),
            pooling=_POOLINGS.get(self.file.get(f"{self.architecture}.pooling_type")),
            generates=self.architecture not in _MEMORYLESS and not llama.llama_model_has_encoder(model),
            engine=f"llama.cpp {self.engine.version} ({self.engine.build})",
            files=tuple(self.file.paths),
        )

    @property
    def architecture(self) -> str:
        """The name metadata keys begin with."""
        return str(self.file.get("general.architecture", ""))

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
        if self.model and not self._has_vocabulary:
            raise Unsupported(f"{self.file.path}: has no vocabulary, so text cannot be turned into tokens")

    def kind(self, token: int) -> TokenKind:
        """See Backend. As the engine has it, which takes marks like <|im_end|> for control tokens in any file.

        Raises ValueError for ids outside the vocabulary.
        """
        self._require_vocabulary()
        if not 0 <= token < self.info.n_vocab:
            raise ValueError(f"token {token} is not in a vocabulary of {self.info.n_vocab}")
        attributes = self.engine.llama.llama_vocab_get_attr(self._vocab, token)
        return next((kind for bit, kind in _KINDS if attributes & bit), "normal")

    def session(self, context: int, *, inspect: bool = False, sequences: int = 1) -> LlamaCppSession:
        """See Backend. Raises EngineError when the context does not fit into memory, Unsupported for encoders."""
        session = LlamaCppSession(self, context, inspect=inspect, sequences=sequences)
        self._sessions.add(session)
        return session

    def make_context(self, params: Any, what: str, n_ctx: int) -> Any:
        """A context of the engine of at least `n_ctx` tokens. Raises EngineError naming `what` it is."""
        if self.vocabulary_only:
            raise Unsupported(f"{self.file.path}: loaded for its vocabulary alone, nothing can be evaluated")
        llama = self.engine.llama
        with self.engine.capture_log() as lines, engine.held_interrupts():
            context = llama.llama_init_from_model(self.model, params)
        if not context:
            raise self.engine.error(f"{self.file.path}: the engine cannot make {what}", lines, "Try a smaller context.")
        made = llama.llama_n_ctx(context)
        if made < n_ctx:
            llama.llama_free(context)
            what = f"{self.file.path}: asked for {what}, the engine made {made}"
            raise self.engine.error(what, lines, "Try a smaller context.")
        return context

    def require_generation(self) -> None:
        """Raise Unsupported when the model cannot continue a text."""
        if not self.info.generates:
            raise self.cannot_generate()

    def cannot_generate(self) -> Unsupported:
        """The error for it."""
        return Unsupported(
            f"{self.file.path}: {self.architecture} models do not generate text",
            "They make vectors of texts: llmkit inspect embeddings.",
        )

    @cached_property
    def shown(self) -> layers.Shown:
        """What can be seen of its layers, tried once."""
        return layers.probe(self)

    @cached_property
    def head(self) -> Head:
        """The way from the residual stream to logits. Raises Unsupported where it is not known."""
        return Head(self.file, self.engine)

    def unembed(self, hidden: Floats) -> Floats:
        """See Backend. From the file's own matrix; the engine rounds activations, so its logits differ by a little."""
        if self.shown.why_no_lens:
            raise Unsupported(f"{self.file.path}: {self.shown.why_no_lens}")
        return self.head.logits(hidden)

    def pool(self, tokens: Sequence[int], how: Pooling | None = None) -> Floats:
        """See Backend. Of embedding models, the marks they expect around a text are added where they are missing."""
        return pooling.vector(self, tokens, how or self.info.pooling or "mean")

    def grammar(self, text: str) -> grammars.LlamaCppGrammar:
        """See Backend. Raises LlmkitError with the engine's words for text that is no GBNF."""
        self._require_vocabulary()
        made = grammars.LlamaCppGrammar(self, text)
        self._sessions.add(made)
        return made

    def embed(self, tokens: Sequence[int]) -> Floats:
        """See Backend. Read from the file, not from the engine, so no evaluation is needed; ranges in one piece."""
        return self._embeddings.take(tokens)

    @cached_property
    def _embeddings(self) -> Table:
        info = self.file.tensors.get("token_embd.weight")
        if info is None or len(info.shape) != 2:
            raise InvalidModel(f"{self.file.path}: has no table token_embd.weight")
        return Table(info, self.engine)

    def close(self) -> None:
        """See Backend. A second call does nothing."""
        for session in list(self._sessions):
            session.close()
        model, self._model = self._model, None  # first: Ctrl-C after the freeing must not free it again
        if model is not None:
            self.engine.llama.llama_model_free(model)
