"""The tokenizer.* metadata: token types, special tokens, chat templates, the choice of files, and broken files."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import tokenizers_material as material
from llmkit.convert import vocab
from llmkit.convert.vocab import sentencepiece_model
from llmkit.convert.vocab.tokens import TokenType
from llmkit.errors import InvalidModel, LlmkitError, ModelNotFound, Unsupported

Json = dict[str, Any]
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def added(number: int, content: str, **changes: Any) -> Json:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **plain, **changes}


def byte_level(**changes: Any) -> Json:
    """A byte-level BPE of seven tokens."""
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [added(4, "<s>"), added(5, "</s>"), added(6, "<note>", special=False)],
        "pre_tokenizer": LEVEL, "post_processor": None, "decoder": LEVEL,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {"a": 0, "b": 1, "Ġ": 2, "ab": 3}, "merges": [["a", "b"]],
        },
        **changes,
    }  # fmt: skip


def pieces() -> Json:
    """A SentencePiece vocabulary as tokenizer.json: bytes, letters, "▁", merges."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "ab",
        "▁ab",
        "▁▁",
    ]
    return byte_level(
        added_tokens=[added(0, "<unk>"), added(1, "<s>"), added(2, "</s>"), added(266, "<tool>", special=False)],
        pre_tokenizer=None,
        normalizer={"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        decoder={"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        model={
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": ["▁ ▁", "▁ a", "a b", "▁ ab", "▁a b"],
        },
    )  # fmt: skip


def folder(path: Path, document: Json | None = None, config: Mapping[str, Any] | None = None) -> Path:
    """`path` with tokenizer.json and tokenizer_config.json."""
    if document is not None:
        material.write_json(path / "tokenizer.json", document)
    if config is not None:
        material.write_json(path / "tokenizer_config.json", config)
    return path


def read(path: Path, config: Mapping[str, Any] | None = None, **options: Any) -> vocab.Vocabulary:
    return vocab.read(path, config=config or {}, **options)


def plain(found: vocab.Vocabulary) -> Json:
    """Metadata as plain values, keys without their prefix."""
    return {
        key.removeprefix("tokenizer.").removeprefix("ggml."): list(value.data) if value.type == 9 else value.data
        for key, value in found.metadata.items()
    }


def test_byte_level_in_the_order_of_llama_cpp(tmp_path: Path) -> None:
    settings_ = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_prefix_space": False, "chat_template": "hi"}
    found = read(folder(tmp_path, byte_level(), settings_), {"vocab_size": 9, "pad_token_id": 5})
    assert plain(found) == {
        "add_space_prefix": False, "model": "gpt2", "pre": "trillion",
        "tokens": ["a", "b", "Ġ", "ab", "<s>", "</s>", "<note>", "[PAD7]", "[PAD8]"],
        "token_type": [1, 1, 1, 1, 3, 3, 4, 5, 5], "merges": ["a b"],
        "bos_token_id": 4, "eos_token_id": 5, "padding_token_id": 5, "chat_template": "hi",
    }  # fmt: skip
    assert list(plain(found))[:6] == ["add_space_prefix", "model", "pre", "tokens", "token_type", "merges"]
    assert (found.n_tokens, found.n_real_tokens, found.pre_source) == (9, 7, "structure")
    assert (found.template_source, found.warnings) == ("tokenizer_config.json", ())


def test_pieces_from_merges(tmp_path: Path) -> None:
    found = read(folder(tmp_path, pieces(), {}))
    values = plain(found)
    assert (values["model"], values["pre"], found.pre_source) == ("llama", "default", "not needed")
    assert values["token_type"][:3] == [TokenType.CONTROL] * 3
    assert values["token_type"][3:259] == [TokenType.BYTE] * 256
    assert values["token_type"][259:] == [TokenType.NORMAL] * 7 + [TokenType.USER_DEFINED]
    # in order of the first merge that builds a token; what no merge builds stands far below
    assert values["scores"][262:266] == [-1.0, -2.0, -3.0, 0.0]
    assert max(values["scores"][259], values["scores"][266]) < -1000
    assert "add_space_prefix" not in values and "merges" not in values and found.warnings == ()


def test_pieces_in_the_engine(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder(tmp_path, pieces(), {}) / "tokenizer.json"))
    engine = material.engine_vocabulary(tmp_path, tmp_path / "vocabulary.gguf")
    for text in ("ab", "a ab  b", "  ab", "c\né ab", "<s>ab</s>", "a<tool> b", "▁a▁▁ab"):
        assert engine.encode(text) == tokenizer.encode(text).ids, text
    engine.close()


