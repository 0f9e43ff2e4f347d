"""Where a model was unsure of its answer, and whether it says the same when asked again. Not: whether it is true.

Marks follow rules with numbers (LOW, HIGH). Samples of one question are compared by their normalised text, as in
self-consistency (Wang et al. 2022, arXiv 2203.11171) and SelfCheckGPT (Manakul et al. 2023, arXiv 2303.08896), and by
the vectors the model itself gives to them. LIMITS says what follows from that and what does not.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import exp, isnan, log2
from typing import TYPE_CHECKING

from ..backends import Backend
from ..chat import Chat, Sampling, Step
from ..errors import EngineError, LlmkitError, Unsupported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LOW, HIGH = 0.2, 3.0
RULES = {
    "low probability": f"the model gave the token it said less than {LOW:.0%}",
    "high entropy": f"its choice was as open as among {2**HIGH:.0f} equally likely tokens, or more ({HIGH:g} bits)",
}
LIMITS = (
    "Doubt is not falsehood: a low probability or a high entropy says that the model might well have said something"
    " else, another word or another fact. It does not say that what it said is wrong.",
    "Certainty is not truth: what was false in the training data, or is said often, comes without any mark. Confident"
    " wrong answers exist, and nothing here finds them.",
    "Samples that agree show that the answer does not hang on chance; samples that differ show that it does. A model"
    " can agree with itself and be wrong every time.",
    "The figures belong to this model, quant, prompt and temperature. What is true can only be checked elsewhere.",
)
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `end` (exclusive) of an answer that a rule marks, one certain token between two allowed.

    Both figures are raw, of the model's own distribution: the least probability of a token said, the highest entropy.
    """

    start: int
    end: int
    text: str
    least_probability: float
    highest_entropy_bits: float
    rules: tuple[str, ...]


@dataclass(frozen=True)
class Marked:
    """An answer with its doubtful `spans`; `doubtful` of `tokens` tokens are in them. `perplexity` of what it said."""

    text: str
    tokens: int
    doubtful: int
    perplexity: float
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Sample:
    """An answer drawn anew; `normalised` is what is compared, `seed` and `variation` have it again."""

    text: str
    normalised: str
    seed: int
    variation: int
    mean_probability: float


@dataclass(frozen=True)
class Group:
    """Samples with the same normalised text: the first one's wording, how many, and which share of all."""

    text: str
    count: int
    share: float


@dataclass(frozen=True)
class Consistency:
    """`agreement`: share of the largest group; `with_answer`: of the group the greedy answer is in.

    `entropy_bits` is over the groups: 0 when all agree, log2 of their number when none do. `similarity`: mean cosine
    of the samples' vectors (mean-pooled by the model itself, weak for chat models), None where there is none: `why`.
    """

    temperature: float
    samples: tuple[Sample, ...]
    groups: tuple[Group, ...]
    agreement: float
    with_answer: float
    entropy_bits: float
    similarity: float | None
    why: str = ""


@dataclass(frozen=True)
class Doubt:
    """A question, the greedy answer with its marks, the samples, and what all that can tell."""

    model: str
    question: str
    answer: Marked
    consistency: Consistency | None
    rules: tuple[str, ...] = tuple(f"{name}: {words}" for name, words in RULES.items())
    limits: tuple[str, ...] = LIMITS


def mark(steps: Sequence[Step], *, low: float = LOW, high: float = HIGH) -> Marked:
    """The doubtful spans of an answer. Raises LlmkitError when it was made without probabilities."""
    if steps and steps[-1].finish == "end":  # the mark that ends it is no word of it
        steps = steps[:-1]
    if any(isnan(step.logprob) or isnan(step.entropy) for step in steps):
        raise LlmkitError("the answer was made without probabilities", "Make it with n_alternatives of 1 or more.")
    hits = [_rules(step, low, high) for step in steps]
    spans = tuple(_span(steps, hits, start, end) for start, end in _runs([bool(hit) for hit in hits]))
    loss = -sum(step.logprob for step in steps) / len(steps) if steps else 0.0
    return Marked(_text(steps), len(steps), sum(map(bool, hits)), exp(min(loss, 700)), spans)


