"""Plans, recipes and journals; that the bytes are llama.cpp's is test_byte_parity's business."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import oracle
from conftest import Cli, GgufOf, TinyCheckpoint
from llmkit import convert, engine, gguf, quantize
from llmkit.errors import EngineError, LlmkitError, OutputExists, Unsupported
from llmkit.progress import Progress
from llmkit.quantize import Recipe, parse_tensor_type
from llmkit.quants import QUANTS, TENSOR_TYPES, TENSOR_TYPES_BY_ID, quant, tensor_type
from llmkit.store import partial_path


@pytest.fixture
def draft(tiny_checkpoint: TinyCheckpoint) -> convert.GgufDraft:
    return convert.open_draft(tiny_checkpoint("llama", width=256))


@pytest.fixture
def tied(tiny_checkpoint: TinyCheckpoint) -> convert.GgufDraft:
    return convert.open_draft(tiny_checkpoint("smollm", width=256))


def types(draft: convert.GgufDraft, recipe: Recipe, tmp_path: Path) -> dict[str, str]:
    planned = quantize.plan(draft, [recipe], tmp_path)
    return {name: kind.name for name, kind in planned.outputs[0].types.items()}


# --- tables against the engine ---------------------------------------------------------------------------------------


def test_tensor_types_are_the_engine_s() -> None:
    loaded = engine.load()
    for number, row in TENSOR_TYPES_BY_ID.items():
        assert loaded.row_size(number, 4 * row.block) == 4 * row.nbytes, row.name
        assert loaded.functions["ggml_type_name"](number).decode().lower() == row.name.lower()


def test_file_types_are_the_engine_s() -> None:
    llama = engine.load().llama
    for name, row in QUANTS.items():
        if name != "COPY":
            symbol = "LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}"
            assert getattr(llama, symbol) == row.ftype, name


@pytest.mark.parametrize(("wrong", "near"), [("Q4_K_N", "Q4_K_M"), ("q4km", "Q4_K_M"), ("IQ4XS", "IQ4_XS")])
def test_nearest_quant(wrong: str, near: str) -> None:
    with pytest.raises(Unsupported) as caught:
        quant(wrong)
    assert caught.value.hint and near in caught.value.hint


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_patterns_first_match_wins(draft: convert.GgufDraft, tmp_path: Path) -> None:
    patterns = (parse_tensor_type("blk\\.0\\.ffn_down=Q8_0"), parse_tensor_type("ffn_down=Q3_K"))
    found = types(draft, Recipe(quant("Q4_K_M"), patterns), tmp_path)
    assert found["blk.0.ffn_down.weight"] == "Q8_0" and found["blk.1.ffn_down.weight"] == "Q3_K"


def test_output_and_embedding_type(draft: convert.GgufDraft, tmp_path: Path) -> None:
    recipe = Recipe(quant("Q4_K_M"), output_type=tensor_type("Q8_0"), embedding_type=tensor_type("Q5_K"))
    found = types(draft, recipe, tmp_path)
    assert (found["output.weight"], found["token_embd.weight"]) == ("Q8_0", "Q5_K")


def test_output_type_of_a_tied_model_is_the_embedding_s(tied: convert.GgufDraft, tmp_path: Path) -> None:
    found = types(tied, Recipe(quant("Q4_K_M"), output_type=tensor_type("Q8_0")), tmp_path)
    assert found["token_embd.weight"] == "Q8_0"


def test_ends_of_plain_files(draft: convert.GgufDraft, tmp_path: Path) -> None:
    found = types(draft, Recipe(quant("F16"), embedding_type=tensor_type("Q8_0")), tmp_path)
    assert found["token_embd.weight"] == "Q8_0" and found["blk.0.attn_q.weight"] == "F16"


def test_types_whose_blocks_do_not_fit_fall_back(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """llama-quantize aborts here while it writes; the engine's own fallback is asked for instead."""
    narrow = convert.open_draft(tiny_checkpoint("llama", width=64))
    found = types(narrow, Recipe(quant("Q4_K_M"), embedding_type=tensor_type("Q4_K")), tmp_path)
    assert found["token_embd.weight"] == "Q5_0"


def test_pure_has_no_mix(draft: convert.GgufDraft, tmp_path: Path) -> None:
    matrices = {tensor.name for tensor in draft.tensors if len(tensor.shape) == 2}
    found = types(draft, Recipe(quant("Q4_K_M"), pure=True), tmp_path)
    assert {found[name] for name in matrices} == {"Q4_K"}


def test_copy_takes_no_exceptions(draft: convert.GgufDraft, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="COPY"):
        types(draft, Recipe(quant("COPY"), output_type=tensor_type("Q8_0")), tmp_path)


