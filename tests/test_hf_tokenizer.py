"""backends/hf_tokenizer: the folder's tokenizer against llama.cpp's vocabulary of the same model, and odd folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import GgufOf, TinyCheckpoint
from llmkit import backends
from llmkit.backends import hf_tokenizer
from llmkit.errors import InvalidModel, ModelNotFound

pytest.importorskip("transformers")

FAMILIES = ("llama", "llama3", "mistral", "smollm", "qwen2", "gemma3")
TEXTS = (
    "Hello world, it's 3.14", " leading", "naïve — 東京 🙂\n\n\tx = {'a': 1}", "a<|im_end|>b</s>c<end_of_turn>", "",
    "\r\n ",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_as_llama_cpp(family: str, tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> None:
    """Ids with and without special tokens, bytes, ends and kinds."""
    folder = tiny_checkpoint(family, dtype="f32", **({"layers": 7} if family == "gemma3" else {}))
    reference = backends.load(gguf_of(folder, "f32"), n_threads=1)
    tokenizer = hf_tokenizer.read(folder, reference.info.n_vocab)
    for text in TEXTS:
        for special in (True, False):
            assert tokenizer.encode(text, special=special) == reference.encode(text, special=special), (text, special)
        assert tokenizer.encode(text, bos=True) == reference.encode(text, bos=True)
    ids = range(reference.info.n_vocab)
    assert [tokenizer.piece(token) for token in ids] == [reference.piece(token) for token in ids]
    ends = tokenizer.ends
    assert (ends.eos, ends.eos_token, ends.add_bos) == (
        reference.info.eos, reference.info.eos_token, reference.info.add_bos,
    )  # fmt: skip
    assert tokenizer.chat_template == reference.info.chat_template
    # "added by hand" is a matter of opinion between the two, and llama.cpp takes <unk> for a control token; what a text
    # cannot spell, and lone bytes, are not
    for kinds in ({"byte"}, {"control", "unknown"}, {"unused"}):
        ours = {token for token in ids if tokenizer.kind(token) in kinds}
        theirs = {token for token in ids if reference.kind(token) in kinds}
        assert ours == theirs, kinds
    reference.close()


def test_bytes_of_a_text(smollm2_folder: Path) -> None:
    """Pieces put together are the text, half characters included."""
    tokenizer = hf_tokenizer.read(smollm2_folder, 49152)
    for text in TEXTS:
        assert b"".join(map(tokenizer.piece, tokenizer.encode(text))).decode() == text
    assert any(len(tokenizer.piece(token)) == 1 and tokenizer.piece(token)[0] > 127 for token in range(49152))
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("\ud800") == tokenizer.encode("?")  # a lone surrogate is no character


def test_ids_beyond_the_tokenizer(tiny_checkpoint: TinyCheckpoint) -> None:
    """Embeddings are often padded: such a token has no bytes."""
    folder = tiny_checkpoint("llama", dtype="f32")
    tokenizer = hf_tokenizer.read(folder, 700)
    assert tokenizer.piece(650) == b"" and tokenizer.kind(650) == "unused"
    for wrong in (700, -1):
        with pytest.raises(ValueError, match="vocabulary of 700"):
            tokenizer.piece(wrong)
        with pytest.raises(ValueError, match="vocabulary of 700"):
            tokenizer.kind(wrong)


def test_all_that_ends_an_answer(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama", dtype="f32"), folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9, 99999]}')
    assert {7, 9} <= hf_tokenizer.read(folder, 600).ends.eos
    assert 99999 not in hf_tokenizer.read(folder, 600).ends.eos


def test_without_tokenizer_json(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """transformers makes one of the SentencePiece model."""
    whole = tiny_checkpoint("llama", dtype="f32")
    assert (whole / "tokenizer.model").is_file()
    shutil.copytree(whole, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer.json"))
    made, known = hf_tokenizer.read(tmp_path / "model", 600), hf_tokenizer.read(whole, 600)
    assert [made.piece(token) for token in range(600)] == [known.piece(token) for token in range(600)]
    assert made.encode("Hello world") == known.encode("Hello world")


def test_word_pieces(tmp_path: Path) -> None:
    """BERT's: a piece that begins a word carries the space before it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "the"]
    document: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [
            {"id": i, "content": words[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for i in range(5)
        ],
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {word: i for i, word in enumerate(words)}},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = hf_tokenizer.read(tmp_path, len(words))
    assert tokenizer.encode("playing the") == [5, 6, 7]
    assert b"".join(map(tokenizer.piece, [5, 6, 7])) == b" playing the"
    assert tokenizer.kind(3) == "control" and tokenizer.kind(6) == "normal"


def test_folders_without_a_usable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no tokenizer"):
        hf_tokenizer.read(tmp_path, 10)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(InvalidModel, match="cannot load the tokenizer"):
        hf_tokenizer.read(tmp_path, 10)
