"""The engine is asked which type each tensor gets; llama.cpp's mix rules are nowhere written again.

llama_model_quantize with dry_run on a header-only file logs every tensor's target type in milliseconds (llama.cpp
src/llama-quant.cpp). Bad headers can make it abort, so it runs in a child process.
"""

from __future__ import annotations

import ctypes as C
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import engine, gguf_writer
from ..convert.draft import GgufDraft
from ..errors import EngineError, LlmkitError, Unsupported
from ..gguf import Value
from ..quants import TENSOR_TYPES, TensorType
from .recipe import Recipe

_LINE = re.compile(r"\]\s+(\S+)\s+- \[[^\]]*\], type =\s+(\w+), size =\s+[\d.]+ MiB(?: ->\s+[\d.]+ MiB \((\w+)\))?")
_WILL_NEED = "will require an imatrix"
_TIMEOUT = 120.0
_GGML_NAMES = {row.name.lower(): row for row in TENSOR_TYPES.values()}  # the engine prints q4_K, f32, iq4_nl


@dataclass(frozen=True)
class Choice:
    """The engine's answer for one recipe: every tensor's type; whether it insists on an importance matrix."""

    types: dict[str, TensorType]
    needs_imatrix: bool


def ask(draft: GgufDraft, recipes: Sequence[Recipe], *, has_imatrix: bool) -> list[Choice]:
    """The types the engine would give each tensor of `draft` under each recipe.

    Raises EngineError with the engine's last log lines when it refuses the model's header or a recipe.
    """
    tied = all(tensor.name != "output.weight" for tensor in draft.tensors)
    with tempfile.TemporaryDirectory(prefix="llmkit-") as folder:
        path = Path(folder) / "header.gguf"
        try:
            rows = [(tensor.name, tensor.shape, tensor.type) for tensor in draft.tensors]
            gguf_writer.write_sparse(path, header(draft), rows)
        except OSError as error:
            hint = "Set TMPDIR to another folder."
            raise LlmkitError(f"{path}: cannot be written: {error.strerror}", hint) from error
        request = {"path": str(path), "recipes": [_request(recipe, tied, has_imatrix) for recipe in recipes]}
        answers = engine.run_in_child(function="llmkit.quantize.oracle:dry_runs", arguments=request, timeout=_TIMEOUT)
    return [_choice(draft, recipe, answer) for recipe, answer in zip(recipes, answers, strict=True)]


def header(draft: GgufDraft) -> dict[str, Value]:
    """The metadata without the vocabulary, which no question to the engine about types or memory needs."""
    architecture = str(draft.metadata["general.architecture"].data)
    found = {key: value for key, value in draft.metadata.items() if not key.startswith("tokenizer.")}
    tokens = draft.metadata.get("tokenizer.ggml.tokens")
    embedding = next((tensor for tensor in draft.tensors if tensor.name == "token_embd.weight"), None)
    if tokens is not None:
        found.setdefault(f"{architecture}.vocab_size", Value.uint32(len(tokens.data)))
    elif embedding is not None:
        found.setdefault(f"{architecture}.vocab_size", Value.uint32(embedding.shape[0]))
    found["tokenizer.ggml.model"] = Value.string("no_vocab")
    return found


def _request(recipe: Recipe, tied: bool, has_imatrix: bool) -> dict[str, Any]:
    copy = recipe.quant.default is None
    flags: dict[str, Any] = {"ftype": 0 if copy else recipe.quant.ftype, "only_copy": copy, "pure": recipe.pure}
    overrides = recipe.overrides(tied)
    if copy and overrides:
        raise Unsupported("COPY keeps every tensor as it is", "Leave out the type options, or name a quant.")
    if recipe.quant.default is not None and not recipe.quant.default.quantized:
        # The engine looks at patterns for quantized defaults only, at these two flags always.
        if recipe.tensor_types:
            raise Unsupported(f"{recipe.quant.name} takes no --tensor-type: the engine ignores it there")
        flags |= {name: kind.ggml_id for name, kind in recipe.ends(tied) if kind}
        overrides = []
    ids = [(pattern, TENSOR_TYPES[kind].ggml_id) for pattern, kind in overrides]
    return {"name": str(recipe), "flags": flags, "overrides": ids, "imatrix": has_imatrix}


def _choice(draft: GgufDraft, recipe: Recipe, answer: dict[str, Any]) -> Choice:
    types: dict[str, TensorType] = {}
    for tensor in draft.tensors:
        kind = _GGML_NAMES.get(answer["types"].get(tensor.name, "").lower())
        if kind is None:
            raise EngineError(f"the engine named no type for tensor '{tensor.name}' in {recipe}")
        if tensor.width % kind.block:
            raise Unsupported(
                f"{recipe}: rows of {tensor.width} in '{tensor.name}' do not divide into"
                f" {kind.name} blocks of {kind.block}"
            )
        types[tensor.name] = kind
    return Choice(types, answer["needs_imatrix"])


def dry_runs(path: str, recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the child: one dry run each. Returns {"types": {tensor: type name}, "needs_imatrix"} for each."""
    return [_dry_run(path, recipe) for recipe in recipes]


def _dry_run(path: str, recipe: dict[str, Any]) -> dict[str, Any]:
    loaded = engine.load()
    llama = loaded.llama
    params = llama.llama_model_quantize_default_params()
    params.dry_run, params.nthread, params.allow_requantize = True, 1, True
    for name, value in recipe["flags"].items():
        setattr(params, name, value)
    if recipe["imatrix"]:  # only whether there is one changes the types, so one dummy entry is enough
        one = (C.c_float * 1)(1.0)
        entries = (llama.llama_model_imatrix_data * 2)()
        entries[0].name, entries[0].data, entries[0].size = b"x", C.cast(one, C.POINTER(C.c_float)), 1
        params.imatrix = entries
    if recipe["overrides"]:
        table = (llama.llama_model_tensor_override * (len(recipe["overrides"]) + 1))()
        for row, (pattern, kind) in zip(table, recipe["overrides"], strict=False):
            row.pattern, row.type = pattern.encode(), kind
        params.tt_overrides = table
    with loaded.capture_log() as lines:
        code = llama.llama_model_quantize(path.encode(), b"unused.gguf", C.byref(params))
    if code != 0:
        raise loaded.error(f"the engine refuses {recipe['name']} for this model", lines)
    text = "\n".join(lines)
    types = {name: new or old for name, old, new in _LINE.findall(text)}
    return {"types": types, "needs_imatrix": _WILL_NEED in text}