@pytest.mark.parametrize(
    ("normalizer", "setting", "known", "expected"),
    [
        ("prepends", None, None, None),  # the engine's own default
        ("replaces", None, None, False),
        ("metaspace", None, None, None),
        ("metaspace never", None, None, False),
        ("prepends", False, None, False),
        ("replaces", True, None, True),
        ("prepends", True, False, False),
    ],
)
def test_space_prefix(
    normalizer: str, setting: bool | None, known: bool | None, expected: bool | None, tmp_path: Path
) -> None:
    document = pieces()
    if normalizer == "replaces":
        document["normalizer"] = document["normalizer"]["normalizers"][1]
    elif normalizer.startswith("metaspace"):
        scheme = "never" if "never" in normalizer else "always"
        document["normalizer"] = None
        document["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    found = plain(read(folder(tmp_path, document, {"add_prefix_space": setting}), spm_add_space_prefix=known))
    assert found.get("add_space_prefix") is expected
    engine = material.engine_vocabulary(tmp_path, tmp_path / "vocabulary.gguf", spm_add_space_prefix=known)
    assert (engine.encode("ab")[0] == found["tokens"].index("▁ab")) is (expected is not False)
    engine.close()


def template(*single: str, pair: list[str] | None = None) -> Json:
    """A TemplateProcessing: "A" and "B" are the texts, all else special tokens."""

    def step(name: str) -> Json:
        return {"Sequence" if name in "AB" else "SpecialToken": {"id": name, "type_id": 0}}

    ids = {"<s>": 4, "</s>": 5, "<note>": 6}
    tokens = {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in ids.items()}
    both = pair or [*single, *(name if name != "A" else "B" for name in single)]
    return {
        "type": "TemplateProcessing", "single": [step(name) for name in single], "pair": [step(name) for name in both],
        "special_tokens": tokens,
    }  # fmt: skip


ROBERTA = {
    "type": "RobertaProcessing",
    "sep": ["</s>", 5],
    "cls": ["<s>", 4],
    "trim_offsets": True,
    "add_prefix_space": False,
}
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("processor", "config", "expected"),
    [
        (None, NAMED, {}),
        (LEVEL, NAMED, {"add_bos": False, "add_eos": False}),
        (template("<s>", "A"), NAMED, {"add_bos": True, "add_sep": False}),
        (template("<s>", "A", "</s>"), NAMED, {"add_bos": True, "add_eos": True}),
        ({"type": "Sequence", "processors": [LEVEL, template("<s>", "A")]}, NAMED, {"add_bos": True, "add_eos": False}),
        (template("A", "</s>"), NAMED, {"add_eos": True}),
        (template("<s>", "A"), {}, {"add_bos": True, "bos": 4}),  # adopted: tokenizer_config.json names none
        (template("<s>", "A", "<note>"), NAMED, {"add_bos": True, "add_eos": True, "eos": 6, "eot": 5}),
        (ROBERTA, NAMED, {"add_bos": True, "add_eos": True, "add_sep": True, "sep": 5}),
    ],
)
def test_what_is_added_by_itself(processor: Json | None, config: Json, expected: Json, tmp_path: Path) -> None:
    found = plain(read(folder(tmp_path, byte_level(post_processor=processor), config)))
    for key, value in expected.items():
        name = {"sep": "seperator"}.get(key, key)
        assert found[f"{key}_token" if key.startswith("add_") else f"{name}_token_id"] == value, key
    # the engine then does what the tokenizer does
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    engine = material.engine_vocabulary(tmp_path, tmp_path / "vocabulary.gguf")
    assert engine.encode("ab a", bos=True) == tokenizer.encode("ab a").ids
    engine.close()


def test_a_separator_between_two_texts(tmp_path: Path) -> None:
    document = byte_level(post_processor=template("<s>", "A", pair=["<s>", "A", "</s>", "B"]))
    found = plain(read(folder(tmp_path, document, NAMED)))
    assert found["add_sep_token"] is True and found["seperator_token_id"] == 5


