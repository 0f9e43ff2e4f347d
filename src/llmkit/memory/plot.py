"""A picture: memory against context for several quants, with a line for what there is. The one owner of matplotlib.

Lines are told apart by shade, dash and a name at their end, so that nobody needs to see colours; the axis of contexts
doubles from mark to mark, as contexts do.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import store
from ..errors import LlmkitError, MissingDependency, Unsupported, nearest_hint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg")
FOOTNOTE = "measured by the engine"
_GIB, _MIB = 1 << 30, 1 << 20
_SHADES = ("#0b3954", "#1b6ca8", "#2b86b8", "#6268a8", "#93458a", "#b8487a", "#c8592b", "#8a6200")
_DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)))
_LIMIT = "#333333"
_INK, _PALE = "#222222", "#666666"
_FOOTNOTE_WIDTH = 140
_CROWD = 10  # more lines than this are drawn only where they can be told apart
_BETWEEN = 16  # points between two figures
_APART = 0.034  # the least distance between two names, as a share of the axis' height


@dataclass(frozen=True)
class Line:
    """A quant: bytes of memory needed at some contexts (tokens), in rising order."""

    name: str
    contexts: tuple[int, ...]
    nbytes: tuple[int, ...]


@dataclass(frozen=True)
class Limit:
    """What there is: a device's name and the bytes a model may take there."""

    name: str
    nbytes: int


def check(path: Path) -> None:
    """Whether a picture can be written there at all: before anything is measured.

    Raises Unsupported (the name's ending), MissingDependency (matplotlib), LlmkitError, AccessDenied (the folder).
    """
    _format(path)
    _library()
    store.make_folder(path.parent)


def draw(
    path: Path, title: str, lines: Sequence[Line], *, limit: Limit | None = None, footnote: str = FOOTNOTE
) -> None:
    """Write the picture of `lines` to `path` (.png or .svg), whole or not at all; what is there is replaced.

    Raises what `check` raises, and LlmkitError where there is nothing to draw or the file cannot be written.
    """
    kind = _format(path)
    shown = [line for line in lines if len(line.contexts) > 1]
    if not shown:
        raise LlmkitError("nothing to draw: no quant has figures for two contexts or more")
    chosen = _told_apart(shown) if len(shown) > _CROWD else shown
    if left := [line.name for line in shown if line not in chosen]:
        footnote += f"; too close to others to be drawn: {', '.join(left)}"
    matplotlib = _library()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # text stays text in an SVG, and no date makes two pictures of the same figures differ
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmkit", "font.size": 10}):
        figure = Figure(figsize=(9.6, 6.0), dpi=150, facecolor="white")
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _paint(axes, chosen, limit)
        axes.set_title(_plain(title), loc="left", fontsize=13, fontweight="bold", color=_INK, pad=12)
        figure.supxlabel(textwrap.fill(_plain(footnote), _FOOTNOTE_WIDTH), x=0.01, ha="left", fontsize=8, color=_PALE)
        try:
            with store.whole(path) as partial, warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a letter the font has not is drawn as a box
                metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
                figure.savefig(partial, format=kind, metadata=metadata)
        except OSError as error:
            raise LlmkitError(f"{path}: cannot be written: {error.strerror or error}", "Name another file.") from error


def _told_apart(lines: Sequence[Line]) -> list[Line]:
    """The uppermost, the lowest, and in the order given those that end far enough from all others chosen."""
    ordered = sorted(lines, key=lambda line: line.nbytes[-1])
    least = _APART * ordered[-1].nbytes[-1]
    chosen = [ordered[-1], ordered[0]]
    for line in lines:
        if all(abs(line.nbytes[-1] - other.nbytes[-1]) >= least for other in chosen):
            chosen.append(line)
    return [line for line in lines if line in chosen]


def _format(path: Path) -> str:
    kind = path.suffix.lower().lstrip(".")
    if kind not in FORMATS:
        raise Unsupported(f"{path}: a picture is written as {' or '.join(FORMATS)}", nearest_hint(kind, FORMATS))
    return kind


def _library() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MissingDependency("drawing needs the package 'matplotlib'", "pip install 'llmkit[plot]'") from None
    return matplotlib


# ── painting ──


