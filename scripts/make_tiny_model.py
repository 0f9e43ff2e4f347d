#!/usr/bin/env python3
"""Writes small random checkpoints, in every shape llmkit converts, as transformers would have saved them.

    make_tiny_model.py OUT --family gemma3 --width 64 --layers 7 --dtype bf16 --config-style 5
    make_tiny_model.py OUT --synthetic 1b          # 1.17 billion weights, for scripts/bench_quantize.py

Needs numpy, and tokenizers or sentencepiece for the vocabulary; neither torch nor transformers. The same options give
the same bytes on the same Python version. The weights are scaled so that logits spread by a few units and attention
looks at more than one token: a wrong permutation, norm or rope setting moves the logits far beyond rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import tiny_vocabularies
from tiny_vocabularies import Vocabulary

FloatArray = npt.NDArray[np.float32]
Shape = tuple[int, ...]
DTYPE_NAMES = {"f32": ("F32", 4, "float32"), "f16": ("F16", 2, "float16"), "bf16": ("BF16", 2, "bfloat16")}


@dataclass(frozen=True)
class Family:
    """What tells one family from another. `vocabulary` is its kind in tiny_vocabularies, `wide_heads` doubles head_dim.

    `extra_rows` are embedding rows beyond the tokenizer's last token.
    """

    model_type: str
    architecture: str
    vocabulary: str
    tied: bool = False
    biases: bool = False
    head_norms: bool = False
    wide_heads: bool = False
    extra_rows: int = 0


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", "llama"),
    "llama3": Family("llama", "LlamaForCausalLM", "llama3"),
    "mistral": Family("mistral", "MistralForCausalLM", "mistral"),
    "smollm": Family("llama", "LlamaForCausalLM", "smollm", tied=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", "qwen", biases=True, extra_rows=29),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", "qwen", tied=True, head_norms=True, wide_heads=True, extra_rows=29),
    "gemma3": Family(
        "gemma3_text", "Gemma3ForCausalLM", "gemma", tied=True, head_norms=True, wide_heads=True, extra_rows=64
    ),
}


@dataclass(frozen=True)
class Options:
    """One checkpoint. `width` is hidden_size; `tied` and `head_dim` are the family's unless given.

    `biases` gives a Llama biases on every projection (attention_bias, mlp_bias).
    """

    family: str = "llama"
    dtype: str = "bf16"
    width: int = 64
    layers: int = 2
    seed: int = 0
    tied: bool | None = None
    head_dim: int | None = None
    biases: bool = False
    shards: int = 1
    config_style: int = 4


# --- configuration ---------------------------------------------------------------------------------------------------


def configuration(options: Options, *, vocabulary: Vocabulary, vocab_size: int) -> dict[str, Any]:
    """config.json as transformers 4 (rope_theta, rope_scaling, torch_dtype) or 5 (rope_parameters, dtype) writes it."""
    family = FAMILIES[options.family]
    heads = 4
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
        "hidden_size": options.width,
        "intermediate_size": 2 * options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512 if options.family == "llama3" else 4096,
        "rms_norm_eps": 1e-6 if family.model_type.startswith(("qwen", "gemma")) else 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": family.tied if options.tied is None else options.tied,
        "vocab_size": vocab_size,
        "use_cache": True,
        "transformers_version": "4.57.1" if options.config_style == 4 else "5.23.0",
    }
    if options.head_dim or family.wide_heads or options.config_style == 5 and family.model_type != "qwen2":
        config["head_dim"] = options.head_dim or options.width // heads * (2 if family.wide_heads else 1)
    config["torch_dtype" if options.config_style == 4 else "dtype"] = DTYPE_NAMES[options.dtype][2]
    return config | _activation(options) | _rope(options)


def _activation(options: Options) -> dict[str, Any]:
    """Keys of one family only: activation, biases, windows."""
    family = FAMILIES[options.family]
    if family.model_type == "gemma3_text":
        kinds = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(options.layers)]
        pattern = "sliding_window_pattern" if options.config_style == 4 else "_sliding_window_pattern"
        return {
            "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attn_logit_softcapping": None,
            "final_logit_softcapping": None, "query_pre_attn_scalar": options.width // 2, "sliding_window": 16,
            pattern: 6, "layer_types": kinds,
        }  # fmt: skip
    if family.model_type.startswith("qwen"):
        window = {"use_sliding_window": False, "max_window_layers": options.layers}
        plain = {"attention_bias": False} if family.model_type == "qwen3" else {}
        sliding = 4096 if options.config_style == 4 else None  # ignored while use_sliding_window is false
        return {"hidden_act": "silu", "sliding_window": sliding, **window, **plain}
    if family.model_type == "mistral":
        return {"hidden_act": "silu", "sliding_window": None}
    return {"hidden_act": "silu", "attention_bias": options.biases, "mlp_bias": options.biases, "pretraining_tp": 1}


def _rope(options: Options) -> dict[str, Any]:
    """Rope settings in the words of the generation; values like those of the family's real models."""
    theta = {"llama3": 500000.0, "smollm": 100000.0, "qwen2": 1e6, "qwen3": 1e6, "mistral": 1e6, "gemma3": 1e6}
    base = theta.get(options.family, 10000.0)
    scaling: dict[str, Any] | None = None
    if options.family == "llama3":
        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        # 64, not 8192: all three branches of the scaling are then felt within a hundred tokens
        scaling |= {"original_max_position_embeddings": 64, "rope_type": "llama3"}
    if options.family == "gemma3":
        scaling = {"factor": 8.0, "rope_type": "linear"}
    if options.config_style == 4:
        local = {"rope_local_base_freq": 10000.0} if options.family == "gemma3" else {}
        return {"rope_theta": base, "rope_scaling": scaling, **local}
    full = {"rope_theta": base, **(scaling or {"rope_type": "default"})}
    if options.family != "gemma3":
        return {"rope_parameters": full}
    sliding = {"rope_theta": 10000.0, "rope_type": "default"}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


