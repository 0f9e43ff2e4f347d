"""A GGUF that is not written yet: its metadata, and its tensors as lazy rows in the order of the file.

Made from a checkpoint (renamed, rearranged) or from a GGUF file. Which type each tensor gets is decided later.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint import Checkpoint, Origin, StoredTensor, origin_of
from ..errors import InvalidModel, Unsupported
from ..gguf import SPLIT_NAME, GgufFile, Value
from ..quants import F32, QUANTS, TensorType
from . import architectures, metadata, tensors, vocab
from .architectures import Architecture, Row
from .config import Config
from .tensors import LazyTensor
from .vocab import Vocabulary

_BLOCK = re.compile(r"blk\.(\d+)\.")
# left behind by bitsandbytes, old transformers and torch; they hold nothing a model needs (llama.cpp skips them too)
_LEFTOVERS = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq", ".SCB", ".weight_format")
_QUANT_SUFFIX = re.compile(rf"[-._](?:{'|'.join(QUANTS.keys() - {'COPY'})})$", re.IGNORECASE)
_TEXTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_SAMPLE = 4096


@dataclass(frozen=True)
class GgufDraft:
    """What a GGUF will hold. `notes` are remarks for people; `paths` the files that are read.

    `fingerprint` identifies the source: sha256 over its headers and the content hashes of its files. Files whose hash
    is not known are in it with samples of their weights, not every byte; `sampled` names them.
    """

    name: str
    metadata: dict[str, Value]
    tensors: tuple[LazyTensor, ...]
    paths: tuple[Path, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()
    sampled: tuple[Path, ...] = ()
    origin: Origin | None = None

    @property
    def own_type(self) -> TensorType:
        """The type most matrices have: that of the first one."""
        return next((tensor.type for tensor in self.tensors if len(tensor.shape) > 1), F32)

    @property
    def n_weights(self) -> int:
        """Weights in all tensors."""
        return sum(tensor.n_weights for tensor in self.tensors)


def file_order(name: str) -> tuple[int, bytes]:
    """Sort key of llama-quantize: tensors outside blocks first, then by block, then by name (llama-quant.cpp)."""
    block = _BLOCK.match(name)
    return (int(block[1]) if block else -1, name.encode())


def stays_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is F32 in every GGUF: vectors, norms, what is no weight (llama.cpp conversion/base.py)."""
    return len(shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight")


def from_checkpoint(checkpoint: Checkpoint, *, pre: str | None = None, tokenizer: bool = True) -> GgufDraft:
    """The GGUF a checkpoint becomes. `pre` overrides the detected pre-tokenizer.

    Without `tokenizer` its files are not looked at: a draft to be measured, not written. Raises Unsupported
    (architecture, setting, dtype, tensor nobody maps, pre-tokenizer), InvalidModel (inconsistent).
    """
    architecture = architectures.find(checkpoint)
    config = architectures.open_config(checkpoint, architecture)
    if checkpoint.config.get("quantization_config"):
        raise Unsupported(
            f"{config.path}: 'quantization_config' says the weights are quantized already",
            "Use the original checkpoint in BF16 or F16.",
        )
    notes = architecture.check(config)
    vocabulary = _vocabulary(checkpoint, architecture, config, pre) if tokenizer else vocab.NONE
    n_tokens = vocabulary.n_real_tokens if architecture.trims_embedding and tokenizer else None
    rows, left_out = _map(checkpoint, architecture, config, n_tokens)
    ordered = tuple(sorted((*rows, *architecture.extra(config)), key=lambda tensor: file_order(tensor.name)))
    name = model_name(checkpoint.folder, checkpoint.origin)
    found = {
        **metadata.general(
            checkpoint,
            architecture.name,
            name=name,
            n_weights=sum(tensor.n_weights for tensor in ordered),
        ),
        **architecture.metadata(config),
        "general.quantization_version": Value.uint32(2),
        **vocabulary.metadata,
    }
    spans = [(t.name, t.dtype, t.shape, t.path, t.offset, t.nbytes) for t in checkpoint.tensors.values()]
    hashes = _hashes(checkpoint.paths, checkpoint.origin)
    draft = GgufDraft(
        name, found, ordered, checkpoint.paths, _fingerprint(spans, _texts(checkpoint), hashes),
        notes=(*notes, *left_out, *vocabulary.warnings),
        sampled=_unhashed(checkpoint.paths, hashes),
        origin=checkpoint.origin,
    )  # fmt: skip
    found["general.file_type"] = Value.uint32(QUANTS[draft.own_type.name].ftype)
    return draft


def _vocabulary(checkpoint: Checkpoint, architecture: Architecture, config: Config, pre: str | None) -> Vocabulary:
    return vocab.read(
        checkpoint.folder, config=config.values, pre=pre,
        spm_add_space_prefix=architecture.add_space_prefix, pad=not architecture.trims_embedding,
    )  # fmt: skip


def from_gguf(file: GgufFile) -> GgufDraft:
    """The same GGUF again, ready to be written with other types."""
    spans = [
        (info.name, info.type.name, info.shape, info.path, info.offset, info.nbytes) for info in file.tensors.values()
    ]
    lazy = [tensors.from_info(info) for info in file.tensors.values()]
    architecture = file.metadata.get("general.architecture")
    if architecture is None or not isinstance(architecture.data, str):
        raise InvalidModel(f"{file.path}: has no general.architecture, so it is no model")
    # the parts and the alignment are those of the source; what we write has its own
    kept = {
        key: value
        for key, value in file.metadata.items()
        if not key.startswith("split.") and key != "general.alignment"
    }
    ordered = tuple(sorted(lazy, key=lambda tensor: file_order(tensor.name)))
    stem = match["stem"] if (match := SPLIT_NAME.match(file.path.name)) else file.path.stem
    origin = origin_of(file.path.parent)
    hashes = _hashes(file.paths, origin)
    return GgufDraft(
        _QUANT_SUFFIX.sub("", stem), kept, ordered, file.paths, _fingerprint(spans, [], hashes),
        sampled=_unhashed(file.paths, hashes), origin=origin,
    )  # fmt: skip


def model_name(folder: Path, origin: Origin | None) -> str:
    """The folder's name; in the Hugging Face cache the repository's."""
    return origin.repo.rpartition("/")[2] if origin else folder.resolve().name


def _texts(checkpoint: Checkpoint) -> list[Path]:
    """The small files that decide what is written."""
    return [path for path in (checkpoint.folder / name for name in _TEXTS) if path.is_file()]


def _hashes(paths: Iterable[Path], origin: Origin | None) -> dict[Path, str]:
    """The content hashes that are known."""
    known = origin.hashes if origin else {}
    return {path: known[path.name] for path in paths if path.name in known}


def _unhashed(paths: Iterable[Path], hashes: Mapping[Path, str]) -> tuple[Path, ...]:
    return tuple(path for path in paths if path not in hashes)


def _fingerprint(
    spans: Iterable[tuple[str, str, tuple[int, ...], Path, int, int]],
    texts: Iterable[Path],
    hashes: Mapping[Path, str],
) -> str:
    digest = hashlib.sha256()
    for name, kind, shape, path, offset, nbytes in spans:
        digest.update(f"{name} {kind} {shape} {path.name} {offset} {nbytes}\n".encode("utf-8", "surrogatepass"))
        if path in hashes:  # every byte is told by it, and a file that is not here yet cannot be sampled
            digest.update(hashes[path].encode())
            continue
        for start in {0, max(0, nbytes // 2), max(0, nbytes - _SAMPLE)}:
            digest.update(tensors.read_span(path, offset + start, min(_SAMPLE, nbytes - start)).tobytes())
    for path in texts:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _map(
    checkpoint: Checkpoint, architecture: Architecture, config: Config, n_tokens: int | None
) -> tuple[list[LazyTensor], list[str]]:
    """The checkpoint's tensors under their GGUF names; every one is mapped or refused by name."""
    rows = {
        row.source.format(block): (row, row.target.format(block))
        for row in architecture.rows
        for block in (range(config.n_layer) if "{}" in row.source else (0,))
    }
    mapped: list[LazyTensor] = []
    notes: list[str] = []
    seen: set[str] = set()
    skipped = 0
    for stored in checkpoint.tensors.values():
        if stored.name.endswith(_LEFTOVERS) or stored.name.startswith(architecture.skipped or ("\0",)):
            skipped += 1
            continue
        name = _without_prefix(stored.name, architecture.prefixes)
        if name not in rows:
            raise Unsupported(
                f"{stored.path}: nobody maps tensor '{stored.name}' for {architecture.name}", _nearest_row(name, rows)
            )
        if name in seen:
            raise InvalidModel(f"{stored.path}: tensor '{stored.name}' maps to the same name as another")
        seen.add(name)
        if name == "lm_head.weight" and config.tied:
            notes.append("lm_head.weight is left out: config.json says the output is tied to the embedding")
            continue
        row, target = rows[name]
        mapped.append(_convert(stored, row, target, config, n_tokens))
    _require_all(checkpoint, rows, seen, config)
    if skipped:
        notes.append(f"{skipped} tensors that are no part of the text model are left out")
    return mapped, notes


def _without_prefix(name: str, prefixes: tuple[str, ...]) -> str:
    """`name` as text-only checkpoints have it: multimodal ones put a prefix before, or inside, 'model.'."""
    for prefix in prefixes:
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            return rest if rest.startswith(("model.", "lm_head.")) else f"model.{rest}"
    return name


def _nearest_row(name: str, rows: dict[str, tuple[Row, str]]) -> str:
    near = difflib.get_close_matches(name, rows, 1, 0.0)
    pattern = rows[near[0]][0].source if near else "none"
    return f"The nearest pattern is '{pattern}'. A merged adapter or another model class leaves such tensors behind."


def _convert(stored: StoredTensor, row: Row, target: str, config: Config, n_tokens: int | None) -> LazyTensor:
    sizes = config.sizes
    expected = tuple(sizes[size] for size in row.shape)
    if stored.shape != expected:
        raise InvalidModel(
            f"{stored.path}: tensor '{stored.name}' has the shape {list(stored.shape)},"
            f" config.json says {list(expected)}"
        )
    lazy = tensors.from_stored(stored)
    if row.operation:
        lazy = row.operation(lazy, config)
    if n_tokens is not None and row.shape[0] == "vocab":
        lazy = tensors.first_rows(lazy, n_tokens)
    lazy = replace(lazy, name=target)
    return tensors.as_float32(lazy) if stays_float32(target, lazy.shape) else lazy


def _require_all(checkpoint: Checkpoint, rows: dict[str, tuple[Row, str]], seen: set[str], config: Config) -> None:
    missing = [name for name, (row, _) in rows.items() if name not in seen and not row.optional]
    if "lm_head.weight" not in seen and not config.tied:
        missing.append("lm_head.weight (tie_word_embeddings is false)")
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidModel(f"{checkpoint.folder}: tensor '{missing[0]}'{more} is missing from the checkpoint")
