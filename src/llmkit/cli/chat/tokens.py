"""Commands about single tokens: what they are, why one was said, and what comes of another."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...errors import LlmkitError, ModelNotFound, Unsupported
from .. import output
from . import line

if TYPE_CHECKING:
    from ...chat import Chat, Step
    from ...chat.answer import Answer
    from ...inspection.why import Why
    from .completion import Names
    from .talk import Talk

_OTHERS = 3  # alternatives in a row of the table


def last_answer(chat: Chat) -> Answer:
    """The last answer on the way to where the conversation is. Raises LlmkitError where there is none."""
    for node in reversed(chat.tree.path()):
        if (answer := chat.answers.get(node.id)) and answer.steps:
            return answer
    raise LlmkitError("there is no answer yet whose tokens could be shown", "Ask a question first.")


def position(answer: Answer, number: str) -> int:
    """The index of the step that users call `number`, from 1. Raises ModelNotFound outside the answer."""
    count = len(answer.steps)
    if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= count:
        given = f" {output.one_line(number, 20)!r}" if number else ""
        raise ModelNotFound(f"there is no token{given}: the last answer has 1 to {count}", "/tokens lists them.")
    return int(number) - 1


def meant(chat: Chat, step: Step, wanted: str) -> int:
    """The token that `wanted` means: an alternative of `step` as it is shown, #ID, or a text that is one token.

    Raises LlmkitError for what is no single token, with its parts.
    """
    from ...inspection import tokens

    if not wanted:
        said = ", ".join(tokens.visible(each.piece) for each in step.alternatives if each.id != step.id)
        raise LlmkitError("the token is missing", f"It might have said: {said}." if said else None)
    wanted = line.unquoted(wanted)
    if wanted[:1] == "#" and wanted[1:].isdecimal():
        return tokens.find(chat.backend, wanted)
    for spelled in (_text, tokens.visible, lambda piece: _text(piece).strip()):
        for each in step.alternatives:
            if wanted and spelled(each.piece) == wanted:
                return each.id
    begins_word = step.piece[:1] == b" "  # so does what stands in its place
    ids = chat.backend.encode(wanted, special=True)
    if not begins_word and len(ids) == 1 and chat.backend.piece(ids[0]) == wanted.encode("utf-8", "replace"):
        return ids[0]
    return tokens.find(chat.backend, wanted)


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "backslashreplace")


def numbers(talk: Talk, before: list[str], last: str) -> Names:
    """For Tab: the tokens of the last answer."""
    return [] if before else instead_words(talk, before, last)


def instead_words(talk: Talk, before: list[str], _: str) -> Names:
    """For Tab: the tokens of the last answer, then what that one might have been."""
    from ...inspection import tokens

    try:
        answer = last_answer(talk.chat)
        if not before:
            return [(str(number), tokens.visible(step.piece)) for number, step in enumerate(answer.steps, 1)]
        step = answer.steps[position(answer, before[0])]
    except LlmkitError:
        return []
    return [(tokens.visible(each.piece), percent(each.logprob)) for each in step.alternatives if each.id != step.id]


# ── /tokens ──


def show(talk: Talk, text: str) -> None:
    """The tokens of a text, or of the last answer with their probabilities."""
    if text and text != "last":
        return _of_text(talk.chat, text)
    answer = last_answer(talk.chat)
    rows = [_row(number, step) for number, step in enumerate(answer.steps, 1)]
    headers = ("", "id", "token", "raw", "sampled", "rank", "bits", "it might have said (raw)")
    colours = [(None, None, colour(step), *[None] * 5) for step in answer.steps]
    output.table(headers, rows, "rrlrrrl", colours)
    output.emit("raw: the model's own probability; sampled: after the samplers, what the token was drawn with; /why N")


def _of_text(chat: Chat, text: str) -> None:
    from ...inspection import tokens

    cut = tokens.tokenize(chat.backend, text)
    rows = [(token.id, token.piece, token.bytes.hex(" "), token.kind) for token in cut.tokens]
    output.table(("id", "token", "bytes", "kind"), rows, "r")
    output.emit(f"{len(cut.tokens)} tokens, {cut.characters} characters, {cut.characters_per_token:.1f} a token")


def _row(number: int, step: Step) -> tuple[object, ...]:
    from ...inspection import tokens

    others = [each for each in step.alternatives if each.id != step.id][:_OTHERS]
    return (
        number,
        step.id,
        tokens.visible(step.piece),
        percent(step.logprob),
        share(step.sampled_probability),
        step.rank or "-",
        "-" if math.isnan(step.entropy) else f"{step.entropy:.2f}",
        "  ".join(f"{tokens.visible(each.piece)} {percent(each.logprob)}" for each in others),
    )


def colour(step: Step) -> int | None:
    """The terminal's colour of a token, by its raw probability."""
    return output.probability_colour(math.exp(step.logprob)) if math.isfinite(step.logprob) else None


