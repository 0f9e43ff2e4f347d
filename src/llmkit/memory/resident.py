"""Memory that no buffer of the engine's shows: the vocabulary, the engine itself, its work buffer, pages of the file.

Measured with llama-cpp-python 0.3.36 on Linux x86-64 as growth of the resident memory of a process that had loaded the
libraries; the tests hold these figures against real loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path

from ..gguf import Array, Value
from ..gguf_writer import tensor_nbytes
from ..quants import F32, TensorType
from .parts import DERIVED, Part

OVERHEAD, GRAPHS = "vocabulary and runtime", "graphs and threads of a context"

# By kind of vocabulary, bytes for each token and for each merge. Fitted to files loaded with vocab_only: SentencePiece
# of 32,000 and 32,768 tokens 4.8 and 5.0 MiB, of 262,145 41.4; byte-level BPE of 49,152 tokens 16.3, 100,277 30.9,
# 128,256 (280,147 merges) 52.1, 128,815 38.6, 151,669 46.3, 200,019 62.0, the same with 446,189 merges 83.3 MiB.
_VOCABULARY = {"llama": (164, 0), "gpt2": (230, 92)}
# The engine itself, bytes at all and for each tensor of the model: once loaded, and more with a context that has worked
# (graphs, their scheduler, threads). Fitted to tiny models of 2 to 80 layers of 9 and 13 tensors, on one thread: 0.9 to
# 1.8 MiB once loaded, 3.4 (18 tensors) to 9.3 (720) and 12.2 MiB (1,040) after a batch.
_LOADED = (1 << 20, 1 << 10)
_WORKING = (9 << 18, 15 << 9)


def engine_nbytes(n_tensors: int) -> tuple[int, int]:
    """What the engine takes for itself once a model is loaded, and what is added by a context."""
    loaded, working = (fixed + each * n_tensors for fixed, each in (_LOADED, _WORKING))
    return loaded, working


def vocabulary_nbytes(metadata: Mapping[str, Value], n_tokens: int) -> int:
    """The vocabulary of `n_tokens` as the engine keeps it; where the tokenizer is not known, as such models have it."""
    kind, architecture = metadata.get("tokenizer.ggml.model"), metadata.get("general.architecture")
    usual = "llama" if architecture is not None and str(architecture.data).startswith("gemma") else "gpt2"
    token, merge = _VOCABULARY.get(str(kind.data) if kind else usual, _VOCABULARY["gpt2"])
    merges = metadata.get("tokenizer.ggml.merges")
    n_merges = len(merges.data) if merges is not None and isinstance(merges.data, Array) else n_tokens
    return n_tokens * token + n_merges * merge


def overhead(metadata: Mapping[str, Value], *, n_tokens: int, n_tensors: int) -> Part:
    """The vocabulary as the engine keeps it, and the engine itself."""
    loaded, working = engine_nbytes(n_tensors)
    parts = (
        Part("vocabulary", vocabulary_nbytes(metadata, n_tokens), DERIVED),
        Part("engine", loaded, DERIVED),
        Part(GRAPHS, working, DERIVED),
    )
    return Part(OVERHEAD, sum(part.nbytes for part in parts), DERIVED, parts)


@dataclass(frozen=True)
class Weight:
    """A tensor as it will lie in a file: `offset` in the file `path`."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of its rows."""
        return tensor_nbytes(self.shape, self.type)


def work_nbytes(weights: Sequence[Weight], *, ubatch: int, scores: int, experts_used: int) -> int:
    """The CPU's work buffer for a full ubatch: one product's right-hand side, turned into the type its weights like.

    Activations become 8-bit blocks for quantized weights and halves for half-precision ones; `scores` (weights of
    attention over a cache of halves, without flash attention) become halves too. No layout shows it. Source: llama.cpp
    ggml/src/ggml-cpu/ggml-cpu.c (ggml_graph_plan, vec_dot_type).
    """
    found = 2 * scores
    for weight in weights:
        if len(weight.shape) < 2 or weight.type is F32 or weight.name == "token_embd.weight":
            continue
        rows = ubatch * (experts_used if "_exps." in weight.name else 1) if weight.name != "output.weight" else 1
        found = max(found, rows * weight.shape[-1] * _partner_bits(weight.type) // 8)
    return found


def _partner_bits(kind: TensorType) -> int:
    """Bits of an activation beside such weights: blocks of 32 have a scale and a sum, of 256 sums of 16."""
    return 16 if not kind.quantized else 9 if kind.block == 32 else -(-292 * 8 // 256)


def mapped_nbytes(weights: Sequence[Weight], repacked: int) -> int | None:
    """Bytes that are mapped when `repacked` of the weights lie in buffers of their own: in each file all from the first
    to the last tensor that is used where it lies (llama-model-loader.cpp, get_mapping_range).

    Which types are repacked the engine does not say; it follows from their bytes. None when nothing fits.
    """
    moved = _repacked(weights, repacked)
    if moved is None:
        return None
    total = 0
    for path in {weight.path for weight in weights}:
        ends = [
            (weight.offset, weight.offset + weight.nbytes)
            for weight in weights
            if weight.path == path and weight.name not in moved
        ]
        if ends:
            total += max(end for _, end in ends) - min(start for start, _ in ends)
    return total


def _repacked(weights: Sequence[Weight], nbytes: int) -> set[str] | None:
    """The names of the tensors that make up `nbytes` when whole types are repacked; matrices that rows are looked up in
    stay where they are, but a tied one has a copy for the output (llama-model.cpp, buffer types of tensors)."""
    if not nbytes:
        return set()
    tied = all(weight.name != "output.weight" for weight in weights)
    # kernels work on 8 rows at once (ggml-cpu/repack.cpp)
    matrices = [weight for weight in weights if len(weight.shape) > 1 and weight.shape[-2] % 8 == 0]
    by_type: dict[TensorType, list[Weight]] = {}
    for weight in matrices:
        if weight.type.quantized and (tied or weight.name != "token_embd.weight"):
            by_type.setdefault(weight.type, []).append(weight)
    for types in _subsets(list(by_type)):
        chosen = [weight for kind in types for weight in by_type[kind]]
        if sum(weight.nbytes for weight in chosen) == nbytes:
            return {weight.name for weight in chosen} - {"token_embd.weight"}
    return None


def _subsets(types: Sequence[TensorType]) -> Iterator[tuple[TensorType, ...]]:
    return chain.from_iterable(combinations(types, size) for size in range(1, len(types) + 1))
