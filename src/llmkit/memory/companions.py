"""A second model beside the one estimated: a projector for images or sound, or a small model that drafts tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .. import convert, gguf
from ..errors import InvalidModel, LlmkitError, Unsupported, nearest_hint
from ..gguf import GgufFile
from ..gguf_writer import padded
from . import estimate as memory
from .parts import DERIVED, EXACT, MEASURED, REPACKED_PAGES, MemoryEstimate, Part
from .setting import Setting

PROJECTOR, DRAFT = "projector", "draft"
_PROJECTOR_ARCHITECTURE = "clip"  # llama.cpp tools/mtmd/clip-impl.h; also general.type "mmproj"


@dataclass(frozen=True)
class Companion:
    """What a second model adds, part by part, and what there is to say about it."""

    parts: tuple[Part, ...]
    remarks: tuple[str, ...]


def add_model(estimate: MemoryEstimate, path: Path, role: str) -> tuple[MemoryEstimate, tuple[str, ...]]:
    """`estimate` with the GGUF at `path` beside it, a PROJECTOR or DRAFT; and remarks.

    Raises Unsupported (role), InvalidModel (not such a file), ModelNotFound, LlmkitError (nobody can lay it out).
    """
    added = companion(path, role, estimate.setting)
    return replace(estimate, parts=(*estimate.parts, *added.parts)), added.remarks


def companion(path: Path, role: str, setting: Setting) -> Companion:
    """What the GGUF at `path` adds when it is run beside a model in `setting`. Raises what `add_model` raises."""
    if role not in _ROLES:
        raise Unsupported(f"unknown role '{role}' of a second model", nearest_hint(role, _ROLES))
    file = gguf.read(path)
    projects = file.get("general.architecture") == _PROJECTOR_ARCHITECTURE or file.get("general.type") == "mmproj"
    if projects is not (role == PROJECTOR):
        found = "a projector" if projects else "a language model"
        raise InvalidModel(f"{path}: is {found}, expected {_EXPECTED[role]}")
    return _ROLES[role](file, setting)


def _projector(file: GgufFile, setting: Setting) -> Companion:
    """Its tensors, which are all loaded; never mapped (llama.cpp tools/mtmd/clip.cpp)."""
    nbytes = sum(padded(tensor.nbytes) for tensor in file.tensors.values())
    return Companion(
        (Part("projector: weights", nbytes, DERIVED),),
        (
            "the projector's own buffers are not estimated: they grow with the image, to several GiB with some models; "
            "the engine prints them when it loads the projector",
        ),
    )


def _drafting(file: GgufFile, setting: Setting) -> Companion:
    """All of it, with the same context; its cache is in 16 bits unless told otherwise (llama.cpp common/common.h)."""
    draft = convert.from_gguf(file)
    beside = replace(setting, kv_k="f16", kv_v="f16")
    found = memory.estimate(draft, memory.variants(draft, ["COPY"]), [beside])[0][0]
    if found.error is not None:
        raise LlmkitError(f"{file.path}: the engine refuses it in this setting: {found.error}")
    needed = tuple(part for part in found.parts if not part.evictable)
    how = MEASURED if found.tier == EXACT else DERIVED
    dropped = sum(part.nbytes for part in found.parts if part.evictable)
    parts = [Part("draft model", found.needed_nbytes, how, needed)]
    if dropped:
        parts.append(Part(f"draft model: {REPACKED_PAGES}", dropped, DERIVED, evictable=True))
    return Companion(tuple(parts), (f"the draft model has a context of {found.context:,} tokens too",))


_ROLES: dict[str, Callable[[GgufFile, Setting], Companion]] = {PROJECTOR: _projector, DRAFT: _drafting}
_EXPECTED = {PROJECTOR: "a projector (mmproj)", DRAFT: "a language model"}
