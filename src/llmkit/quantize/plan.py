"""What will be written where: types, sizes and offsets of every output, known before the first byte."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from .. import __version__, store
from ..convert.draft import GgufDraft, stays_float32
from ..convert.tensors import LazyTensor
from ..errors import LlmkitError, OutputExists, Unsupported
from ..gguf import SPLIT_NAME, Value, ValueType
from ..gguf_writer import header_bytes, padded, tensor_nbytes
from ..quants import F16, F32, QUANTS, TENSOR_TYPES, TensorType
from . import imatrix as importance
from . import oracle
from .imatrix import Imatrix
from .recipe import Recipe

CONVERSIONS = ("auto", "bf16", "f16", "f32", "q8_0")


@dataclass(frozen=True)
class FilePlan:
    """One file of an output: its header's bytes and where each tensor begins. `nbytes` is its final size."""

    path: Path
    header: bytes
    offsets: dict[str, int]
    nbytes: int


@dataclass(frozen=True)
class OutputPlan:
    """One quant of a model: types per tensor and the file, or the parts, that it becomes."""

    label: str
    draft: GgufDraft
    types: dict[str, TensorType]
    files: tuple[FilePlan, ...]
    imatrix: Imatrix | None
    recipe: str

    @property
    def path(self) -> Path:
        """The file to load: the only one, or the first part."""
        return self.files[0].path

    @property
    def journal_path(self) -> Path:
        """Where a run records what it has finished: beside the first partial file."""
        return self.path.with_name(self.path.name + ".journal")

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def bits_per_weight(self) -> Fraction:
        """Bits of tensor data per weight, as llama-quantize counts."""
        bits = sum(8 * tensor_nbytes(t.shape, self.types[t.name]) for t in self.draft.tensors)
        return Fraction(bits, max(1, self.draft.n_weights))

    @property
    def mix(self) -> dict[str, int]:
        """Tensors of each type, the most frequent first."""
        return dict(Counter(kind.name for kind in self.types.values()).most_common())

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the work: the source and every byte of the headers, which name recipe and importance values."""
        digest = hashlib.sha256(self.draft.fingerprint.encode())
        for file in self.files:
            digest.update(file.path.name.encode() + file.header)
        return digest.hexdigest()


@dataclass(frozen=True)
class Plan:
    """The outputs to be made from one read of a draft."""

    draft: GgufDraft
    outputs: tuple[OutputPlan, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to be written in all."""
        return sum(output.nbytes for output in self.outputs)


def plan(
    draft: GgufDraft,
    recipes: Sequence[Recipe],
    folder: Path,
    *,
    imatrix: Imatrix | None = None,
    file: Path | None = None,
    split_nbytes: int | None = None,
    requantize: bool = False,
) -> Plan:
    """Types from the engine, then headers and offsets, for each recipe.

    Files are {name}-{quant}.gguf in `folder`, or `file`.

    Raises Unsupported (quantized source without `requantize`), LlmkitError (importance matrix needed), EngineError.
    """
    _refuse_quantized(draft, recipes, requantize)
    _refuse_idle_patterns(draft, recipes)
    choices = oracle.ask(draft, recipes, has_imatrix=imatrix is not None)
    outputs = []
    for recipe, choice in zip(recipes, choices, strict=True):
        if imatrix is None and choice.needs_imatrix and not recipe.tensor_types:
            raise LlmkitError(
                f"{recipe.quant.name} needs an importance matrix for this model: without one it would be useless",
                importance.HOW_TO_GET_ONE,
            )
        importance.require(imatrix, draft.tensors, choice.types)
        changed = recipe.quant.default is not None and any(kind.quantized for kind in choice.types.values())
        used = imatrix if changed else None
        origin = provenance(draft, str(recipe), used)
        base = file or folder / f"{draft.name}-{recipe.quant.name}.gguf"
        metadata = _quantized_metadata(draft, recipe, used)
        files = _lay_out(base, metadata, origin, draft.tensors, choice.types, split_nbytes)
        outputs.append(OutputPlan(recipe.quant.name, draft, choice.types, files, used, str(recipe)))
    if twice := [path for path, count in Counter(output.path for output in outputs).items() if count > 1]:
        raise LlmkitError(f"{twice[0].name} would be written twice", "Name each quant once.")
    return Plan(draft, tuple(outputs))


