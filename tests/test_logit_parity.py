"""Our F32 GGUFs of tiny random checkpoints, run in the engine, against transformers in float32 on the same tokens.

A wrong permutation, norm, bias, rope setting or window moves these logits by a large part of their range; rounding
moves them by less than a ten-thousandth.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from conftest import GgufOf, TinyCheckpoint
from llmkit import checkpoint, convert
from llmkit.errors import LlmkitError

FloatArray = npt.NDArray[np.float32]
N_TOKENS = 64  # four times Gemma's window in these checkpoints
TOLERANCE = 1e-3  # of the logits' range

CASES = [
    *((family, {"config_style": style}) for family in
      ("llama", "llama3", "mistral", "smollm", "qwen2", "qwen3", "gemma3") for style in (4, 5)),
    ("llama", {"tied": True, "dtype": "f16"}),
    ("smollm", {"tied": False, "shards": 3}),
    ("llama", {"biases": True}),
    ("llama3", {"head_dim": 32, "config_style": 5}),
    ("mistral", {"head_dim": 8}),
    ("qwen2", {"tied": True, "dtype": "bf16"}),
    ("qwen3", {"tied": False, "width": 128}),
    ("gemma3", {"dtype": "bf16", "shards": 2, "config_style": 5}),
]  # fmt: skip


def transformers_logits(folder: Path, ids: list[int]) -> FloatArray:
    """Logits (positions, vocabulary) of the checkpoint in float32 on one thread."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        logits: FloatArray = model(torch.tensor([ids])).logits[0].float().numpy()
    return logits


def engine_logits(path: Path, ids: list[int], *, swa_full: bool = False) -> FloatArray:
    """Logits (positions, vocabulary) of a GGUF: one thread, no flash attention, float32 keys and values."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    engine_logits.__dict__["callback"] = silent  # the engine keeps the pointer
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts, model_params.n_gpu_layers = False, 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    assert model, f"the engine does not load {path}"
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(ids)
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type, params.type_k, params.type_v, params.swa_full = 0, 0, 0, swa_full
    context = llama_cpp.llama_init_from_model(model, params)
    assert context
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for position, token in enumerate(ids):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, True
        assert llama_cpp.llama_decode(context, batch) == 0
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(ids), n_vocab))
        return logits.astype(np.float32)  # a copy: the context owns the original
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def compare(folder: Path, gguf: Path) -> None:
    """Asserts that the engine's logits are transformers', on logits that could tell."""
    ids = np.random.default_rng(1).integers(3, 500, N_TOKENS).tolist()
    expected = transformers_logits(folder, ids)
    span = float(expected.max() - expected.min())
    assert len(set(expected.argmax(1))) > N_TOKENS // 4, "these logits could not show a difference"
    found = engine_logits(gguf, ids)
    # rows beyond the tokenizer are trimmed by some families: no token, no logit
    assert found.shape[1] <= expected.shape[1] and found.shape[1] >= 500
    expected = expected[:, : found.shape[1]]
    assert np.abs(found - expected).max() <= TOLERANCE * span
    assert (found.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_logits_equal_transformers(
    family: str, options: dict[str, Any], tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf
) -> None:
    folder = tiny_checkpoint(family, **{"dtype": "f32", "layers": 7, **options})
    compare(folder, gguf_of(folder, "f32"))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GONE = ("rope_theta", "rope_scaling", "rope_local_base_freq", "rms_norm_eps", "hidden_act", "hidden_activation",
        "tie_word_embeddings", "layer_types", "sliding_window_pattern", "attention_bias", "mlp_bias")  # fmt: skip
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_scaling": YARN, "max_position_embeddings": 64}),
    ("qwen2", {"rope_scaling": YARN, "max_position_embeddings": 64}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("llama", {"rms_norm_eps": 0.05}),
    ("mistral", {"sliding_window": 4096}),
    ("gemma3", {"rms_norm_eps": 0.05}),
    ("gemma3", {"rope_scaling": None}),
    ("gemma3", {"final_logit_softcapping": 20.0}),
    ("gemma3", {"layer_types": ["full_attention", "sliding_attention"] * 3 + ["full_attention"]}),
    ("gemma3", {"layer_types": ..., "sliding_window_pattern": 2}),
    *((family, dict.fromkeys(GONE, ...)) for family in ("llama", "smollm", "qwen3", "gemma3")),
]


@pytest.mark.parametrize(("family", "values"), SETTINGS, ids=str)
def test_settings(
    family: str, values: dict[str, Any], tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, tmp_path: Path
) -> None:
    """Other values in config.json, and none at all (...), where transformers has a default of its own."""
    untied = "tie_word_embeddings" in values and family != "gemma3"  # without the key, transformers takes it for untied
    tied = False if untied else None
    folder = shutil.copytree(tiny_checkpoint(family, dtype="f32", layers=7, tied=tied), tmp_path / f"tiny-{family}")
    config = json.loads((folder / "config.json").read_text()) | values
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    compare(folder, gguf_of(folder, "f32"))


def test_llama3_scaling_without_its_original_context(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """transformers then takes max_position_embeddings, llama.cpp 8192: nobody knows what the model was trained with."""
    folder = shutil.copytree(tiny_checkpoint("llama3"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_scaling"]["original_max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlmkitError, match="original_max_position_embeddings"):
        convert.from_checkpoint(checkpoint.read(folder))
