"""Work in a child process: what the engine may crash at cannot take the caller down.

The function's name and arguments go in as JSON, its result comes back as JSON. The child's stdout belongs to the
result alone: whatever the engine prints goes to stderr, whose last lines tell why a child died.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from .. import errors
from ..errors import EngineError, LlmkitError

# The child gets the caller's import path, so that it finds the same llmkit, installed or not.
_BOOT = "import sys; sys.path[:] = sys.argv.pop().split(chr(10)); from llmkit.engine.child import main; main()"


class EngineDied(EngineError):
    """A child process crashed, hung or fell over, where EngineError itself is the engine's refusal."""


def run_in_child(*, function: str, arguments: Mapping[str, Any], timeout: float) -> Any:
    """Call `function` ("package.module:name") with keyword `arguments` in a fresh interpreter; return its result.

    Arguments and result are JSON. An LlmkitError raised there is raised here, as the same class. Raises EngineDied
    (an EngineError) when the child dies of a signal, takes longer than `timeout` seconds, or fails otherwise.
    """
    request = json.dumps({"function": function, "arguments": dict(arguments)})
    command = [sys.executable, "-c", _BOOT, "\n".join(sys.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            out, err = process.communicate(request.encode(), timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            _, err = process.communicate()
            raise EngineDied(f"{function}: no answer after {timeout:g} seconds" + _last_words(err)) from None
        finally:
            process.kill()  # Ctrl-C leaves nothing running; to a child that has ended this does nothing
            process.wait()
    if process.returncode != 0:
        raise EngineDied(f"{function}: the child process {_end(process.returncode)}" + _last_words(err))
    reply = json.loads(out)
    if "error" in reply:
        raise _rebuilt(reply["error"])
    return reply["result"]


def _end(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}" if code < 256 else f"crashed (code {code:#x})"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def _last_words(err: bytes, count: int = 6) -> str:
    lines = [line for line in err.decode("utf-8", "replace").splitlines() if line.strip()]
    return "".join(f"\n    engine: {line.strip()[:300]}" for line in lines[-count:])


def _rebuilt(error: dict[str, Any]) -> LlmkitError:
    kind = getattr(errors, error["class"], LlmkitError)
    rebuilt: LlmkitError = kind(error["message"], error["hint"])
    return rebuilt


def main() -> None:
    """The child's side: read the request from stdin, answer on the real stdout."""
    answer = os.dup(1)
    os.putenv("GGML_NO_BACKTRACE", "1")  # after an abort: the assertion tells, a debugger's frames would bury it
    os.dup2(2, 1)  # from here on, what anybody prints is log
    request = json.loads(sys.stdin.buffer.read())
    module, _, name = request["function"].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        _echo_log()
        reply = {"result": function(**request["arguments"])}
    except LlmkitError as error:
        reply = {"error": {"class": type(error).__name__, "message": error.message, "hint": error.hint}}
    with os.fdopen(answer, "wb") as stream:
        stream.write(json.dumps(reply).encode())


def _echo_log() -> None:
    """Let the engine's log run into stderr as it comes: after a crash nothing else could show it."""
    from .library import load

    load().log.echo = 2
