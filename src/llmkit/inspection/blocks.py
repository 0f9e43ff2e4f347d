"""A block of quantized weights, taken apart: fields, scales, codes, values, each formula with its numbers.

`of(type, bytes)` unpacks one block by block_layouts and unpacking; nothing is asked of the engine but the values of the
types that look up its grids. Knows nothing of where the bytes come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ..errors import InvalidModel, Unsupported
from ..quants import TensorType
from .block_layouts import LAYOUTS, Layout, split
from .unpacking import PACKING, UNPACK, Array, Unpacked

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Part:
    """A field of the block: its bytes from `first`, as hexadecimal, and its value when it is one number."""

    name: str
    first: int
    nbytes: int
    hex: str
    value: float | None
    meaning: str


@dataclass(frozen=True)
class Group:
    """A sub-block (or the whole block): value = step · level − minimum.

    `scale_code` and `min_code` are what is stored for it; `codes` are those of its weights, None for grids.
    """

    index: int
    first: int
    scale_code: int | None
    min_code: int | None
    step: float
    minimum: float | None
    codes: tuple[int, ...] | None
    levels: tuple[int, ...] | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Block:
    """One block. `worked` is the formula with the numbers of one weight, `packing` where scattered bits come from.

    `unpacked` says whether the values were computed here from the bits, or by the engine (grids).
    """

    type: str
    family: str
    weights: int
    nbytes: int
    bits_per_weight: Fraction
    formula: str
    level: str
    scaling: str | None
    source: str
    parts: tuple[Part, ...]
    groups: tuple[Group, ...]
    points: tuple[int, ...]
    worked: str | None
    packing: tuple[str, ...]
    unpacked: bool

    @property
    def values(self) -> tuple[float, ...]:
        """All weights in order."""
        return tuple(value for group in self.groups for value in group.values)


def drawable() -> tuple[str, ...]:
    """The types `of` takes apart."""
    return tuple(LAYOUTS)


def of(kind: TensorType, data: bytes | Array, *, shown: int = 0) -> Block:
    """Take one block apart; `worked` is shown for its weight number `shown`.

    Raises Unsupported for types without blocks, InvalidModel when the bytes are not one block's.
    """
    layout = LAYOUTS.get(kind.name)
    if layout is None:
        raise Unsupported(f"{kind.name} has no blocks to draw", f"These have: {', '.join(LAYOUTS)}.")
    raw = np.frombuffer(bytes(data), np.uint8)
    if raw.size != kind.nbytes:
        raise InvalidModel(f"a block of {kind.name} has {kind.nbytes} bytes, {raw.size} were given")
    each = split(raw, layout.fields)
    found = UNPACK[kind.name](each)
    values = _values(found, kind) if found.levels is not None else _engine_values(kind, raw)
    group = shown * len(found.steps) // kind.block
    return Block(
        type=kind.name,
        family=layout.family,
        weights=kind.block,
        nbytes=kind.nbytes,
        bits_per_weight=kind.bits_per_weight,
        formula=layout.formula,
        level=layout.level,
        scaling=layout.scaling,
        source=f"llama.cpp: ggml-common.h, block_{_c_name(kind)}; ggml-quants.c, dequantize_row_{_c_name(kind)}",
        parts=_parts(layout, each),
        groups=_groups(found, values),
        points=layout.points,
        worked=_worked(found, values, shown),
        packing=PACKING[kind.name](each["scales"], group) if kind.name in PACKING else (),
        unpacked=found.levels is not None,
    )


def values_of(kind: TensorType, data: bytes | Array) -> Floats:
    """The weights of a block, computed here from its bits. Raises Unsupported for grids."""
    if kind.name not in LAYOUTS:
        raise Unsupported(f"{kind.name} has no blocks")
    found = UNPACK[kind.name](split(np.frombuffer(bytes(data), np.uint8), LAYOUTS[kind.name].fields))
    if found.levels is None:
        raise Unsupported(f"the values of {kind.name} are not computed here: they are points of a grid")
    return _values(found, kind)


def _values(found: Unpacked, kind: TensorType) -> Floats:
    """step · level − minimum in float32, in the engine's order of operations."""
    size = kind.block // len(found.steps)
    values = np.repeat(found.steps, size) * np.asarray(found.levels, np.float32)
    if found.minima is not None:
        values = values - np.repeat(found.minima, size)
    return values.astype(np.float32)


def _engine_values(kind: TensorType, raw: Array) -> Floats:
    from .. import engine

    raw = np.ascontiguousarray(raw)
    values = np.empty(kind.block, np.float32)
    engine.load().to_float(kind.ggml_id, raw.ctypes.data, values.ctypes.data, kind.block)
    return values


def _parts(layout: Layout, each: dict[str, Array]) -> tuple[Part, ...]:
    parts, first = [], 0
    for field in layout.fields:
        raw = each[field.name]
        value = float(raw.view("<f2")[0]) if "FP16" in field.meaning and field.nbytes == 2 else None
        parts.append(Part(field.name, first, field.nbytes, raw.tobytes().hex(" "), value, field.meaning))
        first += field.nbytes
    return tuple(parts)


def _groups(found: Unpacked, values: Floats) -> tuple[Group, ...]:
    size = len(values) // len(found.steps)

    def slice_of(array: Array | None, start: int) -> tuple[int, ...] | None:
        return None if array is None else tuple(int(item) for item in array[start : start + size])

    return tuple(
        Group(
            index=index,
            first=index * size,
            scale_code=None if found.scale_codes is None else int(found.scale_codes[index]),
            min_code=None if found.min_codes is None else int(found.min_codes[index]),
            step=float(step),
            minimum=None if found.minima is None else float(found.minima[index]),
            codes=slice_of(found.codes, index * size),
            levels=slice_of(found.levels, index * size),
            values=tuple(float(item) for item in values[index * size : (index + 1) * size]),
        )
        for index, step in enumerate(found.steps)
    )


def _worked(found: Unpacked, values: Floats, shown: int) -> str | None:
    """The formula of one weight with its numbers; None for grids."""
    if found.levels is None or found.codes is None:
        return None
    group = shown * len(found.steps) // len(values)
    code, level, step = int(found.codes[shown]), int(found.levels[shown]), float(found.steps[group])
    factors = [_said(step)]
    if found.d and found.scale_codes is not None:
        factors = [_said(found.d), _said(round(step / found.d, 3))]
    text = " · ".join([*factors, _said(level)])
    if found.minima is not None:
        minimum = float(found.minima[group])
        size = [_said(abs(minimum))]
        if found.min_codes is not None and found.dmin is not None:
            size = [_said(found.dmin), _said(int(found.min_codes[group]))]
        text += f" {'−' if minimum >= 0 else '+'} {' · '.join(size)}"
    stands = f"q = {code}" + (f" → {_said(level)}" if level != code else "")
    return f"weight {shown}: {stands}; {text} = {_said(float(values[shown]))}"


def _said(number: float) -> str:
    return f"{number:.6g}".replace("-", "−")


def _c_name(kind: TensorType) -> str:
    """The type's name in C: q4_K, but iq4_nl."""
    return kind.name.lower().replace("_k", "_K") if kind.name.startswith("Q") else kind.name.lower()