def percent(logprob: float) -> str:
    """A natural logarithm of a probability as a share of 100; - where it is not known."""
    return share(math.exp(logprob))


def share(probability: float) -> str:
    """A probability as a share of 100; - where it is not known."""
    return "-" if math.isnan(probability) else f"{probability:.1%}"


# ── /why, /doubt ──


def why(talk: Talk, number: str) -> None:
    """Why token N of the last answer was said."""
    from ...inspection import why

    if not number:
        raise Unsupported("/why: the token's number is missing", "/tokens lists the tokens of the last answer.")
    answer = last_answer(talk.chat)
    show_why(why.explain(talk.chat.backend, answer, position(answer, number)))


def show_why(found: Why) -> None:
    """The explanation: figures, rivals, stages, words."""
    output.emit(f"Token {found.position + 1} of {found.count}: {found.piece} (id {found.id}), after …{found.before}")
    raw = found.raw_again if math.isnan(found.raw) else found.raw
    like = f"{found.likely_choices:.1f}"
    rows = [
        ("raw", share(raw), f"the model's own probability; rank {found.rank} of {found.vocabulary:,}"),
        ("sampled", share(found.sampled), "after the samplers: what it was drawn with"),
        ("entropy", f"{found.entropy:.2f} bits", f"as uncertain as a choice among {like} equally likely tokens"),
    ]
    output.table(("", "value", ""), rows, "lr")
    if abs(found.raw_again - raw) > 0.0005:
        output.emit(
            f"Evaluated again now raw is {share(found.raw_again)}: computed in other steps, it is rounded otherwise."
        )
    output.emit()
    left = [("removed" if each.removed else share(each.probability) if each.probability else "-")
            for each in found.stages]  # fmt: skip
    rows = [(each.label, f"{each.left:,}", odds) for each, odds in zip(found.stages, left, strict=True)]
    output.table(("sampler", "tokens left", f"of {found.piece}"), rows, "lrr")
    output.emit()
    rows = [(each.piece, share(each.raw), share(each.sampled) if not each.removed_by else
             f"cut by {each.removed_by}") for each in found.rivals]  # fmt: skip
    output.table(("it might have said", "raw", "sampled"), rows, "lrr")
    output.emit()
    for text in words(found):
        output.emit(text)


def words(found: Why) -> list[str]:
    """The same in plain words, and how to go on from another token."""
    raw = found.raw_again if math.isnan(found.raw) else found.raw
    said = [_sure(found, raw)]
    if math.isnan(found.sampled):
        said.append("It was not drawn: it was set, by hand or to go on.")
    elif found.given:
        said.append("It was drawn earlier: by the answer that this one branched from, or before /continue.")
    elif len(found.stages) > 1 and found.stages[-1].left == 1:
        said.append("The samplers left nothing else: it is said with any seed.")
    else:
        said.append(
            f"The samplers left {found.stages[-1].left:,} tokens; with other seeds it is drawn"
            f" about {found.sampled * 100:.0f} times of 100."
        )
    if found.rivals:
        said.append(f"/instead {found.position + 1} {found.rivals[0].piece} goes on from another one,"
                    f" /alternatives {found.position + 1} shows where several lead.")  # fmt: skip
    return said


def _sure(found: Why, raw: float) -> str:
    first = "It was the model's first choice"
    if found.rank == 1:
        return f"{first}, and it was {'sure' if raw > 0.9 else 'rather sure' if raw > 0.5 else 'not sure'}."
    best = max(found.rivals, key=lambda each: each.raw, default=None)
    instead = f" ({best.piece}, {share(best.raw)})" if best else ""
    return f"It was the model's choice number {found.rank}: others were more likely{instead}."


def doubt(talk: Talk, _: str) -> None:
    """Mark what the model was unsure of in its last answer, and say what that can and cannot tell."""
    from ...inspection import doubt
    from ..inspect import doubt as view

    answer = last_answer(talk.chat)
    asked = talk.chat.tree.node(answer.node).parent
    question = "" if asked is None else talk.chat.tree.node(asked).text
    view.show(doubt.Doubt(answer.model, question, doubt.mark(answer.steps), None))
