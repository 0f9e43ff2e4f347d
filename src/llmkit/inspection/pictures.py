"""Pictures as values: points in a plane, also as SVG; tables of coloured cells, which a terminal and page.py draw.

Nothing is told by colour alone: points carry their names and a mark for their group, cells their words and numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from .page import safe

_WIDTH, _HEIGHT, _MARGIN = 900, 640, 60
_INKS = ("#0b3954", "#c8592b", "#2b7a4b", "#93458a", "#8a6200", "#1b6ca8")


@dataclass(frozen=True)
class Point:
    """A named point; `group` tells which mark it gets."""

    label: str
    x: float
    y: float
    group: int = 0


@dataclass(frozen=True)
class Scatter:
    """Points in a plane; `shares`: how much of their variance each of the two axes shows (0–1)."""

    points: tuple[Point, ...]
    shares: tuple[float, float]

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Least and greatest x, least and greatest y; never empty."""
        xs, ys = [point.x for point in self.points], [point.y for point in self.points]
        pad = 1e-9
        return min(xs) - pad, max(xs) + pad, min(ys) - pad, max(ys) + pad


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: what is written, how deep it is coloured (0–1, None: not at all), what a hover tells."""

    text: str
    depth: float | None = None
    more: str = ""


@dataclass(frozen=True)
class HeatMap:
    """A table of cells with names above and at the left."""

    title: str
    sentence: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def svg(scatter: Scatter, title: str) -> str:
    """The scatter as an SVG document of its own, with a name at every point."""
    left, right, low, high = scatter.bounds
    shapes = []
    for point in scatter.points:
        x = _MARGIN + (point.x - left) / (right - left) * (_WIDTH - 2 * _MARGIN)
        y = _HEIGHT - _MARGIN - (point.y - low) / (high - low) * (_HEIGHT - 2 * _MARGIN)
        ink = _INKS[point.group % len(_INKS)]
        side, anchor = (-8, "end") if x > _WIDTH * 0.8 else (8, "start")
        shapes.append(_mark(point.group, x, y, ink))
        shapes.append(
            f'<text x="{x + side:.1f}" y="{y + 4:.1f}" fill="{ink}" text-anchor="{anchor}">{safe(point.label)}</text>'
        )
    axes = [f"{share:.0%} of the variance" for share in scatter.shares]
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
            ' font-family="system-ui, sans-serif" font-size="13">',
            f"<title>{safe(title)}</title>",
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
            f'<text x="{_MARGIN}" y="28" font-size="16">{safe(title)}</text>',
            f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 16}" text-anchor="middle" fill="#666">→ {axes[0]}</text>',
            f'<text x="20" y="{_HEIGHT / 2}" text-anchor="middle" fill="#666"'
            f' transform="rotate(-90 20 {_HEIGHT / 2})">→ {axes[1]}</text>',
            *shapes,
            "</svg>\n",
        )
    )


def _mark(group: int, x: float, y: float, ink: str) -> str:
    """A circle, a square or a triangle."""
    if group % 3 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{ink}"/>'
    if group % 3 == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{ink}"/>'
    return f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z" fill="{ink}"/>'
