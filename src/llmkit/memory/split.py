"""Layers over one or more GPUs, by the engine's rules. Derived: nothing here is measured on a GPU.

    split(draft, estimate, [("RTX 4090", free bytes), …], gpu_layers=20)     None: as many layers as fit

The rules (llama.cpp src/llama-model.cpp, load_tensors; src/llama-kv-cache.cpp): of n layers and the output the last
`gpu_layers` go to GPUs, so the output goes first; devices share them in proportion to their free memory; token
embeddings stay on the CPU, and are there twice where the output is tied to them and lies on a GPU; caches lie where
their layer lies; with `cpu_experts` (--cpu-moe) the experts' matrices stay on the CPU. CUDA pads each tensor to 128
bytes, and the last row of quantized ones to 512 weights (ggml/src/ggml-cuda/ggml-cuda.cu).

The compute buffer of each device is not known without the device: the one on the CPU stands in for it. Pages of the
file that the system may drop are left out.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ..convert.draft import GgufDraft
from ..convert.tensors import LazyTensor
from ..errors import LlmkitError
from ..gguf_writer import padded, tensor_nbytes
from ..quants import TensorType
from . import closed_form
from .closed_form import cells, shape
from .parts import DERIVED, MemoryEstimate, Part
from .setting import Setting

HOST = "CPU"
# what a CUDA context takes beside all buffers; it depends on card and driver, so it is a range (published figures)
CUDA_CONTEXT = (300 << 20, 750 << 20)

_ALIGNMENT, _ROW = 128, 512
_BLOCK = re.compile(r"blk\.(\d+)\.")
_INPUT = re.compile(r"^(token_embd|position_embd|token_types|per_layer_token_embd)\.")
_FIRST_LAYER = re.compile(r"^(token_embd_norm|per_layer_model_proj|per_layer_proj_norm)\.")
_EVERY_DEVICE = re.compile(r"^rope_(freqs|factors_long|factors_short)\.")
_EXPERTS = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")  # common/common.h, LLM_FFN_EXPS_REGEX
_COPIES = 4  # ggml/src/ggml-backend.cpp, GGML_SCHED_MAX_COPIES: inputs when devices work at the same time
_STAGING_BATCH = 32  # from this many tokens on, weights on the CPU are copied to the GPU for the work (op_offload)


@dataclass(frozen=True)
class Place:
    """What lies on one device: blocks `layers`, whether the `output` does, parts in bytes. All derived.

    `free_nbytes` is None for the CPU. `unaccounted` bytes, at least and at most, come on top of the parts.
    """

    name: str
    layers: tuple[int, ...]
    output: bool
    parts: tuple[Part, ...]
    free_nbytes: int | None = None
    unaccounted: tuple[int, int] = (0, 0)

    @property
    def nbytes(self) -> int:
        """All parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def fits(self) -> bool:
        """Whether the parts fit with the most that may come on top; of the CPU it is not asked."""
        return self.free_nbytes is None or not self.parts or self.nbytes + self.unaccounted[1] <= self.free_nbytes

    def part(self, name: str) -> int:
        """Bytes of the part `name`, 0 when there is none."""
        return sum(part.nbytes for part in self.parts if part.name == name)


