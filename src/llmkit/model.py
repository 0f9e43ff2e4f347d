"""The one grammar of models, in every verb.

    org/name                    a repository of the Hub
    org/name@revision           … at a branch, tag or commit
    org/name:Q4_K_M             … its GGUF of that quant, or the quant to make of it
    org/name@revision:Q4_K_M
    folder, file.gguf, file-00001-of-00003.gguf

Text that names no model is refused with its nearest reading. Knows nothing of what is in a model; may look whether a
path exists.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from .errors import AccessDenied, LlmkitError, ModelNotFound, Unsupported, nearest

FORMS = "Name a model as org/name, org/name@revision, org/name:Q4_K_M, a folder, or a .gguf file."
SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.ASCII)

_LONGEST_WORD = 96  # of a repository's name (huggingface_hub: utils/_validators.py, whose rules these are)
_WORD = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_QUANT = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[A-Za-z0-9]+(?:[-_.][A-Za-z0-9]+)*")
_LONGEST_QUANT = 40
_LONGEST_TEXT = 4096  # of a path, on Linux
# as GGUF publishers end their files' names: Q4_K_M, UD-Q4_K_XL, IQ2_XXS, Q4_0_4_4, BF16, fp16, MXFP4_MOE
_LABEL = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-)?(?:(?:I?Q|TQ)\d|(?:B?F|FP)(?:8|16|32|64)|(?:MX|NV)FP4)"
    r"(?:_(?:\d{1,2}|K[A-Z]{0,2}|NL|X{0,2}[SL]|M|P|R\d|MOE))*(?![A-Za-z0-9])",
    re.IGNORECASE | re.ASCII,
)
_CHECKPOINT_PARTS = (".safetensors", ".json", ".jinja", ".model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HOST = r"(?:(?:www\.)?huggingface\.co|hf\.co|hf-mirror\.com)"
_ADDRESS = re.compile(rf"(?i)[a-z+]+://|(?:[^/@]*@)?{_HOST}(?:[/:]|$)")
_MOST_SIBLINGS = 5000  # looked at for near names
_MARKED = "a revision or a quant may follow only a name of the Hub, and this is a path"


@dataclass(frozen=True)
class ModelRef:
    """A model as it was named: `path` on this machine, or `repo` ("org/name") of the Hub with its revision and quant.

    `quant` is a label in capitals, any that publishers use ("UD-Q4_K_XL"): not only those llmkit can make.
    """

    path: Path | None = None
    repo: str | None = None
    revision: str | None = None
    quant: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.repo is None) or (self.path and (self.revision or self.quant)):
            raise ValueError("a ModelRef has a path, or a repo with its revision and quant")

    @property
    def local(self) -> bool:
        """Whether it is a path on this machine."""
        return self.path is not None

    @property
    def name(self) -> str:
        """The last word of the repository, or of the path without .gguf and the number of a split file's part."""
        if self.path is None:
            return str(self.repo).rpartition("/")[2]
        path = Path(os.path.abspath(self.path))
        if path.parent.name == "snapshots" and (repo := cached_repo(path.parents[1].name)):
            return repo.rpartition("/")[2]  # a folder of the Hugging Face cache is named by its commit
        match = SPLIT_NAME.match(path.name)
        return match["stem"] if match else re.sub(r"(?i)(?<=.)\.gguf$", "", path.name) or "model"

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{revision}" + ("" if self.quant is None else f":{self.quant}")


def parse(text: str | Path) -> ModelRef:
    """The model that `text` names.

    What exists on disk is a path: a folder org/name wins over the repository of that name (org/name@main is always the
    repository). Text that begins with `.`, `/` or `~`, or ends in .gguf, and any Path, is a path even where nothing
    exists. Raises ModelNotFound (no such path), AccessDenied, Unsupported (pickled weights), LlmkitError (no name).
    """
    given, text = text, str(text)
    if not text.strip():
        raise LlmkitError("no model is named: the text is empty", FORMS)
    if len(text) > _LONGEST_TEXT:
        raise LlmkitError(f"{_shown(text)}: {len(text)} characters are too many for a model's name", FORMS)
    explicit = isinstance(given, Path) or text[0] in "./~" or text.lower().endswith(".gguf")
    path = _expanded(text)
    mode = _mode(path, explicit)
    if mode is not None:
        return _on_disk(path, mode)
    if explicit and not _ADDRESS.match(text):
        raise _missing(text, path)
    try:
        return _named(text)
    except LlmkitError as fault:
        raise type(fault)(f"'{_shown(text)}': {fault.message}", _advice(text)) from None


