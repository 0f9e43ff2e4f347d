"""What MODEL means on the command line: here already, or planned, shown and fetched; made, where a quant was named.

Every verb asks here, so that each takes the same names; and each that runs a model opens it here.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LlmkitError, Unsupported
from . import output

if TYPE_CHECKING:
    from ..backends import Backend
    from ..hub import DownloadPlan, FileDone, Shadow
    from ..quantize import Plan, Result

MODEL_HELP = "org/name[@revision][:QUANT] of the Hub, a folder, or a .gguf file"
RUN_HELP = "a .gguf file, org/name:QUANT of the Hub, or a folder of MLX"
MOST_LAYERS = 2**31 - 1
MOST_THREADS = 512  # the engine's own limit (ggml/include/ggml.h: GGML_MAX_N_THREADS)


@dataclass(frozen=True)
class Source:
    """A model to read: `path`, here whole, or where `shadow` stands for what `download` would bring: headers only."""

    path: Path
    download: DownloadPlan | None = None
    shadow: Shadow | None = None

    @property
    def name(self) -> str:
        """Where it is, for people: the path here, or the repository and the file in it."""
        first = self.download and self.download.choice.first
        return f"{self.download.repository.name}: {first.path}" if self.download and first else str(self.path)


def source(text: str, *, low_disk: bool = False) -> AbstractContextManager[Source]:
    """What the user typed, as something to read headers from; kilobytes come where it is not on this machine.

    With `low_disk` its shadow can take in the shards, one after another.
    """
    from .. import hub, model

    ref = model.parse(text)
    found = hub.find(ref)
    return nullcontext(Source(found)) if found else _cast(hub.plan(ref, on_wait=output.note), low_disk)


@contextmanager
def _cast(planned: DownloadPlan, low_disk: bool = False) -> Iterator[Source]:
    from .. import hub

    if not any(each.fetch_nbytes for each in planned.files):  # whole in the cache, but for the links
        yield Source(fetch(planned))
        return
    with (
        output.ProgressBar() as bar,
        hub.cast(planned, kept=low_disk, on_progress=bar, on_remark=_telling(bar)) as shadow,
    ):
        bar.clear()
        came = output.size(shadow.fetched_nbytes)
        output.note(f"{planned.ref}: headers and small files read, {came} came over the network")
        with _as_named(shadow):
            yield Source(shadow.path, planned, shadow)


@contextmanager
def outline(text: str) -> Iterator[Source]:
    """As `source`, but of a model that is not here the headers and config.json alone: enough to measure it."""
    from .. import hub, model
    from ..hub.choice import INDEX

    ref = model.parse(text)
    if found := hub.find(ref):
        yield Source(found)
        return
    planned = hub.plan(ref, on_wait=output.note)
    names = ("config.json", INDEX)
    with hub.outline(planned, names, on_remark=output.note) as shadow:
        output.note(f"{ref}: headers read, {output.size(shadow.fetched_nbytes)} came over the network")
        with _as_named(shadow):
            yield Source(shadow.path, planned, shadow)


@contextmanager
def _as_named(shadow: Shadow) -> Iterator[None]:
    """Let errors name the repository where they name the shadow's folder, which nobody knows and which will be gone."""
    name = shadow.plan.repository.name

    def said(text: str) -> str:
        return text.replace(f"{shadow.folder}{os.sep}", f"{name}: ").replace(str(shadow.folder), name)

    try:
        yield
    except LlmkitError as error:
        error.message, error.hint = said(error.message), error.hint and said(error.hint)
        raise


def tell_plan(planned: DownloadPlan, *, stays: bool = True) -> None:
    """The plan in a few lines, on stderr: what, how much, room, terms, what is left out; `stays`: it is kept, where."""
    repository = planned.repository
    facts = (
        repository.licence and f"licence {repository.licence}",
        repository.gated and "gated",
        repository.private and "private",
    )
    terms = ", ".join(fact for fact in facts if fact)
    output.note(f"{planned.ref}, commit {repository.commit[:8]}{f' ({terms})' if terms else ''}")
    for remark in planned.remarks:
        output.note(f"note: {remark}")
    missing = planned.fetch_nbytes
    here = planned.nbytes - missing
    output.note(
        f"fetch  {output.size(missing)} in {sum(each.fetch_nbytes > 0 for each in planned.files)} of"
        f" {len(planned.files)} files" + (f"; {output.size(here)} are here already" if here and missing else "")
    )
    if stays:
        fits = "enough" if missing <= planned.free_nbytes else "NOT enough"
        output.note(f"into   {planned.folder}  ({output.size(planned.free_nbytes)} free: {fits})")
    if planned.choice.left_out:
        output.note("left   " + "; ".join(f"{count} {reason}" for reason, count in planned.choice.left_out.items()))


