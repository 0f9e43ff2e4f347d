"""Gemma 3, text: norms multiply by 1 + w, four norms a block, every sixth layer looks at the whole context.

The engine (llama.cpp src/models/gemma3.cpp) scales attention by 1/sqrt(head_dim), except in the 62-layer model, and
ties the output to the embedding. The embedding may have more rows than the tokenizer has tokens; they are cut off.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import Unsupported
from ...gguf import Value, ValueType
from .. import metadata
from ..config import Config, Rope
from ..tensors import LazyTensor, add_one
from . import Architecture, Row, llama
from .llama import block
from .qwen2 import ATTENTION

_PERIOD = 6  # the engine's own pattern when the file names none: five sliding layers, then a full one


def _norm(tensor: LazyTensor, _: Config) -> LazyTensor:
    return add_one(tensor)


def _sliding(config: Config) -> list[bool] | None:
    """Which layers slide, or None for the engine's own pattern."""
    if kinds := config.layer_types:
        if strange := set(kinds) - {"sliding_attention", "full_attention"}:
            raise Unsupported(f"{config.path}: 'layer_types' names {sorted(strange)}")
        sliding = [kind == "sliding_attention" for kind in kinds]
    else:
        period = config.number("sliding_window_pattern", "_sliding_window_pattern", default=_PERIOD)
        sliding = [(i + 1) % period != 0 for i in range(config.n_layer)]
    usual = [(i + 1) % _PERIOD != 0 for i in range(config.n_layer)]
    return None if sliding == usual else sliding


def _local(config: Config) -> Rope:
    """Rotary settings of the sliding layers: their own where there are some, else never scaled."""
    parameters = config.values.get("rope_parameters")
    if isinstance(parameters, dict) and parameters.get("sliding_attention"):
        return config.rope("sliding_attention")
    return Rope(config.number("rope_local_base_freq", default=10000.0, kind=float))


def _metadata(config: Config) -> Mapping[str, Value]:
    found = metadata.decoder(config, "gemma3")
    epsilon = found.pop("gemma3.attention.layer_norm_rms_epsilon")
    lengths = {key: found.pop(key) for key in ("gemma3.attention.key_length", "gemma3.attention.value_length")}
    theta = Value.float32(_local(config).theta)
    found |= {"gemma3.rope.freq_base_swa": theta, "gemma3.attention.layer_norm_rms_epsilon": epsilon}
    found |= lengths
    found["general.file_type"] = Value.uint32(0)
    if cap := config.number("final_logit_softcapping", default=None, kind=float):
        found["gemma3.final_logit_softcapping"] = Value.float32(cap)
    found["gemma3.attention.sliding_window"] = Value.uint32(config.number("sliding_window"))
    if (sliding := _sliding(config)) is not None:
        found["gemma3.attention.sliding_window_pattern"] = Value.array(ValueType.BOOL, sliding)
    return found


def check(config: Config) -> tuple[str, ...]:
    """Refuse what the engine's gemma3 graph cannot express."""
    config.require("hidden_activation", "gelu_pytorch_tanh")
    config.require("hidden_act", "gelu_pytorch_tanh")
    config.require("use_bidirectional_attention", False)
    config.require("attention_bias", False)
    if config.values.get("attn_logit_softcapping") is not None:
        raise Unsupported(f"{config.path}: 'attn_logit_softcapping' is set; the engine has none for gemma3")
    expected = config.n_embd // config.n_head if config.n_layer == 62 else config.head_dim
    config.require("query_pre_attn_scalar", expected, float(expected))
    for layers, rope, accepted in (
        ("full", config.rope(), ("default", "linear")),
        ("sliding", _local(config), ("default",)),
    ):
        if rope.type not in accepted:
            known = " or ".join(accepted)
            raise Unsupported(
                f"{config.path}: rope type '{rope.type}' in {layers} layers; the engine can only express {known}"
            )
    return ()


ARCHITECTURE = Architecture(
    name="gemma3",
    rows=(
        llama.EMBEDDING_AND_OUTPUT[0],
        Row("model.norm.weight", "output_norm.weight", ("embd",), _norm),
        llama.EMBEDDING_AND_OUTPUT[2],
        *llama.FEED_FORWARD,
        *ATTENTION,
        block("self_attn.q_norm.weight", "attn_q_norm.weight", "head", operation=_norm),
        block("self_attn.k_norm.weight", "attn_k_norm.weight", "head", operation=_norm),
        block("input_layernorm.weight", "attn_norm.weight", "embd", operation=_norm),
        block("post_attention_layernorm.weight", "post_attention_norm.weight", "embd", operation=_norm),
        block("pre_feedforward_layernorm.weight", "ffn_norm.weight", "embd", operation=_norm),
        block("post_feedforward_layernorm.weight", "post_ffw_norm.weight", "embd", operation=_norm),
    ),
    metadata=_metadata,
    check=check,
    defaults={  # transformers Gemma3TextConfig
        "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": 262208,
        "max_position_embeddings": 131072, "rope_theta": 1_000_000.0, "sliding_window": 4096,
        "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    },
    prefixes=("language_model.", "model.language_model."),
    skipped=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    trims_embedding=True,
    add_space_prefix=False,
)  # fmt: skip
