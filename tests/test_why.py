"""inspection/why.py: what is explained afterwards is what happened when the token was drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit import backends
from llmkit.backends import Backend
from llmkit.backends.scripted import Scripted
from llmkit.chat import Chat, Sampling
from llmkit.errors import LlmkitError
from llmkit.inspection import why

SAMPLINGS = {
    "default": Sampling(seed=1, max_tokens=8),
    "hot": Sampling(seed=2, max_tokens=8, temperature=1.5, top_k=0, top_p=1.0, min_p=0.02),
    "penalties and xtc": Sampling(
        seed=3, max_tokens=8, repeat_penalty=1.3, presence_penalty=0.4, xtc_probability=0.6, dry_multiplier=0.8
    ),
    "mirostat": Sampling(seed=4, max_tokens=8, mirostat=2, mirostat_tau=3.0),
    "another order": Sampling(seed=5, max_tokens=8, order=("temperature", "min_p", "top_k")),
}


@pytest.fixture(scope="module")
def backend(smollm2_gguf: Path) -> Iterator[Backend]:
    loaded = backends.load(smollm2_gguf, n_threads=1)
    yield loaded
    loaded.close()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_the_explanation_is_what_happened(backend: Backend, sampling: Sampling) -> None:
    chat = Chat(backend, system="Be brief.", sampling=sampling, context=256)
    steps = list(chat.say("Name three colours."))
    answer = chat.answers[1]
    for position in (0, len(steps) - 1):
        found = why.explain(backend, answer, position)
        step = steps[position]
        assert (found.id, found.rank, found.count) == (step.id, step.rank, len(steps))
        assert found.raw == pytest.approx(math.exp(step.logprob)) == pytest.approx(found.raw_again, abs=1e-4)
        assert found.sampled == step.sampled_probability == pytest.approx(found.stages[-1].probability, abs=1e-4)
        assert [each.name for each in found.stages] == ["raw", *sampling.stages]
        assert not any(each.removed for each in found.stages)  # it was drawn
        assert found.stages[0].left == found.vocabulary == 49152
        survivors = found.sampled + sum(rival.sampled for rival in found.rivals)
        assert 0 < survivors <= 1 + 1e-9
        for rival in found.rivals:
            assert (rival.sampled == 0) == (rival.removed_by is not None)
    chat.close()


def test_a_token_set_by_hand_is_said_to_be_given(backend: Backend) -> None:
    chat = Chat(backend, sampling=Sampling(seed=1, max_tokens=6), context=256)
    list(chat.say("Name a colour."))
    token = backend.encode(" xylophone")[0]
    list(chat.instead(1, 2, token))
    answer = chat.answers[2]
    found = why.explain(backend, answer, 2)
    assert found.given and found.id == token and math.isnan(found.sampled)
    assert any(each.removed for each in found.stages)  # no sampler would have let it through
    kept = why.explain(backend, answer, 1)  # drawn, by the answer this one branched from
    assert kept.given and kept.sampled == answer.steps[1].sampled_probability > 0
    drawn = why.explain(backend, answer, 3)
    assert not drawn.given and drawn.sampled == pytest.approx(drawn.stages[-1].probability, abs=1e-3)
    chat.close()


def test_what_cannot_be_explained() -> None:
    chat = Chat(Scripted(["Yes."]), sampling=Sampling(seed=1), context=100)
    list(chat.say("Hi"))
    answer = chat.answers[1]
    for position in (-1, len(answer.steps)):
        with pytest.raises(LlmkitError, match="there is no token"):
            why.explain(chat.backend, answer, position)
    other = Scripted(["Yes."])
    from dataclasses import replace

    other.info = replace(other.info, name="another")
    with pytest.raises(LlmkitError, match="another is loaded"):
        why.explain(other, answer, 0)
