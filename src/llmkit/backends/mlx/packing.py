"""A GGUF file as a model for MLX: its keys as the arguments of a model of mlx_lm, its tensors as MLX's arrays.

Blocks whose weights are scale · q + bias over 32 of them are MLX's own "affine" quantization under other headers:
Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K and Q5_K are repacked without loss, with their scales as float32 (for Q4_K and Q5_K
the products of the block's and the sub-block's). All other types are dequantized by llama.cpp's own code.
mlx.core.load is never asked: it reads Q4_K wrongly, fails on others, and leaves some out.

Layouts of blocks: llama.cpp, ggml/src/ggml-common.h and ggml-quants.c (dequantize_row_…).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import engine, gguf, mlx_engine
from ...errors import InvalidModel, Unsupported, nearest_hint
from ...mlx_engine import arguments
from ...progress import OnProgress, Progress, ignore
from .model import Parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

GROUP = 32
_CHUNK_WEIGHTS = 1 << 22  # repacked at a time


@dataclass(frozen=True)
class Packed:
    """Rows of a matrix as scale · q + bias: q [rows, width] below 2 ** bits, scale and bias [rows, width / 32]."""

    bits: int
    q: Bytes
    scale: Floats
    bias: Floats


# ── blocks ──


def _half(blocks: Bytes, offset: int) -> Floats:
    """The float16 at `offset` of each block, [rows, blocks, 1]."""
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """16 bytes → 32 numbers: the low halves, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """4 bytes → 32 numbers, 0 or 16."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    scale = _half(blocks, 0)
    return _nibbles(blocks[..., 2:]), scale, -8 * scale


def _q4_1(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    return _nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    scale = _half(blocks, 0)
    return _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6]), scale, -16 * scale


def _q5_1(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    return _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8]), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    scale = _half(blocks, 0)
    return blocks[..., 2:] ^ np.uint8(128), scale, -128 * scale  # int8 + 128


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and minima of the 8 sub-blocks, 6 bits each in 12 bytes (get_scale_min_k4), times the block's own."""
    low, middle, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1)
    return _half(blocks, 0) * scales, -_half(blocks, 2) * minima


def _q4_k(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    quarters = blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32)
    return np.concatenate([quarters & 15, quarters >> 4], axis=-1), *_k_scales(blocks)