def fetch(planned: DownloadPlan, *, workers: int = 4, on_file: Callable[[FileDone], None] | None = None) -> Path:
    """Fetch with one bar over all, a line for each file that is done; returns what to open."""
    from .. import hub

    with output.ProgressBar() as bar:

        def note(done: FileDone) -> None:
            if on_file:
                on_file(done)
            tell_file(done, bar)

        return hub.fetch(planned, workers=workers, on_progress=bar, on_file=note, on_remark=_telling(bar))


def tell_file(done: FileDone, bar: output.ProgressBar) -> None:
    """A line for a file that is whole now, unless it was here before."""
    if done.how != "here":
        bar.clear()
        output.note(f"  {output.one_line(done.path)}  {output.size(done.size)}  {_HOW[done.how]}")


def _telling(bar: output.ProgressBar) -> Callable[[str], None]:
    def remark(text: str) -> None:
        bar.clear()
        output.note(f"  {output.one_line(text)}")

    return remark


def telling(shadow: Shadow, bar: output.ProgressBar) -> Shadow:
    """The shadow, telling on the terminal of the weights it fetches."""
    return replace(shadow, on_file=lambda done: tell_file(done, bar), on_remark=_telling(bar))


_HOW = {"fetched": "fetched, verified", "resumed": "gone on with, verified", "linked": "linked from the cache"}


# ── a model that runs ──


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """--backend, --gpu-layers and --threads, which `opened` reads."""
    from ..backends import choice

    def threads(text: str) -> int:
        return _whole(text, 1, MOST_THREADS)

    def layers(text: str) -> int | str:
        return text if text == "auto" else _whole(text, 0, MOST_LAYERS)

    parser.add_argument(
        "--backend",
        choices=choice.NAMES,
        default=choice.AUTO,
        help="what computes (default: MLX for its folders, else llama.cpp)",
    )
    parser.add_argument(
        "--gpu-layers", type=layers, metavar="N|auto", help="layers on the GPU (default auto: as many as fit)"
    )
    parser.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: all)")


def _whole(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text[:20]) <= most):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
    return int(text)


@contextmanager
def opened(args: argparse.Namespace, text: str | None = None) -> Iterator[Backend]:
    """The model `text` (default: args.model), found or fetched or made, loaded with a bar, closed at the end.

    Reads args.backend, gpu_layers, threads and context, those there are. Raises as `runnable` and `backends.load`.
    """
    from .. import backends, store
    from ..backends import choice

    wanted = getattr(args, "backend", choice.AUTO)
    path = runnable(args.model if text is None else text, wanted)
    chosen = choice.choose(path, wanted)
    layers = getattr(args, "gpu_layers", None)
    if chosen == choice.LLAMACPP:
        layers = gpu_layers(layers, path, getattr(args, "context", None))
    elif layers not in (None, "auto"):
        raise Unsupported(f"--gpu-layers is about llama.cpp, and {path} is run by {chosen}")
    if chosen == choice.TRANSFORMERS:
        _require_memory(path)
    with output.ProgressBar() as bar:
        backend = backends.load(
            path,
            backend=chosen,
            n_threads=getattr(args, "threads", None),
            gpu_layers=layers if isinstance(layers, int) else None,
            on_progress=bar,
        )
    try:
        store.remember_model(path)
        yield backend
    finally:
        backend.close()


def _require_memory(folder: Path) -> None:
    """Raise NotEnoughRoom unless a checkpoint fits into memory in 32 bits: the system would end the process."""
    from math import prod

    from .. import checkpoint
    from ..errors import NotEnoughRoom
    from ..memory.devices import machine

    needed = sum(4 * prod(tensor.shape) for tensor in checkpoint.read(folder).tensors.values())
    available = machine.ram().available
    if available is not None and needed > available:
        what = f"{folder}: takes {output.size(needed)} as the backend transformers runs it (float32)"
        hint = f"A quant takes less: llmkit quantize {output.shell_word(folder)} Q4_K_M"
        raise NotEnoughRoom(f"{what}, {output.size(available)} are free", hint)


def gpu_layers(wanted: int | str | None, path: Path, context: int | None = None) -> int | None:
    """The layers of the GGUF `path` for GPUs: a number as it is; "auto" or None by the estimator, told on stderr.

    0 where the engine's build knows no GPU (told only where "auto" was asked for); None, all layers, where the
    estimator fails.
    """
    import sys

    from .. import engine

    if isinstance(wanted, int):
        return wanted
    if not engine.load().gpu_offload():
        if wanted is not None:
            output.note("--gpu-layers auto: 0, this build of the engine is for the CPU alone")
        return 0
    from ..memory import offload
    from ..memory.devices import machine

    try:
        gpus = [(each.description or each.name, each.free) for each in machine.gpus()]
        found = offload.of_gpus(path, gpus, context=context, metal=sys.platform == "darwin")
    except LlmkitError as error:
        output.note(f"--gpu-layers auto: all, as the estimator fails: {error.message.splitlines()[0]}")
        return None
    output.note(f"--gpu-layers auto: {found.words}")
    return found.gpu_layers


