"""The table per bit width: what each quant of a model takes, how long a context it allows, and what is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..convert.draft import GgufDraft
from ..errors import EngineError, LlmkitError, Unsupported
from ..quants import TENSOR_TYPES
from . import decoding, fallback, fit
from . import estimate as memory
from .decoding import Decoding
from .devices.device_table import Device
from .parts import EXACT, MemoryEstimate, Variant
from .published import Hint, hint
from .setting import Setting
from .speed import SpeedRange

# one row a bit width, in the order people compare them
LABELS = (
    "F32", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_L",
    "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XXS", "IQ1_M",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One quant: its memory in the setting asked for; the longest context that fits the budget, None when none does.

    `fits` is about the setting asked for; None where no budget was named. `token` is what one token costs, `speed` the
    range on the device that was named.
    """

    estimate: MemoryEstimate
    hint: Hint | None
    longest: int | None = None
    fits: bool | None = None
    token: Decoding | None = None
    speed: SpeedRange | None = None


def rows(
    draft: GgufDraft,
    labels: Sequence[str],
    setting: Setting,
    *,
    trained: int,
    budget: int | None = None,
    device: Device | None = None,
) -> list[Row]:
    """A row for each quant of `labels`; the engine is asked for all of them at once.

    Raises Unsupported where it refuses the setting for all of them, LlmkitError where nobody can tell anything.
    """
    try:
        chosen = memory.variants(draft, labels)
    except EngineError as error:
        return without_engine(fallback.of_draft(draft, labels, setting, error), budget)
    estimates = [row[0] for row in memory.estimate(draft, chosen, [setting])]
    # how memory grows with the context does not depend on the quant: the first one is asked for all
    growth = None if budget is None or estimates[0].error else _growth(draft, chosen[0], setting, trained)
    return _accepted([_row(draft, each, growth, budget, device) for each in estimates])


def _accepted(rows: list[Row]) -> list[Row]:
    refused = [row.estimate for row in rows if row.estimate.error]
    if refused and len(refused) == len(rows):
        setting = refused[0].setting
        off = setting.flash_attention is False and TENSOR_TYPES[setting.kv_v.upper()].quantized
        hint = "Put flash attention on, or the cache into 16 bits: --flash-attention, --kv-type f16." if off else None
        raise Unsupported(f"the engine refuses this setting: {refused[0].error}", hint)
    return rows


def _growth(draft: GgufDraft, variant: Variant, setting: Setting, trained: int) -> fit.Growth | None:
    try:
        return fit.growth(draft, variant, setting, fit.context_points(trained, setting.context))
    except LlmkitError:
        return None


def without_engine(estimates: Sequence[MemoryEstimate], budget: int | None) -> list[Row]:
    """Rows of estimates by closed form or rule of thumb: no longest context, no speed. Raises as `rows`."""
    return _accepted(
        [
            Row(each, hint(each.variant.label), fits=None if budget is None else each.needed_nbytes <= budget)
            for each in estimates
        ]
    )


def _row(
    draft: GgufDraft, each: MemoryEstimate, growth: fit.Growth | None, budget: int | None, device: Device | None
) -> Row:
    known = hint(each.variant.label)
    if each.error is not None:
        return Row(each, known)
    # closed forms do not tell how many tokens each cache holds
    token = decoding.of(draft, each) if each.tier == EXACT else None
    speed = token.on(device) if token and device else None
    if budget is None:
        return Row(each, known, token=token, speed=speed)
    # what it takes at any context is what it takes at this one, and what the growth adds
    longest = growth.longest(budget - each.needed_nbytes + growth.at(each.context)) if growth else None
    return Row(each, known, longest, each.needed_nbytes <= budget, token, speed)


def best(table: Sequence[Row]) -> Row | None:
    """The row with the least published loss among those that fit; the largest of equals. None when none fits."""
    fitting = [row for row in table if row.fits]
    if not fitting:
        return None

    def merit(row: Row) -> tuple[float, int]:
        return (row.hint.divergence if row.hint else 1e9, -row.estimate.variant.file_nbytes)

    # full precision is no better than Q8_0 to anybody who measures, and takes twice as much
    sensible = [row for row in fitting if row.estimate.variant.bits_per_weight < 9] or fitting
    return min(sensible, key=merit)
