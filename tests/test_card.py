"""The model card against the files it is about, with huggingface_hub and a Markdown parser as its readers."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TinyCheckpoint
from llmkit import convert, gguf, gguf_writer, publish, quantize
from llmkit.cli import main
from llmkit.errors import InvalidModel, LlmkitError, ModelNotFound, Unsupported
from llmkit.gguf import Value, ValueType
from llmkit.publish import Release, Row, card
from llmkit.quantize import Recipe, imatrix, parse_tensor_type
from llmkit.quants import TENSOR_TYPES, quant, tensor_type

NAME = "me/tiny-GGUF"
F32 = TENSOR_TYPES["F32"]


def make(folder: Path, out: Path, *recipes: Recipe, matrix: Path | None = None, split: int | None = None) -> list[Path]:
    importance = imatrix.read(matrix) if matrix else None
    planned = quantize.plan(
        convert.open_draft(folder), list(recipes), out, imatrix=importance, split_nbytes=split
    )  # fmt: skip
    quantize.run(planned, threads=1)
    return [each.path for each in planned.outputs]


def write_imatrix(folder: Path, path: Path) -> Path:
    rows = []
    for tensor in convert.open_draft(folder).tensors:
        if len(tensor.shape) == 2:
            sums = np.linspace(1, 2, tensor.width, dtype=np.float32)
            rows += [(f"{tensor.name}.in_sum2", (1, tensor.width), F32, sums.tobytes())]
            rows += [(f"{tensor.name}.counts", (1, 1), F32, np.ones(1, np.float32).tobytes())]
    gguf_writer.write(path, {"general.type": Value.string("imatrix")}, rows)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rows_of(release: Release) -> tuple[Row, ...]:
    return publish.rows(release, {path: sha256(path) for path in release.paths})


def composed(*paths: Path, existing: str = "", remote: dict[str, str] | None = None) -> str:
    release = publish.read(paths)
    return publish.compose(release, rows_of(release), name=NAME, existing=existing, remote=remote)


def with_metadata(path: Path, target: Path, **texts: str | None) -> Path:
    """A copy with other metadata; `__` stands for a dot, None takes the key out."""
    file = gguf.read(path)
    changes = {key.replace("__", "."): text for key, text in texts.items()}
    metadata = {key: value for key, value in file.metadata.items() if changes.get(key, "") is not None}
    metadata |= {key: Value.string(text) for key, text in changes.items() if text is not None}
    data = path.read_bytes()
    rows = [
        (info.name, info.shape, info.type, data[info.offset : info.offset + info.nbytes])
        for info in file.tensors.values()
    ]
    gguf_writer.write(target, metadata, rows)
    return target


@dataclass(frozen=True)
class Shown:
    """A card as a Markdown parser sees it: cells of its table, code blocks, and raw HTML outside them."""

    table: list[list[str]]
    code: list[str]
    html: list[str]


def shown(text: str) -> Shown:
    markdown_it = pytest.importorskip("markdown_it")
    body = ModelCard(text).text
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(body)
    table: list[list[str]] = []
    for token, inside in zip(tokens, tokens[1:], strict=False):
        if token.type == "tr_open":
            table.append([])
        elif token.type in ("th_open", "td_open"):
            table[-1].append("".join(child.content for child in inside.children if child.type != "html_inline"))
    code = [token.content for token in tokens if token.type == "fence"]
    inline = [child.content for token in tokens for child in token.children or () if child.type == "html_inline"]
    return Shown(table, code, [token.content for token in tokens if token.type == "html_block"] + inline)


def front_matter(text: str) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    return found


def command_of(text: str) -> str:
    found = [block.strip() for block in shown(text).code if block.startswith(("llmkit quantize", "llmkit convert"))]
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", width=256)


@pytest.fixture(scope="module")
def quants(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("quants")
    return make(folder, out, Recipe(quant("Q4_K_M")), Recipe(quant("Q8_0")))


# ── numbers ──


def test_the_table_equals_the_files(quants: list[Path]) -> None:
    text = composed(*quants)
    head, *rows = shown(text).table
    assert head == ["Quant", "File", "Size", "Bits per weight", "Tensors by type", "Quality"]
    assert [row[0] for row in rows] == ["Q4_K_M", "Q8_0"]
    for path, row in zip(quants, rows, strict=True):
        tensors = gguf_py.GGUFReader(path).tensors
        weights = sum(int(tensor.n_elements) for tensor in tensors)
        bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / weights
        types = Counter(tensor.tensor_type.name for tensor in tensors)
        assert row[1:3] == [path.name, f"{path.stat().st_size / 1e6:.2f} MB"]
        assert row[3] == f"{bits:.2f}"
        assert sorted(row[4].split(", ")) == sorted(f"{count} {kind}" for kind, count in types.items())
    sums = [line.split() for line in next(c for c in shown(text).code if quants[0].name in c).splitlines()]
    assert sums == [[sha256(path), str(path.stat().st_size), path.name] for path in quants]


def test_a_split_file_is_one_row_with_all_its_parts(folder: Path, tmp_path: Path) -> None:
    (first,) = make(folder, tmp_path, Recipe(quant("Q8_0")), split=300_000)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1 and first == parts[0]
    release = publish.read(parts)  # as a shell's *.gguf gives them
    (row,) = rows_of(release)
    assert [part.name for part in row.parts] == [path.name for path in parts] == [path.name for path in release.paths]
    assert row.nbytes == sum(path.stat().st_size for path in parts)
    text = composed(first)
    assert f"and {len(parts) - 1} more parts" in text and "ollama" not in text


def test_quality_is_shown_only_where_the_file_says_it(quants: list[Path], tmp_path: Path) -> None:
    assert "Quality was not measured" in composed(*quants)
    measured = with_metadata(quants[0], tmp_path / "measured-Q4_K_M.gguf", llmkit__quality__kld_mean="0.0123")
    text = composed(measured, quants[1])
    assert [row[5] for row in shown(text).table[1:]] == ["kld_mean 0.0123", "not measured"]
    assert "Quality was not measured" not in text


def test_the_label_of_a_file_that_does_not_say_its_type(quants: list[Path], tmp_path: Path) -> None:
    silent = with_metadata(quants[1], tmp_path / "silent.gguf", general__file_type=None, llmkit__recipe=None)
    (row,) = rows_of(publish.read([silent]))
    assert row.label == "Q8_0" and row.command is None and row.tag is None
    text = composed(silent)
    assert "the file does not say." in text
    assert f"--hf-repo {NAME} --hf-file silent.gguf" in text, "no tag to find it by"


# ── how to make each again ──


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(quant("Q4_K_M")),
        Recipe(quant("Q4_K_M"), (parse_tensor_type("ffn_down=Q6_K"), parse_tensor_type(r"blk\.[01] ?\.attn_q=Q5_K"))),
        Recipe(quant("Q4_0"), (), tensor_type("Q8_0"), tensor_type("Q6_K")),
        Recipe(quant("Q4_0"), (parse_tensor_type("output=Q8_0"),)),
        Recipe(quant("Q5_K_S"), (), None, None, True),
        Recipe(quant("Q8_0")),
        Recipe(quant("BF16")),
    ],
    ids=str,
)
def test_the_command_in_the_card_makes_the_same_bytes(
    folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made,) = make(folder, tmp_path, recipe)
    words = shlex.split(command_of(composed(made)))
    monkeypatch.chdir(folder.parent)
    assert main.main([*words[1:], "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / made.name).read_bytes() == made.read_bytes()


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_a_converted_file_is_made_again_by_convert(
    folder: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = quantize.conversion(convert.open_draft(folder), kind, None, tmp_path)
    quantize.run(planned, threads=1)
    words = shlex.split(command_of(composed(planned.outputs[0].path)))
    assert words == ["llmkit", "convert", folder.name, "--type", kind]
    monkeypatch.chdir(folder.parent)
    assert main.main([*words[1:], "--out", str(tmp_path / "again")]) == 0
    again = tmp_path / "again" / planned.outputs[0].path.name
    assert again.read_bytes() == planned.outputs[0].path.read_bytes()


def test_the_importance_matrix_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret folder").mkdir()
    matrix = write_imatrix(folder, tmp_path / "secret folder" / "imatrix.gguf")
    (made,) = make(folder, tmp_path, Recipe(quant("IQ4_XS")), matrix=matrix)
    text = composed(made)
    assert "secret folder" not in text, "where the user keeps it is nobody's business"
    assert imatrix.read(matrix).fingerprint in text
    words = shlex.split(command_of(text))
    assert words[-2:] == ["--imatrix", "imatrix.gguf"]
    monkeypatch.chdir(matrix.parent)
    again = [*words[1:2], str(folder), *words[3:], "--out", str(tmp_path / "again")]
    assert main.main(again) == 0
    first, second = gguf.read(made), gguf.read(tmp_path / "again" / made.name)
    for name, info in first.tensors.items():
        other = second.tensors[name]
        assert info.type == other.type
        ours, theirs = made.read_bytes(), second.path.read_bytes()
        assert ours[info.offset : info.offset + info.nbytes] == theirs[other.offset : other.offset + other.nbytes], name


def test_the_importance_matrix_may_be_sent_along(folder: Path, tmp_path: Path) -> None:
    matrix = write_imatrix(folder, tmp_path / "renamed.gguf")
    (made,) = make(folder, tmp_path, Recipe(quant("IQ4_XS")), matrix=write_imatrix(folder, tmp_path / "imatrix.gguf"))
    release = publish.read([made, matrix])
    assert release.paths == (made, matrix) and len(rows_of(release)) == 1
    assert "--imatrix renamed.gguf" in command_of(publish.compose(release, rows_of(release), name=NAME))
    with pytest.raises(LlmkitError, match="no model among the files"):
        publish.read([matrix])


def test_the_source_s_repository_and_revision(quants: list[Path], tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    path = with_metadata(
        quants[0],
        tmp_path / "tiny-Q4_K_M.gguf",
        llmkit__source__repo="org/tiny",
        llmkit__source__revision=commit,
        general__license="Apache-2.0",
    )
    text = composed(path)
    assert command_of(text) == f"llmkit quantize org/tiny@{commit} Q4_K_M"
    assert f"[org/tiny](https://huggingface.co/org/tiny) at `{commit}`" in text
    data = front_matter(text)
    assert data["base_model"] == "org/tiny" and data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0" and "license_name" not in data


# ── text of others ──


OWN = """---
language: en
license: mit
tags: [mine]
---

