"""What would save memory on this very model, in bytes: each knob is turned and the engine asked again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..convert.draft import GgufDraft
from . import estimate as memory
from .parts import Variant
from .setting import Setting


@dataclass(frozen=True)
class Knob:
    """A change of the setting: what it costs and the options of `llmkit estimate` for it. `saved` bytes once asked for.

    `undone` are the changes that put the opposite in place; `command` runs a model so, where FILE is a GGUF.
    """

    name: str
    changes: Mapping[str, Any]
    cost: str
    option: str
    saved: int = 0
    undone: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""


TRIFLE = 0.001  # of all that is needed: less is not worth a line
_SIXTEEN_BITS = {"kv_k": "f16", "kv_v": "f16"}
KNOBS = (
    Knob(
        "flash attention", {"flash_attention": True}, "nothing on most machines", "--flash-attention",
        undone={"flash_attention": False}, command="llmkit chat FILE",
    ),
    Knob(
        "KV cache in 8 bits", {"kv_k": "q8_0", "kv_v": "q8_0", "flash_attention": True},
        "hardly any quality: a KL divergence of 0.001 nats (llama.cpp #7412)", "--kv-type q8_0",
        undone=_SIXTEEN_BITS, command="llama-server -m FILE -fa on -ctk q8_0 -ctv q8_0",
    ),
    Knob(
        "KV cache in 4 bits", {"kv_k": "q4_0", "kv_v": "q4_0", "flash_attention": True},
        "quality, most of all of long contexts; MMLU of Gemma 3 4B 40.0 → 39.7 % (llama.cpp #21551)", "--kv-type q4_0",
        undone=_SIXTEEN_BITS, command="llama-server -m FILE -fa on -ctk q4_0 -ctv q4_0",
    ),
    Knob(
        "sliding windows kept small", {"swa_full": False}, "no going back beyond the window", "as --runtime llmkit",
        undone={"swa_full": True}, command="llmkit chat FILE",
    ),
    Knob(
        "smaller batches", {"ubatch": 64}, "prompts are read more slowly", "--ubatch 64",
        undone={"ubatch": 512}, command="llama-server -m FILE -ub 64",
    ),
    Knob(
        "one conversation", {"parallel": 1}, "no others at the same time", "--parallel 1",
        command="llama-server -m FILE --parallel 1",
    ),
    Knob(
        "one row of logits", {"output_rows": 1}, "no probabilities of a prompt's tokens", "as --runtime llama-server",
        command="llama-server -m FILE",
    ),
)  # fmt: skip


def half_context(setting: Setting) -> Knob:
    """The knob that halves the context, down to 256 tokens."""
    half = max(256, setting.context // 2)
    return Knob(
        "smaller context", {"context": half}, f"{half:,} tokens are remembered, not {setting.context:,}",
        f"--context {half}", command=f"llmkit chat FILE --context {half}",
    )  # fmt: skip


def of(draft: GgufDraft, variant: Variant, setting: Setting) -> list[Knob]:
    """The knobs that save something here, the largest saving first. Raises LlmkitError when nobody can be asked."""
    rows = (*KNOBS, half_context(setting))
    turned = [(knob, changed) for knob in rows if (changed := replace(setting, **knob.changes)) != setting]
    settings = [setting, *(changed for _, changed in turned)]
    now, *later = memory.estimate(draft, [variant], settings)[0]
    found = [
        replace(knob, saved=now.needed_nbytes - then.needed_nbytes, option=_option(knob, setting))
        for (knob, _), then in zip(turned, later, strict=True)
        if now.error is None and then.error is None
    ]
    worth = (knob for knob in found if knob.saved > TRIFLE * now.needed_nbytes)
    return sorted(worth, key=lambda knob: -knob.saved)


def _option(knob: Knob, setting: Setting) -> str:
    """The knob's options; a quantized cache needs flash attention, which may be off."""
    needs = knob.changes.get("flash_attention") and "kv_k" in knob.changes and setting.flash_attention is False
    return f"{knob.option} --flash-attention" if needs else knob.option
