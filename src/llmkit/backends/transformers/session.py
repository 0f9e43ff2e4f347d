"""A session of a transformers model: its KV caches, and what passes through its layers.

Caches hold every token, of sliding windows too (masks do the sliding), so that any session can be rewound; only models
with other kinds of layers have caches that cannot. torch itself is the backend's: nothing is imported here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EngineError, Unsupported
from .. import Eval, Part, Rows
from ..cells import Cells

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import Transformers

    Floats = NDArray[np.float32]

_BATCH = 512  # tokens per call: bounds the attention's scores, heads × tokens × keys
_FULL = {"full_attention", "sliding_attention", "chunked_attention"}


class TransformersSession:
    """A Session. Made by `Transformers.session`. Sequences that share a beginning share its memory until they go on."""

    def __init__(self, backend: Transformers, context: int, inspecting: bool, sequences: int) -> None:
        self.context = context
        self.sequences = sequences
        self._backend = backend
        self._inspecting = inspecting
        self._caches: list[Any] = [self._cache() for _ in range(sequences)]
        self._cells = Cells(sequences)

    def _cache(self) -> Any:
        config = self._backend.model.config
        kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
        make = self._backend.library.DynamicCache
        return make() if kinds <= _FULL else make(config=config)

    @property
    def n(self) -> int:
        """See Session."""
        return self._cells.lengths[0]

    def length(self, sequence: int = 0) -> int:
        """See Session."""
        return self._cells.lengths[self._index(sequence)]

    def _index(self, sequence: int) -> int:
        if not self._caches:
            raise EngineError(f"{self._backend.folder}: the session has been closed")
        if not 0 <= sequence < self.sequences:
            raise ValueError(f"sequence {sequence}: expected 0 to {self.sequences - 1}")
        return sequence

    def eval(
        self, tokens: Sequence[int], *, logits: Rows = "last", layers: Sequence[int] = (), attention: Sequence[int] = ()
    ) -> Eval:
        """See Session. After an error or Ctrl-C the session holds what it held before the failed batch."""
        info = self._backend.info
        if (layers or attention) and not self._inspecting:
            raise ValueError("layers can be asked for only in a session made with inspect=True")
        for asked, lowest, word in ((layers, -1, "layers"), (attention, 0, "attention of layers")):
            if any(not lowest <= layer < info.n_layer for layer in asked):
                raise ValueError(f"{word} {list(asked)}: expected {lowest} to {info.n_layer - 1}")
        if attention and self.n:
            raise ValueError("attention can be asked for only in an empty session")
        self._require_room([Part(0, tokens)])
        return self._eval(0, tokens, logits, layers, attention)

    def eval_parts(self, parts: Sequence[Part]) -> list[Floats]:
        """See Session. One part after another: here a batch would save no time worth its padding."""
        if len({part.sequence for part in parts}) < len(parts):
            raise ValueError("each sequence can have one part")
        self._require_room(parts)
        return [self._eval(part.sequence, part.tokens, part.logits, (), ()).logits for part in parts]

    def _require_room(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self._index(part.sequence)
            if not part.tokens:
                raise ValueError("expected one or more tokens")
            self._backend.check(part.tokens)
        more = sum(len(part.tokens) for part in parts)
        if self._cells.used + more > self.context:
            held = f"it holds {self._cells.used} of {self.context} tokens, {more} more were to follow"
            raise EngineError(f"the context is full: {held}", "Use a larger context, or begin anew.")

    def _eval(
        self, sequence: int, tokens: Sequence[int], rows: Rows, layers: Sequence[int], attention: Sequence[int]
    ) -> Eval:
        """The tokens in batches, and what was asked of the layers on the way."""
        backend, found = self._backend, _Found(layers, attention)
        logits: list[Floats] = []
        for start in range(0, len(tokens), _BATCH):
            chunk = tokens[start : start + _BATCH]
            last = start + len(chunk) == len(tokens)
            keep = len(chunk) if rows == "all" else int(rows == "last" and last)
            with found.watching(backend):
                result = self._forward(sequence, chunk, keep, bool(attention))
            if keep:
                logits.append(backend.array(result.logits[0, -keep:]))
            found.take(backend, result)
            self._cells.append(sequence, len(chunk))
        empty = np.empty((0, backend.info.n_vocab), np.float32)
        return Eval(np.concatenate(logits) if logits else empty, *found.joined(len(tokens)))

    def _forward(self, sequence: int, chunk: Sequence[int], keep: int, attention: bool) -> Any:
        backend, cache = self._backend, self._caches[sequence]
        options = {"logits_to_keep": max(1, keep)} if backend.keeps else {}
        try:
            with backend.torch.inference_mode():
                ids = backend.torch.tensor([list(chunk)], device=backend.model.device)
                return backend.model(
                    input_ids=ids, past_key_values=cache, use_cache=True, output_attentions=attention, **options
                )
        except BaseException as error:
            if not self._shorten(sequence, self._cells.lengths[sequence]):
                self._shorten(sequence, 0)
            if isinstance(error, (RuntimeError, ValueError, TypeError, IndexError, MemoryError)):
                raise EngineError(f"transformers failed to evaluate {len(chunk)} tokens: {error}") from error
            raise

    def share(self, source: int, target: int) -> None:
        """See Session. Tensors are shared: going on makes new ones."""
        if self._index(source) == self._index(target):
            return
        self._shorten(target, 0)
        cache = copy.copy(self._caches[source])
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        self._caches[target] = cache
        self._cells.share(source, target)

    def rewind(self, n: int, sequence: int = 0) -> bool:
        """See Session."""
        if not 0 <= n <= self.length(sequence):
            raise ValueError(f"cannot rewind {self.length(sequence)} tokens to {n}")
        return self._shorten(sequence, n)

    def _shorten(self, sequence: int, n: int) -> bool:
        """Cut every layer's cache to `n` tokens; False, and nothing changed, where one cannot be cut."""
        layers = self._caches[sequence].layers
        if n == 0:
            self._caches[sequence] = self._cache()
        elif not all(getattr(layer, "is_croppable", True) and not layer.is_sliding for layer in layers):
            return n == self._cells.lengths[sequence] and all(layer.get_seq_length() in (0, n) for layer in layers)
        else:
            for layer in layers:
                if (extra := layer.get_seq_length() - n) > 0:
                    layer.crop(-extra)
        self._cells.rewind(sequence, n)
        return True

    def close(self) -> None:
        """See Session. A second call does nothing."""
        self._caches = []


