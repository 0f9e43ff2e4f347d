"""llmkit inspect tokens, xray, embeddings, lens, attention, layers: what is printed, as JSON and for people."""

from __future__ import annotations

import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from conftest import Cli, GgufOf, TinyCheckpoint
from llmkit.cli import output
from llmkit.cli.inspect import views
from llmkit.cli.main import main
from llmkit.inspection.pictures import Cell, HeatMap

FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> Path:
    """Two layers, four heads, and a chat template."""
    return gguf_of(tiny_checkpoint("qwen3"), "f32")


def as_json(cli: Cli, *words: object) -> Any:
    done = cli("inspect", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tokens_of_one_model(cli: Cli, smollm2_gguf: Path) -> None:
    done = cli("inspect", "tokens", FRANCE, "--model", smollm2_gguf)
    assert done.returncode == 0, done.stderr
    assert "The│␣capital│␣of│␣France│␣is" in done.stdout
    assert re.search(r"3  4649  ␣France  +20 46 72 61 6e 63 65 +normal +14–20", done.stdout)
    assert re.search(r" 5 +4.80 +4.80", done.stdout)
    assert f"next: llmkit inspect lens '{FRANCE}' --model {smollm2_gguf}" in done.stderr
    found = as_json(cli, "tokens", FRANCE, "--model", smollm2_gguf)
    assert [token["id"] for token in found[0]["tokens"]] == [504, 3575, 282, 4649, 314]
    assert found[0]["tokens"][1]["bytes"] == b" capital".hex() and found[0]["count"] == 5


def test_tokens_of_two_models_beside_each_other(cli: Cli, smollm2_gguf: Path, tiny: Path) -> None:
    done = cli("inspect", "tokens", "-", "--model", smollm2_gguf, "--model", tiny, input=f"{FRANCE}\n")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^␣?The |^The ", done.stdout, re.MULTILINE) and str(tiny) in done.stdout
    assert "24 characters, 24 bytes" in done.stdout


def test_a_terminal_is_not_driven_by_a_text(cli: Cli, tiny: Path) -> None:
    done = cli("inspect", "tokens", "a\x1b[2Jb\u202e", "--model", tiny)
    assert done.returncode == 0 and "\x1b" not in done.stdout and "\u202e" not in done.stdout
    seen = cli("inspect", "xray", "a\x1b[2Jb", "--model", tiny)
    assert seen.returncode == 0 and "\x1b" not in seen.stdout
    assert "\x1b" not in done.stderr + seen.stderr and "next:" not in done.stderr + seen.stderr


def test_what_comes_next_has_the_users_own_options(cli: Cli, tiny: Path) -> None:
    words = ("inspect", "lens", "hi 'you'", "--model", tiny, "--threads", "1", "--backend", "llamacpp", "--chat")
    shown = re.search(r"^next: llmkit (.+)$", cli(*words).stderr, re.MULTILINE)
    assert shown is not None
    given = shlex.split(shown[1])
    assert set(map(str, words)) < set(given) and "--all" in given
    assert cli(*given).returncode == 0


def test_a_text_that_is_not_utf_8_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for errors in ("strict", "surrogateescape"):  # how Python reads the input, by the locale
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8", errors))
        assert main(["inspect", "tokens", "-", "--model", str(tiny)]) == 1
        assert "not UTF-8" in capsys.readouterr().err


def test_the_xray_of_a_question(cli: Cli, smollm2_gguf: Path) -> None:
    words = ("xray", "Where is Paris?", "--model", smollm2_gguf, "--system", "Be brief.")
    done = cli("inspect", *words, "--ids")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^system 3 +Be brief\.$", done.stdout, re.MULTILINE)
    assert re.search(r"1 +user +Where is Paris\? +4 +5 +9", done.stdout)
    found = as_json(cli, *words)
    assert found["count"] == len(found["tokens"]) == sum(row["content"] + row["template"] for row in found["costs"]) + 4


def test_the_xray_of_a_file_of_messages(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]))
    found = as_json(cli, "xray", "three", "--messages", path, "--model", tiny)
    assert [row["text"] for row in found["costs"]] == ["one", "two", "three"]
    for content, message in (("{", "is not JSON"), ('{"a": 1}', "a list of messages"), ('[{"role": 3}]', "message 0")):
        path.write_text(content)
        done = cli("inspect", "xray", "--messages", path, "--model", tiny)
        assert done.returncode == 1 and message in done.stderr


def test_the_lens_on_paris(cli: Cli, smollm2_gguf: Path) -> None:
    done = cli("inspect", "lens", FRANCE, "--model", smollm2_gguf, "--token", "Paris", "--top", "2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^after 24 +0\.0000", done.stdout, re.MULTILINE)
    assert re.search(r"^after 29 +0\.7\d+ +2\.\d +␣Paris 7\d %", done.stdout, re.MULTILINE)
    assert re.search(r"^the model +0\.7\d+ +2\.\d +␣Paris 7\d % +␣the 6", done.stdout, re.MULTILINE)
    assert "approximate" in done.stdout and "␣Paris comes first from layer" in done.stdout


class Links(HTMLParser):
    """Every address an HTML page names."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what could fetch or run."""
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]