@dataclass(frozen=True)
class Split:
    """`gpu_layers` of `n_layer` + 1 (the output counts as one) on `devices`, the rest on the `host`."""

    gpu_layers: int
    n_layer: int
    devices: tuple[Place, ...]
    host: Place
    remarks: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every device has room for its share."""
        return all(place.fits for place in self.devices)


def split(
    draft: GgufDraft,
    estimate: MemoryEstimate,
    devices: Sequence[tuple[str, int]],
    *,
    gpu_layers: int | None = None,
    cpu_experts: bool = False,
    context_nbytes: tuple[int, int] = CUDA_CONTEXT,
) -> Split:
    """Spread an estimate over `devices`, (name, free bytes) each, and the CPU.

    `gpu_layers` None: the most that fit, or 0. `context_nbytes`: what a device takes beside its buffers (Metal: 0, 0).
    Raises LlmkitError where the estimate has no parts, InvalidModel where the metadata is no model's.
    """
    if estimate.error is not None:
        raise LlmkitError(f"the engine refuses this setting: {estimate.error}")
    plan = _Plan(draft, estimate, devices, cpu_experts, context_nbytes)
    if gpu_layers is not None:
        return plan.at(min(max(gpu_layers, 0), plan.n_layer + 1))
    tried = (plan.at(count) for count in range(plan.n_layer + 1, 0, -1)) if devices else iter(())
    return next((each for each in tried if each.fits), plan.at(0))


class _Plan:
    """What does not depend on the number of layers: bytes of each layer in memory of both kinds."""

    def __init__(
        self,
        draft: GgufDraft,
        estimate: MemoryEstimate,
        devices: Sequence[tuple[str, int]],
        cpu_experts: bool,
        context_nbytes: tuple[int, int],
    ) -> None:
        tied = all(tensor.name != "output.weight" for tensor in draft.tensors)
        self.estimate, self.devices, self.cpu_experts = estimate, devices, cpu_experts
        self.context_nbytes = context_nbytes
        self.shape = shape.of_metadata(draft.metadata, tied=tied)
        numbers = [int(block[1]) for tensor in draft.tensors if (block := _BLOCK.match(tensor.name))]
        self.n_layer = max(numbers, default=-1) + 1
        self.weights = _Weights(draft.tensors, estimate, self.n_layer, tied)
        self.kv = _shared(estimate.part("KV cache"), self._each(estimate.setting, kv=True))
        self.recurrent = _shared(estimate.part("recurrent state"), self._each(estimate.setting, kv=False))

    def _each(self, setting: Setting, *, kv: bool) -> list[int]:
        """Bytes of each layer's cache, or state, by the closed form."""
        alone = [replace(self.shape, layers=(layer,)) for layer in self.shape.layers]
        found = [
            sum(closed_form.kv_nbytes(each, setting).values())
            if kv
            else closed_form.recurrent_nbytes(each, setting)
            for each in alone
        ]  # fmt: skip
        return (found + [0] * self.n_layer)[: max(self.n_layer, 1)]  # layers that only guess further tokens have none

    def at(self, count: int) -> Split:
        """The split with the last `count` layers on the devices."""
        first = self.n_layer + 1 - count
        owner = [None] * first + _owners(count, [free for _, free in self.devices])
        if not self.devices:
            owner, count, first = [None] * (self.n_layer + 1), 0, self.n_layer + 1
        places = tuple(self._place(owner, index) for index in range(len(self.devices)))
        return Split(count, self.n_layer, places, self._place(owner, None), tuple(self._remarks(owner, count)))

    def _place(self, owner: Sequence[int | None], index: int | None) -> Place:
        layers = tuple(layer for layer in range(self.n_layer) if owner[layer] == index)
        output = owner[self.n_layer] == index
        name, free = (HOST, None) if index is None else self.devices[index]
        if index is not None and not layers and not output:
            return Place(name, (), False, (), free)
        parts = [
            self.weights.of(layers, output, on_gpu=index is not None, cpu_experts=self.cpu_experts, owner=owner),
            Part("KV cache", sum(self.kv[layer] for layer in layers), DERIVED),
            Part("recurrent state", sum(self.recurrent[layer] for layer in layers), DERIVED),
            *(self._host_buffers(owner) if index is None else self._device_buffers(owner, index)),
        ]
        context = (0, 0) if index is None else self.context_nbytes
        return Place(name, layers, output, tuple(part for part in parts if part.nbytes), free, context)

    def _host_buffers(self, owner: Sequence[int | None]) -> list[Part]:
        works = None in owner or self.cpu_experts
        compute = self.estimate.part("compute buffer") if works else 0
        return [
            Part("compute buffer", max(compute, self._inputs_nbytes()), DERIVED),
            *(replace(part, how=DERIVED) for part in self.estimate.parts if _stays(part)),
        ]

    def _device_buffers(self, owner: Sequence[int | None], index: int) -> list[Part]:
        parts = [Part("compute buffer", self.estimate.part("compute buffer"), DERIVED)]
        used = {each for each in owner if each is not None}
        if len(used) > 1 and None not in owner and not self.cpu_experts:
            parts.append(Part("copies of inputs", (_COPIES - 1) * self._inputs_nbytes(), DERIVED))
        if index == min(used) and self.estimate.setting.ubatch >= _STAGING_BATCH:
            staged = self.weights.largest_on_host(owner, self.cpu_experts)
            parts.append(Part("weights staged for prompts", staged, DERIVED))
        return parts

    def _inputs_nbytes(self) -> int:
        """A batch's embeddings and attention mask (16 bits with flash attention): pinned memory of the CPU."""
        setting = self.estimate.setting
        held = cells.of(self.shape, setting)
        ubatch = min(setting.ubatch, setting.batch, held.context)
        each = 4 if setting.flash_attention is False else 2
        seen = held.full + (held.window if self.shape.sliding else 0)
        return 4 * self.shape.n_embd * ubatch + each * seen * ubatch

    def _remarks(self, owner: Sequence[int | None], count: int) -> list[str]:
        found = [
            "derived from the engine's rules, not measured on a GPU; the CPU's compute buffer stands in for theirs"
        ]
        if count and self.context_nbytes[1]:
            low, high = (each >> 20 for each in self.context_nbytes)
            found.append(f"the driver takes {low} to {high} MiB on each GPU beside this")
        if self.devices and not count:
            found.append("with no layer on it a GPU still takes part in long prompts, unless it is left out")
        if self.cpu_experts and not self.weights.has_experts:
            found.append("the model has no experts to keep on the CPU")
        return found


