"""Ground truth for sampling, for tests only: llama.cpp's own samplers, applied one after another."""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkit import engine
from llmkit.chat.sampling import Candidates, Sampling

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


def apply(row: np.ndarray, samplers: Sequence[Any]) -> dict[int, float]:
    """Token → probability after the samplers have been applied in turn; tokens of probability 0 are left out."""
    return applied(row, samplers)[0]


def applied(row: np.ndarray, samplers: Sequence[Any]) -> tuple[dict[int, float], int | None]:
    """The same, and the token that was selected, if one was. The samplers are freed."""
    llama = engine.load().llama
    data = np.zeros(len(row), _TOKEN_DATA)
    data["id"], data["logit"] = np.arange(len(row)), row
    current = llama.llama_token_data_array(
        data=data.ctypes.data_as(llama.llama_token_data_p), size=len(data), selected=-1, sorted=False
    )
    for sampler in samplers:
        llama.llama_sampler_apply(sampler, C.byref(current))
    address = C.addressof(current.data.contents)
    view = np.frombuffer((C.c_char * (_TOKEN_DATA.itemsize * current.size)).from_address(address), _TOKEN_DATA).copy()
    for sampler in samplers:
        llama.llama_sampler_free(sampler)
    powers = np.exp(view["logit"].astype(np.float64) - view["logit"].max())
    powers /= powers.sum()
    possible = view["logit"] > -np.inf
    found = dict(zip(view["id"][possible].tolist(), powers[possible].tolist(), strict=True))
    return found, int(view["id"][current.selected]) if current.selected >= 0 else None


def chain(sampling: Sampling, n_vocab: int, history: Sequence[int], vocab: Any = None) -> list[Any]:
    """The engine's samplers for `sampling`, in its order, each on or off as the engine decides."""
    llama, s = engine.load().llama, sampling
    make = {
        "logit_bias": lambda: _logit_bias(s, n_vocab),
        "grammar": lambda: llama.llama_sampler_init_grammar(vocab, (s.grammar or "").encode(), b"root"),
        "penalties": lambda: _accepting(
            llama.llama_sampler_init_penalties(
                n_vocab, _window(s.repeat_last_n, history), s.repeat_penalty, s.frequency_penalty, s.presence_penalty
            ),
            history,
        ),
        "dry": lambda: _accepting(_dry(s, vocab, history), history),
        "top_n_sigma": lambda: llama.llama_sampler_init_top_n_sigma(s.top_n_sigma),
        "top_k": lambda: llama.llama_sampler_init_top_k(s.top_k),
        "typical_p": lambda: llama.llama_sampler_init_typical(s.typical_p, 1),
        "top_p": lambda: llama.llama_sampler_init_top_p(s.top_p, 1),
        "min_p": lambda: llama.llama_sampler_init_min_p(s.min_p, 1),
        "xtc": lambda: llama.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, 1, 1),
        "temperature": lambda: llama.llama_sampler_init_temp(s.temperature),
    }
    needs = {"grammar": s.grammar is not None, "dry": vocab is not None, "logit_bias": bool(s.logit_bias)}
    return [make[stage]() for stage in s.order if needs.get(stage, True)]


def as_map(left: Candidates) -> dict[int, float]:
    """Our candidates like the engine's answer."""
    possible = left.logits > -np.inf
    return dict(zip(left.ids[possible].tolist(), left.probabilities[possible].tolist(), strict=True))


def assert_same(found: dict[int, float], expected: dict[int, float], within: float = 1e-5) -> None:
    """The same survivors with the same probabilities."""
    assert set(found) == set(expected)
    assert max(abs(found[token] - expected[token]) for token in expected) < within


def _window(last_n: int, history: Sequence[int]) -> int:
    return last_n if last_n >= 0 else len(history) + 1


def _accepting(sampler: Any, history: Sequence[int]) -> Any:
    for token in history:
        engine.load().llama.llama_sampler_accept(sampler, token)
    return sampler


def _dry(s: Sampling, vocab: Any, history: Sequence[int]) -> Any:
    texts = [text.encode() for text in s.dry_breakers]
    return engine.load().llama.llama_sampler_init_dry(
        vocab, s.dry_multiplier, s.dry_base, s.dry_allowed_length, _window(s.dry_last_n, history),
        (C.c_char_p * len(texts))(*texts), len(texts),
    )  # fmt: skip


def _logit_bias(s: Sampling, n_vocab: int) -> Any:
    llama = engine.load().llama
    biases = (llama.llama_logit_bias * len(s.logit_bias))()
    for index, (token, bias) in enumerate(s.logit_bias):
        biases[index].token, biases[index].bias = token, bias
    return llama.llama_sampler_init_logit_bias(n_vocab, len(biases), biases)
