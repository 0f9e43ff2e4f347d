"""Show what the samplers do with the real logits after a text: stages, temperatures, softmax, draws.

Raw probabilities are the model's own, before any sampler; sampled probabilities are those after all stages, from which
a chat draws. All are measured on this model, none is made up.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .. import models, output, sampling_arguments
from ..quantize import count_argument
from . import views

if TYPE_CHECKING:
    from ...inspection.temperature import Draws, Fate, Grid, Softmax, StageView, Trace
    from ...inspection.tokens import Odds

EXAMPLES = (
    'llmkit inspect temperature "The capital of France is" --model model.gguf',
    'llmkit inspect temperature "Once upon a time" --model model.gguf --temperatures 0.5,1,2 --token dragon',
    'llmkit inspect temperature "Name a colour." --chat --model model.gguf --sample 1000',
    'llmkit inspect temperature "2 + 2 =" --model model.gguf --order temperature,top-k,min-p --top-k 10',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TEXT, the model, the position, what to show, and how to sample."""
    views.add_text(parser)
    views.add_model(parser)
    views.add_at(parser)
    parser.add_argument("--temperatures", type=_temperatures, metavar="T,…", help="the grid (default 0 to 2 by 0.25)")
    parser.add_argument("--sample", type=count_argument, metavar="N", help="draw N times and count")
    views.add_token(parser, "tell this token's fate")
    views.add_top(parser, 4)
    views.add_json(parser)
    sampling_arguments.add_arguments(parser, without=frozenset({"max_tokens"}))


def run(args: argparse.Namespace) -> int:
    """Evaluate the text once, and show what the samplers make of it."""
    from ...inspection import temperature, tokens

    sampling = sampling_arguments.sampling(args)
    grid_of = args.temperatures or temperature.TEMPERATURES
    with models.opened(args) as backend:
        ids = views.tokens_of(backend, views.text_of(args.text), args.chat)
        asked = [tokens.find(backend, word) for word in args.token]
        place = temperature.at(backend, ids, args.at)
        trace = temperature.trace(place, sampling, tokens=asked, top=args.top)
        grid = temperature.grid(place, sampling, grid_of, top=args.top)
        softmax = temperature.numbers(place, sampling.temperature or 1.0, top=args.top)
        draws = args.sample and temperature.sample_many(place, sampling, args.sample, seed=sampling.seed or 0)
    if args.json:
        found = {"sampling": sampling.to_json(), "trace": trace, "grid": grid, "softmax": softmax}
        output.emit_json({**found, "draws": draws} if draws else found)
        return 0
    _show_trace(trace)
    _show_grid(grid)
    _show_softmax(softmax)
    if draws:
        _show_draws(draws)
    else:
        views.suggest(args, "temperature", "--sample", "1000")
    return 0


def _temperatures(text: str) -> list[float]:
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= each < float("inf") for each in found):
        raise argparse.ArgumentTypeError(f"{text!r}: expected temperatures of 0 or more between commas, as 0,0.7,1.5")
    return found


def _listed(odds: tuple[Odds, ...]) -> str:
    return "  ".join(f"{each.piece} {views.percent(each.probability)}" for each in odds)


def _show_trace(trace: Trace) -> None:
    output.emit(f"After token {trace.position}: {trace.context}")
    output.emit()
    rows = [(view.label, f"{view.survivors:,}", _removed(view), _listed(view.top)) for view in trace.stages]
    output.table(("stage", "tokens left", "removed (with its probability before)", "likeliest then"), rows, "lr")
    output.emit()
    raw, sampled = trace.stages[0].top, trace.stages[-1].top
    width = max(output.columns(each.piece) for each in raw + sampled)
    for title, odds, entropy in (("raw", raw, trace.raw_entropy), ("sampled", sampled, trace.sampled_entropy)):
        output.emit(f"{title} probability, entropy {entropy:.2f} bits")
        for each in odds:
            _bar_line(each.piece, width, each.probability)
    if trace.xtc:
        output.emit("This is the case where xtc applies; below both cases are taken together, by its probability.")
    for fate in trace.fates:
        output.emit(_fate_words(fate, trace.stages))
    output.emit()


