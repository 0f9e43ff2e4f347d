#!/usr/bin/env python3
"""Closed forms (tier B) against the engine's own layout (tier A), over shapes and settings: errors per part and in sum.

    compare_tiers.py            all: some 400 combinations, under a minute
    compare_tiers.py --quick    a few
    compare_tiers.py --json

Each is looked at twice: as the family it is, and as if its architecture were unknown (generic blocks are assumed then).
Weights are compared for every quant: the usual mix that closed forms assume, against the engine's dry run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmkit import engine
from llmkit.gguf_writer import tensor_nbytes
from llmkit.memory.closed_form import ClosedForm, assumed, closed_form, shape
from llmkit.memory.setting import Setting
from llmkit.quants import QUANTS, TENSOR_TYPES
from sparse_models import PUBLISHED, Model, attention

PARTS = ("kv and state", "compute", "output", "sum beside weights", "sum")
_SMALLER = {"deepseek-v3": 8, "llama2-70b": 12, "gemma3-27b": 12, "qwen3next-80b": 8}  # layers do not change the errors

SHAPES = {  # of no model: head widths, vocabularies and ratios that the published ones leave out
    model.name: model
    for model in (
        Model("head-64", "llama", 6, attention(embd=2048, ff=5632, heads=32, heads_kv=4, vocab=32000), {}),
        Model("head-80", "qwen2", 5, attention(embd=2560, ff=6912, heads=32, heads_kv=32, vocab=50304), {}),
        Model("head-96", "llama", 4, attention(embd=3072, ff=8192, heads=32, heads_kv=8, vocab=65024), {}),
        Model("head-112", "llama", 4, attention(embd=1792, ff=4864, heads=16, heads_kv=2, vocab=100352), {}),
        Model("head-256", "qwen3", 4, attention(embd=1024, ff=4096, heads=8, heads_kv=4, head=256, vocab=131072), {}),
        Model("wide-vocabulary", "llama", 3, attention(embd=768, ff=2048, heads=12, heads_kv=4, vocab=262144), {}),
        Model("narrow-ff", "qwen3", 4, attention(embd=4096, ff=2048, heads=32, heads_kv=8, vocab=32000), {}),
        Model("many-heads", "qwen3", 4, attention(embd=2048, ff=6144, heads=64, heads_kv=8, head=128, vocab=98304), {}),
        Model(
            "window-4096", "gemma3", 8,
            attention(embd=2304, ff=9216, heads=8, heads_kv=4, head=256, vocab=256000),
            {"attention.sliding_window": 4096, "attention.sliding_window_pattern": [True, False] * 4}, True,
        ),
        Model(
            "few-experts", "qwen3moe", 4,
            attention(embd=4096, ff=14336, heads=32, heads_kv=8, vocab=32000, experts=8, used=2, ff_exp=14336), {},
        ),
        Model(
            "many-experts", "qwen3moe", 4,
            attention(
                embd=1024, ff=2048, heads=16, heads_kv=8, head=128, vocab=64000, experts=256, used=16, ff_exp=256
            ),
            {},
        ),
    )
}  # fmt: skip

SETTINGS = (
    Setting(512, output_rows=512),
    Setting(2048, output_rows=512),
    Setting(4096),
    Setting(4096, ubatch=64, output_rows=1),
    Setting(8192, flash_attention=True, kv_k="q8_0", kv_v="q8_0"),
    Setting(8192, flash_attention=True, kv_k="q4_0", kv_v="q4_0", ubatch=128),
    Setting(8192, flash_attention=False),
    Setting(3000, flash_attention=False, ubatch=128, output_rows=512, swa_full=True),
    Setting(16384, batch=2048, ubatch=1024, parallel=4, output_rows=4),
    Setting(16384, batch=2048, ubatch=512, parallel=4, output_rows=4, unified=True),
    Setting(32768, flash_attention=True, output_rows=1),
    Setting(32768, flash_attention=False, output_rows=1, kv_k="f32", kv_v="f32"),
    Setting(131072, flash_attention=True, output_rows=1),
    Setting(131072, batch=2048, ubatch=2048, flash_attention=True),
    Setting(131072, flash_attention=False, ubatch=256),
    Setting(4096, batch=512, ubatch=512, parallel=2, flash_attention=False, output_rows=512),
)
QUICK = (SETTINGS[1], SETTINGS[4], SETTINGS[6], SETTINGS[8])


@dataclass(frozen=True)
class Row:
    """One model in one setting: signed errors of tier B as shares of tier A, by part."""

    model: str
    setting: Setting
    errors: dict[str, float]
    unknown: dict[str, float]


def models(quick: bool = False) -> list[Model]:
    """What is compared."""
    every = [*PUBLISHED.values(), *SHAPES.values()]
    chosen = [each for each in every if each.name in ("smollm2-135m", "qwen3-4b", "few-experts")] if quick else every
    return [replace(each, n_layer=min(each.n_layer, _SMALLER.get(each.name, 16))) for each in chosen]


def layouts(chosen: Sequence[Model], settings: Sequence[Setting]) -> list[list[dict[str, Any]]]:
    """Tier A: what the engine lays out, all in one child."""
    with tempfile.TemporaryDirectory(prefix="llmkit-") as folder:
        requests = [
            {
                "path": str(model.write(Path(folder) / f"{index}.gguf")),
                "model_params": engine.safe_model_params(),
                "contexts": [setting.context_params() for setting in settings],
            }
            for index, model in enumerate(chosen)
        ]
        found: list[list[dict[str, Any]]] = engine.run_in_child(
            function="llmkit.engine.breakdown:layouts", arguments={"models": requests}, timeout=600
        )
    return found


def compare(chosen: Sequence[Model], settings: Sequence[Setting]) -> list[Row]:
    """Every model in every setting that the engine accepts."""
    rows = []
    for model, answers in zip(chosen, layouts(chosen, settings), strict=True):
        known = shape.of_metadata(model.metadata(), tied=model.tied)
        weights = assumed.weights_nbytes(known, "F16")
        for setting, answer in zip(settings, answers, strict=True):
            if "error" in answer:
                print(f"{model.name}: {answer['error']}", file=sys.stderr)
                continue
            exact = _exact(answer, known, setting)
            guesses = [
                _parts(closed_form(each, setting, weights)) for each in (known, replace(known, architecture="unknown"))
            ]
            rows.append(
                Row(
                    model.name,
                    setting,
                    *({part: _error(guess[part], exact[part]) for part in PARTS} for guess in guesses),
                )
            )
    return rows


def _exact(answer: dict[str, Any], known: shape.Shape, setting: Setting) -> dict[str, int]:
    weights, context, compute = (sum(row[index] for row in answer["buffers"].values()) for index in range(3))
    # the log tells the output buffer to a hundredth of a MiB: where that is all that differs, it is the same
    output = 4 * known.n_vocab * setting.parallel
    if abs(answer["output"] - output) > 0.011 * (1 << 20):
        output = answer["output"]
    beside = context + compute + output
    return dict(zip(PARTS, (context, compute, output, beside, beside + weights), strict=True))


def _parts(found: ClosedForm) -> dict[str, int]:
    context = sum(found.kv.values()) + found.recurrent
    figures = (context, found.compute, found.output, found.nbytes - found.weights, found.nbytes)
    return dict(zip(PARTS, figures, strict=True))


def _error(found: int, exact: int) -> float:
    return found / exact - 1 if exact else float(found != 0)


def weight_errors(chosen: Iterable[Model]) -> dict[str, dict[str, float]]:
    """By quant and model: the error of the assumed mix against the engine's dry run."""
    kinds = {kind.name.lower(): kind for kind in TENSOR_TYPES.values()}
    labels = [label for label, each in QUANTS.items() if each.default is not None]
    errors: dict[str, dict[str, float]] = {label: {} for label in labels}
    with tempfile.TemporaryDirectory(prefix="llmkit-") as folder:
        for model in chosen:
            path = model.write(Path(folder) / "model.gguf")
            sizes = {name: size for name, size, _ in model.tensors()}
            known = shape.of_metadata(model.metadata(), tied=model.tied)
            recipes = [
                {
                    "name": label, "flags": {"ftype": QUANTS[label].ftype, "only_copy": False, "pure": False},
                    "overrides": [], "imatrix": True,
                }
                for label in labels
            ]  # fmt: skip
            answers = engine.run_in_child(
                function="llmkit.quantize.oracle:dry_runs",
                arguments={"path": str(path), "recipes": recipes},
                timeout=300,
            )
            for label, answer in zip(labels, answers, strict=True):
                exact = sum(tensor_nbytes(sizes[name], kinds[kind.lower()]) for name, kind in answer["types"].items())
                errors[label][model.name] = _error(assumed.weights_nbytes(known, label), exact)
    return errors


