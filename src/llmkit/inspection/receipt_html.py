"""A receipt as one page: the conversation, the answer's tokens by probability, all settings, the JSON itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from math import exp, isnan
from typing import TYPE_CHECKING

from ..chat import Sampling, Step
from . import page as html
from .tokens import visible

if TYPE_CHECKING:
    from .receipt import Receipt

ELEMENT = "llmkit-receipt"  # id of the page's script element
_PLAIN = Sampling()


def page(receipt: Receipt) -> str:
    """The whole page."""
    answer = receipt.answer
    body = [html.paragraph(f"{receipt.model} answered {len(answer.steps)} tokens; receipt made {receipt.made}.")]
    if receipt.system:
        body += [html.heading("system"), html.tokens([html.token(receipt.system, None, "")])]
    for message in receipt.messages:
        body += [html.heading(message.role), html.tokens([html.token(message.text, None, "")])]
    body += [
        html.heading("answer"),
        html.tokens(map(_token, answer.steps)),
        html.paragraph(
            "Each token's ground shows its raw probability, the model's own before any sampler: none where it was sure,"
            " red where it was unlikely. Point at a token for its alternatives.",
            "quiet",
        ),
        html.details("token by token", _steps(answer.steps)),
        html.heading("how it came about"),
        html.table(("", ""), _facts(receipt)),
        html.heading("samplers"),
        html.paragraph(f"In this order: {' → '.join(answer.sampling.stages) or 'none'}; settings changed are marked."),
        html.table(("setting", "value", ""), _settings(answer.sampling)),
        html.details("the prompt as the model read it", html.tokens([html.token(receipt.prompt, None, "")])),
        html.details("its tokens", html.paragraph(" ".join(map(str, answer.prompt)), "mono")),
        html.heading("have it again"),
        html.paragraph("llmkit replay FILE --model MODEL", "mono"),
        html.paragraph(
            "The same file, engine build and processor give the same tokens; elsewhere rounding may differ, and the"
            " replay says where. The receipt's seal is a digest, no signature: it shows damage, not deceit.",
            "quiet",
        ),
    ]
    return html.page(f"Receipt: {receipt.model}", body, data=_data(receipt))


def _data(receipt: Receipt) -> str:
    """The JSON in an element that nothing runs; no `<` in it can end it."""
    text = json.dumps(receipt.to_json(), ensure_ascii=True).replace("<", "\\u003c")
    return f'<script type="application/json" id="{ELEMENT}">{text}</script>\n'


def _token(step: Step) -> str:
    known = not isnan(step.logprob)
    text = step.piece.decode("utf-8", "replace") if step.finish != "end" else ""
    return html.token(text or visible(step.piece), exp(step.logprob) if known else None, _words(step))


def _words(step: Step) -> str:
    if isnan(step.logprob):
        return f"token {step.id}; no probabilities were kept"
    lines = [
        f"{visible(step.piece)} (token {step.id}): raw probability {exp(step.logprob):.2%}, rank {step.rank},"
        f" entropy {step.entropy:.2f} bits, {_drawn(step)}"
    ]
    lines += [f"{exp(other.logprob):.2%}  {visible(other.piece)}" for other in step.alternatives]
    return "\n".join(lines)


def _drawn(step: Step) -> str:
    if isnan(step.sampled_probability):
        return "set, not drawn"
    return f"drawn with {step.sampled_probability:.2%} after the samplers"


def _steps(steps: tuple[Step, ...]) -> str:
    def rows() -> Iterator[tuple[object, ...]]:
        for number, step in enumerate(steps, 1):
            known = not isnan(step.logprob)
            others = ", ".join(f"{visible(each.piece)} {exp(each.logprob):.1%}" for each in step.alternatives)
            yield (
                number, step.id, visible(step.piece), f"{exp(step.logprob):.2%}" if known else "-",
                step.rank if known else "-", f"{step.entropy:.2f}" if known else "-",
                "set" if isnan(step.sampled_probability) else f"{step.sampled_probability:.2%}", others,
            )  # fmt: skip

    headers = ("", "id", "token", "raw p", "rank", "entropy, bits", "sampled p", "most likely (raw)")
    return html.table(headers, rows(), "rrlrrrrl")


def _facts(receipt: Receipt) -> Iterator[tuple[str, object]]:
    answer, turn = receipt.answer, receipt.answer.turn
    yield "model", f"{receipt.model} ({receipt.architecture})" + (f", {receipt.source}" if receipt.source else "")
    for file in receipt.files:
        how = "remembered: unchanged in size and time" if file.remembered else "measured"
        yield "file", f"{file.name}, {file.nbytes:,} bytes, sha256 {file.sha256} ({how})"
    yield "engine", receipt.engine
    yield "machine", f"{receipt.machine.system}; {' '.join(receipt.machine.features)}"
    yield "llmkit", receipt.llmkit
    yield "template", answer.template
    yield "seed", f"{answer.sampling.seed}, variation {answer.variation}"
    yield "prompt", f"{len(answer.prompt)} tokens, {answer.reused} of them reused from the context"
    if answer.given:
        yield "set", f"the first {answer.given} tokens were not drawn with these settings"
    yield "context", f"{receipt.context} tokens" + (f", {receipt.threads} threads" if receipt.threads else "")
    yield "ended", {"end": "the model ended it", "stop": "a stop string came", "length": "at max_tokens",
                    "context": "the context was full"}.get(answer.finish or "", "it was stopped")  # fmt: skip
    if turn.tokens_per_second:
        yield "speed", f"{turn.tokens_per_second:.1f} tokens/s measured, first token after {turn.first_ms / 1000:.2f} s"


def _settings(sampling: Sampling) -> Iterator[tuple[str, object, str]]:
    for field in fields(Sampling):
        value = getattr(sampling, field.name)
        shown = ", ".join(map(str, value)) if isinstance(value, tuple) else "-" if value is None else value
        yield field.name, shown, "" if value == getattr(_PLAIN, field.name) else "changed"
