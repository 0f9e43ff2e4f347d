"""`llmkit serve` as a child process: what it prints, who may ask, how soon it answers, how it ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from conftest import Cli, GgufOf, TinyCheckpoint, cli_environment, in_session

SOURCE = Path(__file__).resolve().parents[1] / "src"


@pytest.fixture(scope="module")
def gguf(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> Path:
    return gguf_of(tiny_checkpoint("qwen3"), "f32")


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """`llmkit serve` on a free port: the process, its address, and its lines on stderr as they come."""
    command = [sys.executable, "-m", "llmkit", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    with in_session(*command, env=cli_environment()) as process:
        lines: list[str] = []
        found = threading.Event()

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line.rstrip("\n"))
                if line.startswith("client"):
                    found.set()
            found.set()

        threading.Thread(target=read, daemon=True).start()
        assert found.wait(60)
        address = re.search(r" at (http://\S+)", "\n".join(lines))
        assert address, lines
        yield process, address[1], lines


def test_it_serves_and_ends_as_it_is_told(gguf: Path) -> None:
    for sign in (signal.SIGINT, signal.SIGTERM):
        with serving(gguf, "--model", f"again={gguf}") as (process, address, lines):
            with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
                assert client.get("/health").json() == {"status": "ok"}
                assert [each["id"] for each in client.get("/v1/models").json()["data"]] == [gguf.stem, "again"]
                body = {"model": "again", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
                assert client.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] in (1, 2, 3)
                assert str(gguf.parent) not in client.get("/v1/models").text
            assert any("/docs" in line for line in lines) and not any(line.startswith("key") for line in lines)
            process.send_signal(sign)
            assert process.wait(20) == 0
            assert process.stdout is not None and process.stdout.read() == ""


def test_it_answers_soon_and_light(gguf: Path) -> None:
    """/health within two seconds and the time that loading takes; neither gradio nor pandas."""
    code = (
        "import sys, threading, time, urllib.request, signal, os\n"
        "from llmkit.cli.main import main\n"
        "def watch():\n"
        "    while True:\n"
        "        try:\n"
        "            urllib.request.urlopen(f'http://127.0.0.1:{port}/health').read(); break\n"
        "        except OSError: time.sleep(0.01)\n"
        "    print(time.monotonic() - began, *sys.modules, flush=True); os.kill(os.getpid(), signal.SIGINT)\n"
        "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]; s.close()\n"
        "began = time.monotonic(); threading.Thread(target=watch, daemon=True).start()\n"
        "sys.exit(main(['serve', sys.argv[1], '--port', str(port), '--threads', '1']))\n"
    )
    loading = (
        "import sys, time; began = time.monotonic(); from llmkit import backends\n"
        "backends.load(sys.argv[1], n_threads=1).session(4096, sequences=4); print(time.monotonic() - began)"
    )
    best = 100.0
    for _ in range(3):
        load = float(run(loading, gguf))
        seconds, *modules = run(code, gguf).split()
        best = min(best, float(seconds) - load)
        loaded = {name.split(".")[0] for name in modules}
        assert {"uvicorn", "fastapi"} <= loaded
        assert loaded & {"gradio", "pandas", "torch", "transformers", "matplotlib", "prompt_toolkit"} == set()
        if best <= 2:
            break
    assert best <= 2


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, env=cli_environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_off_loopback_a_key_is_made_and_asked_for(gguf: Path) -> None:
    with serving(gguf, "--host", "0.0.0.0") as (_, address, lines):
        key = next(line.split()[1] for line in lines if line.startswith("key"))
        assert len(key) >= 32
        with httpx.Client(base_url=address.replace("0.0.0.0", "127.0.0.1"), trust_env=False) as client:
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_keys_from_a_file(gguf: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("first\nsecond\n")
    with serving(gguf, "--api-key-file", keys, "--verbose") as (_, address, lines):
        with httpx.Client(base_url=address, trust_env=False) as client:
            assert client.get("/v1/models").status_code == 401
            for key in ("first", "second"):
                assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        time.sleep(0.2)
        text = "\n".join(lines)
        assert '"GET /v1/models HTTP/1.1" 200' in text and "first" not in text and "second" not in text


def test_what_it_does_not_take(gguf: Path, cli: Cli, tmp_path: Path) -> None:
    for arguments, code, words in (
        ((tmp_path / "no.gguf",), 1, "no.gguf"),
        ((gguf, "--port", "99999"), 2, "65535"),
        ((gguf, "--slots", "0"), 2, "0"),
        ((gguf, "--cors", "*"), 1, "--cors"),
        ((gguf, "--host", "0.0.0.0", "-q"), 1, "--quiet"),
        ((gguf, "--model", str(gguf)), 1, "two models"),
        ((gguf, "--host", "203.0.113.7"), 1, "cannot be listened on"),
        ((gguf, "--api-key-file", tmp_path / "none"), 1, "none"),
    ):
        done = cli("serve", *arguments)
        assert done.returncode == code and words in done.stderr, (arguments, done.stderr)
