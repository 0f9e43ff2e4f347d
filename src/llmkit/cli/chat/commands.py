"""The table of commands: lines that begin with / and are no questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import Unsupported, nearest_hint
from .. import output
from . import answers, archive, branches, choices, context, line, tokens
from .completion import Candidate, matching

if TYPE_CHECKING:
    from .completion import Names
    from .talk import Talk


@dataclass(frozen=True)
class Command:
    """A row of the table. `offer` completes its words; `answers`: the model speaks, so stdout is the answer's."""

    usage: str
    what: str
    run: Callable[[Talk, str], None]
    offer: Callable[[Talk, list[str], str], Names] | None = None
    answers: bool = False


def is_command(text: str, typed: bool) -> bool:
    """Whether a line is a command. Piped text that only begins with / is a question: "/usr/bin/env: what is it?"."""
    word = text.split(maxsplit=1)[0] if text else ""
    return word in COMMANDS or (typed and text.startswith("/"))


def obey(talk: Talk, text: str) -> None:
    """Run a command. Raises Unsupported for one that is not known, and what the command raises."""
    word, rest = (*text.split(maxsplit=1), "")[:2]
    if (command := COMMANDS.get(word)) is None:
        raise Unsupported(f"unknown command '{output.one_line(word, 40)}'", nearest_hint(word, COMMANDS))
    if rest and " " not in command.usage:
        raise Unsupported(f"{word}: nothing is expected after it, found '{output.one_line(rest.strip(), 40)}'")
    with nullcontext() if command.answers else line.aside():
        command.run(talk, rest.strip())


def candidates(talk: Talk, text: str) -> Iterator[Candidate]:
    """What Tab offers for `text`, the line up to the cursor. Questions are not completed."""
    word, blank, rest = text.partition(" ")
    if not text.startswith("/") or "\n" in text:
        return
    if not blank:
        yield from matching(((name, command.what) for name, command in COMMANDS.items()), word)
    elif word in COMMANDS and (offer := COMMANDS[word].offer) is not None:
        before, _, last = rest.rpartition(" ")
        yield from matching(offer(talk, before.split(), last), last)


def show_help(talk: Talk, name: str) -> None:
    """All commands, or more about one."""
    if not name:
        output.table(("command", ""), [(command.usage, command.what) for command in COMMANDS.values()])
        output.emit("Tab completes. Alt-Enter begins a new line. Ctrl-C stops an answer. /help COMMAND tells more.")
        return
    word = name if name.startswith("/") else f"/{name}"
    if word not in COMMANDS:
        raise Unsupported(f"unknown command '{output.one_line(word, 40)}'", nearest_hint(word, COMMANDS))
    command = COMMANDS[word]
    output.emit(f"{command.usage}\n  {command.what}")
    for text in MORE.get(word, ()):
        output.emit(f"  {text}")


def leave(talk: Talk, _: str) -> None:
    """End the conversation."""
    talk.over = True


def several(talk: Talk, word: str) -> None:
    """Switch between one line and several."""
    source = talk.source
    source.several = {"on": True, "off": False}.get(word, not source.several)
    how = "Alt-Enter sends" if isinstance(source, line.Editor) else "a line that is only a dot sends"
    output.note(f"Several lines: Enter begins a new one, {how}." if source.several else "One line is one question.")


def _command_names(_: Talk, __: list[str], ___: str) -> Names:
    return list(COMMANDS)


def _switch(_: Talk, __: list[str], ___: str) -> Names:
    return ["on", "off"]


