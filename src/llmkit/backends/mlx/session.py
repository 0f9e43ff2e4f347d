"""A context on MLX: one KV cache a sequence, evaluated in chunks; hidden states and attention by passing through.

MLX has no hooks. For one pass the list of layers is replaced by one that remembers what comes out of each, and the
attention function of the model's module by its definition, which shows the weights. Both change what all sessions
share, so evaluations of one process happen one after another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EngineError, Unsupported
from .. import Eval, Part, Rows
from ..cells import Cells

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import MlxBackend

    Floats = NDArray[np.float32]

# tokens a pass: interrupts wait for one, and more than a few make MLX no faster on a CPU
CHUNKS = {"cpu": 16, "gpu": 512}
one_at_a_time = threading.RLock()


class Passing:
    """A layer that keeps what comes out of it, in `found` under its number; -1 is what came into the first."""

    def __init__(self, layer: Any, index: int, record: Record) -> None:
        self.__dict__.update(layer=layer, index=index, record=record)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's own result."""
        record: Record = self.record
        record.layer = self.index
        if self.index == 0 and -1 in record.hidden_of:
            record.hidden[-1] = x
        out = self.layer(x, *args, **kwargs)
        if self.index in record.hidden_of:
            record.hidden[self.index] = out
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)


class Record:
    """What one pass is to show: hidden states and attention weights of these layers."""

    def __init__(self, mlx: Any, hidden_of: Sequence[int], attention_of: Sequence[int]) -> None:
        self.core = mlx.core
        self.hidden_of, self.attention_of = frozenset(hidden_of), frozenset(attention_of)
        self.hidden: dict[int, Any] = {}
        self.attention: dict[int, Any] = {}
        self.layer = -1

    @contextmanager
    def recording(self, backend: MlxBackend) -> Iterator[None]:
        """Inside, passes of the model are recorded."""
        inner, module = backend.inner, backend.module
        layers, fused = inner.layers, module.scaled_dot_product_attention
        try:
            inner.layers = [Passing(layer, index, self) for index, layer in enumerate(layers)]
            if self.attention_of:
                module.scaled_dot_product_attention = self._attend(fused)
            yield
        finally:
            inner.layers, module.scaled_dot_product_attention = layers, fused

    def _attend(self, fused: Any) -> Any:
        """Attention by its definition in the layers asked for: softmax(q k' · scale + mask) v."""
        core = self.core

        def attend(q: Any, k: Any, v: Any, cache: Any = None, scale: float = 1.0, mask: Any = None, **more: Any) -> Any:
            if self.layer not in self.attention_of:
                return fused(q, k, v, cache=cache, scale=scale, mask=mask, **more)
            repeat = q.shape[1] // k.shape[1]
            k, v = core.repeat(k, repeat, axis=1), core.repeat(v, repeat, axis=1)
            scores = (q * scale) @ k.swapaxes(-1, -2)
            n, m = scores.shape[-2:]
            if isinstance(mask, str):  # "causal"
                mask = core.tril(core.ones((n, m), dtype=core.bool_), m - n)
            if mask is not None:
                scores = core.where(mask, scores, -core.inf) if mask.dtype == core.bool_ else scores + mask
            weights = core.softmax(scores.astype(core.float32), axis=-1)
            self.attention[self.layer] = weights[0]
            return weights.astype(v.dtype) @ v

        return attend


