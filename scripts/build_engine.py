#!/usr/bin/env python3
"""Build llama-cpp-python for the CPU at hand, without the kernels that crash on it, and keep the wheel.

A plain build compiles for the machine's own CPU and on CPUs with AMX crashes at the first quantized matrix
product (llama.cpp issues 20824, 26954, 28756). This script names the CPU's features one by one and leaves AMX
out. The wheel is kept in a cache folder keyed by version, CPU features and flags, because pip's own cache
would hand a wheel built on one CPU to another.

    build_engine.py              build if needed, print the wheel's path
    build_engine.py --python P   build if needed and install the wheel with P's pip
    build_engine.py --check      only look for what a build needs

Flags of your own go into CMAKE_ARGS, e.g. CMAKE_ARGS="-DGGML_CUDA=ON" or "-DGGML_METAL=ON".
Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VERSION = "0.3.36"

# /proc/cpuinfo flags that must all be there → ggml build option (ggml/CMakeLists.txt)
FEATURES = (
    (("sse4_2",), "GGML_SSE42"),
    (("avx",), "GGML_AVX"),
    (("avx2",), "GGML_AVX2"),
    (("bmi2",), "GGML_BMI2"),
    (("fma",), "GGML_FMA"),
    (("f16c",), "GGML_F16C"),
    (("avx_vnni",), "GGML_AVX_VNNI"),
    (("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"), "GGML_AVX512"),
    (("avx512vbmi",), "GGML_AVX512_VBMI"),
    (("avx512_vnni",), "GGML_AVX512_VNNI"),
    (("avx512_bf16",), "GGML_AVX512_BF16"),
)
AMX = {"amx_tile", "amx_int8", "amx_bf16"}


def cpu_flags() -> set[str]:
    """The CPU's feature flags as Linux names them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def cmake_args() -> list[str]:
    """The build flags: explicit CPU features where AMX is present, the compiler's own choice elsewhere."""
    flags = cpu_flags()
    args = ["-DLLAVA_BUILD=OFF", "-DLLAMA_OPENSSL=OFF"]
    if flags & AMX:
        args.append("-DGGML_NATIVE=OFF")
        args += [f"-D{option}={'ON' if flags.issuperset(needed) else 'OFF'}" for needed, option in FEATURES]
    return args + os.environ.get("CMAKE_ARGS", "").split()


def wheel_cache() -> Path:
    """Folder for the wheel of this version, these flags and this CPU."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmkit" / "engine"
    key = "\n".join([VERSION, platform.machine(), sys.platform, *cmake_args(), *sorted(cpu_flags())])
    return root / f"{VERSION}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def require_tools() -> None:
    """Make sure a C++ compiler and CMake are there: install them when root on Debian, else say how and exit."""
    missing = []
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        missing.append("g++")
    if not shutil.which("cmake"):
        missing.append("cmake")
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"Installing {' and '.join(missing)}, which building the engine needs", file=sys.stderr)
        for step in (["apt-get", "update", "-qq"], command):
            subprocess.run(step, check=True, stdout=sys.stderr)
        return
    how = {"darwin": "xcode-select --install && brew install cmake"}.get(sys.platform, "sudo " + " ".join(command))
    sys.exit(f"Building the engine needs {' and '.join(missing)}, which this machine lacks. Run:\n    {how}")


def build(python: str) -> Path:
    """Return the wheel, from the cache or built now with `python`'s pip."""
    cache = wheel_cache()
    found = sorted(cache.glob("*.whl"))
    if found:
        print(f"Engine: wheel built earlier for this CPU: {found[0]}", file=sys.stderr)
        return found[0]
    require_tools()
    flags = cmake_args()
    print(f"Engine: building llama-cpp-python {VERSION} ({' '.join(flags)}); some minutes", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        subprocess.run(
            [python, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python",
             "-w", scratch, f"llama-cpp-python=={VERSION}"],
            check=True, stdout=sys.stderr, env={**os.environ, "CMAKE_ARGS": " ".join(flags)},
        )  # fmt: skip
        wheel = next(Path(scratch).glob("*.whl"))
        whole = cache / wheel.name
        os.replace(wheel, whole)
    print(f"Engine: built in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return whole


def main() -> None:
    """Parse the command line and build, install or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", metavar="P", help="install into this interpreter's environment")
    parser.add_argument("--check", action="store_true", help="only look for a compiler and CMake")
    options = parser.parse_args()
    python = options.python or sys.executable
    try:
        if options.check:
            return require_tools()
        wheel = build(python)
        if options.python:
            subprocess.run(
                [python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", str(wheel)], check=True
            )
        else:
            print(wheel)
    except subprocess.CalledProcessError as error:
        sys.exit(f"Building the engine failed: {' '.join(map(str, error.cmd))} ended with {error.returncode}")


if __name__ == "__main__":
    main()
