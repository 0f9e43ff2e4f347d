"""What this machine is: its processor, its memory and what of it is free, its caches, the GPUs the engine sees.

A container's limit counts as the machine's. The engine is asked in a child process: a crash of it harms nothing.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ... import engine
from ...errors import LlmkitError

_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a huge number
_TIMEOUT = 60.0
_ARM_NAMES = ("Model", "Hardware")  # lines of /proc/cpuinfo where there is no "model name"


@dataclass(frozen=True)
class Ram:
    """Memory in bytes: `total`, what is `available` without swapping (None: not said), a container's `limit`."""

    total: int
    available: int | None
    limit: int | None


@dataclass(frozen=True)
class Gpu:
    """A GPU as the engine sees it; bytes, 0 where it does not say. On macOS `total` is Metal's recommended limit."""

    name: str
    description: str
    free: int
    total: int


def cpu_name() -> str:
    """The processor's name, or its architecture where the system has no name for it."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    lines = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    return next((lines[key] for key in ("model name", *_ARM_NAMES) if lines.get(key)), platform.machine())


def board_name() -> str | None:
    """What a single-board computer calls itself ("Raspberry Pi 5 Model B Rev 1.0"), or None."""
    try:
        return Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def ram() -> Ram:
    """Memory of this machine, or of its container where that has less. Raises LlmkitError where nobody says."""
    limit = _limit()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            raise LlmkitError("the system does not say how much memory it has") from None
        return Ram(total, None, limit[0] if limit else None)
    found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, available = found["MemTotal"], found.get("MemAvailable", found["MemFree"])
    if limit is None:
        return Ram(total, available, None)
    return Ram(min(total, limit[0]), min(available, limit[1]), limit[0])


def _limit() -> tuple[int, int] | None:
    """The tightest control group around this process: its limit and what is left of it; None without any."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _limits(_CGROUP, path, ("memory.max", "memory.current", "file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
            found += _limits(_CGROUP / "memory", path, names)
    return min(found, key=lambda pair: pair[1]) if found else None


def _limits(root: Path, path: str, names: tuple[str, str, str]) -> list[tuple[int, int]]:
    """(limit, left) of the group `path` and those above it; inside a container only the root may be seen."""
    folder = root / path.lstrip("/")
    groups = [folder, *folder.parents] if folder == root or root in folder.parents else [root]
    found = []
    for group in groups[: groups.index(root) + 1]:
        try:
            limit, used = (int((group / name).read_text()) for name in names[:2])
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group here, or no limit ("max")
            continue
        if limit < _NO_LIMIT:
            used -= int(stat.get(names[2], 0))  # cached files make room when asked
            found.append((limit, max(0, limit - used)))
    return found


def last_level_cache() -> int:
    """Bytes of the largest caches of the CPUs this process may use, each counted once; 0 where nobody says."""
    if sys.platform == "darwin":
        return max((int(text) for name in ("hw.l3cachesize", "hw.l2cachesize") if (text := _sysctl(name))), default=0)
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    caches: dict[tuple[int, str], int] = {}
    for cpu in cpus:
        for folder in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            try:
                level, size, shared = ((folder / n).read_text().strip() for n in ("level", "size", "shared_cpu_list"))
                caches[int(level), shared] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
            except (OSError, ValueError):
                continue
    highest = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == highest)


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that the engine finds. Raises MissingDependency without an engine, EngineError when asking it fails."""
    rows = engine.run_in_child(function=f"{__name__}:gpu_rows", arguments={}, timeout=_TIMEOUT)
    return tuple(Gpu(**row) for row in rows)


def gpu_rows() -> list[dict[str, object]]:
    """In the child: the engine's GPUs as JSON."""
    return [
        asdict(Gpu(each.name, each.description, each.free_nbytes, each.total_nbytes))
        for each in engine.load().devices()
        if "gpu" in each.kind
    ]
