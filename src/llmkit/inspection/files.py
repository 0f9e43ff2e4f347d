"""What a GGUF file holds: shape, metadata, tokenizer, tensors by type and by role. Headers only, no weights.

Metadata is taken as it comes: a key of an unexpected type counts as absent here (the engine would refuse it).
Knows nothing of how the summary is shown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

from ..gguf import Array, GgufFile, TensorInfo, Value, ValueType
from ..quants import QUANTS_BY_FTYPE
from ..roles import role_of

_HEAD = 3  # items shown of an array

# people's word → key below the architecture's name (llama.cpp: src/llama-arch.cpp)
_SHAPE = {
    "layers": "block_count",
    "context": "context_length",
    "width": "embedding_length",
    "feed-forward width": "feed_forward_length",
    "attention heads": "attention.head_count",
    "key/value heads": "attention.head_count_kv",
    "experts": "expert_count",
    "experts used": "expert_used_count",
    "sliding window": "attention.sliding_window",
}

# what marks a turn in the template → the family of formats
_TEMPLATE_STYLES = (
    ("<|im_start|>", "ChatML"),
    ("<|start_header_id|>", "Llama 3"),
    ("<|header_start|>", "Llama 4"),
    ("<start_of_turn>", "Gemma"),
    ("<|turn>", "Gemma 4"),
    ("<｜Assistant｜>", "DeepSeek"),
    ("<|start|>", "Harmony"),
    ("[INST]", "Mistral / Llama 2"),
    ("<|assistant|>", "Zephyr / Phi 3"),
)

# llama.cpp: include/llama.h, llama_token_type
_TOKEN_TYPES = {1: "normal", 2: "unknown", 3: "control", 4: "user defined", 5: "unused", 6: "byte"}


@dataclass(frozen=True)
class MetadataRow:
    """One key. An array shows only its `count` and its first items as `value`."""

    key: str
    type: str
    value: Any
    count: int | None = None


@dataclass(frozen=True)
class SpecialToken:
    """A token with a job, e.g. `bos`; `text` is None when the id lies outside the vocabulary."""

    role: str
    id: int
    text: str | None


@dataclass(frozen=True)
class TemplateSummary:
    """A chat template: its `name`, length and the format it seems to write (None: of its own)."""

    name: str
    characters: int
    style: str | None


@dataclass(frozen=True)
class TokenizerSummary:
    """The vocabulary: `model` (gpt2 is byte-level BPE, llama is SentencePiece), `pre`, tokens, special ones."""

    model: str
    pre: str | None
    tokens: int
    merges: int
    types: dict[str, int]
    special: tuple[SpecialToken, ...]
    adds_bos: bool | None
    adds_eos: bool | None
    templates: tuple[TemplateSummary, ...]


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that share a type or a role: how many, their weights and bytes, and which `types` they have."""

    name: str
    tensors: int
    weights: int
    nbytes: int
    bits_per_weight: Fraction | None
    types: tuple[str, ...]


@dataclass(frozen=True)
class FileSummary:
    """Everything `llmkit inspect` shows. `nbytes` is the size on disk of all parts."""

    path: Path
    parts: int
    nbytes: int
    version: int
    architecture: str | None
    name: str | None
    quant: str | None
    weights: int
    bits_per_weight: Fraction | None
    tied: bool
    shape: dict[str, Any]
    tokenizer: TokenizerSummary | None
    by_type: tuple[TensorGroup, ...]
    by_role: tuple[TensorGroup, ...]


def summary(file: GgufFile) -> FileSummary:
    """The whole picture of `file`."""
    tensors = file.tensors.values()
    total = _group("all", tensors)
    architecture = _get(file, "general.architecture", str)
    return FileSummary(
        path=file.path,
        parts=len(file.paths),
        nbytes=sum(path.stat().st_size for path in file.paths),
        version=file.version,
        architecture=architecture,
        name=_get(file, "general.name", str),
        quant=_quant(file),
        weights=total.weights,
        bits_per_weight=total.bits_per_weight,
        tied="token_embd.weight" in file.tensors and "output.weight" not in file.tensors,
        shape=_shape(file, architecture or ""),
        tokenizer=tokenizer(file),
        by_type=by_type(tensors),
        by_role=by_role(tensors),
    )


def metadata(file: GgufFile) -> tuple[MetadataRow, ...]:
    """Every key in the file's order; arrays cut to their first items."""
    return tuple(_metadata_row(key, value) for key, value in file.metadata.items())


