"""Which of the engine's pre-tokenizers cuts text into words as a tokenizer.json does.

The engine does not read regular expressions from a GGUF: it knows names (tokenizer.ggml.pre; llama.cpp
src/llama-vocab.cpp), and a wrong name gives wrong tokens without a word. A name is found
  1. by hash: the ids of PROBE, looked up among tokenizers we have seen (independent of how the file spells its rules);
  2. by structure: the cuts that pre_tokenizer describes, looked up in PRETOKENIZERS (independent of the vocabulary);
  3. by the user: --pre NAME.
Owner of the package `tokenizers`. Adding a tokenizer: a row in PRETOKENIZERS (tests/test_pretokenizers.py compares
every row with the engine), a line in PROBE_HASHES when its files can be had.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidModel, MissingDependency, Unsupported, nearest_hint

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

DIGIT, DIGITS = r"\p{N}", r"\p{N}+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUNCTUATION_RUNS = r"[\p{P}\$\+<=>\^~\|`]+"
_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
_WORDS = rf"{_PUNCTUATED}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"


def _tiktoken(number: str, letters: str = r"\p{L}", spaces: str = _SPACES) -> str:
    """The shape cl100k_base gave to Llama 3, Qwen and many more; they differ in how numbers are cut."""
    symbols = r"\s\p{L}\p{N}" if letters == r"\p{L}" else r"\s\p{L}\p{M}\p{N}"
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{number}| ?[^{symbols}]+[\r\n]*|{spaces}"


def _cased(number: str, suffix: str = "") -> str:
    """The shape of o200k_base and tekken: a word is cut where lower case turns to upper case."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}"
        rf"|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


LLAMA3 = _tiktoken(r"\p{N}{1,3}")
QWEN2 = _tiktoken(DIGIT)
QWEN35 = _tiktoken(DIGIT, letters=r"[\p{L}\p{M}]")
_WIDE_CJK = r"[一-龥ࠀ-一가-퟿]+"


@dataclass(frozen=True)
class PreTokenizer:
    """A name the engine knows, and the cuts (regular expressions, applied in turn) for which it stands.

    `ignore_merges`, `tidies` (removes spaces before punctuation when text is put together) and `adds_bos` come with the
    name: the engine does not take them from the file (`adds_bos` yields to tokenizer.ggml.add_bos_token).
    """

    name: str
    cuts: tuple[str, ...]
    ignore_merges: bool = False
    tidies: bool = False
    adds_bos: bool = False


