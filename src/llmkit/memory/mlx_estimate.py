"""What a model takes on MLX, from its tensors' shapes: weights, KV cache, share of what macOS lets the GPU wire down.

    rows(draft, context=8192)  →  16 bits, and 2, 3, 4, 6 and 8 bits in groups of 32, 64 and 128

Derived, not asked of MLX. mlx-lm quantizes every matrix and the embedding in groups along its rows, each with a 16-bit
scale and bias; a matrix whose rows do not divide into groups it silently leaves as it is (mlx_lm.utils, quantize_model;
mlx.nn.quantize). Caches grow by 256 tokens (mlx_lm.models.cache, KVCache, RotatingKVCache). What a prompt's
activations and MLX's own cache of buffers take comes on top.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..convert.draft import GgufDraft
from ..convert.tensors import LazyTensor
from ..errors import Unsupported
from . import closed_form
from .closed_form import shape
from .closed_form.shape import MLA, RECURRENT, WINDOW, Shape
from .parts import DERIVED, Part
from .setting import Setting

BITS, GROUPS = (2, 3, 4, 6, 8), (32, 64, 128)
USUAL_GROUP = 64
WARNS_ABOVE = 0.9  # of the wired limit: mlx_lm.generate, wired_limit

_POSSIBLE_BITS = (1, 2, 3, 4, 5, 6, 8)
_STEP = 256
# no Linear nor Embedding there, or computed from the settings
_KEPT = re.compile(r"_norm\.|conv1d|shortconv\.conv|\.ssm_[ad]\b")
_LEFT_OUT = re.compile(r"^rope_(freqs|factors)")
_REMARKS = (
    "derived from shapes, not asked of MLX",
    "prompts take more while they are read: their activations are not estimated",
)


@dataclass(frozen=True)
class MlxEstimate:
    """A model in `bits` (None: 16, as it is) in groups of `group`, with `context` tokens; parts in bytes.

    `skipped` matrices stay in 16 bits, since their rows do not divide into groups.
    """

    bits: int | None
    group: int
    context: int
    parts: tuple[Part, ...]
    bits_per_weight: float
    skipped: int
    remarks: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """All parts."""
        return sum(part.nbytes for part in self.parts)

    def part(self, name: str) -> int:
        """Bytes of the part `name`, 0 when there is none."""
        return sum(part.nbytes for part in self.parts if part.name == name)

    def share(self, wired_limit: int) -> float:
        """The share of `wired_limit` bytes it takes (devices.usable_nbytes of a Mac); WARNS_ABOVE is too much."""
        return self.nbytes / wired_limit


def rows(draft: GgufDraft, context: int) -> list[MlxEstimate]:
    """The model in 16 bits and in every combination of BITS and GROUPS. Raises InvalidModel (metadata)."""
    return [estimate(draft, context, bits=None)] + [
        estimate(draft, context, bits=bits, group=group) for bits in BITS for group in GROUPS
    ]


def estimate(
    draft: GgufDraft,
    context: int,
    *,
    bits: int | None = 4,
    group: int = USUAL_GROUP,
    kv_bits: int | None = None,
    float_nbytes: int = 2,
) -> MlxEstimate:
    """The model with `context` tokens in its cache, which is in 16 bits unless `kv_bits` says otherwise.

    `float_nbytes` is the size of what is not quantized, and of scales and biases: 2, or 4 where a model is kept in F32.
    Raises Unsupported (bits, group), InvalidModel (metadata).
    """
    for each in (bits, kv_bits):
        if each is not None and each not in _POSSIBLE_BITS:
            raise Unsupported(f"MLX has no quantization of {each} bits", f"Possible: {_words(_POSSIBLE_BITS)}.")
    if group not in GROUPS:
        raise Unsupported(f"MLX has no groups of {group}", f"Possible: {_words(GROUPS)}.")
    counted = [tensor for tensor in draft.tensors if not _LEFT_OUT.match(tensor.name)]
    weights = sum(_tensor_nbytes(tensor, bits, group, float_nbytes) for tensor in counted)
    skipped = [tensor for tensor in counted if bits is not None and _is_matrix(tensor) and tensor.width % group]
    tied = all(tensor.name != "output.weight" for tensor in draft.tensors)
    found = shape.of_metadata(draft.metadata, tied=tied)
    parts = (
        Part("weights", weights, DERIVED),
        Part("KV cache", kv_nbytes(found, context, kv_bits, float_nbytes), DERIVED),
        Part("recurrent state", closed_form.recurrent_nbytes(found, Setting(context)), DERIVED),
    )
    return MlxEstimate(
        bits, group, context, tuple(part for part in parts if part.nbytes),
        8 * weights / max(1, sum(tensor.n_weights for tensor in counted)),
        len(skipped), tuple(_remarks(found, skipped, group, kv_bits)),
    )  # fmt: skip


def kv_nbytes(found: Shape, context: int, kv_bits: int | None = None, float_nbytes: int = 2) -> int:
    """Bytes of the cache: whole steps of 256 tokens, in layers with a window no more than the window.

    Quantized it has a scale and a bias for every 64 numbers.
    """
    tokens = -(-context // _STEP) * _STEP
    each = float_nbytes if kv_bits is None else kv_bits / 8 + 2 * float_nbytes / USUAL_GROUP
    total = 0
    for layer in found.layers:
        if layer.kind != RECURRENT and layer.owns_cache:
            held = min(tokens, found.window) if layer.kind == WINDOW and found.window else tokens
            total += (layer.k_width + layer.v_width) * held
    return round(total * each)


def _tensor_nbytes(tensor: LazyTensor, bits: int | None, group: int, float_nbytes: int) -> int:
    if bits is None or not _is_matrix(tensor) or tensor.width % group:
        return tensor.n_weights * float_nbytes
    return tensor.n_weights * bits // 8 + 2 * float_nbytes * tensor.n_weights // group


def _is_matrix(tensor: LazyTensor) -> bool:
    return len(tensor.shape) > 1 and not _KEPT.search(tensor.name)


def _remarks(found: Shape, skipped: Sequence[LazyTensor], group: int, kv_bits: int | None) -> list[str]:
    words = list(_REMARKS)
    if skipped:
        words.append(
            f"{len(skipped)} matrices stay in 16 bits: their rows do not divide into groups of {group} "
            f"('{skipped[0].name}': {skipped[0].width})"
        )
    if kv_bits is not None:
        words.append("mlx-lm quantizes the cache from 5,000 tokens on: before, and at that moment, it is in 16 bits")
    if any(layer.kind == MLA for layer in found.layers):
        words.append("latent attention: the cache as llama.cpp keeps it; versions of mlx-lm differ")
    if found.recurrent is not None:
        words.append("recurrent states: as llama.cpp keeps them, in 32 bits")
    if found.experts is not None:
        words.append("mlx-lm keeps the routers of some families in 8 bits")
    return words


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
