"""A number for a term, found in a model's header: what is said there, or what follows from it.

Each function returns a Fact, or None when the header does not tell. Nothing is run and no weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from ..gguf import Array, GgufFile, Value
from ..quants import QUANTS_BY_FTYPE

LOOKED_UP, DERIVED, MEASURED = "looked up", "derived", "measured"


@dataclass(frozen=True)
class Fact:
    """`text` is a sentence about the model; `how` the number was come by: looked up, derived or measured."""

    text: str
    how: str


@dataclass(frozen=True)
class Tensor:
    """What of a tensor is told here."""

    name: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def weights(self) -> int:
        """How many."""
        return prod(self.shape)


@dataclass(frozen=True)
class Subject:
    """A model to tell about: its name for people, GGUF metadata, tensors, bytes on disk (0: not one file)."""

    name: str
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    nbytes: int = 0

    def own(self, key: str) -> Any:
        """The value below the architecture's name, e.g. "block_count"."""
        return self.get(f"{self.get('general.architecture')}.{key}")

    def get(self, key: str) -> Any:
        """The plain value of a key, or None."""
        value = self.metadata.get(key)
        return None if value is None else value.data

    def count(self, key: str) -> int | None:
        """A positive whole number below the architecture's name; of one a layer the largest."""
        value = self.own(key)
        if isinstance(value, Array):
            value = max((item for item in value if isinstance(item, int)), default=None)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    @cached_property
    def weights(self) -> int:
        """All weights."""
        return sum(tensor.weights for tensor in self.tensors)

    @cached_property
    def weight_nbytes(self) -> int:
        """All tensors' bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def embedding(self) -> Tensor | None:
        """The table of tokens."""
        return next((tensor for tensor in self.tensors if tensor.name == "token_embd.weight"), None)

    @property
    def n_vocab(self) -> int | None:
        """Rows of the table of tokens."""
        return self.embedding.shape[0] if self.embedding and len(self.embedding.shape) == 2 else None

    @cached_property
    def active(self) -> int:
        """Weights that work for each token: the table of tokens only as an output, of experts those that are chosen."""
        total, used = self.count("expert_count"), self.count("expert_used_count")
        share = used / total if total and used and used <= total else 1.0
        tied = all(tensor.name != "output.weight" for tensor in self.tensors)
        weights = 0.0
        for tensor in self.tensors:
            if tensor is self.embedding and not tied:
                continue
            weights += tensor.weights * (share if "_exps." in tensor.name else 1.0)
        return round(weights)


def subject_of(file: GgufFile, name: str) -> Subject:
    """A GGUF file."""
    tensors = tuple(Tensor(info.name, info.shape, info.nbytes) for info in file.tensors.values())
    return Subject(name, file.metadata, tensors, sum(path.stat().st_size for path in file.paths))


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5 or unit == "GB":
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return ""


def _some(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


# ── text ──


def vocabulary(model: Subject) -> Fact | None:
    """Tokens known."""
    return Fact(f"It knows {model.n_vocab:,} tokens.", LOOKED_UP) if model.n_vocab else None


def tokenizer(model: Subject) -> Fact | None:
    """Its kind and the pre-tokenizer."""
    kind, pre = model.get("tokenizer.ggml.model"), model.get("tokenizer.ggml.pre")
    if not isinstance(kind, str):
        return None
    return Fact(f"Its tokenizer is '{kind}'" + (f", its pre-tokenizer '{pre}'." if pre else "."), LOOKED_UP)


def bos_eos(model: Subject) -> Fact | None:
    """Ids and texts."""
    texts, told = model.get("tokenizer.ggml.tokens"), []
    for role in ("bos", "eos"):
        number = model.get(f"tokenizer.ggml.{role}_token_id")
        if isinstance(number, int):
            inside = isinstance(texts, Array) and number < len(texts)
            told.append(f"{role.upper()} is {number}" + (f" ({texts[number]})" if inside else ""))
    return Fact(f"Its {', '.join(told)}.", LOOKED_UP) if told else None


def template(model: Subject) -> Fact | None:
    """Its length."""
    text = model.get("tokenizer.chat_template")
    if not isinstance(text, str):
        return Fact("It carries no chat template.", LOOKED_UP) if model.get("tokenizer.ggml.model") else None
    return Fact(f"Its chat template has {len(text):,} characters.", LOOKED_UP)


def embedding(model: Subject) -> Fact | None:
    """The table's size."""
    table = model.embedding
    if table is None or not model.weights:
        return None
    share = 100 * table.weights / model.weights
    rows, width = table.shape
    return Fact(f"Its table has {rows:,} rows of {width:,} numbers: {share:.0f} % of its weights.", DERIVED)


