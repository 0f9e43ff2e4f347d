"""Searching: what is looked up, what is derived, what the Hub is asked; against the stand-in Hub and the engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest

import standin_hub
from conftest import Cli, TinyCheckpoint, cli_environment
from llmkit import checkpoint, convert, gguf_writer, quantize
from llmkit.convert.config import Config
from llmkit.convert.draft import GgufDraft, file_order, stays_float32
from llmkit.convert.tensors import LazyTensor
from llmkit.gguf import Value
from llmkit.hub import search
from llmkit.quants import BF16, F32, quant
from standin_faults import Stall, Status

# (architecture, hidden, intermediate, layers, heads, key/value heads, vocabulary, tied, head width) of public configs
SHAPES = {
    "SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 49152, True, 64),
    "Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2, 151936, True, 64),
    "gemma-3-270m": ("gemma3", 640, 2048, 18, 4, 1, 262144, True, 256),
    "TinyLlama-1.1B": ("llama", 2048, 5632, 22, 32, 4, 32000, False, 64),
    "Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, 128256, True, 64),
    "SmolLM2-1.7B": ("llama", 2048, 8192, 24, 32, 32, 49152, True, 64),
    "Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False, 128),
    "Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128256, False, 128),
    "Qwen2.5-72B": ("qwen2", 8192, 29568, 80, 64, 8, 152064, False, 128),
}
PUBLISHED = {"SmolLM2-135M": 134_515_008, "Qwen2.5-7B": 7_615_616_512, "Llama-3.1-8B": 8_030_261_248}


def header_only(name: str) -> GgufDraft:
    """A model's metadata and the shapes of its tensors; nobody reads the weights."""
    family, hidden, intermediate, layers, heads, kv_heads, vocabulary, tied, head_dim = SHAPES[name]
    architecture = import_module(f"llmkit.convert.architectures.{family}").ARCHITECTURE
    values = {
        **(architecture.defaults or {}), "hidden_size": hidden, "intermediate_size": intermediate, "head_dim": head_dim,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rope_theta": 1e6,
        "vocab_size": vocabulary, "tie_word_embeddings": tied, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "sliding_window": 512,
    }  # fmt: skip
    config = Config(values, Path("config.json"))
    tensors = []
    for row in architecture.rows:
        if (row.optional and row.source != "lm_head.weight" and family == "llama") or (
            tied and "lm_head" in row.source
        ):
            continue
        for block in range(layers) if "{}" in row.source else (0,):
            target, shape = row.target.format(block), tuple(config.sizes[size] for size in row.shape)
            tensors.append(LazyTensor(target, shape, F32 if stays_float32(target, shape) else BF16, _unread))
    metadata = {"general.architecture": Value.string(family), **architecture.metadata(config)}
    metadata[f"{family}.vocab_size"] = Value.uint32(vocabulary)
    ordered = tuple(sorted(tensors, key=lambda tensor: file_order(tensor.name)))
    return GgufDraft(name, metadata, ordered, (), "shape only")


def _unread(start: int, stop: int) -> np.ndarray[Any, np.dtype[Any]]:
    raise AssertionError("a dry run reads no weights")


# ── the estimate ──


@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_is_as_near_to_the_engine_as_it_says(name: str, tmp_path: Path) -> None:
    draft = header_only(name)
    assert draft.n_weights == PUBLISHED.get(name, draft.n_weights)
    exact = quantize.plan(draft, [quantize.Recipe(quant("Q4_K_M"))], tmp_path).outputs[0].nbytes
    error = search.q4_k_m_nbytes(draft.n_weights) / exact - 1
    assert abs(error) < (0.08 if draft.n_weights > 1.2e9 else 0.20), f"{error:+.1%}"


def test_the_estimate_against_a_whole_file(smollm2_folder: Path, tmp_path: Path) -> None:
    """With the vocabulary, which the shapes above do not have."""
    draft = convert.from_checkpoint(checkpoint.read(smollm2_folder))
    exact = quantize.plan(draft, [quantize.Recipe(quant("Q4_K_M"))], tmp_path).outputs[0].nbytes
    assert abs(search.q4_k_m_nbytes(draft.n_weights) / exact - 1) < 0.20