@pytest.mark.parametrize("text", ["ffn_down", "=Q8_0", "ffn[=Q8_0"])
def test_broken_patterns(text: str) -> None:
    with pytest.raises(LlmkitError, match="--tensor-type"):
        parse_tensor_type(text)


def test_a_pattern_only_python_reads(draft: convert.GgufDraft, tmp_path: Path) -> None:
    """The engine's regular expressions are C++'s: what they refuse is an error with the engine's words."""
    with pytest.raises(EngineError, match="refuses"):
        types(draft, Recipe(quant("Q4_K_M"), (("(?<=ffn)_down", TENSOR_TYPES["Q8_0"]),)), tmp_path)


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("Q4_K_M", "Q8_0", "IQ4_XS", "F16", "COPY")])
def test_planned_sizes_are_the_files_sizes(names: tuple[str, ...], draft: convert.GgufDraft, tmp_path: Path) -> None:
    planned = quantize.plan(draft, [Recipe(quant(name)) for name in names], tmp_path)
    assert not list(tmp_path.iterdir()), "a plan writes nothing"
    quantize.run(planned, threads=1)
    for output in planned.outputs:
        file = gguf.read(output.path)
        assert output.path.stat().st_size == output.nbytes
        bits = sum(8 * info.nbytes for info in file.tensors.values())
        assert float(output.bits_per_weight) == pytest.approx(bits / draft.n_weights)


def test_split_files_are_read_by_the_engine(draft: convert.GgufDraft, tmp_path: Path) -> None:
    from llmkit import backends

    planned = quantize.plan(draft, [Recipe(quant("Q8_0"))], tmp_path, split_nbytes=300_000)
    assert len(planned.outputs[0].files) > 2
    quantize.run(planned, threads=1)
    whole = quantize.plan(draft, [Recipe(quant("Q8_0"))], tmp_path)
    quantize.run(whole, threads=1)
    rows = []
    for path in (planned.outputs[0].path, whole.outputs[0].path):
        backend = backends.load(path, n_threads=1)
        rows.append(backend.session(64).eval([1, 2, 3]).logits.tolist())
        backend.close()
    assert rows[0] == rows[1]


def test_progress_ends_where_it_should(draft: convert.GgufDraft, tmp_path: Path) -> None:
    seen: list[Progress] = []
    quantize.run(quantize.plan(draft, [Recipe(quant("Q4_0"))], tmp_path), threads=2, on_progress=seen.append)
    passed = [each for each in seen if each.stage == "quantize"]
    done = [each.done for each in passed]
    assert done == sorted(done) and done[0] == 0 and done[-1] == passed[-1].total
    assert passed[-1].total == sum(2 * t.n_weights if t.type.name == "BF16" else 4 * t.n_weights for t in draft.tensors)


