"""Where a model's chat template lies, and which file wins when there are several.

Order of llama.cpp (gguf-py/gguf/vocab.py): the key chat_template of tokenizer_config.json; chat_template.jinja (with
additional_chat_templates/*.jinja as named ones); chat_template.json. transformers 5 writes the .jinja file only, so a
copy in tokenizer_config.json may be older: two that differ are reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...checkpoint import read_json
from ...errors import InvalidModel
from ...gguf import Value, ValueType
from .tokenizer_json import is_text

_CONFIG, _JINJA, _JSON = "tokenizer_config.json", "chat_template.jinja", "chat_template.json"


@dataclass(frozen=True)
class ChatTemplate:
    """Templates by name ("default" is the one used), the file they came from (None without any)."""

    templates: Mapping[str, str] = field(default_factory=dict)
    source: str | None = None
    warnings: tuple[str, ...] = ()

    def metadata(self) -> dict[str, Value]:
        """tokenizer.chat_template, .chat_template.NAME, .chat_templates (the names)."""
        named = {name: text for name, text in self.templates.items() if name != "default"}
        found = {f"tokenizer.chat_template.{name}": Value.string(text) for name, text in named.items()}
        if named:
            found["tokenizer.chat_templates"] = Value.array(ValueType.STRING, sorted(named))
        if "default" in self.templates:
            found["tokenizer.chat_template"] = Value.string(self.templates["default"])
        return found


def find(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate:
    """The chat template of `folder`. Raises InvalidModel when one is not text."""
    candidates = [
        (_CONFIG, _named(folder / _CONFIG, tokenizer_config.get("chat_template"))),
        (_JINJA, _jinja(folder)),
        (_JSON, _named(folder / _JSON, _from_json(folder / _JSON))),
    ]
    present = [(source, templates) for source, templates in candidates if templates]
    if not present:
        return ChatTemplate()
    source, templates = present[0]
    differing = [other for other, others in present[1:] if others.get("default") != templates.get("default")]
    notes = (f"the chat template in {other} differs from the one in {source}, which was taken" for other in differing)
    return ChatTemplate(templates, source, tuple(notes))


def _named(path: Path, found: Any) -> dict[str, str]:
    """One template, or a list of {name, template}; names are kept to letters, digits and underscores."""
    if found is None:
        return {}
    if is_text(found):
        return {"default": found}
    if not isinstance(found, list):
        raise InvalidModel(f"{path}: chat_template is {type(found).__name__}, expected text or a list of named texts")
    templates = {}
    for entry in found:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(name, str) or not name or not is_text(text):
            raise InvalidModel(f"{path}: chat_template holds an entry without a name or a template")
        templates["".join(char if char.isascii() and char.isalnum() else "_" for char in name)] = str(text)
    return templates


def _jinja(folder: Path) -> dict[str, str]:
    if not (folder / _JINJA).is_file():
        return {}
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    entries = [{"name": path.stem, "template": _read(path)} for path in more]
    return {"default": _read(folder / _JINJA), **_named(folder / "additional_chat_templates", entries)}


def _from_json(path: Path) -> Any:
    return read_json(path).get("chat_template") if path.is_file() else None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidModel(f"{path}: is not UTF-8: {error}") from None