def conversion(
    draft: GgufDraft, kind: str, path: Path | None, folder: Path, *, split_nbytes: int | None = None
) -> Plan:
    """The plain file in `kind` (one of CONVERSIONS); "auto" keeps the type of the checkpoint's first matrix.

    Types as llama.cpp's converter gives them (conversion/base.py prepare_tensors): vectors and norms F32, matrices
    `kind`, F16 where its blocks do not fit.
    """
    if kind not in CONVERSIONS:
        raise Unsupported(f"unknown type '{kind}'", f"Known: {', '.join(CONVERSIONS)}.")
    wanted = TENSOR_TYPES[kind.upper()] if kind != "auto" else draft.own_type
    types = {tensor.name: _conversion_type(tensor, wanted) for tensor in draft.tensors}
    metadata = dict(draft.metadata)
    metadata["general.file_type"] = Value.uint32(QUANTS[wanted.name].ftype)
    base = path or folder / f"{draft.name}-{wanted.name}.gguf"
    files = _lay_out(
        base, metadata, provenance(draft, f"--type {wanted.name.lower()}"), draft.tensors, types, split_nbytes
    )
    return Plan(draft, (OutputPlan(wanted.name, draft, types, files, None, f"--type {wanted.name.lower()}"),))


def _conversion_type(tensor: LazyTensor, wanted: TensorType) -> TensorType:
    if stays_float32(tensor.name, tensor.shape):
        return F32
    return wanted if tensor.width % wanted.block == 0 else F16


def _refuse_quantized(draft: GgufDraft, recipes: Sequence[Recipe], requantize: bool) -> None:
    quantized = next((tensor for tensor in draft.tensors if tensor.type.quantized), None)
    changes = any(recipe.quant.default is not None for recipe in recipes)
    if quantized and changes and not requantize:
        raise Unsupported(
            f"{draft.paths[0]}: is quantized already ('{quantized.name}' is {quantized.type.name})",
            "Quantize the original for the best result, or add --requantize to accept a second loss.",
        )


def _refuse_idle_patterns(draft: GgufDraft, recipes: Sequence[Recipe]) -> None:
    for pattern in dict.fromkeys(pattern for recipe in recipes for pattern, _ in recipe.tensor_types):
        if not any(re.search(pattern, tensor.name) for tensor in draft.tensors):
            some = ", ".join(tensor.name for tensor in draft.tensors[:4])
            raise LlmkitError(f"--tensor-type: no tensor's name matches '{pattern}'", f"Names are like {some}.")


def provenance(draft: GgufDraft, recipe: str, imatrix: Imatrix | None = None) -> dict[str, Value]:
    """Where the file comes from and how it was made, so that it can be made again byte for byte."""
    values = {"llmkit.imatrix.fingerprint": Value.string(imatrix.fingerprint)} if imatrix else {}
    values |= {"llmkit.version": Value.string(__version__), "llmkit.source.name": Value.string(draft.name)}
    if draft.origin:
        values["llmkit.source.repo"] = Value.string(draft.origin.repo)
        values["llmkit.source.revision"] = Value.string(draft.origin.commit)
    return {
        **values,
        "llmkit.source.fingerprint": Value.string(draft.fingerprint),
        "llmkit.recipe": Value.string(recipe),
    }


def _quantized_metadata(draft: GgufDraft, recipe: Recipe, imatrix: Imatrix | None) -> dict[str, Value]:
    """As llama-quantize leaves it: version and file type moved to the end, then the importance matrix, then ours."""
    found = dict(draft.metadata)
    source_type = found.pop("general.file_type", Value.uint32(0))
    found.pop("general.quantization_version", None)
    found["general.quantization_version"] = Value.uint32(2)
    found["general.file_type"] = source_type if recipe.quant.default is None else Value.uint32(recipe.quant.ftype)
    if imatrix:
        found |= imatrix.metadata()
    return {key: value for key, value in found.items() if not key.startswith("llmkit.")}


def _lay_out(
    base: Path,
    metadata: Mapping[str, Value],
    origin: Mapping[str, Value],
    tensors: Sequence[LazyTensor],
    types: Mapping[str, TensorType],
    split_nbytes: int | None,
) -> tuple[FilePlan, ...]:
    """One file, or parts: `metadata` in the first, `origin` in each one, so that parts of other work are told apart."""
    whole = _file(base, {**metadata, **origin}, tensors, types)
    groups = _split(tensors, types, split_nbytes, len(whole.header))
    if len(groups) == 1:
        return (whole,)
    files = []
    for number, group in enumerate(groups):
        stem = match["stem"] if (match := SPLIT_NAME.match(base.name)) else base.stem
        path = base.with_name(f"{stem}-{number + 1:05d}-of-{len(groups):05d}.gguf")
        split = {
            "split.no": Value(ValueType.UINT16, number),
            "split.count": Value(ValueType.UINT16, len(groups)),
            "split.tensors.count": Value.int32(len(tensors)),
        }
        first = metadata if number == 0 else {}
        files.append(_file(path, {**first, **origin, **split}, group, types))
    return tuple(files)


