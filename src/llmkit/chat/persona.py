"""Conversations without a template: the transcript of a dialogue, which any model, also a base model, goes on with.

A persona is a text file: the transcript, and perhaps a head above a line `---` that names who speaks:

    user: Visitor
    assistant: Harbour master
    stop: The end.
    ---
    The harbour master knows every ship. …

    Visitor: Good morning!
    Harbour master: Morning. Mind the rope.
    Visitor:

Without a head, the name on an unfinished last line is the user's (llama.cpp calls it the reverse prompt), else who
speaks first; the other one is the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from .. import prompts
from ..errors import LlmkitError, ModelNotFound
from .templates import Message, Prompt

_SPEAKER = re.compile(r"^([^\W\d_][^:\n]{0,39}):(?=[ \t]|$)", re.MULTILINE)
_HEAD = re.compile(r"^(user|assistant|stop|name):[ \t]*(.*)$")


@dataclass(frozen=True)
class Persona:
    """A dialogue to go on with. `opening` is all before the user's first own line; `user` and `assistant` begin theirs.

    An answer ends where the model would speak for the user, or at one of `stop`.
    """

    name: str
    opening: str
    user: str
    assistant: str
    stop: tuple[str, ...]
    text: str  # of its file

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        now: datetime | None = None,
        thinking: bool | None = None,
    ) -> Prompt:
        """The transcript up to where the model is to speak; as ChatTemplate.render. A system prompt stands above it."""
        parts = [self.opening] if self.opening else []
        said = {"user": self.user, "assistant": self.assistant}
        if messages and messages[0].role == "system":
            parts.insert(0, f"{messages[0].text.strip()}\n")
        parts += [f"{said[each.role]} {each.text.strip()}" for each in messages if each.role in said]
        return Prompt("\n".join([*parts, self.assistant] if add_generation_prompt else parts))


def load(name_or_file: str) -> Persona:
    """The persona of that name (prompts/personas, or the user's own), or in that file.

    Raises ModelNotFound, LlmkitError for a file that is none.
    """
    if name_or_file in prompts.persona_names():
        return parse(prompts.persona(name_or_file), name_or_file)
    path = Path(name_or_file)
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise ModelNotFound(f"{path}: there is no such file")
        prompts.persona(name_or_file)  # tells the nearest names
    return parse(prompts.read_text(path), path.stem)


def parse(text: str, name: str) -> Persona:
    """The persona of a file's text. Raises LlmkitError, saying what to write, when nobody can be told to speak."""
    head, body = _split(text)
    found = [match[1] for match in _SPEAKER.finditer(body)]
    user, assistant = head.get("user", [""])[0], head.get("assistant", [""])[0]
    user = user.removesuffix(":") or _user(body, [one for one in found if one != assistant.removesuffix(":")])
    others = Counter(one for one in found if one != user)
    assistant = assistant.removesuffix(":") or (others.most_common(1)[0][0] if others else "")
    if not user or not assistant or user == assistant:
        raise LlmkitError(
            f"persona '{name}': it is not clear who speaks",
            'Begin its lines with "User:" and "Bob:", or put "user: User", "assistant: Bob" and "---" above.',
        )
    opening = body.rstrip()
    opening = opening.removesuffix(f"{user}:").rstrip() if opening.endswith(f"\n{user}:") else opening
    stop = (f"\n{user}:", *head.get("stop", []))
    return Persona(head.get("name", [name])[0], opening, f"{user}:", f"{assistant}:", stop, text)


def _split(text: str) -> tuple[dict[str, list[str]], str]:
    """The head's lines by key, and what follows; no head, no keys."""
    lines = text.replace("\r\n", "\n").lstrip("\ufeff\n").split("\n")
    head: dict[str, list[str]] = {}
    for index, line in enumerate(lines):
        if line.strip() == "---":
            return head, "\n".join(lines[index + 1 :]).lstrip("\n")
        match = _HEAD.match(line)
        if match:
            head.setdefault(match[1], []).append(match[2].strip())
        elif line.strip() and not line.startswith("#"):
            break
    return {}, "\n".join(lines)


def _user(body: str, speakers: Sequence[str]) -> str:
    last = body.rstrip().rpartition("\n")[2]
    match = _SPEAKER.fullmatch(last) if last.endswith(":") else None
    return match[1] if match else next(iter(speakers), "")
