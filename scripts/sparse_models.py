"""Models of published shapes as sparse GGUF headers: what the engine needs to lay one out, and not a single weight.

A family is its tensors and its metadata, a model is its sizes. Shapes are those of the models' public config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit import gguf_writer
from llmkit.gguf import Value, ValueType
from llmkit.quants import F16, F32, TensorType

Sizes = Mapping[str, int]
Row = tuple[str, tuple[str, ...]]  # a tensor's name, its shape in names of sizes (rows first)

ENDS: tuple[Row, ...] = (("token_embd.weight", ("vocab", "embd")), ("output_norm.weight", ("embd",)))
OUTPUT: Row = ("output.weight", ("vocab", "embd"))
ATTENTION: tuple[Row, ...] = (
    ("attn_norm.weight", ("embd",)),
    ("attn_q.weight", ("q", "embd")),
    ("attn_k.weight", ("kv", "embd")),
    ("attn_v.weight", ("kv", "embd")),
    ("attn_output.weight", ("embd", "q")),
)
BIASES: tuple[Row, ...] = (("attn_q.bias", ("q",)), ("attn_k.bias", ("kv",)), ("attn_v.bias", ("kv",)))
HEAD_NORMS: tuple[Row, ...] = (("attn_q_norm.weight", ("head",)), ("attn_k_norm.weight", ("head",)))
FEED_FORWARD: tuple[Row, ...] = (
    ("ffn_norm.weight", ("embd",)),
    ("ffn_gate.weight", ("ff", "embd")),
    ("ffn_up.weight", ("ff", "embd")),
    ("ffn_down.weight", ("embd", "ff")),
)
EXPERTS: tuple[Row, ...] = (
    ("ffn_gate_inp.weight", ("experts", "embd")),
    ("ffn_gate_exps.weight", ("experts", "ff_exp", "embd")),
    ("ffn_up_exps.weight", ("experts", "ff_exp", "embd")),
    ("ffn_down_exps.weight", ("experts", "embd", "ff_exp")),
)
SHARED: tuple[Row, ...] = (
    ("ffn_gate_shexp.weight", ("ff_shared", "embd")),
    ("ffn_up_shexp.weight", ("ff_shared", "embd")),
    ("ffn_down_shexp.weight", ("embd", "ff_shared")),
)
POST_NORMS: tuple[Row, ...] = (("post_attention_norm.weight", ("embd",)), ("post_ffw_norm.weight", ("embd",)))

BLOCKS: dict[str, tuple[Row, ...]] = {
    "llama": (*ATTENTION, *FEED_FORWARD),
    "qwen2": (*ATTENTION, *BIASES, *FEED_FORWARD),
    "qwen3": (*ATTENTION, *HEAD_NORMS, *FEED_FORWARD),
    "gemma3": (*ATTENTION, *HEAD_NORMS, *FEED_FORWARD, *POST_NORMS),
    "qwen3moe": (*ATTENTION, *HEAD_NORMS, FEED_FORWARD[0], *EXPERTS),
    "gpt-oss": (
        *ATTENTION,
        *BIASES,
        ("attn_output.bias", ("embd",)),
        ("post_attention_norm.weight", ("embd",)),
        ("attn_sinks.weight", ("heads",)),
        *EXPERTS,
        ("ffn_gate_inp.bias", ("experts",)),
        ("ffn_gate_exps.bias", ("experts", "ff_exp")),
        ("ffn_up_exps.bias", ("experts", "ff_exp")),
        ("ffn_down_exps.bias", ("experts", "embd")),
    ),
    "deepseek2": (
        ("attn_norm.weight", ("embd",)),
        ("attn_q_a.weight", ("q_rank", "embd")),
        ("attn_q_a_norm.weight", ("q_rank",)),
        ("attn_q_b.weight", ("q", "q_rank")),
        ("attn_kv_a_mqa.weight", ("kv", "embd")),
        ("attn_kv_a_norm.weight", ("kv_rank",)),
        ("attn_k_b.weight", ("heads", "kv_rank", "nope")),
        ("attn_v_b.weight", ("heads", "head_v", "kv_rank")),
        ("attn_output.weight", ("embd", "o")),
        FEED_FORWARD[0],
    ),
    "mamba": (
        ("attn_norm.weight", ("embd",)),
        ("ssm_in.weight", ("inner2", "embd")),
        ("ssm_conv1d.weight", ("inner", "conv")),
        ("ssm_conv1d.bias", ("inner",)),
        ("ssm_x.weight", ("dt_bc", "inner")),
        ("ssm_dt.weight", ("inner", "dt_rank")),
        ("ssm_dt.bias", ("inner",)),
        ("ssm_a", ("inner", "state")),
        ("ssm_d", ("inner",)),
        ("ssm_out.weight", ("embd", "inner")),
    ),
}
SPARSE_EXPERTS: tuple[Row, ...] = (*EXPERTS, ("exp_probs_b.bias", ("experts",)), *SHARED)  # DeepSeek's after the first
NEXT_EXPERTS: tuple[Row, ...] = (
    ("post_attention_norm.weight", ("embd",)),
    *EXPERTS,
    ("ffn_gate_inp_shexp.weight", ("embd",)),
    *SHARED,
)
NEXT_FULL: tuple[Row, ...] = (
    ("attn_norm.weight", ("embd",)),
    ("attn_q.weight", ("q2", "embd")),
    *ATTENTION[2:],
    *HEAD_NORMS,
    *NEXT_EXPERTS,
)
NEXT_LINEAR: tuple[Row, ...] = (
    ("attn_norm.weight", ("embd",)),
    ("attn_qkv.weight", ("conv_width", "embd")),
    ("attn_gate.weight", ("inner", "embd")),
    ("ssm_conv1d.weight", ("conv_width", "conv")),
    ("ssm_dt.bias", ("dt_rank",)),
    ("ssm_a", ("dt_rank",)),
    ("ssm_ba.weight", ("dt_rank2", "embd")),
    ("ssm_norm.weight", ("state",)),
    ("ssm_out.weight", ("embd", "inner")),
    *NEXT_EXPERTS,
)


@dataclass(frozen=True)
class Model:
    """A family and its sizes. `keys` are further metadata, without the family's prefix."""

    name: str
    family: str
    n_layer: int
    sizes: Sizes
    keys: Mapping[str, Any]
    tied: bool = False

    def metadata(self) -> dict[str, Value]:
        """The header's key-values, with no vocabulary."""
        size = self.sizes
        keys: dict[str, Any] = {
            "block_count": self.n_layer,
            "context_length": 131072,
            "vocab_size": size["vocab"],
            "embedding_length": size["embd"],
            "feed_forward_length": size.get("ff", 0),
            "attention.layer_norm_rms_epsilon": 1e-6,
        }
        if "heads" in size:
            keys |= {
                "attention.head_count": size["heads"],
                "attention.head_count_kv": size["heads_kv"],
                "attention.key_length": size["head"],
                "attention.value_length": size["head"],
                "rope.dimension_count": size["head"],
            }
        if "experts" in size:
            keys |= {
                "expert_count": size["experts"],
                "expert_used_count": size["used"],
                "expert_feed_forward_length": size["ff_exp"],
            }
        keys |= self.keys
        found = {"general.architecture": Value.string(self.family), "tokenizer.ggml.model": Value.string("no_vocab")}
        return found | {f"{self.family}.{key}": _value(value) for key, value in keys.items()}

    def tensors(self, default: TensorType = F16) -> Iterator[tuple[str, tuple[int, ...], TensorType]]:
        """Rows as gguf_writer takes them: vectors and convolutions are F32, matrices `default`."""
        rows = [*ENDS] if self.tied else [*ENDS, OUTPUT]
        for block in range(self.n_layer):
            rows += [(f"blk.{block}.{name}", shape) for name, shape in self._block(block)]
        for name, shape in rows:
            real = tuple(self.sizes[size] for size in shape)
            vector = len(real) < 2 or not name.endswith(".weight") or "conv1d" in name
            yield name, real, F32 if vector else default

    def _block(self, block: int) -> tuple[Row, ...]:
        if self.family == "qwen3next":
            return NEXT_LINEAR if (block + 1) % 4 else NEXT_FULL
        if self.family == "deepseek2":
            dense = block < self.keys["leading_dense_block_count"]
            return (*BLOCKS["deepseek2"], *(FEED_FORWARD[1:] if dense else SPARSE_EXPERTS))
        return BLOCKS[self.family]

    def write(self, path: Path) -> Path:
        """The sparse file."""
        gguf_writer.write_sparse(path, self.metadata(), list(self.tensors()))
        return path