def runnable(text: str, backend: str = "auto") -> Path:
    """What to run for what the user typed: a GGUF, made once where a checkpoint and a quant were named; or a folder.

    A folder only where it is MLX's or `backend` runs checkpoints. Raises LlmkitError when only a checkpoint was named:
    which quant is for the user to say.
    """
    from .. import hub, model
    from ..backends import choice
    from ..hub import inventory

    ref = model.parse(text)
    if ref.path is not None:
        choice.choose(ref.path, backend)
        return ref.path
    if ref.quant and backend == choice.TRANSFORMERS:
        raise Unsupported(f"{ref}: names a quant, and the backend transformers runs checkpoints", f"Name {ref.repo}.")
    folder = inventory.made_folder(ref)
    made = folder / f"{ref.name}-{ref.quant}.gguf"
    if ref.quant and made.is_file():
        return made
    found = hub.find(ref)
    planned = None if found else hub.plan(ref, on_wait=output.note)
    if found and found.is_file():
        return found
    if planned and planned.choice.kind == "gguf":
        tell_plan(planned)
        return fetch(planned)
    if ref.quant is None:
        if not (choice.runs_folders(backend) or _is_mlx(found, planned)):
            hint = f"For instance {ref}:Q4_K_M; or run the checkpoint as it is, by PyTorch: --backend transformers"
            raise LlmkitError(f"{ref}: is a checkpoint, and no quant was named", hint)
        if planned:
            tell_plan(planned)
            return fetch(planned)
        return found or folder
    _make_once(ref.quant, made, _cast(planned) if planned else nullcontext(Source(found or folder)))
    return made


def _is_mlx(found: Path | None, planned: DownloadPlan | None) -> bool:
    """Whether a checkpoint of the Hub is in MLX's format; of one that is not here config.json is read."""
    from ..backends import choice
    from ..hub.download import remote_file
    from ..hub.wire import read_range

    if found or not planned:
        return found is not None and choice.is_mlx_folder(found)
    file = next((each.file for each in planned.files if each.file.path == "config.json"), None)
    return file is not None and choice.is_mlx(read_range(remote_file(planned.repository, file), 0, file.nbytes))


def _make_once(label: str, path: Path, opened: AbstractContextManager[Source]) -> None:
    """Make the GGUF `path` of a checkpoint, which is fetched when its headers have shown that this can be done."""
    from .. import convert, quantize, store
    from ..hub import inventory
    from ..quants import quant

    store.make_folder(path.parent, inventory.ANOTHER_HOME)
    recipe = quantize.Recipe(quant(label))

    def plan(checkpoint: Path) -> Plan:
        return quantize.plan(convert.open_draft(checkpoint), [recipe], path.parent, file=path)

    with opened as source:
        planned = plan(source.path)
        if source.download:
            tell_plan(source.download)
            output.note(f"make   {output.size(planned.nbytes)}, once: {path}")
            store.require_rooms(rooms(planned, source.download), "Free some room: `llmkit list`, `llmkit rm`.")
            planned = plan(fetch(source.download))
    make(planned, force=True)


def rooms(planned: Plan, download: DownloadPlan) -> list[tuple[Path, int]]:
    """(folder, bytes) of what comes and of what is written."""
    written = [(file.path.parent, file.nbytes) for each in planned.outputs for file in each.files]
    return [(download.cache.root, download.fetch_nbytes), *written]


def made_in(checkpoint: Path, label: str, folder: Path) -> Path:
    """A GGUF of a checkpoint in `folder`, for a purpose that needs the file only for a while."""
    from .. import convert, quantize
    from ..quants import quant

    planned = quantize.plan(convert.open_draft(checkpoint), [quantize.Recipe(quant(label))], folder)
    make(planned)
    return planned.outputs[0].path


def make(
    planned: Plan, *, force: bool = False, threads: int | None = None, shadow: Shadow | None = None
) -> list[Result]:
    """Check the outputs, then run the plan with a bar; tells what was there and what was resumed.

    With a `shadow` its shards are fetched and released on the way.
    """
    from .. import quantize

    left = quantize.check_outputs(planned, force=force)
    for made in planned.outputs:
        if made not in left.outputs:
            output.note(f"{made.path}: made already from this source by this recipe; nothing to do")
    with output.ProgressBar() as bar:
        if shadow is None:
            results = quantize.run(left, threads=threads, on_progress=bar)
        else:
            results = quantize.run_low_disk(left, telling(shadow, bar), threads=threads, on_progress=bar)
    for result in results:
        if result.resumed:
            output.note(f"{result.output.path}: resumed, {result.resumed} tensors were done before")
    return results