def summary(errors: Iterable[float]) -> tuple[float, float]:
    """Median and worst of the absolute errors."""
    absolute = [abs(error) for error in errors]
    return statistics.median(absolute), max(absolute)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few models and settings")
    parser.add_argument("--json", action="store_true", help="every combination, as JSON")
    options = parser.parse_args()
    chosen = models(options.quick)
    rows = compare(chosen, QUICK if options.quick else SETTINGS)
    weights = weight_errors(chosen)
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "weights": weights}, indent=1))
        return
    print(f"{len(rows)} combinations of {len(chosen)} shapes and {len(QUICK if options.quick else SETTINGS)} settings")
    print(f"{'error of tier B':20} {'median':>9} {'worst':>9}   {'family unknown':>9} {'worst':>9}")
    for part in PARTS:
        known = summary(row.errors[part] for row in rows)
        unknown = summary(row.unknown[part] for row in rows)
        print(f"{part:20} {known[0]:9.3%} {known[1]:9.3%}   {unknown[0]:14.3%} {unknown[1]:9.3%}")
    exact = sum(row.errors["compute"] == 0 for row in rows)
    print(f"compute buffer equal to the byte in {exact} of {len(rows)}")
    for row in sorted(rows, key=lambda row: -abs(row.errors["sum beside weights"]))[:3]:
        print(f"  worst: {row.model}, context {row.setting.context}: {row.errors['sum beside weights']:+.3%}")
    everything = [error for by_model in weights.values() for error in by_model.values()]
    median, worst = summary(everything)
    print(f"weights, assumed mix of {len(weights)} quants: median {median:.3%}, worst {worst:.3%} of {len(everything)}")
    label, name = max(
        ((label, name) for label, by_model in weights.items() for name in by_model),
        key=lambda pair: math.fabs(weights[pair[0]][pair[1]]),
    )
    print(f"  worst: {name} in {label}: {weights[label][name]:+.2%}")


if __name__ == "__main__":
    main()
