"""The tokenizer of a checkpoint folder, as transformers loads it: ids, bytes, kinds, the chat template.

tokenizer.json is taken as it stands where there is one; classes of transformers that rebuild it from its vocabulary
are only asked where there is none. Nothing is fetched, no code of the folder is run.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..errors import InvalidModel, MissingDependency, ModelNotFound
from . import TokenKind

INSTALL = 'Run: pip install "transformers>=5"'
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# marks that end a turn whatever the folder says of eos (llama.cpp: src/llama-vocab.cpp, tokens found by their text)
_ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "<EOT>",
    "_<EOT>", "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "[EOT]", "[EOS]", "</s>", "<eos>", "<turn|>", "<｜end▁of▁sentence｜>", "<file_sep>", "<|file_sep|>", "<|fim_pad|>",
    "<|repo_name|>", "<reponame>",
})  # fmt: skip


@dataclass(frozen=True)
class Ends:
    """What begins and ends texts. `eos` holds all that end an answer, `eos_token` is the one templates write."""

    bos: int | None
    eos: frozenset[int]
    eos_token: int | None
    add_bos: bool


class HfTokenizer:
    """Made by `read`. `n_vocab` counts the model's logits, which may be more than the tokenizer has tokens."""

    def __init__(self, folder: Path, tokenizer: Any, n_vocab: int) -> None:
        self.folder = folder
        self.n_vocab = n_vocab
        self._tokenizer = tokenizer
        self._added: Mapping[int, Any] = dict(tokenizer.added_tokens_decoder)
        self._steps = frozenset(_decoder_steps(tokenizer))
        self._pieces: dict[int, bytes] = {}

    def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """See Backend.encode."""
        text = text.encode("utf-8", "replace").decode()  # lone surrogates, which tokenizers refuse
        found = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)
        start = [self.ends.bos] if bos and self.ends.add_bos and self.ends.bos is not None else []
        return start + [int(token) for token in found]

    def piece(self, token: int) -> bytes:
        """See Backend.piece; empty for ids that the model has and the tokenizer has not."""
        found = self._pieces.get(token)
        if found is None:
            if not 0 <= token < self.n_vocab:
                raise ValueError(f"token {token} is not in a vocabulary of {self.n_vocab}")
            found = self._pieces[token] = self._bytes(token)
        return found

    def kind(self, token: int) -> TokenKind:
        """See Backend.kind."""
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"token {token} is not in a vocabulary of {self.n_vocab}")
        text = self._text(token)
        if text is None:
            return "unused"
        if token == self._tokenizer.unk_token_id and "ByteLevel" not in self._steps:
            return "unknown"
        if token in self._added:
            return "control" if self._added[token].special else "user"
        return "byte" if "ByteLevel" not in self._steps and _BYTE.fullmatch(text) else "normal"

    def _text(self, token: int) -> str | None:
        if token in self._added:
            return str(self._added[token].content)
        text = self._tokenizer.convert_ids_to_tokens(token) if token < len(self._tokenizer) else None
        return text if isinstance(text, str) else None

    def _bytes(self, token: int) -> bytes:
        """The bytes of a token, by the steps of its decoder (huggingface/tokenizers: src/decoders)."""
        text = self._text(token)
        if text is None:
            return b""
        if token in self._added:
            return text.encode("utf-8", "replace")
        if "ByteLevel" in self._steps:
            table = _byte_of_character()
            return b"".join(bytes([table[char]]) if char in table else char.encode("utf-8", "replace") for char in text)
        if match := _BYTE.fullmatch(text):
            return bytes([int(match[1], 16)])
        if "WordPiece" in self._steps:
            text = text[2:] if text.startswith("##") else f" {text}"
        return text.replace("▁", " ").encode("utf-8", "replace")

    @cached_property
    def ends(self) -> Ends:
        """Where texts begin and end: by the tokenizer, generation_config.json, config.json, and known marks."""
        tokenizer = self._tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        first = tokenizer.encode("a")[:1]
        found = {eos, *_eos_ids(self.folder)}
        found |= {token for token, added in self._added.items() if added.special and added.content in _ENDS}
        known = frozenset(token for token in found if isinstance(token, int) and 0 <= token < self.n_vocab)
        return Ends(bos, known, eos, add_bos=bos is not None and first == [bos])

    @property
    def chat_template(self) -> str | None:
        """The template used when none is named."""
        template = self._tokenizer.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        return template if isinstance(template, str) else None


def read(folder: Path, n_vocab: int) -> HfTokenizer:
    """The tokenizer in `folder`. Raises MissingDependency, ModelNotFound (no tokenizer), InvalidModel."""
    transformers = _library()
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    if not any((folder / name).is_file() for name in names):
        raise ModelNotFound(f"{folder}: has no tokenizer", f"One of {', '.join(names)} is needed.")
    whole = (folder / "tokenizer.json").is_file()
    loader: Any = transformers.PreTrainedTokenizerFast if whole else transformers.AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise InvalidModel(f"{folder}: transformers cannot load the tokenizer: {error}") from error
    return HfTokenizer(folder, tokenizer, n_vocab)


def _library() -> Any:
    """transformers, imported without its advice to install PyTorch, which tokenizers do not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    except ImportError as error:
        raise MissingDependency(f"the tokenizer of a folder needs transformers: {error}", INSTALL) from error
    finally:
        logging.disable(before)
    return transformers


def _decoder_steps(tokenizer: Any) -> Iterator[str]:
    """The types of the decoder's steps: ByteLevel, ByteFallback, Metaspace, WordPiece …"""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return
    steps = [json.loads(decoder.__getstate__())]
    while steps:
        step = steps.pop()
        yield step.get("type", "")
        steps.extend(step.get("decoders", ()))


def _eos_ids(folder: Path) -> Iterator[int]:
    """`eos_token_id` of generation_config.json, config.json and its text_config: a number or a list of them."""
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        values = checkpoint.read_json(folder / name)
        inner = values.get("text_config")
        for each in (values, inner if isinstance(inner, dict) else {}):
            found = each.get("eos_token_id")
            yield from (token for token in (found if isinstance(found, list) else [found]) if type(token) is int)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the other 68 for the characters from 256 on."""
    if not _ALPHABET:
        plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        others = [byte for byte in range(256) if byte not in plain]
        _ALPHABET.update({chr(byte): byte for byte in plain})
        _ALPHABET.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return _ALPHABET


_ALPHABET: dict[str, int] = {}