def test_the_post_processor_beats_the_settings(tmp_path: Path) -> None:
    config = {**NAMED, "add_bos_token": True, "add_eos_token": False}
    found = read(folder(tmp_path, byte_level(post_processor=LEVEL), config))
    assert plain(found)["add_bos_token"] is False
    (warning,) = found.warnings
    assert "add_bos_token=true" in warning and "post-processor" in warning
    assert plain(read(folder(tmp_path, byte_level(), config)))["add_bos_token"] is True


@pytest.mark.parametrize("single", [("A",), ("A", "</s>"), ("<s>", "A")])
def test_sentencepiece_adds_what_the_post_processor_adds(single: tuple[str, ...], tmp_path: Path) -> None:
    """transformers 5 always writes a post-processor; one without a bos means none, but unsaid the engine adds it."""
    processor = template(*single)
    for name, number in (("<s>", 1), ("</s>", 2)):
        processor["special_tokens"][name]["ids"] = [number]
    tokenizer = Tokenizer.from_file(
        str(folder(tmp_path, {**pieces(), "post_processor": processor}, NAMED) / "tokenizer.json")
    )
    engine = material.engine_vocabulary(tmp_path, tmp_path / "vocabulary.gguf")
    assert engine.encode("ab a", bos=True) == tokenizer.encode("ab a").ids
    engine.close()


def test_a_name_that_adds_bos_is_told_not_to(tmp_path: Path) -> None:
    """The engine adds a bos for "llama-bpe" unless told; this tokenizer adds none."""
    folder(tmp_path, byte_level(), NAMED)
    assert plain(read(tmp_path, pre="llama-bpe"))["add_bos_token"] is False
    assert "add_bos_token" not in plain(read(tmp_path, pre="qwen2"))


def test_an_added_token_nobody_names_is_not_added(tmp_path: Path) -> None:
    """Without an id the engine would take token 11."""
    found = read(folder(tmp_path, byte_level(), {"add_bos_token": True}))
    assert plain(found)["add_bos_token"] is False
    assert any("no file says which" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bos_token_id": 4, "eos_token_id": 5}, {"bos_token_id": 4, "eos_token_id": 5}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 5}),
        ({"pad_token_id": -1, "bos_token_id": None, "unk_token_id": True}, {}),
        ({"bos_token_id": 99}, {}),
    ],
)
def test_ids_from_config_json(config: Json, expected: Json, tmp_path: Path) -> None:
    found = read(folder(tmp_path, byte_level()), config)
    assert {key: value for key, value in plain(found).items() if key.endswith("_id")} == expected
    assert any("99" in warning for warning in found.warnings) is (config.get("bos_token_id") == 99)


def test_tokenizer_config_beats_config(tmp_path: Path) -> None:
    found = read(folder(tmp_path, byte_level(), {"eos_token": "</s>"}), {"eos_token_id": 4})
    assert plain(found)["eos_token_id"] == 5


def test_added_tokens(tmp_path: Path) -> None:
    extra = [
        added(4, "<|looks|>", special=False), added(5, "<pad>", special=False), added(6, "▁▁", special=False),
        added(7, "x y", special=False, normalized=True), added(8, "<trim>", lstrip=True),
    ]  # fmt: skip
    found = read(folder(tmp_path, byte_level(added_tokens=extra)))
    values = plain(found)
    assert values["tokens"][4:] == ["<|looks|>", "<pad>", "  ", "x y", "<trim>"]
    assert values["token_type"][4:] == [3, 3, 4, 4, 3]
    (warning,) = found.warnings
    assert "1 added tokens (such as '<trim>') swallow" in warning


def test_tokens_beyond_vocab_size(tmp_path: Path) -> None:
    found = read(folder(tmp_path, byte_level(), NAMED), {"vocab_size": 6})
    assert (found.n_tokens, found.n_real_tokens) == (6, 6)
    assert found.warnings == ("tokenizer.json: token '<note>' is 6, beyond vocab_size 6: left out",)
    with pytest.raises(InvalidModel, match="has 4 tokens, but config.json says vocab_size 3"):
        read(tmp_path, {"vocab_size": 3})


