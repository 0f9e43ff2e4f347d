"""What goes with a model when it is published: its card, measured on the files.

release.read(paths) → Release; release.rows(…) → its rows of the table; card.compose(rows, …) → README.md
"""

from .card import compose, kept_rows
from .release import Release, Row, read, rows

__all__ = ["Release", "Row", "compose", "kept_rows", "read", "rows"]
