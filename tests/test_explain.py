"""`llmkit explain`: every term is whole, its command parses, its number is right."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from conftest import Cli, GgufOf, TinyCheckpoint
from llmkit import gguf
from llmkit.cli import main as frame
from llmkit.errors import ModelNotFound
from llmkit.inspection import explain
from llmkit.inspection.term_facts import FACTS, Subject, Tensor, kv_nbytes, subject_of
from llmkit.inspection.terms import AREAS, TERMS, Term

ASKED_FOR = (
    "token, embedding, context, logits, softmax, temperature, top-k, top-p, min-p, hallucination, quantization,"
    " dynamic, static, PTQ, QAT, weight-only, K-quants, i-quants, bits per weight, FP32, FP16, BF16, KV cache, imatrix,"
    " perplexity, KL divergence, FLOPs, bandwidth, attention, layer, residual stream, logit lens, chat template, BOS,"
    " EOS, prefill, decode, seed, GGUF, safetensors, mmap, LoRA, MoE, flash attention"
).split(", ")


@pytest.fixture(scope="module")
def subject(smollm2_gguf: Path) -> Subject:
    return subject_of(gguf.read(smollm2_gguf), smollm2_gguf.name)


# ── the table ──


@pytest.mark.parametrize("term", TERMS.values(), ids=lambda term: str(term.name))
def test_a_term_is_whole(term: Term) -> None:
    for sentence in term.sentences:
        assert sentence[0].isupper() and sentence.endswith((".", "?")) and 30 < len(sentence) < 125
        assert ". " not in sentence, "three sentences, not more"
    assert term.area in AREAS and (term.fact is None or term.fact in FACTS)


@pytest.mark.parametrize("term", TERMS.values(), ids=lambda term: str(term.name))
def test_its_command_parses(term: Term) -> None:
    words = shlex.split(term.command.replace("MODEL", "'a model.gguf'"))
    assert words[0] == "llmkit"
    name, module, rest = frame.chosen(words[1:])
    assert frame._verb_parser(name, module).parse_args(rest)


def test_no_name_means_two_terms() -> None:
    names = [explain._key(name) for term in TERMS.values() for name in {term.name, *term.also}]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == set()


def test_every_fact_is_told_somewhere() -> None:
    assert {term.fact for term in TERMS.values()} - {None} == set(FACTS)


@pytest.mark.parametrize("word", ASKED_FOR)
def test_what_people_ask_for_is_found(word: str) -> None:
    found = explain.find(word)
    assert found is explain.find(word.upper().replace("-", " ")) is explain.find(word.replace(" ", ""))


def test_the_softmax_example_is_right() -> None:
    for logits in ((2, 1, 0), (802, 801, 800)):
        powers = np.exp(np.array(logits, float) - max(logits))
        assert [f"{share:.3f}" for share in powers / powers.sum()] == ["0.665", "0.245", "0.090"]
    assert "(0.665, 0.245, 0.090)" in TERMS["softmax"].third
    with np.errstate(over="ignore"):
        assert np.isinf(np.exp(np.float64(800)))


def test_unknown_terms_come_with_the_nearest() -> None:
    with pytest.raises(ModelNotFound) as caught:
        explain.find("temprature")
    assert caught.value.hint is not None and caught.value.hint.startswith("Nearest: temperature")
    with pytest.raises(ModelNotFound) as caught:
        explain.find("zzzzqq")
    assert caught.value.hint == "All terms: llmkit explain"


# ── numbers ──


def test_facts_of_a_known_model(subject: Subject) -> None:
    def fact(word: str) -> str:
        found = explain.explain(word, subject).fact
        assert found is not None
        return found.text

    assert fact("token") == "It knows 49,152 tokens."
    assert fact("context") == "It was trained for 8,192 tokens of context."
    assert fact("attention") == "It has 9 heads in each of 30 layers, which share 3 sets of keys and values."
    assert fact("logits") == "It gives 49,152 logits for each token: 197 kB in FP32."
    assert kv_nbytes(subject) == 30 * 3 * (64 + 64) * 2
    assert fact("MoE") == "It has none: every weight works for every token."
    assert fact("embedding").endswith("21 % of its weights.")
    weights = sum(tensor.weights for tensor in subject.tensors)
    assert f"{weights:,}" in fact("FP16") and f"{8 * subject.weight_nbytes / weights:.2f}" in fact("bpw")
    assert str(len(subject.tensors)) in fact("GGUF")
    assert "BOS is 1 (<|im_start|>), EOS is 2 (<|im_end|>)" in fact("EOS")


def test_the_cache_s_bytes_are_the_engine_s(smollm2_gguf: Path, subject: Subject) -> None:
    """8192 cells, as `llmkit estimate` gets them from the engine."""
    from llmkit import convert
    from llmkit.memory import estimate
    from llmkit.memory.setting import Setting

    draft = convert.open_draft(smollm2_gguf)
    made = estimate.estimate(draft, estimate.variants(draft, [estimate.own_label(draft)]), [Setting(context=8192)])
    parts = [part for part in made[0][0].parts if "cache" in part.name.lower() or "kv" in part.name.lower()]
    assert kv_nbytes(subject) is not None
    assert sum(part.nbytes for part in parts) == 8192 * (kv_nbytes(subject) or 0)


def test_a_header_that_tells_nothing() -> None:
    empty = Subject("nothing", {}, ())
    for name, fact in FACTS.items():
        found = fact(empty)
        assert found is None or found.how == "looked up", name


def test_experts_count_by_their_share(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    dense = subject_of(gguf.read(gguf_of(tiny_checkpoint("llama"), "f32")), "dense")
    assert dense.active in (dense.weights, dense.weights - (dense.embedding.weights if dense.embedding else 0))
    expert = Subject(
        "experts",
        {"general.architecture": gguf.Value.string("x"), "x.expert_count": gguf.Value.uint32(8),
         "x.expert_used_count": gguf.Value.uint32(2)},
        tuple(Tensor(name, (100, 10), 2000) for name in ("blk.0.ffn_up_exps.weight", "blk.0.attn_q.weight")),
    )  # fmt: skip
    assert expert.active == 1000 + 250


# ── the command ──


def test_the_list(cli: Cli) -> None:
    shown = cli("explain")
    assert shown.returncode == 0 and all(term in shown.stdout for term in TERMS)
    listed = json.loads(cli("explain", "--json").stdout)
    assert [name for names in listed.values() for name in names] == list(TERMS)


def test_a_term_with_a_model(cli: Cli, smollm2_gguf: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    shown = cli("explain", "kv", "cache", "--model", smollm2_gguf)
    assert shown.returncode == 0, shown.stderr
    assert "23 kB for each token" in shown.stdout and "(derived)" in shown.stdout
    assert f"llmkit estimate {smollm2_gguf}" in shown.stderr
    found = json.loads(cli("explain", "layer", "--model", tiny_checkpoint("qwen3"), "--json").stdout)
    assert found["term"] == "layer" and found["fact"]["how"] == "derived" and len(found["sentences"]) == 3


def test_the_model_used_last(cli: Cli, smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit import store

    monkeypatch.setenv("LLMKIT_HOME", str(tmp_path))
    assert "49,152" not in cli("explain", "token").stdout
    store.remember_model(smollm2_gguf)
    shown = cli("explain", "token")
    assert f"{smollm2_gguf.name}: It knows 49,152 tokens.  (looked up)" in shown.stdout
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    store.remember_model(broken)
    assert cli("explain", "token").returncode == 0
    assert "is empty" in cli("explain", "token", "--model", _empty(tmp_path)).stderr


def _empty(folder: Path) -> Path:
    (folder / "empty.gguf").touch()
    return folder / "empty.gguf"


def test_an_unknown_term(cli: Cli) -> None:
    done = cli("explain", "quantisation")
    assert (done.returncode, done.stdout) == (1, "") and "Nearest: quantization" in done.stderr
