"""A Hugging Face folder's tokenizer → the tokenizer.* metadata of a GGUF, without transformers.

    tokenizer.model (SentencePiece)                        → sentencepiece_model   tokenizer.ggml.model "llama"
    tokenizer.json, "▁" and byte tokens (Llama 2, Gemma)   → merged_pieces         "llama", scores from merge ranks
    tokenizer.json, byte-level (Llama 3, Qwen, SmolLM)     → byte_level            "gpt2", pre-tokenizer by name

The first that is there is taken. Facts: llama.cpp conversion/base.py, gguf-py/gguf/vocab.py, src/llama-vocab.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint import read_json
from ...errors import InvalidModel, ModelNotFound, Unsupported
from ...gguf import Value, ValueType
from .. import pretokenizers
from . import byte_level, chat_template, merged_pieces, sentencepiece_model, special_tokens, tokenizer_json
from .tokenizer_json import TokenizerJson
from .tokens import Token, columns, fill


@dataclass(frozen=True)
class Vocabulary:
    """`metadata`: tokenizer.* keys in llama.cpp's order. `n_tokens`: rows the GGUF lists, padding included.

    `n_real_tokens`: rows that are tokens of the tokenizer (Gemma 3 has more embedding rows than that). `pre_source`:
    "hash", "structure", "--pre" or "not needed". `template_source`: the file the chat template came from, if any.
    """

    metadata: Mapping[str, Value]
    n_tokens: int
    n_real_tokens: int
    pre_source: str
    template_source: str | None
    warnings: tuple[str, ...]


# a draft whose tokenizer is not looked at: the engine then takes the count of tokens from <architecture>.vocab_size
NONE = Vocabulary({"tokenizer.ggml.model": Value.string("no_vocab")}, 0, 0, "not needed", None, ())


@dataclass(frozen=True)
class _Model:
    """What the three paths have in common: the head of the metadata, rows by id, and how texts are treated."""

    path: Path
    kind: str
    pre: pretokenizers.Detection
    rows: dict[int, Token]
    n_base: int
    merges: Value | None = None
    adds_space_prefix: bool | None = None
    warnings: tuple[str, ...] = ()


def read(
    folder: Path,
    *,
    config: Mapping[str, Any],
    pre: str | None = None,
    spm_add_space_prefix: bool | None = None,
    pad: bool = True,
) -> Vocabulary:
    """The vocabulary of `folder`, whose config.json (for multimodal models, text_config included) is `config`.

    `pre` overrides the detected pre-tokenizer; `spm_add_space_prefix` is what the architecture knows better than the
    tokenizer's files; without `pad`, ids that only config's vocab_size has are left out instead of filled with [PADn].
    Raises ModelNotFound (no tokenizer), InvalidModel (file and key are named), Unsupported (a kind of tokenizer, an
    unknown pre-tokenizer), MissingDependency.
    """
    tokenizer_config = _read_if_there(folder / "tokenizer_config.json")
    document = _read_document(folder)
    model = _model(folder, document, tokenizer_config, pre)
    size, n_real, left_out = _sizes(model, config, pad)
    rows = fill(model.path, model.rows, size)
    special = special_tokens.find(_sources(document, tokenizer_config, config, rows))
    _settle(special, model, document)
    template = chat_template.find(folder, tokenizer_config)
    before, after = _space_prefix(model, tokenizer_config, spm_add_space_prefix)
    metadata = {
        **before,
        "tokenizer.ggml.model": Value.string(model.kind),
        "tokenizer.ggml.pre": Value.string(model.pre.name),
        **columns(rows, scored=model.kind == "llama"),
        **({"tokenizer.ggml.merges": model.merges} if model.merges else {}),
        **special.metadata(),
        **template.metadata(),
        **special.normalizer_metadata(),
        **after,
    }
    notes = (*model.pre.warnings, *model.warnings, *left_out, *special.warnings, *template.warnings)
    return Vocabulary(metadata, size, n_real, model.pre.source, template.source, notes)


def _settle(special: special_tokens.SpecialTokens, model: _Model, document: TokenizerJson | None) -> None:
    """Say what the engine would guess wrong when unsaid.

    It adds a bos for SentencePiece and for some names of pre-tokenizers, whatever a post-processor leaves out; and in a
    byte-level vocabulary both roles are token 11 until a file names them.
    """
    byte_level_kind = model.kind == "gpt2"
    guesses = pretokenizers.named(model.pre.name).adds_bos if byte_level_kind else _has_post_processor(document)
    if guesses:
        special.adds.setdefault("bos", False)
    for role in ("bos", "eos") if byte_level_kind else ():
        if special.adds.get(role) and role not in special.ids:
            special.adds[role] = False
            special.warnings.append(f"the tokenizer adds a {role} token, but no file says which: left out")


def _has_post_processor(document: TokenizerJson | None) -> bool:
    return document is not None and document.document.get("post_processor") is not None


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_document(folder: Path) -> TokenizerJson | None:
    """tokenizer.json; beside a tokenizer.model it may be of any kind, since it is then only asked for added tokens."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return tokenizer_json.read(folder / "tokenizer.json")
    except Unsupported:
        if sentencepiece_model.is_sentencepiece_model(folder / "tokenizer.model"):
            return None
        raise


