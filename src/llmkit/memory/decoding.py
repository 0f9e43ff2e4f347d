"""What one token costs on this very model: bytes read and operations, from the engine's layout of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..convert.draft import GgufDraft
from ..errors import LlmkitError
from ..gguf_writer import tensor_nbytes
from . import speed
from .devices.device_table import Device
from .parts import MemoryEstimate
from .speed import SpeedRange, Traffic


@dataclass(frozen=True)
class Decoding:
    """One token with the context full: what it reads of the weights, and in all; operations it takes. Derived."""

    traffic: Traffic
    read_nbytes: int
    operations: int

    def on(self, device: Device) -> SpeedRange | None:
        """The range of its speed there, None where nobody knows the device's bandwidth."""
        if not device.bandwidth:
            return None
        kv = self.read_nbytes - self.traffic.weight_nbytes
        measured = device.how == "measured"
        return speed.decode_range(
            self.traffic, kv, bandwidth=device.bandwidth, processor=device.processor, measured=measured
        )


def of(draft: GgufDraft, estimate: MemoryEstimate) -> Decoding:
    """What a token costs in the setting that was estimated. Raises LlmkitError where nothing would be read."""
    types = estimate.variant.types
    rows = [(each.name, each.n_weights, tensor_nbytes(each.shape, types[each.name])) for each in draft.tensors]
    active = speed.traffic(rows, _key(draft, "expert_count") or 0, _key(draft, "expert_used_count") or 0)
    if not active.weight_nbytes:
        raise LlmkitError(f"{draft.name}: has no weights that a token would read")
    heads = _key(draft, "attention.head_count") or 0
    n_head = heads if isinstance(heads, int) else max(heads, default=0)
    head_dim = _key(draft, "attention.key_length") or (_key(draft, "embedding_length") or 0) // max(1, n_head)
    # the cells of a window's cache are a little more than the window; the engine reads them all
    attention = sum(4 * cache.cells * cache.layers * n_head * head_dim for cache in estimate.kv)
    # a token is of one conversation: others' caches and states are not read; a state is read and written
    others = estimate.setting.parallel
    caches = estimate.part("KV cache") // (1 if estimate.setting.unified else others)
    caches += 2 * estimate.part("recurrent state") // others
    return Decoding(active, active.weight_nbytes + caches, speed.operations(active) + attention)


def _key(draft: GgufDraft, name: str) -> Any:
    found = draft.metadata.get(f"{draft.metadata['general.architecture'].data}.{name}")
    return None if found is None else found.data
