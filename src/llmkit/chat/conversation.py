"""Talking with a model: a conversation, and the answers as iterators of Steps, one for each token.

    chat = Chat(backend, system="Be brief.")
    for step in chat.say("Where is Paris?"):
        print(step.text, end="")

What the context already holds is not evaluated again (`chat.turn.reused` of `chat.turn.prompt` tokens): the prompt is
what template and tokenizer make of the messages, compared with the tokens really there. Nothing is ever cut silently
(overflow.py). Closing the iterator keeps the partial answer. One thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from time import perf_counter

from ..backends import Backend
from ..errors import LlmkitError
from . import overflow as policies
from .answer import Answer, Calls, Dropped, Step, Turn
from .context import Context, check_writes, usual_context
from .fitting import Fitting, Prepared, Wanted, with_system
from .generation import Generation, before_stop, likeliest
from .overflow import ContextFull, Overflow
from .persona import Persona, parse
from .reasoning import Reading, prefilled
from .record import Conversation, message
from .sampler_settings import Sampling
from .sampling import Sampler, fresh_seed
from .start import PENDING, Start, as_it_was, form_of, is_of, reread, variation, written
from .streams import whole
from .templates import ChatTemplate, Message, Prompt
from .tree import Node, Tree


class Chat:
    """A conversation, the model it is held with, and its context. `turn` tells of the last answer, None before it.

    `conversation` is all that is kept of it: tree, answers, settings; it outlives model and engine. Raises
    InvalidModel for a broken chat template, Unsupported for a model that cannot talk, EngineError when the context
    does not fit into memory.
    """

    def __init__(  # noqa: PLR0913  # keywords with defaults
        self,
        backend: Backend,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        context: int | None = None,
        stop: Sequence[str] = (),
        n_alternatives: int = 5,
        persona: Persona | None = None,
        overflow: Overflow = "stop",
        thinking: bool | None = None,
        conversation: Conversation | None = None,
    ) -> None:
        check_writes(backend)
        self.backend = backend
        self.conversation = conversation or Conversation(model=backend.info.name)
        if system is not None:
            self.system = system
        if sampling is not None:
            self.sampling = sampling
        if persona is not None:
            self.conversation.persona = persona.text
        self.n_alternatives = n_alternatives
        self.overflow: Overflow = policies.checked(overflow)
        self.thinking = thinking
        self._stop = tuple(stop)
        self._generation: Generation | None = None
        self._at: tuple[int | None, int] = None, 0  # the node whose answer the context ends with, if not filled since
        self._context = Context(backend, context or usual_context(backend))
        self._take_template(self.conversation.persona)

    def _take_template(self, text: str | None) -> None:
        """The model's own, or that of the persona with this text."""
        info = self.backend.info
        bos, eos = (_written(self.backend, token) for token in (info.bos, info.eos_token))
        self.template: ChatTemplate | Persona = (
            ChatTemplate(info.chat_template, bos=bos, eos=eos) if text is None else parse(text, "persona")
        )
        self.stop = (*self.template.stop, *self._stop)
        self._form = form_of(self.template, info.chat_template)
        self._fitting = Fitting(self._context, self.template, bos)

    # ── what there is ──

    @property
    def tree(self) -> Tree:
        """All messages."""
        return self.conversation.tree

    @property
    def answers(self) -> dict[int, Answer]:
        """Answers by the id of their node, once they have ended or been stopped."""
        return self.conversation.answers

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self.conversation.system

    @system.setter
    def system(self, text: str | None) -> None:
        self.conversation.system = None if text is None else whole(text)

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen, from the next answer on."""
        return self.conversation.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self.conversation.sampling = sampling

    @property
    def messages(self) -> list[Message]:
        """What was said, from the first question to the head of the tree."""
        return [message(node) for node in self.tree.path()]

    @property
    def in_context(self) -> list[Message]:
        """What of it the model is given: without what was dropped, with the system prompt and the summary, if any."""
        nodes, summary = self.conversation.in_context(self.tree.path())
        return with_system(self.system, summary, [message(node) for node in nodes])

    @property
    def turn(self) -> Turn | None:
        """Figures of the last answer, also while it comes."""
        return self._generation.now() if self._generation else None

    @property
    def used(self) -> int:
        """Tokens the conversation takes in the context.

        After an answer those really in the engine; where the head has been moved since, or nothing has been evaluated
        yet, those the template and the tokenizer make of it.
        """
        if self.tree.head is None:
            return 0
        if self._at == (self.tree.head, self._context.fills):
            return self._context.n
        return self._fitting.length(self.in_context, self.thinking)

    @property
    def total(self) -> int:
        """Tokens that fit into the context."""
        return self._context.size

    @property
    def held(self) -> tuple[int, ...]:
        """The tokens in the engine now, of this conversation or of what was before it."""
        return self._context.held

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The text of messages, up to where the model answers; the system prompt in front unless they bring one."""
        return self.template.render(with_system(self.system, None, messages), thinking=self.thinking)

    def prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Its tokens: exactly what an answer to `messages` would begin with."""
        return self._fitting.encode(self.prompt(messages).text)

    def cost(self, messages: Sequence[Message]) -> int:
        """How many they are."""
        return len(self.prompt_tokens(messages))

    # ── answers ──

    def say(self, text: str) -> Generator[Step, None, None]:
        """Ask, and iterate over the answer. The question is kept when an answer has begun, with what came of it.

        Raises ContextFull, with nothing changed, when it does not fit; LlmkitError for an empty question, EngineError
        from the engine.
        """
        yield from self._ask(self.tree.head, text)

    def edit(self, text: str, node: int | None = None) -> Generator[Step, None, None]:
        """Put a question differently: a sibling of `node`, else of the last question. Errors as `say`."""
        yield from self._ask(self.tree.question(node).parent, text)

    def retry(self) -> Generator[Step, None, None]:
        """Answer the last question once more: a sibling of the last answer, with other random numbers.

        Raises LlmkitError when there is no question, ContextFull, EngineError.
        """
        path = self.tree.path(self.tree.question().id)
        yield from self._answer(self._fresh(path), path[-1].id)

    def go_on(self) -> Generator[Step, None, None]:
        """Continue the last answer from where it ended, on the very tokens it has; yields only the new steps.

        With unchanged sampling it becomes what it would have been without the break. An answer that the model had
        ended goes on with the likeliest token that does not end it. Raises LlmkitError when there is none to
        continue, ContextFull, EngineError.
        """
        node = self.tree.answer(self.tree.head)
        answer = self.answers.get(node.id)
        if answer is not None and answer.steps and is_of(self.backend, answer):
            start = self._continued(answer)
        else:
            start = self._reread(node)
        yield from self._answer(start, node.parent, node)

    def instead(self, node: int, position: int, token: int | None = None) -> Generator[Step, None, None]:
        """The answer `node` up to step `position`, then `token`, then as the model goes on: a sibling of it.

        All else being equal: its random numbers are that answer's. None draws that token, and all after it, anew.
        Yields the steps from `position` on. Raises LlmkitError for unknown nodes, positions and tokens.
        """
        found = self.tree.answer(node)
        answer = self.answers.get(node)
        if answer is None or not is_of(self.backend, answer):
            given = f"was given by {answer.model}" if answer else "has no tokens kept"
            raise LlmkitError(f"message {node} {given}", "Only an answer of the loaded model can go on from a token.")
        if not 0 <= position < len(answer.steps):
            raise LlmkitError(f"position {position}: answer {node} has tokens 0 to {len(answer.steps) - 1}")
        if token is not None and not 0 <= token < self.backend.info.n_vocab:
            raise LlmkitError(f"token {token}: the model has tokens 0 to {self.backend.info.n_vocab - 1}")
        prepared = as_it_was(self.backend, answer, position)
        if len(prepared.tokens) >= self.total:
            raise ContextFull(len(prepared.tokens), self.total)
        steps = answer.steps[:position]
        if token is None:
            start = Start(prepared, self._seeded(), variation(self.tree, self.tree.path(found.parent)), steps, position)
        else:
            sampling = self._seeded(answer.sampling.seed)
            start = Start(prepared, sampling, answer.variation, steps, position + 1, token)
        yield from self._answer(start, found.parent)

    def write_down(self) -> None:
        """Write what has come of the answer so far into the tree, while it comes: its end does so anyway."""
        if self._generation is not None and self.tree.head is not None:
            reading = self._generation.reading
            self.tree.write(self.tree.head, reading.text, reading.thinking)

    # ── moving in the tree ──

    def undo(self) -> str:
        """Go back to before the last question, and return it. What was said stays in the tree.

        Raises LlmkitError when there is no question.
        """
        question = self.tree.question()
        self.tree.head = question.parent
        return question.text

    def switch(self, node: int) -> None:
        """Stand at `node`: what is said next follows it. Raises LlmkitError when there is no such node."""
        self.tree.head = self.tree.node(node).id

    def clear(self) -> None:
        """Begin a new conversation: nothing said, nothing kept; system prompt and sampling stay."""
        old = self.conversation
        self.resume(Conversation(system=old.system, sampling=old.sampling, model=old.model, persona=old.persona))

    def resume(self, conversation: Conversation) -> None:
        """Go on with another conversation. What of it is in the context already is not evaluated again."""
        self._take_template(conversation.persona)
        self.conversation = conversation
        self._generation, self._at = None, (None, 0)

    def change(self, backend: Backend, context: int | None = None) -> None:
        """Go on with another model, which reads the conversation anew. Errors as for a new Chat; nothing changes then.

        The old model stays loaded: it is its owner's to close.
        """
        check_writes(backend)
        before, self.backend = self.backend, backend
        try:
            self._take_template(self.conversation.persona)
            new = Context(backend, context or usual_context(backend, self.total))
        except LlmkitError:
            self.backend = before
            self._take_template(self.conversation.persona)
            raise
        self._context.close()
        self._context = new
        self._take_template(self.conversation.persona)

    def close(self) -> None:
        """Free the context (the backend and the conversation stay)."""
        self._context.close()

    # ── how an answer comes about ──

    def _ask(self, parent: int | None, text: str) -> Generator[Step, None, None]:
        text = whole(text)
        if not text.strip():
            raise LlmkitError("the question is empty", "Write what you want to know.")
        if parent is not None and self.tree.node(parent).role == "user":
            raise LlmkitError(f"message {parent} is a question that waits for its answer", "/retry answers it.")
        path = [*(self.tree.path(parent) if parent is not None else []), Node(PENDING, parent, "user", text, 0.0)]
        yield from self._answer(self._fresh(path), parent, question=text)

    def _fresh(self, path: list[Node]) -> Start:
        """A new answer to the question at the end of `path`."""
        return Start(self._prepare(path), self._seeded(), variation(self.tree, path))

    def _prepare(self, path: list[Node], tail: tuple[int, ...] = ()) -> Prepared:
        """The prompt for the answer that follows `path`, or ends it and has begun with `tail`."""
        nodes, summary = self.conversation.in_context(path)
        nodes = nodes[:-1] if nodes[-1].role == "assistant" else nodes
        wanted = Wanted(nodes, summary, self.system, self.overflow, self.sampling.max_tokens, self.thinking, tail)
        return self._fitting.prepare(wanted)

    def _continued(self, answer: Answer) -> Start:
        """What it takes to go on with an answer, on its own tokens."""
        count, not_first = len(answer.steps), frozenset[int]()
        if answer.finish in ("end", "stop"):
            count = min(count - 1, before_stop(answer.steps, self.stop))
            not_first = self.backend.info.eos | {answer.steps[count].id}
        steps = [replace(step, finish=None) for step in answer.steps[:count]]
        sampling = self._seeded(answer.sampling.seed)
        same = replace(sampling, max_tokens=None) == replace(answer.sampling, max_tokens=None)
        prepared = as_it_was(self.backend, answer, count)
        if len(prepared.tokens) >= self.total:
            prepared, same = self._prepare(self.tree.path(answer.node), prepared.tail), False
        given = answer.given if same and not not_first else count + bool(not_first)
        return Start(prepared, sampling, answer.variation, tuple(steps), given, None, not_first)

    def _reread(self, node: Node) -> Start:
        """To go on with an answer whose tokens were not kept, or are another model's: those this one would write."""
        path = self.tree.path(node.id)
        prepared, tail = self._prepare(path), tuple[int, ...]()
        for _ in range(2):  # once more when the answer does not fit after its prompt
            tokens = self._fitting.encode(prefilled(prepared.text, node.thinking, node.text))
            count = len(prepared.prompt)
            if tuple(tokens[:count]) != prepared.prompt:  # a token reaches over the border
                tokens[:] = [*prepared.prompt, *self.backend.encode(prefilled("", node.thinking, node.text))]
            tail = tuple(tokens[count:])
            if len(tokens) < self.total:
                break
            prepared = self._prepare(path, tail)
        steps = written(self.backend, tail, Reading(self.stop, prepared.form))
        return Start(replace(prepared, tail=tail), self._seeded(), len(path) - 1, steps, len(steps))

    def _answer(
        self, start: Start, parent: int | None, node: Node | None = None, question: str | None = None
    ) -> Generator[Step, None, None]:
        """Evaluate the prompt and generate. The tree changes once there is a first token, not before."""
        prepared, seed = start.prepared, start.sampling.seed or 0
        sampler = Sampler(start.sampling, backend=self.backend, seed=seed, turn=start.variation)
        try:
            for step in start.steps:
                sampler.accept(step.id, step.sampled_probability)
            reading = reread(start.steps, Reading(self.stop, prepared.form))
            began = perf_counter()
            reused, logits = self._context.fill(prepared.tokens)
            taken, calls = 1000 * (perf_counter() - began), self._context.calls
            turn = Turn(seed, len(prepared.tokens), reused, prepared.merged_system, taken, dropped=prepared.dropped)
            generation = Generation(
                self._context, sampler, reading, turn, prepared.tokens, list(start.steps),
                self.n_alternatives, prepared.began,
            )  # fmt: skip
            steps = generation.run(logits, likeliest(logits, start.not_first) if start.not_first else start.first)
            first = next(steps)
            if question is not None:
                parent = self.tree.add(parent, "user", question).id
            node = node or self.tree.add(parent, "assistant", "")
            self._note(prepared.dropped, node.id if start.steps else parent)
            self.tree.head, self._generation = node.id, generation
            try:
                yield first
                yield from steps
            finally:
                self._keep(node.id, start, generation, calls)
        finally:
            sampler.close()

    def _keep(self, node: int, start: Start, generation: Generation, calls: Calls) -> None:
        """Write what came into the tree, and the answer with all its steps."""
        info, turn = self.backend.info, generation.now()
        self.tree.write(node, generation.reading.text, generation.reading.thinking)
        self.conversation.changed = time.time()
        self._at = node, self._context.fills
        self.answers[node] = Answer(
            node, start.prepared.prompt, turn.reused, start.sampling, tuple(generation.steps), turn,
            info.engine, info.name, self._form, start.variation, start.given, calls,
        )  # fmt: skip

    def _note(self, dropped: Dropped | None, node: int | None) -> None:
        if dropped is None or node is None:
            return
        before = self.conversation.dropped.get(node)
        nodes = (*before.nodes, *dropped.nodes) if before else dropped.nodes
        summary = dropped.summary or (before.summary if before else None)
        self.conversation.dropped[node] = replace(dropped, nodes=nodes, summary=summary)

    def _seeded(self, otherwise: int | None = None) -> Sampling:
        """The sampling with a seed: its own, else `otherwise`, else a fresh one."""
        if self.sampling.seed is not None:
            return self.sampling
        return replace(self.sampling, seed=fresh_seed() if otherwise is None else otherwise)


def _written(backend: Backend, token: int | None) -> str:
    """How a special token is spelled; "" for none."""
    return "" if token is None else backend.piece(token).decode("utf-8", "replace")
