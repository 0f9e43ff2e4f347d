"""The prompt under X-rays: which tokens of a rendered conversation are whose words, and which the template's.

The template is rendered twice: with the messages, and with a mark in the place of each. What stands between the marks
is the template's; what stands where they were is the message as the template shows it (it may trim, or drop it). Each
token belongs to whom most of its bytes are. The tokens are exactly those the model is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from ..backends import Backend
from ..chat.templates import ChatTemplate, Message, Prompt
from ..errors import LlmkitError
from . import tokens as cutting
from .tokens import Token

if TYPE_CHECKING:
    from ..chat import Chat

_MARK = re.compile("\ue000(\\d+[wt])\ue001")  # private use: in no message
TEMPLATE = "template"


class Template(Protocol):
    """What makes a prompt of messages: chat.templates.ChatTemplate, or a Persona."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        now: datetime | None = None,
        thinking: bool | None = None,
    ) -> Prompt:
        """The text of the conversation."""
        ...


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) in a row with one owner: `part` is a message's role or "template", `message` its number."""

    part: str
    message: int | None
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class MessageCost:
    """What a message takes: tokens of its own words, and of what the template puts around them.

    `shown` is the share of its characters that the template wrote: 0 where it drops the message.
    """

    message: int
    role: str
    text: str
    content: int
    template: int
    shown: float

    @property
    def total(self) -> int:
        """Tokens of the context it takes."""
        return self.content + self.template


@dataclass(frozen=True)
class XRay:
    """A prompt. `opening`: tokens that open the answer; the first `reused` tokens are in the context already."""

    model: str
    template: str
    text: str
    tokens: tuple[Token, ...]
    segments: tuple[Segment, ...]
    costs: tuple[MessageCost, ...]
    opening: int
    reused: int
    merged_system: bool

    @property
    def ids(self) -> tuple[int, ...]:
        """The encoded prompt."""
        return tuple(token.id for token in self.tokens)

    def of(self, part: str) -> int:
        """How many tokens that part has: "system", "user", "assistant" or "template"."""
        return sum(segment.end - segment.start for segment in self.segments if segment.part == part)


@dataclass(frozen=True)
class _Stretch:
    """Bytes [begin, end) of the prompt which are the words of a message."""

    message: int
    begin: int
    end: int


def xray(
    backend: Backend,
    messages: Sequence[Message],
    *,
    template: Template | None = None,
    thinking: bool | None = None,
    held: Sequence[int] = (),
) -> XRay:
    """The prompt of `messages` (the system prompt is the first) up to where the answer begins.

    `held`: tokens the context holds; `thinking` as ChatTemplate.render has it. Raises LlmkitError without messages, and
    what the template raises.
    """
    if not messages:
        raise LlmkitError("there are no messages, so there is no prompt", "Give a question.")
    template = template or _template(backend)
    now = datetime.now()  # one clock for all renderings: templates may write the date

    def render(these: Sequence[Message], opened: bool = True) -> str:
        return template.render(these, add_generation_prompt=opened, now=now, thinking=thinking).text

    prompt = template.render(messages, now=now, thinking=thinking)
    stretches = _stretches(messages, prompt.text, render)
    ends = _ends(messages, prompt.text, stretches, render)
    ids = encode(backend, prompt.text)
    tokens = cutting.rows(backend, ids, prompt.text)
    owners = _owners(tokens, stretches)
    payers = _payers(tokens, owners, ends)
    return XRay(
        model=backend.info.name,
        template=template.name,
        text=prompt.text,
        tokens=tokens,
        segments=tuple(_segments(tokens, owners, messages)),
        costs=tuple(_costs(messages, owners, payers, stretches)),
        opening=sum(payer is None for payer in payers),
        reused=_shared(held, ids),
        merged_system=prompt.merged_system,
    )


def of_chat(chat: Chat, question: str | None = None) -> XRay:
    """The conversation as the model would be given it now, with `question` put last where there is one."""
    asked = [Message("user", question)] if question else []
    messages = [*chat.in_context, *asked]
    return xray(chat.backend, messages, template=chat.template, thinking=chat.thinking, held=chat.held)


def encode(backend: Backend, text: str) -> list[int]:
    """A rendered prompt's tokens; a beginning mark the template has written is not added a second time."""
    bos = _spelled(backend, backend.info.bos)
    return backend.encode(text, special=True, bos=not (bos and text.startswith(bos)))


def _template(backend: Backend) -> ChatTemplate:
    info = backend.info
    return ChatTemplate(info.chat_template, bos=_spelled(backend, info.bos), eos=_spelled(backend, info.eos_token))


def _nbytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _spelled(backend: Backend, token: int | None) -> str:
    return "" if token is None else backend.piece(token).decode("utf-8", "replace")


# ── whose words ──


def _stretches(messages: Sequence[Message], text: str, render: Callable[..., str]) -> list[_Stretch]:
    """Where the messages' words lie, in bytes, by the marks; where these fail, by looking for the words."""
    marked = [
        replace(
            message,
            text=f"\ue000{number}w\ue001",
            thinking=message.thinking and f"\ue000{number}t\ue001",
        )
        for number, message in enumerate(messages)
    ]
    try:
        parts = _MARK.split(render(marked))
    except LlmkitError:
        parts = []
    found = _by_marks(messages, text, parts) if parts else None
    if found is None:
        found = _by_words(messages, text)
    return [_Stretch(number, _nbytes(text[:begin]), _nbytes(text[:end])) for number, begin, end in found]


