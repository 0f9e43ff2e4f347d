#!/usr/bin/env python3
"""Our single pass against the usual two steps, on one synthetic BF16 checkpoint, in one run.

    ours        checkpoint → Q4_K_M, read once, written once
    two steps   checkpoint → BF16 GGUF (our converter), then llama_model_quantize of the engine → Q4_K_M
    copying     checkpoint → Q8_0 and → BF16, against a plain copy of the same bytes through the same disk

Every job runs in a process of its own; wall time, CPU time and peak resident memory are the kernel's (wait4). Jobs are
repeated in turns, the least wall time of each counts, with its CPU time. Before each job as much memory as it will fill
with file pages is touched and given back: in a virtual machine the first touch of a page costs more than the copying,
and would fall on whichever job comes first. The two results are compared byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent

OURS = """import sys
from llmkit.cli.main import main
sys.exit(main(["-q", {verb}, "--out", {{out!r}}, "--threads", "{{threads}}", "--force", "--json"]))
"""
JOBS = {
    "ours Q4_K_M": OURS.format(verb="'quantize', {source!r}, 'Q4_K_M'"),
    "ours BF16": OURS.format(verb="'convert', {source!r}"),
    "engine Q4_K_M": "import ctypes, sys\n"
    "from llmkit import engine\n"
    "llama = engine.load().llama\n"
    "params = llama.llama_model_quantize_default_params()\n"
    "params.ftype, params.nthread = 15, {threads}\n"
    "sys.exit(llama.llama_model_quantize({bf16!r}.encode(), {reference!r}.encode(), ctypes.byref(params)))",
    "ours Q8_0": OURS.format(verb="'quantize', {source!r}, 'Q8_0'"),
    "plain copy": "import os, pathlib\n"
    "with open({out!r} + '/copy', 'wb', buffering=0) as out:\n"
    "    for path in sorted(pathlib.Path({source!r}).glob('*.safetensors')):\n"
    "        with open(path, 'rb', buffering=0) as file:\n"
    "            while block := file.read(1 << 22):\n"
    "                out.write(block)\n"
    "    os.fsync(out.fileno())",
}


TOUCH = "block = bytearray({nbytes})\nblock[::4096] = bytes(len(block[::4096]))"


@dataclass(frozen=True)
class Measured:
    """One job: seconds and MiB as the kernel counted them."""

    wall: float
    cpu: float
    peak_mib: float


def measure(code: str) -> Measured:
    """Run `code` in a fresh interpreter and wait for it."""
    began = time.monotonic()
    null = os.open(os.devnull, os.O_WRONLY)
    pid = os.posix_spawn(
        sys.executable, [sys.executable, "-c", code], dict(os.environ), file_actions=[(os.POSIX_SPAWN_DUP2, null, 1)]
    )
    os.close(null)
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"a job failed ({os.waitstatus_to_exitcode(status)}):\n{code}")
    return Measured(time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def same_bytes(ours: Path, reference: Path) -> bool:
    """Whether every tensor of the two files has the same type and bytes."""
    from llmkit import gguf

    a, b = gguf.read(ours), gguf.read(reference)
    if list(a.tensors) != list(b.tensors):
        return False
    with open(ours, "rb") as first, open(reference, "rb") as second:
        for name, info in a.tensors.items():
            other = b.tensors[name]
            first.seek(info.offset)
            second.seek(other.offset)
            if info.type is not other.type or first.read(info.nbytes) != second.read(other.nbytes):
                return False
    return True


def run_jobs(source: Path, folder: Path, *, threads: int, rounds: int) -> dict[str, Measured]:
    """All jobs in turns, `rounds` times; the fastest of each."""
    names = {
        "source": str(source), "out": str(folder), "threads": threads,
        "bf16": str(folder / f"{source.name}-BF16.gguf"), "reference": str(folder / "reference.gguf"),
    }  # fmt: skip
    best: dict[str, Measured] = {}
    touch = TOUCH.format(nbytes=2 * sum(path.stat().st_size for path in source.glob("*.safetensors")))
    for _ in range(rounds):
        for name, template in JOBS.items():
            os.sync()
            measure(touch)
            found = measure(template.format(**names))
            print(
                f"  {name:<14} {found.wall:7.1f} s wall {found.cpu:7.1f} s CPU {found.peak_mib:7.0f} MiB",
                file=sys.stderr,
            )
            if name not in best or found.wall < best[name].wall:
                best[name] = found
    return best


def summarize(best: dict[str, Measured], source: Path, folder: Path) -> dict[str, object]:
    """Ratios and rates from the measured jobs."""
    size = {name: (folder / f"{source.name}-{name}.gguf").stat().st_size for name in ("Q4_K_M", "BF16", "Q8_0")}
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    ours, convert, engine = best["ours Q4_K_M"], best["ours BF16"], best["engine Q4_K_M"]
    copy_rate = 2 * weights / best["plain copy"].wall
    return {
        "cpu_ratio": ours.cpu / (convert.cpu + engine.cpu),
        "wall_ratio": ours.wall / (convert.wall + engine.wall),
        "bytes_written_ratio": size["Q4_K_M"] / (size["BF16"] + size["Q4_K_M"]),
        "convert_cpu_share": convert.cpu / engine.cpu,
        "peak_mib_ours": ours.peak_mib,
        "peak_mib_convert": convert.peak_mib,
        "peak_mib_engine": engine.peak_mib,
        "copy_bytes_per_second": copy_rate,
        "bf16_share_of_copy_rate": (weights + size["BF16"]) / best["ours BF16"].wall / copy_rate,
        "q8_0_share_of_copy_rate": (weights + size["Q8_0"]) / best["ours Q8_0"].wall / copy_rate,
        "same_bytes": same_bytes(folder / f"{source.name}-Q4_K_M.gguf", folder / "reference.gguf"),
        "source_bytes": weights,
        "jobs": {name: asdict(each) for name, each in best.items()},
    }


def main() -> None:
    """Make the checkpoint, run, print, optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer instead of 16 and one round, under 45 s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    work = Path(tempfile.mkdtemp(prefix="bench-quantize-", dir=args.folder))
    try:
        source = work / "synthetic"
        make = "import sys; sys.path.insert(0, {!r}); import make_tiny_model as m; from pathlib import Path\n"
        make += "m.make_synthetic(Path({!r}), layers={})"
        measure(make.format(str(HERE), str(source), 1 if args.quick else 16))
        best = run_jobs(source, work, threads=args.threads, rounds=1 if args.quick else args.rounds)
        found = summarize(best, source, work)
    finally:
        shutil.rmtree(work)
    for name, value in found.items():
        if name != "jobs":
            print(f"{name:<26} {value if not isinstance(value, float) else round(value, 3)}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
