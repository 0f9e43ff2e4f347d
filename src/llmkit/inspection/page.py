"""One HTML page that stands alone: no script, no link to elsewhere, every text made safe, light and dark.

Tokens are coloured by their raw probability; what they might have been stands in their title and below. Nothing is told
by colour alone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pictures import Cell, HeatMap

# red for unlikely, blue for certain, told apart by those who cannot tell red from green
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto; max-width: 100% }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top }
td.r, th.r { text-align: right; font-variant-numeric: tabular-nums }
code, .mono { font-family: ui-monospace, monospace; overflow-wrap: anywhere }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; padding: .7rem; background: var(--soft);
  border-radius: .4rem }
.tokens span { border-radius: .2rem; padding: .1em 0; cursor: help }
.tokens span:hover { outline: 1px solid currentColor }
.flip { text-decoration: underline wavy 1px } .quiet { opacity: .75; font-size: .9rem }
summary { cursor: pointer }
table.heat { font: .8rem/1.3 ui-monospace, monospace }
.heat td, .heat th { border: 1px solid var(--line); padding: .25rem .5rem; white-space: pre }
"""
_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # they reorder what is read
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, body: Iterable[str], *, data: str = "") -> str:
    """The whole page. `body` is HTML already escaped; `data` a script element that only holds data."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{safe(title)}</h1>\n"
        + "\n".join(body)
        + f"\n{data}</body>\n</html>\n"
    )


def safe(text: str) -> str:
    """Escaped for HTML and XML; what neither can take (control characters, surrogates, no characters at all) or what
    turns the direction of writing is shown by its number."""

    def harms(char: str) -> bool:
        return unicodedata.category(char) in ("Cc", "Cs", "Cn") or unicodedata.bidirectional(char) in _DIRECTIONS

    shown = (f"‹U+{ord(char):04X}›" if char not in "\n\t" and harms(char) else char for char in text)
    return escape("".join(shown))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """A table; `align` holds `l` or `r` for each column. Cells are text."""
    sides = align.ljust(len(headers), "l")

    def line(cells: Sequence[object], tag: str) -> str:
        made = (
            f"<{tag}{' class=r' if side == 'r' else ''}>{safe(str(cell))}</{tag}>"
            for cell, side in zip(cells, sides, strict=False)
        )
        return f"<tr>{''.join(made)}</tr>"

    head = f"<thead>{line(headers, 'th')}</thead>" if any(headers) else ""
    return f"<table>{head}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of text."""
    return f"<p{f' class={kind}' if kind else ''}>{safe(text)}</p>"


def heading(text: str) -> str:
    """A heading."""
    return f"<h2>{safe(text)}</h2>"


def token(text: str, probability: float | None, title: str, *, flip: bool = False) -> str:
    """A token in the colour of its probability, with `title` to be seen when pointed at; `flip` underlines it."""
    style = "" if probability is None else f' style="background:{colour(probability)}"'
    return f'<span{" class=flip" if flip else ""}{style} title="{safe(title)}">{safe(text)}</span>'


def tokens(spans: Iterable[str]) -> str:
    """A block of tokens."""
    return f'<div class="tokens mono">{"".join(spans)}</div>'


def details(summary: str, body: str) -> str:
    """What is folded at first."""
    return f"<details><summary>{safe(summary)}</summary>{body}</details>"


def heat(shown: HeatMap) -> str:
    """A heat map with its heading and its sentence; a cell is deeper the more it has."""
    head = "".join(f'<th scope="col">{safe(name)}</th>' for name in ("", *shown.columns))
    rows = "\n".join(
        f'<tr><th scope="row">{safe(name)}</th>{"".join(map(_cell, cells))}</tr>' for name, cells in shown.rows
    )
    grid = f'<table class="heat"><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>'
    return f"{heading(shown.title)}\n{paragraph(shown.sentence)}\n{grid}"


def _cell(cell: Cell) -> str:
    share = min(max(cell.depth or 0.0, 0.0), 1.0)
    style = f' style="background:rgb(14 90 110 / {0.6 * share:.2f})"' if share else ""
    more = f' title="{safe(cell.more)}"' if cell.more else ""
    return f"<td{style}{more}>{safe(cell.text)}</td>"


def colour(probability: float) -> str:
    """A translucent ground for a probability: red at 0, yellow between, blue-green at 1; no colour where it is sure."""
    share = min(max(probability, 0.0), 1.0)
    return f"hsl({round(190 * share)} 90% 50% / {0.55 - 0.45 * share:.2f})"
