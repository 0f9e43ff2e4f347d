"""Which tokens play a role (bos, eos, unk, …) and which the tokenizer adds by itself.

Rules of llama.cpp's tree (gguf-py/gguf/vocab.py, SpecialVocab; PyPI's gguf 0.19.0 differs): the post-processor of
tokenizer.json says what is added and beats add_bos_token and its like in tokenizer_config.json; roles come from
tokenizer_config.json, then from config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import InvalidModel
from ...gguf import Value

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_KEYS = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "sep": "seperator_token_id",
    "pad": "padding_token_id", "mask": "mask_token_id", "eot": "eot_token_id", "eom": "eom_token_id",
}  # fmt: skip
_ADDABLE = ("bos", "eos", "sep")


@dataclass
class SpecialTokens:
    """`texts` and `ids` by role, `adds` says whether the tokenizer adds that role's token to a text."""

    texts: dict[str, str] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    normalizer: dict[str, bool] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def metadata(self) -> dict[str, Value]:
        """tokenizer.ggml.*_token_id and .add_*_token; cls has no key of its own."""
        found = {_KEYS[role]: Value.uint32(number) for role, number in self.ids.items() if role in _KEYS}
        found |= {f"add_{role}_token": Value.boolean(added) for role, added in self.adds.items() if role in _ADDABLE}
        return {f"tokenizer.ggml.{key}": value for key, value in found.items()}

    def normalizer_metadata(self) -> dict[str, Value]:
        """tokenizer.ggml.normalizer.*: written after the chat template, as llama.cpp does."""
        return {f"tokenizer.ggml.normalizer.{key}": Value.boolean(on) for key, on in self.normalizer.items()}


@dataclass(frozen=True)
class Sources:
    """What the folder says: tokenizer.json ({} without one), tokenizer_config.json, config.json; the final tokens."""

    document: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    config: Mapping[str, Any]
    added_ids: Mapping[str, int]
    all_ids: Mapping[str, int]
    n_tokens: int


def find(sources: Sources) -> SpecialTokens:
    """The special tokens of a folder. Raises InvalidModel for a negative id."""
    found = SpecialTokens()
    for role in _ROLES:
        if text := _text(sources.tokenizer_config.get(f"{role}_token")):
            found.texts[role] = text
    for role, stand_in in (("bos", "cls"), ("eos", "sep")):
        if role not in found.texts and stand_in in found.texts:
            found.texts[role] = found.texts[stand_in]
    for step in _processors(sources.document.get("post_processor")):
        _read_processor(step, found)
    _read_settings(sources.tokenizer_config, found)
    _read_ids(sources, found)
    _read_normalizer(sources.document.get("normalizer"), found)
    return found


