"""llmkit estimate as a user meets it: tables, parts, runtimes, places, techniques, reality, and models far away."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import desks
from conftest import ROOT, Cli, GgufOf, TinyCheckpoint, cli_environment
from desks import ODD, QUANTIZED, TINY, Desk
from llmkit import gguf, gguf_writer
from llmkit.gguf import Value
from llmkit.memory import devices
from llmkit.memory.table import LABELS

root, serving, desk = desks.root, desks.serving, desks.desk
Ask = Callable[..., dict[str, Any]]
MIB = 1 << 20


@pytest.fixture(scope="module")
def ask(cli: Cli) -> Ask:
    """`llmkit estimate … --json`, which must succeed → its answer; the same words are asked once.

    A place is named where a test names none: to measure this machine takes time.
    """
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def run(*words: object) -> dict[str, Any]:
        key = tuple(map(str, words if "--fit" in words else (*words, "--fit", "8GB")))
        if key not in known:
            done = cli("estimate", *key, "--json")
            assert done.returncode == 0, done.stderr
            known[key] = json.loads(done.stdout)
        return known[key]

    return run


@pytest.fixture(scope="module")
def refused(cli: Cli) -> Callable[..., str]:
    """`llmkit estimate …`, which must end with an error for the user → what it says."""

    def run(*words: object) -> str:
        done = cli("estimate", *words)
        assert (done.returncode, done.stdout) == (1, ""), done.stdout + done.stderr
        assert done.stderr.count("llmkit: error:") == 1 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    return run


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", width=256, layers=2)


@pytest.fixture(scope="module")
def other_header(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """SmolLM2's file without weights, with another architecture or numbers in its header."""
    file = gguf.read(smollm2_gguf)
    rows = [(tensor.name, tensor.shape, tensor.type) for tensor in file.tensors.values()]

    def make(architecture: str = "llama", numbers: Mapping[str, int] | None = None) -> Path:
        found = {
            key.replace("llama.", f"{architecture}.", 1) if key.startswith("llama.") else key: value
            for key, value in file.metadata.items()
        }
        found["general.architecture"] = Value.string(architecture)
        found |= {f"{architecture}.{key}": Value.uint32(number) for key, number in (numbers or {}).items()}
        path = tmp_path_factory.mktemp("headers") / "model.gguf"
        gguf_writer.write_sparse(path, found, rows)
        return path

    return make


def one(answer: Mapping[str, Any]) -> dict[str, Any]:
    (row,) = answer["rows"]
    found: dict[str, Any] = row
    return found


def part(row: Mapping[str, Any], name: str) -> int:
    return sum(each["nbytes"] for each in row["parts"] if each["name"] == name)


def add_up(row: Mapping[str, Any]) -> None:
    """Parts of parts are their whole, and what is not evictable is what is needed."""
    for each in row["parts"]:
        assert each["how"] in ("measured", "derived", "looked up")
        if each["parts"]:
            assert sum(inner["nbytes"] for inner in each["parts"]) == each["nbytes"], each["name"]
    assert sum(each["nbytes"] for each in row["parts"] if not each["evictable"]) == row["needed_nbytes"]


# ── the table and the parts ──


def test_the_table_has_a_line_for_every_bit_width(tiny: Path, cli: Cli, ask: Ask) -> None:
    done = cli("estimate", tiny, "--fit", "1GB")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for column in ("file", "bits/weight", "RAM at 4,096", "longest context", "fits", "token reads", "published loss"):
        assert column in lines[0]
    assert [line.split()[0] for line in lines[1 : 1 + len(LABELS)]] == list(LABELS)
    assert "RAM: exact" in done.stdout and "looked up" in done.stdout and "billion operations" in done.stdout
    assert "next:" in done.stderr and f"llmkit quantize {tiny} " in done.stderr
    rows = ask(tiny, "--fit", "1GB")["rows"]
    assert [row["quant"] for row in rows] == list(LABELS)
    for row in rows:
        add_up(row)
        assert row["tier"] == "exact" and row["fits"] and row["longest_context"] >= 4096
    assert rows[0]["file_nbytes"] > rows[1]["file_nbytes"] > rows[-1]["file_nbytes"]


