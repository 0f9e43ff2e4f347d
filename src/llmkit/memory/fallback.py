"""When the engine cannot be asked: closed forms where shapes are known (tier B), the rule of thumb else (tier C)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from ..convert.draft import GgufDraft
from ..errors import LlmkitError
from ..gguf_writer import tensor_nbytes
from . import closed_form, resident
from .closed_form import ClosedForm, assumed, shape
from .closed_form.shape import Shape
from .parts import CLOSED_FORM, DERIVED, LOOKED_UP, ROUGH, MemoryEstimate, Part, Variant
from .setting import Setting

# bits a weight nominally has, for the rule of thumb
NOMINAL_BITS = {
    "F32": 32,
    "BF16": 16,
    "F16": 16,
    "Q8_0": 8,
    "Q6_K": 6,
    "Q5_K_M": 5,
    "Q4_K_M": 4,
    "Q3_K_M": 3,
    "Q2_K": 2,
}


def closed(
    draft: GgufDraft, chosen: Sequence[Variant], settings: Sequence[Setting], error: LlmkitError
) -> list[list[MemoryEstimate]]:
    """Tier B for a draft whose tensors are known: `error` tells why the engine could not be asked.

    Raises it again where the metadata do not tell the shape.
    """
    try:
        found = shape.of_metadata(draft.metadata, tied=all(tensor.name != "output.weight" for tensor in draft.tensors))
    except LlmkitError:
        raise error from None
    sizes = [
        sum(tensor_nbytes(tensor.shape, variant.types[tensor.name]) for tensor in draft.tensors) for variant in chosen
    ]
    return [
        [_estimate(found, variant, setting, nbytes) for setting in settings]
        for variant, nbytes in zip(chosen, sizes, strict=True)
    ]


def of_config(config: Mapping[str, Any], labels: Sequence[str], setting: Setting) -> list[MemoryEstimate]:
    """Tier B from config.json alone, of an architecture nobody here converts; the mixes of types are the usual ones.

    Quants without a usual mix are left out. Raises InvalidModel when the config does not tell the shape.
    """
    found = shape.of_config(config)
    weights = max(1, assumed.n_weights(found))
    made = []
    for label in labels:
        try:
            nbytes = assumed.weights_nbytes(found, label)
        except LlmkitError:
            continue
        variant = Variant(label, {}, nbytes, Fraction(8 * nbytes, weights))
        made.append(_estimate(found, variant, setting, nbytes))
    return made


def of_count(n_params: int, setting: Setting) -> list[MemoryEstimate]:
    """Tier C from a count of parameters: weights by the rule of thumb, and what the truth is known to add to it."""
    made = []
    for label, bits in NOMINAL_BITS.items():
        if label == "F16":
            continue
        rule = closed_form.rough(n_params, bits)
        more = max(0, (rule.least + rule.most) // 2 - rule.nbytes)
        parts = (
            Part("weights", rule.nbytes, DERIVED),
            Part("what the rule leaves out, between the known bounds", more, LOOKED_UP),
        )
        made.append(
            MemoryEstimate(Variant(label, {}, rule.nbytes, Fraction(bits)), setting, ROUGH, setting.context, parts)
        )
    return made


def _estimate(found: Shape, variant: Variant, setting: Setting, weights: int) -> MemoryEstimate:
    try:
        form = closed_form.closed_form(found, setting, weights)
    except LlmkitError as error:
        return MemoryEstimate(variant, setting, CLOSED_FORM, setting.context, (), error.message)
    parts = tuple(part for part in _parts(found, form) if part.nbytes)
    return MemoryEstimate(variant, setting, CLOSED_FORM, form.context, parts)


def _parts(found: Shape, form: ClosedForm) -> Iterator[Part]:
    yield Part("weights", form.weights, DERIVED)
    kinds = tuple(Part(f"{kind} layers", nbytes, DERIVED) for kind, nbytes in form.kv.items() if nbytes)
    yield Part("KV cache", sum(form.kv.values()), DERIVED, kinds if len(kinds) > 1 else ())
    yield Part("recurrent state", form.recurrent, DERIVED)
    yield Part("compute buffer", form.compute, DERIVED)
    yield Part("output buffer", form.output, DERIVED)
    # about eleven tensors a layer
    yield resident.overhead({}, n_tokens=found.n_vocab, n_tensors=11 * len(found.layers))
