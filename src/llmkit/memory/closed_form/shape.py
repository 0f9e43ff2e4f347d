"""The shape of a model: the sizes its memory follows from, read from a GGUF's metadata or from a config.json.

Both speak of the same things under other names; config.json is first put into GGUF's words. What an engine that knows
the architecture would do with the words is in llama.cpp src/llama-model.cpp (load_hparams), src/llama-hparams.cpp and
src/models/*.cpp (load_arch_hparams); what models call them, in transformers' configuration classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InvalidModel
from ...gguf import Array, Value
from . import config_names

_MAX_LAYERS = 4096  # far beyond any model; the engine itself holds 512
FULL, WINDOW, MLA, RECURRENT, BOTH, NEITHER = "full", "window", "mla", "recurrent", "both", "neither"

# The period of sliding layers where the file names none (load_swa_pattern): n - 1 sliding ones, then a full one, or
# with a minus sign the full one first. Families not here slide only in the layers that the file names.
_PERIODS = {
    "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "cohere2moe": -4, "exaone4": 4, "exaone-moe": 4,
    "olmo2": 4, "llama4": 4, "afmoe": 4, "plamo3": 8, "smallthinker": -4, "laguna": -4, "mellum": 4, "muse-glimmer": 4,
}  # fmt: skip
_WINDOWS = {"gemma2": 4096, "exaone4": 4096, "exaone-moe": 128, "smallthinker": 4096, "llama4": 8192}
_RECURRENT_ONLY = {"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}
_INTERVALS = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4}
_BY_HEADS = {  # layers without key heads are the recurrent ones
    "jamba", "granitehybrid", "plamo2", "lfm2", "lfm2moe", "kimi-linear", "kimi-k3", "bailingmoe3", "nemotron_h",
    "nemotron_h_moe", "glm5-next",
}  # fmt: skip
_UNGATED = {  # feed-forward of two matrices, not three
    "gpt2", "gptj", "gptneox", "falcon", "falcon-7b", "bloom", "mpt", "opt", "starcoder", "starcoder2", "codeshell",
    "phi2", "phi", "phi-msft", "nemotron", "nemotron_h", "nemotron_h_moe", "gpt_neox", "gpt_bigcode", "gptbigcode",
    "persimmon", "biogpt", "xglm", "arcee", "apertus", "jais2",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One block. `kind`: FULL, WINDOW or MLA attention, RECURRENT, BOTH (attention and recurrent) or NEITHER.

    `head_k` and `head_v` are widths of a head in the cache. `owns_cache` is false where it reads another layer's.
    `n_ff` is 0 without a plain feed-forward; `experts` tells whether it has experts instead.
    """

    kind: str
    n_head: int
    n_head_kv: int
    head_k: int
    head_v: int
    n_ff: int
    experts: bool = False
    owns_cache: bool = True

    @property
    def k_width(self) -> int:
        """Elements of K a token leaves in the cache."""
        return self.head_k * self.n_head_kv

    @property
    def v_width(self) -> int:
        """Elements of V a token leaves in the cache; MLA reads V out of K."""
        return 0 if self.kind == MLA else self.head_v * self.n_head_kv


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention: ranks, and widths of a query head (`qk`, of which `rope` rotates) and value head."""

    q_rank: int
    kv_rank: int
    rope: int
    qk: int
    v: int


@dataclass(frozen=True)
class Experts:
    """`n` experts of width `n_ff`, `used` for a token, and a shared one of width `n_ff_shared` (0: none)."""

    n: int
    used: int
    n_ff: int
    n_ff_shared: int = 0


@dataclass(frozen=True)
class Recurrent:
    """What recurrent layers keep. `kind`: mamba, mamba2, delta, rwkv, kda or convolution (what LFM2 has).

    `rolling` and `state` are the numbers (floats) one layer keeps for one sequence: the last inputs of its convolution,
    and its state (llama-hparams.cpp: n_embd_r, n_embd_s). `channels` is the width its convolution works on.
    """

    kind: str
    d_conv: int
    d_inner: int
    d_state: int
    n_group: int
    rolling: int
    state: int

    @property
    def channels(self) -> int:
        """Width of the convolution."""
        return self.d_inner + 2 * self.n_group * self.d_state


@dataclass(frozen=True)
class Shape:
    """Everything the memory of a model follows from, besides its weights' types. `window` is in tokens, 0 without."""

    architecture: str
    n_embd: int
    n_vocab: int
    context_trained: int
    layers: tuple[Layer, ...]
    window: int = 0
    mla: Mla | None = None
    experts: Experts | None = None
    recurrent: Recurrent | None = None
    tied: bool = False
    gated: bool = True

    @property
    def n_layer(self) -> int:
        """Blocks."""
        return len(self.layers)

    @property
    def sliding(self) -> bool:
        """Whether some layers look at a window only."""
        return any(layer.kind == WINDOW for layer in self.layers)


