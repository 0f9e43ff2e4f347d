"""The frame of the command line: finds the verb, runs it, turns errors into exit codes.

A verb is a module of this package with a docstring (its first line is the help), `add_arguments(parser)`,
`run(args) -> int`, and EXAMPLES; KEPT, if there, says what an interruption leaves behind. Only the module of
the chosen verb is imported, so that `llmkit --help` answers at once. A verb that is a package may have TOPICS, a
table as VERBS: `llmkit inspect tokens …` runs the module `inspect.tokens`, made like a verb's.

Exit codes: 0 done, 1 an LlmkitError (or a bug, with its traceback), 2 usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from .. import __version__

# verb = module of this package → its one line of help, which is the first line of the module's docstring
VERBS = {
    "search": "Find models on the Hub, with their size at Q4_K_M.",
    "download": "Fetch a model from the Hub: only what is needed, several files at once, each one verified.",
    "list": "Show the models on this machine: size, quant, when used.",
    "rm": "Delete models from this machine, after asking.",
    "convert": "Write a checkpoint as a GGUF, weights as they are or in F16, F32 or Q8_0.",
    "quantize": "Write a checkpoint or a GGUF in one or several quants, in one pass.",
    "chat": "Talk with a model in the terminal.",
    "chats": "List the conversations that were kept, search them, delete one.",
    "serve": "Serve models over HTTP: OpenAI's routes, tokens, and what happens inside.",
    "estimate": "Tell what a model takes in memory, to the byte, before it is made or fetched.",
    "devices": "Show devices: memory, bandwidth, TOPS and what they mean; compare them for a model.",
    "inspect": "Show what a GGUF file holds: metadata, tokenizer, tensors by type.",
    "compare": "Compare two quants of a model on a prompt: KL by token, where they part, which layers drift.",
    "replay": "Have an answer again from its receipt, token by token, or see where and why it differs.",
    "explain": "Explain a term in three plain sentences, with a number from your own model.",
    "upload": "Send GGUF files to a repository of the Hub, with a model card that is measured on them.",
    "doctor": "Check the engine, this machine and the Python packages.",
    "demo": "See the whole of llmkit at work on a small model.",
}

DESCRIPTION = "Make language models smaller, run them, and look inside."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # before a verb had begun
        return 130


def _main(words: list[str]) -> int:
    _prepare_streams()
    start = next((index for index, word in enumerate(words) if not word.startswith("-")), len(words))
    try:
        options = _frame().parse_args(words[:start])
        if start == len(words):
            _frame().print_help(sys.stderr)
            return 2
        if words[start] not in VERBS:
            return _unknown_verb(words[start])
        name, module, rest = chosen(words[start:])
        args = _verb_parser(name, module).parse_args(rest, options)
    except SystemExit as exit:  # argparse has said what there was to say
        return exit.code if isinstance(exit.code, int) else 2
    return _run(module, args)


def chosen(words: Sequence[str]) -> tuple[str, ModuleType, list[str]]:
    """What `words` ask for, of which the first is a verb: its name ("inspect tokens"), its module, the other words."""
    name, rest = words[0], list(words[1:])
    module = _load(name)
    if rest and rest[0] in getattr(module, "TOPICS", {}):
        name = f"{name} {rest.pop(0)}"
        module = _load(name.replace(" ", "."))
    return name, module, rest


def _prepare_streams() -> None:
    """A closed stream becomes an empty one; text the terminal's encoding lacks, or input that is none, is no error."""
    for name, errors in (("stdin", "replace"), ("stdout", "backslashreplace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def _frame() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmkit",
        usage="llmkit VERB MODEL [options]",
        description=DESCRIPTION,
        epilog=f"verbs:\n{_listed(VERBS)}\n\n`llmkit VERB --help` tells more, with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llmkit {__version__}")
    _add_shared(parser, verbose=False, quiet=False)
    return parser


def _listed(names: Mapping[str, str]) -> str:
    width = max(10, *map(len, names))
    return "\n".join(f"  {name:<{width}} {line}" for name, line in names.items())


def _verb_parser(verb: str, module: ModuleType) -> argparse.ArgumentParser:
    examples: tuple[str, ...] = module.EXAMPLES
    topics: Mapping[str, str] = getattr(module, "TOPICS", {})
    listed = f"topics:\n{_listed(topics)}\n\n`llmkit {verb} TOPIC --help` tells more.\n\n" if topics else ""
    parser = argparse.ArgumentParser(
        prog=f"llmkit {verb}",
        description=module.__doc__,
        epilog=listed + "\n".join(("examples:", *(f"  {example}" for example in examples))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    _add_shared(parser, verbose=argparse.SUPPRESS, quiet=argparse.SUPPRESS)
    return parser


def _add_shared(parser: argparse.ArgumentParser, *, verbose: bool | str, quiet: bool | str) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", default=verbose, help="show the engine's log on stderr")
    parser.add_argument("-q", "--quiet", action="store_true", default=quiet, help="no notes, no progress bars")


def _load(verb: str) -> ModuleType:
    import importlib

    return importlib.import_module(f"{__package__}.{verb}")


def _unknown_verb(word: str) -> int:
    from ..errors import nearest_hint
    from . import output

    output.error(f"unknown verb '{word}'", nearest_hint(word, VERBS))
    return 2


def _run(module: ModuleType, args: argparse.Namespace) -> int:
    from .. import settings
    from ..errors import LlmkitError
    from . import output

    output.be_quiet(args.quiet)
    if args.verbose:
        from .. import engine

        engine.show_log()
    try:
        code: int = module.run(args)
        sys.stdout.flush()  # so that a broken pipe shows here
        return code
    except LlmkitError as error:
        if settings.debug():
            import traceback

            traceback.print_exc()
        output.error(error.message, error.hint)
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted. {getattr(module, 'KEPT', 'Nothing was written.')}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has all it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as bug:
        import traceback

        traceback.print_exc()
        output.error(f"a bug in llmkit {__version__}: {type(bug).__name__}", "Please report it with the lines above.")
        return 1
