"""A checkpoint folder → a folder for MLX: every matrix rounded in groups, config.json told about it.

    plan(folder, out, bits=4)   what would be written, to the byte; nothing is computed
    mlx_writing.run(plan)       writes it

MLX's "affine" stores each weight as q, a number of `bits` bits, of scale · q + bias, with a scale and a bias for each
`group` of a row, both in the source's float type: bits + 32 / group bits a weight with 16-bit floats. The other modes
have fixed bits and groups, and scales of 8 bits (mlx.core.quantize). A row that groups do not divide stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checkpoint
from ..checkpoint import StoredTensor
from ..errors import Unsupported
from ..mlx_engine import arguments

if TYPE_CHECKING:
    from .mlx_writing import MlxResult

MODES = {"affine": None, "mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # → the only bits and group it has
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
TIED_BITS = 6  # of an embedding that is the output matrix too, as llama.cpp has it (Q6_K in Q4_K_M)
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Packing:
    """How a matrix is stored."""

    bits: int
    group: int
    mode: str = "affine"

    def described(self) -> dict[str, Any]:
        """In the words of config.json."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}


@dataclass(frozen=True)
class Recipe:
    """What is wanted. `embedding` is for the table of embeddings, None where it is like the rest. See `recipe`."""

    main: Packing
    embedding: Packing | None = None

    @property
    def label(self) -> str:
        """What goes into the folder's name: 4bit, 4bit-g32, mxfp4."""
        if self.main.mode != "affine":
            return self.main.mode
        return f"{self.main.bits}bit" + (f"-g{self.main.group}" if self.main.group != 64 else "")


def recipe(
    mode: str = "affine",
    bits: int | None = None,
    group: int | None = None,
    *,
    embedding_bits: int | None = None,
    tied: bool = False,
) -> Recipe:
    """The recipe for these wishes; `tied` embeddings get TIED_BITS unless told otherwise. Raises Unsupported."""
    if mode not in MODES:
        raise Unsupported(f"MLX mode '{mode}' is unknown", f"Known: {', '.join(MODES)}.")
    if (fixed := MODES[mode]) is not None:
        if (bits or fixed[0], group or fixed[1]) != fixed:
            raise Unsupported(f"{mode} has {fixed[0]} bits in groups of {fixed[1]}, and nothing else")
        main = Packing(*fixed, mode)
    else:
        main = Packing(_known(bits or 4, BITS, "bits"), _known(group or 64, GROUPS, "weights a group"))
    wanted = embedding_bits if embedding_bits is not None else TIED_BITS if tied and main.bits < TIED_BITS else None
    if wanted is None:
        return Recipe(main)
    embedding = Packing(_known(wanted, BITS, "bits for the embedding"), main.group if main.group in GROUPS else 32)
    return Recipe(main, embedding if embedding != main else None)


def _known(number: int, known: tuple[int, ...], what: str) -> int:
    if number not in known:
        raise Unsupported(f"{number} {what}: MLX has no such thing", f"One of {', '.join(map(str, known))}.")
    return number