def quant_label(filename: str) -> str | None:
    """The quant that a GGUF file's name tells, in capitals ("x-q4_k_m-00001-of-00002.gguf" → "Q4_K_M"), or None."""
    found = _LABEL.findall(filename)
    return found[-1].upper() if found else None


def nearest_on_disk(path: Path) -> list[str]:
    """Folders and .gguf files beside `path` with names like its own, as they would be typed; may be empty."""
    try:
        with os.scandir(path.parent) as entries:
            names = [
                entry.name
                for entry in islice(entries, _MOST_SIBLINGS)
                if entry.name[0] != "." and (entry.name.lower().endswith(".gguf") or os.path.isdir(entry.path))
            ]
    except (OSError, ValueError):
        return []
    return [str(path.with_name(name)) for name in nearest(path.name, sorted(names))]


# ── paths ──


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user, or no home
        raise ModelNotFound(f"{_shown(text)}: '~' stands for a home folder that is not there", FORMS) from None


def _mode(path: Path, explicit: bool) -> int | None:
    """What is at `path` (stat's st_mode), or None. What may not be looked at is nothing, unless it was meant."""
    try:
        return os.stat(path).st_mode
    except PermissionError:
        if explicit:
            raise AccessDenied(f"{_shown(path)}: may not be looked at") from None
    except (OSError, ValueError):  # not there; a name no file can have
        pass
    return None


def _on_disk(path: Path, mode: int) -> ModelRef:
    """The reference to an existing path. Raises LlmkitError for what is only a part of a model, or none."""
    if stat.S_ISDIR(mode):
        if (repo := cached_repo(path.name)) and (path / "snapshots").is_dir():
            raise LlmkitError(f"{_shown(path)}: is a folder of the Hugging Face cache", _did_you_mean([repo]))
        return ModelRef(path)
    if not stat.S_ISREG(mode):
        raise LlmkitError(f"{_shown(path)}: is neither a file nor a folder", FORMS)
    if first := _first_part(path):
        raise LlmkitError(f"{_shown(path)}: is a later part of a split GGUF", f"Give the first part: '{first}'.")
    suffix = path.suffix.lower()
    if suffix in _CHECKPOINT_PARTS:
        raise LlmkitError(f"{_shown(path)}: is one file of a checkpoint", f"Give its folder: '{path.parent}'.")
    if suffix in _PICKLES:
        raise Unsupported(
            f"{_shown(path)}: {suffix} files hold pickled weights, which can run code when opened; they are not read",
            "Get the model's safetensors or GGUF files.",
        )
    if suffix in (".partial", ".incomplete"):
        raise LlmkitError(f"{_shown(path)}: is an unfinished file", "Run the command that writes it again.")
    return ModelRef(path)


def _first_part(path: Path) -> Path | None:
    """The first part of the split GGUF that `path` is a later part of."""
    match = SPLIT_NAME.match(path.name)
    if not match or match["number"] == "00001":
        return None
    return path.with_name(f"{match['stem']}-00001-of-{match['count']}.gguf")


def _missing(text: str, path: Path) -> LlmkitError:
    """The error for a path where nothing is."""
    try:
        return ModelNotFound(f"{_shown(text)}: is a link to {os.readlink(path)}, which is not there")
    except (OSError, ValueError):
        pass
    if head := _head_on_disk(text):
        return LlmkitError(f"{_shown(text)}: {_MARKED}", _did_you_mean([head]))
    missing = path
    while not os.path.exists(missing.parent) and missing != missing.parent:
        missing = missing.parent
    what = "no such file or folder" if missing == path else f"there is no folder '{_shown(missing)}'"
    near = nearest_on_disk(missing)
    if first := _first_part(path):
        near = [str(first)]
    if text[0] not in "./~" and (reading := _reading(text)):
        near.append(reading)
    return ModelNotFound(f"{_shown(text)}: {what}", _did_you_mean(near) or FORMS)


