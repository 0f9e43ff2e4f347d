"""Searching the Hub: what it says of each model, and what follows from that, kept apart.

Parameters are looked up (the Hub read them in the headers of safetensors or GGUF files), else read off the name and
marked as such, else unknown. The size at Q4_K_M is derived from them, see `q4_k_m_nbytes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import client

SORTS = {"downloads": "downloads", "likes": "likes", "trending": "trendingScore", "updated": "lastModified"}
ACCURACY = "±8 %, below 1.2 B ±20 %"

_PAGE = 100
_EXPAND = (
    "safetensors", "gguf", "config", "siblings", "tags", "downloads", "likes", "gated", "lastModified", "library_name",
)  # fmt: skip
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SUFFIXES = {"safetensors": (".safetensors",), "gguf": (".gguf",), "onnx": (".onnx",), "pickle": _PICKLED}
_TAGS = {"safetensors": "safetensors", "gguf": "gguf", "onnx": "onnx", "pytorch": "pickle"}
_WEIGHTS_IN_NAME = re.compile(r"(?:^|[-_.])(\d{1,4}(?:\.\d{1,3})?)([BM])(?=$|[-_.])", re.IGNORECASE)
_EXPERTS_IN_NAME = re.compile(r"\d+x\d", re.IGNORECASE)  # 8x7B is neither 7 B nor 56 B
# several weights lie in one of these integers: their count is no count of parameters
_PACKED = ("I8", "U8", "I16", "U16", "I32", "U32")


@dataclass(frozen=True)
class Found:
    """A model as the Hub describes it; None is what the Hub did not say.

    `n_weights` comes from the Hub, or from the name where `weights_from_name`. `formats` of its weights: safetensors,
    mlx, gguf, onnx, and pickle only where there is nothing else. `packed`: the safetensors are quantized already.
    """

    name: str
    n_weights: int | None
    weights_from_name: bool
    q4_k_m_nbytes: int | None
    licence: str | None
    downloads: int | None
    likes: int | None
    updated: str | None
    formats: tuple[str, ...]
    packed: bool
    gated: bool | None
    architecture: str | None


def q4_k_m_nbytes(n_weights: int) -> int:
    """Bytes that a text model of `n_weights` parameters takes as Q4_K_M; derived, never exact.

    bits per weight = min(4.9 + 0.6e9 / n_weights, 6.2)

    4.9 is what large models come to. The token embedding (or the output matrix) is Q6_K, 1.7 bits more than the rest;
    some 0.35e9 weights lie in it whatever the model's size, hence the second term. Small models often have rows that
    do not divide into blocks of 256, which llama.cpp then stores in Q5_0 and Q8_0; hence the cap and the wide error.
    Against the engine's dry run on the shapes of 40 models (SmolLM2, Llama 2 to 3.2, Mistral, Mixtral, Phi, Qwen 2.5
    and 3, Gemma 3; 15 M to 405 B): within 7 % above 1.2e9 parameters, within 20 % below. The header (the vocabulary,
    up to 8 MB) is not counted, a vision tower is counted as text.
    """
    return round(n_weights * min(4.9 + 0.6e9 / n_weights, 6.2) / 8)


def search(
    words: str,
    *,
    limit: int = 20,
    sort: str = "downloads",
    only_gguf: bool = False,
    on_wait: Callable[[str], None] = lambda remark: None,
) -> tuple[Found, ...]:
    """The first `limit` models whose names match `words`, the most of `sort` (a key of SORTS) first.

    Raises LlmkitError (offline, out of order, an answer that is none), AccessDenied.
    """
    query: dict[str, Any] = {"search": words, "sort": SORTS[sort], "limit": min(limit, _PAGE), "expand": list(_EXPAND)}
    if only_gguf:
        query["filter"] = "gguf"
    found: dict[str, Found] = {}
    with client.asking(f"search '{words}'"):
        # HfApi.list_models asks the same, but one odd row breaks its whole answer
        for row in client.pages("api/models", query, on_wait):
            if isinstance(row, dict) and isinstance(row.get("id"), str):
                found.setdefault(row["id"], _found(row))
            if len(found) >= limit:
                break
    return tuple(found.values())


# ── one row ──


def _found(row: Mapping[str, Any]) -> Found:
    name = str(row["id"])
    tags = [tag for tag in row.get("tags") or () if isinstance(tag, str)]
    safetensors, header = _object(row, "safetensors"), _object(row, "gguf")
    packed = _is_packed(_object(safetensors, "parameters"))
    told = None if packed else _natural(safetensors.get("total")) or _natural(header.get("total"))
    guessed = None if told else weights_in_name(name)
    n_weights = told or guessed
    return Found(
        name=name,
        n_weights=n_weights,
        weights_from_name=guessed is not None,
        q4_k_m_nbytes=q4_k_m_nbytes(n_weights) if n_weights else None,
        licence=next((tag.partition(":")[2] for tag in tags if tag.startswith("license:")), None) or None,
        downloads=_natural(row.get("downloads")),
        likes=_natural(row.get("likes")),
        updated=_text(row.get("lastModified")),
        formats=_formats(row, tags),
        packed=packed,
        gated=None if row.get("gated") is None else bool(row["gated"]),  # the Hub says false, "auto" or "manual"
        architecture=_architecture(row),
    )


def weights_in_name(name: str) -> int | None:
    """The parameter count a name claims ("Qwen2.5-7B-Instruct" → 7e9), or None. Mixtures (8x7B) claim none."""
    word = name.rpartition("/")[2]
    match = None if _EXPERTS_IN_NAME.search(word) else _WEIGHTS_IN_NAME.search(word)
    if not match:
        return None
    return round(float(match[1]) * (1e9 if match[2] in "Bb" else 1e6)) or None


def _is_packed(parameters: Mapping[str, Any]) -> bool:
    """Whether more than a hundredth of the stored elements are integers that hold several weights each."""
    counts = {dtype: _natural(count) or 0 for dtype, count in parameters.items()}
    return 100 * sum(counts.get(dtype, 0) for dtype in _PACKED) > sum(counts.values())


def formats_of(names: Iterable[str]) -> tuple[str, ...]:
    """The formats that a model's weights come in, by the names of its files; pickle only when there is no other."""
    lower = [name.lower() for name in names]
    found = [kind for kind, suffixes in _SUFFIXES.items() if any(name.endswith(suffixes) for name in lower)]
    return tuple(kind for kind in found if kind != "pickle" or len(found) == 1)


def _formats(row: Mapping[str, Any], tags: Sequence[str]) -> tuple[str, ...]:
    siblings = row.get("siblings")
    if isinstance(siblings, list):
        found = formats_of(str(file.get("rfilename", "")) for file in siblings if isinstance(file, dict))
    else:
        said = [kind for tag, kind in _TAGS.items() if tag in tags]
        found = tuple(kind for kind in said if kind != "pickle" or len(said) == 1)
    if "mlx" in tags or row.get("library_name") == "mlx":
        found = tuple("mlx" if kind == "safetensors" else kind for kind in found)
    return found


def _architecture(row: Mapping[str, Any]) -> str | None:
    """The class that config.json names first."""
    names = _object(row, "config").get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _object(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def _natural(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