@pytest.mark.slow
def test_the_estimate_is_the_file_that_is_then_made(tiny: Path, cli: Cli, ask: Ask, tmp_path: Path) -> None:
    row = one(ask(tiny, "Q4_K_M"))
    assert cli("quantize", tiny, "Q4_K_M", "--out", tmp_path / "made.gguf").returncode == 0
    assert (tmp_path / "made.gguf").stat().st_size == row["file_nbytes"]
    again = one(ask(tmp_path / "made.gguf"))
    assert again["quant"] == "COPY" and part(again, "weights") == part(row, "weights")


def test_one_quant_part_by_part(smollm2_gguf: Path, cli: Cli, ask: Ask) -> None:
    """Weights, cache and compute buffer as found beforehand with the engine called by hand."""
    answer = ask(smollm2_gguf, "--context", 2048)
    row = one(answer)
    add_up(row)
    assert round(part(row, "weights") / MIB, 2) == 92.10 and part(row, "KV cache") == 45 * MIB
    assert answer["context_trained"] == 8192 and answer["runtime"] == "llmkit" and answer["fetched_nbytes"] == 0
    shown = cli("estimate", smollm2_gguf, "--context", 2048).stdout
    assert f"{row['needed_nbytes']:,}" in shown and "2,048 tokens of context" in shown
    assert shown.startswith("Q4_1, as it is") and "COPY" not in shown


def test_a_context_is_rounded_up_as_the_engine_does(smollm2_gguf: Path, cli: Cli, ask: Ask) -> None:
    row = one(ask(smollm2_gguf, "--context", 1000))
    assert row["context"] == 1024 and part(row, "KV cache") == 45 * MIB // 2
    assert "1,024 tokens of context (rounded up from 1,000)" in cli("estimate", smollm2_gguf, "--context", 1000).stdout


def test_the_longest_context_and_beyond(smollm2_gguf: Path, cli: Cli, ask: Ask) -> None:
    assert one(ask(smollm2_gguf, "--context", "max"))["context"] == 8192
    done = cli("estimate", smollm2_gguf, "--context", 10000, "--json")
    assert done.returncode == 0 and "trained for 8,192 tokens" in done.stderr
    assert one(json.loads(done.stdout))["context"] == 10240
    assert cli("estimate", smollm2_gguf, "--context", 2**31 - 1).returncode == 2


def test_the_longest_context_fits_and_the_next_does_not(smollm2_gguf: Path, ask: Ask) -> None:
    budget = 200_000_000
    longest = one(ask(smollm2_gguf, "--fit", budget))["longest_context"]
    assert 512 < longest < 4096 and not one(ask(smollm2_gguf, "--fit", budget))["fits"]
    assert one(ask(smollm2_gguf, "--fit", budget, "--context", longest))["needed_nbytes"] <= budget
    more = one(ask(smollm2_gguf, "--fit", budget, "--context", longest + 512))
    assert more["needed_nbytes"] > budget and more["longest_context"] == pytest.approx(longest, abs=256)


@pytest.mark.slow
def test_a_window_is_told(tiny_checkpoint: TinyCheckpoint, ask: Ask) -> None:
    """Gemma 3 keeps most layers' caches small; what a runtime keeps whole is larger."""
    small, whole = (
        one(ask(tiny_checkpoint("gemma3", layers=6), "Q8_0", "--runtime", name, "--context", 8192))
        for name in ("llmkit", "llama-cpp-python")
    )
    (cache,) = (each for each in small["parts"] if each["name"] == "KV cache")
    assert len(cache["parts"]) == 2 and any("window" in each["name"] for each in cache["parts"])
    assert cache["nbytes"] < part(whole, "KV cache")


# ── where it is to fit ──


