"""Write a checkpoint or a GGUF in one or several quants, in one pass.

The weights are read once for all quants; nothing is written in between. Which tensor gets which type is the
engine's own choice; --tensor-type, --output-type and --embedding-type make exceptions. A model of the Hub is fetched
first; with --low-disk its shards are fetched, converted and released one after another. With --mlx a folder for Apple's
MLX is written instead: --bits, --group and --mode say how.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import models, output

if TYPE_CHECKING:
    from ..quantize import Plan, Result
    from ..quantize.mlx import MlxPlan
    from .models import Source

EXAMPLES = (
    "llmkit quantize ./SmolLM2-135M-Instruct Q4_K_M Q8_0",
    "llmkit quantize HuggingFaceTB/SmolLM2-135M-Instruct Q4_K_M --dry-run",
    "llmkit quantize model-BF16.gguf Q4_K_M --out quants --dry-run",
    "llmkit quantize ./model IQ4_XS --imatrix imatrix.gguf --tensor-type 'ffn_down=Q6_K'",
    "llmkit quantize ./SmolLM2-135M-Instruct --mlx --bits 4 --group 64",
)
KEPT = "What is done is kept in the .partial files: run the same command again to go on."
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def count_argument(text: str, least: int = 1) -> int:
    """A whole number of at least `least` that fits the engine's integers."""
    if not text.isascii() or not text.isdigit() or not least <= int(text[:20]) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {2**31 - 1}")
    return int(text)


