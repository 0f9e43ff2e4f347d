"""The picture: a whole PNG or SVG with every label in it, or an error and no file."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from conftest import cli_environment
from llmkit.errors import LlmkitError, MissingDependency, Unsupported
from llmkit.memory import plot
from llmkit.memory.plot import Limit, Line

GIB = 1 << 30
CONTEXTS = (512, 2048, 8192, 32768, 131072)


def line(name: str, gibibytes: float) -> Line:
    return Line(name, CONTEXTS, tuple(int((gibibytes + context / 32768) * GIB) for context in CONTEXTS))


LINES = [line("F16", 14), line("Q8_0", 8), line("Q4_K_M", 5), line("Q2_K", 3)]


def texts(path: Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture(autouse=True)
def _matplotlib() -> None:
    pytest.importorskip("matplotlib")


def test_an_svg_has_its_words(tmp_path: Path) -> None:
    path = tmp_path / "memory.svg"
    plot.draw(path, "Llama 2 7B: memory", LINES, limit=Limit("RTX 3060", 10 * GIB), footnote="measured by the engine")
    found = texts(path)
    assert {"F16", "Q8_0", "Q4_K_M", "Q2_K"} <= set(found)
    assert {"Llama 2 7B: memory", "RTX 3060: 10.0 GiB", "measured by the engine"} <= set(found)
    assert {"context (tokens)", "memory needed (GiB)", "512", "8k", "128k"} <= set(found)


def test_a_png_is_whole(tmp_path: Path) -> None:
    """Every chunk's checksum, the size, and rows enough to fill it."""
    path = tmp_path / "memory.PNG"
    plot.draw(path, "a model", LINES)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, kinds, pixels = 8, [], b""
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        body = data[position + 8 : position + 8 + size]
        assert zlib.crc32(kind + body) == struct.unpack_from(">I", data, position + 8 + size)[0]
        kinds.append(kind)
        pixels += body if kind == b"IDAT" else b""
        position += 12 + size
    width, height, _, colour = struct.unpack(">IIBB", data[16:26])
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND" and (width, height) == (1440, 900)
    rows = zlib.decompress(pixels)
    assert len(rows) == height * (1 + width * {2: 3, 6: 4}[colour])
    assert len(set(rows)) > 50  # something is drawn


def test_the_same_figures_give_the_same_picture(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        plot.draw(tmp_path / name, "a model", LINES, limit=Limit("a card", 10 * GIB))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_names_do_not_lie_upon_each_other(tmp_path: Path) -> None:
    """Seven quants that end within one GiB of a hundred: their names stand in order, a line's height apart."""
    close = [Line(f"quant{index}", (512, 8192), (50 * GIB, 100 * GIB - index * GIB // 7)) for index in range(7)]
    path = tmp_path / "close.svg"
    plot.draw(path, "a model", close)
    places = {
        match[2]: float(match[1])
        for match in re.finditer(r"<text[^>]*translate\([\d.]+ ([\d.]+)\)[^>]*>(quant\d)<", path.read_text())
    } or {
        match[2]: float(match[1]) for match in re.finditer(r'<text[^>]* y="([\d.]+)"[^>]*>(quant\d)<', path.read_text())
    }
    heights = [places[f"quant{index}"] for index in range(7)]
    assert all(below - above >= 9 for above, below in zip(heights, heights[1:], strict=False)), heights


def test_a_crowd_is_thinned_and_says_so(tmp_path: Path) -> None:
    names = [f"Q{index}" for index in range(12)]
    path = tmp_path / "crowd.svg"
    plot.draw(path, "a model", [line(name, 40 - index / 10) for index, name in enumerate(names)])
    found = texts(path)
    drawn = [name for name in names if name in found]
    assert {"Q0", "Q11"} <= set(drawn) and len(drawn) < 12
    footnote = " ".join(found[found.index(next(text for text in found if "too close" in text)) :])
    assert all(re.search(rf"\b{name}\b", footnote) for name in names if name not in drawn)


def test_a_small_model_is_drawn_in_mebibytes(tmp_path: Path) -> None:
    small = [Line("Q8_0", (512, 2048), (150 << 20, 200 << 20))]
    plot.draw(tmp_path / "small.svg", "tiny", small, limit=Limit("a machine", 22 * GIB))
    found = texts(tmp_path / "small.svg")
    assert "memory needed (MiB)" in found and "a machine: 22.0 GiB, above this picture" in found


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    """Mathematics, markup, control characters and letters no font has are harmless."""
    plot.draw(tmp_path / "odd.svg", "a$b_c$ <b>&\x1b[0m 模型", LINES, limit=Limit("$1 card", 9 * GIB))
    found = texts(tmp_path / "odd.svg")
    assert "a$b_c$ <b>&?[0m 模型" in found and "$1 card: 9.0 GiB" in found
    plot.draw(tmp_path / "odd.png", "模型\U0010ffff", LINES)


@pytest.mark.parametrize("name", ["memory.jpg", "memory", "memory.pdf"])
def test_other_formats_are_refused(name: str, tmp_path: Path) -> None:
    for refusing in (plot.check, lambda path: plot.draw(path, "a model", LINES)):
        with pytest.raises(Unsupported, match="png or svg"):
            refusing(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LlmkitError, match="nothing to draw"):
        plot.draw(tmp_path / "none.png", "a model", [Line("Q8_0", (512,), (GIB,))])
    assert not list(tmp_path.iterdir())


def test_what_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(LlmkitError, match="cannot be written"):
        plot.draw(tmp_path / "missing" / "memory.png", "a model", LINES)
    before = tmp_path / "memory.svg"
    before.write_text("old")
    with pytest.raises(TypeError):
        plot.draw(before, "a model", LINES, limit=Limit("a card", None))  # type: ignore[arg-type]
    assert before.read_text() == "old" and list(tmp_path.iterdir()) == [before]


def test_without_matplotlib_pip_is_named() -> None:
    """In a process where it cannot be imported; llmkit's own module can be."""
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\n"
        "from llmkit.errors import MissingDependency\n"
        "from llmkit.memory import plot\n"
        "try: plot.check(Path('x.png'))\n"
        "except MissingDependency as error: print(error.hint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=cli_environment(), timeout=60
    )
    assert done.stdout.strip() == "pip install 'llmkit[plot]'", done.stderr
    assert issubclass(MissingDependency, LlmkitError)