# --- weights ---------------------------------------------------------------------------------------------------------


def weight_shapes(config: dict[str, Any], family: Family) -> Iterator[tuple[str, Shape]]:
    """Names and shapes (rows, width) of all tensors, block by block."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)
    yield "model.embed_tokens.weight", (vocab, hidden)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family.model_type == "gemma3_text":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in norms:
            yield f"{prefix}{name}.weight", (hidden,)
        rows = {"self_attn.q": q, "self_attn.k": kv, "self_attn.v": kv, "self_attn.o": hidden}
        rows |= {"mlp.gate": ffn, "mlp.up": ffn, "mlp.down": hidden}
        widths = {"self_attn.o": q, "mlp.down": ffn}
        for name, count in rows.items():
            yield f"{prefix}{name}_proj.weight", (count, widths.get(name, hidden))
            everywhere = config.get("mlp_bias" if name.startswith("mlp") else "attention_bias")
            if everywhere or family.biases and name in ("self_attn.q", "self_attn.k", "self_attn.v"):
                yield f"{prefix}{name}_proj.bias", (count,)
        if family.head_norms:
            yield from ((f"{prefix}self_attn.{name}_norm.weight", (head_dim,)) for name in "qk")
    yield "model.norm.weight", (hidden,)


def weight(name: str, shape: Shape, *, config: dict[str, Any], seed: int) -> FloatArray:
    """Gaussian float32, the same for a name and seed whatever else the checkpoint holds."""
    noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return np.float32(0.2) * noise + np.float32(0 if config["model_type"] == "gemma3_text" else 1)
    if name.endswith(".bias"):
        return np.float32(0.5) * noise
    if "embed_tokens" in name and not config["tie_word_embeddings"]:
        return noise
    gain = 4.0 if "embed_tokens" in name or "lm_head" in name else 1.5
    return np.float32(gain / math.sqrt(shape[-1])) * noise


def encode(values: FloatArray, dtype: str) -> bytes:
    """Little-endian bytes; BF16 is rounded to nearest, ties to even."""
    if dtype == "f32":
        return values.astype("<f4").tobytes()
    if dtype == "f16":
        return values.astype("<f2").tobytes()
    bits = values.astype("<f4").view("<u4")
    rounded: bytes = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return rounded


def write_safetensors(path: Path, tensors: Iterable[tuple[str, str, Shape, int]], data: Iterable[bytes]) -> None:
    """One file: `tensors` rows are (name, dtype, shape, nbytes), `data` their bytes in the same order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in data:
            file.write(part)