def test_rows_that_only_the_config_has(tmp_path: Path) -> None:
    folder(tmp_path, byte_level(), NAMED)
    padded, trimmed = read(tmp_path, {"vocab_size": 20}), read(tmp_path, {"vocab_size": 20}, pad=False)
    assert (padded.n_tokens, padded.n_real_tokens) == (20, 7)
    assert (trimmed.n_tokens, trimmed.n_real_tokens) == (7, 7)
    assert plain(trimmed)["tokens"] == plain(padded)["tokens"][:7]


def test_merges_with_spaces_in_them(tmp_path: Path) -> None:
    document = byte_level(added_tokens=[])
    document["model"]["vocab"] |= {" b": 4, "a b": 5}
    document["model"]["merges"].append(["a", " b"])
    assert plain(read(folder(tmp_path, document), pre="gpt-2"))["merges"] == ["a b", "a Ġb"]


def test_added_tokens_are_spelled_as_a_text_holds_them(tmp_path: Path) -> None:
    """In the byte-level alphabet an added token's "Ġ" may be meant as a space, or as itself: what encodes back wins."""
    extra = [added(4, "Ġx", special=False), added(5, "é", special=False), added(6, "\t\t", special=False)]
    tokenizer = Tokenizer.from_file(str(folder(tmp_path, byte_level(added_tokens=extra)) / "tokenizer.json"))
    engine = material.engine_vocabulary(tmp_path, tmp_path / "vocabulary.gguf")
    for text in ("aĠxb", "aéb", "a\t\tb"):
        assert engine.encode(text) == tokenizer.encode(text).ids, text
    engine.close()


# chat templates


def test_templates_by_file(tmp_path: Path) -> None:
    folder(tmp_path, byte_level(), {"x": 1})
    assert read(tmp_path).template_source is None
    material.write_json(tmp_path / "chat_template.json", {"chat_template": "from json"})
    assert (plain(read(tmp_path))["chat_template"], read(tmp_path).template_source) == (
        "from json",
        "chat_template.json",
    )
    (tmp_path / "chat_template.jinja").write_text("from jinja", "utf-8")
    found = read(tmp_path)
    assert (plain(found)["chat_template"], found.template_source) == ("from jinja", "chat_template.jinja")
    assert found.warnings == (
        "the chat template in chat_template.json differs from the one in chat_template.jinja, which was taken",
    )
    folder(tmp_path, None, {"chat_template": "from jinja"})
    found = read(tmp_path)
    assert found.template_source == "tokenizer_config.json"
    assert len(found.warnings) == 1 and "chat_template.json differs" in found.warnings[0]


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool-use", "template": "t"}]
    values = plain(read(folder(tmp_path, byte_level(), {"chat_template": named})))
    assert values["chat_template"] == "d" and values["chat_template.tool_use"] == "t"
    assert values["chat_templates"] == ["tool_use"]
    folder(tmp_path, None, {"x": 1})
    (tmp_path / "chat_template.jinja").write_text("main", "utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("r", "utf-8")
    values = plain(read(tmp_path))
    assert (values["chat_template"], values["chat_template.rag"], values["chat_templates"]) == ("main", "r", ["rag"])


@pytest.mark.parametrize("found", [7, {"a": 1}, [{"name": "x"}], ["x"], [{"name": "", "template": "t"}]])
def test_templates_that_are_none(found: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="chat_template") as caught:
        read(folder(tmp_path, byte_level(), {"chat_template": found}))
    assert "tokenizer_config.json" in caught.value.message


def test_a_template_that_is_not_utf8(tmp_path: Path) -> None:
    folder(tmp_path, byte_level())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidModel, match="chat_template.jinja: is not UTF-8"):
        read(tmp_path)


# tokenizer.model

