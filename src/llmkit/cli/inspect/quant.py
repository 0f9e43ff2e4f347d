"""Show how quantization packs weights: scales, codes, blocks in numbers, and what each type loses.

Without arguments the textbook's case; with MODEL and TENSOR one row of that tensor: absmax and zero-point on its
weights, a block of each --type taken apart bit by bit (from the file where it is stored so, else made now by the
engine), the error of all usual types on a sample of rows, and where the values lie before and after.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from .. import models, output
from ..quantize import count_argument

if TYPE_CHECKING:
    from ...convert.tensors import LazyTensor
    from ...inspection.blocks import Block, Floats
    from ...inspection.losses import Histogram, Loss, Sample
    from ...inspection.scaling import Scaled
    from ...quants import TensorType
    from ..models import Source

EXAMPLES = (
    "llmkit inspect quant",
    "llmkit inspect quant model.gguf blk.0.ffn_down.weight",
    "llmkit inspect quant model.gguf blk.0.ffn_down.weight --type Q4_K --row 7 --block 2",
    "llmkit inspect quant ./SmolLM2-135M-Instruct model.layers.0.mlp.up_proj.weight --type Q4_0,Q4_1 --json",
)
_USUAL_TENSORS = ("blk.0.ffn_down.weight", "blk.0.ffn_up.weight", "blk.0.attn_output.weight")


@dataclass(frozen=True)
class Shown:
    """All that is shown of a tensor; JSON is made of it. `relative_to` is what losses are measured against."""

    model: str
    tensor: str
    shape: tuple[int, ...]
    type: str
    row: int
    relative_to: str
    scalings: tuple[Scaled, ...]
    blocks: tuple[Block, ...]
    before: tuple[tuple[float, ...] | None, ...]
    rows_compared: int
    rows: int
    sampling: str
    weighted_by: str
    losses: tuple[Loss, ...]
    histogram_of: str | None
    histogram: Histogram | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, TENSOR, and what of it."""
    least_0 = {"type": lambda text: count_argument(text, least=0), "metavar": "N", "default": 0}
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{models.MODEL_HELP} (default: the textbook)")
    parser.add_argument(
        "tensor", nargs="?", metavar="TENSOR", help="its name in the file (default: a feed-forward one)"
    )
    parser.add_argument(
        "--type", action="append", default=[], metavar="TYPES", help="types to draw a block of, with commas: Q4_0,Q4_K"
    )
    parser.add_argument("--row", **least_0, help="row of the tensor (default 0)")  # type: ignore[arg-type]
    parser.add_argument("--block", **least_0, help="block of the row (default 0)")  # type: ignore[arg-type]
    parser.add_argument("--weight", **least_0, help="weight of the block that is worked out (default 0)")  # type: ignore[arg-type]
    parser.add_argument("--rows", type=count_argument, metavar="N", help="rows to compare types on (default: a sample)")
    parser.add_argument(
        "--imatrix", type=Path, metavar="FILE", help="importance matrix: quantize and weigh errors by it"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """The textbook, or a tensor of a model."""
    from . import quant_views

    if args.model is None:
        from ... import store
        from ...inspection import scaling

        cases = [make(scaling.TEXTBOOK, bits) for make in (scaling.absmax, scaling.zero_point) for bits in (8, 4)]
        if args.json:
            output.emit_json({"textbook": cases})
        else:
            quant_views.show_textbook(cases)
            own = store.last_model()
            output.next_command(f"llmkit inspect quant {output.shell_word(own) if own else 'MODEL'}")
        return 0
    from ...inspection import losses

    with models.outline(args.model) as source:
        name, tensor = _tensor(source, args.tensor)
        shown = _look(args, source, name, tensor)
    if args.json:
        output.emit_json(shown)
        return 0
    quant_views.show(shown)
    drawn = {block.type for block in shown.blocks}
    others = [loss.type for loss in shown.losses if not loss.missing and loss.type in losses.COMPARED]
    if other := next((kind for kind in ("Q4_K", "Q6_K", *others) if kind in others and kind not in drawn), None):
        words = map(output.shell_word, (args.model, name))
        output.next_command(f"llmkit inspect quant {' '.join(words)} --type {other}")
    return 0


# ── the tensor ──


def _tensor(source: Source, name: str | None) -> tuple[str, LazyTensor]:
    """The tensor called `name`, as the file or the GGUF that would be made of it names it, or a usual one."""
    from ... import checkpoint, convert, gguf
    from ...convert import tensors
    from ...errors import LlmkitError, ModelNotFound, nearest_hint

    if not source.path.is_dir():
        stored = {key: info for key, info in gguf.read(source.path).tensors.items()}
        if name is None:
            name = _usual({key: info.shape for key, info in stored.items()}, source.name)
        if name in stored:
            return name, _matrix(tensors.from_info(stored[name]))
        raise ModelNotFound(f"{source.name}: has no tensor '{name}'", nearest_hint(name, stored))
    found = checkpoint.read(source.path)
    if name in found.tensors:
        return name, _matrix(tensors.from_stored(found.tensors[name]))
    try:
        draft = {tensor.name: tensor for tensor in convert.from_checkpoint(found, tokenizer=False).tensors}
    except LlmkitError:  # a family llmkit cannot convert can be looked at by its own names
        draft = {}
    if name is None:
        name = _usual({key: tensor.shape for key, tensor in (draft or found.tensors).items()}, source.name)
    if name in draft:
        return name, _matrix(draft[name])
    if name in found.tensors:
        return name, _matrix(tensors.from_stored(found.tensors[name]))
    raise ModelNotFound(f"{source.name}: has no tensor '{name}'", nearest_hint(name, [*found.tensors, *draft]))


def _usual(shapes: dict[str, tuple[int, ...]], where: str) -> str:
    from ...errors import InvalidModel

    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    if not matrices:
        raise InvalidModel(f"{where}: holds no matrix to be quantized")
    name = next((usual for usual in _USUAL_TENSORS if usual in matrices), matrices[-1])
    output.note(f"No tensor was named: {name} is shown.")
    return name


def _matrix(tensor: LazyTensor) -> LazyTensor:
    from ...errors import Unsupported

    if tensor.n_weights == 0 or tensor.width < 32:
        raise Unsupported(f"'{tensor.name}' has rows of {tensor.width} weights: too short for any block")
    if tensor.type.name.startswith(("I", "F64")) and not tensor.type.quantized:
        raise Unsupported(f"'{tensor.name}' is stored as {tensor.type.name}, no type of weights")
    return tensor


def _bring(source: Source, tensor: LazyTensor, first: int, count: int) -> None:
    """Where the weights are a shadow's, fetch these rows and nothing else."""
    from ...errors import Unsupported

    if source.shadow is None:
        return
    if tensor.span is None:
        raise Unsupported(
            f"'{tensor.name}' is rearranged on conversion, so its rows lie elsewhere in the repository",
            "Name it as the checkpoint does, or download the model first.",
        )
    path, offset = tensor.span
    size = tensor.type.row_nbytes(tensor.width)
    came = source.shadow.fill(path, offset + first * size, offset + (first + count) * size)
    if came:
        output.note(f"{output.size(came)} of weights came over the network")


# ── what is shown ──


def _look(args: argparse.Namespace, source: Source, name: str, tensor: LazyTensor) -> Shown:
    from ...errors import InvalidModel, LlmkitError
    from ...inspection import losses
    from ...quants import tensor_type

    if args.row >= tensor.n_rows:
        raise LlmkitError(f"--row {args.row}: '{name}' has the rows 0 to {tensor.n_rows - 1}")
    _bring(source, tensor, args.row, 1)
    row = tensor.float32(args.row, args.row + 1)
    if not isfinite(row.sum(dtype="float64")):
        raise InvalidModel(f"'{name}': row {args.row} holds NaN or infinities")
    importance = _importance(args.imatrix, tensor)
    wanted = [tensor_type(word) for text in args.type for word in text.split(",") if word.strip()]
    kinds = _fitting(wanted, tensor, importance is not None) if wanted else _drawn_types(tensor)
    sample, sampling = _sample(args, source, tensor, importance)
    blocks, before = _blocks(args, tensor, row, kinds, importance)
    rows_losses = losses.losses(sample, _compared_types(tensor.type, wanted))
    told, histogram = _histogram(sample, [block.type for block in blocks], tensor.type)
    stored = f"what the file holds ({tensor.type.name}): what was lost before cannot be seen"
    return Shown(
        model=source.name,
        tensor=name,
        shape=tensor.shape,
        type=tensor.type.name,
        row=args.row,
        relative_to=stored if tensor.type.quantized else f"the weights in {tensor.type.name}",
        scalings=_scalings(row[0]),
        blocks=tuple(blocks),
        before=tuple(before),
        rows_compared=len(sample.rows),
        rows=tensor.n_rows,
        sampling=sampling,
        weighted_by="the importance matrix" if importance is not None else "the weights' own squares",
        losses=tuple(rows_losses),
        histogram_of=told,
        histogram=histogram,
    )


def _fitting(wanted: list[TensorType], tensor: LazyTensor, importance: bool) -> list[TensorType]:
    """Those of the types that can be drawn here; tells of the others. Raises Unsupported when none can."""
    from ...errors import Unsupported
    from ...inspection import blocks, losses
    from ...quants import TENSOR_TYPES

    def why_not(kind: TensorType) -> str | None:
        if kind.name not in blocks.drawable():
            return "has no blocks: each weight is a number of its own (llmkit inspect numbers)"
        return None if kind is tensor.type else losses.misfit(kind, tensor.width, importance=importance)

    refused = [f"{kind.name}: {why}" for kind in wanted if (why := why_not(kind))]
    if len(refused) == len(wanted):
        fit = [kind.name for kind in TENSOR_TYPES.values() if why_not(kind) is None]
        raise Unsupported("; ".join(refused), f"These can be drawn: {', '.join(fit)}.")
    for text in refused:
        output.note(f"not drawn: {text}")
    return [kind for kind in wanted if why_not(kind) is None]


def _drawn_types(tensor: LazyTensor) -> list[TensorType]:
    """The file's own type when it has blocks; else the textbook's two, and a K-quant where the rows allow it."""
    from ...inspection.blocks import drawable
    from ...quants import TENSOR_TYPES

    if tensor.type.quantized:
        return [tensor.type] if tensor.type.name in drawable() else []
    names = ("Q4_0", "Q4_1", "Q4_K") if tensor.width % 256 == 0 else ("Q8_0", "Q4_0", "Q4_1")
    return [kind for kind in (TENSOR_TYPES[name] for name in names) if tensor.width % kind.block == 0]


def _compared_types(own: TensorType, wanted: list[TensorType]) -> list[TensorType]:
    from ...inspection.losses import COMPARED
    from ...quants import TENSOR_TYPES

    names = dict.fromkeys(([] if own.quantized else ["F16", "BF16"]) + list(COMPARED) + [kind.name for kind in wanted])
    kinds = [TENSOR_TYPES[name] for name in names if name != own.name]
    return sorted(kinds, key=lambda kind: -kind.bits_per_weight)


def _scalings(row: Floats) -> tuple[Scaled, ...]:
    from fractions import Fraction

    from ...inspection import scaling

    numbers = [Fraction(float(value)) for value in row[:32]]
    return tuple(make(numbers, bits) for make in (scaling.absmax, scaling.zero_point) for bits in (8, 4))


def _blocks(
    args: argparse.Namespace, tensor: LazyTensor, row: Floats, kinds: list[TensorType], importance: Floats | None
) -> tuple[list[Block], list[tuple[float, ...] | None]]:
    """A block of each type, and the weights it was made of (None for the file's own)."""
    from ...errors import LlmkitError
    from ...inspection import blocks, losses

    columns = None if importance is None else importance[args.row * len(importance) // tensor.n_rows][None]
    drawn: list[Block] = []
    before: list[tuple[float, ...] | None] = []
    for kind in kinds:
        own = kind is tensor.type
        packed = tensor.read(args.row, args.row + 1) if own else losses.quantized(losses.Sample(row, columns), kind)
        count = tensor.width // kind.block
        if args.block >= count:
            raise LlmkitError(f"--block {args.block}: a row has the blocks 0 to {count - 1} of {kind.name}")
        if args.weight >= kind.block:
            raise LlmkitError(f"--weight {args.weight}: a block of {kind.name} has the weights 0 to {kind.block - 1}")
        data = packed.reshape(-1)[args.block * kind.nbytes : (args.block + 1) * kind.nbytes]
        drawn.append(blocks.of(kind, data, shown=args.weight))
        first = args.block * kind.block
        before.append(None if own else tuple(float(value) for value in row[0, first : first + kind.block]))
    return drawn, before


def _sample(
    args: argparse.Namespace, source: Source, tensor: LazyTensor, importance: Floats | None
) -> tuple[Sample, str]:
    """Rows to compare types on, and how they were chosen."""
    import numpy as np

    from ...inspection import losses

    weights = losses.SAMPLED_WEIGHTS if args.rows is None else args.rows * tensor.width
    chosen = losses.sampled_rows(tensor.n_rows, tensor.width, weights)
    if source.shadow is not None:
        chosen = list(range(len(chosen)))  # one request
    _bring(source, tensor, 0, len(chosen))
    if len(chosen) == chosen[-1] + 1:
        rows = tensor.float32(0, len(chosen))
    else:
        rows = np.concatenate([tensor.float32(index, index + 1) for index in chosen])
    columns = None
    if importance is not None:
        columns = importance[np.array(chosen) * len(importance) // tensor.n_rows]
    if len(chosen) == tensor.n_rows:
        return losses.Sample(rows, columns), "all rows"
    how = "the first ones" if source.shadow is not None else "evenly spaced"
    return losses.Sample(rows, columns), f"{len(chosen):,} of {tensor.n_rows:,} rows, {how}"


def _importance(path: Path | None, tensor: LazyTensor) -> Floats | None:
    """Importance of (matrices, width), or None. Raises LlmkitError when the matrix has nothing for the tensor."""
    from ...errors import LlmkitError, nearest_hint
    from ...quantize import imatrix

    if path is None:
        return None
    matrix = imatrix.read(path)
    found = matrix.of(tensor)
    if found is None:
        raise LlmkitError(f"{path}: holds nothing for '{tensor.name}'", nearest_hint(tensor.name, matrix.entries))
    return found


def _histogram(sample: Sample, drawn: list[str], own: TensorType) -> tuple[str | None, Histogram | None]:
    """Of the last type drawn that is not the file's own, else of one of four bits."""
    from ...inspection import losses
    from ...quants import TENSOR_TYPES

    for name in (*reversed(drawn), "Q4_K", "Q4_0"):
        kind = TENSOR_TYPES[name]
        if kind is own or losses.misfit(kind, sample.rows.shape[1], importance=sample.importance is not None):
            continue
        after = losses.dequantized(losses.quantized(sample, kind), kind, sample.rows.shape[1])
        return name, losses.histogram(sample.rows, after)
    return None, None
