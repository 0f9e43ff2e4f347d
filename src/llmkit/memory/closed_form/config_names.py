"""config.json in GGUF's words: what models of all generations call their layers, widths, heads, windows and states.

Sources: transformers' configuration classes, the config.json of published models, llama.cpp conversion/*.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import InvalidModel

# GGUF's word → what config.json calls it, most usual first
_NAMES: dict[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "embedding_length": ("hidden_size", "n_embd", "d_model", "dim", "model_dim"),
    "attention.head_count": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "vocab_size": ("vocab_size", "padded_vocab_size", "n_vocab"),
    "context_length": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"),
    "attention.sliding_window": ("sliding_window", "sliding_window_size", "attention_chunk_size"),
    "attention.q_lora_rank": ("q_lora_rank",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "expert_used_count": ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "experts_per_token"),
    "expert_feed_forward_length": ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"),
    "expert_shared_count": ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "leading_dense_block_count": ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
    "interleave_moe_layer_step": ("interleave_moe_layer_step", "decoder_sparse_step"),
    "full_attention_interval": ("full_attention_interval",),
    "shortconv.l_cache": ("conv_L_cache",),
}  # fmt: skip
_FEED_FORWARD = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "inner_size", "d_ff", "hidden_dim")
_KEY_HEADS = (
    "num_key_value_heads",
    "n_head_kv",
    "num_kv_heads",
    "n_kv_heads",
    "multi_query_group_num",
    "num_query_groups",
)
_TIED = {  # families whose configuration class ties unless told otherwise
    "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gpt2", "opt",
    "bloom", "falcon", "mpt", "cohere", "cohere2", "mamba", "gpt_bigcode", "starcoder2", "lfm2", "falcon_mamba",
}  # fmt: skip
# model_type → the engine's name, where the shape depends on the family and the two names differ
_ARCHITECTURES = {
    "gemma3_text": "gemma3", "gemma3n_text": "gemma3n", "gemma4_text": "gemma4", "gpt_oss": "gpt-oss",
    "olmo3": "olmo2", "llama4_text": "llama4", "qwen3_next": "qwen3next", "qwen3_5": "qwen35", "qwen3_5_text": "qwen35",
    "qwen3_5_moe": "qwen35moe", "qwen3_5_moe_text": "qwen35moe", "falcon_h1": "falcon-h1", "exaone_moe": "exaone-moe",
    "granitemoehybrid": "granitehybrid", "kimi_linear": "kimi-linear", "falcon_mamba": "mamba",
}  # fmt: skip
_SLIDING = {"sliding_attention", "chunked_attention", "local", "local_attention", "sliding", "swa"}
_RECURRENT = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "kda", "M"}
_FULL = {"full_attention", "attention", "global", "global_attention", "full", "hybrid", "*"}
_MAX_LAYERS = 4096
_NO_LATENT_CACHE = {"minicpm3", "plm"}  # latent attention whose heads the engine unpacks before they are kept


def words(config: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any], bool]:
    """The engine's name of the family (as far as shapes need it), the sizes in GGUF's words, whether output is tied.

    Raises InvalidModel when `config` is no object.
    """
    if not isinstance(config, Mapping):
        raise InvalidModel(f"{where}: is no JSON object")
    values = dict(config)
    for part in ("text_config", "llm_config", "language_config", "thinker_config"):
        inner = values.get(part)
        if isinstance(inner, Mapping):
            values |= {key: value for key, value in inner.items() if value is not None}
            deeper = inner.get("text_config")
            values |= deeper if isinstance(deeper, Mapping) else {}
    kind = values.get("model_type")
    kind = kind if isinstance(kind, str) else "unknown"
    found = {name: value for name, keys in _NAMES.items() if (value := _first(values, keys)) is not None}
    found |= _heads(values, found)
    found |= _feed_forward(values, found)
    found |= _latent(values, kind)
    found |= _state(values, found)
    found |= _kinds(values, found, kind)
    tied = values.get("tie_word_embeddings")
    return _ARCHITECTURES.get(kind, kind), found, bool(tied) if tied is not None else kind in _TIED


def _first(values: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _whole(values: Mapping[str, Any], *keys: str, default: int = 0) -> int:
    """The first positive whole number under `keys`."""
    found = (values.get(key) for key in keys)
    return next((each for each in found if isinstance(each, int) and not isinstance(each, bool) and each > 0), default)


def _heads(values: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    heads = found.get("attention.head_count")
    if heads is None:
        return {}
    kv = _first(values, _KEY_HEADS)
    if kv is None and values.get("multi_query") is True:
        kv = 1
    if isinstance(inner := values.get("attn_config"), Mapping):  # DBRX, MPT
        kv = _whole(inner, "kv_n_heads") or kv
    made: dict[str, Any] = {"attention.head_count_kv": heads if kv is None else kv}
    width = _first(values, ("head_dim", "attention_head_dim", "kv_channels", "d_head"))
    if width is not None:
        made["attention.key_length"] = made["attention.value_length"] = width
    if (wide := values.get("global_head_dim")) is not None and width is not None:  # Gemma 4: head_dim slides
        made |= {"attention.key_length_swa": width, "attention.value_length_swa": width}
        made["attention.key_length"] = made["attention.value_length"] = wide
    return made


def _feed_forward(values: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    width = _first(values, _FEED_FORWARD)
    if "attention.head_count" not in found and _whole(values, "state_size"):
        return {}  # Mamba calls the width of its state's channels so
    if width is None and isinstance(inner := values.get("ffn_config"), Mapping):  # DBRX
        width = inner.get("ffn_hidden_size")
        if width is not None and (experts := _whole(inner, "moe_num_experts")):
            used = _whole(inner, "moe_top_k", default=1)
            return {"feed_forward_length": width, "expert_count": experts, "expert_used_count": used}
    if width is None and "attention.head_count" in found:
        width = 4 * _whole(found, "embedding_length")  # what GPT-2 and its kin leave unsaid
    if width is None:
        return {}
    made = {"feed_forward_length": width}
    if isinstance(dense := values.get("mlp_only_layers"), list) and "expert_count" in found:
        step = _whole(values, "decoder_sparse_step", default=1)
        n_layer = min(_whole(found, "block_count"), _MAX_LAYERS)
        made["expert_layers"] = [index not in dense and (index + 1) % step == 0 for index in range(n_layer)]
    return made


def _latent(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Latent attention is kept compressed: one head of kv_lora_rank and the rotating part, no V."""
    rank, rope, plain, value = (
        _whole(values, key) for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    if not (rank and rope and plain and value):
        return {}
    if kind in _NO_LATENT_CACHE:
        return {"attention.key_length": plain + rope, "attention.value_length": value}
    return {
        "attention.head_count_kv": 1, "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope, "attention.value_length": rank,
        "attention.key_length_mla": plain + rope, "attention.value_length_mla": value,
    }  # fmt: skip


def _state(values: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of recurrent layers: gated delta nets, Kimi's, RWKV, Mamba 2 and Mamba."""
    if heads := _whole(values, "linear_num_value_heads"):
        return {
            "ssm.conv_kernel": _whole(values, "linear_conv_kernel_dim", default=4),
            "ssm.inner_size": heads * _whole(values, "linear_value_head_dim", default=128),
            "ssm.state_size": _whole(values, "linear_key_head_dim", default=128),
            "ssm.group_count": _whole(values, "linear_num_key_heads", default=16),
            "full_attention_interval": _whole(values, "full_attention_interval", default=4),
        }
    if isinstance(linear := values.get("linear_attn_config"), Mapping):
        return {
            "kda.head_dim": _whole(linear, "head_dim", default=128),
            "ssm.conv_kernel": _whole(linear, "short_conv_kernel_size", default=4),
        }
    if head := _whole(values, "wkv_head_size", "attention_hidden_size_per_head"):
        return {"wkv.head_size": head}
    state = _whole(values, "mamba_d_state", "ssm_state_size", "state_size")
    if not state:
        return {}
    made = {"ssm.state_size": state, "ssm.conv_kernel": _whole(values, "mamba_d_conv", "conv_kernel", default=4)}
    heads = _whole(values, "mamba_n_heads", "mamba_num_heads") or (
        "state_size" in values and _whole(values, "num_heads")
    )
    if heads:  # Mamba 2
        head = _whole(values, "mamba_d_head", "mamba_head_dim", "head_dim", default=64)
        made["ssm.inner_size"] = _whole(values, "mamba_d_ssm") or heads * head
        made["ssm.group_count"] = _whole(values, "mamba_n_groups", "n_groups", default=1)
        return made
    plain = _whole(values, "intermediate_size") if "state_size" in values else 0
    expand = _whole(values, "mamba_expand", "expand", default=2)
    return made | {"ssm.inner_size": plain or expand * _whole(found, "embedding_length")}


def _kinds(values: Mapping[str, Any], found: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Which layers slide, which are recurrent, as far as config.json says it layer by layer or by a period."""
    made: dict[str, Any] = {}
    pattern = values.get("hybrid_override_pattern")
    kinds = _first(values, ("layer_types", "layers_block_type", "attention_types"))
    if isinstance(pattern, str):  # Nemotron-H: M is Mamba, * attention, - and E feed-forward
        kinds = list(pattern)
        heads = found.get("attention.head_count_kv", 0)
        made["attention.head_count_kv"] = [heads if each == "*" else 0 for each in kinds]
        made["feed_forward_length"] = [found.get("feed_forward_length", 0) if each == "-" else 0 for each in kinds]
    if isinstance(kinds, list) and all(isinstance(each, str) for each in kinds):
        if any(each in _SLIDING for each in kinds):
            made["attention.sliding_window_pattern"] = [each in _SLIDING for each in kinds]
        if any(each in _RECURRENT for each in kinds):
            made["attention.recurrent_layers"] = [each in _RECURRENT for each in kinds]
        return made
    period = _first(values, ("sliding_window_pattern", "_sliding_window_pattern"))
    if isinstance(period, int) and not isinstance(period, bool):
        made["attention.sliding_window_pattern"] = period
    if values.get("use_sliding_window") is False:
        made["attention.sliding_window"] = 0
    n_layer = min(_whole(found, "block_count"), _MAX_LAYERS)
    if every := _whole(values, "attn_layer_period"):  # Jamba
        offset = _whole(values, "attn_layer_offset")
        made["attention.recurrent_layers"] = [index % every != offset for index in range(n_layer)]
    linear = values.get("linear_attn_config")
    if isinstance(linear, Mapping) and isinstance(named := linear.get("kda_layers"), list):  # Kimi counts from one
        made["attention.recurrent_layers"] = [index + 1 in named for index in range(n_layer)]
    return made
