"""scripts/record_chat.py: what was seen in the pane becomes text and a picture."""

from __future__ import annotations

import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import record_chat
from record_chat import Screen


def test_colours_of_a_line() -> None:
    line = "a \x1b[38;5;160mred\x1b[0m \x1b[1;38;5;31mbold\x1b[39mplain\x1b[90mgrey"
    assert list(record_chat.spans(line)) == [
        ("a ", "#d0d0d0", False),
        ("red", "#d70000", False),
        (" ", "#d0d0d0", False),
        ("bold", "#0087af", True),
        ("plain", "#d0d0d0", True),
        ("grey", "#808080", True),
    ]
    assert record_chat.plain(line) == "a red boldplaingrey"


def test_colours_are_the_terminal_s() -> None:
    assert record_chat.hex_colour(16) == "#000000" and record_chat.hex_colour(231) == "#ffffff"
    assert record_chat.hex_colour(160) == "#d70000" and record_chat.hex_colour(232) == "#080808"


def test_the_picture_is_xml_and_holds_the_text() -> None:
    screens = [Screen("A <title>", ("> /tokens & \x1b[38;5;31m<|im_end|>\x1b[0m", ""))]
    root = ElementTree.fromstring(record_chat.svg(screens))
    assert "".join(root.itertext()).split() == ["──", "A", "<title>", ">", "/tokens", "&", "<|im_end|>"]
    assert "```text\n> /tokens & <|im_end|>\n\n```" in record_chat.markdown(screens, "x")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_a_real_recording(smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["record_chat.py", str(smollm2_gguf), "--quick", "--out", str(tmp_path / "seen")])
    assert record_chat.main() == 0
    text = (tmp_path / "seen.md").read_text(encoding="utf-8")
    assert "> What is the capital of France?" in text and "tokens/s" in text and "sampled" in text
    assert "context ······" not in text  # the waiting prompt and its meter are left out
    picture = (tmp_path / "seen.svg").read_text(encoding="utf-8")
    assert "#0087af" in picture and "".join(ElementTree.fromstring(picture).itertext()).count("capital") > 2