def test_a_size_with_what_would_help(smollm2_gguf: Path, cli: Cli) -> None:
    done = cli("estimate", smollm2_gguf, "--fit", "150MB")
    assert done.returncode == 0
    assert "It does not fit: 143.1 MiB as asked." in done.stderr and "next:" not in done.stderr
    assert "KV cache in 8 bits (--kv-type q8_0)" in done.stderr and "--context 2048" in done.stderr


@pytest.mark.parametrize("runtime", [pytest.param("llmkit", marks=pytest.mark.slow), "llama-cpp-python"])
def test_options_that_are_advised_save_what_was_promised(runtime: str, smollm2_gguf: Path, cli: Cli, ask: Ask) -> None:
    words = (smollm2_gguf, "--runtime", runtime, "--fit", "8GB")
    told = cli("estimate", *words).stderr
    line = next(line for line in told.splitlines() if "KV cache in 8 bits (" in line)
    options = line.partition("(")[2].partition(")")[0].split()
    saved = one(ask(*words))["needed_nbytes"] - one(ask(*words, *options))["needed_nbytes"]
    assert line.split()[:2] == [f"{saved / MIB:.1f}", "MiB"]


def test_a_device_by_name(smollm2_gguf: Path, cli: Cli, ask: Ask) -> None:
    answer = ask(smollm2_gguf, "--fit", "RTX 4090")
    assert answer["devices"] == ["RTX 4090"]
    assert answer["budget_nbytes"] == devices.usable_nbytes(devices.find("RTX 4090"))
    row = one(answer)
    assert row["speed"]["ceiling"] == pytest.approx(1008e9 / row["token"]["read_nbytes"])
    assert row["speed"]["low"] < row["speed"]["high"] < row["speed"]["ceiling"]
    shown = cli("estimate", smollm2_gguf, "--fit", "RTX 4090")
    assert "Laid out as for a CPU" in shown.stdout and "On RTX 4090: " in shown.stdout
    assert ask(smollm2_gguf, "--fit", "DDR5-5600, 2 channels 32GB")["devices"] == ["DDR5-5600, 2 channels"]
    assert "96 GB are assumed" in cli("estimate", smollm2_gguf, "--fit", "M2 Max").stderr


@pytest.mark.slow
def test_two_devices_have_the_memory_of_both(smollm2_gguf: Path, ask: Ask) -> None:
    both = ask(smollm2_gguf, "--fit", "RTX 4090, RTX 3090")
    assert both["devices"] == ["RTX 4090", "RTX 3090"] and one(both)["speed"] is None
    alone = [ask(smollm2_gguf, "--fit", name)["budget_nbytes"] for name in both["devices"]]
    assert both["budget_nbytes"] == sum(alone)


def test_unknown_devices_come_with_the_nearest(refused: Callable[..., str], smollm2_gguf: Path) -> None:
    assert "RTX 4090" in refused(smollm2_gguf, "--fit", "rtx4099")


# ── settings ──


def test_runtimes_differ_as_they_do(smollm2_gguf: Path, ask: Ask) -> None:
    rows = {
        name: one(ask(smollm2_gguf, "--runtime", name))
        for name in ("llmkit", "llama-server", "llama-cpp-python", "ollama")
    }
    logits = 4 * 49152
    assert {name: part(row, "output buffer") // logits for name, row in rows.items()} == {
        "llmkit": 1, "llama-server": 4, "llama-cpp-python": 1, "ollama": 1,
    }  # fmt: skip
    # 512 rows of logits are reserved there
    assert part(rows["llama-cpp-python"], "compute buffer") >= 512 * logits > part(rows["llmkit"], "compute buffer")
    batches = ("--batch", 1024, "--ubatch", 1024)
    large = one(ask(smollm2_gguf, "--runtime", "llama-cpp-python", *batches))
    assert part(large, "compute buffer") >= 1024 * logits


