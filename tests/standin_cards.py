"""What the Hub says about a model from its files: card, tags, parameters in safetensors and GGUF headers."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from standin_files import Entry, Snapshot

Json = dict[str, Any]

# GGUF value types: their struct codes; 8 is a string, 9 an array
_GGUF_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# of a search's rows, what comes without being asked for
_BRIEF = ("_id", "id", "modelId", "private", "likes", "downloads", "tags", "pipeline_tag", "library_name", "createdAt")
_FULL = ("author", "sha", "lastModified", "gated", "disabled", "siblings")


@dataclass(frozen=True)
class Wishes:
    """Which properties a request asks for."""

    expand: tuple[str, ...] = ()
    full: bool = False
    card: bool = False
    config: bool = False
    blobs: bool = False


def about(snapshot: Snapshot, facts: Json, wishes: Wishes) -> Json:
    """Everything the Hub says about a model; `facts` (downloads, likes, gated …) stand above what the files say."""
    everything = _everything(snapshot, wishes.blobs) | facts
    if wishes.expand:
        return {key: value for key, value in everything.items() if key in {"_id", "id", *wishes.expand}}
    return everything


def in_search(snapshot: Snapshot, facts: Json, wishes: Wishes) -> Json:
    """A model's row in a search: as on the Hub, most properties come only when they are asked for."""
    if wishes.expand:
        return about(snapshot, facts, wishes)
    keys = {*_BRIEF, *(_FULL if wishes.full else ())}
    keys |= {"cardData"} if wishes.card else set()
    keys |= {"config"} if wishes.config else set()
    return {key: value for key, value in about(snapshot, facts, wishes).items() if key in keys}


def _everything(snapshot: Snapshot, blobs: bool) -> Json:
    card, config = _card(snapshot), _config(snapshot)
    info: Json = {
        "_id": snapshot.commit[:24], "id": snapshot.repo, "modelId": snapshot.repo, "sha": snapshot.commit,
        "author": snapshot.repo.split("/")[0], "lastModified": "2026-11-01T00:00:00.000Z",
        "createdAt": "2026-10-01T00:00:00.000Z",
        "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "cardData": card,
        "siblings": [entry.sibling(blobs) for entry in snapshot.entries.values()],
        "usedStorage": sum(entry.size for entry in snapshot.entries.values()),
    }  # fmt: skip
    if config:
        info["config"] = {key: config[key] for key in ("architectures", "model_type") if key in config}
    if weights := _safetensors(snapshot):
        info["safetensors"] = weights
    if gguf := _gguf(snapshot):
        info["gguf"] = gguf
    writes = any("CausalLM" in name for name in config.get("architectures") or ()) or bool(gguf)
    info["pipeline_tag"] = card.get("pipeline_tag") or ("text-generation" if writes else None)
    info["library_name"] = card.get("library_name") or ("transformers" if config else "gguf" if gguf else None)
    info["tags"] = _tags(info)
    return {key: value for key, value in info.items() if value is not None}


def _tags(info: Json) -> list[str]:
    card = info["cardData"]
    tags = [info["library_name"], *(kind for kind in ("safetensors", "gguf") if kind in info), info["pipeline_tag"]]
    tags += _several(card.get("tags")) + _several(card.get("language"))
    tags += [f"base_model:{name}" for name in _several(card.get("base_model"))]
    tags += [f"license:{card['license']}"] if "license" in card else []
    return list(dict.fromkeys(tag for tag in tags if tag))


def _several(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _config(snapshot: Snapshot) -> Json:
    entry = snapshot.entries.get("config.json")
    try:
        config = json.loads(entry.read()) if entry else {}
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _card(snapshot: Snapshot) -> Json:
    """The README's front matter: scalars and lists at its top level, which is what a licence needs."""
    entry = snapshot.entries.get("README.md")
    lines = entry.read().decode("utf-8", "replace").splitlines() if entry else []
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    card: Json = {}
    key = ""
    for line in lines[1 : lines.index("---", 1)]:
        if line.lstrip().startswith("- ") and isinstance(card.get(key), list):
            card[key].append(_scalar(line.lstrip()[2:]))
        elif ":" in line and not line[0].isspace():
            key, _, value = line.partition(":")
            value = value.strip()
            if value.startswith("[") and value.endswith("]"):
                card[key] = [_scalar(word) for word in value[1:-1].split(",")]
            else:
                card[key] = _scalar(value) if value else []
    return card


def _scalar(text: str) -> str:
    return text.strip().strip("\"'")


def _safetensors(snapshot: Snapshot) -> Json | None:
    counts: dict[str, int] = {}
    for entry in snapshot.entries.values():
        if entry.name.endswith(".safetensors") and "/" not in entry.name:
            for dtype, n in _safetensors_counts(entry.source, entry.size, entry.mtime_ns).items():
                counts[dtype] = counts.get(dtype, 0) + n
    return {"parameters": counts, "total": sum(counts.values())} if counts else None


@lru_cache(maxsize=1024)
def _safetensors_counts(source: Path | bytes, size: int, mtime_ns: int) -> dict[str, int]:
    counts: dict[str, int] = {}
    with _opened(source) as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
            for name, tensor in header.items():
                if name != "__metadata__":
                    counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            return {}  # not a safetensors file but for its name, as tests like to make them
    return counts


def _gguf(snapshot: Snapshot) -> Json | None:
    files = sorted(entry.name for entry in snapshot.entries.values() if entry.name.endswith(".gguf"))
    for name in files:
        entry: Entry = snapshot.entries[name]
        if found := _gguf_facts(entry.source, entry.size, entry.mtime_ns):
            return found
    return None


@lru_cache(maxsize=1024)
def _gguf_facts(source: Path | bytes, size: int, mtime_ns: int) -> Json | None:
    with _opened(source) as file:
        try:
            magic, version, n_tensors, n_values = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                return None
            values = {}
            for _ in range(n_values):
                key = _gguf_string(file)
                values[key] = _gguf_value(file, *_unpack(file, "<I"))
            total = 0
            for _ in range(n_tensors):
                _gguf_string(file)
                (rank,) = _unpack(file, "<I")
                total += math.prod(_unpack(file, f"<{rank}Q"))
                file.seek(12, 1)
        except (struct.error, ValueError, KeyError):
            return None  # not a GGUF file but for its name
    architecture = str(values.get("general.architecture", ""))
    facts: Json = {"total": total, "architecture": architecture}
    for name, key in (
        ("context_length", f"{architecture}.context_length"),
        ("chat_template", "tokenizer.chat_template"),
    ):
        if key in values:
            facts[name] = values[key]
    return facts


def _gguf_value(file: BinaryIO, kind: int) -> Any:
    """A value; of arrays only that they are there."""
    if kind == _STRING:
        return _gguf_string(file)
    if kind == _ARRAY:
        element, n = _unpack(file, "<IQ")
        if element in _GGUF_CODES:
            file.seek(n * struct.calcsize(f"<{_GGUF_CODES[element]}"), 1)
        else:
            for _ in range(n):
                _gguf_value(file, element)
        return []
    return _unpack(file, f"<{_GGUF_CODES[kind]}")[0]


def _gguf_string(file: BinaryIO) -> str:
    return file.read(_unpack(file, "<Q")[0]).decode("utf-8", "replace")


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _opened(source: Path | bytes) -> BinaryIO:
    return BytesIO(source) if isinstance(source, bytes) else source.open("rb")
