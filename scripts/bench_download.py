#!/usr/bin/env python3
"""What a killed download costs, and how fast one is: `llmkit download` beside `hf download` and curl.

Kills. A repository of three shards and small files comes over a link of a stated rate. The k-th run is killed (SIGKILL)
when the server has sent, all runs together, the k-th of 20 seeded random amounts between nothing and the repository's
size; the last run goes to its end. Counted are the bytes of all bodies, listings too, that the server gave to its
sockets, and the unfinished files left behind. Every file is compared with its original. Each tool meets the same rule.
The link is shared by all connections, and the server's send buffers are small, as behind a real network: on an
unthrottled loopback megabytes lie in the kernel's buffers that no client has seen, and a kill loses those.

Rate. The same files over the bare loopback: ours is hashed, synced and renamed; curl writes and does none of it, so
curl with a sync afterwards is printed, too. Runs alternate, the first round is not counted, the least time of each
counts. Before each, as much memory as it will fill with file pages is touched and given back: in a virtual machine the
first touch of a page costs more than the copying. "transfer" is hub.fetch alone, "whole" the whole process: Python and
huggingface_hub take their time to start. Server and client share the machine's cores, and hashing is work that curl
does not have: on two cores ours keeps both busy, and whatever else runs there slows it more than curl.
How much that was is printed. Memory is the peak of the process (VmHWM). The exit code is 1 when a limit is missed.

    bench_download.py            200 MB, 20 kills; 1 GB in one file and in four, 7 rounds
    bench_download.py --quick    100 MB, 6 kills; 300 MB, 2 rounds; under 45 s on an idle machine
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import standin_hub  # noqa: E402  (the stand-in Hub lies with the tests)
from standin_faults import Fault, Send, Wait  # noqa: E402

LIMITS = {"bytes": 1.02, "rate": 0.9, "peak_mib": 100.0}
SEND_BUFFER = 64 << 10
SEED = 4
TRANSFER = """import sys, time
from llmkit import hub, model
planned = hub.plan(model.parse(sys.argv[1]))
began = time.perf_counter()
hub.fetch(planned)
print(time.perf_counter() - began)
"""
TOUCH = "block = bytearray({nbytes})\nblock[::4096] = bytes(len(block[::4096]))"
OURS = [sys.executable, "-m", "llmkit", "-q", "download"]
THEIRS = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", "download"]


class Line:
    """A link of `rate` bytes per second that all connections share."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._free_at = 0.0
        self._lock = threading.Lock()

    def turn(self, nbytes: int) -> float:
        """Seconds until these bytes may be sent."""
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._free_at)
            self._free_at = begin + nbytes / self.rate
            return begin - now


@dataclass(frozen=True)
class OnLine(Fault):
    """The body goes over a line."""

    line: Line

    def steps(self, start: int, stop: int) -> Iterator[Send | Wait]:
        for first in range(start, stop, SEND_BUFFER):
            last = min(first + SEND_BUFFER, stop)
            yield Wait(self.line.turn(last - first))
            yield Send(first, last)


@dataclass(frozen=True)
class Killed:
    """A download that was killed again and again: the server's bytes, over the repository's size, and what is left."""

    sent_nbytes: int
    ratio: float
    seconds: float
    n_orphans: int
    orphan_nbytes: int
    whole: bool


@dataclass(frozen=True)
class Ran:
    """A process that ended: wall seconds, peak MiB, what it printed, the cores that others kept busy meanwhile."""

    seconds: float
    peak_mib: float
    said: str
    others: float


@dataclass
class Rates:
    """Least seconds of each way to fetch the same files; peak memory in MiB; cores others kept busy, run by run."""

    nbytes: int
    n_files: int
    seconds: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    others: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float, ran: Ran | None = None) -> None:
        """Keep the least time and the highest peak."""
        self.seconds[name] = min(seconds, self.seconds.get(name, seconds))
        if ran:
            self.peak_mib[name] = max(ran.peak_mib, self.peak_mib.get(name, 0.0))
            self.others.setdefault(name, []).append(round(ran.others, 2))

    @property
    def ratio(self) -> float:
        """Our transfer's rate over curl's."""
        return self.seconds["curl"] / self.seconds["ours, transfer"]


