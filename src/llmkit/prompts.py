"""The prompts that come with llmkit, and the user's own: system prompts, probes to watch a model on, personas.

Plain text, one prompt a file, the file's name is the prompt's: `prompts/` in a source tree, `prompt_files/` beside
this module when installed, and `own_folder()` with the same folders; of two with one name the user's own counts. Knows
nothing of chat formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import settings
from .errors import LlmkitError, ModelNotFound, nearest_hint

Kind = Literal["system", "probes", "personas"]
_KINDS: Mapping[str, tuple[str, str]] = {  # folder → suffix, and what one is called
    "system": (".md", "system prompt"),
    "probes": (".txt", "probe"),
    "personas": (".txt", "persona"),
}
_LARGEST = 1 << 20  # bytes; a prompt is a page


@dataclass(frozen=True)
class Listed:
    """A prompt and the file it comes from. `own`: the user's; `shadows`: one of ours has the same name."""

    name: str
    path: Path
    own: bool
    shadows: bool


def system(name: str) -> str:
    """The system prompt called `name`, e.g. "tutor". Raises ModelNotFound with the nearest names."""
    return _text("system", name)


def probe(name: str) -> str:
    """The probe called `name`, e.g. "capitals", to be continued by a model. Raises ModelNotFound with the nearest."""
    return _text("probes", name)


def persona(name: str) -> str:
    """The file of the persona called `name`, e.g. "bob" (chat/persona.py). Raises ModelNotFound with the nearest."""
    return _text("personas", name)


def system_names() -> tuple[str, ...]:
    """All system prompts, sorted."""
    return tuple(listed.name for listed in listing("system"))


def probe_names() -> tuple[str, ...]:
    """All probes, sorted."""
    return tuple(listed.name for listed in listing("probes"))


def persona_names() -> tuple[str, ...]:
    """All personas, sorted."""
    return tuple(listed.name for listed in listing("personas"))


def listing(kind: Kind) -> tuple[Listed, ...]:
    """All prompts of a kind by name, and where each comes from."""
    ours, own = _files(_folder(), kind), _files(own_folder(), kind)
    found = [Listed(name, path, own=False, shadows=False) for name, path in ours.items() if name not in own]
    found += [Listed(name, path, own=True, shadows=name in ours) for name, path in own.items()]
    return tuple(sorted(found, key=lambda each: each.name))


def own_folder() -> Path:
    """Where the user's own lie: system/NAME.md, probes/NAME.txt, personas/NAME.txt. It need not be there."""
    return settings.data() / "prompts"


def read_text(path: Path) -> str:
    """A prompt's file. Raises LlmkitError when it cannot be read, is no UTF-8 text, or far too long."""
    try:
        raw = path.read_bytes() if path.stat().st_size <= _LARGEST else None
    except OSError as error:
        raise LlmkitError(f"{path}: cannot be read: {error.strerror or error}") from error
    if raw is None:
        raise LlmkitError(f"{path}: is larger than {_LARGEST >> 20} MiB, which is no prompt")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LlmkitError(f"{path}: byte {error.start} is no UTF-8 text", "Save the file as UTF-8.") from error


def _text(kind: Kind, name: str) -> str:
    files = {listed.name: listed.path for listed in listing(kind)}
    if name not in files:
        raise ModelNotFound(f"there is no {_KINDS[kind][1]} called '{name}'", nearest_hint(name, files))
    text = read_text(files[name]).replace("\r\n", "\n")
    return text[:-1] if text.endswith("\n") else text  # the file's last newline is the editor's, not the prompt's


def _files(folder: Path, kind: Kind) -> dict[str, Path]:
    return {path.stem: path for path in (folder / kind).glob(f"*{_KINDS[kind][0]}") if path.is_file()}


def _folder() -> Path:
    installed = Path(__file__).with_name("prompt_files")
    return installed if installed.is_dir() else Path(__file__).parents[2] / "prompts"
