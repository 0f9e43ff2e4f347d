"""A receipt: an answer with everything it takes to have it again, as one value, as JSON, as one HTML page.

    receipt.of(chat)           of the answer at the head of the conversation, or of any node's
    kept.json(), kept.html()   the page holds the JSON, so both can be replayed (replay.py)
    receipt.from_text(text)    either, read back

What decides an answer: the file's bytes, the engine's build, the CPU's instructions (they choose the kernels), the
prompt's tokens, the samplers with their order and the seed. The `seal` is a digest, not a signature: it shows damage
and careless edits, whoever means to deceive can make another.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from .. import __version__, model
from ..backends import Backend
from ..chat import Answer, Chat, Message
from ..engine.probe import cpu_features
from ..errors import LlmkitError
from ..progress import OnProgress, ignore
from . import hashes, receipt_html
from .receipt_html import ELEMENT

FORM, VERSION = "llmkit receipt", 1
_DECIDING = re.compile(r"(avx|amx|fma$|f16c|bmi2|sse|sve|sme|asimd|neon|i8mm|bf16|fphp)", re.ASCII)
_NOT_ONE = "Expected JSON or a page that llmkit wrote with /receipt or /export."


@dataclass(frozen=True)
class ModelFile:
    """A file of weights: its sha256 was measured when the receipt was made, or `remembered` (see hashes.py)."""

    name: str
    nbytes: int
    sha256: str
    remembered: bool


@dataclass(frozen=True)
class Machine:
    """`system` and processor type; `features`: those of the CPU that choose kernels."""

    system: str
    features: tuple[str, ...]


@dataclass(frozen=True)
class Receipt:
    """An `answer` and its circumstances. `source` names the model on the Hub where it came from there.

    `context`: tokens the session held; `threads` of the CPU, where the backend says. `prompt` is the text the model
    read, by its tokens; `messages` led to the answer (some may have left the context), `system` where it is in there.
    """

    llmkit: str
    made: str
    model: str
    architecture: str
    source: str | None
    files: tuple[ModelFile, ...]
    engine: str
    machine: Machine
    context: int
    threads: int | None
    prompt: str
    system: str | None
    messages: tuple[Message, ...]
    answer: Answer

    def to_json(self) -> dict[str, Any]:
        """As dictionaries, lists, numbers and texts, with the seal over all of it."""
        facts: dict[str, Any] = {
            "form": FORM,
            "version": VERSION,
            "llmkit": self.llmkit,
            "made": self.made,
            "model": self.model,
            "architecture": self.architecture,
            "source": self.source,
            "files": [asdict(file) for file in self.files],
            "engine": self.engine,
            "machine": {"system": self.machine.system, "features": list(self.machine.features)},
            "context": self.context,
            "threads": self.threads,
            "prompt": self.prompt,
            "system": self.system,
            "messages": [{"role": each.role, "text": each.text} for each in self.messages],
            "answer": self.answer.to_json(),
        }
        return facts | {"seal": seal(facts)}

    def json(self) -> str:
        """The file's text."""
        return json.dumps(self.to_json(), ensure_ascii=True, indent=1) + "\n"

    def html(self) -> str:
        """One page that stands alone, with the JSON in it."""
        return receipt_html.page(self)


