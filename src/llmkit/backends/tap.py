"""Hidden states of a running model, read through the scheduler's callback (ggml_backend_sched_eval_callback).

The callback is asked about every node of the graph, and handed the data of those it wants. An exception in it, or a
False as the answer to data, would silently give wrong logits; so errors are kept, and raised after the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine import Engine
from ..engine.symbols import TensorHead
from ..errors import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_F32 = 0


class Tap:
    """Collects the residual stream after chosen layers (nodes `l_out-<layer>`), one part for each batch."""

    def __init__(self, loaded: Engine) -> None:
        self._functions = loaded.functions
        self._wanted: dict[bytes, int] = {}
        self._parts: dict[int, list[Floats]] = {}
        self._error: BaseException | None = None
        self.callback: Any = loaded.llama.ggml_backend_sched_eval_callback(self._call)  # lives as long as the context

    def want(self, layers: Sequence[int]) -> None:
        """Collect these layers from now on, and forget what was collected."""
        self._wanted = {b"l_out-%d" % layer: layer for layer in layers}
        self._parts = {layer: [] for layer in layers}
        self._error = None

    def check(self) -> None:
        """Raise EngineError if the callback failed."""
        if self._error is not None:
            error, self._error = self._error, None
            raise EngineError(f"reading hidden states failed: {error}") from error

    def take(self, n_tokens: int) -> dict[int, Floats]:
        """The layers [n_tokens, d]. Raises EngineError for a layer the model's graph does not show."""
        for layer, parts in self._parts.items():
            found = sum(len(part) for part in parts)
            if found != n_tokens:
                raise EngineError(
                    f"layer {layer}: the engine showed {found} rows of hidden states for {n_tokens} tokens",
                    "Not every architecture names its layers' outputs.",
                )
        return {layer: np.concatenate(parts) for layer, parts in self._parts.items()}

    def _call(self, tensor: int, ask: bool, _: Any) -> bool:
        try:
            layer = self._wanted.get(self._functions["ggml_get_name"](tensor))
            if ask:
                return layer is not None
            if layer is not None:
                self._parts[layer].append(self._read(tensor))
        except BaseException as error:  # nothing may pass through C
            self._error = self._error or error
        return not ask

    def _read(self, tensor: int) -> Floats:
        head = TensorHead.from_address(tensor)
        if head.type != _F32 or not self._functions["ggml_is_contiguous"](tensor):
            raise EngineError("the node is not a contiguous tensor of 32-bit floats")
        width, rows = head.ne[0], head.ne[1] * head.ne[2] * head.ne[3]
        values = np.empty((rows, width), np.float32)
        self._functions["ggml_backend_tensor_get"](tensor, values.ctypes.data, 0, values.nbytes)
        return values