def _text(entry: Any) -> str | None:
    """A token in tokenizer_config.json: its text, or an object with 'content'."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _processors(step: Any) -> list[Mapping[str, Any]]:
    if not isinstance(step, Mapping):
        return []
    inner = step.get("processors")
    return [child for child in inner if isinstance(child, Mapping)] if isinstance(inner, list) else [step]


def _read_processor(step: Mapping[str, Any], found: SpecialTokens) -> None:
    kind = step.get("type")
    if kind == "ByteLevel":
        found.adds.setdefault("bos", False)
        found.adds.setdefault("eos", False)
    elif kind == "RobertaProcessing":
        found.adds |= {"bos": True, "eos": True, "sep": True}
        for role, stand_in in (("cls", "bos"), ("sep", "eos")):
            pair = step.get(role)
            named = pair[0] if isinstance(pair, list) and pair and isinstance(pair[0], str) else None
            if role not in found.texts and (text := named or found.texts.get(stand_in)):
                found.texts[role] = text
    elif kind == "TemplateProcessing":
        first, last = _read_single(_template(step.get("single")), found)
        _read_pair(_template(step.get("pair")), first, last, found)


def _template(items: Any) -> list[tuple[str, str]]:
    """A template as ("SpecialToken" | "Sequence", its id) pairs."""
    if not isinstance(items, list):
        return []
    pairs = []
    for item in items:
        for kind in ("SpecialToken", "Sequence"):
            body = item.get(kind) if isinstance(item, Mapping) else None
            if isinstance(body, Mapping):
                pairs.append((kind, str(body.get("id", ""))))
    return pairs


def _read_single(single: Sequence[tuple[str, str]], found: SpecialTokens) -> tuple[str | None, str | None]:
    """What stands before and after one text: bos and eos, even under another name. Returns the two tokens."""
    if len(single) < 2:
        return None, None
    first, last = (text if kind == "SpecialToken" else None for kind, text in (single[0], single[-1]))
    if first:
        if first not in (found.texts.get("bos"), found.texts.get("cls")):
            for role in ("bos", "cls"):
                found.texts.setdefault(role, first)
        found.adds["bos"] = first in (found.texts.get("bos"), found.texts.get("cls"))
        if not found.adds["bos"]:
            found.warnings.append(f"the tokenizer begins every text with {first!r}, not its bos token: left out")
    if last:
        eos = found.texts.get("eos")
        if eos is not None and eos != last:  # a chat model's end of turn: what was eos ends the turn
            found.texts["eom" if "eot" in found.texts else "eot"] = eos
        found.texts["eos"] = last
        found.adds["eos"] = True
    return first, last


def _read_pair(pair: list[tuple[str, str]], first: str | None, last: str | None, found: SpecialTokens) -> None:
    """What stands between two texts: whether a separator is added (rerankers need it)."""
    if not pair:
        return
    start = 1 if first and pair[0] == ("SpecialToken", first) else 0
    stop = len(pair) - 1 if last and pair[-1] == ("SpecialToken", last) else len(pair)
    inner = pair[start:stop]
    if not inner or inner[0] != ("Sequence", "A") or inner[-1] != ("Sequence", "B"):
        return
    middle = [text if kind == "SpecialToken" else None for kind, text in inner[1:-1]]
    if not middle:
        return
    separators = {text for text in (found.texts.get("sep"), found.texts.get("eos")) if text}
    found.adds["sep"] = (middle[0] in separators and not last) or (len(middle) == 2 and middle[1] in separators)
    if found.adds["sep"] and "sep" not in found.texts:
        found.texts["sep"] = found.texts["eos"]


def _read_settings(tokenizer_config: Mapping[str, Any], found: SpecialTokens) -> None:
    for role in _ADDABLE:
        setting = tokenizer_config.get(f"add_{role}_token")
        if isinstance(setting, bool) and found.adds.setdefault(role, setting) != setting:
            found.warnings.append(
                f"tokenizer_config.json says add_{role}_token={str(setting).lower()}, the post-processor of "
                "tokenizer.json says otherwise: it decides"
            )


def _read_ids(sources: Sources, found: SpecialTokens) -> None:
    roles = (*_ROLES, *(role for role in ("eot", "eom") if role in found.texts))
    for role in roles:
        _set(role, sources.added_ids.get(found.texts.get(role, "")), "tokenizer_config.json", sources, found)
    for role in roles:
        number = sources.config.get(f"{role}_token_id")
        if role not in found.ids and isinstance(number, int) and not isinstance(number, bool):
            _set(role, number, f"config.json: {role}_token_id", sources, found)
    for role in roles:
        if role not in found.ids:
            _set(role, sources.all_ids.get(found.texts.get(role, "")), "tokenizer_config.json", sources, found)
    several = sources.config.get("eos_token_id")  # chat models list all that end an answer; the engine finds the others
    if "eos" not in found.ids and isinstance(several, list) and several and isinstance(several[0], int):
        _set("eos", several[0], "config.json: eos_token_id", sources, found)


def _set(role: str, number: int | None, where: str, sources: Sources, found: SpecialTokens) -> None:
    if number is None or number == -1:  # -1: how old configs say "none"
        return
    if number < 0:
        raise InvalidModel(f"{where} is {number}, expected a token id")
    if number >= sources.n_tokens:
        found.warnings.append(f"{where}: the {role} token is {number}, beyond the {sources.n_tokens} tokens: left out")
        return
    found.ids[role] = number


def _read_normalizer(step: Any, found: SpecialTokens) -> None:
    if not isinstance(step, Mapping):
        return
    kind = step.get("type")
    if kind == "Lowercase":
        found.normalizer["lowercase"] = True
    elif kind == "StripAccents":
        found.normalizer["strip_accents"] = True
    elif kind == "Sequence" and isinstance(step.get("normalizers"), list):
        for child in step["normalizers"]:
            _read_normalizer(child, found)
