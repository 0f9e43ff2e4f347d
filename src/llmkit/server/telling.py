"""How answers are written: usage, timings, log-probabilities, events of a stream."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ..backends import Backend
from ..chat.answer import Finish, Step, Turn
from ..errors import LlmkitError
from .errors import refusal, shaped

DONE = b"data: [DONE]\n\n"
ALIVE = b": still here\n\n"
Json = dict[str, Any]


def fresh_id(kind: str) -> str:
    """A name for an answer."""
    return f"{kind}-{secrets.token_hex(12)}"


def fingerprint(backend: Backend) -> str:
    """What computed: the engine and its build."""
    return backend.info.engine


def event(value: Mapping[str, Any]) -> bytes:
    """One event of a stream; in ASCII, as some clients end lines where Unicode knows a line to end (U+2028)."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def stream(chunks: AsyncIterator[Mapping[str, Any] | None]) -> AsyncIterator[bytes]:
    """Chunks as server-sent events; None is a sign of life. An error on the way is told in the stream."""
    try:
        async for chunk in chunks:
            yield ALIVE if chunk is None else event(chunk)
    except LlmkitError as error:
        yield event(shaped(refusal(error)))
    yield DONE


def finish_reason(finish: Finish | None) -> str:
    """In OpenAI's words; one that was broken off has the length it has."""
    return "stop" if finish in ("end", "stop") else "length"


def usage(prompt: int, turns: Sequence[Turn], reasoning: int | None = None) -> Json:
    """Tokens of the prompts (each counted once), and of the answers."""
    generated = sum(turn.generated for turn in turns)
    told: Json = {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": turns[0].reused if turns else 0},
    }
    if reasoning is not None:
        told["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return told


def timings(turns: Sequence[Turn]) -> Json:
    """Of the first answer, in milliseconds; an extension."""
    turn = turns[0]
    return {
        "prompt_n": turn.prompt - turn.reused,
        "cache_n": turn.reused,
        "prompt_ms": round(turn.prompt_ms, 3),
        "first_token_ms": round(turn.first_ms, 3),
        "predicted_n": turn.generated,
        "predicted_ms": round(turn.generated_ms, 3),
        "predicted_per_second": round(turn.tokens_per_second, 3),
        "seed": turn.seed,
    }


# ── log-probabilities ──


def readable(piece: bytes) -> str:
    """A piece as text; one that is no whole text as OpenAI writes it, with its bytes."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def number(logprob: float) -> float | None:
    """A logarithm JSON can hold: that of 0 as -9999, as OpenAI has it."""
    if math.isnan(logprob):
        return None
    return max(logprob, -9999.0)


def chat_logprobs(steps: Sequence[Step], top: int) -> list[Json]:
    """Raw ones, as chat completions have them, with ids as an extension."""
    return [
        _token(step.id, step.piece, step.logprob)
        | {"top_logprobs": [_token(each.id, each.piece, each.logprob) for each in step.alternatives[:top]]}
        for step in steps
    ]


def _token(id: int, piece: bytes, logprob: float) -> Json:
    return {"id": id, "token": piece.decode("utf-8", "replace"), "logprob": number(logprob), "bytes": list(piece)}


def said(steps: Sequence[Step], stop: Sequence[str]) -> int:
    """How many steps of an answer count: not the token that ends it, nor those of a stop text."""
    from ..chat.generation import before_stop

    if steps and steps[-1].finish == "end":
        return len(steps) - 1
    return before_stop(steps, stop) if steps and steps[-1].finish == "stop" else len(steps)
