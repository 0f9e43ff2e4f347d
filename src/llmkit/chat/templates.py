"""Chat templates: messages become the text a model was trained on, by the Jinja template in its file.

Rendered as transformers renders them (same environment, filters and functions), in Jinja's sandbox: a template comes
from a file somebody else made. What had to be changed is told as a value. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..errors import InvalidModel, LlmkitError

if TYPE_CHECKING:
    import jinja2

# for files without a template: base models continue a written dialogue
PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content | trim }}\n\n"
    "{% elif message.role == 'user' %}User: {{ message.content | trim }}\n"
    "{% else %}Assistant: {{ message.content | trim }}\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_STOP = ("\nUser:",)


_SENTINEL = "\ue000system\ue001"  # private use: in no question


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `role` is "system", "user" or "assistant"; "tool" where the template knows tools.

    `thinking` is handed to the template beside the text: templates leave that of earlier turns out, each in its way.
    `others`: what else it is given of the message, as transformers names it: tool_calls, tool_call_id, name.
    """

    role: str
    text: str
    thinking: str = ""
    others: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation. `merged_system`: the template knows no system role, the first question carries it."""

    text: str
    merged_system: bool = False


class ChatTemplate:
    """A compiled template. `name` is "model" for the file's own, "plain" for our stand-in with its `stop` strings.

    Raises InvalidModel when the file's template is not Jinja, with the line.
    """

    def __init__(self, source: str | None, *, bos: str = "", eos: str = "") -> None:
        self.name = "plain" if source is None else "model"
        self.stop = PLAIN_STOP if source is None else ()
        self._special = {"bos_token": bos, "eos_token": eos}
        self._template = _compile(PLAIN if source is None else source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        now: datetime | None = None,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        """The text of the conversation, up to where the model is to answer. `now` is the date templates may write.

        `thinking` asks templates of reasoning models that know a switch for it to open with a block, or not to.
        `tools`: functions that may be called, as OpenAI describes them. Raises LlmkitError with the template's line
        when it fails or refuses.
        """
        given = {"add_generation_prompt": add_generation_prompt, "tools": tools or None}
        given |= {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        try:
            text = self._render(messages, now, given)
        except LlmkitError:
            if not _mergeable(messages):
                raise
            text = None
        if text is not None and (not _mergeable(messages) or self._shows_system(messages, now, given)):
            return Prompt(text)
        return Prompt(self._render(_merged(messages), now, given), merged_system=True)

    def _shows_system(self, messages: Sequence[Message], now: datetime | None, given: Mapping[str, Any]) -> bool:
        """Whether the template writes a system message at all: one that nothing else can contain is looked for."""
        marked = [replace(messages[0], text=_SENTINEL), *messages[1:]]
        return _SENTINEL in self._render(marked, now, {**given, "add_generation_prompt": False})

    def _render(self, messages: Sequence[Message], now: datetime | None, given: Mapping[str, Any]) -> str:
        import jinja2

        def strftime_now(form: str) -> str:
            return (now or datetime.now()).strftime(form)

        try:
            return self._template.render(
                messages=[_as_given(message) for message in messages],
                documents=None,
                strftime_now=strftime_now,
                **given,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise LlmkitError(
                f"the model's chat template fails at line {_line(error)}: {error}",
                "It may not allow this order of messages; /clear begins anew.",
            ) from error
        except (RecursionError, MemoryError) as error:
            raise InvalidModel(f"the model's chat template does not end: {type(error).__name__}") from error
        except RuntimeError as error:
            raise LlmkitError(f"the model's chat template fails at line {_line(error)}: {error}") from error


def _as_given(message: Message) -> dict[str, Any]:
    """By the names templates look for: `reasoning_content` (Qwen3, GLM), `reasoning` (Solar), `thinking` (gpt-oss)."""
    given = {"role": message.role, "content": message.text, **message.others}
    names = ("reasoning_content", "reasoning", "thinking") if message.thinking else ()
    return given | dict.fromkeys(names, message.thinking)


def _mergeable(messages: Sequence[Message]) -> bool:
    roles = [message.role for message in messages]
    return bool(roles) and roles[0] == "system" and "user" in roles and bool(messages[0].text.strip())


def _merged(messages: Sequence[Message]) -> list[Message]:
    """The system message put in front of the first question."""
    system, *others = messages
    first = next(index for index, message in enumerate(others) if message.role == "user")
    others[first] = replace(others[first], text=f"{system.text}\n\n{others[first].text}")
    return others


def _line(error: BaseException) -> int | str:
    """The template's line an error came from; Jinja puts it into the traceback."""
    found: int | str = getattr(error, "lineno", None) or "?"
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            found = trace.tb_lineno
        trace = trace.tb_next
    return found


def _compile(source: str) -> jinja2.Template:
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InvalidModel(f"the model's chat template is broken at line {error.lineno}: {error.message}") from error
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        # Jinja writes Python, which has limits of its own
        raise InvalidModel(f"the model's chat template cannot be compiled: {type(error).__name__}: {error}") from error


def _environment() -> jinja2.Environment:
    """As in transformers/utils/chat_template_utils.py."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block {% generation %}, which marks the model's words for training; here only its content counts."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            """Return the block's body."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["dict"] = new_dict  # not the class: templates have no business with its attributes
    return environment