def _split(
    tensors: Sequence[LazyTensor], types: Mapping[str, TensorType], limit: int | None, header: int
) -> list[Sequence[LazyTensor]]:
    """Tensors in groups of at most `limit` bytes, `header` counted in the first; one that is larger stands alone."""
    if limit is None:
        return [tensors]
    groups: list[list[LazyTensor]] = [[]]
    filled = header
    for tensor in tensors:
        nbytes = padded(tensor_nbytes(tensor.shape, types[tensor.name]))
        if groups[-1] and filled + nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += nbytes
    return list(groups)


def _file(
    path: Path, metadata: Mapping[str, Value], tensors: Sequence[LazyTensor], types: Mapping[str, TensorType]
) -> FilePlan:
    rows = [(tensor.name, tensor.shape, types[tensor.name]) for tensor in tensors]
    header, offsets = header_bytes(metadata, rows)
    places = {name: len(header) + offset for (name, _, _), offset in zip(rows, offsets, strict=True)}
    end = len(header) + sum(padded(tensor_nbytes(shape, kind)) for _, shape, kind in rows)
    return FilePlan(path, header, places, end)


def is_made(file: FilePlan) -> bool:
    """Whether the file is there already, made from this source by this recipe: same header, same size."""
    try:
        with open(file.path, "rb") as existing:
            return file.path.stat().st_size == file.nbytes and existing.read(len(file.header)) == file.header
    except OSError:
        return False


def check_outputs(planned: Plan, *, force: bool) -> Plan:
    """The plan without what is made already, by a file no older than a source that is known only by samples.

    Raises OutputExists, NotEnoughRoom, AccessDenied, LlmkitError: before any work.
    """
    left = []
    try:
        changed = max((path.stat().st_mtime for path in planned.draft.sampled), default=0.0)
        for folder in {output.path.parent for output in planned.outputs}:
            store.make_folder(folder)
        for output in planned.outputs:
            if not force and all(_is_current(file, changed) for file in output.files):
                _remove_leftovers(output)
            else:
                left.append(output)
        for file in (file for output in left for file in output.files):
            if not (force or _is_current(file, changed)):
                _refuse_existing(file)
            if file.path.exists() and any(file.path.samefile(source) for source in planned.draft.paths):
                raise OutputExists(f"{file.path}: is the file being read", "Choose another folder with --out.")
    except OSError as error:
        raise LlmkitError(f"{str(error.filename)[:200]}: {error.strerror}", "Choose another --out.") from error
    for folder in {output.path.parent for output in left}:
        here = [file for output in left for file in output.files if file.path.parent == folder]
        store.require_room(folder, sum(file.nbytes - allocated_nbytes(store.partial_path(file.path)) for file in here))
    return Plan(planned.draft, tuple(left))


def _remove_leftovers(output: OutputPlan) -> None:
    """What a run that was killed at its last step, or a replacement that was broken off, left beside whole files."""
    for path in (output.journal_path, *(store.partial_path(file.path) for file in output.files)):
        path.unlink(missing_ok=True)


def _is_current(file: FilePlan, changed: float) -> bool:
    """Whether the file is made and not older than the source, last `changed` then."""
    return is_made(file) and file.path.stat().st_mtime >= changed


def _refuse_existing(file: FilePlan) -> None:
    if file.path.is_dir():
        raise OutputExists(f"{file.path}: is a folder", "Choose another name with --out.")
    if file.path.exists():
        what = "was made from an earlier state of this source" if is_made(file) else "exists and is something else"
        raise OutputExists(f"{file.path}: {what}", "Add --force to replace it, or choose another --out.")


def allocated_nbytes(path: Path) -> int:
    """Bytes a file takes on the disk already: fewer than its size where it has holes, 0 where it is not."""
    try:
        return path.stat().st_blocks * 512
    except (OSError, AttributeError):
        return 0


def describe(output: OutputPlan) -> dict[str, object]:
    """The plan of one output as plain data, for --dry-run --json."""
    return {
        "quant": output.label,
        "path": str(output.path),
        "paths": [str(file.path) for file in output.files],
        "nbytes": output.nbytes,
        "bits_per_weight": float(output.bits_per_weight),
        "mix": output.mix,
        "types": {name: kind.name for name, kind in output.types.items()},
        "recipe": output.recipe,
    }