def of_metadata(metadata: Mapping[str, Value], *, tied: bool = False) -> Shape:
    """The shape a GGUF's (or a draft's) metadata tells. `tied`: the file has no output.weight.

    Raises InvalidModel when an essential key is missing, mistyped or beyond reason.
    """
    named = metadata.get("general.architecture")
    if named is None or not isinstance(named.data, str):
        raise InvalidModel("the metadata has no general.architecture")
    prefix = f"{named.data}."
    words = {
        key[len(prefix) :]: list(value.data) if isinstance(value.data, Array) else value.data
        for key, value in metadata.items()
        if key.startswith(prefix)
    }
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and isinstance(tokens.data, Array):
        words["vocab_size"] = len(tokens.data)
    return _shape(named.data, words, tied, "the metadata")


def of_config(config: Mapping[str, Any], *, where: str = "config.json") -> Shape:
    """The shape a config.json of any generation tells, of known and unknown architectures (multimodal: text_config).

    Raises InvalidModel when the essentials are missing: layers, width, heads (or a recurrent state), vocabulary.
    """
    architecture, words, tied = config_names.words(config, where)
    return _shape(architecture, words, tied, where)


class _Words:
    """Typed reads of GGUF's words."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def number(self, *keys: str, default: int | None = None, least: int = 0) -> int:
        """The first of `keys` that is there; of a list its first entry."""
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, list) and value:
                value = value[0]
            if value is not None:
                return self._checked(key, value, least)
        if default is None:
            raise InvalidModel(f"{self.where}: lacks '{keys[0]}'")
        return default

    def each(self, key: str, n_layer: int, default: int) -> list[int]:
        """A number for every layer, from one number or a list."""
        value = self.values.get(key)
        if isinstance(value, list):
            if len(value) < n_layer:
                raise InvalidModel(f"{self.where}: '{key}' has {len(value)} entries for {n_layer} layers")
            return [self._checked(key, entry, 0) for entry in value[:n_layer]]
        return [default if value is None else self._checked(key, value, 0)] * n_layer

    def flags(self, key: str, n_layer: int) -> list[bool] | None:
        """A yes or no for every layer, or None where the key names no list."""
        value = self.values.get(key)
        if not isinstance(value, list):
            return None
        if len(value) < n_layer:
            raise InvalidModel(f"{self.where}: '{key}' has {len(value)} entries for {n_layer} layers")
        return [bool(entry) for entry in value[:n_layer]]

    def _checked(self, key: str, value: Any, least: int) -> int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or value < least:
            raise InvalidModel(f"{self.where}: '{key}' is {value!r}, expected a number of at least {least}")
        if value > 2**31 - 1:
            raise InvalidModel(f"{self.where}: '{key}' is {value!r}, which is beyond reason")
        return int(value)


def _shape(architecture: str, values: Mapping[str, Any], tied: bool, where: str) -> Shape:
    words = _Words(values, where)
    n_all = words.number("block_count", least=1)
    if n_all > _MAX_LAYERS:
        raise InvalidModel(f"{where}: 'block_count' is {n_all}, which is beyond reason")
    n_layer = n_all - words.number("nextn_predict_layers", default=0)  # layers for drafting hold no cache in a chat
    n_embd = words.number("embedding_length", least=1)
    experts = _experts(words)
    recurrent = _recurrent(architecture, words, n_embd)
    layers = _layers(architecture, words, max(1, n_layer), n_embd, recurrent)
    if not any(layer.n_head_kv for layer in layers) and recurrent is None:
        raise InvalidModel(f"{where}: lacks 'attention.head_count', and names no recurrent state")
    return Shape(
        architecture,
        n_embd,
        words.number("vocab_size", least=1),
        words.number("context_length", default=0),
        layers,
        window=words.number("attention.sliding_window", default=_WINDOWS.get(architecture, 0)),
        mla=_mla(words, layers),
        experts=experts,
        recurrent=recurrent if any(layer.kind in (RECURRENT, BOTH) for layer in layers) else None,
        tied=tied,
        gated=architecture not in _UNGATED,
    )


def _layers(
    architecture: str, words: _Words, n_layer: int, n_embd: int, recurrent: Recurrent | None
) -> tuple[Layer, ...]:
    heads = words.each("attention.head_count", n_layer, 0)
    heads_kv = words.each("attention.head_count_kv", n_layer, heads[0])
    widths = words.each("feed_forward_length", n_layer, 0)
    head = words.number("attention.key_length", default=n_embd // max(1, max(heads)))
    head_v = words.number("attention.value_length", default=n_embd // max(1, max(heads)))
    head_swa = words.number("attention.key_length_swa", default=head)
    head_v_swa = words.number("attention.value_length_swa", default=head_v)
    slides = _sliding(architecture, words, n_layer)
    keeps = _recurrent_layers(architecture, words, n_layer, heads_kv, recurrent)
    sparse = _expert_layers(words, n_layer)
    n_owners = n_layer - words.number("attention.shared_kv_layers", default=20 if architecture == "gemma3n" else 0)
    if architecture == "gemma3n" and "attention.shared_kv_layers" not in words.values:
        n_owners = 20  # src/models/gemma3n.cpp: the first twenty, whatever the file says
    mla = words.number("attention.key_length_mla", default=0) > 0
    layers = []
    for index in range(n_layer):
        kind = MLA if mla else WINDOW if slides[index] else FULL
        if keeps[index]:
            kind = BOTH if architecture == "falcon-h1" else RECURRENT
        elif not heads_kv[index]:
            kind = NEITHER
        if architecture.startswith("nemotron_h") and widths[index]:
            kind = NEITHER  # its blocks are attention, recurrent or feed-forward
        layers.append(
            Layer(
                kind, heads[index], heads_kv[index],
                head_swa if kind == WINDOW else head, head_v_swa if kind == WINDOW else head_v,
                widths[index], sparse[index], index < n_owners,
            )
        )  # fmt: skip
    return tuple(layers)


def _periodic(n_layer: int, period: int) -> list[bool]:
    """All but every `period`-th, or with a minus sign all but the first of each `period`."""
    if period < 0:
        return [index % -period != 0 for index in range(n_layer)]
    return [index % period < period - 1 for index in range(n_layer)] if period else [True] * n_layer


def _sliding(architecture: str, words: _Words, n_layer: int) -> list[bool]:
    if not words.number("attention.sliding_window", default=_WINDOWS.get(architecture, 0)):
        return [False] * n_layer
    key = "attention.sliding_window_pattern"
    if (named := words.flags(key, n_layer)) is not None:
        return named
    if architecture not in _PERIODS:
        return [False] * n_layer
    period = _PERIODS[architecture]
    stated = words.number(key, default=abs(period))
    return _periodic(n_layer, stated if period > 0 else -stated)


def _recurrent_layers(
    architecture: str, words: _Words, n_layer: int, heads_kv: Sequence[int], recurrent: Recurrent | None
) -> list[bool]:
    if recurrent is None:
        return [False] * n_layer
    if (named := words.flags("attention.recurrent_layers", n_layer)) is not None:
        return named
    if architecture in _RECURRENT_ONLY or architecture == "falcon-h1":
        return [True] * n_layer
    if "full_attention_interval" in words.values or architecture in _INTERVALS:
        return _periodic(n_layer, words.number("full_attention_interval", default=_INTERVALS.get(architecture, 4)))
    return [not count for count in heads_kv]


def _expert_layers(words: _Words, n_layer: int) -> list[bool]:
    if not words.number("expert_count", default=0):
        return [False] * n_layer
    if (named := words.flags("expert_layers", n_layer)) is not None:
        return named
    first = words.number("leading_dense_block_count", default=0)
    step = words.number("interleave_moe_layer_step", default=1) or 1
    return [index >= first and (index + 1) % step == 0 for index in range(n_layer)]


def _experts(words: _Words) -> Experts | None:
    n = words.number("expert_count", default=0)
    if not n:
        return None
    used = words.number("expert_used_count", default=1, least=1)
    width = words.number("expert_feed_forward_length", "feed_forward_length", default=0)
    shared = words.number(
        "expert_shared_feed_forward_length", default=width * words.number("expert_shared_count", default=0)
    )
    return Experts(n, min(used, n), width, shared)


def _mla(words: _Words, layers: Sequence[Layer]) -> Mla | None:
    if not any(layer.kind == MLA for layer in layers):
        return None
    rank = words.number("attention.kv_lora_rank", "attention.value_length", least=1)
    return Mla(
        words.number("attention.q_lora_rank", default=0),
        rank,
        max(0, words.number("attention.key_length", least=1) - rank),
        words.number("attention.key_length_mla", least=1),
        words.number("attention.value_length_mla", least=1),
    )


def _recurrent(architecture: str, words: _Words, n_embd: int) -> Recurrent | None:
    """llama-hparams.cpp, n_embd_r and n_embd_s: which of the forms a model has is told by the keys it sets."""
    number: Callable[..., int] = words.number
    heads = max(words.each("attention.head_count", 1, 0))
    conv = number("ssm.conv_kernel", default=0)
    if wkv := number("wkv.head_size", default=0):
        shift = number("token_shift_count", default=2)
        return Recurrent("rwkv", 0, n_embd, wkv, 0, shift * n_embd, n_embd * wkv)
    if length := number("shortconv.l_cache", default=0):
        return Recurrent("convolution", length, n_embd, 0, 0, n_embd * (length - 1), 0)
    if head := number("kda.head_dim", default=0):
        inner = heads * head
        return Recurrent("kda", conv or 4, inner, head, heads, 3 * ((conv or 4) - 1) * inner, head * inner)
    inner, state = number("ssm.inner_size", default=0), number("ssm.state_size", default=0)
    if not inner:
        return None
    group = number("ssm.group_count", default=0)
    kind = "delta" if architecture in _INTERVALS or "full_attention_interval" in words.values else "mamba2"
    if not group:
        kind = "mamba"
    rolling = max(0, conv - 1) * (inner + 2 * group * state)
    return Recurrent(kind, conv, inner, state, group, rolling, state * inner)
