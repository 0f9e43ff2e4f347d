"""Configs of both generations of transformers, settings that are refused, tensors that are mapped, and the way back."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import GgufOf, TinyCheckpoint
from llmkit import checkpoint, convert, gguf
from llmkit.convert import restore, tensors
from llmkit.convert.config import Config
from llmkit.convert.draft import file_order
from llmkit.errors import InvalidModel, Unsupported
from llmkit.quants import BF16, F32

PATH = Path("config.json")


def edited(folder: Path, tmp_path: Path, **values: Any) -> Path:
    """A copy of a checkpoint whose config.json has `values`; None removes a key."""
    copy = shutil.copytree(folder, tmp_path / "edited")
    config = json.loads((copy / "config.json").read_text())
    config |= values
    (copy / "config.json").write_text(json.dumps({key: item for key, item in config.items() if item is not None}))
    return copy


def draft(folder: Path) -> convert.GgufDraft:
    return convert.from_checkpoint(checkpoint.read(folder))


# --- rope settings ---------------------------------------------------------------------------------------------------


def test_rope_reads_alike_in_both_generations() -> None:
    four = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    five = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}}
    for values in (four, five):
        rope = Config(values, PATH).rope()
        assert (rope.theta, rope.type, rope.factor) == (5e5, "linear", 4.0)


def test_rope_of_each_kind_of_layer() -> None:
    values = {"rope_parameters": {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }}  # fmt: skip
    config = Config(values, PATH)
    assert (config.rope().theta, config.rope().factor) == (1e6, 8.0)
    assert (config.rope("sliding_attention").theta, config.rope("sliding_attention").type) == (1e4, "default")


@pytest.mark.parametrize("scaling", [
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
])  # fmt: skip
def test_rope_the_engine_cannot_express(scaling: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match="config.json"):
        Config({"rope_scaling": scaling}, PATH).rope()


def test_yarn_with_the_paper_s_constants() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.1 * math.log(4) + 1, "beta_fast": 32}
    assert Config({"rope_scaling": scaling}, PATH).rope().factor == 4.0


@pytest.mark.parametrize("value", [0, -1, True, "64", 2**40, 1.5])
def test_numbers_that_are_none(value: object) -> None:
    with pytest.raises(InvalidModel, match="'hidden_size'"):
        _ = Config({"hidden_size": value}, PATH).n_embd


# --- mapping ---------------------------------------------------------------------------------------------------------


def test_order_of_tensors_is_llama_quantize_s() -> None:
    names = ["blk.10.a", "blk.2.b", "token_embd.weight", "blk.2.a", "output.weight"]
    assert sorted(names, key=file_order) == ["output.weight", "token_embd.weight", "blk.2.a", "blk.2.b", "blk.10.a"]


def test_vectors_and_norms_are_float32(tiny_checkpoint: TinyCheckpoint) -> None:
    kinds = {tensor.name: tensor.type for tensor in draft(tiny_checkpoint("qwen3", dtype="bf16")).tensors}
    assert kinds["blk.0.attn_q_norm.weight"] is F32 and kinds["blk.0.attn_q.weight"] is BF16


def test_output_is_left_out_when_tied(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = edited(tiny_checkpoint("llama"), tmp_path, tie_word_embeddings=True)
    made = draft(folder)
    assert "output.weight" not in {tensor.name for tensor in made.tensors}
    assert any("lm_head" in note for note in made.notes)


def test_output_must_be_there_when_not_tied(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = edited(tiny_checkpoint("smollm"), tmp_path, tie_word_embeddings=False)
    with pytest.raises(InvalidModel, match="lm_head"):
        draft(folder)


def test_mistral_s_window_becomes_the_context(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    made = draft(edited(tiny_checkpoint("mistral"), tmp_path, sliding_window=32))
    assert made.metadata["llama.context_length"].data == 32
    assert any("sliding window" in note for note in made.notes)


def test_gemma_s_own_pattern_is_written_only_when_unusual(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    key = "gemma3.attention.sliding_window_pattern"
    folder = tiny_checkpoint("gemma3", layers=7)
    assert key not in draft(folder).metadata
    kinds = ["full_attention"] + ["sliding_attention"] * 6
    made = draft(edited(folder, tmp_path, layer_types=kinds))
    assert list(made.metadata[key].data) == [False] + [True] * 6


def test_multimodal_checkpoints_give_their_text_model(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """Names prefixed as Gemma3ForConditionalGeneration has them, a text_config, and a vision tensor to skip."""
    plain = tiny_checkpoint("gemma3")
    folder = shutil.copytree(plain, tmp_path / "tiny-gemma3")
    config = json.loads((folder / "config.json").read_text())
    wrapped = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config, "model_type": "gemma3"}
    (folder / "config.json").write_text(json.dumps(wrapped))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    renamed = {name if name.startswith("__") else f"language_model.{name}": row for name, row in header.items()}
    end = max(row["data_offsets"][1] for name, row in renamed.items() if not name.startswith("__"))
    renamed["vision_tower.weight"] = {"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]}
    text = json.dumps(renamed).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + bytes(8))
    ours, theirs = draft(folder), draft(plain)
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for mine, plain_one in zip(ours.tensors, theirs.tensors, strict=True):
        assert np.array_equal(mine.float32(0, mine.n_rows), plain_one.float32(0, plain_one.n_rows))
    assert any("1 tensors" in note for note in ours.notes)


# --- operations, against numpy on whole arrays -----------------------------------------------------------------------


def lazy(values: np.ndarray[Any, Any]) -> tensors.LazyTensor:
    return tensors.from_array("w", values)


@pytest.mark.parametrize("heads", [1, 3])
def test_rope_rows_in_any_chunks(heads: int) -> None:
    values = np.arange(heads * 8 * 5, dtype=np.float32).reshape(heads * 8, 5)
    whole = values.reshape(heads, 2, 4, 5).swapaxes(1, 2).reshape(values.shape)
    made = tensors.interleave_rope_halves(lazy(values), heads)
    for start in range(0, heads * 8, 3):
        stop = min(start + 3, heads * 8)
        assert np.array_equal(made.float32(start, stop), whole[start:stop])
    back = tensors.split_rope_pairs(made, heads)
    assert np.array_equal(back.float32(0, heads * 8), values)


def test_rope_elements_of_a_bias() -> None:
    values = np.arange(16, dtype=np.float32)
    made = tensors.interleave_rope_halves(lazy(values), 2)
    assert made.float32(0, 1).ravel().tolist() == values.reshape(2, 2, 4).swapaxes(1, 2).ravel().tolist()


def test_rows_that_do_not_divide_into_heads() -> None:
    with pytest.raises(InvalidModel, match="heads"):
        tensors.interleave_rope_halves(lazy(np.zeros((10, 4), np.float32)), 4)


def test_a_file_that_shrinks_while_it_is_read(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "shrinking")
    made = draft(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(4096)
    with pytest.raises(InvalidModel, match="changed since"):
        for tensor in made.tensors:
            tensor.read(0, tensor.n_rows)


# --- identity and the way back ---------------------------------------------------------------------------------------


def test_fingerprint_tells_finetunes_apart(tiny_checkpoint: TinyCheckpoint) -> None:
    first, same, other = (draft(tiny_checkpoint("llama", seed=seed)).fingerprint for seed in (0, 0, 1))
    assert first == same != other


def test_restore_is_the_inverse_of_convert(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path) -> None:
    source = tiny_checkpoint("smollm", dtype="bf16")
    restore.checkpoint(gguf_of(source, "bf16"), tmp_path / "back", dtype="bf16")
    before, after = (checkpoint.read(folder).tensors for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, stored in before.items():
        ours, theirs = (tensors.from_stored(each) for each in (stored, after[name]))
        assert np.array_equal(ours.read(0, ours.n_rows), theirs.read(0, theirs.n_rows)), name


def test_drafts_of_a_gguf_keep_everything(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    file = gguf.read(gguf_of(tiny_checkpoint("qwen2"), "f16"))
    made = convert.from_gguf(file)
    assert made.metadata == file.metadata and [tensor.name for tensor in made.tensors] == list(file.tensors)


# --- settings of real configs, and nonsense --------------------------------------------------------------------------


@pytest.mark.parametrize("values", [
    {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
    {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 28},
    {"layer_types": ["full_attention"] * 2},
])  # fmt: skip
def test_qwen_windows_that_never_slide(values: dict[str, Any], tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    draft(edited(tiny_checkpoint("qwen2"), tmp_path, **values))


@pytest.mark.parametrize(("family", "values", "key"), [
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "sliding_window"),
    ("qwen2", {"use_mrope": True}, "use_mrope"),
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
    ("qwen2", {"layer_types": 5}, "layer_types"),
    ("gemma3", {"layer_types": [[], []]}, "layer_types"),
    ("gemma3", {"layer_types": ["full_attention"]}, "layer_types"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved"),
    ("llama", {"rope_theta": math.nan}, "rope_theta"),
    ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps"),
    ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    ("llama3", {"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }}, "low_freq_factor"),
])  # fmt: skip
def test_settings_refused_by_name(
    family: str, values: dict[str, Any], key: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises((Unsupported, InvalidModel), match=f"'{key}'|'use_{key}'"):
        draft(edited(tiny_checkpoint(family), tmp_path, **values))


def test_rope_type_under_its_old_name_and_empty_parameters() -> None:
    scaling = {"rope_type": None, "type": "linear", "factor": 4.0}
    for values in ({"rope_scaling": scaling}, {"rope_parameters": {}, "rope_scaling": scaling}):
        assert Config(values, PATH).rope().factor == 4.0


@pytest.mark.parametrize("parameters", [None, {"rope_theta": 1e6}, {"full_attention": {"rope_theta": 1e6}}])
def test_gemma_s_local_theta_is_never_the_global_one(
    parameters: object, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    values = {"rope_parameters": parameters, "rope_local_base_freq": None}
    made = draft(edited(tiny_checkpoint("gemma3", config_style=5), tmp_path, **values))
    assert made.metadata["gemma3.rope.freq_base_swa"].data == 10000.0


def test_name_in_the_hub_s_cache(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    place = tmp_path / "models--org--tiny-model" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(tiny_checkpoint("llama"), place)
    assert draft(place).name == "tiny-model"


def test_a_licence_with_a_name_of_its_own_goes_along(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    link = "https://example.org/LICENSE.md?plain=1"
    card = f"---\nlicense: other\nlicense_name: 'our-own'\nlicense_link: {link}\n---\ntext\n"
    (folder / "README.md").write_text(card)
    found = convert.open_draft(folder).metadata
    named = {key: value.data for key, value in found.items() if key.startswith("general.license")}
    expected = {"general.license": "other", "general.license.name": "our-own", "general.license.link": link}
    assert named == expected and list(named) == list(expected)
