"""What people get wrong, and what the world does to files: the real command line must say so in one clear sentence."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Cli, GgufOf, TinyCheckpoint, cli_environment
from llmkit import gguf


def refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    """Exit code 1, a message with all of `expected`, no traceback, nothing on stdout."""
    assert done.returncode == 1, f"exit {done.returncode}\n{done.stderr}"
    assert "llmkit: error:" in done.stderr and "Traceback" not in done.stderr, done.stderr
    for text in expected:
        assert text in done.stderr, f"{text!r} is not in\n{done.stderr}"
    assert done.stdout == ""


@pytest.fixture
def model(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """A small Llama checkpoint in three shards, free to be broken."""
    return shutil.copytree(tiny_checkpoint("llama", shards=3), tmp_path / "tiny-llama")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for results."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def change_config(folder: Path, **values: Any) -> None:
    """Sets keys of config.json; None as value writes null, an Ellipsis removes."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the JSON header of a safetensors file, its data stays."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def rename_tensor(folder: Path, before: str, after: str) -> None:
    """Gives a tensor another name, in its shard and in the index."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = index["weight_map"].pop(before)
    index["weight_map"][after] = shard
    index_path.write_text(json.dumps(index))

    def change(header: dict[str, Any]) -> None:
        header[after] = header.pop(before)

    rewrite_header(folder / shard, change)


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [("convert",), ("quantize", "Q8_0")])
def test_no_such_folder(verb: tuple[str, ...], cli: Cli, tmp_path: Path, out: Path) -> None:
    missing = tmp_path / "nothing"
    refused(cli(verb[0], missing, *verb[1:], "--out", out), str(missing), "no such")
    assert not list(out.iterdir())


def test_no_such_gguf(cli: Cli, tmp_path: Path) -> None:
    refused(cli("quantize", tmp_path / "nothing.gguf", "Q8_0"), "nothing.gguf", "no such")


def test_folder_without_config(cli: Cli, tmp_path: Path, out: Path) -> None:
    refused(cli("quantize", tmp_path, "Q8_0", "--out", out), str(tmp_path), "config.json", "hint:")


def test_truncated_shard(cli: Cli, model: Path, out: Path) -> None:
    victim = model / "model-00002-of-00003.safetensors"
    victim.write_bytes(victim.read_bytes()[:-5000])
    refused(cli("quantize", model, "Q8_0", "--out", out), victim.name, "cut short", "Download")
    assert not list(out.iterdir())


def test_missing_shard(cli: Cli, model: Path, out: Path) -> None:
    (model / "model-00003-of-00003.safetensors").unlink()
    refused(cli("quantize", model, "Q8_0", "--out", out), "model-00003-of-00003.safetensors", "index", "missing")


def test_unknown_architecture(cli: Cli, model: Path) -> None:
    change_config(model, architectures=["LlamaForCausalLLM"])
    refused(
        cli("convert", model), "'LlamaForCausalLLM'", "Nearest: LlamaForCausalLM", "Supported:", "Gemma3ForCausalLM"
    )
    change_config(model, architectures=["ZzzForTea"])
    refused(cli("convert", model), "'ZzzForTea'", "Supported:", "Qwen3ForCausalLM")


def test_tensor_nobody_maps(cli: Cli, model: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    rename_tensor(model, name, "model.layers.0.self_attn.q_projection.weight")
    done = cli("convert", model)
    refused(done, "'model.layers.0.self_attn.q_projection.weight'", "nearest pattern", "self_attn.q_proj.weight")


def test_missing_tensor(cli: Cli, model: Path) -> None:
    change_config(model, num_hidden_layers=3)
    refused(cli("convert", model), "model.layers.2.", "missing")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"hidden_size": 32}, ("shape", "config.json")),
        ({"hidden_size": "64"}, ("'hidden_size'", "'64'")),
        ({"hidden_size": ...}, ("hidden_size",)),
        ({"num_hidden_layers": 0}, ("'num_hidden_layers'",)),
        ({"num_attention_heads": 3}, ("heads",)),
        ({"architectures": []}, ("architectures",)),
        ({"hidden_act": "relu"}, ("'hidden_act'", "'relu'")),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ("'dynamic'",)),
        ({"rope_scaling": "linear"}, ("rope",)),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config",)),
        ({"rms_norm_eps": "small"}, ("'rms_norm_eps'",)),
    ],
    ids=str,
)
def test_settings_that_cannot_be(values: dict[str, Any], expected: tuple[str, ...], cli: Cli, model: Path) -> None:
    change_config(model, **values)
    refused(cli("convert", model, "--dry-run"), "config.json" if "shape" not in expected else "shape", *expected)


def test_absurd_number_of_layers(cli: Cli, model: Path) -> None:
    """Refused at once: no list of two billion names is made."""
    change_config(model, num_hidden_layers=2**31 - 1)
    refused(cli("convert", model, "--dry-run", timeout=20), "num_hidden_layers")


def test_settings_of_other_families(cli: Cli, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 16},
            ("'use_sliding_window'",),
        ),
        ("qwen3", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("'llama3'",)),
        ("gemma3", {"query_pre_attn_scalar": 100}, ("'query_pre_attn_scalar'", "100")),
        ("gemma3", {"attn_logit_softcapping": 50.0}, ("'attn_logit_softcapping'",)),
        ("gemma3", {"use_bidirectional_attention": True}, ("'use_bidirectional_attention'",)),
        ("gemma3", {"layer_types": ["chunked_attention"] * 2}, ("'layer_types'", "chunked_attention")),
    ]
    for number, (family, values, expected) in enumerate(cases):
        folder = shutil.copytree(tiny_checkpoint(family), tmp_path / f"{number}-{family}")
        change_config(folder, **values)
        refused(cli("convert", folder, "--dry-run"), "config.json", *expected)


def test_weights_that_are_not_finite(cli: Cli, model: Path, out: Path) -> None:
    path = model / "model-00001-of-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-4000:-3998] = b"\xc0\x7f"  # a BF16 NaN in the last tensor
    path.write_bytes(content)
    refused(cli("quantize", model, "Q8_0", "--out", out), "not finite")
    assert not list(out.glob("*.gguf"))


def test_weights_of_a_type_nobody_expects(cli: Cli, model: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["lm_head.weight"]["dtype"] = "U16"

    rewrite_header(model / "model-00001-of-00003.safetensors", change)
    refused(cli("convert", model, "--dry-run"), "lm_head.weight", "U16")


def test_tensor_name_that_cannot_be_printed(cli: Cli, model: Path) -> None:
    rename_tensor(model, "lm_head.weight", "\ud800\x1b[31m\n")
    refused(cli("convert", model, "--dry-run"), "nobody maps tensor")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<!DOCTYPE html><html><title>404</title></html>", ("HTML", "Download")),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ("Git LFS pointer", "git lfs pull")),
        (b"", ("empty",)),
        (b"PK\3\4" + bytes(500), ("not a GGUF",)),
        (b"GGUF\x09" + bytes(500), ("version 9",)),
    ],
    ids=["HTML", "LFS pointer", "empty", "zip", "version 9"],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["quantize", "inspect", "chat"])
def test_a_gguf_that_is_none(verb: str, content: bytes, expected: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refused(cli(verb, path, *(["Q8_0"] if verb == "quantize" else []), stdin=subprocess.DEVNULL), str(path), *expected)


def test_truncated_gguf(cli: Cli, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    whole = gguf_of(tiny_checkpoint("llama"), "bf16").read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(whole[: len(whole) // 2])
    refused(cli("quantize", path, "Q8_0", "--out", tmp_path / "out"), str(path), "cut short")


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("tokenizer.json", b"{", ("tokenizer.json",)),
        ("tokenizer.json", b"<html>", ("tokenizer.json",)),
        ("tokenizer.json", None, ("tokenizer",)),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}', ("tokenizer.json",)),
        ("tokenizer_config.json", b"[]", ("tokenizer_config.json",)),
    ],
)
def test_broken_tokenizer(
    file: str,
    content: bytes | None,
    expected: tuple[str, ...],
    cli: Cli,
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "model")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    refused(cli("convert", folder, "--dry-run"), *expected)


# --- the request -----------------------------------------------------------------------------------------------------


def test_unknown_quant(cli: Cli, model: Path) -> None:
    refused(cli("quantize", model, "Q4_K_N"), "'Q4_K_N'", "Q4_K_M")
    refused(cli("quantize", model, "NONSENSE"), "'NONSENSE'", "Q4_K_M", "IQ4_XS")


def test_unknown_type(cli: Cli, model: Path) -> None:
    refused(cli("convert", model, "--type", "bf17"), "'bf17'", "bf16")
    refused(cli("quantize", model, "Q8_0", "--output-type", "Q9_K"), "'Q9_K'", "Q6_K")
    refused(cli("quantize", model, "Q4_0", "--tensor-type", "ffn_down=Q9"), "'Q9'")
    refused(cli("quantize", model, "Q4_0", "--tensor-type", "ffn(=Q8_0"), "regular expression")
    refused(cli("quantize", model, "Q4_0", "--tensor-type", "ffn_down"), "REGEX=TYPE")


@pytest.mark.parametrize("kind", ["Q8_K", "Q8_1", "I8", "F64"])
@pytest.mark.parametrize("option", ["--output-type", "--embedding-type", "--tensor-type=ffn_down"])
def test_types_no_weights_can_have(
    option: str, kind: str, cli: Cli, tiny_checkpoint: TinyCheckpoint, out: Path
) -> None:
    """Types that only exist inside the engine, or for other things than weights: its kernels abort on them."""
    wanted = [f"{option}={kind}"]
    refused(cli("quantize", tiny_checkpoint("llama", width=256), "Q4_0", "--out", out, *wanted), kind)
    assert not list(out.iterdir())


@pytest.mark.parametrize("option", ["--output-type=IQ2_XXS", "--embedding-type=IQ1_S", "--tensor-type=ffn_down=IQ2_XS"])
def test_types_that_need_importance(option: str, cli: Cli, tiny_checkpoint: TinyCheckpoint, out: Path) -> None:
    folder = tiny_checkpoint("llama", width=256)
    refused(cli("quantize", folder, "Q4_0", "--out", out, option), "importance matrix", "--imatrix")
    assert not list(out.iterdir())


def test_importance_that_lacks_the_embedding(
    cli: Cli, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, out: Path, tmp_path: Path
) -> None:
    """No importance matrix has the embedding: --pure must not hand it to a kernel that aborts without."""
    folder, path, rows = tiny_checkpoint("llama", width=256), tmp_path / "imatrix.dat", []
    for name, info in gguf.read(gguf_of(folder, "bf16")).tensors.items():
        if len(info.shape) == 2 and name != "token_embd.weight":
            width = info.shape[1]
            rows.append(
                struct.pack("<i", len(name)) + name.encode() + struct.pack(f"<ii{width}f", 1, width, *[1.0] * width)
            )
    path.write_bytes(struct.pack("<i", len(rows)) + b"".join(rows))
    refused(
        cli("quantize", folder, "IQ2_XXS", "--pure", "--imatrix", path, "--out", out), "token_embd.weight", "IQ2_XXS"
    )
    assert cli("quantize", folder, "IQ2_XXS", "--imatrix", path, "--out", out).returncode == 0


def test_quant_without_importance(cli: Cli, tiny_checkpoint: TinyCheckpoint, out: Path) -> None:
    folder = tiny_checkpoint("llama", width=256)
    refused(cli("quantize", folder, "IQ2_XXS", "Q8_0", "--out", out), "IQ2_XXS needs an importance matrix", "--imatrix")
    assert not list(out.iterdir()), "refused before any work"


@pytest.mark.parametrize(
    "content", [b"", b"\1\0\0\0", b"\xff" * 64, b"<html>" + bytes(90), b"GGUF\3\0\0\0" + bytes(16)]
)
def test_broken_importance(content: bytes, cli: Cli, model: Path, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(content)
    refused(cli("quantize", model, "Q4_K_M", "--imatrix", path, "--out", out), str(path))
    assert not list(out.iterdir())


def test_importance_of_another_model(cli: Cli, model: Path, out: Path, tmp_path: Path) -> None:
    path, name = tmp_path / "imatrix.dat", b"blk.0.ffn_down.weight"
    row = struct.pack("<i", len(name)) + name + struct.pack("<ii3f", 1, 3, 1, 2, 3)
    path.write_bytes(struct.pack("<i", 1) + row)
    refused(cli("quantize", model, "Q4_K_M", "--imatrix", path, "--out", out), "blk.0.ffn_down.weight", "another model")


def test_quantized_source(cli: Cli, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, out: Path) -> None:
    source = gguf_of(tiny_checkpoint("llama"), "q8_0")
    refused(cli("quantize", source, "Q4_0", "--out", out), "quantized already", "--requantize")
    done = cli("quantize", source, "Q4_0", "--out", out, "--requantize")
    assert done.returncode == 0 and "quantized already" in done.stderr, "a word about the loss"


def test_one_name_for_two_files(cli: Cli, model: Path, out: Path) -> None:
    refused(cli("quantize", model, "Q8_0", "Q4_0", "--out", out / "model.gguf"), "one file for 2 quants")


@pytest.mark.parametrize(
    "options", [["--threads", "-3"], ["--threads", "two"], ["--split-size", "0"], ["--split-size", "x"]]
)
def test_numbers_that_make_no_sense(options: list[str], cli: Cli, model: Path, out: Path) -> None:
    done = cli("quantize", model, "Q8_0", "--out", out, *options)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert options[0] in done.stderr and not list(out.iterdir())


# --- the disk --------------------------------------------------------------------------------------------------------


def test_output_exists(cli: Cli, model: Path, out: Path) -> None:
    path = out / "tiny-llama-Q8_0.gguf"
    path.write_bytes(b"somebody's file")
    refused(cli("quantize", model, "Q8_0", "--out", out), path.name, "exists", "--force")
    assert path.read_bytes() == b"somebody's file"
    assert cli("quantize", model, "Q8_0", "--out", out, "--force").returncode == 0
    assert path.read_bytes()[:4] == b"GGUF"


def test_output_exists_from_the_same_work(cli: Cli, model: Path, out: Path) -> None:
    assert cli("quantize", model, "Q8_0", "--out", out).returncode == 0
    before = (out / "tiny-llama-Q8_0.gguf").stat().st_mtime_ns
    again = cli("quantize", model, "Q8_0", "--out", out)
    assert again.returncode == 0 and "made already" in again.stderr
    assert (out / "tiny-llama-Q8_0.gguf").stat().st_mtime_ns == before


def test_output_is_the_source(cli: Cli, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    source = Path(shutil.copy(gguf_of(tiny_checkpoint("llama"), "bf16"), tmp_path / "model.gguf"))
    before = source.read_bytes()
    refused(cli("quantize", source, "Q8_0", "--out", source, "--force"), "model.gguf", "being read")
    assert source.read_bytes() == before


def test_output_folder_is_a_file(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    refused(cli("quantize", model, "Q8_0", "--out", tmp_path / "file"), str(tmp_path / "file"), "--out")
    refused(cli("quantize", model, "Q8_0", "--out", tmp_path / "file" / "below"), str(tmp_path / "file"), "--out")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Maker of small file systems: mounted("size=1M") → folder. Skips where that is not allowed."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mounted-{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if not sys.platform.startswith("linux") or not shutil.which("mount"):
            pytest.skip("tmpfs is Linux's")
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            pytest.skip(f"may not mount: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


def test_not_enough_room(cli: Cli, tiny_checkpoint: TinyCheckpoint, mounted: Callable[[str], Path]) -> None:
    folder, disk = tiny_checkpoint("llama", width=256), mounted("size=1M")
    refused(cli("quantize", folder, "Q8_0", "BF16", "--out", disk), str(disk), "GB are needed", "GB are free")
    assert not list(disk.iterdir()), "refused before the first byte"
    dry = cli("quantize", folder, "BF16", "--out", disk, "--dry-run")
    assert dry.returncode == 0 and "NOT enough" in dry.stderr


@pytest.mark.slow
def test_disk_fills_while_writing(tiny_checkpoint: TinyCheckpoint, cli: Cli, mounted: Callable[[str], Path]) -> None:
    """Room is taken before the first weight is read, so that another program cannot take it meanwhile."""
    folder, disk = tiny_checkpoint("llama", width=1024, layers=4), mounted("size=100M")
    command = [sys.executable, "-m", "llmkit", "quantize", str(folder), "IQ4_XS", "--out", str(disk), "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", env=cli_environment()) as process:
        partial = disk / f"{folder.name}-IQ4_XS.gguf.partial"
        while process.poll() is None and (not partial.exists() or partial.stat().st_blocks * 512 < 10**7):
            pass
        with pytest.raises(OSError), (disk / "filler").open("wb") as filler:
            while True:
                filler.write(bytes(1 << 20))
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 or ("disk" in errors and "Traceback" not in errors)
    assert process.returncode == 0, errors


def test_unwritable_folder(cli: Cli, model: Path, tmp_path: Path, mounted: Callable[[str], Path]) -> None:
    if os.geteuid() == 0:  # to root every folder is writable, but for a read-only file system
        folder = mounted("ro,size=1M")
    else:
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o555)
    refused(cli("quantize", model, "Q8_0", "--out", folder), str(folder), "written", "--out")
    refused(cli("convert", model, "--out", folder / "below"), str(folder), "written")


def test_unreadable_weights(cli: Cli, model: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (model / "model-00001-of-00003.safetensors").chmod(0)
    refused(cli("convert", model), "model-00001-of-00003.safetensors", "may not be read")
