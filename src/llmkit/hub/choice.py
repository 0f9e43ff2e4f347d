"""Which files of a repository are needed: those of a checkpoint, or one GGUF with all its parts.

Rows below say what belongs to a checkpoint. Weights in pickle (.bin, .pt) run code when they are opened: never taken.
Knows names and sizes only; the one thing read is the index of the shards, by a function given.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ..errors import InvalidModel, LlmkitError, ModelNotFound, Unsupported, nearest
from ..model import SPLIT_NAME, quant_label
from .repository import RemoteFile, Repository

ReadFile = Callable[[RemoteFile], bytes]

INDEX = "model.safetensors.index.json"
_PICKLED = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle)$", re.IGNORECASE)
# of a checkpoint: configuration, tokenizer, templates, card, licence; sentence-transformers' modules and their weights
_TEXTS = re.compile(
    r"""(?!.*\.(bin|msgpack|h5)\.index\.json$)
    ( [^/]+\.(json|jinja|tiktoken) | tokenizer\.model | spiece\.model | sentencepiece\.bpe\.model | merges\.txt
    | vocab\.txt | README\.md | (LICEN[CS]E|NOTICE|USE_POLICY)[^/]* | additional_chat_templates/[^/]+\.jinja
    | \d+_\w+/(config\.json|model\.safetensors) )$""",
    re.VERBOSE,
)
_FOR_PEOPLE = re.compile(r"(README\.md|(LICEN[CS]E|NOTICE|USE_POLICY)[^/]*)$")


@dataclass(frozen=True)
class Choice:
    """What to fetch. `to_make` is the quant that was asked for and has to be made of the checkpoint.

    `first` is the file to open of a GGUF; `left_out` counts the files not taken, by reason.
    """

    kind: str  # "checkpoint", "gguf", or "files" when they were named by hand
    files: tuple[RemoteFile, ...]
    first: RemoteFile | None = None
    to_make: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def needed(self) -> tuple[RemoteFile, ...]:
        """The files without which nothing goes: card and licence are for people, unless they were named by hand."""
        return tuple(file for file in self.files if self.kind == "files" or not _FOR_PEOPLE.match(file.path))


def choose(
    repository: Repository,
    *,
    quant: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    read: ReadFile | None = None,
) -> Choice:
    """The files needed of `repository`; `read` fetches the shards' index, so that a missing shard is noticed now.

    `include` (globs over paths) replaces the choice, `exclude` takes from it. Raises ModelNotFound (nothing of that
    kind), InvalidModel (a shard or part is missing), Unsupported (pickled weights only).
    """
    taken = _choose(repository, quant, include, exclude, read)
    kept = tuple(file for file in taken.files if not _matches(file.path, exclude))
    if not kept:
        raise ModelNotFound(f"{repository.name}: --exclude leaves nothing to fetch")
    reasons = Counter(_reason(file, taken, exclude) for file in repository.files if file not in kept)
    return Choice(taken.kind, kept, taken.first if taken.first in kept else None, taken.to_make, dict(reasons))


def _choose(
    repository: Repository,
    quant: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    read: ReadFile | None,
) -> Choice:
    if include:
        return Choice("files", _included(repository, include, exclude))
    shards = _safetensors(repository, read)
    models = ggufs(repository)
    if quant and (found := _of_quant(repository, models, quant, to_make=bool(shards))):
        return Choice("gguf", found, found[0])
    if shards:
        texts = tuple(file for file in repository.files if _TEXTS.match(file.path) and file not in shards)
        return Choice("checkpoint", texts + shards, to_make=quant)
    if models:
        only = _only(repository, models)
        return Choice("gguf", only, only[0])
    raise _no_weights(repository)


def _matches(path: str, globs: Sequence[str]) -> bool:
    return any(path == glob or fnmatchcase(path, glob) or fnmatchcase(path, f"{glob.rstrip('/')}/*") for glob in globs)


def _included(repository: Repository, include: Sequence[str], exclude: Sequence[str]) -> tuple[RemoteFile, ...]:
    found = tuple(file for file in repository.files if _matches(file.path, include))
    if not found:
        names = ", ".join(file.path for file in repository.files[:5])
        raise ModelNotFound(f"{repository.name}: no file matches {' '.join(include)}", f"It holds {names} …")
    if pickled := [file for file in found if _PICKLED.search(file.path) and not _matches(file.path, exclude)]:
        raise Unsupported(
            f"{repository.name}: {pickled[0].path} is pickled: opening it can run code, so it is not fetched",
            "Take the safetensors, or leave it out with --exclude.",
        )
    return found


def _safetensors(repository: Repository, read: ReadFile | None) -> tuple[RemoteFile, ...]:
    """The shards of the model at the top of the repository, or nothing."""
    here = {file.path: file for file in repository.files if "/" not in file.path and file.path.endswith(".safetensors")}
    index = next((file for file in repository.files if file.path == INDEX), None)
    if index is not None and read is not None:
        names = _indexed(repository, read(index))
        if missing := [name for name in names if name not in here]:
            raise InvalidModel(
                f"{repository.name}: {INDEX} names {len(missing)} shard(s) that the repository does not hold: "
                + ", ".join(missing[:3]),
                "The upload is incomplete: nothing was fetched. Try another revision.",
            )
        return tuple(here[name] for name in names)
    if "model.safetensors" in here:
        return (here["model.safetensors"],)
    sharded = tuple(file for path, file in here.items() if re.match(r"model-\d{5}-of-\d{5}\.safetensors$", path))
    if sharded and index is None:
        raise InvalidModel(
            f"{repository.name}: holds {len(sharded)} shards and no {INDEX}, so nobody knows whether they are all",
            "The upload is incomplete: nothing was fetched. Try another revision.",
        )
    return sharded or (tuple(here.values()) if len(here) == 1 else ())


def _indexed(repository: Repository, data: bytes) -> list[str]:
    try:
        names = sorted(set(json.loads(data)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidModel(f"{repository.name}: {INDEX} does not map tensors to files") from None
    if not names or not all(isinstance(name, str) and "/" not in name for name in names):
        raise InvalidModel(f"{repository.name}: {INDEX} names no files, or files in other folders")
    return names


def ggufs(repository: Repository) -> dict[str, tuple[RemoteFile, ...]]:
    """The GGUF models of a repository: path of the first part → all its parts in order. Companions are left out."""
    groups: dict[str, list[RemoteFile]] = {}
    for file in sorted(repository.files, key=lambda file: file.path):
        if not file.path.lower().endswith(".gguf") or _is_companion(file.name):
            continue
        match = SPLIT_NAME.match(file.path)
        groups.setdefault(f"{match['stem']} {match['count']}" if match else file.path, []).append(file)
    return {parts[0].path: tuple(parts) for parts in groups.values()}


def _is_companion(name: str) -> bool:
    """Whether a GGUF is no model: the eyes of one, or an importance matrix (not a quant made with one)."""
    name = name.lower()
    return "mmproj" in name or ("imatrix" in name and quant_label(name) in (None, "BF16", "F16", "F32"))


def _whole(repository: Repository, parts: tuple[RemoteFile, ...]) -> tuple[RemoteFile, ...]:
    """The parts, all there. Raises InvalidModel when one is missing."""
    if not (match := SPLIT_NAME.match(parts[0].path)):
        return parts
    wanted = [f"{match['stem']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]
    if missing := [name for name in wanted if name not in {part.path for part in parts}]:
        raise InvalidModel(f"{repository.name}: the part {missing[0]} is missing from the repository")
    return parts


def _of_quant(
    repository: Repository, models: dict[str, tuple[RemoteFile, ...]], quant: str, *, to_make: bool
) -> tuple[RemoteFile, ...] | None:
    """The one GGUF labelled `quant`; None when there is none but it can be made."""
    wanted = quant.removeprefix("I1-")  # one publisher's mark for "made with an importance matrix"
    found = [path for path in models if quant_label(path) == wanted]
    if len(found) == 1:
        return _whole(repository, models[found[0]])
    if found:
        raise LlmkitError(
            f"{repository.name}: {len(found)} files are {quant}: {', '.join(found[:4])}", "Choose one: --include FILE."
        )
    if to_make:
        return None
    if not models:
        raise _no_weights(repository)
    labels = sorted({quant_label(path) or path for path in models})
    near = nearest(quant, labels)
    hint = f"Nearest: {', '.join(near)}." if near else ""
    raise ModelNotFound(f"{repository.name}: has no {quant}. It has {_sizes(models)}", hint or None)


def _only(repository: Repository, models: dict[str, tuple[RemoteFile, ...]]) -> tuple[RemoteFile, ...]:
    if len(models) > 1:
        labels = [found for path in models if (found := quant_label(path))]
        label = "Q4_K_M" if "Q4_K_M" in labels else labels[0] if labels else None
        hint = f"Choose one, e.g. {repository.name}:{label}" if label else "Choose one: --include FILE."
        raise LlmkitError(f"{repository.name}: holds {len(models)} GGUF models: {_sizes(models)}", hint)
    return _whole(repository, next(iter(models.values())))


def _sizes(models: dict[str, tuple[RemoteFile, ...]]) -> str:
    rows = sorted((sum(part.nbytes for part in parts), quant_label(path) or path) for path, parts in models.items())
    return ", ".join(
        f"{label} ({nbytes / 1e9:.1f} GB)" if nbytes >= 1e9 else f"{label} ({nbytes / 1e6:.0f} MB)"
        for nbytes, label in rows
    )


def _no_weights(repository: Repository) -> LlmkitError:
    if pickled := [file for file in repository.files if _PICKLED.search(file.path)]:
        return Unsupported(
            f"{repository.name}: holds its weights only pickled ({pickled[0].path}), which can run code when opened",
            "Look for a safetensors version: another repository, or a revision such as refs/pr/1 of the Hub's bot.",
        )
    return ModelNotFound(f"{repository.name}: holds no safetensors and no GGUF, so it is no model llmkit reads")


def _reason(file: RemoteFile, taken: Choice, exclude: Sequence[str]) -> str:
    """Why a file is not taken, in words."""
    if _matches(file.path, exclude):
        return "excluded by --exclude"
    if taken.kind == "files":
        return "not named by --include"
    if _PICKLED.search(file.path):
        return "pickled weights (opening them can run code)"
    if taken.kind == "gguf" and file.path.lower().endswith(".gguf"):
        return "no models of their own" if _is_companion(file.name) else "other quants"
    if re.search(r"\.(safetensors|gguf|h5|msgpack|onnx|onnx_data|tflite|npz|mlmodel|xml)$", file.path):
        return "other formats of the weights"
    return "not needed to run the model"
