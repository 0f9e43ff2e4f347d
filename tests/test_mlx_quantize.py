"""quantize --mlx: what is written is what was planned, what MLX's own code makes, and what mlx_lm reads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import desks
from conftest import Cli, TinyCheckpoint, cli_environment
from desks import TINY, Desk, weights
from llmkit import backends, checkpoint
from llmkit.errors import InvalidModel, LlmkitError, ModelNotFound, OutputExists, Unsupported
from llmkit.quantize import mlx, mlx_writing

pytest.importorskip("mlx.core", reason="MLX is not installed (it has no wheels for this machine)")

root, serving, desk, silence = desks.root, desks.serving, desks.desk, desks.silence  # fixtures
# (wishes, bits per weight of a matrix with 16-bit floats): bits + 32 / group, or what the mode's scales of 8 bits take
FORMULAS = [
    ({"bits": 2}, 2.5), ({"bits": 3}, 3.5), ({"bits": 4}, 4.5), ({"bits": 5}, 5.5), ({"bits": 6}, 6.5),
    ({"bits": 8}, 8.5), ({"bits": 4, "group": 32}, 5.0), ({"bits": 4, "group": 128}, 4.25), ({"mode": "mxfp4"}, 4.25),
    ({"mode": "nvfp4"}, 4.5), ({"mode": "mxfp8"}, 8.25),
]  # fmt: skip
MODELS = ("llama", "qwen2", "gemma3")


def folder_of(tiny_checkpoint: TinyCheckpoint, family: str, **options: Any) -> Path:
    return tiny_checkpoint(family, width=128, **({"layers": 7} if family == "gemma3" else {}), **options)


def written_nbytes(folder: Path) -> int:
    """The weights' bytes by the file itself: its size without length and header."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