# The cuts are what tokenizer.json files hold; the engine has its own spelling of each. Among rows with equal cuts the
# flags decide, then the order.
PRETOKENIZERS = (
    PreTokenizer("gpt-2", (GPT2,), tidies=True),
    PreTokenizer("trillion", (GPT2,)),
    PreTokenizer("smollm", (DIGIT, GPT2)),
    PreTokenizer("starcoder", (DIGIT, GPT2), tidies=True),
    PreTokenizer("llama-bpe", (LLAMA3,), ignore_merges=True, tidies=True, adds_bos=True),
    PreTokenizer("dbrx", (LLAMA3,), tidies=True),
    PreTokenizer("qwen2", (QWEN2,)),
    PreTokenizer("stablelm2", (QWEN2,), tidies=True),
    PreTokenizer("qwen35", (QWEN35,)),
    PreTokenizer("minicpm5", (r"\p{N}{1,3}", _tiktoken(DIGITS)), ignore_merges=True, tidies=True),
    PreTokenizer("ufakzeka", (QWEN2.removeprefix(f"{_CONTRACTIONS}|"),)),
    PreTokenizer("tekken", (_cased(DIGIT),), ignore_merges=True, adds_bos=True),
    PreTokenizer("gpt-4o", (_cased(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),)),
    PreTokenizer("deepseek-v3", (r"\p{N}{1,3}", _CJK, _WORDS)),
    PreTokenizer("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _WIDE_CJK, DIGIT)),
    PreTokenizer("falcon", (PUNCTUATION_RUNS, GPT2, "[0-9][0-9][0-9]"), tidies=True),
)

# Every name the engine takes (llama.cpp src/llama-vocab.cpp, llama_vocab::impl::load); those without a row above can
# only be found by hash or given with --pre.
NAMES = frozenset(
    "a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx "
    "deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2 falcon "
    "falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish granite-docling granite-embed-multi-311m "
    "granite-embed-multi-97m grok-2 hunyuan hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code "
    "jina-v2-de jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 "
    "llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral "
    "poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 "
    "starcoder superbpe talkie tekken tiny_aya trillion ufakzeka viking whitespace youtu".split()
)

# What pre-tokenizers disagree about: runs of digits after letters, spaces and signs, runs of blanks and line ends,
# contractions in both cases, camelCase, scripts without spaces, marks, emoji. In NFC already: normalizers leave it be.
PROBE = (
    "It's 7, 42, 365, 2024, 16384 or 1000000? We'LL see; they'd said: DON'T!\n"
    "x1=3.14159e-10;y22 = 'a'*333 # 4444+55555\n\n\n"
    "\tdef parseHTTPRequest(self, n: int=10) -> None:\n        return self.buffers[n:]  \r\n   \n \t \n"
    "Größe 12 m², naïve café — Ελλάδα 2004, Москва 1147 г. ½ Ⅷ ٣٤\n"
    "東京は2021年に、价格是¥128元。서울 25개 구 ไทย๑๒ हिन्दी भाषा עברית العربية ١٢٣\n"
    "😀👩‍💻🇫🇷🏳️‍🌈 →∞≠ «quoted» “curly” ‘'s’ ... ---- ====>>> /usr/local/bin//x ${HOME}_1\n"
    "x̄.get(y̌,z).set() a̱'s n̈.to नाम.com กำ.net [1]//2 (see)  \n\n  $x=-1; f(l'Data, o'Reilly 'tools)\n\n"
    "iPhone15ProMax McDonald'S     five      six       7      8\u00a0nbsp\u3000wide  "
)

# sha256 of the probe's ids → name: see probe_hash. The first block from real tokenizer.json files, the second from the
# engine's own ids on the vocabularies in llama.cpp's models/ (ggml-vocab-*.gguf).
PROBE_HASHES: Mapping[str, str] = {
    "f2e68a6d89f4fb3bbd630d0a407ed6b3d017b90e19c8dafc2b52437419df5bf4": "llama-bpe",  # Llama 3
    "b08ab2d097f6ef26345d56896996c1bf093ffc87aa23fffe9387255c89d44ca5": "qwen2",  # Qwen 2, 2.5, 3
    "f39930cbce175d6bdf294f16ab73522ff3ed0ba069df0ebec50aaed9104174ff": "smollm",  # SmolLM2
    "d4890d268944371a4a1ab73088fc4d7d9b8064048969ade41a6576dc61fd4c23": "deepseek-v3",  # DeepSeek V3, V4
    "15224e03b82708f68102959bbdce21578a43d483ebfe42b7475b5dc2dfa109a4": "gpt-4o",  # o200k: GPT-4o, gpt-oss
    "b80514dff208e8846bd3d1b65a8be1ce31f95d3a2303f553993c717a46d6a532": "dbrx",  # cl100k: GPT-3.5
    "709f0a25044780a2d330237827d378dfe0a2477c22a84ada0961981b07bbe503": "gpt-2",  # GPT-2
    "da93a722a49b83e488127a0016a5b8e772cd78dab8277c2c36eaffc61404f4cb": "deepseek-llm",
    "9046116a594f0bfa7014c949273c840d22cb8c41c7618d02734b97aa478ea7ab": "deepseek-coder",
    "b51b3fd3909e27ccd90b5c10faefe7aec859ad38b507af793ae22d111c4ee4ee": "falcon",
    "84e81a3756da499df7a6539deeb81b2047692de565dda7c47fcc3ed5b1852fa6": "starcoder",
    "464e699f138780ddfd7c725bfd3f3b01080d9403d076388cacdc866514568fac": "refact",
    "1de80b47e3caf9ca12329546b31e10d26303821614fc97d9766c497a7fa0ba74": "command-r",
    "68b4ca508042e082594ada47dbfdf01aec6820c541996811096c9481dbf04299": "mpt",
}


@dataclass(frozen=True)
class Detection:
    """The name found, how ("hash", "structure" or "--pre"), and what the engine will do differently."""

    name: str
    source: str
    warnings: tuple[str, ...] = ()


def detect(path: Path, document: Mapping[str, Any], *, pre: str | None = None, tidies: bool = False) -> Detection:
    """The engine's pre-tokenizer for the byte-level BPE of `document`, the content of the tokenizer.json at `path`.

    `pre` overrides; `tidies` is tokenizer_config's clean_up_tokenization_spaces. Raises Unsupported when nothing fits
    or `pre` is not a name of the engine, InvalidModel when `tokenizers` cannot read the file.
    """
    if pre is not None:
        return Detection(check_name(pre), "--pre", normalizer_warnings(document))
    if name := PROBE_HASHES.get(probe_hash(path)):
        return Detection(name, "hash", normalizer_warnings(document))
    cuts = cuts_of(document.get("pre_tokenizer"))
    rows = [row for row in PRETOKENIZERS if row.cuts == cuts]
    if not rows:
        raise Unsupported(
            f"{path}: the engine has no pre-tokenizer for this one: {' then '.join(cuts) or 'none at all'}",
            f"If you know a model that cuts text the same way, say --pre NAME with one of: {', '.join(sorted(NAMES))}.",
        )
    ignores = bool(document["model"].get("ignore_merges", False))
    row = min(rows, key=lambda row: (row.ignore_merges != ignores, row.tidies != tidies))
    notes = normalizer_warnings(document)
    if row.ignore_merges != ignores:
        does = "looks whole words up before merging" if row.ignore_merges else "always merges"
        notes += (f"{path.name}: ignore_merges is {ignores}, the engine's '{row.name}' {does}: rare words may differ",)
    return Detection(row.name, "structure", notes)


def check_name(name: str) -> str:
    """`name`, if the engine knows it. Raises Unsupported with the nearest names."""
    if name not in NAMES:
        raise Unsupported(f"--pre {name}: the engine knows no such pre-tokenizer", nearest_hint(name, NAMES))
    return name


def named(name: str) -> PreTokenizer:
    """The row of `name`; for names without one, a row without cuts."""
    return next((row for row in PRETOKENIZERS if row.name == name), PreTokenizer(name, ()))


def cuts_of(step: Any) -> tuple[str, ...]:
    """The regular expressions by which a pre_tokenizer of tokenizer.json cuts, in order.

    Different spellings of one cut become equal: Digits and ByteLevel as the expression they stand for, "Removed" with
    "invert" (keep only what matches) as "Isolated" when the expression matches everything. What has no such form is
    kept as a readable word that equals no row.
    """
    if not isinstance(step, Mapping):
        return () if step is None else (f"{step!r}",)
    kind = step.get("type")
    if kind == "Sequence" and isinstance(step.get("pretokenizers"), list):
        return tuple(cut for inner in step["pretokenizers"] for cut in cuts_of(inner))
    if kind == "ByteLevel":
        spaced = ("ByteLevel with add_prefix_space",) if step.get("add_prefix_space") else ()
        return (*spaced, GPT2) if step.get("use_regex", True) else spaced
    if kind == "Digits":
        return (DIGIT,) if step.get("individual_digits") else (DIGITS,)
    if kind == "Punctuation" and step.get("behavior") == "Contiguous":
        return (PUNCTUATION_RUNS,)
    if kind == "Split":
        return (_split(step),)
    return (f"{kind}",)


def _split(step: Mapping[str, Any]) -> str:
    pattern, behavior, invert = step.get("pattern"), step.get("behavior"), bool(step.get("invert"))
    if isinstance(pattern, Mapping) and isinstance(pattern.get("Regex"), str):
        regex = str(pattern["Regex"]).replace("\r", r"\r").replace("\n", r"\n")
    elif isinstance(pattern, Mapping) and isinstance(pattern.get("String"), str):
        regex = re.escape(pattern["String"])
    else:
        regex = f"{pattern!r}"
    matches_everything = regex.endswith(r"|\s+")
    if (behavior == "Isolated" and not invert) or (behavior == "Removed" and invert and matches_everything):
        return regex
    return f"Split({regex}, {behavior}, invert={invert})"


def normalizer_warnings(document: Mapping[str, Any], understood: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What a tokenizer.json does to a text before cutting it and the engine does not, but for the kinds `understood`.

    NFC is passed over: nearly all text is NFC already, and every Qwen says it.
    """
    kinds = [kind for kind in _normalizers(document.get("normalizer")) if kind not in ("NFC", *understood)]
    return tuple(f"the tokenizer first normalizes text ({kind}); the engine does not" for kind in kinds)


def _normalizers(step: Any) -> list[str]:
    if not isinstance(step, Mapping):
        return []
    if step.get("type") == "Sequence" and isinstance(step.get("normalizers"), list):
        return [kind for inner in step["normalizers"] for kind in _normalizers(inner)]
    return [str(step.get("type"))]


def probe_hash(path: Path) -> str:
    """sha256 of the ids that the tokenizer.json at `path` gives for PROBE. Raises InvalidModel, MissingDependency."""
    ids = encode(load(path), PROBE, path)
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def load(path: Path) -> Any:
    """The tokenizer.json at `path` as a tokenizers.Tokenizer. Raises InvalidModel, MissingDependency."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingDependency("the package 'tokenizers' is missing", "pip install tokenizers") from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more precise
        raise InvalidModel(f"{path}: the package 'tokenizers' cannot read it: {error}") from error


def encode(tokenizer: Any, text: str, path: Path) -> list[int]:
    """Ids of `text`, no special tokens added, from `tokenizer`, loaded from `path`. Raises InvalidModel."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except Exception as error:  # the package raises nothing more precise
        raise InvalidModel(f"{path}: the package 'tokenizers' cannot use it: {error}") from error