class _Weights:
    """Tensors by the layer they belong to; the output is the layer after the last."""

    def __init__(self, tensors: Sequence[LazyTensor], estimate: MemoryEstimate, n_layer: int, tied: bool) -> None:
        self.n_layer = n_layer
        types = estimate.variant.types
        self.layers: dict[int | None, list[_Tensor]] = {index: [] for index in (*range(n_layer + 1), None)}
        self.everywhere: list[_Tensor] = []
        for tensor in tensors:
            row = _Tensor(tensor, types[tensor.name])
            if _EVERY_DEVICE.match(tensor.name):
                self.everywhere.append(row)
            else:
                self.layers[_layer_of(tensor.name, n_layer)].append(row)
        self.embedding = next((row for row in self.layers[None] if row.name == "token_embd.weight"), None)
        self.tied = tied and self.embedding is not None
        self.has_experts = any(row.experts for rows in self.layers.values() for row in rows)
        # alignment, repacked twins and the like: what the engine has beyond the tensors
        every = [*self.everywhere, *(row for rows in self.layers.values() for row in rows)]
        self.extra = estimate.part("weights") - sum(row.on_cpu for row in every)

    def of(
        self, layers: Sequence[int], output: bool, *, on_gpu: bool, cpu_experts: bool, owner: Sequence[int | None]
    ) -> Part:
        """The weights of a place."""
        rows = [row for layer in layers for row in self.layers[layer]]
        ends = self.layers[self.n_layer] if output else []
        every = self.everywhere if layers else []
        if on_gpu:
            blocks = sum(row.on_gpu for row in [*rows, *every] if not (cpu_experts and row.experts))
            twin = self.embedding.on_gpu if output and self.tied and self.embedding else 0
            parts = [("blocks", blocks), ("output", sum(row.on_gpu for row in ends) + twin)]
        else:
            away = [row for layer, place in enumerate(owner) if place is not None for row in self.layers[layer]]
            experts = sum(row.on_cpu for row in away if cpu_experts and row.experts)
            extra = self.extra
            if not output and self.tied and self.embedding and extra >= self.embedding.on_cpu:
                extra -= self.embedding.on_cpu  # the twin that was repacked for the CPU's output
            parts = [
                ("blocks", sum(row.on_cpu for row in [*rows, *every])),
                ("output", sum(row.on_cpu for row in ends)),
                ("token embeddings", sum(row.on_cpu for row in self.layers[None])),
                ("experts", experts),
                ("alignment and the engine's own tensors", max(extra, 0)),
            ]
        found = tuple(Part(name, nbytes, DERIVED) for name, nbytes in parts if nbytes)
        return Part("weights", sum(part.nbytes for part in found), DERIVED, found)

    def largest_on_host(self, owner: Sequence[int | None], cpu_experts: bool) -> int:
        """Bytes of the largest matrix of a block on the CPU, 0 when there is none."""
        return max(
            (
                row.nbytes
                for layer, place in enumerate(owner)
                for row in self.layers[layer]
                if row.matrix and (place is None or (cpu_experts and row.experts))
            ),
            default=0,
        )


class _Tensor:
    """Bytes of a tensor in memory of the CPU and of a CUDA device."""

    def __init__(self, tensor: LazyTensor, kind: TensorType) -> None:
        self.name = tensor.name
        self.matrix = len(tensor.shape) > 1
        self.experts = bool(_EXPERTS.search(tensor.name))
        self.nbytes = tensor_nbytes(tensor.shape, kind)
        self.on_cpu = padded(self.nbytes)
        rest = tensor.width % _ROW
        more = kind.row_nbytes(_ROW - rest) if kind.quantized and rest else 0
        self.on_gpu = -(-(self.nbytes + more) // _ALIGNMENT) * _ALIGNMENT


def _stays(part: Part) -> bool:
    """Whether a part is the CPU's whatever the split: not what is divided, nor what the system may drop."""
    return not part.evictable and part.name not in ("weights", "KV cache", "recurrent state", "compute buffer")


def _layer_of(name: str, n_layer: int) -> int | None:
    """The block a tensor belongs to; `n_layer` is the output, None the input, which no GPU gets."""
    if block := _BLOCK.match(name):
        return int(block[1])
    if _INPUT.match(name):
        return None
    return 0 if _FIRST_LAYER.match(name) and n_layer else n_layer


def _owners(count: int, free: Sequence[int]) -> list[int | None]:
    """Which device each of `count` layers goes to, in proportion to free memory.

    With the engine's own arithmetic in single precision: a layer on the border would go astray otherwise.
    """
    sums = list(accumulate((_single(each) for each in free), lambda a, b: _single(a + b)))
    if not sums or not sums[-1]:
        return [0 if sums else None] * count
    borders = [_single(each / sums[-1]) for each in sums]
    return [min(bisect_right(borders, _single(layer / count)), len(free) - 1) for layer in range(count)]


def _single(number: float) -> float:
    return float(struct.unpack("f", struct.pack("f", number))[0])


def _shared(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in parts proportional to `weights`, without a byte lost; equal parts where all weights are 0."""
    sums = list(accumulate(weights if any(weights) else [1] * len(weights)))
    cuts = [total * each // sums[-1] for each in sums]
    return [cut - before for cut, before in zip(cuts, [0, *cuts], strict=False)]