PIECES = [
    ("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    ("▁▁", 0.0, 4), ("<tool>▁", 0.0, 4), ("ab", -1.0, 1), ("▁ab", -2.0, 1), ("▁", -3.0, 1), ("a", -4.0, 1),
    ("b", -5.0, 1),
]  # fmt: skip


def test_pieces_as_sentencepiece_sees_them(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(material.sentencepiece_model(PIECES))
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    found = sentencepiece_model.read(path)
    assert len(found.pieces) == model.vocab_size() == len(PIECES)
    for number, piece in enumerate(found.pieces):
        assert (piece.text, piece.score) == (model.id_to_piece(number), model.get_score(number))
        assert (piece.type == TokenType.BYTE) == model.is_byte(number)
        assert (piece.type == TokenType.CONTROL) == model.is_control(number)
        assert (piece.type == TokenType.UNKNOWN) == model.is_unknown(number)
    engine = material.engine_vocabulary(tmp_path, tmp_path / "vocabulary.gguf")
    for text in ("ab", "a  ab<tool> ", "    ab", "c\né ab", "▁▁▁ab"):
        assert engine.encode(text) == model.encode(text), text
    # the engine's own way: a space goes before every stretch of text, not only before the first
    assert engine.encode("a<tool> b") == model.encode("a<tool>  b")
    engine.close()


def test_user_defined_pieces_without_a_space_prefix(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(material.sentencepiece_model(PIECES, dummy_prefix=False))
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    engine = material.engine_vocabulary(tmp_path, tmp_path / "vocabulary.gguf")
    for text in ("ab", " ab", "a  ab<tool> b", "<tool> <tool> ab", "<tool>ab", "    ab", "c\né ab", "▁▁▁ab"):
        assert engine.encode(text) == model.encode(text), text
    engine.close()


def test_what_a_folder_adds_to_tokenizer_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(material.sentencepiece_model(PIECES))
    n = len(PIECES)
    material.write_json(tmp_path / "added_tokens.json", {"<|im_end|>": n, "[plain]": n + 1})
    decoder = {"0": added(0, "<unk>"), "259": added(259, "▁▁", special=False), str(n + 2): added(n + 2, "<end>")}
    folder(tmp_path, None, {"added_tokens_decoder": decoder, "eos_token": "<end>", "bos_token": "<s>"})
    values = plain(read(tmp_path, {"vocab_size": n + 4}))
    assert values["tokens"][n:] == ["<|im_end|>", "[plain]", "<end>", f"[PAD{n + 3}]"]
    assert values["token_type"][n:] == [3, 4, 3, 5]
    assert values["scores"][n:] == [-1000.0, -1000.0, -1000.0, -10000.0]
    assert values["token_type"][:3] == [3, 3, 3] and values["tokens"][260] == "<tool> "
    assert (values["tokens"][259], values["token_type"][259]) == ("▁▁", 1)
    assert (values["bos_token_id"], values["eos_token_id"]) == (1, n + 2)


def test_tokens_that_only_tokenizer_json_adds(tmp_path: Path) -> None:
    """transformers 5 writes no added_tokens_decoder."""
    (tmp_path / "tokenizer.model").write_bytes(material.sentencepiece_model(PIECES))
    n = len(PIECES)
    document = pieces()
    document["added_tokens"] = [added(0, "<unk>"), added(1, "<s>"), added(n, "<new>", special=False)]
    values = plain(read(folder(tmp_path, document, {})))
    assert values["tokens"][n] == "<new>" and values["token_type"][n] == 4 and values["token_type"][0] == 2


def test_tokenizer_model_comes_first(tmp_path: Path) -> None:
    folder(tmp_path, byte_level(added_tokens=[]), {})
    assert plain(read(tmp_path))["model"] == "gpt2"
    (tmp_path / "tokenizer.model").write_bytes(base64.b64encode(b"IQ==") + b" 0\n")  # Llama 3's, in tiktoken's format
    assert plain(read(tmp_path))["model"] == "gpt2"
    (tmp_path / "tokenizer.model").write_bytes(material.sentencepiece_model(PIECES))
    found = read(tmp_path, pre="qwen2")
    assert plain(found)["model"] == "llama" and len(plain(found)["tokens"]) == len(PIECES)
    assert found.warnings == ("--pre qwen2: SentencePiece needs no pre-tokenizer",)


def test_what_the_engine_does_not_do(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(material.sentencepiece_model(PIECES, charsmap=b"rules", dummy_prefix=False))
    found = read(tmp_path)
    assert found.warnings == ("tokenizer.model first normalizes text (identity); the engine does not",)
    assert plain(found)["add_space_prefix"] is False


def test_unigram_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(material.sentencepiece_model(PIECES, model_type=1))
    with pytest.raises(Unsupported, match="type UNIGRAM"):
        read(tmp_path)


def test_no_cut_of_a_tokenizer_model_is_believed(tmp_path: Path) -> None:
    """Cut anywhere, a model is broken; between two fields it is sound, but says no more that it is a BPE."""
    whole = material.sentencepiece_model(PIECES[:12])
    path = tmp_path / "tokenizer.model"
    refused = 0
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        try:
            sentencepiece_model.read(path)
        except (InvalidModel, Unsupported) as error:
            assert str(path) in error.message
            refused += 1
    assert refused > len(whole) * 0.9


# broken files


def broken(change: Callable[[Json], Any]) -> Json:
    document = copy.deepcopy(byte_level())
    change(document)
    return document


BROKEN: dict[str, tuple[Callable[[Json], Any], type[LlmkitError], str]] = {
    "no model": (lambda d: d.pop("model"), InvalidModel, "has no object 'model'"),
    "no vocab": (lambda d: d["model"].pop("vocab"), InvalidModel, "model.vocab is missing"),
    "empty vocab": (lambda d: d["model"].update(vocab={}), InvalidModel, "model.vocab is missing or empty"),
    "list vocab": (lambda d: d["model"].update(vocab=[["a", 0]]), InvalidModel, "model.vocab is missing"),
    "negative": (lambda d: d["model"]["vocab"].update(z=-1), InvalidModel, "'z' has the id -1"),
    "enormous": (lambda d: d["model"]["vocab"].update(z=1 << 40), InvalidModel, "'z' has the id 1099511627776"),
    "not a number": (lambda d: d["model"]["vocab"].update(z=True), InvalidModel, "'z' has the id True"),
    "fraction": (lambda d: d["model"]["vocab"].update(z=1.5), InvalidModel, "'z' has the id 1.5"),
    "twice": (lambda d: d["model"]["vocab"].update(z=1), InvalidModel, "'b' and 'z' both have the id 1"),
    "surrogate": (lambda d: d["model"]["vocab"].update({"\ud800": 9}), InvalidModel, "has the id 9"),
    "no merges": (lambda d: d["model"].pop("merges"), InvalidModel, "model.merges is missing"),
    "empty merges": (lambda d: d["model"].update(merges=[]), InvalidModel, "model.merges is empty"),
    "odd merge": (lambda d: d["model"]["merges"].append("abc"), InvalidModel, r"model.merges\[1\] is 'abc'"),
    "triple merge": (lambda d: d["model"]["merges"].append(["a", "b", "c"]), InvalidModel, "expected two parts"),
    "added list": (lambda d: d.update(added_tokens={}), InvalidModel, "added_tokens is not a list"),
    "added id": (lambda d: d["added_tokens"][1].update(id=-3), InvalidModel, r"\[1\] \('</s>'\) has the id -3"),
    "added text": (lambda d: d["added_tokens"][1].pop("content"), InvalidModel, r"added_tokens\[1\] has no 'content'"),
    "added twice": (lambda d: d["added_tokens"][1].update(id=4), InvalidModel, "claims the id 4, which '<s>' has"),
    "added again": (lambda d: d["added_tokens"][1].update(content="<s>"), InvalidModel, "claims the id 5, but has 4"),
    "added over": (lambda d: d["added_tokens"][1].update(id=1), InvalidModel, "claims the id 1, which 'b' has"),
    "alike": (
        lambda d: d["added_tokens"].extend([added(7, "▁", special=False), added(8, " ", special=False)]),
        InvalidModel, "ids 7 and 8 are both the token ' '",
    ),
    "unigram": (lambda d: d["model"].update(type="Unigram"), Unsupported, "model.type is 'Unigram'"),
    "no decoder": (lambda d: d.update(decoder=None), Unsupported, "neither byte-level nor SentencePiece"),
    "cuts": (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), Unsupported, "no pre-tokenizer for this one"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name: str, tmp_path: Path) -> None:
    change, error, message = BROKEN[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(broken(change)), "utf-8")
    with pytest.raises(error, match=message) as caught:
        read(tmp_path)
    assert str(tmp_path / "tokenizer.json") in caught.value.message


def test_files_that_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b'{"model": ')
    with pytest.raises(InvalidModel, match="is not JSON"):
        read(tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n", "utf-8")
    with pytest.raises(InvalidModel, match="Git LFS pointer"):
        read(tmp_path)
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InvalidModel, match="is 1073741824 bytes"):
        read(tmp_path)


def test_nesting_without_end(tmp_path: Path) -> None:
    step: Json = LEVEL
    for _ in range(60):
        step = {"type": "Sequence", "pretokenizers": [step]}
    with pytest.raises(InvalidModel, match="pre_tokenizer is nested deeper than"):
        read(folder(tmp_path, byte_level(pre_tokenizer=step)))


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="has no tokenizer") as caught:
        read(tmp_path)
    assert caught.value.hint and "tokenizer.json" in caught.value.hint


@pytest.mark.parametrize("size", [0, -4, "many", 1 << 60])
def test_vocab_sizes_that_are_none(size: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="vocab_size"):
        read(folder(tmp_path, byte_level()), {"vocab_size": size})


def test_added_tokens_of_other_files_are_checked(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(material.sentencepiece_model(PIECES))
    for bad in ({"x": "seven"}, {"x": -1}, {"x": 1 << 50}):
        material.write_json(tmp_path / "added_tokens.json", bad)
        with pytest.raises(InvalidModel, match=r"added_tokens.json: added token 'x' has the id"):
            read(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    for decoder in ({"seven": added(7, "x")}, {"7": {"special": True}}, {"7": 7}):
        folder(tmp_path, None, {"added_tokens_decoder": decoder})
        with pytest.raises(InvalidModel, match="tokenizer_config.json: added token"):
            read(tmp_path)


JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 7, 1 << 70, 1.5, "", "x", "▁", "BPE", "ByteLevel", "\ud800", [], {}, [[]], {"a": 1}, ["a"],
    [["a", "b"]],
)  # fmt: skip
MANY = [400, pytest.param(3000, marks=pytest.mark.slow)]


def spots(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside `value`, but of the 256 byte tokens only the first."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = []
    for key in keys:
        if not (isinstance(key, str) and key.startswith("<0x") and key != "<0x00>"):
            found += [(value, key), *spots(value[key])]
    return found


@pytest.mark.parametrize("count", MANY)
def test_junk_anywhere_raises_only_our_errors(count: int, tmp_path: Path) -> None:
    chance = random.Random(count)
    model = material.sentencepiece_model(PIECES)
    outcomes = {True: 0, False: 0}
    for _ in range(count):
        processors = (template("<s>", "A", "</s>"), ROBERTA, {"type": "Sequence", "processors": [template("<s>", "A")]})
        parts: Json = {
            "tokenizer.json": {**chance.choice((byte_level, pieces))(), "post_processor": chance.choice(processors)},
            "tokenizer_config.json": {
                **NAMED, "add_bos_token": True, "added_tokens_decoder": {"7": added(7, "q")},
                "chat_template": [{"name": "default", "template": "x"}],
            },
            "config": {"vocab_size": 300, "eos_token_id": [5, 6], "pad_token_id": 4},
        }  # fmt: skip
        parts = copy.deepcopy(parts)
        for _ in range(chance.randrange(1, 4)):
            container, key = chance.choice([spot for part in parts.values() for spot in spots(part)])
            container[key] = copy.deepcopy(chance.choice(JUNK))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_text(json.dumps(parts[name]), "utf-8")
        (tmp_path / "tokenizer.model").write_bytes(model if chance.random() < 0.3 else b"")
        try:
            read(tmp_path, parts["config"], pre=chance.choice((None, "gpt-2")))
            outcomes[True] += 1
        except LlmkitError as error:
            assert error.message
            outcomes[False] += 1
    assert min(outcomes.values()) > count / 10, outcomes


@pytest.mark.parametrize("count", MANY)
def test_flipped_bytes_in_tokenizer_model_raise_only_our_errors(count: int, tmp_path: Path) -> None:
    chance = random.Random(count)
    path = tmp_path / "tokenizer.model"
    whole = material.sentencepiece_model(PIECES)
    refused = 0
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            sentencepiece_model.read(path)
        except LlmkitError as error:
            assert str(path) in error.message
            refused += 1
    assert refused > count / 3
