"""From the command line's words to a talk: the model loaded, the conversation begun or taken up, the samplers set."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import LlmkitError, Unsupported
from .. import models, output, sampling_arguments
from . import answers, choices
from .keeper import Keeper
from .talk import Talk, WhenFull

if TYPE_CHECKING:
    from ...backends import ModelInfo
    from ...chat import Chat, Sampling
    from ...chat.record import Conversation


def begin(args: argparse.Namespace) -> Talk:
    """Load the model and make the conversation ready. Raises LlmkitError."""
    if args.load and args.persona:
        raise Unsupported("--load and --persona: a kept conversation has its persona already", "Give one of them.")
    keeper = Keeper()
    found = keeper.load(args.load) if args.load else None
    if not args.no_save and args.prompt is None or args.load and not args.no_save:
        keeper.start()
    if not (name := args.model or (found.model if found else "")):
        raise LlmkitError("MODEL is missing", "`llmkit list` shows the models on this machine.")
    loader = Loader(args)
    try:
        chat = loader.chat(name, found)
        chat.sampling = _sampling(args, chat.sampling)
        if args.system:
            chat.system = choices.system_text(args.system)
    except BaseException:
        loader.close()
        raise
    typed = sys.stdin.isatty() and args.prompt is None
    when_full: WhenFull = args.when_full or "ask"
    if when_full == "ask" and not typed:
        when_full = "stop"
    if when_full != "ask":
        chat.overflow = when_full
    return Talk(
        chat, keeper=keeper, show=answers.Show(args.show_probabilities, args.show_thoughts),
        when_full=when_full, typed=typed, loader=loader,
    )  # fmt: skip


def _sampling(args: argparse.Namespace, start: Sampling) -> Sampling:
    """What the options say; a grammar or a schema may be a file's name."""
    for name in ("grammar", "json_schema"):
        if text := getattr(args, f"sampling_{name}"):
            setattr(args, f"sampling_{name}", choices.from_file(name, text))
    return sampling_arguments.sampling(args, start)


class Loader:
    """Makes chats with models by the options of the command line; one at a time is open."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._open = ExitStack()

    def chat(self, name: str, conversation: Conversation | None = None, like: Chat | None = None) -> Chat:
        """A chat with the model `name`, going on with `conversation`; with the settings of the chat `like` it.

        The one that was open before is closed when this one is ready. Raises LlmkitError, and the other stays.
        """
        from ...chat import Chat

        args = self._args
        with ExitStack() as opened:
            backend = opened.enter_context(models.opened(args, name))
            refuse_what_cannot_chat(backend.info)
            persona = _persona(args.persona) if conversation is None and args.persona else None
            chat = Chat(
                backend, context=args.context, persona=persona, conversation=conversation,
                thinking={"on": True, "off": False, None: None}[args.thinking],
                n_alternatives=like.n_alternatives if like else args.n_alternatives,
                overflow=like.overflow if like else "stop",
            )  # fmt: skip
            opened.callback(chat.close)
            chat.conversation.model = _lasting(name)
            before, self._open = self._open, opened.pop_all()
        before.close()
        return chat

    def close(self) -> None:
        """Free chat and model."""
        self._open.close()


def _persona(name: str) -> Any:
    from ...chat import persona

    return persona.load(name)


def _lasting(name: str) -> str:
    """What the user called a model, so that it is found from another folder too."""
    try:
        return str(Path(name).absolute()) if Path(name).exists() else name
    except (OSError, ValueError):
        return name


def refuse_what_cannot_chat(info: ModelInfo) -> None:
    """Raises Unsupported for a model that makes vectors, not text."""
    if info.generates and info.pooling is None:
        return
    can = "it makes a vector of a text" + ("" if info.generates else " and cannot continue one")
    raise Unsupported(
        f"{info.name} ({info.architecture}) is an embedding model: {can}",
        "Its vectors: llmkit inspect embeddings --help. To chat, take a model whose name says Instruct or Chat.",
    )


def tell_about(chat: Chat) -> None:
    """What has been loaded, on stderr, and what is unusual about it."""
    info = chat.backend.info
    name = output.one_line(info.name)
    output.note(answers.dim(f"{name}: {info.n_params / 1e6:,.0f} M parameters, {output.size(info.weight_nbytes)}"))
    if chat.template.name == "plain":
        output.note("The file has no chat template: questions are put as a plain dialogue (User: … Assistant: …).")
        output.note("A base model goes on with texts: --persona bob gives it a dialogue to go on with.")
    if chat.total > info.n_ctx_train > 0:
        output.note(
            f"The model was trained on {info.n_ctx_train} tokens of context; beyond them it may lose the thread."
        )
