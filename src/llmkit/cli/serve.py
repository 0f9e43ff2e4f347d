"""Serve models over HTTP: OpenAI's routes, tokens, and what happens inside.

Listens on this machine alone unless --host says otherwise; then a key is needed, and made if none is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AccessDenied, LlmkitError
from . import models, output

if TYPE_CHECKING:
    from ..backends import Backend
    from ..server.residents import Models
    from ..server.security import Policy

EXAMPLES = (
    "llmkit serve tiny-Q4_K_M.gguf  # then: curl http://127.0.0.1:8080/v1/models",
    "llmkit serve org/name:Q4_K_M --model small=tiny.gguf --max-models 2",
    "llmkit serve model.gguf --host 0.0.0.0 --api-key-file key.txt",
)
KEPT = "Nothing was being written."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The models, where to listen, who may ask, how much at a time."""
    parser.add_argument("model", metavar="MODEL", help=f"{models.RUN_HELP}; NAME=MODEL gives it a name")
    parser.add_argument(
        "--model", dest="others", action="append", default=[], metavar="NAME=MODEL", help="one more model, by a name"
    )
    parser.add_argument(
        "--max-models", type=_count, default=1, metavar="N", help="models in memory at once (default 1)"
    )
    parser.add_argument(
        "--idle", type=_seconds, metavar="SECONDS", help="unload models nobody has used for so long (default: never)"
    )
    where = parser.add_argument_group("where and who")
    where.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    where.add_argument("--port", type=_port, default=8080, help="0 is any free one (default 8080)")
    where.add_argument("--api-key", action="append", default=[], metavar="KEY", help="a key that may ask; several may")
    where.add_argument("--api-key-file", type=Path, metavar="PATH", help="keys, one a line: not to be seen in `ps`")
    where.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="web pages from there may ask, too"
    )
    where.add_argument(
        "--host-name", action="append", default=[], metavar="NAME", help="a name the server is called by"
    )
    load = parser.add_argument_group("how much")
    load.add_argument("--slots", type=_count, default=4, metavar="N", help="answers written at a time (default 4)")
    load.add_argument("--context", type=_count, metavar="N", help="tokens of all slots together")
    load.add_argument("--queue", type=_count, default=64, metavar="N", help="requests that may wait (default 64)")
    load.add_argument(
        "--timeout", type=_seconds, default=600.0, metavar="SECONDS", help="an answer's longest (default 600)"
    )
    models.add_backend_arguments(parser)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:12]) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:9]) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return found


def run(args: argparse.Namespace) -> int:
    """Load the first model, listen, tell the address; until interrupted."""
    import logging
    import sys

    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s"
    )
    _require_web()
    from ..server import listening
    from ..server.app import app
    from ..server.service import Limits

    policy, made_key = _policy(args)
    resident = _models(args)
    door = listening.bound(args.host, args.port)
    try:
        resident.load(resident.default)
        made = app(resident, policy=policy, limits=Limits(answer_seconds=args.timeout))
        address = listening.address_of(door)
        output.note(f"llmkit serves {', '.join(resident.names)} at {address}")
        if made_key:
            output.note(f"key    {made_key}")
        output.note(f"docs   {address}/docs")
        output.note(f"client OPENAI_BASE_URL={address}/v1 OPENAI_API_KEY={made_key or 'none'}")
        listening.serve(made, door, access_log=args.verbose)
    finally:
        door.close()
        resident.close()
    return 0


def _require_web() -> None:
    import importlib.util

    from ..errors import MissingDependency

    for name in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise MissingDependency(f"the package {name} is not installed", 'pip install "llmkit[web]"')


# ── who may ask ──


def _policy(args: argparse.Namespace) -> tuple[Policy, str | None]:
    """The policy, and the key that was made for it, if one was."""
    import secrets
    import socket

    from ..server.security import Policy, is_loopback

    keys, made = [*filter(None, args.api_key), *_keys(args.api_key_file)], None
    if not keys and not is_loopback(args.host):
        if args.quiet:
            raise LlmkitError(
                f"{args.host} needs a key, and --quiet would not show it", "Give one: --api-key-file PATH"
            )
        made = secrets.token_urlsafe(24)
        keys.append(made)
    for origin in args.cors:
        if not origin.startswith(("http://", "https://")):
            raise LlmkitError(f"--cors {origin}: expected an origin", "Like https://example.org; * is not taken.")
    names = [] if is_loopback(args.host) else [socket.gethostname()]
    return Policy.of(keys, args.cors, [args.host, *names, *args.host_name]), made


def _keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        found = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise AccessDenied(f"{path}: cannot be read: {error}") from error
    if not found:
        raise LlmkitError(f"{path}: holds no key", "Write one into it, one a line.")
    return found


# ── the models ──


def _models(args: argparse.Namespace) -> Models:
    """All of them by name; found, fetched or made now, loaded when wanted."""
    from ..server.residents import Models

    named = dict([_named(args.model)])
    for text in args.others:
        name, model = _named(text)
        if name in named:
            raise LlmkitError(f"two models are named '{name}'", "Give one of them another: --model NAME=MODEL")
        named[name] = model
    openers: Mapping[str, Callable[[], Backend]] = {name: _opener(args, model) for name, model in named.items()}
    return Models(
        openers, most=args.max_models, idle=args.idle, context=args.context, slots=args.slots, queue=args.queue
    )


def _named(text: str) -> tuple[str, str]:
    """The name and the model of NAME=MODEL; without a name that of the file, without its folders."""
    from .. import model

    name, equals, rest = text.partition("=")
    if equals and name and rest and "/" not in name:
        return name, rest
    ref = model.parse(text)
    return (ref.path.stem if ref.path is not None else text), text


def _opener(args: argparse.Namespace, text: str) -> Callable[[], Backend]:
    from ..backends import choice

    path = models.runnable(text, args.backend)
    chosen = choice.choose(path, args.backend)
    layers = args.gpu_layers
    if chosen == choice.LLAMACPP:
        layers = models.gpu_layers(layers, path, args.context)

    def opener() -> Backend:
        from .. import backends, store

        with output.ProgressBar() as bar:
            backend = backends.load(
                path,
                backend=chosen,
                n_threads=args.threads,
                gpu_layers=layers if isinstance(layers, int) else None,
                on_progress=bar,
            )
        store.remember_model(path)
        return backend

    return opener