def context(model: Subject) -> Fact | None:
    """As trained."""
    length = model.count("context_length")
    return Fact(f"It was trained for {length:,} tokens of context.", LOOKED_UP) if length else None


# ── sampling ──


def logits(model: Subject) -> Fact | None:
    """How many."""
    if not model.n_vocab:
        return None
    return Fact(f"It gives {model.n_vocab:,} logits for each token: {_size(4 * model.n_vocab)} in FP32.", DERIVED)


def entropy(model: Subject) -> Fact | None:
    """The most there can be."""
    from math import log2

    if not model.n_vocab:
        return None
    return Fact(f"At most it is log2({model.n_vocab:,}) = {log2(model.n_vocab):.1f} bits for it.", DERIVED)


def perplexity(model: Subject) -> Fact | None:
    """Of blind guessing."""
    if not model.n_vocab:
        return None
    return Fact(f"Guessing blindly among its {model.n_vocab:,} tokens is a perplexity of {model.n_vocab:,}.", DERIVED)


# ── inside ──


def attention(model: Subject) -> Fact | None:
    """Heads."""
    heads, sets = model.count("attention.head_count"), model.count("attention.head_count_kv")
    count = model.count("block_count")
    if not heads or not count:
        return None
    shared = f", which share {_some(sets, 'set')} of keys and values" if sets and sets != heads else ""
    return Fact(f"It has {heads} heads in each of {count} layers{shared}.", LOOKED_UP)


def layers(model: Subject) -> Fact | None:
    """How many, how large."""
    count = model.count("block_count")
    inside = sum(tensor.weights for tensor in model.tensors if tensor.name.startswith("blk."))
    if not count or not inside:
        return None
    return Fact(f"It has {count} layers of about {inside / count / 1e6:,.1f} million weights each.", DERIVED)


def experts(model: Subject) -> Fact | None:
    """How many, how many of them work."""
    total, used = model.count("expert_count"), model.count("expert_used_count")
    if not total or not used:
        return Fact("It has none: every weight works for every token.", LOOKED_UP) if model.tensors else None
    share = f"{model.active / 1e9:.2f} of {model.weights / 1e9:.2f} billion weights"
    return Fact(f"It has {total} experts a layer and uses {used}: {share} work for a token.", DERIVED)


def rope(model: Subject) -> Fact | None:
    """The base of its angles."""
    base = model.own("rope.freq_base")
    return Fact(f"The base of its angles is {base:,.0f}.", LOOKED_UP) if isinstance(base, float) else None


def lora(model: Subject) -> Fact | None:
    """An adapter of rank 16 on queries and values."""
    chosen = [tensor for tensor in model.tensors if tensor.name.endswith((".attn_q.weight", ".attn_v.weight"))]
    extra = sum(16 * sum(tensor.shape) for tensor in chosen)
    if not extra:
        return None
    share = 100 * extra / model.weights
    return Fact(
        f"Rank 16 beside its query and value matrices is {extra / 1e6:.2f} million weights, {share:.2g} %.", DERIVED
    )


# ── numbers ──


def sixteen_bits(model: Subject) -> Fact | None:
    """Its size in 16 bits."""
    if not model.weights:
        return None
    return Fact(f"Its {model.weights:,} weights take {_size(2 * model.weights)} in FP16 or BF16.", DERIVED)


def quantization(model: Subject) -> Fact | None:
    """Its size against 16 bits."""
    if not model.weights:
        return None
    now, full = model.weight_nbytes, 2 * model.weights
    stated = model.get("general.file_type")
    named = QUANTS_BY_FTYPE.get(stated) if isinstance(stated, int) else None
    called = f" ({named.name})" if named and named.default else ""
    return Fact(f"Its weights take {_size(now)}{called}; in 16 bits they take {_size(full)}.", DERIVED)


