"""tokenizer.json, checked: tokens, merges and added tokens of a BPE model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint import read_json
from ...errors import InvalidModel, Unsupported

_MAX_ID = 1 << 24  # far above any vocabulary; keeps a wild id from allocating a list of that length
_MAX_DEPTH = 24  # of steps in steps: six already is unheard of
_EXPECTED = f"expected 0 … {_MAX_ID - 1}"


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before anything else happens."""

    id: int
    content: str
    special: bool
    normalized: bool
    trims: bool  # swallows neighbouring blanks, or matches whole words only: the engine can do neither


@dataclass(frozen=True)
class TokenizerJson:
    """`vocab` holds the model's own tokens, `added` the others and those of the vocab that are matched whole."""

    path: Path
    document: Mapping[str, Any]
    vocab: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    added: tuple[AddedToken, ...]
    byte_fallback: bool
    unk_token: str | None

    @property
    def n_tokens(self) -> int:
        """Highest id + 1."""
        ids = [*self.vocab.values(), *(token.id for token in self.added)]
        return max(ids, default=-1) + 1


def read(path: Path) -> TokenizerJson:
    """Read and check `path`. Raises InvalidModel naming the file and the key; Unsupported for models other than BPE."""
    document = read_json(path)
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if not _is_shallow(document.get(key), _MAX_DEPTH):
            raise InvalidModel(f"{path}: {key} is nested deeper than {_MAX_DEPTH}")
    model = document.get("model")
    if not isinstance(model, dict):
        raise InvalidModel(f"{path}: has no object 'model'")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise Unsupported(f"{path}: model.type is {kind!r}; of the tokenizer.json kinds llmkit converts BPE")
    vocab = _vocab(path, model.get("vocab"))
    unk = model.get("unk_token")
    return TokenizerJson(
        path,
        document,
        vocab,
        _merges(path, model.get("merges")),
        _added(path, document.get("added_tokens"), vocab),
        bool(model.get("byte_fallback", False)),
        unk if isinstance(unk, str) else None,
    )


def _is_shallow(value: Any, depth: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in inner)


def is_text(value: Any) -> bool:
    """Whether `value` is a string that UTF-8 can hold (JSON can spell lone surrogates)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_id(value: Any) -> bool:
    """Whether `value` can be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_ID


def _vocab(path: Path, found: Any) -> dict[str, int]:
    if not isinstance(found, dict) or not found:
        raise InvalidModel(f"{path}: model.vocab is missing or empty, expected an object of token: id")
    owner: dict[int, str] = {}
    for token, number in found.items():
        if not is_text(token) or not is_id(number):
            raise InvalidModel(f"{path}: model.vocab: token {token!r} has the id {number!r}, {_EXPECTED}")
        if number in owner:
            raise InvalidModel(f"{path}: model.vocab: tokens {owner[number]!r} and {token!r} both have the id {number}")
        owner[number] = token
    return found


def _merges(path: Path, found: Any) -> tuple[tuple[str, str], ...]:
    """Merges as pairs; old files hold "left right", newer ones [left, right] (so that a part may hold a space)."""
    if not isinstance(found, list):
        raise InvalidModel(f"{path}: model.merges is missing, expected a list")
    pairs = []
    for position, merge in enumerate(found):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(is_text(part) and part for part in parts):
            raise InvalidModel(f"{path}: model.merges[{position}] is {str(merge)[:60]!r}, expected two parts")
        pairs.append((parts[0], parts[1]))
    return tuple(pairs)


def _added(path: Path, found: Any, vocab: Mapping[str, int]) -> tuple[AddedToken, ...]:
    if found is None:
        return ()
    if not isinstance(found, list):
        raise InvalidModel(f"{path}: added_tokens is not a list")
    tokens = [_added_token(path, f"added_tokens[{position}]", entry) for position, entry in enumerate(found)]
    ids, by_id = dict(vocab), {number: token for token, number in vocab.items()}
    for token in tokens:
        claim = f"{path}: added_tokens: {token.content!r} claims the id {token.id}"
        if (known := ids.setdefault(token.content, token.id)) != token.id:
            raise InvalidModel(f"{claim}, but has {known} already")
        if (owner := by_id.setdefault(token.id, token.content)) != token.content:
            raise InvalidModel(f"{claim}, which {owner!r} has")
    return tuple(tokens)


def _added_token(path: Path, where: str, entry: Any) -> AddedToken:
    if not isinstance(entry, dict) or not is_text(entry.get("content")) or not entry["content"]:
        raise InvalidModel(f"{path}: {where} has no 'content'")
    if not is_id(entry.get("id")):
        raise InvalidModel(f"{path}: {where} ({entry['content']!r}) has the id {entry.get('id')!r}, {_EXPECTED}")
    trims = any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
    return AddedToken(
        entry["id"], entry["content"], bool(entry.get("special")), bool(entry.get("normalized", True)), trims
    )
