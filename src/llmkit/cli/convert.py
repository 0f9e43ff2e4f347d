"""Write a checkpoint as a GGUF, weights as they are or in F16, F32 or Q8_0.

No PyTorch and no transformers are needed; weights stream through in chunks. For smaller files use `llmkit quantize`,
which makes them straight from the checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from . import output
from .quantize import carry_out, count_argument, size_argument

if TYPE_CHECKING:
    from ..quantize import Plan

EXAMPLES = (
    "llmkit convert ./SmolLM2-135M-Instruct",
    "llmkit convert ./model --type f16 --out model-F16.gguf",
)
KEPT = "What is done is kept in the .partial file: run the same command again to go on."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --type, --out and the rest."""
    parser.add_argument("model", metavar="MODEL", help="org/name[@revision] of the Hub, or a checkpoint folder")
    parser.add_argument(
        "--type", default="auto", metavar="TYPE", help="auto (as the checkpoint has it), bf16, f16, f32, q8_0"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("."), metavar="PATH", help="folder or .gguf file to write (default: here)"
    )
    parser.add_argument("--pre", metavar="NAME", help="name of the pre-tokenizer, where detection fails")
    parser.add_argument(
        "--split-size", type=size_argument, metavar="SIZE", help="largest size of a file, e.g. 4G: splits the output"
    )
    parser.add_argument(
        "--low-disk", action="store_true", help="never keep more than one shard of the checkpoint on the disk"
    )
    parser.add_argument("--threads", type=count_argument, metavar="N", help="worker threads (default: all CPUs)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--dry-run", action="store_true", help="show what would be written, write nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(requantize=False)  # a checkpoint is never quantized


def run(args: argparse.Namespace) -> int:
    """Convert, or show the plan."""
    _refuse_quant(args.model)
    if planned := carry_out(args, lambda path: _plan(args, path)):
        output.next_command(f"llmkit inspect {output.shell_word(planned.outputs[0].path)}")
    return 0


def _refuse_quant(typed: str) -> None:
    """Raise where MODEL names a quant to be made: that is not what this verb does."""
    from .. import model
    from ..errors import LlmkitError

    if quant := model.parse(typed).quant:
        name = output.shell_word(typed.rpartition(":")[0])
        raise LlmkitError(f"{typed}: convert makes no quants", f"llmkit quantize {name} {quant}")


def _plan(args: argparse.Namespace, path: Path) -> Plan:
    from .. import checkpoint, convert, quantize

    draft = convert.from_checkpoint(checkpoint.read(path), pre=args.pre)
    file = args.out if args.out.suffix == ".gguf" else None
    return quantize.conversion(draft, args.type.lower(), file, args.out, split_nbytes=args.split_size)