def _by_marks(messages: Sequence[Message], text: str, parts: Sequence[str]) -> list[tuple[int, int, int]] | None:
    """(message, begin, end) in characters. `parts`: words of the template and marks of messages in turn."""
    found = []
    literals, marks = parts[::2], parts[1::2]
    if not text.startswith(literals[0]):
        return None
    place = len(literals[0])
    for index, mark in enumerate(marks):
        number = int(mark[:-1])
        follows, is_last = literals[index + 1], index + 1 == len(marks)
        words = messages[number].text if mark.endswith("w") else messages[number].thinking
        end = _end_of(words, text, place, follows, is_last)
        if end is None:
            return None
        found.append((number, place, end))
        place = end + len(follows)
    return found if place == len(text) else None


def _end_of(words: str, text: str, place: int, follows: str, is_last: bool) -> int | None:
    """Where the words that begin at `place` end: as given or trimmed, else wherever the template goes on."""
    for said in (words, words.strip(), words.lstrip(), words.rstrip()):
        end = place + len(said)
        if text.startswith(said + follows, place) and (not is_last or end + len(follows) == len(text)):
            return end
    if is_last:
        end = len(text) - len(follows)
        return end if end >= place and text.endswith(follows) else None
    end = text.find(follows, place) if follows else -1
    return end if end >= 0 else None


def _by_words(messages: Sequence[Message], text: str) -> list[tuple[int, int, int]]:
    found, place = [], 0
    for number, message in enumerate(messages):
        words = message.text.strip()
        begin = text.find(words, place) if words else -1
        if begin >= 0:
            place = begin + len(words)
            found.append((number, begin, place))
    return found


def _owners(tokens: Sequence[Token], stretches: Sequence[_Stretch]) -> list[int | None]:
    """For each token the message most of its bytes are of, None for the template."""
    owners: list[int | None] = []
    for token in tokens:
        best, most = None, 0
        if token.first is not None and token.last is not None:
            for stretch in stretches:
                inside = min(token.last, stretch.end) - max(token.first, stretch.begin)
                best, most = (stretch.message, inside) if inside > most else (best, most)
            if 2 * most < token.last - token.first:
                best = None
        owners.append(best)
    for index in range(1, len(tokens) - 1):  # what the tokenizer changed lies between the words of its message
        if tokens[index].first is None and owners[index - 1] is not None and owners[index - 1] == owners[index + 1]:
            owners[index] = owners[index - 1]
    return owners


def _segments(tokens: Sequence[Token], owners: Sequence[int | None], messages: Sequence[Message]) -> Iterator[Segment]:
    for owner, group in groupby(range(len(tokens)), key=owners.__getitem__):
        members = list(group)
        text = b"".join(tokens[index].bytes for index in members).decode("utf-8", "backslashreplace")
        part = TEMPLATE if owner is None else messages[owner].role
        yield Segment(part, owner, members[0], members[-1] + 1, text)


# ── what a message costs ──


def _ends(
    messages: Sequence[Message], text: str, stretches: Sequence[_Stretch], render: Callable[..., str]
) -> list[tuple[int, int]]:
    """(byte, message): up to there the template's words are that message's, in order.

    The conversation is rendered up to each message; where it begins as the whole does, its length is the border. Where
    the template has no such rendering, what follows the message counts to the next one.
    """
    found = []
    for index, stretch in enumerate(stretches):
        border = stretch.end
        try:
            until = render(messages[: stretch.message + 1], False)
        except LlmkitError:
            until = ""
        reach = stretches[index + 1].begin if index + 1 < len(stretches) else _nbytes(text)
        if until and text.startswith(until) and stretch.end <= _nbytes(until) <= reach:
            border = _nbytes(until)
        found.append((border, stretch.message))
    return found


def _payers(tokens: Sequence[Token], owners: Sequence[int | None], ends: Sequence[tuple[int, int]]) -> list[int | None]:
    """For each token the message it is counted to, None for those that open the answer."""
    payers: list[int | None] = []
    place = 0
    for token, owner in zip(tokens, owners, strict=True):
        place = token.first if token.first is not None else place
        payers.append(owner if owner is not None else next((message for end, message in ends if place < end), None))
    return payers


def _costs(
    messages: Sequence[Message],
    owners: Sequence[int | None],
    payers: Sequence[int | None],
    stretches: Sequence[_Stretch],
) -> Iterator[MessageCost]:
    for number, message in enumerate(messages):
        lengths = [stretch.end - stretch.begin for stretch in stretches if stretch.message == number]
        own = sum(owner == number for owner in owners)
        paid = sum(payer == number for payer in payers)
        size = _nbytes(message.text.strip() or message.thinking)
        share = min(1.0, sum(lengths) / size) if size else float(bool(lengths))
        yield MessageCost(number, message.role, message.text, own, paid - own, share)


def _shared(held: Sequence[int], ids: Sequence[int]) -> int:
    """Tokens at the beginning that need no evaluation; the last one always does."""
    count = 0
    for here, wanted in zip(held, ids[:-1], strict=False):
        if here != wanted:
            break
        count += 1
    return count