@pytest.mark.parametrize(("wishes", "bits"), FORMULAS)
def test_bits_per_weight(wishes: dict[str, Any], bits: float, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Planned, reported and on the disk: one number, and for matrices the formula's."""
    source = folder_of(tiny_checkpoint, "llama")
    planned = mlx.plan(source, tmp_path, **wishes)
    result = mlx_writing.run(planned)
    assert result.weight_nbytes == planned.nbytes == written_nbytes(planned.path)
    matrices = [tensor for tensor in planned.tensors if len(tensor.source.shape) == 2]
    assert {8 * tensor.nbytes / prod(tensor.source.shape) for tensor in matrices} == {bits}
    n_weights = sum(prod(tensor.shape) for tensor in checkpoint.read(source).tensors.values())
    assert result.bits_per_weight == pytest.approx(8 * written_nbytes(planned.path) / n_weights)
    assert result.bits_per_weight == pytest.approx(float(planned.bits_per_weight))
    assert planned.skipped == ()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("wishes", [{"bits": 4}, {"bits": 3, "group": 32}, {"mode": "mxfp4"}])
def test_our_backend_runs_it(
    family: str, wishes: dict[str, Any], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """The logits are those of the same weights rounded by mlx.core.quantize and put back into a dense checkpoint."""
    from llmkit import mlx_engine

    core = mlx_engine.load().core
    source = folder_of(tiny_checkpoint, family, dtype="f32")
    planned = mlx.plan(source, tmp_path / "out", **wishes)
    mlx_writing.run(planned)
    dense = tmp_path / "dense"
    shutil.copytree(source, dense)
    arrays = core.load(str(source / "model.safetensors"))
    for tensor in planned.tensors:
        if packing := tensor.packing:
            how = {"group_size": packing.group, "bits": packing.bits, "mode": packing.mode}
            packed = core.quantize(arrays[tensor.name], **how)
            arrays[tensor.name] = core.dequantize(*packed, **how).astype(core.float32)
    core.save_safetensors(str(dense / "model.safetensors"), arrays, {"format": "mlx"})
    ids = [5, 9, 200, 33, 7, 61]
    found, expected = (backends.load(folder, backend="mlx") for folder in (planned.path, dense))
    ours, theirs = (each.session(16).eval(ids, logits="all").logits for each in (found, expected))
    assert np.abs(ours - theirs).max() < 1e-5 * np.ptp(theirs)
    assert np.array_equal(found.embed(ids), expected.embed(ids))
    assert found.info.n_params == expected.info.n_params == planned.n_weights
    assert found.info.weight_nbytes == written_nbytes(planned.path)


_READ_BY_MLX_LM = """
import json, sys
import mlx.core as mx, mlx_lm
ids = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    model, tokenizer = mlx_lm.load(folder)
    logits = model(mx.array([ids]))[0].astype(mx.float32).tolist()
    print(json.dumps({"logits": logits, "ids": tokenizer.encode("Hello world", add_special_tokens=False)}))
"""


@pytest.mark.slow
def test_mlx_lm_reads_it(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """mlx_lm's own loader, in its own process, gives our logits: config.json is said in words that it knows."""
    ids = [5, 9, 200, 33, 7, 61] * 12
    folders = []
    for family, style in (("llama3", 5), ("gemma3", 5), ("qwen3", 4), ("smollm", 4)):
        layers = 7 if family == "gemma3" else 2
        # of width 256 Gemma's factor, 16, is a number of bfloat16, to which mlx_lm rounds it
        source = tiny_checkpoint(family, width=256, layers=layers, dtype="f32", config_style=style)
        folders.append(mlx_writing.run(mlx.plan(source, tmp_path, bits=4)).path)
    done = subprocess.run(
        [sys.executable, "-c", _READ_BY_MLX_LM, json.dumps(ids), *map(str, folders)],
        capture_output=True, text=True, env=cli_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for folder, read in zip(folders, answers, strict=True):
        backend = backends.load(folder, backend="mlx")
        ours = backend.session(128).eval(ids, logits="all").logits
        assert np.abs(ours - np.array(read["logits"], np.float32)).max() < 1e-5 * np.ptp(ours), folder
        assert backend.encode("Hello world") == read["ids"]


def test_the_arrays_are_those_mlx_makes(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Byte for byte mlx.nn.quantize of the whole model, from BF16, though ours are made a few rows at a time."""
    from llmkit import mlx_engine

    engine = mlx_engine.load()
    source = folder_of(tiny_checkpoint, "llama", tied=True)
    planned = mlx.plan(source, tmp_path, bits=3, embedding_bits=6)
    step = mlx_writing._CHUNK_WEIGHTS
    mlx_writing._CHUNK_WEIGHTS = 1000
    try:
        mlx_writing.run(planned)
    finally:
        mlx_writing._CHUNK_WEIGHTS = step
    module = mlx_engine.architecture("llama")
    model = module.Model(module.ModelArgs.from_dict(json.loads((source / "config.json").read_text())))
    model.load_weights(list(engine.core.load(str(source / "model.safetensors")).items()))
    table = model.model.embed_tokens
    engine.nn.quantize(
        model, 64, 3, class_predicate=lambda _, each: hasattr(each, "to_quantized") and each is not table
    )
    model.model.embed_tokens = table.to_quantized(64, 6)
    expected = engine.flatten(model.parameters())
    found = engine.core.load(str(planned.path / "model.safetensors"))
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype and engine.core.array_equal(array, expected[name]).item(), name
    quantization = json.loads((planned.path / "config.json").read_text())["quantization"]
    assert quantization["bits"] == 3 and quantization["model.embed_tokens"]["bits"] == 6


def test_tied_embeddings_get_more_bits_unless_told(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    tied, untied = folder_of(tiny_checkpoint, "llama", tied=True), folder_of(tiny_checkpoint, "llama")

    def bits(source: Path, **wishes: Any) -> int | None:
        planned = mlx.plan(source, tmp_path, **wishes)
        packing = next(tensor.packing for tensor in planned.tensors if tensor.name == "model.embed_tokens.weight")
        return packing.bits if packing else None

    assert bits(tied, bits=4) == bits(tied, mode="nvfp4") == 6
    assert bits(tied, bits=8) == 8 and bits(tied, bits=4, embedding_bits=4) == 4
    assert bits(untied, bits=4) == 4 and bits(untied, bits=4, embedding_bits=8) == 8
    assert any("output matrix" in note for note in mlx.plan(tied, tmp_path, bits=4).notes)


def test_matrices_that_groups_do_not_divide_are_named(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, cli: Cli
) -> None:
    """Width 576, as SmolLM2 has it: groups of 128 do not divide it, and do divide the feed-forward's 1152."""
    source = tiny_checkpoint("smollm", width=576)
    done = cli("quantize", source, "--mlx", "--bits", 4, "--group", 128, "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    widths = {name: tensor.shape[-1] for name, tensor in checkpoint.read(source).tensors.items() if "norm" not in name}
    assert set(told["skipped"]) == {name for name, width in widths.items() if width % 128}
    assert 0 < len(told["skipped"]) < len(widths)
    assert "model.layers.*.mlp.gate_proj.weight: groups of 128 do not divide its width 576 (2 of them)" in done.stderr
    assert "--group 64 divides them all" in done.stderr
    folder = Path(told["path"])
    n_weights = sum(prod(tensor.shape) for tensor in checkpoint.read(source).tensors.values())
    assert told["measured"]["bits_per_weight"] == pytest.approx(8 * written_nbytes(folder) / n_weights)
    assert told["measured"]["bits_per_weight"] > 9
    backend = backends.load(folder, backend="mlx")
    assert np.isfinite(backend.session(8).eval([3, 4]).logits).all()
    backend.close()


def test_the_estimate_is_what_is_written(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    from llmkit import convert
    from llmkit.memory import mlx_estimate

    for family in ("llama", "qwen2"):
        source = folder_of(tiny_checkpoint, family)
        for bits, group in ((4, 64), (3, 32), (8, 128)):
            told = mlx_estimate.estimate(convert.open_draft(source), 256, bits=bits, group=group)
            assert told.part("weights") == mlx.plan(source, tmp_path, bits=bits, group=group).nbytes


def test_dry_run_and_json(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, cli: Cli) -> None:
    source = folder_of(tiny_checkpoint, "smollm")
    shown = cli("quantize", source, "--mlx", "--out", tmp_path / "out", "--dry-run")
    assert shown.returncode == 0 and "affine 4-bit, groups of 64" in shown.stdout and "(derived)" in shown.stdout
    assert "Nothing was written" in shown.stderr and not (tmp_path / "out").exists()
    told = json.loads(cli("quantize", source, "--mlx", "--out", tmp_path / "out", "--dry-run", "--json").stdout)
    made = cli("quantize", source, "--mlx", "--out", tmp_path / "out")
    assert made.returncode == 0, made.stderr
    assert "(measured)" in made.stdout and "--backend mlx" in made.stderr
    folder = Path(told["path"])
    assert folder.name == "tiny-smollm-MLX-4bit"
    assert told["derived"]["weight_nbytes"] == written_nbytes(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    again = cli("quantize", source, "--mlx", "--out", tmp_path / "out")
    assert again.returncode == 1 and "exists" in again.stderr and "--force" in again.stderr
    assert cli("quantize", source, "--mlx", "--out", tmp_path / "out", "--force").returncode == 0
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_model_of_the_hub(desk: Desk) -> None:
    """Planned from headers; what is in the way is told before weights are fetched; named after the repository."""
    told = json.loads(desk.ok("quantize", TINY, "--mlx", "--dry-run", "--json").stdout)
    assert told["path"] == "tiny-MLX-4bit"
    (desk.out / told["path"]).mkdir()
    assert "exists" in desk.refused("quantize", TINY, "--mlx")
    assert sum(request.sent for request in weights(desk.hub)) < 600_000
    (desk.out / told["path"]).rmdir()
    made = json.loads(desk.ok("quantize", TINY, "--mlx", "--json").stdout)
    assert made["path"] == told["path"]
    assert made["measured"]["weight_nbytes"] == told["derived"]["weight_nbytes"]
    assert written_nbytes(desk.out / made["path"]) == told["derived"]["weight_nbytes"]


def test_a_failure_leaves_nothing_and_spoils_nothing(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder_of(tiny_checkpoint, "llama"), source)
    out = tmp_path / "out"
    planned = mlx.plan(source, out, bits=4)
    mlx_writing.run(planned)
    before = (planned.path / "model.safetensors").read_bytes()
    tensor = planned.tensors[3].source
    with open(tensor.path, "r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\xff\xff")  # a NaN of bfloat16
    with pytest.raises(InvalidModel, match=tensor.name):
        mlx_writing.run(planned, force=True)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mlx_writing.run(planned, force=True, on_progress=interrupt)
    assert [path.name for path in out.iterdir()] == [planned.path.name]
    assert (planned.path / "model.safetensors").read_bytes() == before
    with pytest.raises(OutputExists):
        mlx_writing.run(planned)


def test_shards(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many files as needed, an index, and the same model."""
    source = folder_of(tiny_checkpoint, "llama")
    whole, cut = mlx.plan(source, tmp_path / "whole", bits=4), mlx.plan(source, tmp_path / "cut", bits=4)
    mlx_writing.run(whole)
    monkeypatch.setattr(mlx_writing, "_SHARD_NBYTES", 50_000)
    mlx_writing.run(cut)
    assert len(list(cut.path.glob("model-0000?-of-0000?.safetensors"))) > 2
    assert (cut.path / "model.safetensors.index.json").is_file()
    models = [backends.load(planned.path, backend="mlx") for planned in (whole, cut)]
    first, second = (model.session(8).eval([3, 4]).logits for model in models)
    assert np.array_equal(first, second)


def test_what_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, cli: Cli) -> None:
    source = folder_of(tiny_checkpoint, "llama")
    wrong: list[dict[str, Any]] = [
        {"bits": 7}, {"bits": 1}, {"group": 16}, {"mode": "mxfp4", "bits": 8}, {"mode": "nvfp4", "group": 64},
        {"mode": "gptq"}, {"embedding_bits": 9},
    ]  # fmt: skip
    for wishes in wrong:
        with pytest.raises(Unsupported):
            mlx.plan(source, tmp_path, **wishes)
    mlx_writing.run(planned := mlx.plan(source, tmp_path))
    with pytest.raises(Unsupported, match="quantized already"):
        mlx.plan(planned.path, tmp_path)
    with pytest.raises(ModelNotFound):
        mlx.plan(tmp_path / "nowhere", tmp_path)
    foreign = tmp_path / "foreign"
    shutil.copytree(source, foreign)
    (foreign / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(Unsupported, match="mamba"):
        mlx.plan(foreign, tmp_path)
    with pytest.raises(LlmkitError):
        mlx.plan(source / "config.json", tmp_path)
    for arguments, said in (
        ([source, "Q4_K_M", "--mlx"], "is a quant of GGUF files"),
        ([source, "--mlx", "--pure"], "--pure means nothing with --mlx"),
        ([source, "Q8_0", "--bits", "4"], "--bits needs --mlx"),
    ):
        done = cli("quantize", *arguments, "--out", tmp_path)
        assert done.returncode == 1 and said in done.stderr, done.stderr


def test_a_folder_with_packed_weights_that_do_not_fit(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    mlx_writing.run(planned := mlx.plan(folder_of(tiny_checkpoint, "llama"), tmp_path, bits=4))
    config = json.loads((planned.path / "config.json").read_text())
    (planned.path / "config.json").write_text(json.dumps({**config, "intermediate_size": 200}))
    with pytest.raises(InvalidModel, match="down_proj"):
        backends.load(planned.path, backend="mlx")


@pytest.mark.parametrize("prefix", ("language_model.", "model.language_model."))
def test_the_text_part_of_a_multimodal_model(prefix: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Gemma 3 with its vision part: run as it is, and quantized without it."""
    from llmkit import mlx_engine

    core = mlx_engine.load().core
    source = folder_of(tiny_checkpoint, "gemma3", dtype="f32")
    whole = tmp_path / "whole"
    shutil.copytree(source, whole)
    config = json.loads((source / "config.json").read_text())
    kind = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    (whole / "config.json").write_text(json.dumps({**kind, "text_config": config, "vision_config": {"hidden_size": 8}}))
    plain = core.load(str(source / "model.safetensors"))
    inner = {name.removeprefix("model.") if "model." in prefix[:6] else name: array for name, array in plain.items()}
    arrays = {f"{prefix}{name}": array for name, array in inner.items()} | {"vision_tower.x.weight": core.zeros((4, 4))}
    core.save_safetensors(str(whole / "model.safetensors"), arrays, {"format": "pt"})
    first, second = (backends.load(folder, backend="mlx").session(32).eval([5, 9, 7] * 8) for folder in (source, whole))
    assert np.array_equal(first.logits, second.logits)
    planned = mlx.plan(whole, tmp_path / "out", bits=8)
    assert any("no part of the text model" in note for note in planned.notes)
    result = mlx_writing.run(planned)
    quantized = backends.load(result.path, backend="mlx").session(32).eval([5, 9, 7] * 8).logits
    assert np.abs(quantized - first.logits).max() < 0.05 * np.ptp(first.logits)
    assert not any("vision" in name for name in checkpoint.read(result.path).tensors)
