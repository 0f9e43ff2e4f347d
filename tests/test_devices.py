"""Devices: the rows, finding them by name, what a model may have, this machine, the verb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit import engine
from llmkit.errors import LlmkitError, Unsupported
from llmkit.memory import devices
from llmkit.memory.devices import bandwidth, machine
from llmkit.memory.devices.device_table import DEVICES, GB, GENERAL, GIB, USABLE_RULES, Device

# ── the rows ──


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_row_is_plausible_and_has_sources(device: Device) -> None:
    assert device.kind in ("apple", "gpu", "board", "cpu") and device.processor in ("gpu", "cpu")
    assert device.source and all(each.source and each.means for each in device.compute)
    assert device.bandwidth is not None and 10 * GB < device.bandwidth < 10_000 * GB
    assert device.usable in USABLE_RULES and device.how in ("looked up", "derived")
    assert all(GIB <= size <= 512 * GIB for size in device.memory) and list(device.memory) == sorted(device.memory)
    for each in device.compute:
        assert 0.1 < each.tera < 10_000 and each.unit in ("TOPS", "TFLOPS")


@pytest.mark.parametrize("device", [each for each in DEVICES if each.transfers], ids=lambda device: device.name)
def test_bandwidth_is_transfers_times_width(device: Device) -> None:
    """Makers round: Apple's 400 GB/s are 6400 MT/s on 512 bits, 409.6."""
    assert device.transfers and device.bus_bits and device.bandwidth
    assert device.bandwidth == pytest.approx(device.transfers * 1e6 * device.bus_bits / 8, rel=0.025)


