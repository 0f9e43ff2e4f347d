"""The engine is asked what it would allocate, for a quant that does not exist of a model that may not be here.

A sparse header-only GGUF with the quant's types is loaded with no_alloc in a child process (engine/breakdown.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import engine, gguf_writer
from ..convert.draft import GgufDraft
from ..errors import EngineError, LlmkitError
from ..quantize.oracle import header
from ..quants import TensorType
from .setting import Setting

_TIMEOUT = 180.0


@dataclass(frozen=True)
class Cache:
    """One of the engine's caches: its bytes (`nbytes` to a hundredth of a MiB), cells and layers."""

    nbytes: int
    cells: int
    layers: int


@dataclass(frozen=True)
class Layout:
    """What the engine would allocate, in bytes by buffer type: `weights`, `context` (caches, states), `compute`.

    `kv` and `recurrent` tell the caches apart; `output_nbytes` is the buffer of logits on the host. `exact`: read from
    the engine's table, else from its log, to a hundredth of a MiB.
    """

    n_ctx: int
    weights: Mapping[str, int]
    context: Mapping[str, int]
    compute: Mapping[str, int]
    kv: tuple[Cache, ...]
    recurrent: tuple[Cache, ...]
    output_nbytes: int
    n_params: int
    exact: bool


def ask(
    draft: GgufDraft,
    variants: Sequence[Mapping[str, TensorType]],
    settings: Sequence[Setting],
    *,
    first: Sequence[Setting] = (),
) -> list[list[Layout | str]]:
    """For each variant (a type for every tensor) and each setting what the engine would allocate, or why it refuses.

    The settings of `first` are asked for the first variant alone, behind the others: what depends on no quant.
    Raises EngineError when the engine refuses the model itself, or dies.
    """
    with tempfile.TemporaryDirectory(prefix="llmkit-") as folder:
        models, order = [], []
        for index, types in enumerate(variants):
            path = Path(folder) / f"{index}.gguf"
            try:
                rows = [(tensor.name, tensor.shape, types[tensor.name]) for tensor in draft.tensors]
                gguf_writer.write_sparse(path, header(draft), rows)
            except OSError as error:
                raise LlmkitError(f"{path}: cannot be written: {error.strerror}", "Set TMPDIR elsewhere.") from error
            wanted = [*settings, *first] if index == 0 else list(settings)
            for repack in sorted({each.repack for each in wanted}):
                chosen = [number for number, each in enumerate(wanted) if each.repack is repack]
                params = engine.safe_model_params() | ({} if repack else {"use_extra_bufts": False})
                contexts = [wanted[number].context_params() for number in chosen]
                models.append({"path": str(path), "model_params": params, "contexts": contexts})
                order.append((index, chosen))
        try:
            answers = engine.run_in_child(
                function="llmkit.engine.breakdown:layouts", arguments={"models": models}, timeout=_TIMEOUT
            )
        except EngineError as error:  # the files are ours: nobody knows their names, and they will be gone
            for row in models:
                error.message = error.message.replace(str(row["path"]), draft.name)
            raise
    found: list[dict[int, Layout | str]] = [{} for _ in variants]
    for (index, chosen), layouts in zip(order, answers, strict=True):
        found[index] |= {number: _layout(layout) for number, layout in zip(chosen, layouts, strict=True)}
    return [[row[number] for number in sorted(row)] for row in found]


def _layout(answer: dict[str, Any]) -> Layout | str:
    if "error" in answer:
        return str(answer["error"])
    buffers = answer["buffers"]
    if not buffers:
        raise EngineError("the engine named no buffers")
    weights = {name: row[0] for name, row in buffers.items()}
    if not answer["exact"]:  # the log has no figures for weights under no_alloc
        weights["CPU"] = answer["weights"]
    return Layout(
        n_ctx=answer["n_ctx"],
        weights=weights,
        context={name: row[1] for name, row in buffers.items()},
        compute={name: row[2] for name, row in buffers.items()},
        kv=tuple(Cache(*row[:3]) for row in answer["kv"]),
        recurrent=tuple(Cache(*row[:3]) for row in answer["recurrent"]),
        output_nbytes=answer["output"],
        n_params=answer["n_params"],
        exact=answer["exact"],
    )
