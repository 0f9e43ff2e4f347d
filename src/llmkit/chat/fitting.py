"""From messages to the tokens of a prompt that fits: template, tokenizer, and what must leave when it is too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from ..errors import LlmkitError
from . import overflow as policies
from .answer import Dropped, Turn
from .context import Context
from .generation import Generation
from .overflow import ContextFull, Overflow
from .persona import Persona
from .reasoning import Form, Reading, opened
from .record import message
from .sampler_settings import Sampling
from .sampling import Sampler
from .templates import ChatTemplate, Message, Prompt
from .tree import Node


@dataclass(frozen=True)
class Prepared:
    """A prompt that fits. `tail`: tokens of its answer that are there already; `form`: the block the prompt opens.

    `text` is what the template made, "" where the tokens are an earlier answer's own.
    """

    prompt: tuple[int, ...]
    tail: tuple[int, ...] = ()
    merged_system: bool = False
    form: Form | None = None
    text: str = ""
    dropped: Dropped | None = None
    began: float = field(default_factory=perf_counter)

    @property
    def tokens(self) -> list[int]:
        """All that is to be evaluated."""
        return [*self.prompt, *self.tail]


@dataclass(frozen=True)
class Wanted:
    """What a prompt is to be made of, and how: nodes of the path still there, and the settings."""

    nodes: Sequence[Node]
    summary: str | None
    system: str | None
    policy: Overflow
    max_tokens: int | None = None
    thinking: bool | None = None
    tail: tuple[int, ...] = ()


class Fitting:
    """Prompts for one context, in one template. `bos`: how the beginning-of-text token is written, "" for none."""

    def __init__(self, context: Context, template: ChatTemplate | Persona, bos: str) -> None:
        self.context = context
        self.template = template
        self._bos = bos
        self._known: tuple[object, int] | None = None

    def encode(self, text: str) -> list[int]:
        """The tokens of a rendered prompt. A beginning-of-text token that the template writes is not added again."""
        special = isinstance(self.template, ChatTemplate)  # a transcript spells out no special tokens
        written = special and bool(self._bos) and text.startswith(self._bos)
        return self.context.backend.encode(text, special=special, bos=not written)

    def length(self, messages: Sequence[Message], thinking: bool | None) -> int:
        """Tokens of a conversation as it stands, without the beginning of a next answer. The last result is kept."""
        key = (tuple(messages), thinking)
        if self._known is None or self._known[0] != key:
            try:
                text = self.template.render(messages, add_generation_prompt=False, thinking=thinking).text
            except LlmkitError:
                text = self.template.render(messages, thinking=thinking).text
            self._known = key, len(self.encode(text))
        return self._known[1]

    def prepare(self, wanted: Wanted) -> Prepared:
        """The prompt, after what must leave for it has left. A summary is written by the model, in this context.

        Raises ContextFull before anything is evaluated, EngineError.
        """
        began, total, tail = perf_counter(), self.context.size, len(wanted.tail)
        grouped, summary = policies.turns(wanted.nodes), wanted.summary
        prompt, tokens = self._render(wanted, grouped, summary)
        needed, most = len(tokens) + tail, len(grouped) - 1
        stop = wanted.policy == "stop" or most < 1
        if needed + (1 if stop else policies.least_room(total, wanted.max_tokens)) <= total:
            return self._prepared(wanted, prompt, tokens, None, began)
        if stop:
            raise ContextFull(needed, total, policies.POLICIES[1:] if most > 0 else ())
        summarise = wanted.policy == "summarise"
        extra = tail + (policies.summary_room(total) + len(self.encode(policies.MARK)) if summarise else 0)
        count = policies.drop_count(most, lambda k: len(self._render(wanted, grouped[k:], summary)[1]) + extra, total)
        least = len(self._render(wanted, grouped[count:], summary)[1]) + tail
        if least >= total:
            raise ContextFull(least, total)
        written = self._summarised(wanted, grouped[:count]) if summarise else None
        prompt, tokens = self._render(wanted, grouped[count:], written or summary)
        if len(tokens) + tail >= total:
            raise ContextFull(len(tokens) + tail, total, ("slide",))
        gone = tuple(node.id for turn in grouped[:count] for node in turn)
        dropped = Dropped(gone, needed - len(tokens) - tail, written)
        return self._prepared(wanted, prompt, tokens, dropped, began)

    def _prepared(
        self, wanted: Wanted, prompt: Prompt, tokens: Sequence[int], dropped: Dropped | None, began: float
    ) -> Prepared:
        form = opened(prompt.text)
        return Prepared(tuple(tokens), wanted.tail, prompt.merged_system, form, prompt.text, dropped, began)

    def _render(
        self, wanted: Wanted, turns: Sequence[Sequence[Node]], summary: str | None, ask: str = ""
    ) -> tuple[Prompt, list[int]]:
        messages = [message(node) for turn in turns for node in turn]
        messages += [Message("user", ask)] if ask else []
        thinking = False if ask else wanted.thinking
        prompt = self.template.render(with_system(wanted.system, summary, messages), thinking=thinking)
        return prompt, self.encode(prompt.text)

    def _summarised(self, wanted: Wanted, turns: Sequence[Sequence[Node]]) -> str | None:
        """What the model writes of these turns, and of the summary before them; None if nothing.

        As many at a time as the context holds with the request. Raises ContextFull when that is none.
        """
        total, found, rest = self.context.size, None, list(turns)
        ask, most = policies.request(total), total - policies.summary_room(total)
        while rest:
            count = len(rest)
            summary = found or wanted.summary
            prompt, tokens = self._render(wanted, rest, summary, ask)
            while len(tokens) > most:
                if (count := count - 1) < 1:
                    raise ContextFull(len(tokens), total, ("slide",))
                prompt, tokens = self._render(wanted, rest[:count], summary, ask)
            found = self._written(prompt, tokens) or found
            del rest[:count]
        return found

    def _written(self, prompt: Prompt, tokens: list[int]) -> str:
        """The model's likeliest answer, as long as a summary may be."""
        sampling = Sampling(temperature=0, max_tokens=policies.summary_room(self.context.size))
        sampler = Sampler(sampling, backend=self.context.backend, seed=0)
        reading = Reading(self.template.stop, opened(prompt.text))
        reused, logits = self.context.fill(tokens)
        generation = Generation(self.context, sampler, reading, Turn(0, len(tokens), reused, False), list(tokens))
        for _ in generation.run(logits):
            pass
        return reading.text.strip()


def with_system(system: str | None, summary: str | None, messages: Sequence[Message]) -> list[Message]:
    """The messages, after the system prompt and the summary if there is one, unless they bring a system message."""
    text = policies.system_with(system, summary)
    if not text or (messages and messages[0].role == "system"):
        return list(messages)
    return [Message("system", text), *messages]
