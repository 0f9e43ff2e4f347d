"""What is there already: made, stale, another's, the source itself; and sources that would break a kernel or a file."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import oracle
from conftest import Cli, GgufOf, TinyCheckpoint
from llmkit import checkpoint, convert, gguf, gguf_writer, quantize
from llmkit.errors import InvalidModel, LlmkitError, OutputExists
from llmkit.gguf import Value
from llmkit.quantize import Recipe, imatrix
from llmkit.quantize.plan import is_made
from llmkit.quants import TENSOR_TYPES, quant


@pytest.fixture
def folder(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(tiny_checkpoint("llama", width=256), tmp_path / "model")


def change_weights(folder: Path, name: str, value: float) -> None:
    """Overwrite the middle weight of a BF16 tensor."""
    stored = checkpoint.read(folder).tensors[name]
    bits = np.array([value], np.float32).view(np.uint32) >> 16
    with open(stored.path, "r+b") as file:
        file.seek(stored.offset + stored.nbytes // 4 * 2)
        file.write(bits.astype(np.uint16).tobytes())


def importance(path: Path, folder: Path, value: float) -> imatrix.Imatrix:
    """An importance matrix with one value everywhere, through a file."""
    f32 = TENSOR_TYPES["F32"]
    rows = []
    for tensor in convert.open_draft(folder).tensors:
        if len(tensor.shape) == 2:
            sums = np.full((1, tensor.width), value, np.float32).tobytes()
            rows += [(f"{tensor.name}.in_sum2", (1, tensor.width), f32, sums)]
            rows += [(f"{tensor.name}.counts", (1, 1), f32, np.ones(1, np.float32).tobytes())]
    gguf_writer.write(path, {"general.type": Value.string("imatrix")}, rows)
    return imatrix.read(path)


def test_parts_of_another_model_are_told_apart(folder: Path, tmp_path: Path) -> None:
    """Two models of one shape differ in every part's header: parts 2 and up, too, say where they are from."""
    first = quantize.plan(convert.open_draft(folder), [Recipe(quant("Q8_0"))], tmp_path, split_nbytes=300_000)
    quantize.run(first, threads=1)
    change_weights(folder, "model.embed_tokens.weight", 0.5)
    second = quantize.plan(convert.open_draft(folder), [Recipe(quant("Q8_0"))], tmp_path, split_nbytes=300_000)
    files = second.outputs[0].files
    assert len(files) > 2 and not any(is_made(file) for file in files)
    assert all(map(is_made, first.outputs[0].files))


def test_other_importance_is_other_work(folder: Path, tmp_path: Path) -> None:
    plans = [
        quantize.plan(
            convert.open_draft(folder), [Recipe(quant("Q4_K_M"))], tmp_path,
            imatrix=importance(tmp_path / "imatrix.gguf", folder, value),
        )
        for value in (1.0, 2.0)
    ]  # fmt: skip
    quantize.run(plans[0], threads=1)
    assert quantize.check_outputs(plans[0], force=False).outputs == ()
    with pytest.raises(OutputExists, match="something else"):
        quantize.check_outputs(plans[1], force=False)


def test_a_source_newer_than_the_output(folder: Path, tmp_path: Path) -> None:
    """The fingerprint samples the weights; what it cannot see, the time of the file tells."""
    planned = quantize.plan(convert.open_draft(folder), [Recipe(quant("Q8_0"))], tmp_path)
    quantize.run(planned, threads=1)
    later = time.time() + 60
    os.utime(folder / "model.safetensors", (later, later))
    with pytest.raises(OutputExists, match="earlier state"):
        quantize.check_outputs(planned, force=False)
    assert quantize.check_outputs(planned, force=True).outputs == planned.outputs


def test_the_source_by_another_name(folder: Path, gguf_of: GgufOf, tmp_path: Path) -> None:
    source = shutil.copy(gguf_of(folder, "bf16"), tmp_path / "same-BF16.gguf")
    (tmp_path / "link").symlink_to(tmp_path)
    planned = quantize.plan(convert.open_draft(Path(source)), [Recipe(quant("BF16"))], tmp_path / "link")
    with pytest.raises(OutputExists, match="being read"):
        quantize.check_outputs(planned, force=True)


