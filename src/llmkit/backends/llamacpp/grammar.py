"""Grammars (GBNF) by llama.cpp's own sampler: which tokens may come next.

Text that is no grammar may crash the engine, and its complaints go past the log to the terminal, so a text never seen
before is first tried in a child process. Of tokens that a grammar does not allow the engine must not be told: it would
abort.
"""

from __future__ import annotations

import ctypes as C
import os
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import engine
from ...errors import EngineError, LlmkitError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import LlamaCpp

_PARSE = "llmkit.backends.llamacpp.grammar:parse"
_TIMEOUT = 60.0
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
_GBNF = 'A grammar is GBNF text with a rule named root, as: root ::= "yes" | "no"'
_good: set[tuple[str, str]] = set()  # (file, text) that the engine took


class LlamaCppGrammar:
    """A Grammar. Made by `LlamaCpp.grammar`."""

    def __init__(self, backend: LlamaCpp, text: str) -> None:
        key = (str(backend.file.path), text)
        if key not in _good:
            _try(*key)
            _good.add(key)
        self._backend = backend
        self._llama = backend.engine.llama
        vocab = self._llama.llama_model_get_vocab(backend.model)
        with backend.engine.capture_log() as lines:
            self._sampler: Any = self._llama.llama_sampler_init_grammar(vocab, text.encode(), b"root")
        if not self._sampler:
            raise backend.engine.error("the engine does not take this grammar", lines, _GBNF)

    def allows(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
        """See Grammar. Raises ValueError for ids outside the vocabulary."""
        ids = np.asarray(tokens, np.int32)
        if ids.size and not 0 <= ids.min() <= ids.max() < self._backend.info.n_vocab:
            raise ValueError(f"a token is not in a vocabulary of {self._backend.info.n_vocab}")
        candidates = np.zeros(len(ids), _CANDIDATE)
        candidates["id"] = ids
        if len(ids):
            self._llama.llama_sampler_apply(self._open, C.byref(_candidates(self._llama, candidates)))
        allowed: NDArray[np.bool_] = candidates["logit"] > -np.inf
        return allowed

    def accept(self, token: int) -> None:
        """See Grammar."""
        if not self.allows([token])[0]:
            raise EngineError(f"token {token} ({self._backend.piece(token)!r}) may not come next in this grammar")
        self._llama.llama_sampler_accept(self._open, token)

    @property
    def _open(self) -> Any:
        if not self._sampler:
            raise EngineError("the grammar has been closed")
        return self._sampler

    def close(self) -> None:
        """See Grammar. A second call does nothing."""
        sampler, self._sampler = self._sampler, None  # first: Ctrl-C after the freeing must not free it again
        if sampler:
            self._llama.llama_sampler_free(sampler)


def _candidates(llama: Any, rows: NDArray[Any]) -> Any:
    """The engine's llama_token_data_array on an array of ours."""
    data = C.cast(rows.ctypes.data, llama.llama_token_data_p)
    return llama.llama_token_data_array(data=data, size=len(rows), selected=-1, sorted=False)


def _try(path: str, text: str) -> None:
    """Raise LlmkitError when the engine does not take `text`, or does not survive it."""
    if "\0" in text or not text.strip():
        raise LlmkitError("the grammar holds a NUL character" if text.strip() else "the grammar is empty", _GBNF)
    try:
        words = engine.run_in_child(function=_PARSE, arguments={"path": path, "text": text}, timeout=_TIMEOUT)
    except engine.EngineDied as error:
        reason = error.message.partition("\n")[0].removeprefix(f"{_PARSE}: ")
        raise LlmkitError(f"the engine does not survive this grammar: {reason}", _GBNF) from error
    if words is not None:
        raise LlmkitError(f"the engine does not take this grammar: {words}", _GBNF)


def parse(path: str, text: str) -> str | None:
    """In the child: None when the engine takes the grammar, else its words."""
    loaded = engine.load()
    llama = loaded.llama
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise loaded.error(f"{path}: the engine cannot load its vocabulary")
    loaded.log.echo = None
    with tempfile.TemporaryFile() as said, loaded.capture_log() as lines:
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            sampler = llama.llama_sampler_init_grammar(llama.llama_model_get_vocab(model), text.encode(), b"root")
            if sampler:
                llama.llama_sampler_apply(sampler, C.byref(_candidates(llama, np.zeros(1, _CANDIDATE))))
        finally:
            os.dup2(stderr, 2)
        said.seek(0)
        printed = said.read().decode("utf-8", "replace")
    if sampler:
        return None
    words = [line.strip() for line in [*printed.splitlines(), *lines] if line.strip()]
    return (words or ["it does not say why"])[0].removeprefix("parse: ")[:300]