@pytest.mark.slow
def test_conversations_of_the_server_share_a_cache_until_they_are_counted(smollm2_gguf: Path, ask: Ask) -> None:
    """llama.cpp tools/server/server.cpp: four slots and one cache, unless --parallel is given."""
    usual, four = (ask(smollm2_gguf, "--runtime", "llama-server", *more) for more in ((), ("--parallel", 4)))
    assert (usual["setting"]["parallel"], usual["setting"]["unified"]) == (4, True)
    assert (four["setting"]["parallel"], four["setting"]["unified"]) == (4, False)
    # one of the four reads its own cache alone
    reads = [one(each)["token"]["read_nbytes"] - part(one(each), "weights") for each in (usual, four)]
    assert reads[0] - reads[1] == 3 * part(one(four), "KV cache") // 4


def test_unknown_runtimes_and_types(refused: Callable[..., str], smollm2_gguf: Path) -> None:
    assert "llama-server" in refused(smollm2_gguf, "--runtime", "lama-server")
    assert "q8_0" in refused(smollm2_gguf, "--kv-type", "q8")
    assert "unknown quant 'Q9'" in refused(smollm2_gguf, "Q9")


@pytest.mark.slow
def test_types_of_the_cache(smollm2_gguf: Path, ask: Ask) -> None:
    found = {
        kind: part(one(ask(smollm2_gguf, "--kv-type", kind)), "KV cache")
        for kind in ("f32", "f16", "q8_0", "q4_0")
    }  # fmt: skip
    assert found == {"f32": 180 * MIB, "f16": 90 * MIB, "q8_0": 90 * MIB * 17 // 32, "q4_0": 90 * MIB * 9 // 32}


def test_a_combination_the_engine_refuses_is_an_error(refused: Callable[..., str], smollm2_gguf: Path) -> None:
    told = refused(smollm2_gguf, "--kv-type", "q8_0", "--no-flash-attention")
    assert "requires flash_attn" in told and "--kv-type f16" in told


def test_mlx(smollm2_gguf: Path, tiny: Path, cli: Cli, ask: Ask, refused: Callable[..., str]) -> None:
    rows = ask(smollm2_gguf, "--runtime", "mlx", "--fit", "M2 Max 64GB")["rows"]
    four = next(row for row in rows if (row["bits"], row["group"]) == (4, 64))
    assert four["bits_per_weight"] == pytest.approx(4.5, abs=0.02)
    shown = cli("estimate", tiny, "--runtime", "mlx", "--fit", "1MB")
    assert shown.returncode == 0 and "Derived" in shown.stdout and "no" in shown.stdout.split()
    assert "--techniques" in refused(tiny, "--runtime", "mlx", "--techniques")


# ── other questions ──


@pytest.mark.slow
def test_techniques(smollm2_gguf: Path, cli: Cli, ask: Ask) -> None:
    found = {each["name"]: each for each in ask(smollm2_gguf, "--techniques")["techniques"]}
    assert len(found) >= 12
    shown = cli("estimate", smollm2_gguf, "--techniques")
    assert shown.returncode == 0 and "COPY" not in shown.stdout and "llama-server -m FILE -fa on" in shown.stdout
    assert all(name in shown.stdout for name in found)
    eight = one(ask(smollm2_gguf, "--kv-type", "q8_0"))["needed_nbytes"]
    assert found["KV cache in 8 bits"]["after"] == eight
    assert found["experts on CPU"]["state"] == "not for this model"


def test_layers_on_gpus(smollm2_gguf: Path, ask: Ask, cli: Cli, refused: Callable[..., str]) -> None:
    split = {
        count: ask(smollm2_gguf, "--fit", "RTX 4090,RTX 4090", "--gpu-layers", count)["split"]
        for count in ("auto", "5", "0")
    }  # fmt: skip
    assert [split[count]["gpu_layers"] for count in split] == [31, 5, 0]
    weights = [sum(part(place, "weights") for place in (*each["devices"], each["host"])) for each in split.values()]
    assert weights[0] >= weights[2]  # tied embeddings are there twice
    assert all(each["how"] == "derived" for place in split["auto"]["devices"] for each in place["parts"])
    shown = cli("estimate", smollm2_gguf, "--fit", "RTX 4090", "--gpu-layers", "auto")
    assert "31 of 31 layers" in shown.stdout and "not measured on a GPU" in shown.stderr
    assert ask(smollm2_gguf, "--gpu-layers", 0)["split"]["devices"] == []
    assert "no GPU" in refused(smollm2_gguf, "--gpu-layers", "auto", "--fit", "1GB")
    assert "--gpu-layers" in refused(smollm2_gguf, "--cpu-moe")


@pytest.mark.parametrize("kind", [pytest.param("png", marks=pytest.mark.slow), "svg"])
def test_a_picture(kind: str, tiny: Path, cli: Cli, tmp_path: Path, refused: Callable[..., str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"memory.{kind}"
    done = cli("estimate", tiny, "Q8_0", "Q4_K_M", "Q2_K", "--fit", "RTX 3060", "--plot", path)
    assert done.returncode == 0, done.stderr
    content = path.read_bytes()
    if kind == "png":
        assert content.startswith(b"\x89PNG") and len(content) > 5000
    else:
        assert all(word in content.decode() for word in ("Q8_0", "Q2_K", "context"))
    assert "svg" in refused(tiny, "--plot", tmp_path / "memory.jpg")


@pytest.mark.slow
def test_a_draft_is_added_once(tiny: Path, gguf_of: GgufOf, ask: Ask, cli: Cli) -> None:
    draft = gguf_of(tiny, "q8_0")
    alone, both = (ask(tiny, "Q8_0", "Q4_K_M", *more) for more in ((), ("--draft", draft)))
    added = one(ask(draft))["needed_nbytes"]
    for before, after in zip(alone["rows"], both["rows"], strict=True):
        add_up(after)
        assert after["needed_nbytes"] - before["needed_nbytes"] == added
    told = cli("estimate", tiny, "Q8_0", "Q4_K_M", "--draft", draft).stderr
    assert told.count("the draft model has a context of 4,096 tokens too") == 1
    assert "expected a projector" in cli("estimate", tiny, "--projector", draft).stderr


# ── reality ──


def test_reality_agrees(smollm2_gguf: Path, cli: Cli) -> None:
    done = cli("estimate", smollm2_gguf, "--verify", "--context", 256, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    found = {each["part"]: each for each in answer["differences"]}
    for name in ("weights", "KV cache", "compute buffer"):
        assert found[name]["estimated"] == found[name]["real"] > 0 and found[name]["allowed"] == 0
    assert len(found) == 6 and all(answer["holds"])


@pytest.mark.slow
def test_a_checkpoint_is_made_before_it_is_verified(tiny: Path, cli: Cli, refused: Callable[..., str]) -> None:
    done = cli("estimate", tiny, "Q8_0", "--verify", "--context", 256)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resident after a full batch" in done.stdout and "NO" not in done.stdout
    assert "needs one QUANT" in refused(tiny, "--verify")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's MALLOC_PERTURB_")
def test_a_difference_is_found(smollm2_gguf: Path) -> None:
    """An allocator that writes all it gives away lets memory show that is reserved, but not used."""
    if os.confstr("CS_GNU_LIBC_VERSION") is None:
        pytest.skip("not glibc")
    words = ("estimate", str(smollm2_gguf), "--verify", "--context", "256", "--runtime", "llama-cpp-python")
    done = subprocess.run(
        [sys.executable, "-m", "llmkit", *words], env=cli_environment() | {"MALLOC_PERTURB_": "85"},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    lines = {line.split("  ")[0]: line.split()[-1] for line in done.stdout.splitlines()}
    assert lines["weights"] == "yes" and lines["resident with its context"] == "NO"


# ── when the engine cannot be asked ──


def test_an_architecture_the_engine_does_not_know(other_header: Callable[..., Path], cli: Cli, ask: Ask) -> None:
    """The shape is SmolLM2's, so the closed form must come near what the engine says of that."""
    strange = other_header("strange")
    near, exact = one(ask(strange)), one(ask(other_header()))
    assert (near["tier"], exact["tier"]) == ("closed form", "exact")
    assert near["needed_nbytes"] == pytest.approx(exact["needed_nbytes"], rel=0.02)
    assert "unknown model architecture: 'strange'" in near["why_not_asked"] and exact["why_not_asked"] is None
    done = cli("estimate", strange, "Q8_0", "Q4_K_M", "--fit", "8GB")
    assert done.returncode == 0 and "RAM: closed form" in done.stdout
    assert "unknown model architecture" in done.stderr and "next:" not in done.stderr
    assert one(ask(strange, "Q8_0"))["needed_nbytes"] == pytest.approx(
        one(ask(other_header(), "Q8_0"))["needed_nbytes"], rel=0.02
    )


def test_an_engine_that_aborts_is_told_with_its_last_words(
    other_header: Callable[..., Path], ask: Ask, cli: Cli
) -> None:
    """More experts used than there are: the engine asserts that this is not so."""
    broken = other_header(numbers={"expert_used_count": 9})
    row = one(ask(broken))
    assert row["tier"] == "closed form"
    add_up(row)
    assert "SIGABRT" in row["why_not_asked"] and "GGML_ASSERT(" in row["why_not_asked"]
    done = cli("estimate", broken, "Q8_0")
    assert done.returncode == 0 and "GGML_ASSERT(" in done.stderr and "SIGABRT" in done.stderr


def test_a_checkpoint_nobody_converts(tiny: Path, tmp_path: Path, cli: Cli, ask: Ask) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(tiny, odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"], "model_type": "odd"}))
    near, exact = one(ask(odd, "Q8_0")), one(ask(tiny, "Q8_0"))
    assert (near["tier"], exact["tier"]) == ("closed form", "exact")
    assert part(near, "KV cache") == part(exact, "KV cache")
    assert part(near, "weights") == pytest.approx(part(exact, "weights"), rel=0.02)
    assert len(ask(odd)["rows"]) == len(LABELS)
    done = cli("estimate", odd, "Q9")
    assert done.returncode == 1 and "unknown quant 'Q9'" in done.stderr and "Traceback" not in done.stderr
    assert "--verify" in cli("estimate", odd, "Q8_0", "--verify").stderr


def test_a_count_is_the_textbooks_rule_with_its_error(cli: Cli, ask: Ask, refused: Callable[..., str]) -> None:
    for count, gigabytes in (("7B", 28.0), ("70B", 280.0)):
        done = cli("estimate", count, "--fit", "24GB")
        line = next(line for line in done.stdout.splitlines() if line.startswith("F32"))
        assert f" {gigabytes} GB" in line and line.endswith("no")
        assert "%" in line and "6.74 billion" in done.stdout and "rough" in done.stdout
        rows = {row["quant"]: row for row in ask(count)["rows"]}
        assert rows["F32"]["file_nbytes"] == gigabytes * 1e9 and rows["F32"]["tier"] == "rough"
        assert rows["Q8_0"]["file_nbytes"] == gigabytes * 1e9 / 4
        rule = ask(count)["rules"]["Q4_K_M"]
        assert rule["nbytes"] < rule["least"] < rule["most"]
    assert list(ask("7B", "Q4_K_M")["rules"]) == ["Q4_K_M"]
    assert "a mere count" in refused("7B", "--techniques")


# ── headers that lie ──


def test_headers_that_lie(smollm2_gguf: Path, tiny: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2_gguf.read_bytes()[:100_000])
    assert "cut.gguf" in refused(cut)
    folder = tmp_path / "liar"
    shutil.copytree(tiny, folder)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 40) + content[8:])
    assert "model.safetensors" in refused(folder)
    path.write_bytes(content[:-1000])
    assert "model.safetensors" in refused(folder, "Q8_0")


def test_what_is_no_model(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "no such file" in refused(tmp_path / "absent.gguf")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty")


# ── far away ──


def test_a_repository_costs_kilobytes_and_leaves_nothing(desk: Desk, root: Path) -> None:
    temporary = desk.place / "tmp"
    temporary.mkdir()
    done = desk.ok("estimate", TINY, "--json", TMPDIR=str(temporary))
    answer = json.loads(done.stdout)
    assert [row["tier"] for row in answer["rows"]] == ["exact"] * len(LABELS)
    files = desk.hub.requests("GET", contains="/resolve/")
    assert 0 < sum(request.sent for request in files) == answer["fetched_nbytes"] and desk.hub.sent() < 1_000_000
    assert all(request.range for request in files if request.path.endswith(".safetensors"))
    assert "came over the network" in done.stderr
    assert list(temporary.iterdir()) == [] and list(desk.out.iterdir()) == []
    assert not [path for path in desk.cache.rglob("*") if path.is_file()]
    here = json.loads(desk.ok("estimate", root / TINY, "--json").stdout)
    for far, near in zip(answer["rows"], here["rows"], strict=True):
        assert part(far, "weights") == part(near, "weights")
        assert part(far, "compute buffer") == part(near, "compute buffer")


def test_a_gguf_far_away_is_as_here(desk: Desk, root: Path) -> None:
    answer = json.loads(desk.ok("estimate", f"{QUANTIZED}:Q4_K_M", "--json").stdout)
    (path,) = (root / QUANTIZED).glob("*Q4_K_M.gguf")
    here = json.loads(desk.ok("estimate", path, "--json").stdout)
    assert one(answer)["parts"] == one(here)["parts"]
    assert desk.hub.sent() < path.stat().st_size
    assert not [each for each in desk.cache.rglob("*") if each.is_file()]
    assert "llmkit download" in desk.refused("estimate", f"{QUANTIZED}:Q4_K_M", "--verify")


@pytest.mark.slow
def test_devices_compare_with_a_model_far_away_by_its_headers(desk: Desk) -> None:
    words = ("devices", "--compare", "M1 16GB", "RTX 4090", "--model", TINY, "--quant", "Q8_0", "--json")
    found = json.loads(desk.ok(*words).stdout)
    estimated = json.loads(desk.ok("estimate", TINY, "Q8_0", "--fit", "8GB", "--json").stdout)
    assert found["need"]["weight_nbytes"] == part(one(estimated), "weights")
    assert [row["device"] for row in found["devices"]] == ["M1", "RTX 4090"]
    asked = {request.path.rpartition("/")[2] for request in desk.hub.requests("GET", contains="/resolve/")}
    assert "tokenizer.json" not in asked and "config.json" in asked


def test_a_repository_nobody_converts(desk: Desk) -> None:
    answer = json.loads(desk.ok("estimate", ODD, "Q8_0", "--json").stdout)
    assert one(answer)["tier"] == "closed form" and 0 < answer["fetched_nbytes"] < 1_000_000


def test_a_repository_without_safetensors(desk: Desk) -> None:
    desk.hub.add_synthetic("org/pickles", {"config.json": b"{}", "pytorch_model.bin": b"\0" * 100})
    told = desk.refused("estimate", "org/pickles")
    assert "org/pickles" in told and "hint:" in told


def test_a_header_far_away_that_lies(desk: Desk, root: Path) -> None:
    files = {path.name: path.read_bytes() for path in (root / TINY).iterdir() if path.suffix == ".json"}
    desk.hub.add_synthetic(
        "org/liar", {"config.json": files["config.json"], "model.safetensors": struct.pack("<Q", 1 << 60) + b"{" * 99}
    )
    told = desk.refused("estimate", "org/liar")
    assert "org/liar" in told and "/tmp/" not in told


# ── the script ──


@pytest.mark.slow
def test_the_script_is_the_verb(tiny: Path, cli: Cli) -> None:
    words = (str(tiny), "Q8_0", "Q4_0", "--context", "1000", "--runtime", "llama-server", "--fit", "1GB")
    script = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "estimate_memory.py"), *words],
        env=cli_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    verb = cli("estimate", *words)
    assert (script.returncode, script.stdout) == (verb.returncode, verb.stdout) and script.returncode == 0
