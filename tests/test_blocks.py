"""Blocks taken apart: our values against the engine's, bit for bit; losses against arithmetic; the command."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import desks
from conftest import Cli, GgufOf, TinyCheckpoint
from desks import QUANTIZED, TINY, Desk, weights
from llmkit import checkpoint, engine, gguf, gguf_writer
from llmkit.convert import tensors
from llmkit.errors import InvalidModel, Unsupported
from llmkit.inspection import blocks, losses
from llmkit.inspection.block_layouts import FAMILIES, LAYOUTS
from llmkit.inspection.losses import Sample
from llmkit.quants import TENSOR_TYPES, TensorType
from llmkit.store import last_model, remember_model

root, serving, desk = desks.root, desks.serving, desks.desk
UNPACKED = [name for name in LAYOUTS if not name.startswith(("IQ1", "IQ2", "IQ3"))]
GRIDS = [name for name in LAYOUTS if name not in UNPACKED]
SLOW = {"IQ1_S", "IQ1_M", "IQ2_S"}  # their kernels build tables first


def marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


# magnitudes of the engine's grid points (ggml-common.h); ±⅛ is IQ1's shift
POINTS: dict[str, set[float]] = {
    "IQ2": {8, 25, 43}, "IQ3_X": {4, 12, 20, 28, 36, 44, 52, 62}, "IQ3_S": {1, 3, 5, 7, 9, 11, 13, 15},
    "IQ1": {0.125, 0.875, 1.125},
}  # fmt: skip


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path) -> np.ndarray:
    """Rows of a real tensor, 1536 wide."""
    info = gguf.read(smollm2_gguf).tensors["blk.7.ffn_down.weight"]
    return tensors.from_info(info).float32(0, 12)


def made(rows: np.ndarray, kind: TensorType) -> np.ndarray:
    """The rows as blocks: (blocks, bytes)."""
    importance = np.abs(rows).mean(0, keepdims=True).repeat(len(rows), 0) + 0.01
    return losses.quantized(Sample(rows, importance), kind).reshape(-1, kind.nbytes)


def by_engine(block: np.ndarray, kind: TensorType) -> np.ndarray:
    values: np.ndarray = losses.dequantized(np.ascontiguousarray(block[None]), kind, kind.block)[0]
    return values


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """To the bit on x86-64; compilers for other processors may fuse a product with a sum, which rounds once less."""
    if platform.machine() in ("x86_64", "AMD64"):
        return ours.tobytes() == theirs.tobytes()
    return np.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * float(np.abs(theirs).max()))


# ── unpacking ──


@pytest.mark.parametrize("name", UNPACKED)
def test_values_are_the_engine_s_to_the_bit(name: str, real: np.ndarray) -> None:
    kind = TENSOR_TYPES[name]
    random = np.random.default_rng(3)
    noise = random.integers(0, 256, (60, kind.nbytes), np.uint8)  # any bits at all, but scales that are numbers
    for packed in (*made(real, kind)[:300], *noise):
        theirs = by_engine(packed, kind)
        if np.isfinite(theirs).all():
            assert same(blocks.values_of(kind, packed), theirs)
            assert same(np.array(blocks.of(kind, packed).values, np.float32), theirs)


def test_a_published_file_s_blocks(smollm2_gguf: Path) -> None:
    """As they lie in the file, every quantized type it has."""
    seen = set()
    for info in gguf.read(smollm2_gguf).tensors.values():
        if info.type.name in LAYOUTS and info.type.name not in seen:
            seen.add(info.type.name)
            tensor = tensors.from_info(info)
            row, expected = tensor.read(1, 2).reshape(-1, info.type.nbytes), tensor.float32(1, 2)[0]
            ours = np.concatenate([blocks.values_of(info.type, block) for block in row])
            assert same(ours, expected)
    assert "Q4_1" in seen


@pytest.mark.parametrize("name", marked(GRIDS))
def test_scales_of_grids_leave_the_grid_s_points(name: str, real: np.ndarray) -> None:
    kind = TENSOR_TYPES[name]
    points: set[float] = next(points for start, points in POINTS.items() if name.startswith(start))
    for packed in made(real[:2], kind):
        block = blocks.of(kind, packed)
        assert not block.unpacked and block.worked is None
        for group in block.groups:
            found = np.abs(np.array(group.values)) / max(abs(group.step), 1e-30)
            assert all(min(abs(value - point) for point in points) < 1e-3 for value in found) or group.step == 0


@pytest.mark.parametrize("name", marked(list(LAYOUTS)))
def test_fields_are_the_whole_block(name: str, real: np.ndarray) -> None:
    kind, layout = TENSOR_TYPES[name], LAYOUTS[name]
    assert sum(field.nbytes for field in layout.fields) == kind.nbytes and layout.family in FAMILIES
    packed = made(real[:2], kind)[5]
    block = blocks.of(kind, packed, shown=kind.block - 1)
    assert bytes.fromhex("".join(part.hex for part in block.parts)) == packed.tobytes()
    assert sum(len(group.values) for group in block.groups) == block.weights == kind.block
    if block.worked is not None:
        assert block.worked.startswith(f"weight {kind.block - 1}: q = ")
        shown = float(block.worked.rpartition("=")[2].replace("−", "-"))
        assert shown == pytest.approx(block.values[-1], rel=1e-5)
        left = block.worked.rpartition(";")[2].rpartition("=")[0].replace("·", "*").replace("−", "-")
        assert eval(left) == pytest.approx(block.values[-1], rel=1e-4, abs=1e-6)  # the formula with its numbers


@pytest.mark.parametrize("name", ["Q3_K", "Q4_K", "Q5_K"])
def test_scattered_bits_are_shown_as_they_are_gathered(name: str, real: np.ndarray) -> None:
    """Each line is an expression over the bytes of the field, and comes to the scale that is used."""
    kind = TENSOR_TYPES[name]
    packed = made(real[:2], kind)[2]
    for number in range(len(blocks.of(kind, packed).groups)):
        first = number * kind.block // len(blocks.of(kind, packed).groups)
        block = blocks.of(kind, packed, shown=first)
        group = block.groups[number]
        stored = bytes.fromhex(next(part.hex for part in block.parts if part.name == "scales"))
        for line, code in zip(block.packing, (group.scale_code, group.min_code), strict=False):
            _, by_byte, by_value, result = line.split(" = ")
            words = by_byte.replace("byte ", "b").replace("(", "( ").split()
            worked = " ".join(f"{stored[int(word[1:])]}" if word[0] == "b" else word for word in words)
            assert _precedence(worked) == _precedence(by_value) == int(result) == code


def _precedence(text: str) -> int:
    """C's and Python's: shifts, then &, then |."""
    return int(eval(text))


def test_what_is_no_block_is_refused() -> None:
    with pytest.raises(Unsupported, match="no blocks"):
        blocks.of(TENSOR_TYPES["F16"], b"\0\0")
    with pytest.raises(InvalidModel, match="18 bytes, 17"):
        blocks.of(TENSOR_TYPES["Q4_0"], bytes(17))
    with pytest.raises(Unsupported, match="not computed here"):
        blocks.values_of(TENSOR_TYPES["IQ2_XS"], bytes(74))


# ── losses ──


def test_losses_are_what_the_engine_lost(real: np.ndarray) -> None:
    kind = TENSOR_TYPES["Q4_K"]
    after = losses.dequantized(losses.quantized(Sample(real), kind), kind, real.shape[1]).astype(np.float64)
    (found,) = losses.losses(Sample(real), [kind])
    error = after - real
    assert found.rmse == pytest.approx(np.sqrt(np.mean(error**2)))
    assert found.largest == pytest.approx(np.abs(error).max())
    assert found.weighted == pytest.approx(np.sqrt(np.sum(error**2 * real**2) / np.sum(real.astype(float) ** 2)))
    assert found.row_nbytes == 1536 // 256 * 144


def test_more_bits_lose_less() -> None:
    rows = np.random.default_rng(5).normal(size=(20, 512)).astype(np.float32)
    names = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
    found = losses.losses(Sample(rows), [TENSOR_TYPES[name] for name in names])
    figures = [loss.rmse for loss in found if loss.rmse is not None]
    assert len(figures) == 6 and figures == sorted(figures)


def test_importance_is_used_and_weighs(real: np.ndarray) -> None:
    """Columns said to matter come out better; rows of two matrices have each their own."""
    kind = TENSOR_TYPES["Q4_0"]
    importance = np.full_like(real, 0.01)
    importance[:6, :700] = 100
    importance[6:, 700:] = 100
    plain = losses.dequantized(losses.quantized(Sample(real), kind), kind, 1536) - real
    aided = losses.dequantized(losses.quantized(Sample(real, importance), kind), kind, 1536) - real
    for error, where in ((slice(0, 6), slice(0, 700)), (slice(6, 12), slice(700, 1536))):
        assert np.square(aided[error, where]).sum() < np.square(plain[error, where]).sum()
    (loss,) = losses.losses(Sample(real, importance), [kind])
    assert loss.weighted == pytest.approx(np.sqrt((aided.astype(float) ** 2 * importance).sum() / importance.sum()))


@pytest.mark.parametrize(
    ("name", "width", "said"),
    [("Q4_K", 576, "do not divide"), ("IQ2_XXS", 512, "importance"), ("Q8_1", 512, "only reads")],
)
def test_what_does_not_fit_is_said(name: str, width: int, said: str) -> None:
    sample = Sample(np.ones((2, width), np.float32))
    (loss,) = losses.losses(sample, [TENSOR_TYPES[name]])
    assert loss.rmse is None and loss.missing is not None and said in loss.missing
    with pytest.raises(Unsupported, match=said):
        losses.quantized(sample, TENSOR_TYPES[name])


def test_broken_weights_are_refused() -> None:
    rows = np.ones((2, 64), np.float32)
    rows[1, 3] = np.nan
    with pytest.raises(InvalidModel, match="NaN"):
        losses.losses(Sample(rows), [TENSOR_TYPES["Q4_0"]])


def test_zeros_have_no_relative_error() -> None:
    (loss,) = losses.losses(Sample(np.zeros((1, 32), np.float32)), [TENSOR_TYPES["Q4_0"]])
    assert (loss.rmse, loss.relative, loss.snr_db, loss.weighted) == (0, None, None, None)


def test_sampled_rows_are_spread() -> None:
    assert losses.sampled_rows(5, 100) == [0, 1, 2, 3, 4]
    chosen = losses.sampled_rows(100_000, 4096)
    assert len(chosen) == 64 and chosen[0] == 0 and len(set(np.diff(chosen))) <= 2 and max(chosen) < 100_000


def test_the_histogram_counts_all(real: np.ndarray) -> None:
    found = losses.histogram(real, np.round(real, 1))
    assert sum(found.before) == sum(found.after) == real.size
    assert found.distinct_after == len(np.unique(np.round(real, 1))) < found.distinct_before
    assert found.cut == (np.abs(real).max() > found.high)


# ── the command ──


def test_the_textbook(cli: Cli) -> None:
    shown = cli("inspect", "quant")
    assert shown.returncode == 0, shown.stderr
    assert "round(0.1 · 127 / 3.2) = round(3.97) = 4 → 4 · 3.2 / 127 = 0.1008" in shown.stdout
    for word in ("Dynamic", "Static", "Post-training", "quantization-aware", "weights"):
        assert word in shown.stdout


@pytest.fixture(scope="module")
def small(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> Iterator[Path]:
    yield gguf_of(tiny_checkpoint("llama", width=512), "bf16")


def test_a_tensor_of_a_model(cli: Cli, small: Path) -> None:
    shown = cli(
        "inspect", "quant", small, "blk.0.ffn_down.weight", "--type", "Q4_K,Q4_1", "--type", "F16", "--weight", 3
    )
    assert shown.returncode == 0, shown.stderr
    assert "Q4_K  super-block" in shown.stdout and "Q4_1  type-1" in shown.stdout
    assert "6 bits: scale 0 = byte 0 & 63" in shown.stdout and "weight 3: q = " in shown.stdout
    assert "Relative to the weights in BF16" in shown.stdout
    assert "not drawn: F16" in shown.stderr


def test_json_agrees_with_the_file(cli: Cli, small: Path) -> None:
    words = ("inspect", "quant", small, "blk.1.attn_q.weight", "--type", "Q5_K", "--row", 7, "--block", 1, "--json")
    found = json.loads(cli(*words).stdout)
    row = tensors.from_info(gguf.read(small).tensors["blk.1.attn_q.weight"]).float32(7, 8)
    assert found["before"] == [row[0, 256:512].tolist()]
    expected = losses.dequantized(losses.quantized(Sample(row), TENSOR_TYPES["Q5_K"]), TENSOR_TYPES["Q5_K"], 512)
    values = [value for group in found["blocks"][0]["groups"] for value in group["values"]]
    assert values == expected[0, 256:].tolist()
    assert [scaled["kind"] for scaled in found["scalings"]] == ["absmax", "absmax", "zero-point", "zero-point"]


def test_a_quantized_file_shows_its_own_blocks(cli: Cli, smollm2_gguf: Path) -> None:
    found = json.loads(cli("inspect", "quant", smollm2_gguf, "blk.3.ffn_down.weight", "--json").stdout)
    info = gguf.read(smollm2_gguf).tensors["blk.3.ffn_down.weight"]
    packed = tensors.from_info(info).read(0, 1).reshape(-1)[: info.type.nbytes]
    assert "".join(part["hex"] for part in found["blocks"][0]["parts"]).replace(" ", "") == packed.tobytes().hex()
    assert found["before"] == [None] and "what the file holds" in found["relative_to"]
    assert "rows, evenly spaced" in found["sampling"] and found["rows_compared"] < found["rows"]


def test_a_checkpoint_by_both_names(cli: Cli, tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama", width=512)
    stored = checkpoint.read(folder).tensors["model.layers.0.mlp.down_proj.weight"]
    row = tensors.from_stored(stored).float32(2, 3)[0, :32].tolist()
    for name in ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"):
        found = json.loads(cli("inspect", "quant", folder, name, "--type", "Q4_0", "--row", 2, "--json").stdout)
        assert found["before"] == [row]


def test_an_importance_matrix(cli: Cli, small: Path, tmp_path: Path) -> None:
    name, width = "blk.0.ffn_up.weight", 512
    sums = np.linspace(1, 90, width, dtype=np.float32)
    path = tmp_path / "imatrix.gguf"
    kind = TENSOR_TYPES["F32"]
    rows = [(f"{name}.in_sum2", (1, width), kind, sums.tobytes()), (f"{name}.counts", (1, 1), kind, b"\0\0\0@")]  # 2.0
    gguf_writer.write(path, {"general.type": gguf.Value.string("imatrix")}, rows)
    words = ("inspect", "quant", small, name, "--imatrix", path, "--type", "IQ2_XXS", "--json")
    found = json.loads(cli(*words).stdout)
    row = tensors.from_info(gguf.read(small).tensors[name]).float32(0, 1)
    packed = losses.quantized(Sample(row, (sums / np.float32(2))[None]), TENSOR_TYPES["IQ2_XXS"])
    drawn = bytes.fromhex("".join(part["hex"] for part in found["blocks"][0]["parts"]))
    assert drawn == packed[0, :66].tobytes() and found["weighted_by"] == "the importance matrix"
    other = cli("inspect", "quant", small, "blk.0.ffn_down.weight", "--imatrix", path)
    assert other.returncode == 1 and "holds nothing for" in other.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [(("blk.0.ffn_dwn.weight",), "Nearest: blk.0.ffn_down.weight"),
     (("blk.0.ffn_down.weight", "--row", "99999"), "rows 0 to"),
     (("blk.0.ffn_down.weight", "--block", "9999"), "blocks 0 to"), (("--type", "Q4_Z"), "unknown"),
     (("--type", "Q4_0", "--weight", "32"), "weights 0 to 31"), (("--type", "IQ1_S"), "importance matrix")],
)  # fmt: skip
def test_bad_words(cli: Cli, small: Path, words: tuple[str, ...], said: str) -> None:
    done = cli("inspect", "quant", small, *words)
    assert (done.returncode, done.stdout) == (1, "") and said in done.stderr, done.stderr


def test_rows_no_block_of_256_fits(cli: Cli, smollm2_gguf: Path) -> None:
    done = cli("inspect", "quant", smollm2_gguf, "blk.0.attn_q.weight", "--type", "Q6_K")
    assert done.returncode == 1 and "rows of 576 do not divide into blocks of 256" in done.stderr
    assert "These can be drawn: Q4_0" in done.stderr
    shown = cli("inspect", "quant", smollm2_gguf, "blk.0.attn_q.weight").stdout
    assert "Not Q6_K, Q5_K, Q4_K, IQ4_XS, Q3_K, Q2_K: rows of 576 do not divide into blocks of 256." in shown


def test_odd_and_broken_tensors(cli: Cli, tmp_path: Path) -> None:
    """Rows that no block fits are told so; NaN is found before a kernel meets it; zeros are drawn."""
    path, kind = tmp_path / "odd.gguf", TENSOR_TYPES["F32"]
    broken = np.ones((2, 64), np.float32)
    broken[0, 5] = np.nan
    arrays = {"odd": np.ones((3, 48), np.float32), "broken": broken, "zeros": np.zeros((2, 64), np.float32)}
    rows = [(name, array.shape, kind, array.tobytes()) for name, array in arrays.items()]
    gguf_writer.write(path, {"general.architecture": gguf.Value.string("llama")}, rows)
    shown = cli("inspect", "quant", path, "odd")
    assert shown.returncode == 0 and "rows of 48 do not divide into blocks of 32" in shown.stdout, shown.stderr
    done = cli("inspect", "quant", path, "broken")
    assert done.returncode == 1 and "row 0 holds NaN" in done.stderr
    assert cli("inspect", "quant", path, "broken", "--row", 1).returncode == 1, "the sample holds it"
    zeros = cli("inspect", "quant", path, "zeros", "--type", "Q4_0,Q6_K")
    assert zeros.returncode == 0 and "Q4_0  type-0" in zeros.stdout, zeros.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the stand-in's fixtures need POSIX")
def test_of_the_hub_only_the_rows_come(desk: Desk, root: Path) -> None:
    here = root / QUANTIZED / "tiny-Q8_0.gguf"
    name = "blk.2.ffn_down.weight"
    found = json.loads(desk.ok("inspect", "quant", f"{QUANTIZED}:Q8_0", name, "--rows", 4, "--json").stdout)
    info = gguf.read(here).tensors[name]
    asked = [request.range for request in weights(desk.hub)][1:]
    size = info.type.row_nbytes(info.shape[-1])
    assert asked == [f"bytes={info.offset}-{info.offset + rows * size - 1}" for rows in (1, 4)]
    there = json.loads(desk.ok("inspect", "quant", here, name, "--rows", 4, "--json").stdout)
    assert found["blocks"] == there["blocks"] and found["rows_compared"] == 4
    layer = "model.layers.1.mlp.up_proj.weight"
    found = json.loads(desk.ok("inspect", "quant", TINY, layer, "--type", "Q4_0", "--json").stdout)
    row = tensors.from_stored(checkpoint.read(root / TINY).tensors[layer]).float32(0, 1)
    assert found["before"] == [row[0, :32].tolist()]
    said = desk.refused("inspect", "quant", TINY, "blk.0.attn_q.weight")
    assert "Name it as the checkpoint does" in said


# ── the model used last ──


def test_the_last_model_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Cli) -> None:
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path / "home"))
    assert last_model() is None
    model = tmp_path / "a model.gguf"
    model.touch()
    remember_model(model)
    assert last_model() == model
    assert f"llmkit inspect quant '{model}'" in cli("inspect", "quant").stderr
    model.unlink()
    assert last_model() is None
    (tmp_path / "home" / "last-model").write_bytes(b"\0\xff")
    assert last_model() is None
    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path / "home" / "last-model"))
    remember_model(tmp_path)  # nowhere to keep it: no error


def test_kernels_are_asked_once_for_rows_that_share_importance(real: np.ndarray) -> None:
    """Rows split by importance are packed as each alone would be."""
    importance = np.repeat(np.abs(real[[0, 5]]) + 0.01, 6, axis=0)
    together = losses.quantized(Sample(real, importance), TENSOR_TYPES["Q4_K"])
    alone = [losses.quantized(Sample(real[[i]], importance[[i]]), TENSOR_TYPES["Q4_K"]) for i in range(len(real))]
    assert together.tobytes() == b"".join(each.tobytes() for each in alone)
    assert engine.load().row_size(12, 1536) == together.shape[1]
