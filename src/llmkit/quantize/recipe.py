"""What somebody asks for: a quant and the exceptions from it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from ..errors import LlmkitError
from ..quants import Quant, TensorType, tensor_type


@dataclass(frozen=True)
class Recipe:
    """A quant with overrides. `tensor_types` are (regular expression, type) pairs, the first match wins.

    `pure` switches the mix off: every quantizable tensor gets the default type. The engine lower-cases nothing here,
    unlike the llama-quantize program.
    """

    quant: Quant
    tensor_types: tuple[tuple[str, TensorType], ...] = ()
    output_type: TensorType | None = None
    embedding_type: TensorType | None = None
    pure: bool = False

    def __str__(self) -> str:
        """The words of `llmkit quantize` that ask for it, after the model; written into files as llmkit.recipe."""
        words = [self.quant.name]
        for pattern, kind in self.tensor_types:
            words += ["--tensor-type", f"{pattern}={kind.name}"]
        for option, end in (("--output-type", self.output_type), ("--embedding-type", self.embedding_type)):
            words += [option, end.name] if end else []
        return shlex.join(words + ["--pure"] * self.pure)

    def ends(self, tied: bool) -> list[tuple[str, TensorType | None]]:
        """Types asked for the output matrix and the embedding, by the names of the engine's flags.

        With tied embeddings the output matrix is the embedding: `output_type` means token_embd unless that has its own.
        """
        embedding = self.embedding_type or (self.output_type if tied else None)
        return [("output_tensor_type", self.output_type), ("token_embedding_type", embedding)]

    def overrides(self, tied: bool) -> list[tuple[str, str]]:
        """All exceptions as (pattern, type name) for the engine; patterns get its shape fallback, its flags do not."""
        patterns = (r"^output\.weight$", r"^token_embd\.weight$")
        found = [(pattern, kind.name) for pattern, (_, kind) in zip(patterns, self.ends(tied), strict=True) if kind]
        return found + [(pattern, kind.name) for pattern, kind in self.tensor_types]


def parse_tensor_type(text: str) -> tuple[str, TensorType]:
    """REGEX=TYPE from a command line. Raises LlmkitError, Unsupported."""
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise LlmkitError(f"--tensor-type {text!r}: expected REGEX=TYPE", r"For example: --tensor-type 'ffn_down=Q6_K'")
    try:
        re.compile(pattern)
    except re.error as error:
        raise LlmkitError(f"--tensor-type {text!r}: the regular expression is broken: {error}") from None
    return pattern, tensor_type(name)