def _model(
    folder: Path, document: TokenizerJson | None, tokenizer_config: Mapping[str, Any], pre: str | None
) -> _Model:
    unused = () if pre is None else (f"--pre {pretokenizers.check_name(pre)}: SentencePiece needs no pre-tokenizer",)
    not_needed = pretokenizers.Detection("default", "not needed", unused)
    if sentencepiece_model.is_sentencepiece_model(folder / "tokenizer.model"):
        found = sentencepiece_model.read(folder / "tokenizer.model")
        rows = sentencepiece_model.tokens(found, _added_tokens(folder, document, tokenizer_config, found))
        return _Model(
            found.path, "llama", not_needed, rows, len(found.pieces),
            adds_space_prefix=found.adds_space_prefix, warnings=found.warnings,
        )  # fmt: skip
    if document is None:
        raise ModelNotFound(
            f"{folder}: has no tokenizer that llmkit reads",
            "Expected tokenizer.json, which transformers' save_pretrained writes, or a SentencePiece tokenizer.model.",
        )
    n_base = max(document.vocab.values()) + 1
    if merged_pieces.is_sentencepiece(document):
        return _Model(
            document.path, "llama", not_needed, merged_pieces.tokens(document), n_base,
            adds_space_prefix=merged_pieces.adds_space_prefix(document),
            warnings=(*merged_pieces.warnings(document), *_trimming(document)),
        )  # fmt: skip
    if not byte_level.is_byte_level(document):
        raise Unsupported(f"{document.path}: is a BPE of an unknown kind: neither byte-level nor SentencePiece's")
    if not document.merges:
        raise InvalidModel(f"{document.path}: model.merges is empty")
    tidies = tokenizer_config.get("clean_up_tokenization_spaces") is True
    detected = pretokenizers.detect(document.path, document.document, pre=pre, tidies=tidies)
    merges = Value.array(ValueType.STRING, byte_level.merges(document))
    return _Model(
        document.path, "gpt2", detected, byte_level.tokens(document), n_base, merges, warnings=_trimming(document)
    )


def _trimming(document: TokenizerJson) -> tuple[str, ...]:
    trimming = [token.content for token in document.added if token.trims]
    if not trimming:
        return ()
    some = f"{len(trimming)} added tokens (such as {trimming[0]!r})"
    return (f"{some} swallow neighbouring blanks or match whole words only; the engine does neither",)


def _added_tokens(
    folder: Path, document: TokenizerJson | None, tokenizer_config: Mapping[str, Any],
    model: sentencepiece_model.SentencePieceModel,
) -> Iterator[tuple[int, str, bool]]:  # fmt: skip
    """(id, text, special) of the tokens a folder adds to a tokenizer.model; what comes later wins."""
    path = folder / "added_tokens.json"
    for text, number in _read_if_there(path).items():
        yield _checked(path, number, text), text, False
    for token in document.added if document else ():
        if token.id >= len(model.pieces) or model.pieces[token.id].text != token.content:
            yield token.id, token.content, token.special
    path = folder / "tokenizer_config.json"
    decoder = tokenizer_config.get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, Mapping) else ():
        fields = entry if isinstance(entry, Mapping) else {}
        number = _checked(path, int(key) if re.fullmatch("[0-9]{1,9}", key) else key, fields.get("content"))
        yield number, fields["content"], bool(fields.get("special"))


def _checked(path: Path, number: Any, text: Any) -> int:
    if not tokenizer_json.is_text(text) or not tokenizer_json.is_id(number):
        raise InvalidModel(f"{path}: added token {text!r} has the id {number!r}")
    return int(number)


def _sizes(model: _Model, config: Mapping[str, Any], pad: bool) -> tuple[int, int, tuple[str, ...]]:
    """Rows to list, real ones among them, and what had to be left out because the model has no row for it."""
    n_real = max(model.rows) + 1
    declared = config.get("vocab_size")
    if declared is None:
        return n_real, n_real, ()
    if not tokenizer_json.is_id(declared) or not declared:
        raise InvalidModel(f"config.json: vocab_size is {declared!r}, expected a positive number")
    if model.n_base > declared:
        raise InvalidModel(
            f"{model.path}: has {model.n_base} tokens, but config.json says vocab_size {declared}",
            "The tokenizer seems to belong to another model.",
        )
    lost = sorted(number for number in model.rows if number >= declared)
    notes = tuple(
        f"{model.path.name}: token {model.rows[number].text!r} is {number}, beyond vocab_size {declared}: left out"
        for number in lost[:3]
    ) + ((f"… and {len(lost) - 3} more such tokens",) if len(lost) > 3 else ())
    n_real = min(n_real, declared)
    return (declared if pad else n_real), n_real, notes


def _sources(
    document: TokenizerJson | None, tokenizer_config: Mapping[str, Any], config: Mapping[str, Any], rows: list[Token]
) -> special_tokens.Sources:
    return special_tokens.Sources(
        document.document if document else {},
        tokenizer_config,
        config,
        {token.content: token.id for token in document.added} if document else {},
        {token.text: number for number, token in enumerate(rows)},
        len(rows),
    )


def _space_prefix(
    model: _Model, tokenizer_config: Mapping[str, Any], known: bool | None
) -> tuple[dict[str, Value], dict[str, Value]]:
    """tokenizer.ggml.add_space_prefix, before or after the other keys: llama.cpp writes it in both places."""
    key = "tokenizer.ggml.add_space_prefix"
    if known is not None and model.kind == "llama":
        return {}, {key: Value.boolean(known)}
    setting = tokenizer_config.get("add_prefix_space")
    if isinstance(setting, bool):
        return {key: Value.boolean(setting)}, {}
    if model.adds_space_prefix is False:
        return {}, {key: Value.boolean(False)}
    return {}, {}