def test_the_estimate_grows_with_the_model() -> None:
    sizes = [search.q4_k_m_nbytes(round(1.1**power)) for power in range(1, 280)]
    assert sizes == sorted(sizes) and sizes[0] >= 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7_000_000_000), ("HuggingFaceTB/SmolLM2-135M", 135_000_000),
        ("org/model-0.5b-chat", 500_000_000), ("Qwen/Qwen3-30B-A3B", 30_000_000_000),
        ("org/llama_70B.v2", 70_000_000_000), ("mistralai/Mixtral-8x7B-v0.1", None), ("7B/model", None),
        ("org/model-4bit", None), ("org/gemma-3n-E4B", None), ("org/b7", None), ("org/0B-model", None),
        ("org/model", None),
    ],
)  # fmt: skip
def test_parameters_in_names(name: str, expected: int | None) -> None:
    assert search.weights_in_name(name) == expected


# ── the Hub's answer ──


@pytest.fixture
def hub(tmp_path: Path, tiny_checkpoint: TinyCheckpoint) -> Iterator[standin_hub.Hub]:
    """Models of every kind, described by what the stand-in reads in their files."""
    root = tmp_path / "root"
    card = "---\nlicense: apache-2.0\n---\n# A model\n"
    for name in ("org/tiny-safe", "org/tiny-mlx"):
        folder = shutil.copytree(tiny_checkpoint("llama"), root / name)
        (folder / "README.md").write_text(
            card if name == "org/tiny-safe" else card.replace("---\n#", "tags: [mlx]\n---\n#")
        )
        (folder / "pytorch_model.bin").write_bytes(b"also pickled")
    quants = root / "org" / "tiny-7B-GGUF"
    quants.mkdir()
    gguf_writer.write(
        quants / "m.gguf", {"general.architecture": Value.string("llama")}, [("a.weight", (4, 256), F32, bytes(4096))]
    )
    for name, architecture in (("tiny-pickle-3B", "LlamaForCausalLM"), ("tiny-strange", "StrangeForCausalLM")):
        (root / "org" / name).mkdir()
        (root / "org" / name / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        (root / "org" / name / "pytorch_model.bin").write_bytes(b"pickled")
    shutil.copy(tiny_checkpoint("llama") / "model.safetensors", root / "org" / "tiny-strange")
    with standin_hub.serve(root) as hub:
        hub.describe("org/tiny-safe", downloads=5000, likes=1)
        hub.describe("org/tiny-7B-GGUF", downloads=40, likes=9)
        hub.describe("org/tiny-pickle-3B", downloads=30)
        hub.describe("org/tiny-mlx", downloads=20, gated="manual")
        hub.describe("org/tiny-strange", downloads=10)
        yield hub


Search = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def asked(hub: standin_hub.Hub, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Search:
    """`llmkit search …` against the stand-in."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE")  # huggingface_hub heeds that one too
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return lambda *words: cli("search", *words)


def by_name(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)}


def test_what_is_looked_up_and_what_is_not(asked: Search, tiny_checkpoint: TinyCheckpoint) -> None:
    stored = checkpoint.read(tiny_checkpoint("llama")).tensors.values()
    n_weights = sum(int(np.prod(tensor.shape)) for tensor in stored)
    rows = by_name(asked("tiny", "--json"))
    assert list(rows) == ["org/tiny-safe", "org/tiny-7B-GGUF", "org/tiny-pickle-3B", "org/tiny-mlx", "org/tiny-strange"]
    safe, quants, pickled, mlx, strange = rows.values()
    assert (safe["n_weights"], safe["weights_from_name"], safe["formats"]) == (n_weights, False, ["safetensors"])
    assert (safe["licence"], safe["downloads"], safe["gated"], safe["converts"]) == ("apache-2.0", 5000, False, True)
    assert (quants["n_weights"], quants["weights_from_name"]) == (1024, False), "the header counts, not the name"
    assert (quants["formats"], quants["converts"], quants["licence"]) == (["gguf"], None, None)
    assert (pickled["n_weights"], pickled["weights_from_name"]) == (3_000_000_000, True)
    assert pickled["q4_k_m_nbytes"] == search.q4_k_m_nbytes(3_000_000_000)
    assert (pickled["formats"], pickled["converts"]) == (["pickle"], None)
    assert (mlx["formats"], mlx["gated"]) == (["mlx"], True)
    assert (strange["architecture"], strange["converts"]) == ("StrangeForCausalLM", False)


def test_the_table_says_where_figures_come_from(asked: Search) -> None:
    done = asked("tiny")
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert " ~3.0B " in lines["org/tiny-pickle-3B"] and "pickle only" in lines["org/tiny-pickle-3B"]
    assert "~" not in lines["org/tiny-safe"] and lines["org/tiny-safe"].endswith("yes")
    assert lines["org/tiny-strange"].endswith("not yet")
    assert "~ parameters as the name claims them" in done.stderr
    assert "derived from the parameter count, ±8 %, below 1.2 B ±20 %" in done.stderr
    assert "next: llmkit download org/tiny-safe --dry-run" in done.stderr


def test_words_order_limit_and_gguf_go_to_the_hub(asked: Search, hub: standin_hub.Hub) -> None:
    assert list(by_name(asked("org", "tiny", "--sort", "likes", "--limit", "2", "--json"))) == [
        "org/tiny-7B-GGUF",
        "org/tiny-safe",
    ]
    (request,) = [each for each in hub.log if each.path == "/api/models"]
    assert "search=org+tiny" in request.query and "sort=likes" in request.query and "limit=2" in request.query
    assert list(by_name(asked("tiny", "--gguf", "--json"))) == ["org/tiny-7B-GGUF"]
    assert {each.path for each in hub.log} <= {"/api/models", "/api/agent-harnesses"}, "one question, no more"


@pytest.mark.parametrize(
    ("sort", "theirs"),
    [("downloads", "downloads"), ("likes", "likes"), ("trending", "trending_score"), ("updated", "last_modified")],
)
def test_the_question_is_the_librarys_own(
    sort: str, theirs: str, asked: Search, hub: standin_hub.Hub, tmp_path: Path
) -> None:
    """What HfApi.list_models sends for the same wish, parameter by parameter."""
    assert asked("tiny", "--sort", sort, "--gguf", "--limit", "3", "--json").returncode == 0
    code = f"""
import sys, huggingface_hub
expand = sys.argv[1].split(",")
api = huggingface_hub.HfApi()
print(len(list(api.list_models(search="tiny", sort="{theirs}", filter="gguf", limit=3, expand=expand))))
"""
    ours, *_ = [parse_qs(each.query) for each in hub.log if each.path == "/api/models"]
    subprocess.run(
        [sys.executable, "-c", code, ",".join(ours["expand"])], env=cli_environment(), check=True, timeout=60
    )
    assert [parse_qs(each.query) for each in hub.log if each.path == "/api/models"] == [ours, ours]


def test_pages_are_followed(asked: Search, hub: standin_hub.Hub) -> None:
    for number in range(230):
        hub.add_synthetic(f"many/page-{number}", {"config.json": b"{}"})
    rows = by_name(asked("page", "--limit", "210", "--json"))
    assert len(rows) == 210
    assert len([each for each in hub.log if each.path == "/api/models"]) == 3
    plain = by_name(asked("page", "--limit", "1", "--json"))
    (row,) = plain.values()
    assert row["n_weights"] is None and row["q4_k_m_nbytes"] is None and row["formats"] == []


def test_pages_that_lead_elsewhere_are_asked_of_the_same_hub(
    asked: Search, hub: standin_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mirror that passes on the Hub's own links; and whoever else is named there gets no token."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for number in range(110):
        hub.add_synthetic(f"many/page-{number}", {"config.json": b"{}"})
    with standin_hub.serve(tmp_path) as other:
        hub.links_to = other.address.removeprefix("http://")
        assert len(by_name(asked("page", "--limit", "105", "--json"))) == 105
        assert other.log == []


def test_unknown_is_a_dash_and_nothing_found_is_said(asked: Search, hub: standin_hub.Hub) -> None:
    hub.add_synthetic("org/riddle", {"notes.txt": b"?"})
    (line,) = asked("riddle").stdout.splitlines()[1:]
    assert line.split()[:4] == ["org/riddle", "-", "-", "-"]
    done = asked("nothing-of-that-name")
    assert done.returncode == 0 and done.stdout == "" and "no model that matches" in done.stderr
    assert by_name(asked("nothing-of-that-name", "--json")) == {}


def test_packed_weights_are_not_counted_as_parameters(asked: Search, hub: standin_hub.Hub) -> None:
    counts = {"I32": 900_000_000, "F16": 300_000_000}
    hub.add_synthetic(
        "org/gptq", {"model.safetensors": b"x", "config.json": b'{"architectures": ["LlamaForCausalLM"]}'}
    )
    hub.describe("org/gptq", safetensors={"parameters": counts, "total": sum(counts.values())})
    (row,) = by_name(asked("gptq", "--json")).values()
    assert row["packed"] is True and row["n_weights"] is None and row["converts"] is False


def test_odd_answers_are_borne(asked: Search, hub: standin_hub.Hub) -> None:
    """One strange row is not the end of a search; nor does text drive the terminal."""
    hub.add_synthetic("org/odd", {"a\x1b[2J.gguf": b""})
    hub.describe(
        "org/odd", safetensors={"total": "many"}, gguf=[], tags=["license:\x1b[31mred", 7, None], downloads=True,
        likes=-3, gated="auto", config="none", siblings=[None, {}, {"rfilename": 5}],
    )  # fmt: skip
    done = asked("odd")
    assert done.returncode == 0 and "\x1b" not in done.stdout and "\\x1b[31mred" in done.stdout
    (row,) = by_name(asked("odd", "--json")).values()
    assert row["gated"] is True and row["downloads"] is None and row["likes"] is None and row["n_weights"] is None


def test_the_token_goes_to_the_hub_and_opens_private_models(
    asked: Search, hub: standin_hub.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.require_token("org/tiny-safe", "hf_secret")
    assert "org/tiny-safe" not in by_name(asked("tiny", "--json"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = asked("tiny", "--json")
    assert "org/tiny-safe" in by_name(done) and "hf_secret" not in done.stdout + done.stderr


# ── a Hub that is not there ──


def test_waits_when_it_is_asked_to(asked: Search, hub: standin_hub.Hub) -> None:
    hub.fail_route("api/models", Status(429, retry_after=1), times=1)
    start = time.monotonic()
    assert len(by_name(asked("tiny", "--json"))) == 5
    assert time.monotonic() - start >= 1
    hub.fail_route("api/models", Status(400), times=None)
    done = asked("tiny")
    assert done.returncode == 1 and "search 'tiny'" in done.stderr and "Traceback" not in done.stderr


def test_nobody_listens(asked: Search, hub: standin_hub.Hub) -> None:
    hub.stop()
    start = time.monotonic()
    done = asked("tiny")
    assert done.returncode == 1 and "cannot be reached" in done.stderr and "llmkit list" in done.stderr
    assert time.monotonic() - start < 5
    assert done.stderr.count("\n") == 2, "no warnings of the library's"


def test_offline_by_wish(asked: Search, monkeypatch: pytest.MonkeyPatch, hub: standin_hub.Hub) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = asked("tiny")
    assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr and hub.log == []


@pytest.mark.slow
def test_a_silent_hub_is_given_up(asked: Search, hub: standin_hub.Hub) -> None:
    hub.fail_route("api/models", Stall(40), times=None)
    start = time.monotonic()
    done = asked("tiny")
    assert done.returncode == 1 and "does not answer" in done.stderr
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "words", [["tiny", "--limit", "0"], ["tiny", "--limit", "1001"], ["tiny", "--sort", "size"], []]
)
def test_wrong_words(words: list[str], cli: Cli) -> None:
    assert cli("search", *words).returncode == 2


def test_importing_the_verbs_is_cheap() -> None:
    code = "import sys, llmkit.cli.search, llmkit.cli.list, llmkit.cli.rm\n"
    code += "print({'numpy', 'huggingface_hub'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=cli_environment(), check=True)
    assert done.stdout.strip() == "set()"
