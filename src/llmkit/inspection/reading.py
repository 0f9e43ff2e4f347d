"""A model reading: a prompt in batches, then one token at a time, with a row of log-probabilities kept after each.

Rows lie in a temporary file, so that a model can be closed before the next is loaded, and memory stays small.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

import numpy as np

from ..backends import Backend, Session
from ..errors import EngineError, LlmkitError, Unsupported

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

HIDDEN_NBYTES, HIDDEN_TOKENS = 128 << 20, 128
_LOGITS_NBYTES = 64 << 20  # of logits at a time


class Reading:
    """Rows by number. A path of tokens after the prompt has, for each of its tokens, the row that predicts it.

    `hidden` holds the residual stream of the first `hidden_tokens` of the prompt by layer, where it can be read.
    """

    def __init__(self) -> None:
        self.hidden: dict[int, Floats] = {}
        self.hidden_tokens = 0
        self.why_no_hidden = ""
        self._prompt: list[int] = []
        self._count = 0
        self._width = 0
        self._rows = 0
        self._after: dict[tuple[int, ...], int] = {}  # tokens after the prompt → the row they lead to
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="llmkit-")

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def prompt_rows(self) -> list[int]:
        """Row k predicts the prompt's token k + 1."""
        return list(range(len(self._prompt) - 1))

    def rows_for(self, ids: Sequence[int]) -> list[int]:
        """The rows that predict the tokens of a path that has been read."""
        return [self._after[tuple(ids[:k])] for k in range(len(ids))]

    def knows(self, ids: Sequence[int]) -> bool:
        """Whether that path has been read, but for its last token, which predicts nothing."""
        return all(tuple(ids[:k]) in self._after for k in range(len(ids)))

    def row(self, index: int) -> Floats:
        """Log-probabilities [V]."""
        self._file.seek(index * 4 * self._width)
        return np.frombuffer(self._file.read(4 * self._width), np.float32)

    def begin(self, backend: Backend, prompt: Sequence[int], count: int) -> list[int]:
        """Read the prompt, then go on greedily for at most `count` tokens, which are returned."""
        self._prompt, self._count, self._width = list(prompt), count, backend.info.n_vocab
        session = self._session(backend, record=True)
        try:
            ids: list[int] = []
            while len(ids) < count:
                token = int(self.row(self._after[tuple(ids)]).argmax())
                ids.append(token)
                if token in backend.info.eos:
                    break
                if len(ids) < count:
                    self._read(session, ids)
            return ids
        finally:
            session.close()

    def follow(self, backend: Backend, ids: Sequence[int]) -> None:
        """Read another path after the prompt, one token at a time."""
        if self.knows(ids):
            return
        session = self._session(backend, record=False)
        try:
            for k in range(1, len(ids)):
                self._read(session, ids[:k])
        finally:
            session.close()

    def _read(self, session: Session, path: Sequence[int]) -> None:
        """Evaluate the path's last token, and keep its row if it is new."""
        logits = session.eval([path[-1]]).logits
        if tuple(path) not in self._after:
            self._after[tuple(path)] = self._keep(logits)

    def _keep(self, logits: Floats) -> int:
        """Write rows to the end of the file; returns the last one's number."""
        rows = logits.astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        self._file.seek(self._rows * 4 * self._width)
        try:
            self._file.write(rows.astype(np.float32).tobytes())
        except OSError as error:
            raise LlmkitError(f"{tempfile.gettempdir()}: cannot be written: {error.strerror}") from error
        self._rows += len(rows)
        return self._rows - 1

    def _session(self, backend: Backend, *, record: bool) -> Session:
        """A session that has read the prompt; with `record` its rows are kept, and its layers if they can be read."""
        room = len(self._prompt) + self._count + 1
        if record:
            self._read_layers(backend)
        session = backend.session(room, inspect=True)
        try:
            step = max(1, min(256, _LOGITS_NBYTES // (4 * self._width)))
            for start in range(0, len(self._prompt), step):
                logits = session.eval(self._prompt[start : start + step], logits="all" if record else "none").logits
                if record:
                    self._after[()] = self._keep(logits)
        except BaseException:
            session.close()
            raise
        return session

    def _read_layers(self, backend: Backend) -> None:
        info = backend.info
        most = HIDDEN_NBYTES // max(1, 4 * (info.n_layer + 1) * info.n_embd)
        self.hidden_tokens = min(HIDDEN_TOKENS, most, len(self._prompt))
        if not self.hidden_tokens:
            self.why_no_hidden = "they are too large"
            return
        session = backend.session(self.hidden_tokens, inspect=True)
        try:
            tokens = self._prompt[: self.hidden_tokens]
            self.hidden = dict(session.eval(tokens, logits="none", layers=range(-1, info.n_layer)).hidden)
        except (Unsupported, EngineError) as error:
            self.why_no_hidden = error.message.splitlines()[0]
        finally:
            session.close()