def write_weights(folder: Path, options: Options, config: dict[str, Any], data: Callable[[str, Shape], bytes]) -> int:
    """model.safetensors, or shards with an index; `data` makes a tensor's bytes. Returns the number of weights."""
    stored, size, _ = DTYPE_NAMES[options.dtype]
    shapes = weight_shapes(config, FAMILIES[options.family])
    rows = [(name, stored, shape, size * math.prod(shape)) for name, shape in shapes]
    per_shard = math.ceil(len(rows) / options.shards)
    parts = [rows[start : start + per_shard] for start in range(0, len(rows), per_shard)]
    names = ["model.safetensors"]
    if options.shards > 1:
        names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
        where = {row[0]: name for name, part in zip(names, parts, strict=True) for row in part}
        index = {"metadata": {"total_size": sum(row[3] for row in rows)}, "weight_map": where}
        write_json(folder / "model.safetensors.index.json", index)
    for name, part in zip(names, parts, strict=True):
        write_safetensors(folder / name, part, (data(row[0], row[2]) for row in part))
    return sum(row[3] for row in rows) // size


# --- whole checkpoints -----------------------------------------------------------------------------------------------


def write_json(path: Path, content: object) -> None:
    """JSON as transformers writes it: two spaces, sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make(folder: Path, options: Options) -> Path:
    """Writes one tiny checkpoint into `folder` (made if missing) and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    family = FAMILIES[options.family]
    vocabulary = tiny_vocabularies.write(folder, family.vocabulary, config_style=options.config_style)
    config = configuration(options, vocabulary=vocabulary, vocab_size=vocabulary.size + family.extra_rows)
    write_json(folder / "config.json", config)
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": [config["eos_token_id"]], "do_sample": True}
    write_json(folder / "generation_config.json", {**generation, "temperature": 0.6, "top_k": 20, "top_p": 0.9})

    def data(name: str, shape: Shape) -> bytes:
        return encode(weight(name, shape, config=config, seed=options.seed), options.dtype)

    write_weights(folder, options, config, data)
    return folder


def make_synthetic(folder: Path, *, seed: int = 0, shards: int = 4, layers: int = 16) -> int:
    """A Llama of 1,169,754,112 random BF16 weights: hidden 2048, 16 layers, vocabulary 48,000, untied.

    Every tensor repeats one block of gaussian values from a start of its own, so that writing takes seconds.
    Returns the number of weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = Options("smollm", width=2048, layers=layers, seed=seed, shards=shards, tied=False)
    vocabulary = tiny_vocabularies.write(folder, "smollm", config_style=options.config_style)
    config = configuration(options, vocabulary=vocabulary, vocab_size=48_000)
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192}
    write_json(folder / "config.json", config)
    gauss = np.random.default_rng(seed).standard_normal(4_000_037, dtype=np.float32)
    block, ones = encode(np.float32(0.02) * gauss, "bf16"), encode(np.float32(0.1) * gauss + np.float32(1), "bf16")

    def data(name: str, shape: Shape) -> bytes:
        return _repeat(ones if "norm" in name else block, name, shape)

    return write_weights(folder, options, config, data)


def _repeat(block: bytes, name: str, shape: Shape) -> bytes:
    """BF16 bytes of `shape` cut from the endless repetition of `block`, from a start that `name` decides."""
    nbytes = 2 * math.prod(shape)
    start = zlib.crc32(name.encode()) * 2 % len(block)
    first = block[start : start + nbytes]
    repeats, rest = divmod(nbytes - len(first), len(block))
    return b"".join([first, *[block] * repeats, block[:rest]])


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write (made if missing)")
    parser.add_argument("--synthetic", choices=["1b"], help="a large checkpoint for benchmarks")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="bf16")
    parser.add_argument("--width", type=int, default=64, help="hidden size; multiples of 256 fit the K quants")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, default=None, help="default: as the family")
    parser.add_argument("--head-dim", type=int, help="default: as the family; width / 4, or twice that")
    parser.add_argument("--biases", action="store_true", help="biases on every projection, for the Llama families")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--config-style", type=int, choices=[4, 5], default=4, help="generation of transformers")
    given = vars(parser.parse_args(arguments))
    out, synthetic = given.pop("out"), given.pop("synthetic")
    if synthetic:
        count = make_synthetic(out, seed=given["seed"], shards=max(2, given["shards"]))
        print(f"{out}: {count:,} weights")
    else:
        make(out, Options(**given))
        print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