def _rules(step: Step, low: float, high: float) -> tuple[str, ...]:
    met = {"low probability": exp(step.logprob) < low, "high entropy": step.entropy >= high}
    return tuple(name for name in RULES if met[name])


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """[start, end) of runs of True; a single False between two does not part them."""
    runs: list[tuple[int, int]] = []
    for index, flag in enumerate(flags):
        if flag and runs and index - runs[-1][1] <= 1:
            runs[-1] = (runs[-1][0], index + 1)
        elif flag:
            runs.append((index, index + 1))
    return runs


def _span(steps: Sequence[Step], hits: Sequence[tuple[str, ...]], start: int, end: int) -> Span:
    inside = steps[start:end]
    met = {name for hit in hits[start:end] for name in hit}
    return Span(
        start,
        end,
        _text(inside),
        min(exp(step.logprob) for step in inside),
        max(step.entropy for step in inside),
        tuple(name for name in RULES if name in met),
    )


def _text(steps: Sequence[Step]) -> str:
    return b"".join(step.piece for step in steps).decode("utf-8", "replace")


# ── asking again ──


def doubt(
    backend: Backend,
    question: str,
    *,
    samples: int = 8,
    sampling: Sampling | None = None,
    system: str | None = None,
    context: int | None = None,
) -> Doubt:
    """Answer `question` greedily and mark the answer; then draw `samples` answers (0: none) with `sampling`.

    `sampling` is by default at temperature 0.7 with at most 64 tokens. Raises what a chat raises.
    """
    drawn = sampling or Sampling(temperature=0.7, max_tokens=64)
    chat = Chat(backend, system=system, sampling=replace(drawn, temperature=0.0), context=context, n_alternatives=5)
    try:
        answer = mark(list(chat.say(question)))
        chat.sampling = drawn
        made = [_sample(chat, list(chat.retry())) for _ in range(samples)]
    finally:
        chat.close()
    found = consistency(backend, made, answer.text, drawn.temperature) if made else None
    return Doubt(backend.info.name, question, answer, found)


def _sample(chat: Chat, steps: Sequence[Step]) -> Sample:
    head = chat.tree.head
    kept = chat.answers[head] if head is not None else None
    said = mark(steps)
    seed, variation = (kept.sampling.seed or 0, kept.variation) if kept else (0, 0)
    return Sample(said.text, normalised(said.text), seed, variation, 1 / said.perplexity)


def consistency(backend: Backend, samples: Sequence[Sample], answer: str, temperature: float) -> Consistency:
    """How far `samples`, one or more, agree with each other and with `answer`."""
    counts = Counter(sample.normalised for sample in samples)
    wording = {sample.normalised: sample.text for sample in reversed(samples)}
    groups = tuple(Group(wording[key].strip(), n, n / len(samples)) for key, n in counts.most_common())
    bits = sum(group.share * log2(1 / group.share) for group in groups)
    similarity, why = _similarity(backend, [sample.text for sample in samples])
    same = counts[normalised(answer)] / len(samples)
    return Consistency(temperature, tuple(samples), groups, groups[0].share, same, bits, similarity, why)


def normalised(text: str) -> str:
    """`text` as samples are compared: without case, punctuation, marks, articles, and differences of spaces."""
    flat = unicodedata.normalize("NFKC", text).casefold()
    words = re.findall(r"[^\W_]+(?:[.,]\d+)*", flat)
    return " ".join(word for word in words if word not in _ARTICLES) or flat.strip()


def _similarity(backend: Backend, texts: Sequence[str]) -> tuple[float | None, str]:
    """Mean cosine of all pairs; None and why not."""
    import numpy as np

    if len(texts) < 2:
        return None, "one sample has nothing to be similar to"
    vectors: dict[str, NDArray[np.float64]] = {}
    try:
        for text in set(texts):
            tokens = backend.encode(text, special=False, bos=True)
            if not tokens:
                return None, "a sample is empty"
            vector = backend.pool(tokens).astype(np.float64)
            vectors[text] = vector / max(float(np.linalg.norm(vector)), 1e-30)
    except (Unsupported, EngineError) as error:
        return None, error.message.splitlines()[0]
    pairs = [float(vectors[one] @ vectors[two]) for one, two in combinations(texts, 2)]
    return sum(pairs) / len(pairs), ""