def _removed(view: StageView) -> str:
    if not view.removed_count:
        return ""
    shown = _listed(view.removed[:2])
    words = "1 token" if view.removed_count == 1 else f"{view.removed_count:,} tokens"
    return f"{words}, {views.percent(view.removed_mass)} together: {shown}{' …' * (view.removed_count > 2)}"


def _fate_words(fate: Fate, stages: tuple[StageView, ...]) -> str:
    begin = f"{fate.piece} (#{fate.id}): raw {views.percent(fate.raw_probability)}, rank {fate.rank:,}; "
    if fate.removed_by is None:
        return begin + f"stays, sampled {views.percent(fate.sampled_probability)}"
    gone = next(index for index, view in enumerate(stages) if view.name == fate.removed_by)
    return begin + f"removed by {stages[gone].label}, where it came with {views.percent(fate.path[gone - 1])}"


def _show_grid(grid: Grid) -> None:
    output.emit("Sampled probability at each temperature, all other stages as above:")
    rows, colours = [], []
    for heat in grid.rows:
        cells = [f"{views.bar(p, 6)} {views.percent(p)}" if p else "removed" for p in heat.sampled]
        rows.append((f"{heat.temperature:g}", f"{heat.survivors[-1][1]:,}", f"{heat.entropy:.2f}", *cells))
        colours.append([None, None, None, *(output.probability_colour(p) for p in heat.sampled)])
    titles = [each.piece for each in grid.tokens]
    output.table(("T", "left", "entropy", *titles), rows, "rrr", colours)
    if len(grid.rows) > 1 and len({heat.survivors[-1][1] for heat in grid.rows if heat.temperature}) == 1:
        output.emit("The same tokens are left at every temperature: what cuts comes first (--order changes that).")
    output.emit()


def _show_softmax(shown: Softmax) -> None:
    output.emit(f"Softmax at T = {shown.temperature:g}, of all {shown.count:,} raw logits x, nothing cut:")
    rows = [
        (row.piece, f"{row.logit:.4f}", f"{row.divided:.4f}", f"{row.shifted:.4f}", f"{row.power:.3e}",
         f"{row.probability:.4f}")
        for row in shown.rows
    ]  # fmt: skip
    output.table(("token", "x", "x/T", f"x/T - {shown.maximum:.4f}", "exp", "exp / sum"), rows, "lrrrrr")
    output.emit(f"sum of all {shown.count:,} exp: {shown.total:.4f}")
    naive = (
        "is no float32, which ends at exp(88.7)"
        if shown.naive_total == float("inf")
        else f"would be {shown.naive_total:.3e}"
    )
    output.emit(
        "The maximum is taken off first. It divides out, so no probability changes, and the largest exp is 1;"
        f" without that the sum {naive}."
    )
    output.emit()


def _show_draws(draws: Draws) -> None:
    output.emit(f"{draws.number:,} draws, seed {draws.seed}, beside the sampled probability shown:")
    rows = [
        (row.piece, views.percent(row.sampled_probability), f"{row.expected:.1f}", f"{row.counted:,}",
         views.bar(row.counted / draws.number, 20))
        for row in draws.rows
    ]  # fmt: skip
    output.table(("token", "sampled probability", "expected", "counted", ""), rows, "lrrr")
    output.emit(
        f"chi-square {draws.chi_square:.2f}, degrees of freedom {draws.degrees}, p = {draws.p_value:.3g}:"
        f" draws that fit are at least this far off in {views.percent(draws.p_value)} of all cases."
    )


def _bar_line(piece: str, width: int, probability: float) -> None:
    room = " " * (width - output.columns(piece))
    bar = output.paint(views.bar(probability, 30), colour=output.probability_colour(probability))
    output.emit(f"  {output.printable(piece)}{room}  {bar} {views.percent(probability)}")