def _head_on_disk(text: str) -> str | None:
    """The path before `:` or `@` in `text`, when something is there."""
    head = re.split("[:@]", text)[0]
    return head if head and os.path.exists(_expanded(head)) else None


def cached_repo(folder_name: str) -> str | None:
    """models--org--name → org/name (the folders of the Hugging Face cache)."""
    kind, *words = folder_name.split("--")
    return "/".join(words) if kind == "models" and len(words) == 2 and all(words) else None


# ── names of the Hub ──


def _named(text: str) -> ModelRef:
    """The repository that `text` names. Raises LlmkitError saying what is wrong, without the text and a hint."""
    head, colon, quant = text.partition(":")
    repo, at, revision = head.partition("@")
    if "/" not in repo and not colon and not at and _WORD.fullmatch(repo):
        raise ModelNotFound("no folder or .gguf file of that name is here")
    if fault := _text_fault(text) or _repo_fault(repo) or (at and _revision_fault(revision)):
        raise LlmkitError(fault)
    if colon and (len(quant) > _LONGEST_QUANT or not _QUANT.fullmatch(quant)):
        what = f"'{_shown(quant)}' is no quant" if quant else "nothing follows ':'"
        raise LlmkitError(f"{what}, expected a label such as Q4_K_M")
    if not colon and not at and repo.lower().endswith(_CHECKPOINT_PARTS + _PICKLES):
        raise ModelNotFound("no such file, and a model is named by its folder or repository")
    return ModelRef(repo=repo, revision=revision if at else None, quant=quant.upper() if colon else None)


def _text_fault(text: str) -> str | None:
    """What shows at first sight that `text` is no name of the Hub, or None."""
    if _ADDRESS.match(text):
        return "is an address, expected a model's name"
    if "\\" in text:
        return "contains a backslash, which no name of the Hub does"
    if text.startswith(("datasets/", "spaces/")) and text.count("/") > 1:
        return f"is one of the Hub's {text.partition('/')[0]}, expected a model"
    return _MARKED if "/" not in text and _head_on_disk(text) else None


def _repo_fault(repo: str) -> str | None:
    """What the Hub's rules have against `repo`, or None."""
    if strange := sorted({char for char in repo if not re.match(r"[A-Za-z0-9_./-]", char)}):
        what = " ".join({" ": "a space"}.get(char, repr(char)) for char in strange[:5])
        return f"names hold letters, digits, '-', '_' and '.'; found {what}"
    words = repo.split("/")
    if len(words) == 1:
        return "names no organisation: llmkit reads names of the Hub (org/name), not those of Ollama"
    if len(words) > 2 and all(words):
        return f"has {len(words)} words between '/', expected the two of org/name"
    for word in words:
        if not word:
            return "a word before or after '/' is empty, expected org/name"
        if len(word) > _LONGEST_WORD:
            return f"a name has at most {_LONGEST_WORD} characters, '{word[:20]}…' has {len(word)}"
        if not _WORD.fullmatch(word):
            return f"'{word}' begins or ends with '-' or '.'"
    if bad := next((bad for bad in ("--", "..") if bad in repo), None):
        return f"no name of the Hub contains '{bad}'"
    return "no name of the Hub ends in .git" if repo.endswith(".git") else None


def _revision_fault(revision: str) -> str | None:
    """What is wrong with a branch's, tag's or commit's name (git check-ref-format), or None."""
    if not revision:
        return "nothing follows '@', expected a branch, tag or commit"
    words = revision.split("/")
    if (
        not revision.isprintable()
        or re.search(r"[ ~^?*\[\\]|\.\.|@\{", revision)
        or revision.startswith("-")
        or revision == "@"
        or any(not word or word[0] == "." or word.endswith((".", ".lock")) for word in words)
        or any(len(word.encode()) > 250 for word in words)  # each becomes a file or folder of the cache
    ):
        return f"'{_shown(revision)}' cannot be a branch, tag or commit"
    return None


# ── what was meant ──


