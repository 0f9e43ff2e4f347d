"""The doctor: what it says of this machine, and what it would say of others."""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from conftest import Cli
from llmkit import engine
from llmkit.cli import doctor
from llmkit.engine import Device, Verdict, symbols
from llmkit.memory.devices import machine

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
H200 = Device("CUDA0", "NVIDIA H200", "gpu", 100 << 30, 139 << 30)


def dependencies(section: str) -> dict[str, str]:
    """Package → range, from a list in pyproject.toml (Python 3.10 has no reader for it)."""
    found = re.search(rf"^{section} = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)
    assert found
    return dict(re.findall(r'"([\w-]+)([^"]*)"', found[1]))


# ── this machine ──


def test_this_machine(cli: Cli) -> None:
    """Every check is there, engine and packages are what Python itself says, nothing is bad."""
    done = cli("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    for package in doctor.PACKAGES:
        assert checks[package]["found"] == metadata.version(package)
    assert checks["engine"]["found"].startswith(engine.load().version)
    assert {"Python", "engine trial", "CPU features", "GPU", "memory", "disk, kept files", "extra demo"} <= set(checks)
    assert all(check["remedy"] for check in checks.values() if check["status"] != "ok")


def test_the_table_has_a_line_for_each_check_and_a_remedy_for_each_problem(cli: Cli) -> None:
    done = cli("doctor")
    checks = json.loads(cli("doctor", "--json").stdout)
    lines = done.stdout.splitlines()[1 : len(checks) + 1]
    assert [line.split(maxsplit=1)[0] for line in lines] == [check["status"] for check in checks]
    assert done.stdout.count("\n    ") == sum(check["status"] != "ok" for check in checks)


def test_a_missing_package_is_bad_and_the_exit_code_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmkit.cli.main import main

    monkeypatch.setitem(doctor.PACKAGES, "no-such-package-anywhere", ("1.0", None))
    assert main(["doctor"]) == 1
    assert "bad: no-such-package-anywhere\n    pip install 'no-such-package-anywhere>=1.0'" in capsys.readouterr().out


def test_memory_is_what_the_system_says() -> None:
    ram = machine.ram()
    total, free = ram.total, ram.available
    assert 0 < total <= psutil.virtual_memory().total
    assert free is not None and 0 <= free <= total


def test_cpu_flags_hold_the_base_of_this_processor() -> None:
    flags = doctor.cpu_flags()
    if not flags:
        pytest.skip("not Linux on x86")
    assert {"fpu", "sse2"} <= flags


# ── facts with one home ──


def test_ranges_are_those_of_the_package() -> None:
    wanted = {
        package: f">={least}" + (f",<{below}" if below else "") for package, (least, below) in doctor.PACKAGES.items()
    }
    assert dependencies("dependencies") == wanted


def test_extras_are_those_of_the_package() -> None:
    for extra, package in doctor.EXTRAS.items():
        assert package in dependencies(extra)


def test_oldest_python_is_the_package_s() -> None:
    assert f'requires-python = ">={doctor.PYTHON[0][0]}.{doctor.PYTHON[0][1]}"' in PYPROJECT


def test_the_engine_s_range_lies_in_what_the_engine_module_accepts() -> None:
    least, below = doctor.PACKAGES["llama-cpp-python"]
    assert below is not None
    accepted = symbols.SUPPORTED_VERSIONS
    assert accepted[0] <= tuple(map(int, least.split("."))) < tuple(map(int, below.split("."))) <= accepted[1]


def test_the_engine_that_is_built_is_in_range() -> None:
    import build_engine

    assert doctor.package_version("llama-cpp-python", build_engine.VERSION).status == "ok"


# ── other machines ──


@pytest.mark.parametrize(
    ("version", "status"), [((3, 9, 18), "bad"), ((3, 10, 0), "ok"), ((3, 13, 1), "ok"), ((3, 99, 0), "warn")]
)
def test_python_versions(version: tuple[int, ...], status: str) -> None:
    assert doctor.python_version(version).status == status


@pytest.mark.parametrize(
    ("package", "found", "status"),
    [
        ("llama-cpp-python", "0.3.35", "bad"),
        ("llama-cpp-python", "0.3.36", "ok"),
        ("llama-cpp-python", "0.3.36+cu124", "ok"),
        ("llama-cpp-python", "0.3.37", "bad"),
        ("numpy", "1.9.3", "bad"),
        ("numpy", "2.4.6", "ok"),
        ("numpy", None, "bad"),
    ],
)
def test_package_versions(package: str, found: str | None, status: str) -> None:
    check = doctor.package_version(package, found)
    assert check.status == status
    assert (package in check.remedy) == (status == "bad")


def test_a_cpu_that_needs_the_slow_setting() -> None:
    check = doctor.trial(Verdict("build", "cpu", {"use_extra_bufts": False}, "died of SIGILL"))
    assert check.status == "warn" and "use_extra_bufts=False" in check.found and "make engine" in check.remedy
    fast = doctor.trial(Verdict("build", "cpu"))
    assert fast.status == "ok" and f" {len(engine.PROBED_TYPES)} tensor types" in fast.found


def test_a_build_for_another_cpu() -> None:
    everything = set(doctor.CPU_FEATURES.values())
    lacking = doctor.cpu_features({"avx", "avx2", "fma", "f16c"}, everything)
    assert lacking.status == "bad" and "AVX512" in lacking.found and lacking.remedy
    unused = doctor.cpu_features(set(doctor.CPU_FEATURES), everything - {"AVX2"})
    assert unused.status == "warn" and "without AVX2," in unused.found and unused.remedy
    assert doctor.cpu_features(set(doctor.CPU_FEATURES), everything).status == "ok"
    assert doctor.cpu_features(set(), {"NEON"}).status == "ok"


@pytest.mark.parametrize(
    ("libraries", "devices", "at_hand", "status", "words"),
    [
        (["libggml-cpu.so"], [], None, "ok", "the CPU is used"),
        (["libggml-cpu.so", "libggml-cuda.so"], [H200], "CUDA", "ok", "CUDA in use: NVIDIA H200 (139.0 GiB)"),
        (["libggml-cpu.so", "libggml-cuda.so"], [], "CUDA", "warn", "finds no such device: the CPU is used"),
        (["libggml-cpu.so"], [], "CUDA", "warn", "has CUDA, but the engine was built without"),
        (["libggml-cpu.dylib"], [], "Metal", "warn", "has Metal, but the engine was built without"),
        (["libggml-vulkan.so"], [], None, "warn", "built for Vulkan"),
    ],
)
def test_which_gpu_is_in_use(
    libraries: list[str], devices: list[Device], at_hand: str | None, status: str, words: str
) -> None:
    check = doctor.gpu(libraries, devices, at_hand)
    assert check.status == status and words in check.found
    assert bool(check.remedy) == (status != "ok")
    if words.startswith("has"):
        assert f"-DGGML_{at_hand.upper() if at_hand else ''}=ON" in check.remedy


def test_every_build_flag_is_one_of_the_engine_s() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    flags = {flag for _, flag in doctor.GPU_LIBRARIES.values()}
    assert {"-DGGML_CUDA=ON", "-DGGML_METAL=ON"} <= flags
    assert all(flag in flags for flag in re.findall(r"-DGGML_\w+=ON", readme))


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not" / "yet"
    check = doctor.disk("kept files", folder)
    assert str(folder) in check.found and not folder.exists()
    monkeypatch.setattr(doctor, "LITTLE_DISK", shutil.disk_usage(tmp_path).total + 1)
    little = doctor.disk("kept files", folder)
    assert little.status == "warn" and "LLMKIT_HOME" in little.remedy


@pytest.mark.parametrize("home", ["file", "file/below", "n" * 300])
def test_a_home_that_cannot_be_a_folder(tmp_path: Path, home: str) -> None:
    (tmp_path / "file").touch()
    check = doctor.disk("kept files", tmp_path / home)
    assert check.status == "warn" and "LLMKIT_HOME" in check.remedy


def test_the_current_folder_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    assert doctor.disk("this folder", Path()).status == "warn"
    assert "free" in doctor.disk("kept files", tmp_path).found
