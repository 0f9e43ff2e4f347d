"""Write a checkpoint folder as a GGUF, weights as they are or in F16, F32 or Q8_0.

No PyTorch and no transformers are needed; weights stream through in chunks. For smaller files use `llmkit quantize`,
which makes them straight from the checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import output
from .quantize import count_argument, show_results, size_argument

EXAMPLES = (
    "llmkit convert ./SmolLM2-135M-Instruct",
    "llmkit convert ./model --type f16 --out model-F16.gguf",
)
KEPT = "What is done is kept in the .partial file: run the same command again to go on."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --type, --out and the rest."""
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="checkpoint folder (config.json, *.safetensors, tokenizer)"
    )
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
    parser.add_argument("--threads", type=count_argument, metavar="N", help="worker threads (default: all CPUs)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--dry-run", action="store_true", help="show what would be written, write nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Convert, or show the plan."""
    from .. import checkpoint, convert, quantize
    from .quantize import make, show_plan

    draft = convert.from_checkpoint(checkpoint.read(args.model), pre=args.pre)
    is_file = args.out.suffix == ".gguf"
    planned = quantize.conversion(
        draft, args.type.lower(), args.out if is_file else None, args.out, split_nbytes=args.split_size
    )
    for remark in draft.notes:
        output.note(f"note: {remark}")
    if args.dry_run:
        show_plan(planned, as_json=args.json)
        return 0
    results = make(planned, args)
    show_results(planned, results, as_json=args.json)
    output.next_command(f"llmkit inspect {output.shell_word(planned.outputs[0].path)}")
    return 0
