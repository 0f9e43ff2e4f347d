"""Weights of a model of which only the shape is known: how many there are, and what a quant's mix makes of them.

The mixes are what the engine's dry run answers for the shape of Llama 2 7B, in bits per weight (llama.cpp
src/llama-quant.cpp decides; quantize/oracle.py asks it where it can be asked). Grouped attention and mixtures of
experts move single tensors up by a step: that is most of the error, a percent or two. Rows that do not divide by 256
fall back to types with blocks of 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from ...errors import Unsupported
from ...quants import quant
from .shape import BOTH, FULL, MLA, RECURRENT, WINDOW, Layer, Shape

_F32 = 32.0
_Matrix = tuple[str, tuple[int, ...]]  # role, shape with the width last

# bits per weight by role: embeddings, output, attention values, attention output, feed-forward down; "" is all else
_MIXES: dict[str, dict[str, float]] = {
    "Q2_K": {"": 2.625, "output": 6.5625, "value": 3.4375, "mix": 3.4375, "down": 3.4375},
    "Q2_K_S": {"": 2.625, "output": 6.5625, "down": 2.86},
    "Q3_K_S": {"": 3.4375, "output": 6.5625},
    "Q3_K_M": {"": 3.4375, "output": 6.5625, "value": 4.56, "mix": 4.5, "down": 4.56},
    "Q3_K_L": {"": 3.4375, "output": 6.5625, "value": 5.5, "mix": 5.5, "down": 5.5},
    "Q4_0": {"": 4.5, "output": 6.5625, "down": 4.56},
    "Q4_1": {"": 5.0, "output": 6.5625},
    "Q4_K_S": {"": 4.5, "output": 6.5625, "value": 4.62, "down": 4.62},
    "Q4_K_M": {"": 4.5, "output": 6.5625, "value": 5.53, "down": 5.53},
    "Q5_0": {"": 5.5, "output": 6.5625, "down": 5.56},
    "Q5_1": {"": 6.0, "output": 6.5625},
    "Q5_K_S": {"": 5.5, "output": 6.5625},
    "Q5_K_M": {"": 5.5, "output": 6.5625, "value": 6.03, "down": 6.03},
    "Q6_K": {"": 6.5625},
    "Q8_0": {"": 8.5},
    "IQ1_S": {"": 1.5625, "embedding": 2.625, "output": 5.5, "value": 2.625, "mix": 2.0625, "down": 1.7},
    "IQ1_M": {"": 1.75, "embedding": 2.625, "output": 5.5, "value": 2.625, "mix": 2.0625, "down": 1.86},
    "IQ2_XXS": {"": 2.0625, "embedding": 2.625, "output": 5.5, "value": 2.625, "down": 2.13},
    "IQ2_XS": {"": 2.3125, "embedding": 2.625, "output": 5.5, "value": 2.625, "down": 2.35},
    "IQ2_S": {"": 2.3125, "embedding": 3.4375, "output": 5.5, "value": 3.4375, "mix": 3.4375, "down": 2.45},
    "IQ2_M": {"": 2.5625, "embedding": 3.4375, "output": 5.5, "value": 3.4375, "mix": 3.4375, "down": 2.67},
    "IQ3_XXS": {"": 3.0625, "embedding": 3.4375, "output": 5.5, "query": 2.5625, "mix": 3.4375},
    "IQ3_XS": {"": 3.16, "embedding": 3.4375, "output": 6.5625, "value": 3.4375, "mix": 3.4375, "down": 3.4375,
               "query": 3.0625},
    "IQ3_S": {"": 3.4375, "output": 6.5625},
    "IQ3_M": {"": 3.4375, "output": 6.5625, "value": 4.5, "mix": 4.5, "down": 3.57},
    "IQ4_NL": {"": 4.5, "output": 6.5625},
    "IQ4_XS": {"": 4.25, "output": 6.5625},
    "TQ1_0": {"": 1.6875, "embedding": 4.5, "output": 6.5625},
    "TQ2_0": {"": 2.0625, "embedding": 4.5, "output": 6.5625},
    "MXFP4_MOE": {"": 8.5, "experts": 4.25, "experts down": 4.25},
    "F16": {"": 16.0},
    "BF16": {"": 16.0},
    "F32": {"": 32.0},
}  # fmt: skip
_BLOCK = 256
_SMALL_BLOCKS = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4_MOE", "F16", "BF16", "F32"}
# what takes the place of a type of at most so many bits (llama-quant.cpp, tensor_type_fallback)
_FALLBACKS = ((4.3, 4.5), (5.0, 5.5), (5.9, 6.0), (8.0, 8.5))


def n_weights(shape: Shape) -> int:
    """Weights in all matrices; norms and biases, some thousandths of them, are not counted."""
    return sum(prod(size) for _, size in _matrices(shape))


def weights_nbytes(shape: Shape, label: str) -> int:
    """Bytes of the weights in quant `label`. Raises Unsupported where no mix is known."""
    name = quant(label).name
    mix = _MIXES.get(name)
    if mix is None:
        raise Unsupported(f"the bits that {name} gives to each kind of tensor are not known")
    bits = sum(prod(size) * _bits(mix, name, role, size[-1]) for role, size in _matrices(shape))
    norms = _F32 * shape.n_embd * (2 * shape.n_layer + 1)
    return round((bits + norms) / 8)


def _bits(mix: dict[str, float], name: str, role: str, width: int) -> float:
    if role == "router":
        return _F32
    if role == "tied":  # the embedding is the output matrix too, and takes its type
        role = "output"
    elif role == "experts down" and role not in mix:
        role = "down"
    bits = mix.get(role, mix[""])
    if width % _BLOCK and role == "output":
        return max(bits, 8.5)
    if width % _BLOCK and name not in _SMALL_BLOCKS:
        bits = next((after for limit, after in _FALLBACKS if bits <= limit), bits)
    return bits


def _matrices(shape: Shape) -> Iterator[_Matrix]:
    embd = shape.n_embd
    yield "tied" if shape.tied else "embedding", (shape.n_vocab, embd)
    if not shape.tied:
        yield "output", (shape.n_vocab, embd)
    for layer in shape.layers:
        if layer.kind == MLA:
            yield from _latent(shape, layer)
        if layer.kind in (FULL, WINDOW, BOTH):
            doubled = 2 if shape.recurrent is not None and shape.recurrent.kind == "delta" else 1  # query and gate
            yield "query", (doubled * layer.n_head * layer.head_k, embd)
            if layer.owns_cache:
                yield "query", (layer.k_width, embd)
                yield "value", (layer.v_width, embd)
            yield "mix", (embd, layer.n_head * layer.head_v)
        if layer.kind in (RECURRENT, BOTH):
            yield from _recurrent(shape)
        yield from _feed_forward(shape, layer)


def _feed_forward(shape: Shape, layer: Layer) -> Iterator[_Matrix]:
    embd, experts = shape.n_embd, shape.experts
    inward = 2 if shape.gated else 1
    if layer.experts and experts is not None:
        yield "router", (experts.n, embd)
        yield "experts", (experts.n, inward * experts.n_ff, embd)
        yield "experts down", (experts.n, embd, experts.n_ff)
        if experts.n_ff_shared:
            yield "", (inward * experts.n_ff_shared, embd)
            yield "down", (embd, experts.n_ff_shared)
    elif layer.n_ff:
        yield "", (inward * layer.n_ff, embd)
        yield "down", (embd, layer.n_ff)


def _latent(shape: Shape, layer: Layer) -> Iterator[_Matrix]:
    mla, embd, heads = shape.mla, shape.n_embd, layer.n_head
    if mla is None:
        return
    if mla.q_rank:
        yield "query", (mla.q_rank, embd)
    yield "query", (heads * mla.qk, mla.q_rank or embd)
    yield "query", (mla.kv_rank + mla.rope, embd)
    yield "query", (heads, mla.kv_rank, mla.qk - mla.rope)
    yield "value", (heads, mla.v, mla.kv_rank)
    yield "mix", (embd, heads * mla.v)


def _recurrent(shape: Shape) -> Iterator[_Matrix]:
    """Projections in and out; what else there is, is small (src/models/mamba-base.cpp, qwen3next.cpp)."""
    state, embd = shape.recurrent, shape.n_embd
    if state is None:
        return
    if state.kind in ("rwkv", "kda"):
        yield "", (4 * state.d_inner, embd)
    elif state.kind == "convolution":
        yield "", (3 * embd, embd)
    elif state.kind == "delta":
        yield "", (state.channels + state.d_inner, embd)
    else:
        yield "", (state.d_inner + state.channels, embd)
        if state.kind == "mamba":  # steps, B and C come out of a narrow matrix
            rank = -(-embd // 16)
            yield "", (rank + 2 * state.d_state, state.d_inner)
            yield "", (state.d_inner, rank)
    yield "", (embd, state.d_inner)
