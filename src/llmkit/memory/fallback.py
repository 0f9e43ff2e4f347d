"""When the engine cannot be asked: closed forms where shapes are known (tier B), the rule of thumb else (tier C)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from ..convert.draft import GgufDraft
from ..errors import LlmkitError, Unsupported
from ..gguf_writer import tensor_nbytes
from . import closed_form, resident
from .closed_form import ClosedForm, Rough, assumed, shape
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
    found = _shape(draft, error)
    sizes = [
        sum(tensor_nbytes(tensor.shape, variant.types[tensor.name]) for tensor in draft.tensors) for variant in chosen
    ]
    why = error.message
    return [
        [replace(_estimate(found, variant, setting, nbytes), why_not_asked=why) for setting in settings]
        for variant, nbytes in zip(chosen, sizes, strict=True)
    ]


def of_draft(draft: GgufDraft, labels: Sequence[str], setting: Setting, error: LlmkitError) -> list[MemoryEstimate]:
    """Tier B where not even the types of tensors could be asked: the mixes are the usual ones. `error` tells why.

    Raises it again where the metadata do not tell the shape.
    """
    return [replace(each, why_not_asked=error.message) for each in of_shape(_shape(draft, error), labels, setting)]


def _shape(draft: GgufDraft, error: LlmkitError) -> Shape:
    try:
        return shape.of_metadata(draft.metadata, tied=all(tensor.name != "output.weight" for tensor in draft.tensors))
    except LlmkitError:
        raise error from None


def of_shape(found: Shape, labels: Sequence[str], setting: Setting) -> list[MemoryEstimate]:
    """Tier B from a shape alone, of an architecture nobody here converts; the mixes of types are the usual ones.

    Raises Unsupported for a quant that does not exist or has no usual mix.
    """
    weights = max(1, assumed.n_weights(found))
    made = []
    for label in labels:
        nbytes = assumed.weights_nbytes(found, label)
        variant = Variant(label, {}, nbytes, Fraction(8 * nbytes, weights))
        made.append(_estimate(found, variant, setting, nbytes))
    return made


def rules(n_params: int, labels: Sequence[str] = ()) -> dict[str, Rough]:
    """The rule of thumb for each quant, for those it is usually told for where none is named.

    Raises LlmkitError for a count no model has, Unsupported for a quant without a nominal number of bits.
    """
    if unknown := next((label for label in labels if label not in NOMINAL_BITS), None):
        raise Unsupported(f"the rule of thumb has no bits for {unknown}", f"Known: {', '.join(NOMINAL_BITS)}.")
    usual = (label for label in NOMINAL_BITS if label != "F16")
    return {label: closed_form.rough(n_params, NOMINAL_BITS[label]) for label in labels or usual}


def of_rules(found: Mapping[str, Rough], setting: Setting) -> list[MemoryEstimate]:
    """Tier C: weights by the rule of thumb, and what the truth is known to add to it."""
    made = []
    for label, rule in found.items():
        more = max(0, (rule.least + rule.most) // 2 - rule.nbytes)
        parts = (
            Part("weights", rule.nbytes, DERIVED),
            Part("what the rule leaves out, between the known bounds", more, LOOKED_UP),
        )
        made.append(
            MemoryEstimate(Variant(label, {}, rule.nbytes, Fraction(rule.bits)), setting, ROUGH, setting.context, parts)
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