COMMANDS = {
    # what the model is told
    "/system": Command("/system [NAME|TEXT|off]", "show or change the system prompt", choices.system,
                       choices.systems),
    "/prompts": Command("/prompts [NAME [use]]", "list system prompts, ours and yours; show or use one",
                        choices.prompts, choices.prompt_words),
    "/personas": Command("/personas [NAME]", "list personas; begin anew with one", choices.personas,
                         choices.persona_names),
    "/model": Command("/model [MODEL]", "show the model, or go on with another", choices.model, choices.model_files),
    # how it chooses
    "/set": Command("/set [NAME VALUE]", "show or change sampling, e.g. /set temperature 0.7", choices.set_,
                    choices.setting_words),
    "/samplers": Command("/samplers [order A,B,…|PRESET]", "the samplers in their order, with values; change either",
                         choices.samplers, choices.sampler_words),
    # back, on and sideways
    "/retry": Command("/retry", "answer the last question anew", branches.retry, answers=True),
    "/edit": Command("/edit [TEXT]", "ask the last question in other words", branches.edit, answers=True),
    "/continue": Command("/continue", "let the last answer go on", branches.go_on, answers=True),
    "/undo": Command("/undo", "take the last question and answer back", branches.undo),
    "/branch": Command("/branch [N|new N]", "list branches; go to message N; begin one after it", branches.branch,
                       branches.messages),
    "/tree": Command("/tree", "draw the whole conversation", branches.draw),
    "/instead": Command("/instead N TOKEN", "go on from another token in place of token N", branches.instead,
                        tokens.instead_words, answers=True),
    "/alternatives": Command("/alternatives N [K]", "let the K likeliest tokens in place of token N all go on",
                             branches.alternatives, tokens.numbers, answers=True),
    "/clear": Command("/clear", "begin anew; the system prompt stays", branches.clear),
    # what is inside
    "/context": Command("/context", "how full the context is, and with what", context.show),
    "/tokens": Command("/tokens [TEXT]", "tokens of TEXT, or of the last answer with probabilities", tokens.show),
    "/why": Command("/why N", "why token N of the last answer was said", tokens.why, tokens.numbers),
    "/doubt": Command("/doubt", "what the model was unsure of in its last answer", tokens.doubt),
    "/probabilities": Command("/probabilities [on|off]", "colours and doubtful tokens", answers.probabilities, _switch),
    "/thoughts": Command("/thoughts [on|off]", "show reasoning, or fold it", answers.thoughts, _switch),
    # keeping
    "/save": Command("/save [NAME]", "keep the conversation under a name", archive.save),
    "/load": Command("/load NAME", "go on with a kept conversation, or with a JSON export", archive.load,
                     archive.names),
    "/chats": Command("/chats [WORDS]", "list kept conversations, or search them", archive.chats),
    "/export": Command("/export md|json|html [FILE]", "write the conversation into a file", archive.write,
                       archive.export_words),
    "/receipt": Command("/receipt [N] [FILE]", "the last answer, or message N, for `llmkit replay` to check",
                        archive.receipt),
    # the terminal
    "/multi": Command("/multi [on|off]", "questions of several lines", several, _switch),
    "/help": Command("/help [COMMAND]", "these commands, or more about one", show_help, _command_names),
    "/exit": Command("/exit", "leave", leave),
}  # fmt: skip
MORE = {
    "/branch": (
        "Nothing that was said is lost: /retry, /edit and /instead begin a branch beside the old one.",
        "Tokens that branches share are not read again.",
    ),
    "/instead": (
        "N is the token's number in /tokens; TOKEN is one of its alternatives as shown there, its number (#12), or",
        "any text that is one token of the model. A blank before a word belongs to it: /instead 3 ' Rome'.",
    ),
    "/alternatives": (
        "They go on at once, in one batch on one context, each with its likeliest tokens. Then you may take one: the",
        "answer goes on from its first token, drawn as the samplers are set.",
    ),
    "/set": ("off, or -, as a value switches the setting off, or back to what it is by itself.",),
    "/doubt": ("`llmkit inspect doubt` asks several times and tells how far the answers agree.",),
    "/why": (
        "Raw is the model's own distribution. Sampled is what the samplers left, from which the token was drawn.",
    ),
    "/receipt": ("An HTML page that holds all of it, or JSON for a FILE that ends so; /tree shows the numbers.",),
    "/prompts": ("Your own prompts are files of the folder that the list names.",),
    "/multi": ("A pasted text may have several lines anyway; so may one with Alt-Enter between them.",),
}
