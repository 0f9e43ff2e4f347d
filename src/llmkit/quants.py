"""Tensor types (Q4_K is 256 weights in 144 bytes) and file types (Q4_K_M is a mix of tensor types), one row each.

Facts from llama.cpp: ggml/include/ggml.h (ids), ggml/src/ggml-common.h (blocks), include/llama.h (file types).
Which tensor gets which type in a mix is not here: the engine is asked (quantize/oracle.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from .errors import Unsupported, nearest_hint


@dataclass(frozen=True)
class TensorType:
    """A storage type: `block` weights in `nbytes` bytes. `ggml_id` is its number in GGUF files.

    `makeable`: the engine has a kernel that writes it (ggml_quantize_chunk in ggml/src/ggml.c); others are read only.
    """

    name: str
    ggml_id: int
    block: int
    nbytes: int
    quantized: bool = True
    makeable: bool = True

    @property
    def bits_per_weight(self) -> Fraction:
        """Bits each weight takes, scales included."""
        return Fraction(8 * self.nbytes, self.block)

    def row_nbytes(self, width: int) -> int:
        """Bytes of a row of `width` weights. Raises Unsupported when blocks do not fit."""
        if width % self.block:
            raise Unsupported(f"a row of {width} weights does not divide into {self.name} blocks of {self.block}")
        return width // self.block * self.nbytes


_TENSOR_TYPES = (
    TensorType("F32", 0, 1, 4, quantized=False),
    TensorType("F16", 1, 1, 2, quantized=False),
    TensorType("Q4_0", 2, 32, 2 + 16),
    TensorType("Q4_1", 3, 32, 2 + 2 + 16),
    TensorType("Q5_0", 6, 32, 2 + 4 + 16),
    TensorType("Q5_1", 7, 32, 2 + 2 + 4 + 16),
    TensorType("Q8_0", 8, 32, 2 + 32),
    TensorType("Q8_1", 9, 32, 2 + 2 + 32, makeable=False),
    TensorType("Q2_K", 10, 256, 16 + 64 + 2 + 2),
    TensorType("Q3_K", 11, 256, 32 + 64 + 12 + 2),
    TensorType("Q4_K", 12, 256, 2 + 2 + 12 + 128),
    TensorType("Q5_K", 13, 256, 2 + 2 + 12 + 32 + 128),
    TensorType("Q6_K", 14, 256, 128 + 64 + 16 + 2),
    TensorType("Q8_K", 15, 256, 4 + 256 + 32, makeable=False),
    TensorType("IQ2_XXS", 16, 256, 2 + 64),
    TensorType("IQ2_XS", 17, 256, 2 + 64 + 8),
    TensorType("IQ3_XXS", 18, 256, 2 + 96),
    TensorType("IQ1_S", 19, 256, 2 + 32 + 16),
    TensorType("IQ4_NL", 20, 32, 2 + 16),
    TensorType("IQ3_S", 21, 256, 2 + 64 + 8 + 32 + 4),
    TensorType("IQ2_S", 22, 256, 2 + 64 + 8 + 8),
    TensorType("IQ4_XS", 23, 256, 2 + 2 + 4 + 128),
    TensorType("I8", 24, 1, 1, quantized=False, makeable=False),
    TensorType("I16", 25, 1, 2, quantized=False, makeable=False),
    TensorType("I32", 26, 1, 4, quantized=False, makeable=False),
    TensorType("I64", 27, 1, 8, quantized=False, makeable=False),
    TensorType("F64", 28, 1, 8, quantized=False, makeable=False),
    TensorType("IQ1_M", 29, 256, 32 + 16 + 8),
    TensorType("BF16", 30, 1, 2, quantized=False),
    TensorType("TQ1_0", 34, 256, 2 + 48 + 4),
    TensorType("TQ2_0", 35, 256, 2 + 64),
    TensorType("MXFP4", 39, 32, 1 + 16),
    TensorType("NVFP4", 40, 64, 4 + 32),
    TensorType("Q1_0", 41, 128, 2 + 16),
    TensorType("Q2_0", 42, 64, 2 + 16),
)
TENSOR_TYPES = {row.name: row for row in _TENSOR_TYPES}
TENSOR_TYPES_BY_ID = {row.ggml_id: row for row in _TENSOR_TYPES}

F32, F16, BF16 = TENSOR_TYPES["F32"], TENSOR_TYPES["F16"], TENSOR_TYPES["BF16"]


def tensor_type(name: str) -> TensorType:
    """The type named `name` (any case) that weights can be written in. Raises Unsupported with the nearest names."""
    makeable = {row.name: row for row in _TENSOR_TYPES if row.makeable}
    if found := makeable.get(name.upper()):
        return found
    what = "cannot be written" if name.upper() in TENSOR_TYPES else "is unknown"
    raise Unsupported(f"tensor type '{name}' {what}", nearest_hint(name, makeable))


@dataclass(frozen=True)
class Quant:
    """A file type: `ftype` is its number in llama.cpp and in general.file_type, `default` the type of most tensors.

    `advice` is for people choosing.
    """

    name: str
    ftype: int
    default: TensorType | None
    advice: str


_QUANTS = (
    Quant("Q2_K", 10, TENSOR_TYPES["Q2_K"], "smallest K-quant; quality drops clearly"),
    Quant("Q2_K_S", 21, TENSOR_TYPES["Q2_K"], "smaller Q2_K"),
    Quant("Q3_K_S", 11, TENSOR_TYPES["Q3_K"], "very small; noticeable loss"),
    Quant("Q3_K_M", 12, TENSOR_TYPES["Q3_K"], "very small; usable when memory is short"),
    Quant("Q3_K_L", 13, TENSOR_TYPES["Q3_K"], "small; between Q3_K_M and Q4_K_S"),
    Quant("Q4_0", 2, TENSOR_TYPES["Q4_0"], "old format, fast on ARM and with repacking"),
    Quant("Q4_1", 3, TENSOR_TYPES["Q4_1"], "old format; Q4_K_S is better at this size"),
    Quant("Q4_K_S", 14, TENSOR_TYPES["Q4_K"], "small, good quality"),
    Quant("Q4_K_M", 15, TENSOR_TYPES["Q4_K"], "the usual choice: good quality for its size"),
    Quant("Q5_0", 8, TENSOR_TYPES["Q5_0"], "old format; Q5_K_S is better"),
    Quant("Q5_1", 9, TENSOR_TYPES["Q5_1"], "old format; Q5_K_M is better"),
    Quant("Q5_K_S", 16, TENSOR_TYPES["Q5_K"], "large, small loss"),
    Quant("Q5_K_M", 17, TENSOR_TYPES["Q5_K"], "large, very small loss"),
    Quant("Q6_K", 18, TENSOR_TYPES["Q6_K"], "nearly the original"),
    Quant("Q8_0", 7, TENSOR_TYPES["Q8_0"], "practically the original, twice Q4's size"),
    Quant("IQ1_S", 24, TENSOR_TYPES["IQ1_S"], "extreme; for very large models only"),
    Quant("IQ1_M", 31, TENSOR_TYPES["IQ1_M"], "extreme; for very large models only"),
    Quant("IQ2_XXS", 19, TENSOR_TYPES["IQ2_XXS"], "tiny; large models only"),
    Quant("IQ2_XS", 20, TENSOR_TYPES["IQ2_XS"], "tiny; large models only"),
    Quant("IQ2_S", 28, TENSOR_TYPES["IQ2_XS"], "tiny; large models only"),
    Quant("IQ2_M", 29, TENSOR_TYPES["IQ2_S"], "tiny, better than Q2_K at its size"),
    Quant("IQ3_XXS", 23, TENSOR_TYPES["IQ3_XXS"], "very small"),
    Quant("IQ3_XS", 22, TENSOR_TYPES["IQ3_S"], "very small"),
    Quant("IQ3_S", 26, TENSOR_TYPES["IQ3_S"], "better than Q3_K_S at its size; slow to make"),
    Quant("IQ3_M", 27, TENSOR_TYPES["IQ3_S"], "like Q3_K_M, a little smaller; slow to make"),
    Quant("IQ4_NL", 25, TENSOR_TYPES["IQ4_NL"], "like Q4_K_S; slow to make"),
    Quant("IQ4_XS", 30, TENSOR_TYPES["IQ4_XS"], "a little smaller than Q4_K_S at nearly its quality"),
    Quant("TQ1_0", 36, TENSOR_TYPES["TQ1_0"], "only for models trained ternary (BitNet, TriLM)"),
    Quant("TQ2_0", 37, TENSOR_TYPES["TQ2_0"], "only for models trained ternary (BitNet, TriLM)"),
    Quant("MXFP4_MOE", 38, TENSOR_TYPES["MXFP4"], "experts in MXFP4, the rest Q8_0; for mixtures of experts"),
    Quant("F16", 1, TENSOR_TYPES["F16"], "half precision"),
    Quant("BF16", 32, TENSOR_TYPES["BF16"], "brain float: what most models are trained in"),
    Quant("F32", 0, TENSOR_TYPES["F32"], "full precision; for tests"),
    Quant("COPY", 1024, None, "every tensor as it is"),
)
QUANTS = {row.name: row for row in _QUANTS}
QUANTS_BY_FTYPE = {row.ftype: row for row in _QUANTS}


def quant(name: str) -> Quant:
    """The row named `name` (any case). Raises Unsupported with the nearest names."""
    if found := QUANTS.get(name.upper()):
        return found
    raise Unsupported(f"unknown quant '{name}'", nearest_hint(name, QUANTS))
