"""How fast a model can decode: the roofline. Bytes read per token over bytes per second, and a share of that.

For each token decoding reads every active weight once and the filled part of the caches once, and does about two
operations for each weight: a few operations for a byte, where all these devices can do dozens. So memory decides:

    ceiling = bandwidth / (bytes of active weights + bytes of caches)

What is reached is a share of it, given as a range of what is typical (EFFICIENCIES), never as one number.
Prompts are another matter: there one read of the weights serves hundreds of tokens, and operations decide. That speed
is not estimated: makers' TOPS are those of units the engine does not use, or of sparse formats no GGUF has.

A dense model reads all weights but the rows of token_embd (one row a token), the output matrix included; a mixture of
experts reads the shared tensors and n_used/n_expert of each tensor of experts (llama.cpp: tensors *_exps; *_shexp are
shared). Caches: filled cells, in layers with a sliding window no more than the window.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import LlmkitError, Unsupported

_BLOCK = re.compile(r"blk\.(\d+)\.")
# one row of them is read for a token, whatever their size
_LOOKED_UP = ("token_embd.weight", "per_layer_token_embd.weight", "position_embd.weight", "token_types.weight")
_EXPERTS = re.compile(r"_exps(\.|$)")
_PREDICTOR = ".nextn."  # layers that guess further tokens; plain decoding leaves them out

USUAL_BITS = 4.8  # bits per weight of Q4_K_M in large models (measured on the Llama-2-70B shape)
BANDWIDTH_WINS = "46.2 against 20.9 tokens/s with an 8B model at Q4_K_M, as others measured (normiebench)"
PROMPT_REMARK = (
    "prompts are read in batches: there operations decide, not bandwidth; that speed is not estimated, since makers' "
    "TOPS are of units and formats that llama.cpp does not use"
)

# Share of the ceiling that is typical, by what computes, up to how many bits a weight. Judgement on published figures:
# Apple M1 Max, 27B, Q3_K_M 44 %, Q4_1 55 %, IQ4_NL 58 % (llama.cpp #27525), 8B Q4_K_M 57 %; 7B Q4_0 45 to 58 %, F16
# 69 to 78 % (M1 Max, M2 Ultra, M4 Max: llama.cpp discussion #4167); RTX 4090, 27B Q4_K_M, about 65 %; 13900K, 7B Q4_0,
# 68 %. Outside the range: 8B Q4 on an RTX 3090 up to 79 %, on an M4 86 %. A measured bandwidth is itself less than a
# maker's, so decoding reaches more of it: 67 % (Q8_0), 94 % (Q4_K), 114 % (F16) in the best tokens of 1-GB models on a
# virtual machine with two CPUs.
EFFICIENCIES = (
    ("gpu", 7.0, 0.45, 0.65, "quants of up to 6 bits on a GPU typically reach 45 to 65 % of the ceiling"),
    ("gpu", 64.0, 0.60, 0.80, "8 and 16 bits on a GPU typically reach 60 to 80 % of the ceiling"),
    ("cpu", 64.0, 0.50, 0.70, "CPUs typically reach 50 to 70 % of the ceiling"),
    ("cpu, measured", 64.0, 0.50, 1.00, "CPUs typically reach 50 to 100 % of a measured bandwidth"),
)
PUBLISHED = "published measurements lie between 44 and 86 % of makers' bandwidth"
_SHORT = 0.002  # seconds
_TOO_SHORT = "a token takes so little time here that other costs than memory weigh in: expect less"


@dataclass(frozen=True)
class Traffic:
    """Weights that one token reads: their bytes and their number; `total_weights` are all there are."""

    weight_nbytes: int
    active_weights: int
    total_weights: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of an active weight on average."""
        return 8 * self.weight_nbytes / self.active_weights if self.active_weights else 0.0


@dataclass(frozen=True)
class AttentionLayer:
    """A layer with a cache: bytes of K and V of one token, query heads, width of a head; `window` None sees all."""

    cell_nbytes: int
    n_head: int
    head_dim: int
    window: int | None = None

    def cells(self, filled: int) -> int:
        """Cells read when `filled` tokens are in the context."""
        return filled if self.window is None else min(filled, self.window)