def test_the_lens_as_a_page_of_its_own(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "lens.html"
    done = cli("inspect", "lens", "<b>x</b> & <script>", "--model", tiny, "--html", path)
    assert done.returncode == 0, done.stderr
    links = Links()
    links.feed(path.read_text(encoding="utf-8"))
    assert links.found == [] and "script" not in links.tags and "b" not in links.tags and "td" in links.tags
    everywhere = cli("inspect", "lens", "a b c d", "--model", tiny, "--all")
    assert everywhere.returncode == 0 and "after 1" in everywhere.stdout and "the model" in everywhere.stdout


def test_attention_of_heads_and_of_one_head(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    done = cli("inspect", "attention", "hello there friend", "--model", tiny, "--layer", "-1")
    assert done.returncode == 0, done.stderr
    assert "Layer 1, 4 heads" in done.stdout and "first token" in done.stdout
    one = cli("inspect", "attention", "hello there", "--model", tiny, "--head", "2", "--chat")
    assert one.returncode == 0 and "percent" in one.stdout
    page = tmp_path / "attention.html"
    assert cli("inspect", "attention", "hello", "--model", tiny, "--html", page).returncode == 0
    assert page.read_text(encoding="utf-8").count("<h2>") == 4
    found = as_json(cli, "attention", "hello there", "--model", tiny, "--layer", "1")
    assert all(abs(sum(row) - 1) < 1e-4 for head in found["weights"] for row in head)


def test_layers_of_a_text_and_of_a_model(cli: Cli, tiny: Path) -> None:
    done = cli("inspect", "layers", "--model", tiny)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^0–1 +yes +yes", done.stdout, re.MULTILINE) and "logit lens: yes" in done.stdout
    text = cli("inspect", "layers", "hello", "--model", tiny)
    assert text.returncode == 0 and "enters" in text.stdout and "after 1" in text.stdout
    assert cli("inspect", "layers", "hello", "--model", tiny, "--all").returncode == 0


def test_embeddings_of_words(cli: Cli, smollm2_gguf: Path, tmp_path: Path) -> None:
    picture = tmp_path / "words.svg"
    words = ("embeddings", "--model", smollm2_gguf, "--near", "king", "--analogy", "man:king::woman")
    done = cli("inspect", *words, "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert "␣queen" in done.stdout and "Near ␣king (token 4197" in done.stdout
    texts = [each.text for each in ElementTree.parse(picture).iter() if each.tag.endswith("text")]
    assert "␣queen" in texts
    here = cli("inspect", "embeddings", "--model", smollm2_gguf, "--near", "king", "--plot", "-")
    assert here.returncode == 0 and "●␣emperor" in here.stdout


def test_embeddings_of_texts_and_of_two_files(
    cli: Cli, tiny: Path, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path
) -> None:
    other = gguf_of(tiny_checkpoint("qwen3"), "q8_0")
    lines = tmp_path / "texts.txt"
    lines.write_text("hello there\n\nhow are you\nbye\n")
    found = as_json(cli, "embeddings", "--model", tiny, "--texts", lines)
    assert found["texts"]["texts"] == ["hello there", "how are you", "bye"]
    done = cli("inspect", "embeddings", "--model", tiny, "--texts", lines, "--plot", "-")
    assert done.returncode == 0 and "note: This is a chat model" in done.stderr and "Most alike" in done.stdout
    moved = cli("inspect", "embeddings", "--model", tiny, "--against", other, "--texts", "hello there")
    assert moved.returncode == 0 and "Rows that moved most" in moved.stdout and "median" in moved.stdout
    same = cli("inspect", "embeddings", "--model", tiny, "--against", tiny)
    assert same.returncode == 0 and "Not one number differs" in same.stdout
    assert "rows of 64 numbers" in cli("inspect", "embeddings", "--model", tiny).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tokens", ""), "the text is empty"),
        (("lens", ""), "the text is empty"),
        (("xray",), "nothing to ask"),
        (("lens", "a " * 400), "too many for the lens"),
        (("attention", "a", "--layer", "7"), "layer 7: the model has 2 layers, 0 to 1"),
        (("attention", "a", "--head", "9"), "head 9: layer 0 has 4 heads"),
        (("lens", "a", "--at", "5"), "position 5 is outside the text"),
        (("lens", "a", "--all", "--at", "0"), "expected one of them"),
        (("layers", "--all"), "Give TEXT"),
        (("branches", "a", "--top-k", "3"), "--top-k is about drawing"),
        (("branches", "a", "--seed", "1"), "--seed is about drawing"),
        (("doubt", ""), "the question is empty"),
        (("embeddings", "--layers"), "--layers is about --texts"),
        (("lens", "a", "--token", "antidisestablishment"), "no single token"),
        (("embeddings", "--near", "antidisestablishment"), "no single token"),
        (("embeddings", "--analogy", "a:b"), "expected A:B::C"),
        (("embeddings", "--near", "a", "--plot", "x.png"), "pictures are SVG"),
        (("embeddings", "--plot", "x.svg"), "needs something to draw"),
        (("embeddings", "--texts", " ", "x"), "a text is empty"),
        (("embeddings", "--texts", "nofile.txt"), "'nofile.txt' is one text"),
        (("embeddings", "--texts", "-"), "the input: holds no text"),
    ],
)
def test_bad_input_is_told_in_words(
    tiny: Path,
    words: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["inspect", *words, "--model", str(tiny)]) == 1
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told


# ── heat maps ──


def test_a_heat_map_keeps_to_the_terminals_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    cells = tuple(Cell(f"東京 {number} %", number / 20) for number in range(12))
    views.heat(
        HeatMap("", "", tuple(f"{number}: x" for number in range(12)), (("after 0", cells), ("the model", cells)))
    )
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert max(output.columns(line) for line in lines) <= 40
    assert sum(line.startswith("after 0") for line in lines) > 1
    assert all(f"東京 {number} %" in "\n".join(lines) for number in range(12))