def _q5_k(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    quarters = blocks[..., 48:].reshape(*blocks.shape[:-1], 4, 32)
    fifth = np.unpackbits(blocks[..., 16:48, None], axis=-1, bitorder="little").swapaxes(-1, -2) << np.uint8(4)
    q = np.concatenate([quarters & 15, quarters >> 4], axis=-1).reshape(*blocks.shape[:-1], 8, 32) | fifth
    return q, *_k_scales(blocks)


# type → bits, and how blocks [rows, blocks, bytes] become q, scale and bias
_AFFINE: dict[str, tuple[int, Callable[[Bytes], tuple[Bytes, Floats, Floats]]]] = {
    "Q4_0": (4, _q4_0), "Q4_1": (4, _q4_1), "Q5_0": (5, _q5_0), "Q5_1": (5, _q5_1), "Q8_0": (8, _q8_0),
    "Q4_K": (4, _q4_k), "Q5_K": (5, _q5_k),
}  # fmt: skip
LOSSLESS = frozenset(_AFFINE)


def unpack(info: gguf.TensorInfo, rows: Bytes) -> Packed:
    """Rows of a tensor of a type in LOSSLESS, as they stand in the file [rows, bytes]."""
    bits, split = _AFFINE[info.type.name]
    q, scale, bias = split(rows.reshape(len(rows), -1, info.type.nbytes))
    width = info.shape[-1]
    groups = (len(rows), width // GROUP)
    return Packed(bits, q.reshape(len(rows), width), scale.reshape(groups), bias.reshape(groups))


def pack_words(q: Bytes, bits: int) -> NDArray[np.uint32]:
    """Numbers below 2 ** bits [rows, width] as MLX packs them: a stream of bits, lowest first, in 32-bit words."""
    if bits == 8:
        stream = q
    elif bits == 4:
        stream = q[:, 0::2] | q[:, 1::2] << np.uint8(4)
    else:
        each = np.unpackbits(q[..., None], axis=-1, bitorder="little")[..., :bits]
        stream = np.packbits(each.reshape(len(q), -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(stream).view("<u4")


def repacked(info: gguf.TensorInfo) -> tuple[NDArray[np.uint32], Floats, Floats]:
    """A matrix of a type in LOSSLESS as MLX's packed words, scales and biases; some rows at a time, to save memory."""
    rows, width, bits = stored_rows(info), info.shape[-1], _AFFINE[info.type.name][0]
    words = np.empty((len(rows), width * bits // 32), np.uint32)
    scales, biases = (np.empty((len(rows), width // GROUP), np.float32) for _ in range(2))
    step = max(1, _CHUNK_WEIGHTS // width)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        packed = unpack(info, rows[part])
        words[part], scales[part], biases[part] = pack_words(packed.q, bits), packed.scale, packed.bias
    return words, scales, biases


# ── tensors ──

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_GEMMA = _INNER | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """An architecture of GGUF: the module of mlx_lm.models, and the names its blocks' tensors have there.

    `pairs`: rotary embedding turns neighbours, as the rows of q and k lie in the file. `norms_less_one`: the file
    stores 1 + w where the model wants w.
    """

    module: str
    names: Mapping[str, str] = field(default_factory=lambda: _INNER)
    pairs: bool = False
    norms_less_one: bool = False


FAMILIES = {
    "llama": Family("llama", pairs=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma3": Family("gemma3_text", _GEMMA, norms_less_one=True),
}


def read(file: gguf.GgufFile, on_progress: OnProgress = ignore) -> Parts:
    """The model in `file`. Raises Unsupported, InvalidModel, MissingDependency."""
    name = str(file.get("general.architecture", ""))
    family = FAMILIES.get(name)
    if family is None:
        raise Unsupported(
            f"{file.path}: the backend mlx does not run the architecture '{name}' from a GGUF",
            f"{nearest_hint(name, FAMILIES)} llama.cpp may: --backend llamacpp",
        )
    parts = Parts(family.module, _settings(file, name, family))
    total, done = sum(info.nbytes for info in file.tensors.values()), 0
    for info in file.tensors.values():
        if info.name != _ROPE_FREQS:
            _place(parts, info, _target(file, info, family), family)
        done += info.nbytes
        on_progress(Progress("loading", done, total, detail=info.name))
    if freqs := file.tensors.get(_ROPE_FREQS):
        parts.rope_divisors = dequantized(freqs)
    return parts


def _target(file: gguf.GgufFile, info: gguf.TensorInfo, family: Family) -> str:
    """The tensor's name in mlx_lm's model."""
    stem, _, kind = info.name.rpartition(".")
    words = stem.split(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    if len(words) == 3 and words[0] == "blk" and words[2] in family.names:
        return f"model.layers.{words[1]}.{family.names[words[2]]}.{kind}"
    raise Unsupported(
        f"{file.path}: the backend mlx has no place for tensor '{info.name}'", "llama.cpp may: --backend llamacpp"
    )


def _place(parts: Parts, info: gguf.TensorInfo, target: str, family: Family) -> None:
    core = mlx_engine.load().core
    path, _, kind = target.rpartition(".")
    if info.type.name in LOSSLESS and kind == "weight" and len(info.shape) == 2:
        arrays = repacked(info)
        for name, array in zip((target, f"{path}.scales", f"{path}.biases"), arrays, strict=True):
            parts.weights[name] = core.array(array)
        parts.quantization[path] = {"bits": _AFFINE[info.type.name][0], "group_size": GROUP, "mode": "affine"}
        return
    values = dequantized(info)
    if family.norms_less_one and len(info.shape) == 1:
        values = values - 1
    parts.weights[target] = core.array(values)


def stored_rows(info: gguf.TensorInfo) -> Bytes:
    """The tensor as it stands in the file, [rows, bytes]. Raises InvalidModel for an empty one."""
    if not info.nbytes:
        raise InvalidModel(f"{info.path}: tensor '{info.name}' is empty")
    n_rows = prod(info.shape[:-1])
    return np.memmap(info.path, np.uint8, "r", info.offset, (n_rows, info.nbytes // n_rows))


def dequantized(info: gguf.TensorInfo) -> Floats:
    """The tensor as float32, by llama.cpp's own conversion. Raises Unsupported for types without one."""
    rows = stored_rows(info)
    values = np.empty(info.shape, np.float32)
    engine.load().to_float(info.type.ggml_id, rows.ctypes.data, values.ctypes.data, values.size)
    return values


# ── keys ──


def _settings(file: gguf.GgufFile, name: str, family: Family) -> dict[str, Any]:
    """The arguments of the model, in the words of config.json."""

    def key(word: str, default: Any = None, *, needed: bool = False) -> Any:
        found = file.get(f"{name}.{word}", default)
        if needed and (isinstance(found, bool) or not isinstance(found, (int, float))):
            what = "missing" if found is None else f"{str(found)[:40]!r}"
            raise InvalidModel(f"{file.path}: key '{name}.{word}' is {what}, expected one number")
        return found

    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise InvalidModel(f"{file.path}: has no table token_embd.weight")
    width, heads = key("embedding_length", needed=True), key("attention.head_count", needed=True)
    heads_kv, head_dim = key("attention.head_count_kv", heads), key("attention.key_length", width // max(1, heads))
    if not all(isinstance(each, int) for each in (heads_kv, head_dim)):
        raise Unsupported(f"{file.path}: layers differ in their heads, which mlx_lm's {family.module} cannot express")
    _refuse(file, name, family, head_dim)
    biases = {info.name.split(".")[-2] for info in file.tensors.values() if info.name.endswith(".bias")}
    found: dict[str, Any] = {
        "model_type": family.module,
        "hidden_size": width,
        "num_hidden_layers": key("block_count", needed=True),
        "intermediate_size": key("feed_forward_length", needed=True),
        "num_attention_heads": heads,
        "num_key_value_heads": heads_kv,
        "head_dim": head_dim,
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon", needed=True),
        "vocab_size": table.shape[0],
        "max_position_embeddings": key("context_length", needed=True),
        "rope_theta": key("rope.freq_base", 10000.0),
        "rope_traditional": family.pairs,
        "rope_scaling": _rope_scaling(file, name, key),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": bool(biases & {"attn_q", "attn_k", "attn_v", "attn_output"}),
        "mlp_bias": bool(biases & {"ffn_up", "ffn_gate", "ffn_down"}),
    }
    if name == "gemma3":
        blocks = found["num_hidden_layers"]
        found |= {
            "query_pre_attn_scalar": width // heads if blocks == 62 else head_dim,
            "sliding_window": key("attention.sliding_window", needed=True),
            "sliding_window_pattern": arguments.period(_sliding(file, blocks), file.path),
            "rope_local_base_freq": key("rope.freq_base_swa", 10000.0),
        }
    return found


def _refuse(file: gguf.GgufFile, name: str, family: Family, head_dim: int) -> None:
    """Raise Unsupported for what the model of mlx_lm computes otherwise than the file wants."""
    plain = {
        "expert_count": 0,
        "final_logit_softcapping": 0.0,
        "attn_logit_softcapping": 0.0,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "attention.scale": 0.0,
        "attention.causal": True,
        "embedding_scale": 0.0,
        "residual_scale": 0.0,
        "logit_scale": 0.0,
    }
    for word, usual in plain.items():
        found = file.get(f"{name}.{word}", usual)
        if found != usual:
            raise Unsupported(
                f"{file.path}: '{name}.{word}' is {found}, which mlx_lm's {family.module} cannot express",
                "llama.cpp can: --backend llamacpp",
            )


def _rope_scaling(file: gguf.GgufFile, name: str, key: Callable[..., Any]) -> dict[str, Any] | None:
    kind = key("rope.scaling.type", "none")
    if _ROPE_FREQS in file.tensors:
        # divisors of the frequencies stand in the file; the numbers here only choose the module that takes them
        return {"rope_type": "llama3", "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind in ("none", ""):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": key("rope.scaling.factor", needed=True)}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": key("rope.scaling.factor", needed=True),
            "original_max_position_embeddings": key("rope.scaling.original_context_length", needed=True),
        }
    raise Unsupported(f"{file.path}: rope scaling '{kind}', expected none, linear or yarn")


def _sliding(file: gguf.GgufFile, blocks: int) -> list[bool]:
    """Which layers of Gemma 3 slide: a list in the file, else all but every n-th."""
    pattern = file.get("gemma3.attention.sliding_window_pattern", 6)
    if isinstance(pattern, int):
        return [(i + 1) % max(1, pattern) != 0 for i in range(blocks)]
    return [bool(each) for each in pattern]