def _paint(axes: Axes, lines: Sequence[Line], limit: Limit | None) -> None:
    ordered = sorted(lines, key=lambda line: -line.nbytes[-1])
    most = max(max(line.nbytes) for line in ordered)
    if limit is not None and limit.nbytes <= 2 * most:
        most = max(most, limit.nbytes)
    unit, name = (_GIB, "GiB") if most >= _GIB else (_MIB, "MiB")
    height = 1.06 * most / unit
    first = min(line.contexts[0] for line in ordered)
    last = max(line.contexts[-1] for line in ordered)
    axes.set_xscale("log", base=2)
    axes.set_xlim(first, last)
    axes.set_ylim(0, height)
    _marks(axes, first, last, name)
    ends = []
    for index, line in enumerate(ordered):
        colour = _SHADES[index * len(_SHADES) // len(ordered)]
        contexts, nbytes = _filled(line)
        memory = [each / unit for each in nbytes]
        axes.plot(contexts, memory, color=colour, linestyle=_DASHES[index % len(_DASHES)], linewidth=2)
        ends.append((memory[-1], _plain(line.name), colour))
    _name_ends(axes, ends, height)
    if limit is not None:
        _draw_limit(axes, limit, unit, most)


def _filled(line: Line) -> tuple[list[float], list[float]]:
    """A line with points between: memory grows straight with the context, so on an axis that doubles it is a curve."""
    contexts, nbytes = [float(line.contexts[0])], [float(line.nbytes[0])]
    for (x0, x1), (y0, y1) in zip(pairwise(line.contexts), pairwise(line.nbytes), strict=True):
        for step in range(1, _BETWEEN + 1):
            share = step / _BETWEEN
            contexts.append(x0 + (x1 - x0) * share)
            nbytes.append(y0 + (y1 - y0) * share)
    return contexts, nbytes


def _marks(axes: Axes, first: int, last: int, unit: str) -> None:
    """Axes with units, faint lines across, nothing else around."""
    powers = [1 << power for power in range(math.ceil(math.log2(first)), math.floor(math.log2(last)) + 1)]
    axes.set_xticks(powers, [_tokens(power) for power in powers])
    axes.minorticks_off()
    axes.set_xlabel("context (tokens)", color=_INK)
    axes.set_ylabel(f"memory needed ({unit})", color=_INK)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], height: float) -> None:
    """Each line's name at its end, moved apart where they would lie upon each other."""
    places = _apart([end for end, _, _ in ends], height * _APART, height)
    for (end, name, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            name, xy=(1.0, end), xytext=(1.025, place), xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(), va="center", ha="left", color=colour, fontsize=9.5,
            fontweight="bold", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _apart(wanted: Sequence[float], least: float, height: float) -> list[float]:
    """Places as near to those `wanted` (falling) as may be, `least` apart and within the axis."""
    places: list[float] = []
    for each in wanted:
        places.append(min(each, places[-1] - least) if places else min(each, height))
    floor = 0.0
    for index in range(len(places) - 1, -1, -1):
        places[index] = max(places[index], floor)
        floor = places[index] + least
    return places


def _draw_limit(axes: Axes, limit: Limit, unit: int, most: int) -> None:
    height = limit.nbytes / unit
    words = f"{_plain(limit.name)}: {limit.nbytes / _GIB:.1f} GiB"
    if limit.nbytes > most:
        axes.text(0.012, 0.975, f"{words}, above this picture", transform=axes.transAxes, va="top", color=_LIMIT)
        return
    axes.axhline(height, color=_LIMIT, linewidth=1.4, linestyle=(0, (1, 1.2)))
    axes.axhspan(height, axes.get_ylim()[1], color="#000000", alpha=0.045, linewidth=0)
    axes.annotate(
        words, xy=(0.012, height), xycoords=axes.get_yaxis_transform(), xytext=(0, 4), textcoords="offset points",
        va="bottom", color=_LIMIT, fontsize=9.5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.2},
    )  # fmt: skip


def _tokens(count: int) -> str:
    if count >= 1 << 20:
        return f"{count >> 20}M"
    return f"{count >> 10}k" if count >= 1024 else str(count)


def _plain(text: str) -> str:
    """Text as it is: a dollar sign would start mathematics, and characters that do not print have no shape."""
    return "".join(char if char.isprintable() else "?" for char in text).replace("$", r"\$")