class MlxSession:
    """A Session. Made by `MlxBackend.session`."""

    def __init__(self, backend: MlxBackend, context: int, inspect: bool, sequences: int) -> None:
        self.context, self.sequences = context, sequences
        self._backend: MlxBackend | None = backend
        self._inspect = inspect
        self._caches: list[list[Any]] = [backend.make_cache() for _ in range(sequences)]
        self._cells = Cells(sequences)

    @property
    def n(self) -> int:
        """Tokens in sequence 0."""
        return self._cells.lengths[0]

    def length(self, sequence: int = 0) -> int:
        """See Session."""
        return self._cells.lengths[sequence]

    def eval(
        self, tokens: Sequence[int], *, logits: Rows = "last", layers: Sequence[int] = (), attention: Sequence[int] = ()
    ) -> Eval:
        """See Session. Attention is of all tokens at once: heads × tokens² numbers a layer, by its definition."""
        backend = self._check([Part(0, tokens, logits)])
        if (layers or attention) and not self._inspect:
            raise ValueError("layers and attention can be asked for only in a session made with inspect=True")
        last = backend.info.n_layer - 1
        if any(not -1 <= layer <= last for layer in layers) or any(not 0 <= layer <= last for layer in attention):
            raise ValueError(f"layers {[*layers, *attention]}: expected -1 (the embeddings) to {last}")
        if attention and self.n:
            raise ValueError("attention needs an empty session")
        record = Record(backend.mlx, layers, attention) if layers or attention else None
        return self._append(Part(0, tokens, logits), record)

    def eval_parts(self, parts: Sequence[Part]) -> list[Floats]:
        """See Session. MLX has no gain from batches of sequences on a CPU: one after another."""
        self._check(parts)
        return [self._append(part, None).logits for part in parts]

    def _check(self, parts: Sequence[Part]) -> MlxBackend:
        backend = self._backend
        if backend is None:
            raise EngineError("the session has been closed")
        n_vocab = backend.info.n_vocab
        for part in parts:
            if not 0 <= part.sequence < self.sequences:
                raise ValueError(f"sequence {part.sequence}: the session has {self.sequences}, numbered from 0")
            if not part.tokens or any(not 0 <= token < n_vocab for token in part.tokens):
                raise ValueError(f"expected one or more tokens of a vocabulary of {n_vocab}")
        more = sum(len(part.tokens) for part in parts)
        if self._cells.used + more > self.context:
            raise EngineError(
                f"the context is full: it holds {self._cells.used} of {self.context} tokens, {more} more were to come",
                "Use a larger context, or begin anew.",
            )
        return backend

    def _append(self, part: Part, record: Record | None) -> Eval:
        backend, sequence, tokens = self._backend, part.sequence, list(part.tokens)
        if backend is None:
            raise EngineError("the session has been closed")
        rows: list[Floats] = []
        hidden: dict[int, list[Floats]] = {layer: [] for layer in record.hidden_of} if record else {}
        size = len(tokens) if record and record.attention_of else CHUNKS[backend.device]
        with one_at_a_time:
            for start in range(0, len(tokens), size):
                chunk = tokens[start : start + size]
                last = start + len(chunk) == len(tokens)
                wanted: Rows = part.logits if last or part.logits == "all" else "none"
                rows.append(self._pass(backend, sequence, chunk, wanted, record))
                if record:
                    for layer, found in record.hidden.items():
                        hidden[layer].append(backend.mlx.to_numpy(found[0]))
            attention = {
                layer: backend.mlx.to_numpy(found) for layer, found in (record.attention if record else {}).items()
            }
        return Eval(np.concatenate(rows), {layer: np.concatenate(found) for layer, found in hidden.items()}, attention)

    def _pass(
        self, backend: MlxBackend, sequence: int, tokens: list[int], wanted: Rows, record: Record | None
    ) -> Floats:
        """One pass over some tokens, evaluated; after an error the session holds what it held before."""
        cache = self._caches[sequence]
        before = self._cells.lengths[sequence]
        try:
            if record is None:
                found = backend.forward(tokens, cache, wanted)
            else:
                with record.recording(backend):
                    found = backend.forward(tokens, cache, wanted)
            states = [part for each in cache for part in (each.keys, each.values)]
            shown = [*record.hidden.values(), *record.attention.values()] if record else []
            backend.evaluate([found, *states, *shown])
            rows: Floats = backend.mlx.to_numpy(found)
        except BaseException:
            self._restore(sequence, before)
            raise
        self._cells.append(sequence, len(tokens))
        return rows

    def _restore(self, sequence: int, n: int) -> None:
        """Take back what a failed pass left in some of the layers' caches; all of it where that cannot be told."""
        cache = self._caches[sequence]
        if all(each.offset == n or each.is_trimmable() for each in cache):
            for each in cache:
                each.trim(each.offset - n)
        elif self._backend is not None:
            self._caches[sequence] = self._backend.make_cache()
            self._cells.rewind(sequence, 0)

    def share(self, source: int, target: int) -> None:
        """See Session. The arrays are shared until one of the two writes."""
        backend = self._backend
        if backend is None:
            raise EngineError("the session has been closed")
        if not (0 <= source < self.sequences and 0 <= target < self.sequences):
            raise ValueError(f"sequences {source}, {target}: the session has {self.sequences}, numbered from 0")
        if source != target:
            self._caches[target] = [self._copy(each) for each in self._caches[source]]
            self._cells.share(source, target)

    def _copy(self, cache: Any) -> Any:
        """A cache of the same content: writing into an array changes the object, so each has objects of its own."""
        made = copy(cache)
        if made.keys is not None and self._backend is not None:
            made.keys, made.values = (self._backend.mlx.core.array(each) for each in (made.keys, made.values))
        return made

    def rewind(self, n: int, sequence: int = 0) -> bool:
        """See Session. A sliding window that has slid cannot slide back."""
        backend = self._backend
        if backend is None:
            raise EngineError("the session has been closed")
        if not 0 <= n <= self.length(sequence):
            raise ValueError(f"cannot rewind {self.length(sequence)} tokens to {n}")
        if n == self.length(sequence):
            return True
        cache = self._caches[sequence]
        if n == 0:
            self._caches[sequence] = backend.make_cache()
        elif all(each.is_trimmable() for each in cache):
            for each in cache:
                each.trim(each.offset - n)
        else:
            return False
        self._cells.rewind(sequence, n)
        return True

    def close(self) -> None:
        """See Session. A second call does nothing."""
        self._caches = []
        self._backend = None


def require(context: int, sequences: int) -> None:
    """Raise Unsupported unless both are possible."""
    if context < 1 or sequences < 1:
        raise Unsupported(f"a context of {context} tokens in {sequences} sequences: expected 1 or more of both")