def test_provenance_and_reproducibility(draft: convert.GgufDraft, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        quantize.run(quantize.plan(draft, [Recipe(quant("Q4_K_M"))], tmp_path / folder), threads=1)
    first, second = (next((tmp_path / folder).glob("*.gguf")) for folder in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert gguf.read(first).get("llmkit.recipe") == "Q4_K_M"
    assert gguf.read(first).get("llmkit.source.fingerprint") == draft.fingerprint


def test_what_is_made_is_left_alone_and_what_is_not_ours_too(draft: convert.GgufDraft, tmp_path: Path) -> None:
    planned = quantize.plan(draft, [Recipe(quant("Q8_0")), Recipe(quant("Q4_0"))], tmp_path)
    quantize.run(planned, threads=1)
    assert quantize.check_outputs(planned, force=False).outputs == ()
    assert quantize.check_outputs(planned, force=True).outputs == planned.outputs
    other = quantize.plan(draft, [Recipe(quant("Q8_0"), pure=True)], tmp_path)
    with pytest.raises(OutputExists, match="something else"):
        quantize.check_outputs(other, force=False)


# --- the journal -----------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def interrupted(planned: quantize.Plan, after: float) -> None:
    """Run until a share of the work is done, then break off from the callback, as Ctrl-C would."""

    def stop(progress: Progress) -> None:
        if progress.stage == "quantize" and progress.done > after * progress.total:
            raise Stop

    with pytest.raises(Stop):
        quantize.run(planned, threads=1, on_progress=stop)


def test_resumed_file_is_the_same_file(draft: convert.GgufDraft, tmp_path: Path) -> None:
    planned = quantize.plan(draft, [Recipe(quant("Q4_K_M")), Recipe(quant("Q8_0"))], tmp_path)
    interrupted(planned, 0.5)
    assert not list(tmp_path.glob("*.gguf")) and len(list(tmp_path.glob("*.partial"))) == 2
    results = quantize.run(planned, threads=1)
    assert all(result.resumed > 0 for result in results)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gguf", ".gguf"], "no partial and no journal is left"
    resumed = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        path.unlink()
    quantize.run(planned, threads=1)
    assert resumed == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("damage", ["", "{", '["x"]\n', '"no such tensor"\n', "\0\0\0\n"])
def test_damaged_journal(damage: str, draft: convert.GgufDraft, tmp_path: Path) -> None:
    planned = quantize.plan(draft, [Recipe(quant("Q4_0"))], tmp_path)
    interrupted(planned, 0.5)
    path = planned.outputs[0].journal_path
    lines = path.read_text().splitlines(keepends=True)
    names = [json.loads(line) for line in lines[1:]]
    assert names and set(names) <= set(planned.outputs[0].types)
    path.write_text("".join(lines[:2]) + damage)
    assert [result.resumed for result in quantize.run(planned, threads=1)] == [1]


def test_journal_of_other_work_is_not_used(draft: convert.GgufDraft, tmp_path: Path) -> None:
    interrupted(quantize.plan(draft, [Recipe(quant("Q4_0"))], tmp_path), 0.5)
    other = quantize.plan(draft, [Recipe(quant("Q4_0"), pure=True)], tmp_path)
    assert [result.resumed for result in quantize.run(other, threads=1)] == [0]


def test_journal_without_its_partial_is_not_used(draft: convert.GgufDraft, tmp_path: Path) -> None:
    planned = quantize.plan(draft, [Recipe(quant("Q4_0"))], tmp_path)
    interrupted(planned, 0.5)
    partial_path(planned.outputs[0].path).unlink()
    assert [result.resumed for result in quantize.run(planned, threads=1)] == [0]


def test_interrupted_replacement_goes_on_too(draft: convert.GgufDraft, tmp_path: Path) -> None:
    """The old file stands under the final name while the new one is made, and as long as that is not whole."""
    planned = quantize.plan(draft, [Recipe(quant("Q4_0"))], tmp_path)
    planned.outputs[0].path.write_bytes(b"old")
    interrupted(planned, 0.5)
    assert planned.outputs[0].path.read_bytes() == b"old"
    assert quantize.run(planned, threads=1)[0].resumed > 0
    assert quantize.check_outputs(planned, force=False).outputs == ()


def test_two_runs_of_one_output(draft: convert.GgufDraft, tmp_path: Path) -> None:
    planned = quantize.plan(draft, [Recipe(quant("Q4_0"))], tmp_path)

    def run_another(progress: Progress) -> None:
        with pytest.raises(LlmkitError, match="another run"):
            quantize.run(planned, threads=1)
        raise Stop

    with pytest.raises(Stop):
        quantize.run(planned, threads=1, on_progress=run_another)


# --- the command line ------------------------------------------------------------------------------------------------


def test_dry_run_shows_every_tensor(cli: Cli, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", width=256)
    done = cli("quantize", folder, "Q4_K_M", "Q8_0", "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0 and not (tmp_path / "out").exists()
    for tensor in convert.open_draft(folder).tensors:
        assert re.search(rf"^{re.escape(tensor.name)}\s", done.stdout, re.MULTILINE)
    assert "bits/weight" in done.stdout and "free" in done.stderr
    told = json.loads(cli("quantize", folder, "Q4_K_M", "--out", tmp_path, "--dry-run", "--json").stdout)
    assert told["outputs"][0]["types"]["blk.0.attn_q.weight"] == "Q4_K" and told["free_nbytes"] > 0


def test_results_as_json(cli: Cli, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    done = cli("quantize", tiny_checkpoint("llama", width=256), "Q4_0", "Q8_0", "--out", tmp_path, "--json")
    rows = json.loads(done.stdout)
    assert [row["quant"] for row in rows] == ["Q4_0", "Q8_0"]
    assert all(Path(row["path"]).stat().st_size == row["nbytes"] for row in rows)
    assert "next:" in done.stderr and rows[-1]["path"] in done.stderr


def test_a_gguf_as_source(cli: Cli, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    source = gguf_of(tiny_checkpoint("llama", width=256), "bf16")
    done = cli("quantize", source, "q4_0", "--out", tmp_path / "mine.gguf")
    assert done.returncode == 0, done.stderr
    theirs = oracle.reference_quantize(source, tmp_path / "theirs.gguf", "Q4_0")
    assert oracle.tensor_bytes(tmp_path / "mine.gguf") == oracle.tensor_bytes(theirs)
