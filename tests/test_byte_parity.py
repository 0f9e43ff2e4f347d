"""Our files against those of llama.cpp's own converter and quantizer: every tensor's bytes, every key and its place."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oracle
from conftest import GgufOf, TinyCheckpoint
from llmkit import checkpoint, convert, gguf, quantize
from llmkit.errors import LlmkitError
from llmkit.quantize import Recipe
from llmkit.quantize import imatrix as imatrix_files
from llmkit.quants import QUANTS, quant

FAMILIES = ("llama", "llama3", "mistral", "smollm", "qwen2", "qwen3", "gemma3")
WIDE: dict[str, Any] = {"width": 256, "layers": 3}  # rows of 256 and 512: every type fits
NEED_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
FREE = tuple(name for name in QUANTS if name not in NEED_IMATRIX)
QUICK = ("Q4_K_M", "Q3_K_L", "Q8_0", "F16", "COPY")
PRE = {"llama3": "llama-bpe", "smollm": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}


def quantize_ours(
    source: Path, out: Path, names: tuple[str, ...], imatrix: Path | None = None, **options: Any
) -> dict[str, Path]:
    """All the quants in one pass on two threads; quant name → file."""
    importance = imatrix_files.read(imatrix) if imatrix else None
    recipes = [Recipe(quant(name)) for name in names]
    plan = quantize.plan(convert.open_draft(source), recipes, out, imatrix=importance, **options)
    out.mkdir(exist_ok=True)
    return {result.output.label: result.output.path for result in quantize.run(plan, threads=2)}


@contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, gguf.TensorInfo], mmap.mmap]]:
    """Header and bytes of a file, by our reader: test_gguf holds it against the package gguf, which is far slower."""
    tensors = gguf.read(path).tensors
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield tensors, content


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    """Names, order, types, shapes and bytes; and as many bytes behind the header."""
    with opened(ours) as (mine, my_bytes), opened(theirs) as (other, other_bytes):
        assert list(mine) == list(other)
        for name, info in mine.items():
            truth = other[name]
            assert (info.type, info.shape) == (truth.type, truth.shape), name
            expected = other_bytes[truth.offset : truth.offset + truth.nbytes]
            same = my_bytes[info.offset : info.offset + info.nbytes] == expected
            assert same, f"{ours.name}: {name} ({info.type.name}) differs"
        first, first_other = (min(info.offset for info in tensors.values()) for tensors in (mine, other))
        assert len(my_bytes) - first == len(other_bytes) - first_other, "padding differs"


def check_against_engine(source: Path, plain: Path, out: Path, names: tuple[str, ...]) -> None:
    """Our quants of `source` equal llama_model_quantize's of `plain`; files are deleted once compared."""
    made = quantize_ours(source, out, names)
    references = {name: out / f"reference-{name}.gguf" for name in names}
    oracle.reference_quantize_all(plain, references, n_threads=2)
    for name, ours in made.items():
        assert_same_tensors(ours, references[name])
        ours.unlink()
        references[name].unlink()


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_usual_quants(family: str, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family, **WIDE)
    check_against_engine(folder, gguf_of(folder, "bf16"), tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_free_quant(family: str, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family, **WIDE)
    check_against_engine(folder, gguf_of(folder, "bf16"), tmp_path, FREE)


@pytest.mark.slow
@pytest.mark.parametrize("name", FREE)
def test_smollm2(name: str, smollm2_folder: Path, gguf_of: GgufOf, tmp_path: Path) -> None:
    check_against_engine(smollm2_folder, gguf_of(smollm2_folder, "bf16"), tmp_path, (name,))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_other_sources(dtype: str, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", dtype=dtype, **WIDE)
    check_against_engine(folder, gguf_of(folder, dtype), tmp_path, ("Q4_K_M", "Q5_1", "BF16", "F16"))


def test_from_a_gguf(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    plain = gguf_of(tiny_checkpoint("qwen3", **WIDE), "bf16")
    check_against_engine(plain, plain, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["Q8_0", "Q4_K_M", "IQ4_XS"])
def test_requantizing(first: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", **WIDE)
    source = quantize_ours(folder, tmp_path / "once", (first,))[first]
    ours = quantize_ours(source, tmp_path / "twice", ("Q3_K_M",), requantize=True)["Q3_K_M"]
    theirs = oracle.reference_quantize(source, tmp_path / "reference.gguf", "Q3_K_M", requantize=True)
    assert_same_tensors(ours, theirs)


def test_rows_that_fit_no_block(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    """Rows of 96 and 192: the engine falls back to other types, and so do we."""
    folder = tiny_checkpoint("llama", width=96)
    check_against_engine(folder, gguf_of(folder, "bf16"), tmp_path, ("Q4_K_M", "Q6_K", "IQ4_XS", "Q2_K", "TQ2_0"))


def test_split_output_holds_the_same_tensors(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", **WIDE)
    first = quantize_ours(folder, tmp_path / "split", ("Q4_K_M",), split_nbytes=400_000)["Q4_K_M"]
    whole = oracle.reference_quantize(gguf_of(folder, "bf16"), tmp_path / "reference.gguf", "Q4_K_M")
    parts = sorted(first.parent.glob("*.gguf"))
    assert len(parts) > 2 and first == parts[0]
    found: dict[str, oracle.Tensor] = {}
    for number, part in enumerate(parts):
        found |= oracle.tensor_bytes(part)
        keys = oracle.metadata(part)
        assert [keys[f"split.{key}"] for key in ("no", "count")] == [("UINT16", number), ("UINT16", len(parts))]
    assert not list(oracle.differing(found, oracle.tensor_bytes(whole)))


# --- importance ------------------------------------------------------------------------------------------------------


def importance_of(path: Path) -> dict[str, tuple[oracle.FloatArray, float]]:
    """Made-up sums of squares and counts for each matrix of a GGUF but the embedding; one was never used."""
    chance = np.random.default_rng(11)
    found = {}
    for name, info in gguf.read(path).tensors.items():
        if len(info.shape) == 2 and name != "token_embd.weight":
            count = 0.0 if name == "blk.1.attn_k.weight" else 512.0
            found[name] = ((chance.standard_normal(info.shape[1]) ** 2 * 300 + 1).astype(np.float32), count)
    return found


def write_gguf_imatrix(path: Path, values: dict[str, tuple[oracle.FloatArray, float]]) -> None:
    """As llama-imatrix writes it today, by the package gguf."""
    import gguf as package

    writer = package.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # an importance matrix has no architecture
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt", "second.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, count) in sorted(values.items()):
        writer.add_tensor(f"{name}.in_sum2", sums.reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[count]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_legacy_imatrix(path: Path, values: dict[str, tuple[oracle.FloatArray, float]]) -> None:
    """The older format: count; name, calls, values; then chunks and the text's name."""
    parts = [struct.pack("<i", len(values))]
    for name, (sums, count) in values.items():
        parts += [
            struct.pack("<i", len(name)),
            name.encode(),
            struct.pack("<ii", int(count), sums.size),
            sums.tobytes(),
        ]
    path.write_bytes(b"".join(parts) + struct.pack("<ii", 7, 15) + b"calibration.txt")


def engine_importance(values: dict[str, tuple[oracle.FloatArray, float]], legacy: bool) -> dict[str, oracle.FloatArray]:
    """What llama.cpp's tools/quantize makes of those files: sum over count; never used: ones, or as it stands (old)."""
    found = {}
    for name, (sums, count) in values.items():
        unused = sums if legacy else np.ones_like(sums)
        found[name] = sums / np.float32(count) if count else unused
    return found


SLOW_FORMS = [pytest.param(family, form, marks=pytest.mark.slow) for family in FAMILIES for form in ("gguf", "legacy")]


@pytest.mark.parametrize(("family", "form"), [("llama", "gguf"), *SLOW_FORMS[1:]])
def test_with_importance(
    family: str, form: str, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family, **WIDE)
    plain = gguf_of(folder, "bf16")
    values, path = importance_of(plain), tmp_path / f"imatrix.{form}"
    {"gguf": write_gguf_imatrix, "legacy": write_legacy_imatrix}[form](path, values)
    truth = oracle.Imatrix(engine_importance(values, form == "legacy"), str(path), "calibration.txt", 7)
    names = ("Q4_K_M", "IQ4_XS", "IQ2_XXS")
    ours = quantize_ours(folder, tmp_path, names, path)
    unweighted = quantize_ours(folder, tmp_path / "plain", ("Q4_K_M",))["Q4_K_M"]
    theirs = {name: tmp_path / f"reference-{name}.gguf" for name in names}
    oracle.reference_quantize_all(plain, theirs, truth)
    for name in names:
        assert_same_tensors(ours[name], theirs[name])
        compare_metadata(ours[name], theirs[name], allowed=PROVENANCE)
    assert ours["Q4_K_M"].read_bytes() != unweighted.read_bytes(), "the importance must have had an effect"


@pytest.mark.slow
def test_smollm2_with_importance(smollm2_folder: Path, gguf_of: GgufOf, tmp_path: Path) -> None:
    plain, path = gguf_of(smollm2_folder, "bf16"), tmp_path / "imatrix.gguf"
    values = importance_of(plain)
    write_gguf_imatrix(path, values)
    truth = oracle.Imatrix(engine_importance(values, False), str(path), "calibration.txt", 7)
    names = ("Q4_K_M", "IQ4_XS", "IQ2_XXS")
    for name, ours in quantize_ours(smollm2_folder, tmp_path, names, path).items():
        assert_same_tensors(ours, oracle.reference_quantize(plain, tmp_path / "reference.gguf", name, truth))


@pytest.mark.slow
@pytest.mark.parametrize("name", NEED_IMATRIX)
def test_every_quant_that_needs_importance(
    name: str, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("llama", **WIDE)
    with pytest.raises(LlmkitError, match=f"{name} needs an importance matrix"):
        quantize_ours(folder, tmp_path, (name,))
    plain, path = gguf_of(folder, "bf16"), tmp_path / "imatrix.gguf"
    write_gguf_imatrix(path, importance_of(plain))
    truth = oracle.Imatrix(engine_importance(importance_of(plain), False))
    ours = quantize_ours(folder, tmp_path, (name,), path)[name]
    assert_same_tensors(ours, oracle.reference_quantize(plain, tmp_path / "reference.gguf", name, truth))


# --- metadata --------------------------------------------------------------------------------------------------------

PROVENANCE = {"llmkit.": "our own keys: where the file comes from and how it was made"}
GUESSED = {
    "general.name": "llama.cpp re-spells the folder's name (tiny-llama → Tiny Llama), we take it as it is",
    "general.basename": "llama.cpp guesses it from the folder's name",
    "general.version": "llama.cpp guesses it from the folder's name",
    "general.finetune": "llama.cpp guesses it from the folder's name",
}
BY_FAMILY = {
    "mistral": {
        "tokenizer.ggml.scores": "of a tokenizer.json without scores llama.cpp makes -1000 for every piece, with which "
        "the engine joins pieces in the wrong order; we number them by their merges"
    },
    "gemma3": {
        "tokenizer.ggml.tokens": "llama.cpp invents [PADn] tokens for embedding rows beyond the tokenizer, we cut them",
        "tokenizer.ggml.scores": "as tokens",
        "tokenizer.ggml.token_type": "as tokens",
        "general.size_label": "counts the rows we cut",
    },
}
FILLED_IN = {
    f"llama.attention.{key}_length": "llama.cpp reads config.json through transformers, which fills head_dim in; the "
    "engine takes hidden/heads when the key is missing, which is the same"
    for key in ("key", "value")
}


def compare_metadata(ours: Path, theirs: Path, allowed: dict[str, str]) -> None:
    """Same keys, types, values and order, but for keys that begin with one of `allowed`."""
    mine, other = oracle.metadata(ours), oracle.metadata(theirs)
    mine, other = (
        {key: value for key, value in keys.items() if not key.startswith(tuple(allowed))} for keys in (mine, other)
    )
    assert {key: value for key, value in mine.items() if other.get(key) != value} == {
        key: other[key] for key, value in mine.items() if key in other and other[key] != value
    }, "keys of ours that differ"
    assert mine.keys() == other.keys()
    assert list(mine) == list(other)


@pytest.mark.slow
@pytest.mark.parametrize("style", [4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_metadata(family: str, style: int, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family, config_style=style, **WIDE)
    allowed = {**PROVENANCE, **GUESSED, **BY_FAMILY.get(family, {}), **(FILLED_IN if style == 4 else {})}
    plain = oracle.reference_convert(folder, tmp_path / "reference-BF16.gguf", "bf16", pre=PRE.get(family))
    compare_metadata(gguf_of(folder, "bf16"), plain, allowed)
    same_as_converter(gguf_of(folder, "bf16"), plain, family)
    ours = quantize_ours(folder, tmp_path, ("Q4_K_M",))["Q4_K_M"]
    theirs = oracle.reference_quantize(plain, tmp_path / "reference.gguf", "Q4_K_M")
    compare_metadata(ours, theirs, allowed)
    assert list(gguf.read(ours).tensors) == list(gguf.read(theirs).tensors)


def same_as_converter(ours: Path, theirs: Path, family: str) -> None:
    """The tensors of llama.cpp's converter, bit for bit. Its order is by Hugging Face's names, ours the quantizer's."""
    mine, other = oracle.tensor_bytes(ours), oracle.tensor_bytes(theirs)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        truth = other[name]
        if name == "rope_freqs.weight":  # llama.cpp computes these few factors in float32, we in float64
            found, expected = (np.frombuffer(each.data, np.float32) for each in (tensor, truth))
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        elif name == "token_embd.weight" and family == "gemma3":
            assert truth.data.startswith(tensor.data)
        else:
            assert tensor == truth, name


@pytest.mark.slow
def test_metadata_of_smollm2(smollm2_folder: Path, gguf_of: GgufOf, tmp_path: Path) -> None:
    plain = oracle.reference_convert(smollm2_folder, tmp_path / "reference-BF16.gguf", "bf16")
    allowed = {**PROVENANCE, **GUESSED, **FILLED_IN}
    compare_metadata(gguf_of(smollm2_folder, "bf16"), plain, allowed)
    same_as_converter(gguf_of(smollm2_folder, "bf16"), plain, "llama")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "auto"])
def test_other_conversions(kind: str, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    folder = tiny_checkpoint("smollm", **WIDE)
    theirs = oracle.reference_convert(folder, tmp_path / "reference.gguf", kind, pre="smollm")
    same_as_converter(gguf_of(folder, kind), theirs, "smollm")
    compare_metadata(gguf_of(folder, kind), theirs, {**PROVENANCE, **GUESSED, **FILLED_IN})


def test_draft_reads_no_weights_to_plan(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """A plan's header has the size of the file: everything is known before the first weight is read."""
    draft = convert.from_checkpoint(checkpoint.read(tiny_checkpoint("llama", **WIDE)))
    (output,) = quantize.plan(draft, [Recipe(quant("Q4_K_M"))], tmp_path).outputs
    assert not list(tmp_path.iterdir())
    (result,) = quantize.run(quantize.plan(draft, [Recipe(quant("Q4_K_M"))], tmp_path), threads=1)
    assert result.output.path.stat().st_size == output.nbytes
