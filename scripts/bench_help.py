#!/usr/bin/env python3
"""How long `llmkit --help` takes, against a bare argparse program of the same interpreter.

Runs alternate, so that whatever else the machine does falls on both; medians are compared. Exit code 1 when the
ratio is above the limit.

    bench_help.py            60 runs of each
    bench_help.py --quick    15 runs of each
    bench_help.py --json F   write the figures into F
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 1.5
BARE = """\
import argparse
parser = argparse.ArgumentParser(prog="bare", description="A bare argparse program.")
parser.add_argument("file")
parser.add_argument("-v", "--verbose", action="store_true")
parser.parse_args()
"""


def main() -> int:
    """Measure, print, and say whether the limit holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    figures = measure(15 if options.quick else 60)
    print(f"bare argparse   {figures['bare_ms']:.1f} ms")
    print(f"llmkit --help   {figures['llmkit_ms']:.1f} ms")
    print(f"ratio           {figures['ratio']:.2f} (limit {LIMIT}; medians of {figures['runs']:.0f} runs each)")
    if options.json:
        record = {**figures, "limit": LIMIT, "python": sys.version.split()[0]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(figures["ratio"] > LIMIT)


def measure(runs: int) -> dict[str, float]:
    """Medians in milliseconds of `runs` interleaved runs, and their ratio. The first run of each is not counted."""
    commands = {"bare": ["-c", BARE, "--help"], "llmkit": ["-m", "llmkit", "--help"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs + 1):
        for name, arguments in commands.items():
            times[name].append(once([sys.executable, *arguments]))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {
        "bare_ms": medians["bare"],
        "llmkit_ms": medians["llmkit"],
        "ratio": medians["llmkit"] / medians["bare"],
        "runs": runs,
    }


def once(command: list[str]) -> float:
    """Wall milliseconds of one run of `command`, which must succeed."""
    source = str(Path(__file__).resolve().parents[1] / "src")
    environment = {**os.environ, "PYTHONPATH": source}  # the bare program pays for the path entry, too
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