class _Found:
    """What was asked of the layers, batch by batch: the residual stream, through hooks on the blocks, and attention.

    transformers' own hidden_states end with the final norm, so that the last layer's is not among them.
    """

    def __init__(self, layers: Sequence[int], attention: Sequence[int]) -> None:
        self._hidden: dict[int, list[Floats]] = {layer: [] for layer in layers}
        self._attention: dict[int, list[Floats]] = {layer: [] for layer in attention}

    @contextmanager
    def watching(self, backend: Transformers) -> Iterator[None]:
        """Within, what passes the blocks is copied."""
        hooks = []
        for layer, parts in self._hidden.items():
            if layer < 0:
                hooks.append(backend.layers[0].register_forward_pre_hook(_before(backend, parts), with_kwargs=True))
            else:
                hooks.append(backend.layers[layer].register_forward_hook(_after(backend, parts)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def take(self, backend: Transformers, result: Any) -> None:
        """Copy the attention of a batch. Raises Unsupported for a layer that has none."""
        for layer, parts in self._attention.items():
            rows = result.attentions[layer] if result.attentions and layer < len(result.attentions) else None
            if rows is None:
                raise Unsupported(f"layer {layer}: attention is not available for this kind of layer")
            parts.append(backend.array(rows[0]))

    def joined(self, n_tokens: int) -> tuple[dict[int, Floats], dict[int, Floats]]:
        """Hidden states [T, d] and attention [heads, T, keys] by layer; keys that came later are 0."""
        hidden = {layer: np.concatenate(parts) for layer, parts in self._hidden.items()}
        attention = {}
        for layer, parts in self._attention.items():
            wide = [np.pad(part, [(0, 0), (0, 0), (0, n_tokens - part.shape[-1])]) for part in parts]
            attention[layer] = np.concatenate(wide, axis=1)
        return hidden, attention


def _before(backend: Transformers, parts: list[Floats]) -> Callable[..., None]:
    def hook(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        parts.append(backend.array((given[0] if given else named["hidden_states"])[0]))

    return hook


def _after(backend: Transformers, parts: list[Floats]) -> Callable[..., None]:
    def hook(_: Any, __: Any, result: Any) -> None:
        parts.append(backend.array((result[0] if isinstance(result, tuple) else result)[0]))

    return hook
