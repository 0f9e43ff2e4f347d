"""Devices that people run models on, one row each: memory, bandwidth, TOPS and what they mean, and who says so.

Looked up, not measured. Memory is sold in GB of 2^30 bytes, bandwidth in GB/s of 10^9. Where a maker gives transfers
and the width of the bus, the row has them, and bandwidth is their product up to rounding: a test asserts it. A figure
whose source is GENERAL is common knowledge that nobody looked up here; a figure nobody knows is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
GB = 10**9

# ── sources, in words ──

APPLE = "Apple: press releases and specification pages; smaller memory sizes: general knowledge, check"
APPLE_2026 = "Apple's announcement of March 2026 as the press reported it; smallest sizes: general knowledge, check"
NVIDIA = "NVIDIA: product pages"
NVIDIA_COMPARE = "NVIDIA: the GeForce comparison page"
NVIDIA_SHEETS = "NVIDIA: data sheets"
NVIDIA_JETSON = "NVIDIA: the comparison table of Jetson modules"
GENERAL = "general knowledge, check"
ARITHMETIC = "arithmetic: transfers per second × bus width (JEDEC grades)"
BOARD_SHEET = "Raspberry Pi: product brief (type of memory); bandwidth: transfers × 32 bits"
AMD = "AMD: product page"
TURING = "derived: cores × boost clock × 32, as NVIDIA's Turing white paper counts; clocks: general knowledge, check"
AMPERE = "derived: cores × boost clock × 16, as NVIDIA's GA102 white paper counts; clocks: general knowledge, check"

# ── what share of memory a model may take ──

USABLE_RULES = {
    "metal": (
        "macOS lets the GPU have about 2/3 up to 36 GB and 3/4 above (older macOS; newer allows 74 to 84 %; "
        "iogpu.wired_limit_mb moves it)"
    ),
    "vram": "all but 1.5 GB: the driver's context and a desktop take 0.3 to 1.5 GB",
    "shared": "all but 1.5 GB: system and GPU share the memory (judgement)",
    "small": "all but 0.5 GB, for a system without a desktop (judgement)",
    "ram": "all but 2 GB for the system (judgement)",
    "phone": "about half: iOS limits what one app may take (general knowledge, check)",
    "free": "what the system says is free now",
}


# said below tables
ABOUT_TOPS = (
    "Apple does not state the precision of its TOPS (by general knowledge FP16 first, INT8 from A17 Pro and M4 on); "
    "NVIDIA's grew from INT8 dense to FP8 sparse to FP4 sparse: they compare only within a generation."
)


@dataclass(frozen=True)
class Compute:
    """Operations per second in 10^12 (`tera`), of which `unit` (TOPS, TFLOPS), by what and in which precision."""

    tera: float
    unit: str
    means: str
    source: str

    def __str__(self) -> str:
        return f"{self.tera:,.4g} {self.unit} ({self.means})"


@dataclass(frozen=True)
class Device:
    """What a model can run on. `memory`: the sizes sold in bytes, () where any can be plugged in; `bandwidth` in B/s.

    `processor` is what the engine computes on there, "gpu" or "cpu"; `usable` names a row of USABLE_RULES. `transfers`
    (millions per second) times `bus_bits` make the bandwidth. `free_nbytes` is what is free now, on this machine.
    `how` tells how the bandwidth was got: looked up, derived, measured.
    """

    name: str
    kind: str
    processor: str
    memory: tuple[int, ...]
    bandwidth: float | None
    usable: str
    source: str
    compute: tuple[Compute, ...] = ()
    aliases: tuple[str, ...] = ()
    transfers: float | None = None
    bus_bits: int | None = None
    free_nbytes: int | None = None
    how: str = "looked up"


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(word) * GIB for word in text.split())


# ── Apple ──

_ENGINE_UNSAID = "Neural Engine, Apple's own count, precision not stated"
_ENGINE_INT8 = "Neural Engine, Apple's own count, INT8 by general knowledge"


def _apple(
    name: str, sizes: str, rate: float, wires: tuple[float, int], *compute: Compute, source: str = APPLE
) -> Device:
    chip, _, cores = name.partition(" (")
    aliases = (chip,) if cores else ()
    return Device(
        name, "apple", "gpu", _sizes(sizes), rate * GB, "phone" if name.startswith("A") else "metal", source,
        compute, aliases, *wires,
    )  # fmt: skip


def _engine(tera: float, means: str = _ENGINE_UNSAID, source: str = APPLE) -> Compute:
    return Compute(tera, "TOPS", means, source)


def _fp32(tera: float) -> Compute:
    return Compute(tera, "TFLOPS", "GPU, FP32", APPLE)


_APPLE = (
    _apple("M1", "8 16", 68.25, (4266, 128), _engine(11), _fp32(2.6)),
    _apple("M1 Pro", "16 32", 200, (6400, 256), _engine(11), _fp32(5.2)),
    _apple("M1 Max", "32 64", 400, (6400, 512), _engine(11), _fp32(10.4)),
    _apple("M1 Ultra", "64 128", 800, (6400, 1024), _engine(22, source=GENERAL), _fp32(21)),
    _apple("M2", "8 16 24", 100, (6400, 128), _engine(15.8), _fp32(3.6)),
    _apple("M2 Pro", "16 32", 200, (6400, 256), _engine(15.8)),
    _apple("M2 Max", "32 64 96", 400, (6400, 512), _engine(15.8)),
    _apple("M2 Ultra", "64 128 192", 800, (6400, 1024), _engine(31.6)),
    _apple("M3", "8 16 24", 100, (6400, 128), _engine(18)),
    _apple("M3 Pro", "18 36", 150, (6400, 192), _engine(18)),
    _apple("M3 Max (14-core CPU)", "36 96", 300, (6400, 384), _engine(18)),
    _apple("M3 Max (16-core CPU)", "48 64 128", 400, (6400, 512), _engine(18)),
    _apple("M3 Ultra", "96 256 512", 819, (6400, 1024), _engine(36, source=GENERAL)),
    _apple("M4", "8 16 24 32", 120, (7500, 128), _engine(38, _ENGINE_INT8)),
    _apple("M4 Pro", "24 48 64", 273, (8533, 256), _engine(38, _ENGINE_INT8)),
    _apple("M4 Max (14-core CPU)", "36", 410, (8533, 384), _engine(38, _ENGINE_INT8)),
    _apple("M4 Max (16-core CPU)", "48 64 128", 546, (8533, 512), _engine(38, _ENGINE_INT8)),
    _apple("M5", "16 24 32", 153, (9600, 128)),  # Apple gives no TOPS from here on
    _apple("M5 Pro", "24 48 64", 307, (9600, 256), source=APPLE_2026),
    _apple("M5 Max (32-core GPU)", "36", 460, (9600, 384), source=APPLE_2026),
    _apple("M5 Max (40-core GPU)", "48 64 128", 614, (9600, 512), source=APPLE_2026),
    _apple("A16", "6", 51.2, (6400, 64), _engine(17), source=GENERAL),
    _apple("A17 Pro", "8", 51.2, (6400, 64), _engine(35, _ENGINE_INT8), source=GENERAL),
    _apple("A18", "8", 60, (7500, 64), _engine(35, _ENGINE_INT8), source=GENERAL),
    _apple("A18 Pro", "8", 60, (7500, 64), _engine(35, _ENGINE_INT8), source=GENERAL),
)


# ── NVIDIA cards ──


def _rtx(name: str, sizes: str, gbps: float, bus: int, compute: Compute, alias: str = "") -> Device:
    """A GeForce card: `gbps` billion bits per second on each of `bus` wires."""
    aliases = tuple(filter(None, (name.removeprefix("RTX "), alias, alias.removeprefix("RTX "))))
    rate = gbps * bus / 8 * GB
    return Device(name, "gpu", "gpu", _sizes(sizes), rate, "vram", NVIDIA, (compute,), aliases, gbps * 1000, bus)


def _turing(cores: int, ghz: float) -> Compute:
    return Compute(round(cores * ghz * 32 / 1000, 1), "TOPS", "tensor cores, INT8, dense", TURING)


def _ampere(cores: int, ghz: float) -> Compute:
    return Compute(round(cores * ghz * 16 / 1000, 1), "TOPS", "tensor cores, INT8, dense", AMPERE)


def _ada(tera: float) -> Compute:
    return Compute(tera, "TOPS", "tensor cores, FP8 or INT8, sparse: half of it dense", NVIDIA_COMPARE)


def _blackwell(tera: float) -> Compute:
    return Compute(tera, "TOPS", "tensor cores, FP4, sparse: half of it dense", NVIDIA_COMPARE)


_RTX = (
    _rtx("RTX 2060", "6 12", 14, 192, _turing(1920, 1.680)),
    _rtx("RTX 2060 Super", "8", 14, 256, _turing(2176, 1.650)),
    _rtx("RTX 2070", "8", 14, 256, _turing(2304, 1.620)),
    _rtx("RTX 2070 Super", "8", 14, 256, _turing(2560, 1.770)),
    _rtx("RTX 2080", "8", 14, 256, _turing(2944, 1.710)),
    _rtx("RTX 2080 Super", "8", 15.5, 256, _turing(3072, 1.815)),
    _rtx("RTX 2080 Ti", "11", 14, 352, _turing(4352, 1.545)),
    _rtx("RTX 3050 6GB", "6", 14, 96, _ampere(2304, 1.470), alias="RTX 3050"),
    _rtx("RTX 3050 8GB", "8", 14, 128, _ampere(2560, 1.777), alias="RTX 3050"),
    _rtx("RTX 3060 8GB", "8", 15, 128, _ampere(3584, 1.777)),
    _rtx("RTX 3060", "12", 15, 192, _ampere(3584, 1.777)),
    _rtx("RTX 3060 Ti", "8", 14, 256, _ampere(4864, 1.665)),
    _rtx("RTX 3070", "8", 14, 256, _ampere(5888, 1.725)),
    _rtx("RTX 3070 Ti", "8", 19, 256, _ampere(6144, 1.770)),
    _rtx("RTX 3080", "10", 19, 320, _ampere(8704, 1.710)),
    _rtx("RTX 3080 12GB", "12", 19, 384, _ampere(8960, 1.710)),
    _rtx("RTX 3080 Ti", "12", 19, 384, _ampere(10240, 1.665)),
    _rtx("RTX 3090", "24", 19.5, 384, _ampere(10496, 1.695)),
    _rtx("RTX 3090 Ti", "24", 21, 384, _ampere(10752, 1.860)),
    _rtx("RTX 4060", "8", 17, 128, _ada(242)),
    _rtx("RTX 4060 Ti", "8 16", 18, 128, _ada(353)),
    _rtx("RTX 4070", "12", 21, 192, _ada(466)),
    _rtx("RTX 4070 Super", "12", 21, 192, _ada(568)),
    _rtx("RTX 4070 Ti", "12", 21, 192, _ada(641)),
    _rtx("RTX 4070 Ti Super", "16", 21, 256, _ada(706)),
    _rtx("RTX 4080", "16", 22.4, 256, _ada(780)),
    _rtx("RTX 4080 Super", "16", 23, 256, _ada(836)),
    _rtx("RTX 4090", "24", 21, 384, _ada(1321)),
    _rtx("RTX 5050", "8", 20, 128, _blackwell(421)),
    _rtx("RTX 5060", "8", 28, 128, _blackwell(614)),
    _rtx("RTX 5060 Ti", "8 16", 28, 128, _blackwell(759)),
    _rtx("RTX 5070", "12", 28, 192, _blackwell(988)),
    _rtx("RTX 5070 Ti", "16", 28, 256, _blackwell(1406)),
    _rtx("RTX 5080", "16", 30, 256, _blackwell(1801)),
    _rtx("RTX 5090", "32", 28, 512, _blackwell(3352)),
)


def _server(
    name: str, size: int, rate: float, int8: float, *aliases: str, wires: tuple[float, int] | None = None
) -> Device:
    """A card for servers: HBM ones have no round transfer rate, so `wires` is left out."""
    compute = Compute(int8, "TOPS", "tensor cores, INT8, dense; sparse: twice", NVIDIA_SHEETS)
    transfers, bus = wires or (None, None)
    return Device(
        name, "gpu", "gpu", (size * GIB,), rate * GB, "vram", NVIDIA_SHEETS, (compute,), aliases, transfers, bus
    )


_SERVER = (
    _server("A10", 24, 600, 250, wires=(12500, 384)),
    _server("L4", 24, 300, 242.5, wires=(12500, 192)),
    _server("L40S", 48, 864, 733, wires=(18000, 384)),
    _server("A100 40GB", 40, 1555, 624, "A100", "A100 SXM4", "A100 PCIe", "A100 SXM"),
    _server("A100 80GB PCIe", 80, 1935, 624, "A100", "A100 PCIe", "A100 PCIe 80GB"),
    _server("A100 80GB SXM", 80, 2039, 624, "A100", "A100 SXM", "A100 SXM4"),
    _server("H100 PCIe", 80, 2000, 1513, "H100", "H100 80GB PCIe"),
    _server("H100 SXM", 80, 3350, 1979, "H100", "H100 SXM5", "H100 HBM3"),
    _server("H200", 141, 4800, 1979, "H200 SXM"),
)


# ── boards ──


def _jetson(name: str, sizes: str, rate: float, wires: tuple[float, int], compute: Compute, *aliases: str) -> Device:
    return Device(
        f"Jetson {name}", "board", "gpu", _sizes(sizes), rate * GB, "shared", NVIDIA_JETSON, (compute,),
        (name, *aliases) if name not in ("Nano", "TX2") else aliases, *wires,
    )  # fmt: skip


def _tops(tera: float, means: str, unit: str = "TOPS") -> Compute:
    return Compute(tera, unit, means, NVIDIA_JETSON)


_SPARSE_ALL = "INT8, sparse, tensor cores and DLA together"
_DENSE_ALL = "INT8, dense, tensor cores and DLA together"
_SPARSE = "INT8, sparse, tensor cores"

_BOARDS = (
    _jetson("Nano", "4", 25.6, (3200, 64), _tops(0.472, "GPU, FP16", "TFLOPS")),
    _jetson("TX2", "8", 59.7, (3733, 128), _tops(1.33, "GPU, FP16", "TFLOPS")),
    _jetson("Xavier NX", "8 16", 59.7, (3733, 128), _tops(21, _DENSE_ALL)),
    _jetson("AGX Xavier", "32 64", 136.5, (4266, 256), _tops(32, _DENSE_ALL), "Xavier"),
    _jetson("Orin Nano 4GB", "4", 34, (4266, 64), _tops(20, _SPARSE), "Orin Nano", "Jetson Orin Nano"),
    _jetson("Orin Nano 8GB", "8", 68, (4266, 128), _tops(40, _SPARSE), "Orin Nano", "Jetson Orin Nano"),
    _jetson("Orin Nano Super", "8", 102, (6400, 128), _tops(67, _SPARSE), "Orin Nano Super 8GB"),
    _jetson("Orin NX 8GB", "8", 102.4, (6400, 128), _tops(70, _SPARSE_ALL), "Orin NX", "Jetson Orin NX"),
    _jetson("Orin NX 16GB", "16", 102.4, (6400, 128), _tops(100, _SPARSE_ALL), "Orin NX", "Jetson Orin NX"),
    _jetson("AGX Orin 32GB", "32", 204.8, (6400, 256), _tops(200, _SPARSE_ALL), "AGX Orin", "Jetson AGX Orin"),
    _jetson("AGX Orin 64GB", "64", 204.8, (6400, 256), _tops(275, _SPARSE_ALL), "AGX Orin", "Jetson AGX Orin"),
    Device(
        "Raspberry Pi 4", "board", "cpu", _sizes("1 2 4 8"), 12.8 * GB, "small", BOARD_SHEET,
        aliases=("Pi 4", "RPi 4", "Raspberry Pi 4 Model B", "Pi4B"), transfers=3200, bus_bits=32,
    ),
    Device(
        "Raspberry Pi 5", "board", "cpu", _sizes("2 4 8 16"), 17.07 * GB, "small", BOARD_SHEET,
        aliases=("Pi 5", "RPi 5", "Raspberry Pi 5 Model B"), transfers=4267, bus_bits=32,
    ),
)  # fmt: skip


# ── processors, by their memory ──


def _cpu(name: str, transfers: float, bus_bits: int, *aliases: str) -> Device:
    rate = transfers * bus_bits / 8 * 10**6
    return Device(
        name, "cpu", "cpu", (), rate, "ram", ARITHMETIC, (), aliases, transfers, bus_bits, how="derived"
    )  # fmt: skip


_CPUS = (
    _cpu("DDR4-2666, 2 channels", 2666, 128, "DDR4-2666"),
    _cpu("DDR4-3200, 2 channels", 3200, 128, "DDR4-3200", "DDR4"),
    _cpu("DDR5-4800, 2 channels", 4800, 128, "DDR5-4800", "DDR5"),
    _cpu("DDR5-5600, 2 channels", 5600, 128, "DDR5-5600"),
    _cpu("DDR5-6400, 2 channels", 6400, 128, "DDR5-6400"),
    _cpu("LPDDR5X-7500, 128 bits", 7500, 128, "LPDDR5X-7500", "LPDDR5X"),
    _cpu("LPDDR5X-8533, 128 bits", 8533, 128, "LPDDR5X-8533"),
    _cpu("DDR4-3200, 8 channels (server)", 3200, 512, "DDR4-3200, 8 channels"),
    _cpu("DDR5-4800, 8 channels (server)", 4800, 512, "DDR5-4800, 8 channels"),
    _cpu("DDR5-4800, 12 channels (server)", 4800, 768, "DDR5-4800, 12 channels"),
    Device(
        "Strix Halo (Ryzen AI Max)", "cpu", "cpu", _sizes("32 64 96 128"), 256 * GB, "ram", AMD,
        (Compute(50, "TOPS", "NPU, INT8", AMD),),
        ("Strix Halo", "Ryzen AI Max", "Ryzen AI Max+ 395", "LPDDR5X-8000, 256 bits"), 8000, 256,
    ),
)  # fmt: skip

DEVICES: tuple[Device, ...] = (*_APPLE, *_RTX, *_SERVER, *_BOARDS, *_CPUS)
