"""Memory without asking the engine: from a model's shape (tier B), or from its parameter count alone (tier C).

Tier B: caches and states follow from the shape to the byte (llama.cpp src/llama-kv-cache.cpp, llama-kv-cache-iswa.cpp,
llama-memory-recurrent.cpp, llama-hparams.cpp); the compute buffer is laid out as the engine would (graph.py), which is
nearly as exact for usual decoders and an educated guess for others; of weights the usual mix is assumed (assumed.py).
Tier C is the rule of thumb of the textbooks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import LlmkitError, Unsupported
from ...quants import TENSOR_TYPES
from ..setting import Setting
from . import assumed, cells, graph
from .shape import BOTH, FULL, MLA, RECURRENT, WINDOW, Shape

_F32 = 4


@dataclass(frozen=True)
class ClosedForm:
    """Parts in bytes. `kv` by kind of layer (full, window, mla); `compute_at` names what the compute buffer is for.

    `context` is what the engine makes of the wish.
    """

    context: int
    weights: int
    kv: Mapping[str, int]
    recurrent: int
    compute: int
    compute_at: str
    output: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.weights + sum(self.kv.values()) + self.recurrent + self.compute + self.output


def closed_form(shape: Shape, setting: Setting, weights: int | str) -> ClosedForm:
    """What the engine would allocate on a CPU. `weights`: their bytes, or the quant whose usual mix to assume.

    Raises Unsupported for a quant without a known mix, and for heads that blocks of the cache's types do not divide.
    """
    peak = graph.compute(shape, setting)
    return ClosedForm(
        weights=weights if isinstance(weights, int) else assumed.weights_nbytes(shape, weights),
        context=cells.of(shape, setting).context,
        kv=kv_nbytes(shape, setting),
        recurrent=recurrent_nbytes(shape, setting),
        compute=peak.nbytes,
        compute_at=peak.at,
        # logits on the host (llama-context.cpp, output_reserve)
        output=_F32 * shape.n_vocab * setting.rows,
    )


def kv_nbytes(shape: Shape, setting: Setting) -> dict[str, int]:
    """Bytes of the KV cache by kind of layer.

    A row of K and one of V for each cell and layer. Without flash attention V lies transposed, and all layers get the
    width of the widest. Layers that read another's cache have none.
    """
    _check(shape, setting)
    held = cells.of(shape, setting)
    k, v = TENSOR_TYPES[setting.kv_k.upper()], TENSOR_TYPES[setting.kv_v.upper()]
    widest = max((layer.v_width for layer in shape.layers), default=0)
    found: dict[str, int] = {}
    for layer in shape.layers:
        if layer.kind not in (FULL, WINDOW, MLA, BOTH) or not layer.owns_cache:
            continue
        kind = FULL if layer.kind == BOTH else layer.kind
        v_width = widest if setting.flash_attention is False and layer.v_width else layer.v_width
        row = k.row_nbytes(layer.k_width) + v.row_nbytes(v_width)
        tokens = held.streams * (held.window if layer.kind == WINDOW else held.full)
        found[kind] = found.get(kind, 0) + row * tokens
    return found


def _check(shape: Shape, setting: Setting) -> None:
    """Refuse what the engine refuses (llama-context.cpp, llama_init_from_model)."""
    if setting.flash_attention is False and TENSOR_TYPES[setting.kv_v.upper()].quantized:
        raise Unsupported(f"V in {setting.kv_v} needs flash attention")
    for layer in shape.layers:
        if layer.kind == MLA and setting.kv_k != setting.kv_v:
            raise Unsupported("latent attention keeps K and V in one cache, so both have one type")
        for width, name in ((layer.head_k, setting.kv_k), (layer.head_v, setting.kv_v)):
            if layer.n_head_kv and width % (block := TENSOR_TYPES[name.upper()].block):
                raise Unsupported(f"heads of {width} do not divide into {name} blocks of {block}")


def recurrent_nbytes(shape: Shape, setting: Setting) -> int:
    """Bytes of recurrent states: for each sequence, whatever the context (32-bit floats)."""
    if shape.recurrent is None:
        return 0
    layers = sum(layer.kind in (RECURRENT, BOTH) for layer in shape.layers)
    return _F32 * (shape.recurrent.rolling + shape.recurrent.state) * layers * max(1, setting.parallel)


# ── tier C: from a parameter count alone ──

_COUNT = re.compile(
    r"(?:(?P<times>\d{1,3})\s*[x×]\s*)?(?P<number>\d{1,15}(?:\.\d{1,6})?)\s*(?P<unit>[kmbt]?)", re.IGNORECASE
)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_MOST = 1e15
_SHARED = 0.22  # of a 7B model is attention and embeddings (Mistral 7B), which the experts of an "8x7B" have in common
OVERHEAD = 1.2  # the usual surcharge for all that is not weights
# What models really take (weights of the quant, KV cache of 4096 tokens in F16, buffers) over the rule's parameters ×
# bits / 8, with the round count of the model's name: the least and the most of twelve dense models from 1.5B to 72B,
# and of seven smaller ones (Llama, Mistral, Qwen, Gemma, SmolLM). 4 bits: Q4_0 and Q4_K_M; 2, 3, 5, 6: the K-quants.
_TRUTH = {
    32: ((0.99, 1.12), (1.03, 1.29)),
    16: ((1.00, 1.16), (1.06, 1.42)),
    8: ((1.07, 1.34), (1.18, 1.91)),
    6: ((1.11, 1.48), (1.49, 2.46)),
    5: ((1.15, 1.61), (1.53, 2.65)),
    4: ((1.16, 1.81), (1.66, 3.21)),
    3: ((1.32, 2.11), (2.21, 4.04)),
    2: ((1.54, 2.73), (3.11, 5.91)),
}
_SMALL = 1.4e9


@dataclass(frozen=True)
class Rough:
    """Parameters × bits / 8, the same × 1.2, and between what bounds the truth lies for models of such a size."""

    n_params: int
    bits: float
    nbytes: int
    with_overhead: int
    least: int
    most: int


def rough(n_params: float, bits: float) -> Rough:
    """The rule of thumb. `bits` is the nominal number: 32, 16, 8, 4. 7B in 32 bits is 28 GB, 70B is 280 GB.

    The truth differs because names round (7B is 6.74 billion), quants keep scales and some tensors at more bits (4-bit
    files take 4.5 to 5), and because the cache and the buffers count too, most where the model is small.
    """
    if not 0 < n_params <= _MOST:
        raise LlmkitError(f"{n_params:g} parameters make no model", "Give a count such as 7B or 135M.")
    if not 0 < bits <= 64:
        raise LlmkitError(f"{bits:g} bits make no weight", "Give 32, 16, 8 or 4.")
    nominal = min(_TRUTH, key=lambda known: abs(known - bits))
    least, most = _TRUTH[nominal][n_params < _SMALL]
    nbytes = n_params * bits / 8
    return Rough(
        round(n_params), bits, round(nbytes), round(nbytes * OVERHEAD), round(nbytes * least), round(nbytes * most)
    )


def parse_count(text: str) -> int:
    """Parameters of "7B", "135M", "1.5b", "7000000000"; "8x7B" is eight experts that share all but feed-forward.

    So 8x7B is 45 billion, not 56. Raises LlmkitError for anything else.
    """
    match = _COUNT.fullmatch(text.strip())
    count = float(match["number"]) * _UNITS[match["unit"].lower()] if match else 0.0
    if match and match["times"]:
        count *= _SHARED + (1 - _SHARED) * int(match["times"])
    if not 1 <= count <= _MOST or (match and match["times"] and int(match["times"]) < 1):
        raise LlmkitError(f"'{text}' is no parameter count", "Give one such as 7B, 135M, 1.5B or 8x7B.")
    return round(count)