def bits_per_weight(model: Subject) -> Fact | None:
    """Of all tensors."""
    if not model.weights:
        return None
    bits = 8 * model.weight_nbytes / model.weights
    return Fact(f"It has {bits:.2f}: {_size(model.weight_nbytes)} for {model.weights:,} weights.", DERIVED)


def imatrix(model: Subject) -> Fact | None:
    """Whether the header names one."""
    name = model.get("quantize.imatrix.file")
    if name is None:
        return Fact("Its header names none.", LOOKED_UP)
    chunks = model.get("quantize.imatrix.chunks_count")
    return Fact(f"It was made with '{name}'" + (f", {chunks:,} chunks of text." if chunks else "."), LOOKED_UP)


# ── running ──


def kv_nbytes(model: Subject, elements: Iterable[str] = ("key_length", "value_length")) -> int | None:
    """Bytes of the cache per token in FP16: layers · key/value heads · (key length + value length) · 2."""
    layers, heads = model.count("block_count"), model.count("attention.head_count_kv")
    width, n_head = model.count("embedding_length"), model.count("attention.head_count")
    if not (layers and n_head and width) or model.own("attention.kv_lora_rank") or model.own("ssm.state_size"):
        return None  # other kinds of memory: `llmkit estimate` asks the engine
    length = sum(model.count(f"attention.{name}") or width // n_head for name in elements)
    return layers * (heads or n_head) * length * 2


def kv_cache(model: Subject) -> Fact | None:
    """Per token, and for the whole context."""
    each, length = kv_nbytes(model), model.count("context_length")
    if each is None:
        return None
    whole = f", {_size(each * length)} for all {length:,} of its context" if length else ""
    window = " (less where layers look at a window)" if model.own("attention.sliding_window") else ""
    return Fact(f"In FP16 it takes {_size(each)} for each token{whole}{window}.", DERIVED)


def decode(model: Subject) -> Fact | None:
    """What a token reads."""
    if not model.weights:
        return None
    read = model.weight_nbytes * model.active / model.weights
    pace = 50e9 / read
    return Fact(f"Each new token reads {_size(read)}: at 50 GB/s that is at most {pace:,.0f} tokens a second.", DERIVED)


def flops(model: Subject) -> Fact | None:
    """Operations against bytes."""
    if not model.weights:
        return None
    read = model.weight_nbytes * model.active / model.weights
    work = 2 * model.active
    return Fact(
        f"It does {work / 1e9:.2f} billion operations a token and reads {_size(read)}: {work / read:.1f} a byte.",
        DERIVED,
    )


def scores(model: Subject) -> Fact | None:
    """The table that flash attention does without."""
    heads, length = model.count("attention.head_count"), model.count("context_length")
    if not heads or not length:
        return None
    size = _size(4 * heads * length**2)
    return Fact(f"At its full context the table of scores would take {size} in every layer.", DERIVED)


# ── files ──


def gguf(model: Subject) -> Fact | None:
    """Keys, tensors, bytes."""
    if not model.nbytes:
        return None
    counts = f"{_some(len(model.metadata), 'key')} and {_some(len(model.tensors), 'tensor')}"
    return Fact(f"This one holds {counts} in {_size(model.nbytes)}.", MEASURED)


def mapped(model: Subject) -> Fact | None:
    """What would be mapped."""
    return Fact(f"{_size(model.nbytes)} are mapped when it is loaded.", MEASURED) if model.nbytes else None


def types(model: Subject) -> Fact | None:
    """Which types do not fit its rows."""
    matrices = [tensor for tensor in model.tensors if len(tensor.shape) > 1]
    odd = [tensor for tensor in matrices if tensor.shape[-1] % 256]
    if not matrices:
        return None
    if not odd:
        return Fact("All its rows divide into blocks of 256.", DERIVED)
    return Fact(
        f"{len(odd)} of its {len(matrices)} matrices have rows that do not divide by 256 and get other types.", DERIVED
    )


FACTS: dict[str, Callable[[Subject], Fact | None]] = {
    function.__name__: function
    for function in (
        vocabulary, tokenizer, bos_eos, template, embedding, context, logits, entropy, perplexity, attention, layers,
        experts, rope, lora, sixteen_bits, quantization, bits_per_weight, imatrix, kv_cache, decode, flops, scores,
        gguf, mapped, types,
    )
}  # fmt: skip