# GB/s as makers publish them
PUBLISHED = {
    "M1": 68.25, "M1 Ultra": 800, "M3 Pro": 150, "M4 Pro": 273, "M5": 153, "RTX 2080 Ti": 616, "RTX 3060": 360,
    "RTX 3080": 760.3, "RTX 3090": 936.2, "RTX 4060 Ti": 288, "RTX 4090": 1008, "RTX 5080": 960, "RTX 5090": 1792,
    "A100 80GB SXM": 2039, "H100 SXM": 3350, "H200": 4800, "L40S": 864, "Jetson Orin NX 16GB": 102.4,
    "Jetson AGX Orin 64GB": 204.8, "DDR5-6400": 102.4, "Strix Halo": 256,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_bandwidth_as_published(name: str) -> None:
    assert devices.find(name).bandwidth == pytest.approx(PUBLISHED[name] * GB, rel=0.001)


def test_all_that_was_asked_for_is_there() -> None:
    names = [f"M{n}{kind}" for n in range(1, 6) for kind in ("", " Pro", " Max")]
    names += ["M1 Ultra", "M2 Ultra", "M3 Ultra", "A16", "A17 Pro", "A18", "A18 Pro"]
    names += [f"RTX {n}{kind}" for n in (20, 30, 40, 50) for kind in ("60", "70", "80")]
    names += ["Jetson Nano", "Jetson Xavier NX", "Jetson Orin Nano", "Jetson AGX Orin", "Pi 4", "Pi 5", "A10", "L4"]
    assert [name for name in names if devices.find(name).bandwidth is None] == []


def test_names_are_told_apart() -> None:
    assert len({each.name for each in DEVICES}) == len(DEVICES)


def test_recalled_figures_are_marked() -> None:
    assert devices.find("A18").source == GENERAL
    assert devices.find("M1 Ultra").compute[0].source == GENERAL


def test_the_two_figures_of_one_m1() -> None:
    """11 and 2.6 are in circulation: one counts the Neural Engine, the other the GPU."""
    found = {each.tera: each for each in devices.find("M1").compute}
    assert found[11].unit == "TOPS" and "Neural Engine" in found[11].means
    assert found[2.6].unit == "TFLOPS" and "GPU" in found[2.6].means and "FP32" in found[2.6].means


# ── by name ──

SPELLINGS = {
    "m1max": "M1 Max", "M1 Max": "M1 Max", "m1-max": "M1 Max", "Apple M1 Max": "M1 Max", "APPLE_M1_MAX": "M1 Max",
    "RTX 4090": "RTX 4090", "rtx4090": "RTX 4090", "rtx4090-24gb": "RTX 4090", "4090": "RTX 4090",
    "NVIDIA GeForce RTX 4090": "RTX 4090", "rtx 4070 ti super": "RTX 4070 Ti Super", "h100 sxm": "H100 SXM",
    "NVIDIA H100 80GB HBM3": "H100 SXM", "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA A100-SXM4-80GB": "A100 80GB SXM",
    "NVIDIA A100-PCIE-40GB": "A100 40GB", "NVIDIA A100 80GB PCIe": "A100 80GB PCIe", "rtx 3060 12 GB": "RTX 3060",
    "rtx 3060 8gb": "RTX 3060 8GB", "RTX3080 12GB": "RTX 3080 12GB", "M3 Max 64GB": "M3 Max (16-core CPU)",
    "m3max96gb": "M3 Max (14-core CPU)", "Orin Nano 8GB": "Jetson Orin Nano 8GB", "rpi 5": "Raspberry Pi 5",
    "raspberrypi5": "Raspberry Pi 5", "ddr5-5600 64gb": "DDR5-5600, 2 channels", "A17 Pro": "A17 Pro",
    "A16 Bionic": "A16", "Strix Halo 128GB": "Strix Halo (Ryzen AI Max)", "NVIDIA Jetson Orin Nano Developer Kit 8GB":
    "Jetson Orin Nano 8GB",
}  # fmt: skip


@pytest.mark.parametrize("text", SPELLINGS)
def test_spellings(text: str) -> None:
    assert devices.find(text).name == SPELLINGS[text]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_name_finds_its_own_row(device: Device) -> None:
    assert devices.find(device.name) == device
    for size in device.memory:
        found = devices.find(f"{device.name} {size // GIB} GB")
        assert (found.name, found.memory) == (device.name, (size,))


def test_a_size_chooses_and_is_kept() -> None:
    assert devices.find("M2 Max").memory == (32 * GIB, 64 * GIB, 96 * GIB)
    assert devices.find("M2 Max 64GB").memory == (64 * GIB,)
    assert devices.find("DDR4-3200 48 GB").memory == (48 * GIB,)


def test_a_name_of_several_variants_is_the_slowest() -> None:
    assert devices.find("M3 Max").bandwidth == 300 * GB
    assert devices.find("H100").name == "H100 PCIe"


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(Unsupported, match="rtx4099") as caught:
        devices.find("rtx4099")
    assert "RTX 4090" in str(caught.value.hint)
    with pytest.raises(Unsupported) as caught:
        devices.find("M11 Max 64GB")
    assert "M1 Max" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["", "  ", "-", "xyzzy", "64GB", "RTX 4090 Laptop GPU", "M1 Max 64GB extra"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(Unsupported):
        devices.find(name)


def test_sizes_that_are_not_sold_are_refused_with_those_that_are() -> None:
    with pytest.raises(Unsupported, match="20 GB") as caught:
        devices.find("M2 Max 20GB")
    assert "32, 64, 96" in str(caught.value.hint)


# ── what a model may have ──


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [("M1 16GB", 11453.25), ("M2 24GB", 17179.87), ("M1 Max 64GB", 51539.6), ("M4 Max 128GB", 103079.2)],
)
def test_metal_gives_what_logs_show(name: str, megabytes: float) -> None:
    """recommendedMaxWorkingSetSize as llama.cpp's logs were published, in decimal MB."""
    assert devices.usable_nbytes(devices.find(name)) == pytest.approx(megabytes * 1e6, rel=1e-4)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_a_model_never_gets_all(device: Device) -> None:
    for size in device.memory or (16 * GIB,):
        assert 0 < devices.usable_nbytes(device, size) < size
    assert devices.usable_rule(device)


def test_memory_that_can_be_plugged_in_must_be_named() -> None:
    with pytest.raises(LlmkitError, match="how much memory"):
        devices.usable_nbytes(devices.find("DDR5-5600"))
    assert devices.usable_nbytes(devices.find("DDR5-5600 32GB")) == 32 * GIB - 2 * GB


def test_all_devices_wait_for_memory() -> None:
    """Decoding needs 2 operations for each weight, at most 8 for a byte (2-bit quants): all can do more."""
    found = devices.fewest_operations(DEVICES)
    assert found and found[2] > 8


# ── this machine ──


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc/meminfo")
def test_memory_is_what_the_system_says() -> None:
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = int(told["MemTotal"].split()[0]) * 1024
    found = machine.ram()
    assert found.total == (total if found.limit is None else min(total, found.limit))
    assert found.available is not None and 0 < found.available <= found.total


def _group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(text)


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    """Cached files are no use: they make room. A group without a limit, or out of sight, is passed over."""
    _group(tmp_path, memory_dot_max="max", memory_dot_current="9", memory_dot_stat="file 1\n")
    _group(tmp_path / "a", memory_dot_max="1000", memory_dot_current="600", memory_dot_stat="anon 300\nfile 250\n")
    _group(tmp_path / "a" / "b", memory_dot_max="5000", memory_dot_current="100", memory_dot_stat="file 0\n")
    names = ("memory.max", "memory.current", "file")
    assert sorted(machine._limits(tmp_path, "/a/b", names)) == [(1000, 650), (5000, 4900)]
    assert machine._limits(tmp_path, "/", names) == []
    assert machine._limits(tmp_path, "/../elsewhere", names) == []


def test_this_machine_is_a_device() -> None:
    here = devices.this_machine()
    assert here.cpu.name.endswith(machine.board_name() or machine.cpu_name())
    assert here.cpu.how == "measured" and here.measured and here.cpu.bandwidth == here.measured.nbytes_per_second
    assert here.cpu.memory == (here.ram.total,)
    assert 0 < devices.usable_nbytes(here.cpu) <= here.ram.total
    seen = [each for each in engine.load().devices() if "gpu" in each.kind]
    assert [each.memory for each in here.gpus] == [(each.total_nbytes,) for each in seen]
    assert [devices.find(name).name for name in ("this", "this machine")] == [here.best.name] * 2


def test_gpus_are_known_by_the_names_the_engine_gives() -> None:
    ram = machine.Ram(64 * GIB, None, None)
    card = devices._gpu(machine.Gpu("CUDA0", "NVIDIA GeForce RTX 3080", 11 * GIB, 12 * GIB - 10**8), ram)
    assert card.bandwidth == 912 * GB and devices.usable_nbytes(card) == 11 * GIB  # not the card with 10 GB
    chip = devices._gpu(machine.Gpu("Metal", "Apple M3 Max", 48 * GIB, 48 * GIB), ram)
    assert chip.bandwidth == 400 * GB and chip.processor == "gpu"
    other = devices._gpu(machine.Gpu("CUDA0", "NVIDIA GeForce RTX 4090 Laptop GPU", 15 * GIB, 16 * GIB), ram)
    assert other.bandwidth is None and "not known" in other.source


def test_an_engine_that_dies_costs_only_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies() -> None:
        engine.run_in_child(function="os:abort", arguments={}, timeout=60)

    monkeypatch.setattr(machine, "gpus", dies)
    here = devices.this_machine(measure=False)
    assert here.gpus == () and here.best == here.cpu and here.cpu.bandwidth is None
    assert here.remarks[0].endswith("died of SIGABRT")


# ── bandwidth ──


def test_bandwidth_is_measured_and_plausible() -> None:
    found = bandwidth.measure()
    assert 0.5e9 < found.nbytes_per_second < 3000e9
    assert 1 <= found.threads <= (os.cpu_count() or 1) and found.passes >= 1
    assert found.buffer_nbytes >= 16 << 20
    assert found.cpu == machine.cpu_name()
    flatters = found.buffer_nbytes < 2 * found.cache_nbytes
    assert ("flatter" in found.remark) == flatters
    assert ("busy" in found.remark) == (found.load > found.cpus / 4)


def test_bandwidth_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bandwidth, "_TOUCHING", 0.05)
    monkeypatch.setattr(bandwidth, "_READING", 0.05)
    first = bandwidth.of_this_machine()
    assert bandwidth.of_this_machine() == first
    (path,) = (tmp_path / "home").iterdir()
    for broken in ("", "{}", '{"cpu": 3}', "[1]", path.read_text().replace(str(first.nbytes_per_second), "-1")):
        path.write_text(broken)
        assert bandwidth.of_this_machine().nbytes_per_second > 0
        assert json.loads(path.read_text())["cpu"] == first.cpu
    path.write_text(path.read_text().replace(first.date, "2001-01-01"))
    assert bandwidth.of_this_machine().date == "2001-01-01"
    assert bandwidth.of_this_machine(again=True).date != "2001-01-01"


