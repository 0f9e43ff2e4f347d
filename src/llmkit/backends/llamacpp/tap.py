"""Hidden states and attention of a running model, read through the scheduler's callback
(ggml_backend_sched_eval_callback).

The callback is asked about every node of the graph, and handed the data of those it wants. An exception in it, or a
False as the answer to data, would silently give wrong logits; so errors are kept, and raised after the evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine import Engine
from ...engine.symbols import TensorHead
from ...errors import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_F32 = 0
# what enters the first layer, the last step of its making first: some models scale or norm the embeddings
ENTRIES = (
    "inp_scaled", "inp_embd_scaled", "inpL", "inp_norm", "embd_norm", "embedding_output", "model.input_embed",
    "model.embed_tokens", "inp_embd", "embd",
)  # fmt: skip
HIDDEN, ATTENTION = "l_out-%d", "kq_soft_max-%d"  # names of nodes, of a layer (llama.cpp: src/models, llama-graph.cpp)


class Tap:
    """Collects chosen nodes of the graph, one part for each batch of the scheduler, in its order."""

    def __init__(self, loaded: Engine) -> None:
        self._functions = loaded.functions
        self._wanted: dict[bytes, str] = {}
        self._parts: dict[str, list[Floats]] = {}
        self._keys = 0
        self._error: BaseException | None = None
        self.callback: Any = loaded.llama.ggml_backend_sched_eval_callback(self._call)  # lives as long as the context

    def want(self, names: Iterable[str]) -> None:
        """Collect these nodes from now on, and forget what was collected."""
        self._wanted = {name.encode(): name for name in names}
        self._parts = {name: [] for name in self._wanted.values()}
        self._error = None

    def limit(self, keys: int) -> None:
        """Of attention keep the first `keys` columns: the others are cells nothing has been put into yet."""
        self._keys = keys

    def check(self) -> None:
        """Raise EngineError if the callback failed."""
        if self._error is not None:
            error, self._error = self._error, None
            raise EngineError(f"reading the model's layers failed: {error}") from error

    def take(self) -> Mapping[str, list[Floats]]:
        """What was collected, name → parts: [rows, d] of hidden states, [heads, rows, keys] of attention."""
        parts, self._wanted, self._parts = self._parts, {}, {}
        return parts

    def _call(self, tensor: int, ask: bool, _: Any) -> bool:
        try:
            name = self._wanted.get(self._functions["ggml_get_name"](tensor))
            if ask:
                return name is not None
            if name is not None and (values := self._read(tensor, name)) is not None:
                self._parts[name].append(values)
        except BaseException as error:  # nothing may pass through C
            self._error = self._error or error
        return not ask

    def _read(self, tensor: int, name: str) -> Floats | None:
        """The node's values; None for what is not laid out as the nodes we know."""
        head = TensorHead.from_address(tensor)
        if head.type != _F32 or not self._functions["ggml_is_contiguous"](tensor):
            return None
        values = np.empty(tuple(head.ne)[::-1], np.float32)
        self._functions["ggml_backend_tensor_get"](tensor, values.ctypes.data, 0, values.nbytes)
        if not name.startswith("kq_"):
            return values.reshape(-1, values.shape[-1])
        return values[0, :, :, : self._keys].copy() if values.shape[0] == 1 else None


def rows_of_attention(parts: list[Floats], keys: int) -> Floats:
    """Parts [heads, rows, fewer or as many keys] as one array [heads, all rows, keys]; what is missing is 0."""
    padded = [np.pad(part, ((0, 0), (0, 0), (0, keys - part.shape[-1]))) for part in parts]
    return padded[0] if len(padded) == 1 else np.concatenate(padded, axis=1)
