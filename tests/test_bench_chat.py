"""scripts/bench_chat.py: what it measures without a quiet machine, and that its verdicts can be bad."""

from __future__ import annotations

import pytest

import bench_chat


@pytest.mark.slow
def test_records_of_a_long_answer_take_little_memory() -> None:
    """2,000 steps with their 20 best alternatives, 49,152 tokens; measured in two processes."""
    assert 1 < bench_chat.inspection_mib() <= bench_chat.LIMITS["inspection_mib"][0]


def test_a_limit_that_does_not_hold_is_told() -> None:
    figures = {"plain_to_bare": 0.99, "detailed_to_bare": 0.91, "lens_ms": 80.0, "first_token_to_bare": 1.0}
    lines = bench_chat.verdicts({"threads_1": figures, "inspection_mib": 50.0, "model": "x"})
    assert [line.split()[0] for line in lines if line.endswith("NOT KEPT")] == ["detailed_to_bare", "inspection_mib"]
    assert len(lines) == 5