# My model

Before.

{}

After, with `code` and | pipes.
"""


def test_the_user_s_text_is_kept(quants: list[Path]) -> None:
    first = composed(quants[0], existing=OWN.format(""))
    before, ours, after = re.split(f"{card.BEGIN}|{card.END}", first)
    assert before.endswith(OWN.format("").partition("---\n\n")[2] + "\n") and after == "\n"
    moved = OWN.format(f"{card.BEGIN}\nold\n{card.END}")
    second = composed(quants[0], existing=moved)
    assert re.split(f"{card.BEGIN}|{card.END}", second)[1:] == [ours, "\n\nAfter, with `code` and | pipes.\n"]
    data = front_matter(second)
    assert (data["language"], data["license"], data["tags"]) == ("en", "mit", ["mine"])
    assert data["quantized_by"] == "llmkit", "what was missing is added"
    assert composed(quants[0], existing=second) == second, "nothing changes when nothing is new"


def test_windows_line_ends_stay(quants: list[Path]) -> None:
    text = composed(quants[0], existing=OWN.format("").replace("\n", "\r\n"))
    assert text.count("\n") == text.count("\r\n")
    assert front_matter(text)["license"] == "mit"


@pytest.mark.parametrize(
    "marks", [card.BEGIN, card.END, f"{card.END}\n{card.BEGIN}", f"{card.BEGIN}\n{card.BEGIN}\n{card.END}"]
)
def test_marks_out_of_order_are_refused(quants: list[Path], marks: str) -> None:
    with pytest.raises(LlmkitError, match="README.md has not one"):
        composed(quants[0], existing=OWN.format(marks))


def test_earlier_rows_stay_while_their_files_do(quants: list[Path]) -> None:
    first = composed(quants[1])
    remote = {quants[1].name: sha256(quants[1])}
    both = composed(quants[0], existing=first, remote=remote)
    assert shown(both).table == shown(composed(*quants)).table
    for changed in ({}, {quants[1].name: "0" * 64}):
        assert [row[0] for row in shown(composed(quants[0], existing=first, remote=changed)).table[1:]] == ["Q4_K_M"]
    assert len(shown(composed(*quants, existing=both, remote=remote)).table) == 3, "replaced, not doubled"


def test_rows_somebody_broke_are_left_out(quants: list[Path]) -> None:
    remote = {quants[1].name: sha256(quants[1])}
    first = composed(quants[1])
    assert len(publish.kept_rows(first, remote)) == 1
    for old, new in (('"n_weights": ', '"n_weights": "'), ('"parts": [', '"parts": 5, "x": ['), ('"label"', '"lable"')):
        assert old in first
        assert publish.kept_rows(first.replace(old, new), remote) == []
    zero = re.sub(r'"n_weights": \d+', '"n_weights": 0', first)
    assert publish.kept_rows(zero, remote) == []


NASTY = st.text(st.sampled_from("|`\n\r\\:<>-!*_[](){}#&\"'$@ abc\x00\x1b\u2028\x85é漢\udcff"), min_size=1, max_size=30)
BREAKERS = (
    f"x\n{card.END}\n---\nlicense: mit\n---\n",
    "a | b | c",
    "```\n<script>alert(1)</script>",
    "--> <img src=x>",
    'mit"\nbase_model: evil/model',
    "'; rm -rf / #",
    'https://x.org/"]: *&{\\u0022',
)


@pytest.mark.parametrize("value", BREAKERS)
def test_what_a_file_says_cannot_break_the_card(quants: list[Path], value: str) -> None:
    check_hostile(quants[0], value)


@settings(max_examples=60, deadline=None)
@given(value=NASTY)
def test_no_text_breaks_the_card(quants: list[Path], value: str) -> None:
    check_hostile(quants[0], value)


def check_hostile(path: Path, value: str) -> None:
    file = gguf.read(path)
    keys = (
        "general.license", "general.license.name", "general.license.link", "general.name", "llmkit.source.name",
        "llmkit.source.repo", "llmkit.source.revision", "llmkit.version", "llmkit.quality.x", f"llmkit.quality.{value}",
        "quantize.imatrix.file", "llmkit.imatrix.fingerprint",
    )  # fmt: skip
    texts = {key: Value.string(value) for key in keys}
    texts["llmkit.recipe"] = Value.string(shlex.join(["Q4_K_M", "--tensor-type", f"{value}=Q6_K"]))
    texts["general.languages"] = Value.array(ValueType.STRING, [value, "en"])
    release = Release((replace(file, metadata={**file.metadata, **texts}),))
    (row,) = publish.rows(release, {path: sha256(path)})
    parts = (replace(row.parts[0], name=f"{value}.gguf"),)
    odd = replace(row, parts=parts, label=value, types={value: 1}, architecture=value)
    text = publish.compose(release, [row, odd], name=NAME)
    text.encode()
    assert text.count(card.BEGIN) == text.count(card.END) == 1
    data = front_matter(text)
    expected = {"library_name", "pipeline_tag", "tags", "quantized_by", "language", "license", "license_name"}
    assert set(data) - {"license_link"} <= expected and "mit" != data["license"]
    assert data.get("license_link") in (None, value)
    seen = shown(text)
    assert [len(cells) for cells in seen.table] == [6, 6, 6]
    allowed = re.compile(r"</?(?:code|pre)>|<pre><code>.*</code></pre>|(?:<!-- llmkit:\w+(?: \{[^<>]*\})? -->\s*)+")
    assert [html for html in seen.html if not allowed.fullmatch(html.strip())] == []
    kept = publish.kept_rows(text, {part.name: part.sha256 for each in (row, odd) for part in each.parts})
    assert {each.label for each in kept} == {row.label, odd.label}


# ── what is refused ──


def test_files_of_different_models_are_refused(
    quants: list[Path], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    (other,) = make(tiny_checkpoint("qwen3", width=256), tmp_path, Recipe(quant("Q8_0")))
    with pytest.raises(LlmkitError, match="not of one model: their architecture differs"):
        publish.read([quants[0], other])
    based = with_metadata(quants[1], tmp_path / "based.gguf", llmkit__source__repo="org/a")
    elsewhere = with_metadata(quants[0], tmp_path / "elsewhere.gguf", llmkit__source__repo="org/b")
    for pair in ([based, elsewhere], [based, quants[0]]):
        with pytest.raises(LlmkitError, match="their base model differs"):
            publish.read(pair)
    table = composed(based)
    with pytest.raises(LlmkitError, match="holds quants of another model"):
        composed(elsewhere, existing=table, remote={based.name: sha256(based)})


def test_what_is_no_whole_model_is_refused(quants: list[Path], tmp_path: Path) -> None:
    data = quants[0].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:-1000])
    (tmp_path / "page.gguf").write_text("<html>")
    (tmp_path / "whole.gguf.partial").write_bytes(data)
    gguf_writer.write(tmp_path / "empty.gguf", {"general.architecture": Value.string("llama")}, [])
    for name, kind in (
        ("cut.gguf", InvalidModel),
        ("page.gguf", InvalidModel),
        ("empty.gguf", InvalidModel),
        ("whole.gguf.partial", Unsupported),
        ("missing.gguf", ModelNotFound),
    ):
        with pytest.raises(kind) as caught:
            publish.read([quants[1], tmp_path / name])
        assert name in caught.value.message