def _advice(text: str) -> str:
    """The hint for text that is no name: its nearest reading, else near folders and files, else the grammar."""
    if reading := _reading(text):
        return _did_you_mean([reading])
    if (head := _head_on_disk(text)) and "/" not in text:
        return _did_you_mean([head])
    path = Path(text)
    if path.suffix.lower() in _CHECKPOINT_PARTS + _PICKLES:
        return f"Give the model's folder: '{path.parent}'." if "/" in text and os.path.isdir(path.parent) else FORMS
    near = _did_you_mean(nearest_on_disk(path))
    if len(text) <= _LONGEST_WORD and re.fullmatch(r"[\w.-]+( [\w.-]+)*(:[\w.-]*)?", text, re.ASCII):
        forms = f"Models of the Hub are named org/name: `llmkit search {text.partition(':')[0]}` finds them."
        return f"{near} {forms}".strip()
    return near or FORMS


def _did_you_mean(names: Iterable[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return f"Did you mean {' or '.join(quoted)}?" if quoted else ""


def _reading(text: str) -> str | None:
    """The repository that `text` most likely means: a pasted address, a file in it, words out of order; or None."""
    text = re.sub(r"\s*([/:@])\s*", r"\1", text.strip().strip("'\"").replace("\\", "/"))
    words = text.split()
    at = next((index for index, word in enumerate(words) if "/" in word), None)
    if at is None:
        repo = cached_repo(text)
        return repo if repo and _valid(repo) else None
    found = _located(words[at])
    if found is None:
        return None
    repo, revision, quant = found
    if quant is None and at + 1 < len(words):
        quant = quant_label(words[at + 1])
    candidate = repo + (f"@{revision}" if revision else "") + (f":{quant}" if quant else "")
    return _valid(candidate) or _valid(repo)


def _valid(text: str) -> str | None:
    """`text` as parse would write it, or None when it names no repository."""
    if text.lower().endswith(".gguf"):
        return None
    try:
        return str(_named(text))
    except LlmkitError:
        return None


def _located(address: str) -> tuple[str, str | None, str | None] | None:
    """Repository, revision and quant in an address, or in a path that begins like one."""
    from urllib.parse import parse_qs, unquote

    address = re.sub(rf"(?i)^(?:[a-z+]+://)?(?:[^/@]*@)?{_HOST}[/:]+|^hf:/*", "", address)
    if match := re.match(r"(?i)[a-z+]+://[^/]*/(?=.*/resolve/)", address):  # a mirror, told by its paths
        address = address[match.end() :]
    if "://" in address:
        return None
    address, _, query = address.partition("#")[0].partition("?")
    words = [word for word in unquote(address).split("/") if word]
    if words[:1] == ["api"]:
        del words[0]
    if words[:1] == ["models"] and len(words) > 2:
        del words[0]
    if words and (cached := cached_repo(words[0])):
        words[:1] = cached.split("/")
    if len(words) < 2 or words[0] in ("datasets", "spaces"):
        return None
    name, tail = re.match(r"([^@:]*)(.*)", words[1], re.DOTALL).groups()  # type: ignore[union-attr]
    marks = dict(reversed(re.findall(r"([@:])([^@:]+)", tail)))
    revision, rest = marks.get("@"), words[2:]
    if len(rest) > 1 and rest[0] in ("tree", "blob", "resolve", "raw", "commit", "commits"):
        length = 3 if rest[1] == "refs" else 1  # refs/pr/1
        revision, rest = "/".join(rest[1 : 1 + length]), rest[1 + length :]
    file = (parse_qs(query).get("show_file_info") or rest[-1:] or [""])[0]
    quant = marks.get(":") or quant_label(file)
    if quant and quant.lower().endswith(".gguf"):
        quant = quant_label(quant)
    repo = f"{words[0]}/{name.removesuffix('.git')}"
    return repo, None if revision == "main" else revision, quant


def _shown(text: object) -> str:
    """What the user gave, short enough for a message, and without the secrets of an address."""
    shown = re.sub(r"(?<=//)[^/@\s]*(?=@)|hf_[A-Za-z0-9]{30,}", "…", str(text))
    return shown if len(shown) <= 200 else f"{shown[:199]}…"
