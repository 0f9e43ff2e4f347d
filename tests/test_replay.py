"""inspection/replay.py and `llmkit replay`: an answer again, and every way in which it may not come again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import Cli, GgufOf, TinyCheckpoint
from llmkit import backends
from llmkit.backends import Backend
from llmkit.backends.scripted import Scripted
from llmkit.chat import Chat, Sampling
from llmkit.errors import LlmkitError
from llmkit.inspection import receipt, replay
from llmkit.inspection.receipt import Receipt

MOST = 12
SAMPLING = Sampling(seed=4, max_tokens=MOST, temperature=1.1, dry_multiplier=0.5, repeat_penalty=1.1)


@pytest.fixture(scope="module")
def chat(smol: Backend) -> Iterator[Chat]:
    chat = Chat(smol, sampling=SAMPLING, context=512)
    list(chat.say("What is the capital of France?"))
    yield chat
    chat.close()


@pytest.fixture(scope="module")
def kept(chat: Chat) -> Receipt:
    return receipt.of(chat, chat.tree.path()[1].id)


def changed(kept: Receipt, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(kept.json())
    change(facts)
    return facts


def words(report: replay.Report) -> str:
    return " ".join(report.why)


def test_an_answer_comes_again_to_the_bit(kept: Receipt, smol: Backend) -> None:
    report = replay.replay(kept, smol, facts=json.loads(kept.json()))
    assert report.equal and report.same == report.tokens == len(kept.answer.steps)
    assert report.largest_error == 0 and report.circumstances == () and "to the bit" in words(report)


def test_so_does_one_far_into_a_conversation(chat: Chat, smol: Backend) -> None:
    """Its prompt came into the context in many calls, whose rounding is theirs."""
    list(chat.say("And of Germany?"))
    list(chat.retry())
    list(chat.go_on())
    made = receipt.of(chat)
    assert made.answer.reused > 0
    report = replay.replay(made, smol)
    assert report.equal and report.largest_error == 0, report


def test_what_came_before_a_break_is_drawn_again_too(smol: Backend) -> None:
    """An answer that was gone on with counts as one: an edit before the break is found."""
    chat = Chat(smol, sampling=SAMPLING, context=256)
    list(chat.say("Count to twenty."))
    list(chat.go_on())
    chat.close()
    made = receipt.of(chat)
    assert len(made.answer.steps) > MOST and made.answer.given == 0
    facts = changed(made, lambda facts: facts["answer"]["sampling"].update(seed=5))
    report = replay.replay(receipt.from_json(facts), smol)
    assert not report.equal and report.same < MOST
    assert replay.replay(made, smol).largest_error == 0


def test_tokens_set_by_hand_are_set_again(chat: Chat, smol: Backend) -> None:
    node = chat.tree.path()[1].id
    other = chat.answers[node].steps[3].alternatives[1].id
    list(chat.instead(node, 3, other))
    made = receipt.of(chat)
    report = replay.replay(made, smol)
    assert report.equal and report.given == 4 and "4 tokens were set" in words(report), report


@pytest.mark.slow
def test_on_pytorch_too(tiny_checkpoint: TinyCheckpoint, cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = tiny_checkpoint("gemma3", dtype="f32", layers=7)
    backend = backends.load(folder, backend="transformers", n_threads=1)
    chat = Chat(backend, sampling=Sampling(seed=2, max_tokens=10, temperature=1.5), context=256)
    list(chat.say("one"))
    list(chat.say("two"))
    made = receipt.of(chat)
    assert [file.name for file in made.files] == sorted(path.name for path in folder.glob("*.safetensors"))
    report = replay.replay(made, backend)
    assert report.equal and (report.largest_error or 0) < 1e-4, report
    chat.close()
    backend.close()
    (tmp_path / "answer.json").write_text(made.json())
    done = cli("replay", tmp_path / "answer.json", "--model", folder)  # by the backend that gave it
    assert done.returncode == 0, done.stderr


def test_another_temperature_is_found_and_explained(kept: Receipt, smol: Backend) -> None:
    facts = changed(kept, lambda facts: facts["answer"]["sampling"].update(temperature=5.0, min_p=0.0, top_p=1.0))
    report = replay.replay(receipt.from_json(facts), smol, facts=facts)
    assert not report.equal and report.parting is not None and "seal is broken" in words(report)
    assert report.circumstances[0].what == "seal"
    assert report.parting.recorded.sampled_probability != report.parting.found.sampled_probability


def test_an_edited_token_is_found_where_it_is(kept: Receipt, smol: Backend) -> None:
    position = 5
    other = kept.answer.steps[position].alternatives[1]

    def edit(facts: dict[str, Any]) -> None:
        facts["answer"]["steps"]["id"][position] = other.id
        facts["seal"] = receipt.seal(facts)  # by somebody who knows how

    facts = changed(kept, edit)
    report = replay.replay(receipt.from_json(facts), smol, facts=facts)
    assert not report.equal and report.same == position and report.parting is not None
    assert report.parting.found.id == kept.answer.steps[position].id
    assert report.parting.recorded.id == other.id and report.parting.position == position
    assert report.parting.found.sampled_probability == kept.answer.steps[position].sampled_probability
    assert "edited" in words(report)


def test_an_edited_number_is_found(kept: Receipt, smol: Backend) -> None:
    facts = changed(kept, lambda facts: facts["answer"]["steps"]["logprob"].__setitem__(2, -0.001))
    report = replay.replay(receipt.from_json(facts), smol)
    assert report.equal and (report.largest_error or 0) > replay.ROUNDING and "not this model's" in words(report)


def test_another_model_is_named(kept: Receipt, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf, chat: Chat) -> None:
    """One of the same vocabulary goes as far as it goes, one of another is refused."""
    backend = backends.load(gguf_of(tiny_checkpoint("llama", dtype="f32", layers=7), "f32"), n_threads=1)
    with pytest.raises(LlmkitError, match="vocabulary") as caught:
        replay.replay(kept, backend)
    assert "--model" in str(caught.value.hint)
    backend.close()


def test_another_quant_build_and_processor_are_told(kept: Receipt, smol: Backend) -> None:
    other = replace(
        kept,
        files=(replace(kept.files[0], sha256="0" * 64),),
        engine="llama.cpp 0.0.1 (abc)",
        machine=receipt.Machine("Plan9 mips", ("avx9000",)),
        threads=3,
        llmkit="0.0.0",
    )
    report = replay.replay(other, smol)
    assert report.equal  # the model is the same, after all
    told = {each.what: each for each in report.circumstances}
    assert set(told) == {"model", "engine", "processor", "threads", "llmkit"}
    assert "avx9000" in told["processor"].recorded and "round" in told["engine"].meaning


def test_nothing_to_replay() -> None:
    backend = Scripted(["hello"])
    chat = Chat(backend, sampling=Sampling(seed=1))
    list(chat.say("hi"))
    made = receipt.of(chat)
    assert replay.replay(made, backend).equal
    with pytest.raises(LlmkitError, match="no prompt"):
        replay.replay(replace(made, answer=replace(made.answer, prompt=())), backend)


@pytest.mark.slow
def test_command_line(kept: Receipt, smollm2_gguf: Path, cli: Cli, tmp_path: Path) -> None:
    page, damaged = tmp_path / "answer.html", tmp_path / "answer.json"
    page.write_text(kept.html(), encoding="utf-8")
    done = cli("replay", page, "--model", smollm2_gguf)
    assert done.returncode == 0, done.stderr
    assert f"all {len(kept.answer.steps)} tokens came again" in done.stdout
    facts = changed(kept, lambda facts: facts["answer"]["sampling"].update(seed=5))
    damaged.write_text(json.dumps(facts), encoding="utf-8")
    (tmp_path / smollm2_gguf.name).symlink_to(smollm2_gguf)  # beside the receipt: needs no --model
    done = cli("replay", damaged)
    assert done.returncode == 1 and done.stdout.startswith("It differs") and "raw probability" in done.stdout
    assert "changed after it was made" in done.stdout
    report = json.loads(cli("replay", damaged, "--json").stdout)
    assert report["equal"] is False and report["parting"]["position"] == report["same"]


def test_command_line_without_a_receipt(cli: Cli, tmp_path: Path, kept: Receipt) -> None:
    file = tmp_path / "broken.json"
    file.write_text(kept.json()[:500])
    done = cli("replay", file)
    assert done.returncode == 1 and f"{file}: this is no receipt" in done.stderr and "Traceback" not in done.stderr
    assert "no such file" in cli("replay", tmp_path / "none.json").stderr
    file.write_text(kept.json())
    done = cli("replay", file)
    assert done.returncode == 1 and "where is the model" in done.stderr and "--model" in done.stderr
