"""memory/offload.py and `--gpu-layers auto`: the most layers that fit, by the estimator, for GPUs that are not here."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from conftest import GgufOf, TinyCheckpoint
from llmkit import convert, engine
from llmkit.backends import choice
from llmkit.cli import models
from llmkit.memory import devices, estimate, offload, split
from llmkit.memory.devices import machine
from llmkit.memory.setting import RUNTIMES

GIB = 1 << 30


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: TinyCheckpoint, gguf_of: GgufOf) -> Path:
    return gguf_of(tiny_checkpoint("llama", dtype="f32", layers=7, width=256), "f32")


def test_all_layers_on_a_card_with_room(tiny: Path) -> None:
    card = devices.find("RTX 4090")
    found = offload.of_gpus(tiny, [(card.name, devices.usable_nbytes(card))])
    assert (found.gpu_layers, found.total, found.context) == (8, 8, 4096)
    assert "8 of 8 layers" in found.words and "RTX 4090" in found.words and "derived" in found.words
    assert 0 < found.needed[0] <= found.free[0]


def test_as_many_as_fit_is_what_the_split_says(tiny: Path) -> None:
    """On a device with just enough for some: one layer more would be too much."""
    draft = convert.open_draft(tiny)
    setting = RUNTIMES["llmkit"].with_context(512)
    measured = estimate.estimate(draft, estimate.variants(draft, [estimate.COPY]), [setting])[0][0]
    for wanted in (3, 5):
        place = split.split(draft, measured, [("G", 10 * GIB)], gpu_layers=wanted, context_nbytes=(0, 0)).devices[0]
        found = offload.of_gpus(tiny, [("G", place.nbytes)], context=512, metal=True)
        assert found.gpu_layers == wanted
        assert f"{wanted} of 8 layers" in found.words and "as many as fit" in found.words
        less = offload.of_gpus(tiny, [("G", place.nbytes - 1)], context=512, metal=True)
        assert less.gpu_layers == wanted - 1


def test_none_where_not_even_one_fits_or_no_gpu_is_there(tiny: Path) -> None:
    assert offload.of_gpus(tiny, [("small", 1 << 20)]).gpu_layers == 0
    assert "not even one" in offload.of_gpus(tiny, [("small", 1 << 20)]).words
    assert offload.of_gpus(tiny, []).gpu_layers == 0


def test_two_cards_share(tiny: Path) -> None:
    found = offload.of_gpus(tiny, [("A", 24 * GIB), ("B", 24 * GIB)])
    assert found.gpu_layers == 8 and all(found.needed)


def test_the_door(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert models.gpu_layers(7, tiny) == 7
    monkeypatch.setattr(engine.load(), "gpu_offload", lambda: False)
    assert models.gpu_layers(None, tiny) == 0 and capsys.readouterr().err == ""
    assert models.gpu_layers("auto", tiny) == 0 and "CPU alone" in capsys.readouterr().err
    monkeypatch.setattr(engine.load(), "gpu_offload", lambda: True)
    monkeypatch.setattr(machine, "gpus", lambda: (machine.Gpu("CUDA0", "RTX 4090", 20 * GIB, 24 * GIB),))
    assert models.gpu_layers(None, tiny, 512) == 8
    told = capsys.readouterr().err
    assert "8 of 8 layers" in told and "RTX 4090 (20.0 GiB free)" in told and "512 tokens" in told


def test_the_options_are_read() -> None:
    parser = argparse.ArgumentParser()
    models.add_backend_arguments(parser)
    args = parser.parse_args(["--backend", "mlx", "--gpu-layers", "auto", "--threads", "2"])
    assert (args.backend, args.gpu_layers, args.threads) == ("mlx", "auto", 2)
    assert parser.parse_args(["--gpu-layers", "12"]).gpu_layers == 12
    assert parser.parse_args([]).backend == choice.AUTO
    for wrong in (["--gpu-layers", "-1"], ["--gpu-layers", "some"], ["--threads", "0"], ["--backend", "cuda"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