def test_leftovers_of_a_broken_replacement_go(folder: Path, tmp_path: Path) -> None:
    planned = quantize.plan(convert.open_draft(folder), [Recipe(quant("Q8_0"))], tmp_path / "out")
    quantize.run(quantize.check_outputs(planned, force=False), threads=1)
    path = planned.outputs[0].path
    path.with_name(path.name + ".partial").write_bytes(b"x")
    planned.outputs[0].journal_path.write_bytes(b"x")
    assert quantize.check_outputs(planned, force=False).outputs == ()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("quant_name", ["IQ3_S", "IQ4_XS"])
def test_weights_too_large_for_the_kernels(quant_name: str, folder: Path, cli: Cli, tmp_path: Path) -> None:
    change_weights(folder, "model.layers.0.mlp.up_proj.weight", 1e20)
    done = cli("quantize", folder, quant_name, "--out", tmp_path / "out")
    assert done.returncode == 1 and "too large" in done.stderr and "blk.0.ffn_up.weight" in done.stderr, done.stderr


def test_negative_importance(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="negative"):
        importance(tmp_path / "imatrix.gguf", folder, -5.0)


def test_importance_is_named_only_where_it_was_used(folder: Path, tmp_path: Path) -> None:
    found = importance(tmp_path / "imatrix.gguf", folder, 1.0)
    recipes = [Recipe(quant(name)) for name in ("F16", "Q4_0")]
    planned = quantize.plan(convert.open_draft(folder), recipes, tmp_path, imatrix=found)
    quantize.run(planned, threads=1)
    told = ["quantize.imatrix.file" in gguf.read(output.path).metadata for output in planned.outputs]
    assert told == [False, True]


@pytest.mark.parametrize("alignment", [64, 256])
def test_a_source_with_another_alignment(alignment: int, folder: Path, gguf_of: GgufOf, tmp_path: Path) -> None:
    plain = gguf.read(gguf_of(folder, "bf16"))
    rows = [(info.name, info.shape, info.type) for info in plain.tensors.values()]
    metadata = {**plain.metadata, "general.alignment": Value.uint32(alignment)}
    header, offsets = gguf_writer.header_bytes(metadata, rows, alignment)
    data = plain.path.read_bytes()
    with open(tmp_path / "aligned.gguf", "wb") as file:
        file.write(header)
        for info, offset in zip(plain.tensors.values(), offsets, strict=True):
            file.write(bytes(len(header) + offset - file.tell()))
            file.write(data[info.offset : info.offset + info.nbytes])
        file.write(bytes(-file.tell() % alignment))
    planned = quantize.plan(convert.open_draft(tmp_path / "aligned.gguf"), [Recipe(quant("Q4_K_M"))], tmp_path)
    quantize.run(planned, threads=1)
    theirs = oracle.reference_quantize(plain.path, tmp_path / "theirs.gguf", "Q4_K_M")
    assert oracle.tensor_bytes(planned.outputs[0].path) == oracle.tensor_bytes(theirs)


def test_output_type_of_a_tied_plain_file(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    draft = convert.open_draft(tiny_checkpoint("smollm", width=256))
    planned = quantize.plan(draft, [Recipe(quant("F16"), output_type=TENSOR_TYPES["Q8_0"])], tmp_path)
    assert planned.outputs[0].types["token_embd.weight"].name == "Q8_0"


def test_a_pattern_that_matches_nothing(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(quant("Q4_K_M"), (("fnn_dwn", TENSOR_TYPES["Q6_K"]),))
    with pytest.raises(LlmkitError, match="no tensor's name matches"):
        quantize.plan(convert.open_draft(folder), [recipe], tmp_path)


def test_a_gguf_that_names_no_architecture(folder: Path, gguf_of: GgufOf) -> None:
    file = gguf.read(gguf_of(folder, "bf16"))
    metadata = {key: value for key, value in file.metadata.items() if key != "general.architecture"}
    with pytest.raises(InvalidModel, match="general.architecture"):
        convert.from_gguf(replace(file, metadata=metadata))


def test_names_no_file_can_have(cli: Cli, folder: Path) -> None:
    long = "x" * 300
    for done in (cli("quantize", folder, "Q8_0", "--out", long), cli("quantize", long, "Q8_0")):
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr


def test_a_folder_where_the_partial_file_goes(cli: Cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "model-Q8_0.gguf.partial").mkdir(parents=True)
    done = cli("quantize", folder, "Q8_0", "--out", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "model-Q8_0.gguf" in done.stderr, done.stderr
