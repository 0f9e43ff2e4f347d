"""Tier B against the engine, shapes from both kinds of header, the rule of thumb against what models really take."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import compare_tiers
from llmkit.errors import InvalidModel, LlmkitError, Unsupported
from llmkit.gguf import Value
from llmkit.memory.closed_form import assumed, closed_form, kv_nbytes, parse_count, rough, shape
from llmkit.memory.setting import Setting
from llmkit.quants import QUANTS
from sparse_models import PUBLISHED, Model, attention

LLAMA: dict[str, Any] = {"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "hidden_size": 4096}
LLAMA |= {"intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 131072}

# public config.json, as far as memory follows from it
CONFIGS: dict[str, dict[str, Any]] = {
    "llama2-7b": LLAMA,
    "llama2-70b": LLAMA
    | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "qwen3-4b": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True,
        "sliding_window": None, "use_sliding_window": False, "max_position_embeddings": 131072,
    },
    "gemma3-27b": {  # as transformers 4 wrote multimodal ones: what is usual is left out
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024,
            "vocab_size": 262208, "max_position_embeddings": 131072,
        },
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4, "sliding_window": 128, "vocab_size": 201088, "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    },
    "qwen3moe-30b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "mlp_only_layers": [], "decoder_sparse_step": 1,
        "vocab_size": 151936, "max_position_embeddings": 131072,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
        "vocab_size": 129280, "max_position_embeddings": 131072, "num_nextn_predict_layers": 1,
    },
    "qwen3next-80b": {
        "model_type": "qwen3_next", "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "num_experts": 512,
        "num_experts_per_tok": 10, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_value_head_dim": 128, "full_attention_interval": 4,
        "vocab_size": 151936, "max_position_embeddings": 131072,
    },
    "mamba-2.8b": {
        "model_type": "mamba", "hidden_size": 2560, "num_hidden_layers": 64, "state_size": 16, "conv_kernel": 4,
        "expand": 2, "intermediate_size": 5120, "vocab_size": 50280,
    },
}  # fmt: skip
SETTINGS = (
    Setting(4096), Setting(32768, flash_attention=False, parallel=2), Setting(8192, swa_full=True, output_rows=512),
)  # fmt: skip


def of(model: Model) -> shape.Shape:
    return shape.of_metadata(model.metadata(), tied=model.tied)


# ── the engine ──


def test_a_small_grid_is_the_engines_to_a_hundredth_of_a_percent() -> None:
    rows = compare_tiers.compare(compare_tiers.models(quick=True), compare_tiers.QUICK)
    assert len(rows) == 12
    for row in rows:
        assert row.errors["kv and state"] == 0, row
        assert abs(row.errors["compute"]) < 1e-4, row
        assert abs(row.unknown["sum beside weights"]) < 1e-4, row


@pytest.mark.slow
def test_over_three_hundred_combinations_are_near_the_engines(capsys: pytest.CaptureFixture[str]) -> None:
    rows = compare_tiers.compare(compare_tiers.models(), compare_tiers.SETTINGS)
    assert len(rows) >= 300
    assert all(row.errors["kv and state"] == 0 == row.errors["output"] for row in rows)
    median, worst = compare_tiers.summary(row.errors["sum beside weights"] for row in rows)
    print(f"tier B over {len(rows)} combinations: median {median:.3%}, worst {worst:.3%} beside the weights")
    assert median <= 0.001 and worst <= 0.02
    median, worst = compare_tiers.summary(row.unknown["sum beside weights"] for row in rows)
    assert median <= 0.02 and worst <= 0.15  # as if nobody knew the architectures
    assert "does not divide n_embd_head_k" in capsys.readouterr().err  # quantized caches need heads of whole blocks


@pytest.mark.slow
def test_assumed_mixes_are_near_the_engines() -> None:
    errors = compare_tiers.weight_errors(compare_tiers.models())
    assert set(errors) == set(QUANTS) - {"COPY"}
    median, worst = compare_tiers.summary(error for by_model in errors.values() for error in by_model.values())
    assert median < 0.002 and worst < 0.08
    assert all(abs(error) < 0.005 for label in ("F16", "Q8_0", "Q6_K") for error in errors[label].values() if error > 0)


def test_what_the_engine_refuses_is_refused() -> None:
    models = [PUBLISHED["smollm2-135m"], replace(PUBLISHED["deepseek-v3"], n_layer=4), compare_tiers.SHAPES["head-80"]]
    settings = (
        Setting(512, flash_attention=False, kv_v="q8_0"),
        Setting(512, flash_attention=True, kv_k="q8_0"),
        Setting(512, flash_attention=True, kv_k="q8_0", kv_v="q8_0"),
    )
    for model, answers in zip(models, compare_tiers.layouts(models, settings), strict=True):
        for setting, answer in zip(settings, answers, strict=True):
            refused = False
            try:
                kv_nbytes(of(model), setting)
            except Unsupported:
                refused = True
            assert refused is ("error" in answer), (model.name, setting, answer)


# ── shapes ──


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_tells_the_same_as_the_header(name: str) -> None:
    """What config.json and GGUF metadata of one model give, by way of their own names, is equal."""
    config, header = shape.of_config(CONFIGS[name]), of(PUBLISHED[name])
    for setting in SETTINGS:
        assert closed_form(config, setting, "Q4_K_M") == closed_form(header, setting, "Q4_K_M")
    assert assumed.n_weights(config) == assumed.n_weights(header)
    assert config.tied is header.tied


def test_both_generations_of_transformers_tell_the_same() -> None:
    old = CONFIGS["gemma3-27b"]
    inner = old["text_config"]
    named = ["full_attention" if (index + 1) % 6 == 0 else "sliding_attention" for index in range(62)]
    new = old | {"text_config": inner | {"layer_types": named}}
    stated = old | {"text_config": inner | {"sliding_window_pattern": 6}}
    assert shape.of_config(new) == shape.of_config(old) == shape.of_config(stated)
    flat = inner | {"layer_types": named}
    assert shape.of_config(flat) == shape.of_config(old)


def test_an_unknown_architecture_is_sized_all_the_same() -> None:
    strange = LLAMA | {"model_type": "brandnew", "architectures": ["BrandNewForCausalLM"]}
    known, unknown = (closed_form(shape.of_config(each), Setting(4096), "Q4_0") for each in (LLAMA, strange))
    assert known == unknown
    older = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_ctx": 1024, "model_type": "gpt2"}
    small = shape.of_config(older)
    assert small.tied and not small.gated
    assert assumed.n_weights(small) == 12 * (4 * 768**2 + 2 * 4 * 768**2) + 50257 * 768  # 124M, less 0.8M positions


def test_heads_are_read_layer_by_layer() -> None:
    model = PUBLISHED["llama2-7b"]
    heads = [0, 8, 2, 32] * 8
    metadata = {**model.metadata(), "llama.attention.head_count_kv": Value.array(value_type(), heads)}
    found = kv_nbytes(shape.of_metadata(metadata), Setting(4096))
    assert found == {"full": sum(heads) * 128 * 2 * 2 * 4096}


def value_type() -> Any:
    from llmkit.gguf import ValueType

    return ValueType.INT32


def test_layers_for_drafting_and_shared_caches_hold_nothing() -> None:
    metadata = PUBLISHED["llama2-7b"].metadata()
    whole = sum(kv_nbytes(shape.of_metadata(metadata), Setting(4096)).values())
    for key in ("nextn_predict_layers", "attention.shared_kv_layers"):
        fewer = shape.of_metadata({**metadata, f"llama.{key}": Value.uint32(8)})
        assert sum(kv_nbytes(fewer, Setting(4096)).values()) == whole * 24 // 32


def test_a_state_grows_with_sequences_and_not_with_context() -> None:
    mamba = of(PUBLISHED["mamba-2.8b"])
    one, long, four = (
        closed_form(mamba, setting, 0).recurrent
        for setting in (Setting(512), Setting(131072), Setting(512, parallel=4))
    )
    assert one == long == 64 * 4 * (3 * 5120 + 16 * 5120)
    assert four == 4 * one


@pytest.mark.parametrize("missing", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"])
def test_essentials_are_asked_for(missing: str) -> None:
    with pytest.raises(InvalidModel, match=r"config\.json: lacks '\w+"):
        shape.of_config({key: value for key, value in LLAMA.items() if key != missing})


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", "32"), ("hidden_size", -1), ("vocab_size", 2.5), ("num_hidden_layers", 10**9),
     ("num_key_value_heads", True), ("hidden_size", float("inf")), ("vocab_size", float("nan"))],
)  # fmt: skip
def test_nonsense_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(InvalidModel, match="expected a number|beyond reason"):
        shape.of_config(LLAMA | {key: value})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@given(name=st.sampled_from(sorted(CONFIGS)), data=st.data())
def test_no_config_gives_anything_but_a_shape_or_an_error(name: str, data: st.DataObject) -> None:
    config = json.loads(json.dumps(CONFIGS[name]))
    part = config.get("text_config", config)
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON)
    try:
        assert shape.of_config(config).n_layer >= 1
    except InvalidModel:
        pass


# ── the rule of thumb ──


def test_seven_and_seventy_billion() -> None:
    assert rough(parse_count("7B"), 32).nbytes == 28_000_000_000
    assert rough(parse_count("70B"), 32).nbytes == 280_000_000_000
    assert rough(parse_count("7B"), 4).nbytes == 3_500_000_000
    assert rough(parse_count("7B"), 16).with_overhead == round(1.2 * 14e9)


@pytest.mark.parametrize(
    ("text", "count"),
    [("7B", 7e9), ("70b", 70e9), ("135M", 135e6), ("1.5b", 1.5e9), (" 0.5 B ", 5e8), ("7000000000", 7e9), ("1T", 1e12)],
)
def test_counts_are_read(text: str, count: float) -> None:
    assert parse_count(text) == count


def test_experts_share_attention() -> None:
    """Mixtral 8x7B has 46.7 billion parameters and 8x22B has 140.6: published counts."""
    assert abs(parse_count("8x7B") / 46.7e9 - 1) < 0.04
    assert abs(parse_count("8x22b") / 140.6e9 - 1) < 0.02


@pytest.mark.parametrize("text", ["", "B", "seven", "-7B", "7BB", "7,5B", "0", "0x7B", "1e9", "9" * 40, "7B params"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(LlmkitError, match="no parameter count"):
        parse_count(text)


@pytest.mark.parametrize(
    ("count", "bits"), [(0, 4), (-1, 4), (7e9, 0), (7e9, 65), (float("nan"), 4), (7e9, float("nan"))]
)
def test_senseless_figures_are_refused(count: float, bits: float) -> None:
    with pytest.raises(LlmkitError):
        rough(count, bits)


def dense(embd: int, ff: int, layers: int, heads: int, heads_kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    return LLAMA | {
        "hidden_size": embd, "intermediate_size": ff, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads_kv, "vocab_size": vocab, **more,
    }  # fmt: skip


TIED: dict[str, Any] = {"tie_word_embeddings": True}
GEMMA: dict[str, Any] = {"model_type": "gemma3_text", "head_dim": 256, "sliding_window": 512}
NAMED = {  # the count in the name, config.json
    "Llama-2-7B": ("7B", LLAMA),
    "Llama-2-13B": ("13B", dense(5120, 13824, 40, 40, 40, 32000)),
    "Llama-2-70B": ("70B", CONFIGS["llama2-70b"]),
    "Llama-3-8B": ("8B", dense(4096, 14336, 32, 32, 8, 128256)),
    "Llama-3-70B": ("70B", dense(8192, 28672, 80, 64, 8, 128256)),
    "Llama-3.2-3B": ("3B", dense(3072, 8192, 28, 24, 8, 128256, **TIED)),
    "Mistral-7B": ("7B", dense(4096, 14336, 32, 32, 8, 32000)),
    "Qwen2.5-1.5B": ("1.5B", dense(1536, 8960, 28, 12, 2, 151936, **TIED)),
    "Qwen2.5-7B": ("7B", dense(3584, 18944, 28, 28, 4, 152064)),
    "Qwen2.5-72B": ("72B", dense(8192, 29568, 80, 64, 8, 152064)),
    "Qwen3-4B": ("4B", CONFIGS["qwen3-4b"]),
    "Gemma-3-27B": ("27B", CONFIGS["gemma3-27b"]),
    "Llama-3.2-1B": ("1B", dense(2048, 8192, 16, 32, 8, 128256, **TIED)),
    "Qwen2.5-0.5B": ("0.5B", dense(896, 4864, 24, 14, 2, 151936, **TIED)),
    "Qwen3-0.6B": ("0.6B", dense(1024, 3072, 28, 16, 8, 151936, head_dim=128, **TIED)),
    "Gemma-3-1B": ("1B", dense(1152, 6912, 26, 4, 1, 262144, **GEMMA)),
    "Gemma-3-270M": ("270M", dense(640, 2048, 18, 4, 1, 262144, **GEMMA)),
    "SmolLM2-135M": ("135M", dense(576, 1536, 30, 9, 3, 49152, **TIED)),
    "SmolLM2-360M": ("360M", dense(960, 2560, 32, 15, 5, 49152, **TIED)),
}
BITS = {"F32": 32, "F16": 16, "Q8_0": 8, "Q6_K": 6, "Q5_K_M": 5, "Q4_0": 4, "Q4_K_M": 4, "Q3_K_M": 3, "Q2_K": 2}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("bits", sorted(set(BITS.values())))
def test_the_truth_lies_within_the_told_range_and_reaches_its_ends(bits: int, small: bool) -> None:
    ratios = []
    for name, config in NAMED.values():
        count = parse_count(name)
        if (count < 1.4e9) is not small:
            continue
        told = rough(count, bits)
        for label in (label for label, nominal in BITS.items() if nominal == bits):
            taken = closed_form(shape.of_config(config), Setting(4096), label).nbytes
            assert told.least * 0.99 < taken < told.most * 1.01, (name, label)
            ratios.append(taken / told.nbytes)
    assert len(ratios) >= 7
    told = rough(1e9 if small else 7e9, bits)
    assert min(ratios) < 1.02 * told.least / told.nbytes and max(ratios) > 0.98 * told.most / told.nbytes


def test_the_exact_tier_shows_why_the_rule_is_off() -> None:
    """The engine: 7B is 6.74 billion, so 27.0 GB in F32, and 4096 tokens of cache are 2.1 GB on top."""
    model = PUBLISHED["llama2-7b"]
    [[answer]] = compare_tiers.layouts([model], [Setting(4096)])
    assert abs(4 * answer["n_params"] / 1e9 - 26.95) < 0.01
    assert sum(row[1] for row in answer["buffers"].values()) == 2 * 2 * 4096 * 32 * 4096
    assert rough(7e9, 32).nbytes / (4 * answer["n_params"]) == pytest.approx(1.039, abs=0.001)


def test_a_family_nobody_wrote_down_still_places_its_tensors() -> None:
    """Two matrices in the feed-forward instead of three need less room."""
    config = attention_config()
    three, two = (
        closed_form(shape.of_config(config | {"model_type": kind}), Setting(4096, output_rows=1), 0).compute
        for kind in ("llama", "starcoder2")
    )
    assert two < three


def attention_config() -> dict[str, Any]:
    sizes = attention(embd=3072, ff=12288, heads=24, heads_kv=2, vocab=49152)
    return LLAMA | {
        "hidden_size": sizes["embd"], "intermediate_size": sizes["ff"], "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["heads_kv"], "vocab_size": sizes["vocab"],
    }  # fmt: skip
