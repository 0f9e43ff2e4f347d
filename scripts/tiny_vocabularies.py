"""Small real tokenizers for make_tiny_model.py, one row a kind, trained on the standard library's documentation.

Byte-level BPE with the pre-tokenizers of Llama 3, Qwen and SmolLM (package tokenizers); and SentencePiece BPE with
byte fallback as in Llama 1, Mistral and Gemma (package sentencepiece), as tokenizer.model and as tokenizer.json.
The same bytes come out on the same Python version (pydoc_data.topics differs between versions).
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
INST_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer. `model_file` says whether tokenizer.model is written beside tokenizer.json."""

    chat: str
    bos: str | None
    eos: str
    pad: str | None
    tokenizer_class: str
    tokens: tuple[str, ...] = ()
    pieces: bool = False
    model_file: bool = False


KINDS = {
    "llama": Kind(INST_CHAT, "<s>", "</s>", None, "LlamaTokenizer", pieces=True, model_file=True),
    "mistral": Kind(INST_CHAT, "<s>", "</s>", None, "LlamaTokenizer", pieces=True),
    "gemma": Kind(
        GEMMA_CHAT, "<bos>", "<eos>", "<pad>", "GemmaTokenizer",
        ("<mask>", "<start_of_turn>", "<end_of_turn>"), pieces=True, model_file=True,
    ),
    "llama3": Kind(LLAMA3_CHAT, "<|begin_of_text|>", "<|eot_id|>", None, "PreTrainedTokenizerFast", LLAMA3_TOKENS),
    "qwen": Kind(CHATML, None, "<|im_end|>", "<|endoftext|>", "Qwen2Tokenizer", CHATML_TOKENS),
    "smollm": Kind(CHATML, "<|im_start|>", "<|im_end|>", "<|im_end|>", "GPT2Tokenizer", CHATML_TOKENS),
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What config.json must know: how many tokens there are and the ids of the three that have a role."""

    size: int
    bos: int | None
    eos: int
    pad: int | None


def write(folder: Path, name: str, *, config_style: int) -> Vocabulary:
    """Tokenizer files of the kind `name`; the chat template inside (transformers 4) or beside (5) the config."""
    kind = KINDS[name]
    extra: dict[str, Any] = {}
    if kind.pieces:
        model = sentencepiece_model(kind)
        made, ids = sentencepiece_json(model, kind)
        extra = {"add_bos_token": True, "add_eos_token": False, "unk_token": "<unk>"}
        if kind.model_file:
            (folder / "tokenizer.model").write_bytes(model)
    else:
        made, ids = byte_level(name, kind)
    named = {"bos_token": kind.bos, "eos_token": kind.eos, "pad_token": kind.pad}
    config: dict[str, Any] = {key: text for key, text in named.items() if text} | extra
    config |= {"tokenizer_class": kind.tokenizer_class, "clean_up_tokenization_spaces": False}
    config["model_max_length"] = 4096
    config["added_tokens_decoder"] = {
        str(row["id"]): {key: value for key, value in row.items() if key != "id"} for row in made["added_tokens"]
    }
    if config_style == 4:
        config["chat_template"] = kind.chat
    else:
        (folder / "chat_template.jinja").write_text(kind.chat, encoding="utf-8")
    for file, content in (("tokenizer.json", made), ("tokenizer_config.json", config)):
        (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Vocabulary(
        len(made["model"]["vocab"] | ids), ids.get(kind.bos or ""), ids[kind.eos], ids.get(kind.pad or "")
    )


def training_text() -> list[str]:
    """Paragraphs of English with code and numbers."""
    from pydoc_data.topics import topics  # type: ignore[import-untyped, unused-ignore]

    return [line for name in sorted(topics) for line in topics[name].split("\n\n")]


def byte_level(name: str, kind: Kind) -> tuple[dict[str, Any], dict[str, int]]:
    """A byte-level BPE tokenizer.json of 512 tokens and the special ones, which SmolLM puts first, others last."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split: Any = pre_tokenizers.Split(Regex(GPT4_SPLIT % ("{1,3}" if name == "llama3" else "")), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name == "smollm":
        split, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if name == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    first = list(kind.tokens) if name == "smollm" else []
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512, show_progress=False, initial_alphabet=alphabet, special_tokens=first
    )  # fmt: skip
    tokenizer.train_from_iterator(training_text(), trainer)
    made: dict[str, Any] = json.loads(tokenizer.to_str())
    ids = {text: number for number, text in enumerate(kind.tokens, 0 if first else len(made["model"]["vocab"]))}
    trimming = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    after: dict[str, Any] | None = trimming if name == "qwen" else None  # SmolLM has none
    if name == "llama3":
        after = {"type": "Sequence", "processors": [trimming, _leading("<|begin_of_text|>", ids)]}
    made["added_tokens"] = [_added(text, number) for text, number in ids.items()]
    made["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    made["post_processor"] = after
    made["model"]["ignore_merges"] = name == "llama3"
    return made, ids


def _leading(text: str, ids: dict[str, int]) -> dict[str, Any]:
    """The post-processor that puts the special token `text` first."""
    special = {"SpecialToken": {"id": text, "type_id": 0}}
    pair = [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {text: {"id": text, "ids": [ids[text]], "tokens": [text]}}
    return {"type": "TemplateProcessing", "single": pair[:2], "pair": pair, "special_tokens": tokens}


def _added(text: str, number: int) -> dict[str, Any]:
    """One row of added_tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": text, **flags}


def sentencepiece_model(kind: Kind) -> bytes:
    """tokenizer.model: byte-fallback BPE of 600 pieces, numbered as Gemma's or as Llama's."""
    import sentencepiece

    out = io.BytesIO()
    gemma = kind.tokenizer_class == "GemmaTokenizer"
    roles: dict[str, Any] = {"unk_id": 0, "bos_id": 1, "eos_id": 2}
    if gemma:
        roles = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
        roles |= {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in training_text() for line in text.splitlines() if line),
        model_writer=out, model_type="bpe", vocab_size=600, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", add_dummy_prefix=not gemma, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, user_defined_symbols=list(kind.tokens), num_threads=1, minloglevel=2,
        **roles,
    )  # fmt: skip
    return out.getvalue()


def sentencepiece_json(model: bytes, kind: Kind) -> tuple[dict[str, Any], dict[str, int]]:
    """The same vocabulary as tokenizer.json: pieces joined in the order of their scores; and its special tokens."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    special = {kind.bos, kind.eos, kind.pad, "<unk>", *kind.tokens}
    ids = {piece: i for piece, i in vocab.items() if piece in special}
    splits = [
        (-pieces.get_score(number), vocab[piece[:cut]], vocab[piece[cut:]], [piece[:cut], piece[cut:]])
        for piece, number in vocab.items()
        if not re.fullmatch(r"<.+>", piece)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders: list[dict[str, Any]] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizer: dict[str, Any] = space
    if kind.tokenizer_class != "GemmaTokenizer":
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    bpe: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None}
    bpe |= {"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    bpe |= {"vocab": vocab, "merges": [row[3] for row in sorted(splits)]}
    made = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [_added(t, i) for t, i in ids.items()],
        "normalizer": normalizer, "pre_tokenizer": None, "post_processor": _leading(kind.bos or "", ids),
        "decoder": {"type": "Sequence", "decoders": decoders}, "model": bpe,
    }  # fmt: skip
    return made, ids