def tokenizer(file: GgufFile) -> TokenizerSummary | None:
    """The vocabulary in brief, or None when the file holds none."""
    model = _get(file, "tokenizer.ggml.model", str)
    if model is None:
        return None
    texts = _array(file, "tokenizer.ggml.tokens")
    merges = _array(file, "tokenizer.ggml.merges")
    kinds = Counter(_array(file, "tokenizer.ggml.token_type") or ())
    return TokenizerSummary(
        model=model,
        pre=_get(file, "tokenizer.ggml.pre", str),
        tokens=len(texts) if texts is not None else 0,
        merges=len(merges) if merges is not None else 0,
        types={name: kinds[number] for number, name in _TOKEN_TYPES.items() if kinds[number]},
        special=_special_tokens(file, texts),
        adds_bos=_get(file, "tokenizer.ggml.add_bos_token", bool),
        adds_eos=_get(file, "tokenizer.ggml.add_eos_token", bool),
        templates=_templates(file),
    )


def by_type(tensors: Iterable[TensorInfo]) -> tuple[TensorGroup, ...]:
    """Tensors grouped by type, the largest group first."""
    return _grouped((info.type.name, info) for info in tensors)


def by_role(tensors: Iterable[TensorInfo]) -> tuple[TensorGroup, ...]:
    """Tensors grouped by what they do in the model, the largest group first."""
    return _grouped((role_of(info.name), info) for info in tensors)


def _grouped(pairs: Iterable[tuple[str, TensorInfo]]) -> tuple[TensorGroup, ...]:
    groups: dict[str, list[TensorInfo]] = {}
    for name, info in pairs:
        groups.setdefault(name, []).append(info)
    rows = (_group(name, infos) for name, infos in groups.items())
    return tuple(sorted(rows, key=lambda group: (-group.nbytes, group.name)))


def _group(name: str, infos: Iterable[TensorInfo]) -> TensorGroup:
    infos = tuple(infos)
    weights, nbytes = sum(prod(info.shape) for info in infos), sum(info.nbytes for info in infos)
    return TensorGroup(
        name=name,
        tensors=len(infos),
        weights=weights,
        nbytes=nbytes,
        bits_per_weight=Fraction(8 * nbytes, weights) if weights else None,
        types=tuple(kind for kind, _ in Counter(info.type.name for info in infos).most_common()),
    )


def _get(file: GgufFile, key: str, kind: type) -> Any:
    data = file.get(key)
    return data if type(data) is kind else None


def _array(file: GgufFile, key: str) -> Array | None:
    data = file.get(key)
    return data if isinstance(data, Array) else None


def _metadata_row(key: str, value: Value) -> MetadataRow:
    if isinstance(value.data, Array):
        kind = f"array of {value.data.element.name.lower()}"
        return MetadataRow(key, kind, list(value.data[:_HEAD]), len(value.data))
    return MetadataRow(key, value.type.name.lower(), value.data)


def _quant(file: GgufFile) -> str | None:
    found = QUANTS_BY_FTYPE.get(_get(file, "general.file_type", int))
    return found.name if found else None


def _shape(file: GgufFile, architecture: str) -> dict[str, Any]:
    found = {word: file.get(f"{architecture}.{key}") for word, key in _SHAPE.items()}
    shape = {word: _per_layer(data) for word, data in found.items()}
    return {word: data for word, data in shape.items() if data not in (None, 0)}


def _per_layer(data: Any) -> Any:
    """A number for all layers, or the distinct ones of an array with one a layer."""
    if isinstance(data, Array):
        numeric = data.element not in (ValueType.STRING, ValueType.ARRAY)
        return sorted(set(data)) if numeric else None
    return data if isinstance(data, int) else None


def _special_tokens(file: GgufFile, texts: Array | None) -> tuple[SpecialToken, ...]:
    found = []
    for key in file.metadata:
        match = re.fullmatch(r"tokenizer\.ggml\.(\w+)_token_id", key)
        number = _get(file, key, int)
        if match and number is not None:
            inside = texts is not None and 0 <= number < len(texts) and texts.element is ValueType.STRING
            found.append(SpecialToken(match[1], number, texts[number] if inside and texts is not None else None))
    return tuple(found)


def _templates(file: GgufFile) -> tuple[TemplateSummary, ...]:
    found = []
    for key in file.metadata:
        match = re.fullmatch(r"tokenizer\.chat_template(?:\.(\w+))?", key)
        text = _get(file, key, str)
        if match and text is not None:
            style = next((style for mark, style in _TEMPLATE_STYLES if mark in text), None)
            found.append(TemplateSummary(match[1] or "default", len(text), style))
    return tuple(found)
