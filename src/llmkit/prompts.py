"""The prompts that come with llmkit: system prompts by name, and probes, texts to watch a model on.

Plain text, one prompt a file, the file's name is the prompt's: `prompts/` in a source tree, `prompt_files/` beside
this module when installed. Knows nothing of chat formats.
"""

from __future__ import annotations

from pathlib import Path

from .errors import ModelNotFound, nearest_hint

_SUFFIXES = {"system": ".md", "probes": ".txt"}


def system(name: str) -> str:
    """The system prompt called `name`, e.g. "tutor". Raises ModelNotFound with the nearest names."""
    return _text("system", name, "system prompt")


def probe(name: str) -> str:
    """The probe called `name`, e.g. "capitals", to be continued by a model. Raises ModelNotFound with the nearest."""
    return _text("probes", name, "probe")


def system_names() -> tuple[str, ...]:
    """All system prompts, sorted."""
    return tuple(sorted(_files("system")))


def probe_names() -> tuple[str, ...]:
    """All probes, sorted."""
    return tuple(sorted(_files("probes")))


def _text(kind: str, name: str, word: str) -> str:
    files = _files(kind)
    if name not in files:
        raise ModelNotFound(f"there is no {word} called '{name}'", nearest_hint(name, files))
    text = files[name].read_text(encoding="utf-8")
    return text[:-1] if text.endswith("\n") else text  # the file's last newline is the editor's, not the prompt's


def _files(kind: str) -> dict[str, Path]:
    return {path.stem: path for path in (_folder() / kind).glob(f"*{_SUFFIXES[kind]}")}


def _folder() -> Path:
    installed = Path(__file__).with_name("prompt_files")
    return installed if installed.is_dir() else Path(__file__).parents[2] / "prompts"