def _value(value: Any) -> Value:
    if isinstance(value, bool):
        return Value.boolean(value)
    if isinstance(value, float):
        return Value.float32(value)
    if isinstance(value, list):
        return Value.array(ValueType.BOOL if isinstance(value[0], bool) else ValueType.INT32, value)
    return Value.uint32(value)


def attention(
    *, embd: int, ff: int, heads: int, heads_kv: int, vocab: int, head: int = 0, **more: int
) -> dict[str, int]:
    """Sizes of a model with ordinary attention; `head` is embd / heads unless given."""
    head = head or embd // heads
    return {
        "embd": embd, "ff": ff, "heads": heads, "heads_kv": heads_kv, "vocab": vocab, "head": head,
        "q": heads * head, "kv": heads_kv * head, **more,
    }  # fmt: skip


PUBLISHED = {
    model.name: model
    for model in (
        Model(
            "llama2-7b", "llama", 32,
            attention(embd=4096, ff=11008, heads=32, heads_kv=32, vocab=32000), {},
        ),
        Model(
            "llama3-8b", "llama", 32,
            attention(embd=4096, ff=14336, heads=32, heads_kv=8, vocab=128256), {},
        ),
        Model(
            "llama2-70b", "llama", 80,
            attention(embd=8192, ff=28672, heads=64, heads_kv=8, vocab=32000), {},
        ),
        Model(
            "smollm2-135m", "llama", 30,
            attention(embd=576, ff=1536, heads=9, heads_kv=3, vocab=49152), {}, tied=True,
        ),
        Model(
            "qwen2.5-0.5b", "qwen2", 24,
            attention(embd=896, ff=4864, heads=14, heads_kv=2, vocab=151936), {}, tied=True,
        ),
        Model(
            "qwen3-4b", "qwen3", 36,
            attention(embd=2560, ff=9728, heads=32, heads_kv=8, head=128, vocab=151936), {}, tied=True,
        ),
        Model(
            "gemma3-270m", "gemma3", 18,
            attention(embd=640, ff=2048, heads=4, heads_kv=1, head=256, vocab=262144),
            {"attention.sliding_window": 512}, tied=True,
        ),
        Model(
            "gemma3-27b", "gemma3", 62,
            attention(embd=5376, ff=21504, heads=32, heads_kv=16, head=128, vocab=262208),
            {"attention.sliding_window": 1024}, tied=True,
        ),
        Model(
            "gpt-oss-20b", "gpt-oss", 24,
            attention(
                embd=2880, ff=2880, heads=64, heads_kv=8, head=64, vocab=201088, experts=32, used=4, ff_exp=2880
            ),
            {"attention.sliding_window": 128},
        ),
        Model(
            "qwen3moe-30b", "qwen3moe", 48,
            attention(
                embd=2048, ff=6144, heads=32, heads_kv=4, head=128, vocab=151936, experts=128, used=8, ff_exp=768
            ),
            {},
        ),
        Model(
            "deepseek-v3", "deepseek2", 61,
            {
                "embd": 7168, "ff": 18432, "heads": 128, "heads_kv": 1, "vocab": 129280, "head": 576, "nope": 128,
                "head_v": 128, "q_rank": 1536, "kv_rank": 512, "q": 128 * 192, "kv": 576, "o": 128 * 128,
                "experts": 256, "used": 8, "ff_exp": 2048, "ff_shared": 2048,
            },
            {
                "attention.value_length": 512, "attention.key_length_mla": 192, "attention.value_length_mla": 128,
                "rope.dimension_count": 64, "attention.q_lora_rank": 1536, "attention.kv_lora_rank": 512,
                "leading_dense_block_count": 3, "expert_shared_count": 1, "expert_weights_scale": 2.5,
                "expert_weights_norm": True, "expert_gating_func": 2, "expert_group_count": 8,
                "expert_group_used_count": 4,
            },
        ),
        Model(
            "qwen3next-80b", "qwen3next", 48,
            attention(
                embd=2048, ff=5120, heads=16, heads_kv=2, head=256, vocab=151936, experts=512, used=10, ff_exp=512,
                ff_shared=512, q2=8192, conv=4, conv_width=8192, inner=4096, state=128, dt_rank=32, dt_rank2=64,
            ),
            {
                "rope.dimension_count": 64, "expert_shared_feed_forward_length": 512, "ssm.conv_kernel": 4,
                "ssm.inner_size": 4096, "ssm.state_size": 128, "ssm.time_step_rank": 32, "ssm.group_count": 16,
                "full_attention_interval": 4,
            },
        ),
        Model(
            "mamba-2.8b", "mamba", 64,
            {
                "embd": 2560, "vocab": 50280, "inner": 5120, "inner2": 10240, "conv": 4, "state": 16, "dt_rank": 160,
                "dt_bc": 192,
            },
            {
                "ssm.conv_kernel": 4, "ssm.inner_size": 5120, "ssm.state_size": 16, "ssm.time_step_rank": 160,
                "attention.head_count": 0,
            },
            tied=True,
        ),
    )
}  # fmt: skip
