"""A model's memory as a tree of named parts, each with how its figure was got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from ..quants import TensorType
from .oracle import Cache
from .setting import Setting

MEASURED, DERIVED, LOOKED_UP = "measured", "derived", "looked up"
EXACT, CLOSED_FORM, ROUGH = "exact", "closed form", "rough"
REPACKED_PAGES = "mapped pages of repacked weights"


@dataclass(frozen=True)
class Part:
    """A named piece of memory in bytes. `evictable`: pages of the file, which the system may drop and read again."""

    name: str
    nbytes: int
    how: str
    parts: tuple[Part, ...] = ()
    evictable: bool = False


@dataclass(frozen=True)
class Variant:
    """The model in one quant: a type for every tensor, the size of its file, bits per weight."""

    label: str
    types: Mapping[str, TensorType]
    file_nbytes: int
    bits_per_weight: Fraction


@dataclass(frozen=True)
class MemoryEstimate:
    """What a variant takes in a setting. `error` instead of parts where the engine refuses the setting.

    `context` is what the engine makes of the wish. `tier`: EXACT, CLOSED_FORM or ROUGH. `untouched`: bytes of the
    compute buffer that are reserved for rows of logits nobody asks for. `why_not_asked`: what kept the engine from
    being asked, in its last words.
    """

    variant: Variant
    setting: Setting
    tier: str
    context: int
    parts: tuple[Part, ...]
    error: str | None = None
    kv: tuple[Cache, ...] = ()
    untouched: int = 0
    why_not_asked: str = ""

    @property
    def needed_nbytes(self) -> int:
        """Memory that must be there for the model to run well: all but what the system may drop."""
        return sum(part.nbytes for part in self.parts if not part.evictable)

    @property
    def resident_nbytes(self) -> int:
        """Memory that shows as taken after a full batch in a full context, where there is enough of it."""
        return sum(part.nbytes for part in self.parts) - self.untouched

    def part(self, name: str) -> int:
        """Bytes of the part `name`, 0 when there is none."""
        return sum(part.nbytes for part in self.parts if part.name == name)