@dataclass(frozen=True)
class Stored:
    """An array as it will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * checkpoint.DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class TensorPlan:
    """A tensor: `packing` None where it is copied. `why` says why a matrix is."""

    name: str
    source: StoredTensor
    packing: Packing | None
    why: str = ""

    @property
    def arrays(self) -> tuple[Stored, ...]:
        """What it becomes: itself, or packed words, scales and, in affine, biases."""
        if self.packing is None:
            return (Stored(self.name, self.source.dtype, self.source.shape),)
        path, (*rows, width) = self.name.removesuffix(".weight"), self.source.shape
        words = Stored(self.name, "U32", (*rows, width * self.packing.bits // 32))
        shape = (*rows, width // self.packing.group)
        if self.packing.mode != "affine":
            return words, Stored(f"{path}.scales", "U8", shape)
        scales, biases = (Stored(f"{path}.{kind}", self.source.dtype, shape) for kind in ("scales", "biases"))
        return words, scales, biases

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True)
class MlxPlan:
    """A folder to be written. `nbytes` of weights and `bits_per_weight` are exact: derived from the shapes."""

    source: Path
    path: Path
    recipe: Recipe
    config: Mapping[str, Any]
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def n_weights(self) -> int:
        """Weights of the model, vectors included."""
        return sum(prod(tensor.source.shape) for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> Fraction:
        """Over all weights, scales and biases included."""
        return Fraction(8 * self.nbytes, max(1, self.n_weights))

    @property
    def skipped(self) -> tuple[TensorPlan, ...]:
        """Matrices that stay as they are."""
        return tuple(tensor for tensor in self.tensors if tensor.why)

    @property
    def dividing_group(self) -> int | None:
        """The largest group that divides the rows of all matrices; None where there is none."""
        widths = [tensor.source.shape[-1] for tensor in self.tensors if tensor.why or tensor.packing]
        return next((group for group in reversed(GROUPS) if not any(width % group for width in widths)), None)


def plan(
    folder: Path,
    out: Path,
    *,
    mode: str = "affine",
    bits: int | None = None,
    group: int | None = None,
    embedding_bits: int | None = None,
) -> MlxPlan:
    """What quantizing the checkpoint in `folder` writes into a folder inside `out`.

    Raises ModelNotFound, InvalidModel, Unsupported (family, numbers, a source that is quantized already).
    """
    if folder.is_file():
        raise Unsupported(
            f"{folder}: is a file; MLX folders are made of checkpoint folders",
            "Give the original checkpoint. A GGUF runs on MLX as it is: llmkit chat FILE --backend mlx.",
        )
    found = checkpoint.read(folder)
    if "quantization" in found.config or "quantization_config" in found.config:
        raise Unsupported(f"{folder}: is quantized already", "Give the original checkpoint.")
    settings = arguments.of(found.config, folder)
    tied = bool(settings["tie_word_embeddings"])
    wanted = recipe(mode, bits, group, embedding_bits=embedding_bits, tied=tied)
    texts = arguments.text_tensors(found.tensors, tied=tied)
    tensors = tuple(_tensor(name, stored, wanted) for name, stored in sorted(texts.items()))
    notes = []
    if left := len(found.tensors) - len(tensors):
        notes.append(f"{left} tensors that are no part of the text model are left out")
    if wanted.embedding:
        why = "it is the output matrix too" if tied and embedding_bits is None else "as asked"
        notes.append(f"the embedding gets {wanted.embedding.bits} bits: {why}")
    path = out / f"{_name(found)}-MLX-{wanted.label}"
    return MlxPlan(folder, path, wanted, _config(found.config, settings, wanted, tensors), tensors, tuple(notes))


def _name(found: checkpoint.Checkpoint) -> str:
    return found.origin.repo.rpartition("/")[2] if found.origin else found.folder.resolve().name


def _tensor(name: str, stored: StoredTensor, wanted: Recipe) -> TensorPlan:
    if stored.dtype not in _FLOATS:
        raise Unsupported(f"{stored.path}: tensor '{stored.name}' is {stored.dtype}, expected {', '.join(_FLOATS)}")
    if len(stored.shape) != 2 or not name.endswith(".weight"):
        return TensorPlan(name, stored, None)
    packing, width = wanted.main, stored.shape[-1]
    if wanted.embedding and name == "model.embed_tokens.weight":
        packing = wanted.embedding
    if width % packing.group:
        return TensorPlan(name, stored, None, f"groups of {packing.group} do not divide its width {width}")
    return TensorPlan(name, stored, packing)


def _config(
    config: Mapping[str, Any], settings: Mapping[str, Any], wanted: Recipe, tensors: tuple[TensorPlan, ...]
) -> dict[str, Any]:
    """config.json: the source's, with what mlx_lm needs said in its words, and how each exception is stored."""
    written = {key: value for key, value in config.items() if key not in ("text_config", "vision_config")}
    written |= {key: value for key, value in settings.items() if value is not None}
    if settings["model_type"] == "gemma3_text":
        written["architectures"] = ["Gemma3ForCausalLM"]
    else:
        written["model_type"] = config["model_type"]
    table = next((tensor for tensor in tensors if tensor.name == "model.embed_tokens.weight"), None)
    if table is not None:
        written["vocab_size"] = table.source.shape[0]
    quantization: dict[str, Any] = wanted.main.described()
    for tensor in tensors:
        path = tensor.name.removesuffix(".weight")
        if tensor.packing and tensor.packing != wanted.main:
            quantization[path] = tensor.packing.described()
        elif tensor.why:
            quantization[path] = False
    return {**written, "quantization": quantization, "quantization_config": quantization}


def describe(planned: MlxPlan, result: MlxResult | None = None) -> dict[str, Any]:
    """The plan, and what came of it, as JSON."""
    facts: dict[str, Any] = {
        "source": str(planned.source),
        "path": str(planned.path),
        "quantization": asdict(planned.recipe),
        "n_weights": planned.n_weights,
        "derived": {"weight_nbytes": planned.nbytes, "bits_per_weight": float(planned.bits_per_weight)},
        "skipped": {tensor.name: tensor.why for tensor in planned.skipped},
        "notes": list(planned.notes),
    }
    if result is not None:
        facts["measured"] = {
            "weight_nbytes": result.weight_nbytes,
            "file_nbytes": result.file_nbytes,
            "bits_per_weight": result.bits_per_weight,
        }
        facts["seconds"] = result.seconds
    return facts
