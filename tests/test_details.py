"""chat/details.py against plain definitions in double precision, and torch."""

from __future__ import annotations

import numpy as np
import pytest

from llmkit.chat.details import describe, entropy, log_softmax


def rows() -> dict[str, np.ndarray]:
    random = np.random.default_rng(4)
    peaked = (random.standard_normal(49152) * 2.5).astype(np.float32)
    peaked[[7042, 11]] = 20, 18.5
    masked = np.full(5000, -np.inf, np.float32)
    masked[[7, 4000]] = 1, 2
    return {
        "peaked": peaked,
        "flat": np.zeros(49152, np.float32),
        "ties": random.integers(-2, 3, 30_000).astype(np.float32),
        "masked": masked,
        "huge": (random.standard_normal(3000) * 1e4).astype(np.float32),
        "two": np.array([0.0, 1.0], np.float32),
    }


@pytest.mark.parametrize("name", rows())
def test_describe_by_definition(name: str) -> None:
    row = rows()[name]
    logprobs = log_softmax(row)
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    for token in (order[0], order[1], order[-1], len(row) // 2):
        found = describe(row, token, 20)
        assert found.logprob == pytest.approx(float(logprobs[token]), abs=1e-4, rel=1e-6)
        assert found.rank == 1 + sum(row[other] > row[token] for other in order[:50]) or found.rank > 50
        assert found.entropy == pytest.approx(entropy(logprobs), abs=1e-4)
        possible = [i for i in order[:20] if row[i] > -np.inf]
        assert found.ids.tolist() == possible
        np.testing.assert_allclose(found.logprobs, logprobs[possible], atol=1e-4, rtol=1e-6)
    assert len(describe(row, 0, 0).ids) == 0


def test_entropy_in_bits() -> None:
    assert entropy(log_softmax(np.zeros(8, np.float32))) == pytest.approx(3)
    assert describe(np.zeros(8, np.float32), 0, 0).entropy == pytest.approx(3)
    certain = np.full(8, -np.inf, np.float32)
    certain[2] = 0
    assert entropy(log_softmax(certain)) == 0
    assert describe(certain, 2, 3)[:3] == (0.0, 1, 0.0)


def test_log_softmax_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    for row in rows().values():
        expected = torch.log_softmax(torch.tensor(row).double(), 0).numpy()
        np.testing.assert_allclose(log_softmax(row), expected, atol=1e-9)