def size_argument(text: str) -> int:
    """'4G', '500MB' (decimal), '8GiB' (binary) or plain bytes → bytes."""
    match = _SIZE.fullmatch(text.strip())
    base = 1024 if match and match[3] and match[2] else 1000
    nbytes = int(float(match[1][:20]) * base ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if nbytes < 1 or (match and match[3] and not match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4G, 8GiB or 500M")
    return nbytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the quants and the rest."""
    parser.add_argument("model", metavar="MODEL", help=models.MODEL_HELP)
    parser.add_argument("quants", nargs="*", metavar="QUANT", help="Q2_K … Q8_0, IQ1_S … IQ4_XS, F16, BF16, COPY …")
    parser.add_argument(
        "--out", type=Path, default=Path("."), metavar="DIR", help="folder for the files, or one .gguf (default: here)"
    )
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix, .gguf or .dat")
    parser.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="REGEX=TYPE",
        help="type for tensors that match; repeatable, first match wins",
    )
    parser.add_argument(
        "--output-type", metavar="TYPE", help="type of the output matrix (with tied embeddings: of the embedding)"
    )
    parser.add_argument("--embedding-type", metavar="TYPE", help="type of the token embedding")
    parser.add_argument("--pure", action="store_true", help="no mix: the quant's main type everywhere")
    parser.add_argument(
        "--requantize", action="store_true", help="accept a source that is quantized already (loses twice)"
    )
    parser.add_argument("--pre", metavar="NAME", help="name of the pre-tokenizer, where detection fails")
    parser.add_argument(
        "--split-size", type=size_argument, metavar="SIZE", help="largest size of a file, e.g. 4G: splits the output"
    )
    parser.add_argument(
        "--low-disk", action="store_true", help="never keep more than one shard of the checkpoint on the disk"
    )
    parser.add_argument("--threads", type=count_argument, metavar="N", help="worker threads (default: all CPUs)")
    _add_mlx_arguments(parser)
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument("--dry-run", action="store_true", help="show types, sizes and room on disk; write nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_mlx_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mlx", action="store_true", help="write a folder for MLX instead of GGUF files")
    parser.add_argument("--bits", type=count_argument, metavar="N", help="with --mlx: 2, 3, 4 (default), 5, 6 or 8")
    parser.add_argument("--group", type=count_argument, metavar="N", help="with --mlx: 32, 64 (default) or 128 weights")
    parser.add_argument("--mode", metavar="MODE", help="with --mlx: affine (default), mxfp4, nvfp4 or mxfp8")
    parser.add_argument(
        "--embedding-bits",
        type=count_argument,
        metavar="N",
        help="with --mlx: bits of the embedding (default: as --bits, but at least 6 where it is the output too)",
    )


def run(args: argparse.Namespace) -> int:
    """Quantize, or show the plan."""
    if args.mlx:
        return _run_mlx(args)
    _refuse(args, ("bits", "group", "mode", "embedding_bits"), "needs --mlx")
    args.quants = args.quants or _named_quant(args.model)
    if planned := carry_out(args, lambda path: _plan(args, path)):
        output.next_command(f"llmkit chat {output.shell_word(planned.outputs[-1].path)}")
    return 0


def carry_out(args: argparse.Namespace, plan: Callable[[Path], Plan]) -> Plan | None:
    """Plan from what MODEL is, make the outputs and show them; with --dry-run show the plan, and return None."""
    with models.source(args.model, low_disk=args.low_disk and not args.dry_run) as source:
        planned = plan(source.path)
        for remark in planned.draft.notes:
            output.note(f"note: {remark}")
        if args.dry_run:
            show_plan(planned, as_json=args.json, source=source, low_disk=args.low_disk)
            return None
        if args.requantize and any(tensor.type.quantized for tensor in planned.draft.tensors):
            output.note("note: the source is quantized already; what it has lost stays lost, and some more is lost now")
        results = bring_and_make(planned, args, source, again=plan)
    show_results(planned, results, as_json=args.json)
    return planned


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    """Raise LlmkitError when one of these options was given."""
    from ..errors import LlmkitError

    for name in names:
        if getattr(args, name) not in (None, False, []):
            raise LlmkitError(f"--{name.replace('_', '-')} {why}")


_NOT_FOR_MLX = (
    "imatrix", "tensor_type", "output_type", "embedding_type", "pure", "requantize", "pre", "split_size", "low_disk",
)  # fmt: skip


def _run_mlx(args: argparse.Namespace) -> int:
    """Write a folder for MLX, or show what would be written."""
    from .. import store
    from ..errors import LlmkitError
    from ..quantize import mlx, mlx_writing

    if args.quants:
        raise LlmkitError(f"'{args.quants[0]}' is a quant of GGUF files; with --mlx say --bits, --group, --mode")
    _refuse(args, _NOT_FOR_MLX, "means nothing with --mlx")

    def plan(path: Path) -> mlx.MlxPlan:
        wishes = {"bits": args.bits, "group": args.group, "embedding_bits": args.embedding_bits}
        return mlx.plan(path, args.out, mode=args.mode or "affine", **wishes)

    with models.source(args.model) as source:
        planned = plan(source.path)
        for remark in planned.notes:
            output.note(f"note: {remark}")
        if args.dry_run:
            show_mlx_plan(planned, free_nbytes=store.free_nbytes(planned.path.parent), as_json=args.json)
            return 0
        mlx_writing.check_output(planned, force=args.force)
        if source.download:
            models.tell_plan(source.download)
            output.note(f"write  {output.size(planned.nbytes)} to {planned.path}")
            fetched = (source.download.cache.root, source.download.fetch_nbytes)
            store.require_rooms([fetched, (planned.path.parent, planned.nbytes)])
            planned = plan(models.fetch(source.download))
        with output.ProgressBar() as bar:
            result = mlx_writing.run(planned, force=args.force, on_progress=bar)
    _tell_skipped(planned)
    if args.json:
        output.emit_json(mlx.describe(planned, result))
    else:
        row = (str(result.path), output.size(result.file_nbytes), f"{result.bits_per_weight:.2f} (measured)")
        output.table(("folder", "weights", "bits/weight"), [row], "lrr")
        output.note(f"1 folder in {output.duration(result.seconds)}")
    output.next_command(f"llmkit chat {output.shell_word(result.path)} --backend mlx")
    return 0


def show_mlx_plan(planned: MlxPlan, *, free_nbytes: int, as_json: bool) -> None:
    """How each tensor would be stored, the size, the bits per weight, what is skipped."""
    from ..quantize import mlx

    if as_json:
        output.emit_json({**mlx.describe(planned), "free_nbytes": free_nbytes})
        return
    rows = []
    for tensor in planned.tensors:
        packing = tensor.packing
        stored = f"{packing.mode} {packing.bits}-bit, groups of {packing.group}" if packing else tensor.source.dtype
        shape = " x ".join(map(str, tensor.source.shape))
        rows.append((tensor.name, shape, tensor.source.dtype, stored, output.size(tensor.nbytes)))
    output.table(("tensor", "shape", "source", "stored as", "size"), rows, "llllr")
    output.emit()
    row = (str(planned.path), output.size(planned.nbytes), f"{float(planned.bits_per_weight):.2f} (derived)")
    output.table(("folder", "weights", "bits/weight"), [row], "lrr")
    _tell_skipped(planned)
    fits = "enough" if free_nbytes >= planned.nbytes else "NOT enough"
    output.note(
        f"{output.size(planned.nbytes)} to write, {output.size(free_nbytes)} free: {fits}. Nothing was written."
    )


def _tell_skipped(planned: MlxPlan) -> None:
    """Matrices that stay as they are, by name, and what to do about it."""
    if not planned.skipped:
        return
    same = Counter((re.sub(r"\.\d+\.", ".*.", tensor.name), tensor.why) for tensor in planned.skipped)
    output.note(f"{len(planned.skipped)} matrices are not quantized:")
    for (name, why), count in same.items():
        output.note(f"  {name}: {why}" + (f" ({count} of them)" if count > 1 else ""))
    if group := planned.dividing_group:
        output.note(f"--group {group} divides them all.")


def _named_quant(typed: str) -> list[str]:
    """The quant inside MODEL, for `llmkit quantize org/name:Q4_K_M`."""
    from .. import model
    from ..errors import LlmkitError

    ref = model.parse(typed)
    if ref.quant is None:
        raise LlmkitError("no quant was named", f"llmkit quantize {output.shell_word(typed)} Q4_K_M")
    return [ref.quant]


def _plan(args: argparse.Namespace, path: Path) -> Plan:
    from .. import convert, quantize
    from ..errors import LlmkitError
    from ..quantize import imatrix
    from ..quants import quant, tensor_type

    chosen = [quant(name) for name in dict.fromkeys(name.upper() for name in args.quants)]
    exceptions = tuple(quantize.parse_tensor_type(text) for text in args.tensor_type)
    output_type = tensor_type(args.output_type) if args.output_type else None
    embedding_type = tensor_type(args.embedding_type) if args.embedding_type else None
    recipes = [quantize.Recipe(each, exceptions, output_type, embedding_type, args.pure) for each in chosen]
    importance = imatrix.read(args.imatrix) if args.imatrix else None
    draft = convert.open_draft(path, pre=args.pre)
    folder, file = args.out, None
    if args.out.suffix == ".gguf":
        if len(recipes) > 1:
            raise LlmkitError(f"--out {args.out}: names one file for {len(recipes)} quants", "Give a folder.")
        folder, file = args.out.parent, args.out
    return quantize.plan(
        draft, recipes, folder, file=file, imatrix=importance, split_nbytes=args.split_size, requantize=args.requantize
    )


def bring_and_make(
    planned: Plan, args: argparse.Namespace, source: Source, again: Callable[[Path], Plan]
) -> list[Result]:
    """Fetch what is missing, then run the plan; `again` plans anew for weights that are here now.

    Outputs are looked at first: what is made already costs no fetch.
    """
    from .. import quantize, store

    if source.download is None or source.shadow is None:
        return models.make(planned, force=args.force, threads=args.threads)
    left = quantize.check_outputs(planned, force=args.force)
    if not left.outputs:
        return models.make(planned, force=args.force, threads=args.threads)
    _tell_way(planned, source, low_disk=args.low_disk)
    if args.low_disk:
        return models.make(planned, force=args.force, threads=args.threads, shadow=source.shadow)
    store.require_rooms(models.rooms(left, source.download))
    return models.make(again(models.fetch(source.download)), force=args.force, threads=args.threads)


def _tell_way(planned: Plan, source: Source, *, low_disk: bool) -> None:
    """The plan of the whole way on stderr: fetch, write, need."""
    from .. import quantize

    if source.download is None:
        return
    models.tell_plan(source.download, stays=not low_disk)
    for each in planned.outputs:
        output.note(f"write  {output.size(each.nbytes)} to {each.path}")
    if low_disk:
        low = quantize.low_disk_plan(planned)
        output.note(
            f"need   {output.size(low.peak_nbytes)} of disk at most (derived): the output, and shards of"
            f" {output.size(low.held_nbytes)} one after another"
        )
    else:
        output.note(f"need   {output.size(planned.nbytes + source.download.fetch_nbytes)} of disk in all (derived)")


def show_plan(planned: Plan, *, as_json: bool, source: Source | None = None, low_disk: bool = False) -> None:
    """Types per tensor, sizes, bits per weight, room on disk; what is to be fetched before."""
    from .. import quantize, store

    free = store.free_nbytes(planned.outputs[0].path.parent)
    if as_json:
        described = [quantize.describe(each) for each in planned.outputs]
        facts: dict[str, object] = {
            "source": planned.draft.name,
            "outputs": described,
            "free_nbytes": free,
            "needed_nbytes": planned.nbytes,
        }
        if source and source.download and source.shadow:
            facts |= {
                "fetch_nbytes": source.download.fetch_nbytes,
                "fetched_nbytes": source.shadow.fetched_nbytes,
                "commit": source.download.repository.commit,
            }
            if low_disk:
                facts["low_disk"] = quantize.streaming.describe(quantize.low_disk_plan(planned))
        output.emit_json(facts)
        return
    rows = [
        (
            tensor.name,
            " x ".join(map(str, tensor.shape)),
            tensor.type.name,
            *(each.types[tensor.name].name for each in planned.outputs),
        )
        for tensor in planned.draft.tensors
    ]
    output.table(("tensor", "shape", "source", *(each.label for each in planned.outputs)), rows)
    output.emit()
    _size_table(planned)
    if source:
        _tell_way(planned, source, low_disk=low_disk)
    fits = "enough" if _fits(planned, source, low_disk=low_disk) else "NOT enough"
    output.note(f"{output.size(planned.nbytes)} to write, {output.size(free)} free: {fits}. Nothing was written.")


def _fits(planned: Plan, source: Source | None, *, low_disk: bool) -> bool:
    """Whether there is room for what is written, and for what comes before it."""
    from .. import quantize, settings, store
    from ..errors import NotEnoughRoom

    needs = [(file.path.parent, file.nbytes) for each in planned.outputs for file in each.files]
    if source and source.download and source.shadow:
        needs = models.rooms(planned, source.download)
        if low_disk:
            needs[0] = (settings.home(), quantize.low_disk_plan(planned).held_nbytes)
    try:
        store.require_rooms(needs)
    except NotEnoughRoom:
        return False
    return True


def _mix(mix: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in mix.items())


def _size_table(planned: Plan, seconds: dict[str, str] | None = None) -> None:
    rows = []
    for each in planned.outputs:
        parts = f" (and {len(each.files) - 1} more parts)" if len(each.files) > 1 else ""
        row = [f"{each.path}{parts}", output.size(each.nbytes), f"{float(each.bits_per_weight):.2f}", _mix(each.mix)]
        rows.append(row + ([seconds.get(each.label, "-")] if seconds is not None else []))
    headers = ["file", "size", "bits/weight", "types"] + (["CPU time"] if seconds is not None else [])
    output.table(headers, rows, "lrrlr")


def show_results(planned: Plan, results: list[Result], *, as_json: bool) -> None:
    """The closing table: file, size, bits per weight, mix of types, seconds."""
    from .. import quantize

    if as_json:
        made = {result.output.label: result for result in results}
        output.emit_json([
            {
                **{key: value for key, value in quantize.describe(each).items() if key != "types"},
                "seconds": made[each.label].seconds if each.label in made else 0.0,
                "cpu_seconds": made[each.label].cpu_seconds if each.label in made else 0.0,
                "resumed_tensors": made[each.label].resumed if each.label in made else None,
            }
            for each in planned.outputs
        ])  # fmt: skip
        return
    _size_table(planned, {result.output.label: output.duration(result.cpu_seconds) for result in results})
    if results:
        output.note(f"{len(results)} file(s) in {output.duration(results[0].seconds)}")
