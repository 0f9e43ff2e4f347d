"""What a scheduler has done so far and does now, as plain numbers; who shows them to whom is the doors' business."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Counters only grow (of one scheduler: a model loaded anew begins at 0); gauges are what is now. Times in ms."""

    # gauges
    slots: int
    running: int  # answers being written or whose prompts are being evaluated
    waiting: int
    context: int  # cells, of all slots together
    cells_used: int  # by running answers and by what idle slots remember
    cells_reserved: int  # that running answers hold or may still take
    # counters
    submitted: int = 0
    refused: int = 0  # the queue was full
    ended: int = 0  # with a finish of their own
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0  # evaluated
    reused_tokens: int = 0  # of prompts, found in the cache
    decoded_tokens: int = 0  # chosen, for all answers
    rounds: int = 0
    evictions: int = 0  # conversations of idle slots that had to leave
    remade: int = 0  # sessions made anew after the engine failed
    engine_ms: float = 0.0  # inside the engine
    busy_ms: float = 0.0  # rounds as a whole: what the engine does not take is Python's
    waited_ms: float = 0.0  # sums over answers, of `begun` and `first` of them
    first_ms: float = 0.0
    begun: int = 0
    first: int = 0