def seal(facts: Mapping[str, Any]) -> str:
    """sha256 of the facts in one canonical form of JSON."""
    plain = {key: value for key, value in facts.items() if key != "seal"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def of(chat: Chat, node: int | None = None, *, on_progress: OnProgress = ignore) -> Receipt:
    """The receipt of the answer at `node`, else of the last one. The model's files are hashed, once each.

    Raises LlmkitError when there is no such answer, or another model gave it.
    """
    answer = _answer(chat, node)
    info = chat.backend.info
    if answer.model != info.name or answer.engine != info.engine:
        what = f"answer {answer.node} was given by {answer.model} ({answer.engine})"
        raise LlmkitError(what, "A receipt can be made only while the model that gave it is loaded.")
    path = chat.tree.path(answer.node)[:-1]
    prompt = b"".join(map(chat.backend.piece, answer.prompt)).decode("utf-8", "replace")
    return Receipt(
        llmkit=__version__,
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=info.name,
        architecture=info.architecture,
        source=_source(chat.conversation.model),
        files=files(chat.backend, on_progress),
        engine=info.engine,
        machine=this_machine(),
        context=chat.total,
        threads=_threads(chat.backend),
        prompt=prompt,
        system=chat.system if chat.system and chat.system.strip() in prompt else None,
        messages=tuple(Message(each.role, each.text) for each in path),
        answer=answer,
    )


def _answer(chat: Chat, node: int | None) -> Answer:
    at = chat.tree.head if node is None else node
    if at is None:
        raise LlmkitError("there is no answer yet", "Ask something first.")
    if (found := chat.answers.get(at)) is None:
        chat.tree.node(at)
        raise LlmkitError(f"message {at} is no answer whose tokens are kept", "Give the number of an answer.")
    return found


def _source(text: str) -> str | None:
    """The Hub's name of a model; a path is the user's own business."""
    try:
        ref = model.parse(text)
    except LlmkitError:
        return None
    return str(ref) if ref.repo else None


def _threads(backend: Backend) -> int | None:
    count = getattr(backend, "n_threads", None)
    return count if isinstance(count, int) else None


def this_machine() -> Machine:
    """The machine at hand."""
    found = (word for word in cpu_features().split() if _DECIDING.match(word))
    return Machine(f"{platform.system()} {platform.machine()}", tuple(sorted(found)))


def weight_paths(backend: Backend) -> tuple[Path, ...]:
    """The files a backend's weights come from; empty for one without files."""
    if (file := getattr(backend, "file", None)) is not None:
        return tuple(file.paths)
    place = getattr(backend, "folder", None) or getattr(backend, "path", None)
    if not isinstance(place, Path):
        return ()
    return tuple(sorted(place.glob("*.safetensors"))) if place.is_dir() else (place,)


def files(backend: Backend, on_progress: OnProgress = ignore) -> tuple[ModelFile, ...]:
    """A backend's files with their hashes. Raises LlmkitError where one cannot be read any more."""
    paths = weight_paths(backend)
    found = hashes.of(paths, on_progress)
    return tuple(
        ModelFile(path.name, each.nbytes, each.sha256, each.remembered) for path, each in zip(paths, found, strict=True)
    )


# ── reading ──


def from_text(text: str) -> Receipt:
    """The receipt that is in JSON or in our page. Raises LlmkitError, saying what is wrong, for anything else."""
    return from_json(facts_in(text))


def facts_in(text: str) -> dict[str, Any]:
    """The JSON of a receipt's text, its form and version checked. Raises as `from_text`."""
    text = text.lstrip("\ufeff \r\n\t")
    inner = _embedded(text) if text.startswith("<") else text
    try:
        facts = json.loads(inner)
    except (ValueError, RecursionError) as error:
        raise LlmkitError(f"this is no receipt: {error}", _NOT_ONE) from None
    if not isinstance(facts, dict) or facts.get("form") != FORM:
        raise LlmkitError("this is no receipt of llmkit", _NOT_ONE)
    if facts.get("version") != VERSION:
        raise LlmkitError(f"the receipt has version {facts.get('version')}, this llmkit reads {VERSION}", "Update it.")
    return facts


def from_json(facts: Mapping[str, Any]) -> Receipt:
    """The receipt of its facts. Raises LlmkitError, naming what is missing or of another kind."""
    try:
        answer = Answer.from_json(facts["answer"])
        if answer.variation < 0:
            raise ValueError(f"variation {answer.variation}")
        return Receipt(
            llmkit=_text(facts["llmkit"]),
            made=_text(facts["made"]),
            model=_text(facts["model"]),
            architecture=_text(facts["architecture"]),
            source=None if facts["source"] is None else _text(facts["source"]),
            files=tuple(
                ModelFile(_text(each["name"]), int(each["nbytes"]), _text(each["sha256"]), bool(each["remembered"]))
                for each in facts["files"]
            ),
            engine=_text(facts["engine"]),
            machine=Machine(_text(facts["machine"]["system"]), tuple(map(_text, facts["machine"]["features"]))),
            context=int(facts["context"]),
            threads=None if facts["threads"] is None else int(facts["threads"]),
            prompt=_text(facts["prompt"]),
            system=None if facts["system"] is None else _text(facts["system"]),
            messages=tuple(Message(_text(each["role"]), _text(each["text"])) for each in facts["messages"]),
            answer=answer,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise LlmkitError(f"the receipt is damaged: {type(error).__name__}: {error}", _NOT_ONE) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _embedded(text: str) -> str:
    found = _Page()
    found.feed(text)
    found.close()
    if not found.inner:
        raise LlmkitError("the page holds no receipt", _NOT_ONE)
    return "".join(found.inner)


class _Page(HTMLParser):
    """Collects what our script element holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        """Our element begins."""
        self._inside = tag == "script" and ("id", ELEMENT) in attrs

    def handle_endtag(self, tag: str) -> None:
        """It ends."""
        self._inside = False

    def handle_data(self, data: str) -> None:
        """Its text."""
        if self._inside:
            self.inner.append(data)
