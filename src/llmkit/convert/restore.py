"""GGUF → checkpoint folder: the way back, for families with one file a tensor (llama).

Used by the demo and by tests, where no original can be downloaded: what is in the GGUF is decoded and written as a
Hugging Face folder. A quantized GGUF stays as lossy as it was.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .. import gguf, store
from ..errors import Unsupported
from ..gguf import GgufFile
from .architectures.llama import ARCHITECTURE
from .tensors import LazyTensor, Rows, from_info, split_rope_pairs

_CHUNK_ROWS = 4096
_DIGITS_FIRST = {"smollm"}  # pre-tokenizers that split single digits before byte level (llama.cpp src/llama-vocab.cpp)


def checkpoint(path: Path, folder: Path, *, dtype: str = "bf16") -> None:
    """Write `folder` (config, tokenizer, model.safetensors in bf16, f16 or f32) from the GGUF at `path`.

    Raises Unsupported for any architecture but llama and any vocabulary but byte-level BPE.
    """
    file = gguf.read(path)
    if file.get("general.architecture") != "llama":
        raise Unsupported(f"{path}: only llama models can be turned back, this is {file.get('general.architecture')}")
    store.make_folder(folder)
    config = _config(file, dtype)
    _write_json(folder / "config.json", config)
    tokenizer_files(file, folder)
    _write_safetensors(folder / "model.safetensors", _tensors(file, config), dtype)


def _config(file: GgufFile, dtype: str) -> dict[str, Any]:
    def key(name: str) -> Any:
        return file.get(f"llama.{name}")

    n_head = key("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": n_head,
        "num_key_value_heads": key("attention.head_count_kv") or n_head,
        "vocab_size": len(file.get("tokenizer.ggml.tokens")),
        "max_position_embeddings": key("context_length"),
        "rope_theta": key("rope.freq_base") or 10000.0,
        "rms_norm_eps": float(f"{key('attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[dtype],
    }


def _tensors(file: GgufFile, config: dict[str, Any]) -> list[LazyTensor]:
    names = {
        row.target.format(block): row.source.format(block)
        for row in ARCHITECTURE.rows
        for block in range(config["num_hidden_layers"])
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = []
    for info in file.tensors.values():
        if info.name not in names:
            raise Unsupported(f"{file.path}: nobody maps tensor '{info.name}' back")
        lazy = from_info(info)
        if count := heads.get(info.name.split(".")[-2]):
            lazy = split_rope_pairs(lazy, count)
        found.append(replace(lazy, name=names[info.name]))
    return found


def _encode(rows: Rows, dtype: str) -> Rows:
    """float32 → the bytes of `dtype`; bfloat16 rounds to nearest even."""
    if dtype == "f32":
        return rows
    if dtype == "f16":
        return rows.astype(np.float16)
    bits = rows.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_safetensors(path: Path, lazy: list[LazyTensor], dtype: str) -> None:
    itemsize = 4 if dtype == "f32" else 2
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in lazy:
        end = position + prod(tensor.shape) * itemsize
        header[tensor.name] = {"dtype": dtype.upper(), "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with store.whole(path) as partial, open(partial, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in lazy:
            for start in range(0, tensor.n_rows, _CHUNK_ROWS):
                stop = min(start + _CHUNK_ROWS, tensor.n_rows)
                out.write(_encode(np.ascontiguousarray(tensor.float32(start, stop)), dtype).tobytes())


def tokenizer_files(file: GgufFile, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for a byte-level BPE vocabulary."""
    if file.get("tokenizer.ggml.model") != "gpt2":
        raise Unsupported(f"{file.path}: only byte-level BPE vocabularies can be turned back")
    tokens, kinds = list(file.get("tokenizer.ggml.tokens")), list(file.get("tokenizer.ggml.token_type"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    splits: list[dict[str, Any]] = [byte_level]
    if file.get("tokenizer.ggml.pre") in _DIGITS_FIRST:
        splits.insert(0, {"type": "Digits", "individual_digits": True})
    added = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, kind in enumerate(kinds)
        if kind == 3
    ]
    merges = [merge.split(" ", 1) for merge in file.get("tokenizer.ggml.merges")]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}  # fmt: skip
    _write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": byte_level, "model": model,
    })  # fmt: skip
    special = {
        f"{name}_token": tokens[file.get(f"tokenizer.ggml.{key}_token_id")]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if file.get(f"tokenizer.ggml.{key}_token_id") is not None
    }
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "model_max_length": file.get("llama.context_length"),
        "chat_template": file.get("tokenizer.chat_template"), **special,
    })  # fmt: skip


def _write_json(path: Path, value: Any) -> None:
    with store.whole(path) as partial:
        partial.write_text(json.dumps(value, ensure_ascii=False, indent=1), "utf-8")
