"""GGUF files about to be published: read by their headers, of one model, each a row of the card's table.

What a row says is measured on the file or stands in its metadata; what is in neither is not said.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

from .. import gguf
from ..errors import InvalidModel, LlmkitError, Unsupported
from ..gguf import SPLIT_NAME, Array, GgufFile
from ..model import quant_label
from ..quants import QUANTS, QUANTS_BY_FTYPE

QUALITY = "llmkit.quality."
REPOSITORY = re.compile(r"[A-Za-z0-9_.-]{1,96}/[A-Za-z0-9_.-]{1,96}")
_LANGUAGE = re.compile(r"[a-z]{2,3}")
# options a recipe may hold → whether a value follows
_OPTIONS = {"--type": True, "--tensor-type": True, "--output-type": True, "--embedding-type": True, "--pure": False}


@dataclass(frozen=True)
class Part:
    """One file in the repository."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Row:
    """One quant in the card: a file, or the parts of a split one.

    `source` is org/name of the base model, or the bare name its files had; `command` makes the quant again.
    `imatrix` is the name of the importance matrix it was made with. `quality` is what the file says was measured.
    """

    label: str
    parts: tuple[Part, ...]
    n_weights: int
    tensor_nbytes: int
    types: dict[str, int]
    architecture: str | None = None
    source: str | None = None
    revision: str | None = None
    recipe: str | None = None
    command: str | None = None
    version: str | None = None
    imatrix: str | None = None
    imatrix_fingerprint: str | None = None
    quality: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of all parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def bits_per_weight(self) -> Fraction:
        """Bits of tensor data per weight."""
        return Fraction(8 * self.tensor_nbytes, self.n_weights)

    @property
    def base_model(self) -> str | None:
        """`source`, if it is a repository."""
        return self.source if self.source and REPOSITORY.fullmatch(self.source) else None

    @property
    def tag(self) -> str | None:
        """The quant as others find it in the file's name (llama.cpp, Ollama), or None."""
        return quant_label(self.parts[0].name)


@dataclass(frozen=True)
class Companion:
    """An importance matrix sent along; `fingerprint` identifies its values as `llmkit quantize` does."""

    path: Path
    fingerprint: str


