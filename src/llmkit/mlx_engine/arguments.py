"""config.json as the arguments of a model of mlx_lm.

mlx_lm knows the words of transformers 4, those of 5 in part only, and has defaults of its own, so that a folder may run
with a wrong rotary base and nobody is told. Here both generations are read, transformers' defaults are filled in, and
what mlx_lm would pass over in silence is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InvalidModel, Unsupported, nearest_hint

# model_type → module of mlx_lm.models
MODULES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text",
    "gemma3_text": "gemma3_text",
}  # fmt: skip
ROPES = ("default", "linear", "llama3", "yarn")
_PLAIN = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
# what transformers takes where config.json says nothing (LlamaConfig …, Gemma3TextConfig)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_PLAIN, "max_position_embeddings": 2048},
    "mistral": {**_PLAIN, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {**_PLAIN, "max_position_embeddings": 32768},
    "qwen3": {**_PLAIN, "max_position_embeddings": 32768, "head_dim": 128},
    "gemma3_text": {
        "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072, "rope_theta": 1_000_000.0, "sliding_window": 4096,
        "query_pre_attn_scalar": 256, "tie_word_embeddings": True, "rope_local_base_freq": 10000.0,
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    },
}  # fmt: skip
_DEFAULTS["gemma3"] = _DEFAULTS["gemma3_text"]
_PREFIXES = ("model.language_model.", "language_model.")
_NOT_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_LEFTOVERS = (".rotary_emb.inv_freq",)
_NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
T = TypeVar("T")


def text_tensors(tensors: Mapping[str, T], *, tied: bool) -> dict[str, T]:
    """The tensors of the text model by their plain names, without those of a vision part or of nobody."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(_NOT_TEXT) or name.endswith(_LEFTOVERS):
            continue
        plain = _plain(name)
        if not (tied and plain.startswith("lm_head.")):
            found[plain] = tensor
    return found


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return rest if rest.startswith(("model.", "lm_head.")) else f"model.{rest}"
    return name


def of(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The arguments of the model that `config`, found in `where`, describes; "model_type" is a module of mlx_lm.models.

    Raises InvalidModel, Unsupported (with the nearest names, where the type is unknown).
    """
    kind = str(config.get("model_type", ""))
    if kind not in MODULES:
        raise Unsupported(f"{where}: llmkit runs no models of type '{kind}' on MLX", nearest_hint(kind, MODULES))
    inner = config.get("text_config")
    given = {**config, **inner} if isinstance(inner, dict) else dict(config)
    found = {**_DEFAULTS[kind], **{key: value for key, value in given.items() if value is not None}}
    found.setdefault("num_key_value_heads", found.get("num_attention_heads"))
    found["model_type"] = module = MODULES[kind]
    for key in _NUMBERS:
        if type(found.get(key)) is not int or found[key] < 1:
            raise InvalidModel(f"{where / 'config.json'}: '{key}' is {found.get(key)!r}, expected a number from 1")
    found["rope_scaling"] = _rope(found, where)
    _refuse(found, module, where)
    if module == "gemma3_text":
        found["sliding_window_pattern"] = period(_sliding(found), where)
    for key in ("rope_parameters", "layer_types", "text_config", "vision_config"):
        found.pop(key, None)
    return found


def _rope(found: dict[str, Any], where: Path) -> dict[str, Any] | None:
    """Rope settings of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) → bases in `found`, scaling."""
    scaling = found.get("rope_parameters") or found.get("rope_scaling")
    if not isinstance(scaling, dict):
        return None
    if isinstance(scaling.get("full_attention"), dict):  # a set for each kind of layer
        sliding = scaling.get("sliding_attention")
        if isinstance(sliding, dict) and sliding.get("rope_theta"):
            found["rope_local_base_freq"] = sliding["rope_theta"]
        scaling = scaling["full_attention"]
    if scaling.get("rope_theta"):
        found["rope_theta"] = scaling["rope_theta"]
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type not in ROPES:
        raise Unsupported(f"{where}: rope type '{rope_type}', expected {', '.join(ROPES)}")
    return None if rope_type == "default" else {**scaling, "rope_type": rope_type}


def _refuse(found: dict[str, Any], module: str, where: Path) -> None:
    """Raise Unsupported for settings that mlx_lm's model would pass over."""
    expected: dict[str, tuple[Any, ...]] = {
        "partial_rotary_factor": (1, 1.0),
        "final_logit_softcapping": (),
        "attn_logit_softcapping": (),
    }
    if module == "gemma3_text":
        expected |= {"hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,)}
    else:
        expected |= {"hidden_act": ("silu", "swish"), "use_sliding_window": (False,)}
    if module == "qwen2":
        expected["head_dim"] = (found["hidden_size"] // found["num_attention_heads"],)
    for key, usual in expected.items():
        if key in found and found[key] not in usual:
            raise Unsupported(f"{where}: '{key}' is {found[key]!r}, which mlx_lm's {module} does not know")


def _sliding(found: Mapping[str, Any]) -> list[bool]:
    """Which layers of Gemma 3 slide."""
    kinds, layers = found.get("layer_types"), found["num_hidden_layers"]
    if isinstance(kinds, list):
        return [kind == "sliding_attention" for kind in kinds]
    every = found.get("sliding_window_pattern") or found.get("_sliding_window_pattern") or 6
    return [(i + 1) % every != 0 for i in range(layers)]


def period(sliding: Iterable[bool], where: Path) -> int:
    """Every how many layers one looks at the whole context. Raises Unsupported where there is no such number."""
    layers = list(sliding)
    for every in range(1, len(layers) + 1):
        if layers == [(i + 1) % every != 0 for i in range(len(layers))]:
            return every
    raise Unsupported(f"{where}: its sliding layers have no period, which mlx_lm's gemma3_text cannot express")


def widths(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Last part of a matrix's name → its width."""
    hidden, heads = arguments["hidden_size"], arguments["num_attention_heads"]
    head_dim = arguments.get("head_dim") or hidden // heads
    names = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    return {"o_proj": heads * head_dim, "down_proj": arguments["intermediate_size"]} | dict.fromkeys(names, hidden)
