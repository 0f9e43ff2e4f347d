"""Show what a GGUF file holds: metadata, tokenizer, tensors by type.

Only headers are read, so it takes no time, however large the file; of a model of the Hub only they are fetched.
"""

from __future__ import annotations

import argparse
from math import prod
from typing import TYPE_CHECKING

from .. import models, output

if TYPE_CHECKING:
    from fractions import Fraction

    from ...gguf import GgufFile
    from ...inspection.files import FileSummary, MetadataRow, TensorGroup, TokenizerSummary

EXAMPLES = (
    "llmkit inspect model.gguf",
    "llmkit inspect model.gguf --metadata",
    "llmkit inspect model.gguf --tensors | grep ffn_down",
    "llmkit inspect Qwen/Qwen3-0.6B-GGUF:Q8_0 --json",
)

# topic = module of this package → its one line of help, the first line of its docstring
TOPICS: dict[str, str] = {
    "tokens": "Show how models cut a text into tokens: ids, pieces, bytes, kinds; side by side for several models.",
    "xray": "Show a prompt under X-rays: which tokens are system, user, assistant, and which the chat template's.",
    "embeddings": "Show embeddings: a model's table of tokens, vectors of texts, and what quantization does to both.",
    "temperature": "Show what the samplers do with the real logits after a text: stages, temperatures, softmax, draws.",
    "branches": "Show how a text might go on: several continuations at once on one shared context, with probabilities.",
    "lens": "Show what a model would say if it ended after each of its layers: the logit lens.",
    "attention": "Show which tokens each head of a layer looks at: the attention weights of a running model.",
    "layers": "Show the residual stream layer by layer, and what of a model can be inspected at all.",
    "numbers": "Show what numbers become in FP32, BF16, FP16, FP8, INT8 …: their bits, the value they hold, the error.",
    "quant": "Show how quantization packs weights: scales, codes, blocks in numbers, and what each type loses.",
    "doubt": "Mark where an answer was unsure, and ask again to see whether the model says the same.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own options."""
    parser.add_argument("model", metavar="MODEL", help="a .gguf file (a split one's first part), or org/name:QUANT")
    parser.add_argument("--metadata", action="store_true", help="show every metadata key instead")
    parser.add_argument("--tensors", action="store_true", help="show every tensor instead")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Read the header and show it."""
    from ... import gguf
    from ...errors import Unsupported

    with models.outline(args.model) as source:
        if source.path.is_dir():
            shown = f"llmkit quantize {output.shell_word(args.model)} Q4_K_M --dry-run"
            raise Unsupported(
                f"{args.model}: is a folder or a checkpoint, expected a GGUF file", f"Its tensors: {shown}"
            )
        show(gguf.read(source.path), args, where=source.name)
    return 0


def show(file: GgufFile, args: argparse.Namespace, *, where: str) -> None:
    """Print what was asked for; `where` is what the file is called."""
    from ...inspection import files

    if args.json:
        summary = output.plain(files.summary(file)) | {"path": where}
        everything = {"summary": summary, "metadata": files.metadata(file), "tensors": _tensor_rows(file)}
        output.emit_json(everything)
        return
    if args.metadata:
        _show_metadata(files.metadata(file))
    if args.metadata and args.tensors:
        output.emit()
    if args.tensors:
        _show_tensors(file)
    if not (args.metadata or args.tensors):
        _show_summary(files.summary(file), args.model, where)


def _tensor_rows(file: GgufFile) -> list[dict[str, object]]:
    return [
        {"name": info.name, "shape": info.shape, "type": info.type.name, "nbytes": info.nbytes}
        for info in file.tensors.values()
    ]


def _show_summary(summary: FileSummary, typed: str, where: str) -> None:
    rows: list[tuple[str, object]] = [
        ("file", where if summary.parts == 1 else f"{where} and {summary.parts - 1} more parts"),
        ("size", output.size(summary.nbytes)),
        ("name", summary.name or "-"),
        ("architecture", summary.architecture or "-"),
        ("quant", summary.quant or "-"),
        ("weights", f"{summary.weights:,}"),
        ("bits per weight", _bits(summary.bits_per_weight)),
    ]
    rows += [(word, _numbers(value)) for word, value in summary.shape.items()]
    output.table(("model", ""), rows)
    output.emit()
    if summary.tokenizer:
        output.table(("tokenizer", ""), _tokenizer_rows(summary.tokenizer))
        output.emit()
    if not summary.by_type:
        output.emit("The file holds no tensors.")
        return
    _show_groups("type", summary.by_type)
    output.emit()
    _show_groups("role", summary.by_role)
    if summary.tied:
        output.emit("The output uses the token embeddings (tied).")
    output.next_command(f"llmkit chat {output.shell_word(typed)}")


def _show_groups(title: str, groups: tuple[TensorGroup, ...]) -> None:
    headers = (title, "tensors", "weights", "size", "bits per weight", "types")
    rows = [
        (g.name, g.tensors, f"{g.weights:,}", output.size(g.nbytes), _bits(g.bits_per_weight), " ".join(g.types))
        for g in groups
    ]
    columns = len(headers) if title != "type" else -1  # a type's types are itself
    output.table(headers[:columns], [row[:columns] for row in rows], "lrrrrl")


def _tokenizer_rows(tokenizer: TokenizerSummary) -> list[tuple[str, object]]:
    yes_no = {True: "yes", False: "no", None: "not said"}
    rows: list[tuple[str, object]] = [
        ("model", tokenizer.model + (f", pre-tokenizer {tokenizer.pre}" if tokenizer.pre else "")),
        ("tokens", f"{tokenizer.tokens:,}"),
    ]
    if tokenizer.types:
        rows.append(("of type", ", ".join(f"{count:,} {name}" for name, count in tokenizer.types.items())))
    if tokenizer.merges:
        rows.append(("merges", f"{tokenizer.merges:,}"))
    for token in tokenizer.special:
        text = "(outside the vocabulary)" if token.text is None else token.text
        rows.append((token.role, f"{token.id}  {text}"))
    rows.append(("adds bos, eos", f"{yes_no[tokenizer.adds_bos]}, {yes_no[tokenizer.adds_eos]}"))
    for template in tokenizer.templates:
        style = template.style or "its own format"
        rows.append(("chat template", f"{template.name}: {style}, {template.characters:,} characters"))
    if not tokenizer.templates:
        rows.append(("chat template", "none"))
    return rows


def _show_metadata(rows: tuple[MetadataRow, ...]) -> None:
    shown = []
    for row in rows:
        value = str(row.value)
        if row.count is not None:
            more = row.count - len(row.value)
            value = value[:-1] + (f", … {more:,} more]" if more else "]")
        shown.append((row.key, row.type, output.one_line(value, 100)))
    output.table(("key", "type", "value"), shown)


def _show_tensors(file: GgufFile) -> None:
    rows = [
        (info.name, " × ".join(map(str, info.shape)), info.type.name, f"{prod(info.shape):,}", output.size(info.nbytes))
        for info in file.tensors.values()
    ]
    output.table(("tensor", "shape", "type", "weights", "size"), rows, "lllrr")


def _bits(value: Fraction | None) -> str:
    return "-" if value is None else f"{float(value):.2f}"


def _numbers(value: object) -> str:
    return " or ".join(f"{number:,}" for number in value) if isinstance(value, list) else f"{value:,}"