class Bench:
    """A stand-in Hub with repositories, and clients in processes of their own, each time with an empty cache."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.hub = standin_hub.Hub(work / "hub")

    def make(self, repo: str, nbytes: int, n_files: int) -> None:
        """A checkpoint of random bytes in `n_files` shards, with the small files around it."""
        folder = self.work / "hub" / repo
        folder.mkdir(parents=True)
        generator = random.Random(repo)
        names = [f"model-{number + 1:05}-of-{n_files:05}.safetensors" for number in range(n_files)]
        for name in names:
            size = nbytes // n_files
            tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
            header = json.dumps({f"weight.{name}": tensor}).encode()
            with open(folder / name, "wb") as file:
                file.write(struct.pack("<Q", len(header)) + header)
                for start in range(0, size, 1 << 20):
                    file.write(generator.randbytes(min(1 << 20, size - start)))
        index = {"metadata": {"total_size": nbytes}, "weight_map": {f"weight.{name}": name for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (folder / "tokenizer.json").write_bytes(generator.randbytes(2_000_000))
        for entry in self.hub.snapshot(repo).entries.values():
            _ = entry.etag  # hashed once, now

    def sizes(self, repo: str) -> dict[str, int]:
        """The repository's files."""
        return {name: entry.size for name, entry in self.hub.snapshot(repo).entries.items()}

    def environment(self) -> dict[str, str]:
        """An empty cache, and nobody but the stand-in to ask."""
        home = self.work / "client"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        return kept | {
            "PYTHONPATH": str(ROOT / "src"), "HF_ENDPOINT": self.hub.address, "HF_HOME": str(home / "hf"),
            "LLMKIT_HOME": str(home / "llmkit"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip

    def throttle(self, rate: float) -> None:
        """From now on, connections share a line and have small send buffers (they inherit the listening socket's)."""
        self.hub.fail("*", "*", OnLine(Line(rate)), times=None)
        assert self.hub._server is not None
        self.hub._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def kills(self, command: list[str], repo: str, n_kills: int) -> Killed:
        """Run, kill, run again, as the module's first lines say."""
        environment = self.environment()
        size = sum(self.sizes(repo).values())
        generator = random.Random(SEED)
        self.hub.clear()
        began = time.monotonic()
        for point in sorted(generator.randrange(size) for _ in range(n_kills)):
            # not before files come: the listing is some kilobytes
            until = max(point, self.hub.sent() + 2 * SEND_BUFFER)
            child = subprocess.Popen(
                [*command, repo], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while self.hub.sent() < until and child.poll() is None:
                time.sleep(0.001)
            child.kill()
            child.wait()
        run([*command, repo], environment)
        seconds = time.monotonic() - began
        cache = self.work / "client" / "hf" / "hub"
        orphans = [path for path in cache.rglob("*") if ".incomplete" in path.name or ".partial" in path.name]
        sent = self.hub.sent()
        left = sum(path.stat().st_size for path in orphans)
        return Killed(sent, sent / size, seconds, len(orphans), left, self.is_whole(repo, cache))

    def is_whole(self, repo: str, cache: Path) -> bool:
        """Whether every file of the snapshot in `cache` has the sha256 of its original."""
        (snapshot,) = cache.glob("models--*/snapshots/*")
        originals = self.work / "hub" / repo
        return all(sha256(snapshot / name) == sha256(originals / name) for name in self.sizes(repo))

    def rates(self, repo: str, rounds: int) -> Rates:
        """All ways in turns, one round more than counts."""
        sizes = self.sizes(repo)
        found = Rates(sum(sizes.values()), len(sizes))
        self.once(repo, Rates(found.nbytes, found.n_files))
        for _ in range(rounds):
            self.once(repo, found)
        return found

    def once(self, repo: str, found: Rates) -> None:
        """Each way once. Before each, the disk has nothing left to do."""
        for name, command in {"ours": [sys.executable, "-c", TRANSFER, repo], "hf": [*THEIRS, repo]}.items():
            environment = self.environment()
            settle(found.nbytes)
            ran = run(command, environment)
            found.add(f"{name}, whole", ran.seconds, ran)
            if name == "ours":
                found.add("ours, transfer", float(ran.said))
        self.environment()
        targets = {file: self.work / "client" / file for file in self.sizes(repo)}
        command = ["curl", "-s", "-Z"] if len(targets) > 1 else ["curl", "-s"]
        for file, path in targets.items():
            command += ["-o", str(path), f"{self.hub.address}/{repo}/resolve/main/{file}"]
        settle(found.nbytes)
        ran = run(command, dict(os.environ) | {"NO_PROXY": "127.0.0.1"})
        found.add("curl", ran.seconds, ran)
        began = time.monotonic()
        for path in targets.values():
            with open(path, "rb") as file_there:
                os.fsync(file_there.fileno())
        found.add("curl, then sync", ran.seconds + time.monotonic() - began)


def settle(nbytes: int) -> None:
    """Let the disk have nothing left to do, and as much memory be at hand as `nbytes` of files fill."""
    os.sync()
    subprocess.run([sys.executable, "-c", TOUCH.format(nbytes=nbytes * 5 // 4)], check=True)


def run(command: list[str], environment: dict[str, str]) -> Ran:
    """Run a process, which must succeed."""
    began, others = time.monotonic(), others_seconds()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        peaks: list[float] = []
        threading.Thread(target=watch_memory, args=(child, peaks), daemon=True).start()
        said = child.communicate()[0]
    seconds = time.monotonic() - began
    if child.returncode:
        sys.exit(f"failed ({child.returncode}): {' '.join(command)}\n{said}")
    return Ran(seconds, max(peaks, default=0.0), said, (others_seconds() - others) / seconds)


def others_seconds() -> float:
    """CPU seconds that the machine has spent on anything but this process and its ended children."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # all but idle and waiting for the disk
    return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def watch_memory(child: subprocess.Popen[str], peaks: list[float]) -> None:
    """Note the peak (VmHWM, MiB) again and again. The one that wait4 tells is never below this process's own."""
    while child.returncode is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            return
        peaks += [int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
        time.sleep(0.02)


def sha256(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def machine() -> dict[str, object]:
    """What the figures depend on."""
    import huggingface_hub

    curl = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "python": sys.version.split()[0],
        "huggingface_hub": huggingface_hub.__version__,
        "curl": curl,
    }


def show_kills(found: dict[str, Killed]) -> None:
    """One line a tool."""
    for name, each in found.items():
        print(
            f"  {name:<18} {each.sent_nbytes / 1e6:8.1f} MB sent  {each.ratio:6.3f}x  {each.seconds:6.1f} s "
            f" {each.n_orphans} unfinished files left ({each.orphan_nbytes / 1e6:.0f} MB)"
            f"  {'all files right' if each.whole else 'FILES DIFFER'}"
        )


def show_rates(found: Rates) -> None:
    """One line a way, and the ratio."""
    print(f"{found.nbytes / 1e6:.0f} MB in {found.n_files} files")
    for name, seconds in sorted(found.seconds.items()):
        rest = ""
        if name in found.others:
            others = statistics.median(found.others[name])
            rest = f"  {found.peak_mib[name]:4.0f} MiB peak  others kept {others:.1f} cores busy"
        print(f"  {name:<16} {seconds:6.2f} s {found.nbytes / seconds / 1e6:6.0f} MB/s{rest}")
    synced = found.seconds["curl, then sync"] / found.seconds["ours, transfer"]
    print(f"  ours, transfer: {found.ratio:.2f}x curl's rate, {synced:.2f}x that of curl with a sync")


def missed(kills: dict[str, Killed], rates: list[Rates]) -> list[str]:
    """The limits that were."""
    found = []
    if ours := kills.get("llmkit download"):
        if not ours.whole:
            found.append("files differ after kills")
        if ours.ratio > LIMITS["bytes"]:
            found.append(f"bytes after kills: {ours.ratio:.3f}x, limit {LIMITS['bytes']}x")
    for each in rates:
        if each.ratio < LIMITS["rate"]:
            found.append(f"rate with {each.n_files} files: {each.ratio:.2f}x curl's, limit {LIMITS['rate']}x")
        if (peak := each.peak_mib["ours, whole"]) > LIMITS["peak_mib"]:
            found.append(f"memory with {each.n_files} files: {peak:.0f} MiB, limit {LIMITS['peak_mib']:.0f} MiB")
    return found


def main() -> int:
    """Make the repositories, run, print, optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--link", type=float, default=40.0, metavar="MB/S", help="rate of the link where kills happen")
    parser.add_argument("--rounds", type=int, help="how often each way is measured (7; quick: 2)")
    parser.add_argument("--only", choices=["kills", "rates"])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    nbytes, n_kills, rounds = (300_000_000, 6, 2) if args.quick else (1_000_000_000, 20, 7)
    facts = machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    bench = Bench(Path(tempfile.mkdtemp(prefix="bench-download-", dir=args.folder)))
    kills: dict[str, Killed] = {}
    rates: list[Rates] = []
    try:
        if args.only != "kills":
            for repo, n_files in {"org/one": 1, "org/four": 4}.items():
                bench.make(repo, nbytes, n_files)
                rates.append(bench.rates(repo, args.rounds or rounds))
                show_rates(rates[-1])
        if args.only != "rates":
            bench.make("org/killed", 100_000_000 if args.quick else 200_000_000, 3)
            bench.throttle(args.link * 1e6)
            for name, command in {"llmkit download": OURS, "hf download": THEIRS}.items():
                kills[name] = bench.kills(command, "org/killed", n_kills)
            print(f"killed {n_kills} times over a link of {args.link:.0f} MB/s")
            show_kills(kills)
    finally:
        bench.hub.stop()
        shutil.rmtree(bench.work)
    if args.json:
        record = {"machine": facts, "limits": LIMITS, "kills": {k: asdict(v) for k, v in kills.items()}}
        record["rates"] = [asdict(each) | {"ratio": each.ratio} for each in rates]
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    limits = missed(kills, rates)
    for each in limits:
        print(f"missed: {each}")
    return int(bool(limits))


if __name__ == "__main__":
    sys.exit(main())
