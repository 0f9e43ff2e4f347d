"""What `llmkit inspect` shows, against files written by the package gguf and against a published model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest

from conftest import Cli
from llmkit import gguf, gguf_writer
from llmkit.gguf import Value, ValueType
from llmkit.inspection import files
from llmkit.roles import role_of

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
)
TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "\x1b[2J"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with every kind of metadata and tensors of three types, written by the package gguf."""
    path = tmp_path_factory.mktemp("inspect") / "small.gguf"
    writer = gguf_py.GGUFWriter(path, "llama")
    writer.add_name("Small\x1b[31m")
    writer.add_file_type(7)
    writer.add_block_count(2)
    writer.add_context_length(4096)
    writer.add_head_count_kv([2, 4])
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([2, 3, 3, 1, 1, 4])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(99)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    writer.add_array("test.numbers", list(range(1000)))
    random = np.random.default_rng(0)
    for name, shape, kind in (
        ("token_embd.weight", (6, 32), None),
        ("blk.0.attn_q.weight", (32, 32), "Q8_0"),
        ("blk.0.attn_norm.weight", (32,), None),
        ("blk.0.ffn_up.weight", (64, 32), "Q4_0"),
        ("blk.0.ffn_up_exps.weight", (2, 4, 32), "Q8_0"),
    ):
        weights = random.normal(size=shape).astype(np.float32)
        if kind is None:
            writer.add_tensor(name, weights)
        else:
            quant = gguf_py.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf_py.quants.quantize(weights, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_summary_of_a_small_file(small: Path) -> None:
    summary = files.summary(gguf.read(small))
    assert (summary.architecture, summary.quant, summary.parts, summary.version) == ("llama", "Q8_0", 1, 3)
    assert summary.nbytes == small.stat().st_size
    assert summary.weights == 6 * 32 + 32 * 32 + 32 + 64 * 32 + 2 * 4 * 32
    assert summary.shape == {"layers": 2, "context": 4096, "key/value heads": [2, 4]}
    assert summary.tied


def test_tensors_by_type_agree_with_the_package_gguf(small: Path) -> None:
    reader = gguf_py.GGUFReader(small)
    for group in files.summary(gguf.read(small)).by_type:
        theirs = [tensor for tensor in reader.tensors if tensor.tensor_type.name == group.name]
        assert group.tensors == len(theirs)
        assert group.weights == sum(int(tensor.n_elements) for tensor in theirs)
        assert group.nbytes == sum(int(tensor.n_bytes) for tensor in theirs)
        assert group.bits_per_weight == Fraction(8 * group.nbytes, group.weights)
    assert sum(group.tensors for group in files.summary(gguf.read(small)).by_type) == len(reader.tensors)


def test_tensors_by_role(small: Path) -> None:
    roles = {group.name: (group.tensors, group.types) for group in files.summary(gguf.read(small)).by_role}
    assert roles == {
        "feed-forward": (1, ("Q4_0",)),
        "attention": (1, ("Q8_0",)),
        "token embeddings": (1, ("F32",)),
        "experts": (1, ("Q8_0",)),
        "norms": (1, ("F32",)),
    }


def test_every_name_of_the_engine_s_tensors_has_a_role() -> None:
    """All names of the package gguf, which holds llama.cpp's table, for the families people use most."""
    families = ("LLAMA", "QWEN2", "QWEN3", "QWEN3MOE", "GEMMA3", "PHI3", "DEEPSEEK2", "MAMBA")
    names = {
        gguf_py.TENSOR_NAMES[tensor].format(bid=3, xid=0) + ".weight"
        for family in families
        for tensor in gguf_py.MODEL_TENSORS[gguf_py.MODEL_ARCH[family]]
    }
    assert len(names) > 40
    known = {role_of(name) for name in names}
    assert known >= {"norms", "token embeddings", "output", "experts", "attention", "feed-forward", "state space"}
    assert {name for name in names if role_of(name) == "other"} <= {"blk.3.exp_probs_b.weight"}


def test_the_tokenizer(small: Path) -> None:
    tokenizer = files.tokenizer(gguf.read(small))
    assert tokenizer is not None
    assert (tokenizer.model, tokenizer.pre, tokenizer.tokens) == ("llama", "default", 6)
    assert tokenizer.types == {"normal": 2, "unknown": 1, "control": 2, "user defined": 1}
    assert tokenizer.special == (files.SpecialToken("bos", 1, "<s>"), files.SpecialToken("eos", 99, None))
    assert (tokenizer.adds_bos, tokenizer.adds_eos) == (True, None)
    assert tokenizer.templates == (files.TemplateSummary("default", len(TEMPLATE), "ChatML"),)


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("{{ '<|start_header_id|>' }}", "Llama 3"),
        ("{{ '<start_of_turn>' }}", "Gemma"),
        ("[INST] {{ x }} [/INST]", "Mistral / Llama 2"),
        ("{{ messages }}", None),
    ],
)
def test_template_styles(text: str, style: str | None, tmp_path: Path) -> None:
    path = tmp_path / "templates.gguf"
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.chat_template.tool_use": text}
    gguf_writer.write(path, {key: Value.string(value) for key, value in keys.items()}, [])
    tokenizer = files.tokenizer(gguf.read(path))
    assert tokenizer is not None and tokenizer.templates == (files.TemplateSummary("tool_use", len(text), style),)