def test_a_home_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path / "file"))
    assert bandwidth.of_this_machine().nbytes_per_second > 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks /sys")
def test_the_last_level_cache_is_the_systems(tmp_path: Path) -> None:
    largest = 0
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        text = (folder / "size").read_text().strip()
        largest = max(largest, int(text.rstrip("KM")) << (20 if text.endswith("M") else 10))
    assert machine.last_level_cache() >= largest


# ── the verb ──


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    from conftest import cli_environment

    code = "import sys; from llmkit.cli import main; main.VERBS['devices'] = ''; sys.exit(main.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, "devices", *words], capture_output=True, encoding="utf-8", env=cli_environment()
    )


def test_the_table_begins_with_this_machine_and_names_its_sources() -> None:
    done = _run()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith(devices.THIS) and "measured" in lines[1]
    assert all(any(line.startswith(device.name) for line in lines) for device in DEVICES)
    cited = {line.split("]")[0] + "]" for line in lines if line.startswith("[")}
    assert {f"[{mark}]" for line in lines for mark in line.replace("]", "[").split("[") if mark.isdigit()} <= cited
    assert "Decoding follows bandwidth, not TOPS" in done.stdout


def test_named_devices_only() -> None:
    done = _run("m1max", "rtx 4090", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [each["name"] for each in found["devices"]] == ["M1 Max", "RTX 4090"]
    assert found["devices"][0]["usable_nbytes"][str(64 * GIB)] == 48 * GIB
    assert found["this_machine"] is None


def test_unknown_devices_are_errors() -> None:
    done = _run("m11max")
    assert done.returncode == 1 and "M1 Max" in done.stderr and not done.stdout
    assert _run("--compare", "m1").returncode == 1
    assert _run("m1", "--model", "x").returncode == 1


def test_a_comparison_says_what_fits_and_a_range(smollm2_gguf: Path) -> None:
    names = ("this", "Raspberry Pi 4", "RTX 4090", "DDR5-5600 16GB")
    done = _run("--compare", *names, "--model", str(smollm2_gguf), "--context", "2048", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    need = found["need"]
    # the engine's own figures for this file (92.10 MiB of weights, 45 MiB of cache)
    assert need["weight_nbytes"] == pytest.approx(92.10 * 2**20, rel=1e-3)
    assert need["cache_nbytes"] == 45 << 20 and need["context"] == 2048
    assert need["read_nbytes"] == need["traffic"]["weight_nbytes"] + need["cache_nbytes"]
    # 30 layers, 9 heads of 64, 2048 cells; 2 operations a weight
    assert need["operations"] == 2 * 134_515_008 + 30 * 4 * 2048 * 9 * 64
    assert found["nbytes"] == need["weight_nbytes"] + need["cache_nbytes"] + need["other_nbytes"]
    rows = found["devices"]
    assert [row["memory_nbytes"] // GIB for row in rows if row["device"] == "Raspberry Pi 4"] == [1, 2, 4, 8]
    for row in rows:
        assert row["fits"] == (found["nbytes"] <= row["usable_nbytes"])
        assert 0 < row["speed"]["low"] < row["speed"]["high"] <= row["speed"]["ceiling"]
    card = next(row for row in rows if row["device"] == "RTX 4090")
    assert card["speed"]["ceiling"] == pytest.approx(1008e9 / need["read_nbytes"])


def test_what_does_not_fit_has_no_speed(smollm2_gguf: Path) -> None:
    done = _run("--compare", "Raspberry Pi 4 1GB", "--model", str(smollm2_gguf), "--context", "65536")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("Raspberry Pi 4"))
    assert "no, " in row and "short" in row and row.rstrip().endswith("-")
