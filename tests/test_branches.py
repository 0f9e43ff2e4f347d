"""inspection/branches.py against runs of their own for each branch, on SmolLM2 and the scripted backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit import backends
from llmkit.backends import Backend
from llmkit.backends.scripted import END, Scripted
from llmkit.chat.sampling import Sampler, Sampling, describe
from llmkit.cli import output
from llmkit.errors import LlmkitError, Unsupported
from llmkit.inspection import branches
from llmkit.inspection.branches import Fork, Shape

FRANCE = [504, 3575, 282, 4649, 314]


@pytest.fixture(scope="module")
def smol(smollm2_gguf: Path) -> Iterator[Any]:
    backend = backends.load(smollm2_gguf, n_threads=1)
    yield backend
    backend.close()


def alone(backend: Backend, start: int, length: int, sampler: Sampler | None = None) -> tuple[list[int], float]:
    """One branch in a context of its own, greedily or by `sampler`: its tokens and their logprob together."""
    session, ids, total = backend.session(64), [start], 0.0
    row = session.eval(FRANCE).logits[-1]
    total += describe(row, start, 0).logprob
    if sampler:
        sampler.accept(start)
    while len(ids) < length and ids[-1] not in backend.info.eos:
        row = session.eval([ids[-1]]).logits[-1]
        ids.append(sampler.choose(row, [*FRANCE, *ids]).token if sampler else int(row.argmax()))
        total += describe(row, ids[-1], 0).logprob
    session.close()
    return ids, total


def test_the_golden_branches(smol: Backend) -> None:
    grown = branches.grow(smol, FRANCE, Shape(length=5, starts=(7042, 260, 4528, 1315)))
    assert [leaf.text for leaf in grown.leaves] == [
        " Paris.\n\nThe", " the capital of the French", " London.\n\nThe", " New York City.\n",
    ]  # fmt: skip
    first = [fork.steps[0] for fork in grown.forks]
    assert [step.piece for step in first] == ["␣Paris", "␣the", "␣London", "␣New"]
    assert np.exp([step.logprob for step in first]) == pytest.approx([0.768, 0.0605, 0.0123, 0.0116], abs=0.02)
    assert [step.rank for step in first[:2]] == [1, 2]


def test_branches_are_what_separate_runs_say(smol: Backend) -> None:
    grown = branches.grow(smol, FRANCE, Shape(width=3, length=8))
    for leaf, fork in zip(grown.leaves, grown.forks, strict=True):
        ids, logprob = alone(smol, leaf.ids[0], 8)
        assert list(leaf.ids) == ids
        # a batch of several tokens may be summed in another order than one alone
        assert leaf.logprob == pytest.approx(logprob, abs=0.1) == fork.logprob
    assert grown.prompt == 5 and grown.evaluated == 5 + 3 * 7 and grown.separately == 3 * (5 + 7)
    assert grown.cells == grown.evaluated  # the prompt is held once


def test_drawn_branches_have_draws_of_their_own(smol: Backend) -> None:
    wanted = Sampling(temperature=1.5, top_k=0, min_p=0.02)
    shape = Shape(length=8, starts=(7042, 260))
    grown = branches.grow(smol, FRANCE, shape, sampling=wanted, seed=3)
    assert grown == branches.grow(smol, FRANCE, shape, sampling=wanted, seed=3)
    assert grown.leaves != branches.grow(smol, FRANCE, shape, sampling=wanted, seed=4).leaves
    ids, _ = alone(smol, 7042, 8, Sampler(wanted, backend=smol, seed=3, turn=0))
    assert list(grown.leaves[0].ids[:3]) == ids[:3]
    steps = grown.forks[0].steps
    assert steps[0].sampled_probability is None and all(0 < (s.sampled_probability or 0) <= 1 for s in steps[1:])


def paths(forks: tuple[Fork, ...]) -> Iterator[list[Fork]]:
    for fork in forks:
        if fork.children:
            yield from ([fork, *path] for path in paths(fork.children))
        else:
            yield [fork]


def test_forks_in_forks(smol: Backend) -> None:
    grown = branches.grow(smol, FRANCE, Shape(width=2, depth=3, length=5))
    ways = list(paths(grown.forks))
    assert len(ways) == 8 == len(grown.leaves)
    for way, leaf in zip(ways, grown.leaves, strict=True):
        assert [len(fork.steps) for fork in way] == [1, 1, 3]
        assert "".join(fork.text for fork in way) == leaf.text
        assert [step.id for fork in way for step in fork.steps] == list(leaf.ids)
        assert way[-1].logprob == pytest.approx(leaf.logprob)
        assert [fork.ending for fork in way] == [None, None, "length"]
    assert len({leaf.ids for leaf in grown.leaves}) == 8
    plain = output.plain(grown)
    assert plain["forks"][0]["children"][0]["children"][0]["steps"][2]["piece"]


def test_a_branch_that_ends_stops_and_the_others_go_on() -> None:
    backend = Scripted(["Hi", "No"])
    prompt = backend.encode("x<assistant>")
    grown = branches.grow(backend, prompt, Shape(length=6, starts=(ord("H"), END)))
    assert [(leaf.text, leaf.ending) for leaf in grown.leaves] == [("Hi", "end"), ("", "end")]
    assert grown.leaves[1].ids == (END,)
    assert grown.evaluated == len(prompt) + 2


def test_one_branch_is_a_chat_without_forks(smol: Backend) -> None:
    grown = branches.grow(smol, FRANCE, Shape(width=1, length=6))
    assert list(grown.leaves[0].ids) == alone(smol, 7042, 6)[0]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape(width=0), "width 0"),
        (Shape(length=0), "length 0"),
        (Shape(depth=0), "depth 0"),
        (Shape(depth=3, length=2), "only 2 tokens"),
        (Shape(width=5, depth=3), "make 125 branches, at most 64"),
        (Shape(starts=(999,)), "token 999: the model has tokens 0 to 258"),
        (Shape(starts=(65, 65)), "begin with A twice"),
    ],
)
def test_shapes_that_cannot_be(shape: Shape, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        branches.grow(Scripted([]), [65], shape)


def test_an_empty_text_has_no_branches() -> None:
    with pytest.raises(LlmkitError, match="empty"):
        branches.grow(Scripted([]), [])