@dataclass(frozen=True)
class Release:
    """The files of one upload. What all its models say alike is asked of the first that says it."""

    models: tuple[GgufFile, ...]
    companions: tuple[Companion, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file to send."""
        return tuple(path for file in self.models for path in file.paths) + tuple(each.path for each in self.companions)

    def get(self, key: str) -> str | None:
        """A text of the metadata, from the first file that has it."""
        return next((text for file in self.models if (text := _text(file, key))), None)

    @property
    def base_model(self) -> str | None:
        """org/name of the checkpoint, if the files say it."""
        found = self.get("llmkit.source.repo")
        return found if found and REPOSITORY.fullmatch(found) else None

    @property
    def languages(self) -> tuple[str, ...]:
        """Language codes (general.languages) that are such."""
        found = next((data for file in self.models if isinstance(data := file.get("general.languages"), Array)), ())
        return tuple(code for code in found if isinstance(code, str) and _LANGUAGE.fullmatch(code))

    @property
    def embeds(self) -> bool:
        """Whether the model makes embeddings, not text: its metadata name a way of pooling."""
        return any(key.endswith(".pooling_type") for file in self.models for key in file.metadata)


def read(paths: Sequence[Path]) -> Release:
    """Read the headers of `paths`; split files are given by their first part.

    Raises ModelNotFound, AccessDenied, InvalidModel (no whole GGUF), Unsupported (no model), LlmkitError (files of
    different models, nothing but importance matrices).
    """
    paths = list(dict.fromkeys(paths))
    models, companions = [], []
    for path in paths:
        if _is_later_part(path, paths):
            continue
        if path.suffix.lower() == ".dat":
            companions.append(_companion(path))
            continue
        if path.suffix.lower() != ".gguf":
            raise Unsupported(f"{path}: is no .gguf file, nor the .dat of an importance matrix", "Give finished files.")
        file = gguf.read(path)
        if file.get("general.type") == "imatrix":
            companions.append(_companion(path))
        elif not file.tensors or not sum(prod(info.shape) for info in file.tensors.values()):
            raise InvalidModel(f"{path}: holds no weights")
        else:
            models.append(file)
    if not models:
        raise LlmkitError("no model among the files: a card describes at least one", "Give the GGUF files as well.")
    _refuse_mixture(models)
    return Release(tuple(models), tuple(companions))


def _is_later_part(path: Path, paths: Sequence[Path]) -> bool:
    """Whether `path` is a later part of a split file whose first part is given too, as *.gguf gives them."""
    match = SPLIT_NAME.match(path.name)
    return bool(
        match
        and int(match["number"]) != 1
        and path.with_name(f"{match['stem']}-00001-of-{match['count']}.gguf") in paths
    )


def _companion(path: Path) -> Companion:
    from ..quantize import imatrix

    return Companion(path, imatrix.read(path).fingerprint)


def _refuse_mixture(models: Sequence[GgufFile]) -> None:
    """Raise LlmkitError unless all files are of one model.

    To say nothing is to differ from those that say something: one base model and one licence stand above the table.
    """
    for what, key in (
        ("architecture", "general.architecture"),
        ("base model", "llmkit.source.repo"),
        ("number of layers", "{}.block_count"),
        ("width", "{}.embedding_length"),
        ("licence", "general.license"),
    ):
        found = {_scalar(file, key.format(_text(file, "general.architecture"))): file.path for file in models}
        if len(found) > 1:
            said = ", ".join(f"{path.name}: {value or 'not said'}" for value, path in found.items())
            raise LlmkitError(
                f"the files are not of one model: their {what} differs ({said})",
                "Upload each model to a repository of its own.",
            )


def _scalar(file: GgufFile, key: str) -> Any:
    found = file.get(key)
    return None if isinstance(found, Array) else found


def rows(release: Release, sha256: Mapping[Path, str]) -> tuple[Row, ...]:
    """The table's rows; `sha256` of every file of the release."""
    return tuple(_row(file, sha256, release) for file in release.models)


def _row(file: GgufFile, sha256: Mapping[Path, str], release: Release) -> Row:
    tensors = file.tensors.values()
    fingerprint = _text(file, "llmkit.imatrix.fingerprint")
    sent = next((each.path.name for each in release.companions if each.fingerprint == fingerprint), None)
    imatrix = sent or _base_name(_text(file, "quantize.imatrix.file"))
    return Row(
        label=_label(file),
        parts=tuple(Part(path.name, path.stat().st_size, sha256[path]) for path in file.paths),
        n_weights=sum(prod(info.shape) for info in tensors),
        tensor_nbytes=sum(info.nbytes for info in tensors),
        types=dict(Counter(info.type.name for info in tensors).most_common()),
        architecture=_text(file, "general.architecture"),
        source=_text(file, "llmkit.source.repo") or _text(file, "llmkit.source.name"),
        revision=_text(file, "llmkit.source.revision"),
        recipe=_text(file, "llmkit.recipe"),
        command=command(file, imatrix),
        version=_text(file, "llmkit.version"),
        imatrix=imatrix,
        imatrix_fingerprint=fingerprint,
        quality=_quality(file),
    )


def _label(file: GgufFile) -> str:
    """The file type it states, else the first word of its recipe, else the type most tensors have."""
    stated = QUANTS_BY_FTYPE.get(file.get("general.file_type"))
    made = (_text(file, "llmkit.recipe") or "").split(" ")[0]
    if stated and stated.default:
        return stated.name
    return made if made in QUANTS else _most_frequent(file)


def _most_frequent(file: GgufFile) -> str:
    return Counter(info.type.name for info in file.tensors.values() if len(info.shape) > 1).most_common(1)[0][0]


def _quality(file: GgufFile) -> dict[str, str]:
    """Every llmkit.quality.* of the file: what somebody measured and wrote there."""
    found = {key.removeprefix(QUALITY): file.get(key) for key in file.metadata if key.startswith(QUALITY)}
    return {key: _figure(value) for key, value in found.items() if not isinstance(value, Array)}


def _figure(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ── the command that makes a file again ──


def command(file: GgufFile, imatrix: str | None = None) -> str | None:
    """The command line that makes `file` again, from what its metadata say; None when they do not say enough."""
    recipe, source = _text(file, "llmkit.recipe"), _text(file, "llmkit.source.repo")
    revision = _text(file, "llmkit.source.revision")
    if source and revision:
        source = f"{source}@{revision}"
    source = source or _text(file, "llmkit.source.name")
    if recipe is None or source is None:
        return None
    options = _words(recipe)
    if not options:
        return None
    words = ["llmkit", "convert" if options[0] == "--type" else "quantize", source, *options]
    if _text(file, "llmkit.imatrix.fingerprint"):
        words += ["--imatrix", imatrix or "imatrix.gguf"]
    strange = any(not word.isprintable() for word in words) or source.startswith("-")
    return None if strange else shlex.join(words)


def _words(recipe: str) -> list[str]:
    """The words of a recipe (quantize/recipe.py writes words of a command line); empty when it is another text."""
    try:
        words = shlex.split(recipe)
    except ValueError:
        return []
    rest = iter(words[1:] if words and words[0] in QUANTS else words)
    for option in rest:
        if option not in _OPTIONS or (_OPTIONS[option] and not next(rest, "")):
            return []
    return words


def _text(file: GgufFile, key: str) -> str | None:
    found = file.get(key)
    return found if isinstance(found, str) and found else None


def _base_name(path: str | None) -> str | None:
    """The last word of a path of any system; the folders are nobody's business."""
    return (re.split(r"[\\/]", path)[-1] or None) if path else None