@dataclass(frozen=True)
class Share:
    """The part of a token's bytes that one device reads, its bandwidth in bytes per second, "gpu" or "cpu".

    `measured`: the bandwidth is no maker's figure, but measured there.
    """

    nbytes: float
    bandwidth: float
    processor: str
    measured: bool = False


@dataclass(frozen=True)
class SpeedRange:
    """Tokens per second: typically `low` to `high`; `ceiling` is bandwidth over `nbytes`. Derived, with `reasons`."""

    low: float
    high: float
    ceiling: float
    nbytes: int
    reasons: tuple[str, ...]


def traffic(tensors: Iterable[tuple[str, int, int]], n_expert: int = 0, n_expert_used: int = 0) -> Traffic:
    """What one token reads of `tensors`: (GGUF name, weights, bytes) each.

    Raises LlmkitError when tensors hold experts, but the numbers of experts make no sense.
    """
    rows = list(tensors)
    tied = all(name != "output.weight" for name, _, _ in rows)
    predictors = {block[1] for name, _, _ in rows if _PREDICTOR in name and (block := _BLOCK.match(name))}
    nbytes = weights = total = 0
    for name, n_weights, size in rows:
        total += n_weights
        block = _BLOCK.match(name)
        if (block and block[1] in predictors) or (name in _LOOKED_UP and not (tied and name == _LOOKED_UP[0])):
            continue
        used, of = 1, 1
        if _EXPERTS.search(name):
            if not 0 < n_expert_used <= n_expert:
                raise LlmkitError(f"tensor '{name}' holds experts, of which {n_expert_used} of {n_expert} are used")
            used, of = n_expert_used, n_expert
        nbytes += size * used // of
        weights += n_weights * used // of
    return Traffic(nbytes, weights, total)


def kv_nbytes(layers: Iterable[AttentionLayer], filled: int) -> int:
    """Bytes of the caches that one token reads with `filled` tokens in the context."""
    return sum(layer.cell_nbytes * layer.cells(filled) for layer in layers)


def operations(active: Traffic, layers: Iterable[AttentionLayer] = (), filled: int = 0) -> int:
    """Operations for one token: 2 for each active weight, 4·cells·heads·head width in each attention layer.

    A multiplication and an addition count as two; attention has q·k and p·v. Norms and the like are left out.
    """
    attention = sum(4 * layer.cells(filled) * layer.n_head * layer.head_dim for layer in layers)
    return 2 * active.active_weights + attention


def efficiency(share: Share, bits_per_weight: float) -> tuple[float, float, str]:
    """The typical share of the ceiling, low and high, and its reason in words. Raises Unsupported (processor)."""
    wanted = f"{share.processor}, measured" if share.measured else share.processor
    for name, most_bits, low, high, reason in EFFICIENCIES:
        if name == wanted and bits_per_weight <= most_bits:
            return low, high, reason
    raise Unsupported(f"nobody knows how fast '{wanted}' decodes", "Known: gpu, cpu; measured: cpu.")


def decode_range(active: Traffic, kv: float, *, bandwidth: float, processor: str, measured: bool = False) -> SpeedRange:
    """Speed of a model that lies on one device whole: `kv` bytes of caches are read for a token.

    A recurrent state counts twice: it is read and written. For the rest see Share.
    """
    share = Share(active.weight_nbytes + kv, bandwidth, processor, measured)
    return decode_over([share], active.bits_per_weight)


def decode_over(shares: Sequence[Share], bits_per_weight: float) -> SpeedRange:
    """Speed of a model spread over devices that work one after another: their times add up.

    Raises LlmkitError where nothing is read, or a bandwidth is not positive.
    """
    if not any(share.nbytes > 0 for share in shares) or any(share.bandwidth <= 0 for share in shares):
        raise LlmkitError("a speed needs bytes that are read and a bandwidth above 0")
    slow = fast = best = 0.0
    reasons: list[str] = []
    for share in shares:
        low, high, reason = efficiency(share, bits_per_weight)
        seconds = share.nbytes / share.bandwidth
        best, slow, fast = best + seconds, slow + seconds / low, fast + seconds / high
        reasons += [reason] if share.measured else [reason, PUBLISHED]
    if best < _SHORT:
        reasons.append(_TOO_SHORT)
    nbytes = int(sum(share.nbytes for share in shares))
    return SpeedRange(1 / slow, 1 / fast, 1 / best, nbytes, tuple(dict.fromkeys(reasons)))