def odd_values() -> Iterator[Value]:
    yield Value.string("text")
    yield Value.uint32(7)
    yield Value.float32(float("nan"))
    yield Value.boolean(True)
    yield Value.array(ValueType.STRING, ["a", "b"])
    yield Value.array(ValueType.FLOAT32, [float("inf"), 1.0])
    yield Value.array(ValueType.UINT8, [])


def test_metadata_of_unexpected_types_is_shown_and_harms_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmkit.cli.main import main

    keys = ["general.architecture", "general.name", "general.file_type", "llama.block_count", "tokenizer.ggml.model"]
    keys += ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.chat_template"]
    keys += ["tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token"]
    sound = {"general.architecture": Value.string("llama"), "tokenizer.ggml.model": Value.string("gpt2")}
    path = tmp_path / "odd.gguf"
    for key in keys:
        for value in odd_values():
            gguf_writer.write(path, {**sound, key: value}, [])
            for option in ([], ["--metadata"], ["--json"]):
                assert main(["inspect", str(path), *option]) == 0, (key, value, option)
    capsys.readouterr()


# ── the verb ──


def test_what_the_verb_shows(small: Path, cli: Cli) -> None:
    done = cli("inspect", small)
    assert done.returncode == 0
    for row in (
        r"architecture     llama",
        r"key/value heads  2 or 4",
        r"name             Small\x1b[31m",
        r"bos            1  <s>",
        r"eos            99  (outside the vocabulary)",
        r"chat template  default: ChatML, 119 characters".replace("119", str(len(TEMPLATE))),
        r"Q4_0        1    2,048  1.2 kB             4.50",
        r"The output uses the token embeddings (tied).",
    ):
        assert row in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == f"next: llmkit chat {small}\n"


def test_metadata_cuts_arrays_and_says_how_much(small: Path, cli: Cli) -> None:
    shown = cli("inspect", small, "--metadata").stdout
    assert any(
        line.split() == "test.numbers array of int32 [0, 1, 2, … 997 more]".split() for line in shown.splitlines()
    )
    assert "token_embd" not in shown


def test_tensors_are_listed_in_the_file_s_order(small: Path, cli: Cli) -> None:
    lines = cli("inspect", small, "--tensors").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(gguf.read(small).tensors)
    assert lines[4].split() == ["blk.0.ffn_up.weight", "64", "×", "32", "Q4_0", "2,048", "1.2", "kB"]


def test_json_is_everything(small: Path, cli: Cli) -> None:
    done = cli("inspect", small, "--json")
    shown = json.loads(done.stdout)
    assert done.stderr == ""
    assert shown["summary"]["name"] == "Small\x1b[31m"
    rows = {row["key"]: row for row in shown["metadata"]}
    assert rows["test.numbers"] == {"key": "test.numbers", "type": "array of int32", "value": [0, 1, 2], "count": 1000}
    assert rows["tokenizer.chat_template"]["value"] == TEMPLATE
    assert shown["tensors"][1] == {"name": "blk.0.attn_q.weight", "shape": [32, 32], "type": "Q8_0", "nbytes": 1088}


def test_a_published_model(smollm2_gguf: Path, cli: Cli) -> None:
    """Figures from the model's page on the Hub: 134,515,008 weights, 30 layers, 49,152 tokens."""
    shown = json.loads(cli("inspect", smollm2_gguf, "--json").stdout)["summary"]
    assert (shown["weights"], shown["shape"]["layers"], shown["tokenizer"]["tokens"]) == (134_515_008, 30, 49_152)
    assert shown["tied"] and shown["quant"] == "Q4_1"
    special = {token["role"]: token["text"] for token in shown["tokenizer"]["special"]}
    assert (special["bos"], special["eos"]) == ("<|im_start|>", "<|im_end|>")
    assert shown["nbytes"] == smollm2_gguf.stat().st_size


# ── bad input ──


def test_a_file_that_is_not_there(tmp_path: Path, cli: Cli) -> None:
    done = cli("inspect", tmp_path / "none.gguf")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"llmkit: error: {tmp_path / 'none.gguf'}: no such file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html></html>", "is an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        (b"", "is empty"),
        (b"PK\x03\x04 a zip file", "is not a GGUF file"),
    ],
)
def test_a_file_that_is_something_else(content: bytes, message: str, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    done = cli("inspect", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_file_cut_short(share: float, small: Path, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(small.read_bytes()[: int(share * small.stat().st_size)])
    done = cli("inspect", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert str(path) in done.stderr and "Traceback" not in done.stderr


def test_a_folder(tmp_path: Path, cli: Cli) -> None:
    done = cli("inspect", tmp_path)
    assert done.returncode == 1 and "is a folder or a checkpoint, expected a GGUF file" in done.stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(small: Path, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(small.read_bytes())
    path.chmod(0)
    done = cli("inspect", path)
    assert done.returncode == 1 and "may not be read" in done.stderr
