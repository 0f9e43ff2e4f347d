"""ModelRef: what is read as a path, what as a repository, and what is said about everything else."""

from __future__ import annotations

import os
import re
import string
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit import model
from llmkit.errors import AccessDenied, LlmkitError, ModelNotFound, Unsupported
from llmkit.model import ModelRef, parse

validators = pytest.importorskip("huggingface_hub.utils._validators")
HF_ERROR = pytest.importorskip("huggingface_hub.errors").HFValidationError
RELAXED = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test stands in a folder of its own, with a checkpoint and a split GGUF beside others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "home" / "mine").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json"):
        (tmp_path / "models" / "tiny" / name).touch()
    for name in ("big-Q4_K_M-00001-of-00002.gguf", "big-Q4_K_M-00002-of-00002.gguf", "small-Q8_0.gguf", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


def refusal(text: str | Path, kind: type[LlmkitError] = LlmkitError) -> LlmkitError:
    """The error that `text` raises; it is of exactly that kind."""
    with pytest.raises(LlmkitError) as caught:
        parse(text)
    assert type(caught.value) is kind, caught.value.message
    return caught.value


# --- what is a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ModelRef(repo="org/name")),
        ("Qwen/Qwen3-0.6B", ModelRef(repo="Qwen/Qwen3-0.6B")),
        ("_a/b_", ModelRef(repo="_a/b_")),
        ("org/name@main", ModelRef(repo="org/name", revision="main")),
        ("org/name@refs/pr/12", ModelRef(repo="org/name", revision="refs/pr/12")),
        ("org/name@v1.0-rc@2", ModelRef(repo="org/name", revision="v1.0-rc@2")),
        ("org/name:Q4_K_M", ModelRef(repo="org/name", quant="Q4_K_M")),
        ("org/name:ud-q4_k_xl", ModelRef(repo="org/name", quant="UD-Q4_K_XL")),
        ("org/name:fp16", ModelRef(repo="org/name", quant="FP16")),
        ("org/name:i1-IQ2_M", ModelRef(repo="org/name", quant="I1-IQ2_M")),
        ("org/name@dev:mxfp4", ModelRef(repo="org/name", revision="dev", quant="MXFP4")),
        ("org/Model.gguf@main", ModelRef(repo="org/Model.gguf", revision="main")),
    ],
)
def test_repositories(text: str, expected: ModelRef) -> None:
    found = parse(text)
    assert found == expected
    assert not found.local
    assert parse(str(found)) == found


def test_paths(here: Path) -> None:
    for text in ("models/tiny", "./models/tiny", "models/tiny/", str(here / "models" / "tiny"), ".", "small-Q8_0.gguf"):
        found = parse(text)
        assert (
            found == ModelRef(Path(text)) and found.local and (found.repo, found.revision, found.quant) == (None,) * 3
        )
        assert parse(str(found)) == found
    assert parse("~/mine") == ModelRef(here / "home" / "mine")
    assert parse(Path("models/tiny")) == ModelRef(Path("models/tiny"))
    assert parse("big-Q4_K_M-00001-of-00002.gguf").path == Path("big-Q4_K_M-00001-of-00002.gguf")
    assert parse("notes.txt").local  # whether it is a GGUF is for its reader to say: Ollama's have no .gguf


def test_a_folder_wins_over_the_repository_and_a_revision_over_the_folder(here: Path) -> None:
    assert parse("models/tiny").local
    assert parse("models/other") == ModelRef(repo="models/other")
    assert parse("models/tiny@main") == ModelRef(repo="models/tiny", revision="main")
    assert parse("models/tiny:Q4_K_M") == ModelRef(repo="models/tiny", quant="Q4_K_M")
    (here / "org").mkdir()
    (here / "org" / "name:Q4_K_M").mkdir()
    assert parse("org/name:Q4_K_M").local


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/Name-1.5B@main:Q4_K_M", "Name-1.5B"),
        ("models/tiny", "tiny"),
        ("models/tiny/", "tiny"),
        ("small-Q8_0.gguf", "small-Q8_0"),
        ("big-Q4_K_M-00001-of-00002.gguf", "big-Q4_K_M"),
        ("Llama-3.2-1B", "Llama-3.2-1B"),
        ("UPPER.GGUF", "UPPER"),
        ("cache/models--org--Name-2/snapshots/0123abcd", "Name-2"),
        ("/", "model"),
    ],
)
def test_names(text: str, name: str, here: Path) -> None:
    if text.startswith(("Llama", "UPPER", "cache")):
        (here / text).mkdir(parents=True)
    assert parse(text).name == name
    assert parse("models/tiny/..").name == "models" and parse(".").name == here.name


def test_a_reference_is_one_thing() -> None:
    for wrong in ({}, {"path": Path("x"), "repo": "a/b"}, {"path": Path("x"), "quant": "Q8_0"}):
        with pytest.raises(ValueError):
            ModelRef(**wrong)  # type: ignore[arg-type]


@RELAXED
@given(st.text(string.ascii_letters + "0-_./é ", min_size=1, max_size=12), st.text("ab-_.", min_size=1, max_size=100))
def test_the_hub_library_agrees_on_names(org: str, name: str) -> None:
    text = f"{org}/{name}"
    if text[0] in "./~" or os.path.exists(text):
        return
    try:
        validators.validate_repo_id(text)
        allowed = text.count("/") == 1
    except HF_ERROR:
        allowed = False
    try:
        found = parse(text).repo == text
    except LlmkitError:
        found = False
    assert found == allowed


@RELAXED
@given(
    st.one_of(
        st.text(max_size=60),
        st.text("ab/@:.-_~\\ #?%4QKM", max_size=30),
        st.from_regex(r"[a-z]{0,3}/[a-z.]{0,4}(@[a-z/.@]{0,4})?(:[A-Za-z0-9_]{0,6})?", fullmatch=True),
        st.from_regex(
            r"(https?://)?(huggingface\.co|hf\.co|\[::|x)/[a-z]{0,2}/[a-z]{1,2}(/(tree|blob|resolve)(/\w?)*)?(\?.*)?"
        ),
    ),
    st.sampled_from(["", "org/", "./", "https://huggingface.co/"]),
)
def test_nothing_but_llmkit_errors_and_a_text_that_reads_back(text: str, before: str) -> None:
    try:
        found = parse(before + text)
    except LlmkitError as error:
        assert error.hint and error.message
        for named in re.findall(r"'([^']*/[^']*)'", error.hint) if error.hint.startswith("Did you mean") else ():
            assert parse(named)  # what is proposed is accepted
    else:
        assert found.local or parse(str(found)) == found


# --- what is none, and its nearest reading ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("http://www.huggingface.co/org/name/", "org/name"),
        ("huggingface.co/org/name?download=true", "org/name"),
        ("hf.co/org/name", "org/name"),
        ("hf.co/org/name:Q4_K_M", "org/name:Q4_K_M"),
        ("hf://org/name", "org/name"),
        ("hf://models/org/name@v2/config.json", "org/name@v2"),
        ("git@hf.co:org/name.git", "org/name"),
        ("https://huggingface.co/org/name.git", "org/name"),
        ("https://huggingface.co/org/name#usage", "org/name"),
        ("https://huggingface.co/org/name/tree/main", "org/name"),
        ("https://huggingface.co/org/name/tree/v1.1", "org/name@v1.1"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F3", "org/name@refs/pr/3"),
        ("https://huggingface.co/org/name/commit/0123abc", "org/name@0123abc"),
        ("https://huggingface.co/org/name/blob/main/file-Q4_K_M.gguf", "org/name:Q4_K_M"),
        ("https://huggingface.co/org/name/blob/main/model.safetensors", "org/name"),
        ("https://huggingface.co/org/name?show_file_info=name-Q5_K_S.gguf", "org/name:Q5_K_S"),
        (
            "https://huggingface.co/org/name/resolve/v1/UD-Q4_K_XL/m-UD-Q4_K_XL-00002-of-00003.gguf?download=true",
            "org/name@v1:UD-Q4_K_XL",
        ),
        ("http://127.0.0.1:8080/org/name/resolve/main/name-bf16.gguf", "org/name:BF16"),
        ("https://huggingface.co/api/models/org/name", "org/name"),
        ("org/name/Q4_K_M", "org/name:Q4_K_M"),
        ("org/name/tree/main", "org/name"),
        ("org/name/config.json", "org/name"),
        ("org/name:Q4_K_M@v2", "org/name@v2:Q4_K_M"),
        ("org/name:", "org/name"),
        ("org/name@", "org/name"),
        ("org/name@:Q4_K_M", "org/name:Q4_K_M"),
        ("org/name:latest", "org/name"),
        ("org/name/", "org/name"),
        ("org//name", "org/name"),
        ("org/name.git", "org/name"),
        ("org\\name", "org/name"),
        (" org/name ", "org/name"),
        ("org / name", "org/name"),
        ("org/name Q4_K_M", "org/name:Q4_K_M"),
        ("'org/name'", "org/name"),
        ("ollama run hf.co/org/name:Q4_K_M", "org/name:Q4_K_M"),
        ("models--org--name/snapshots/0123", "org/name"),
    ],
)
def test_wrong_names_get_their_nearest_reading(text: str, reading: str) -> None:
    assert refusal(text).hint == f"Did you mean '{reading}'?"
    assert str(parse(reading)) == reading


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("org/name/file-Q4_K_M.gguf", "org/name:Q4_K_M"),
        ("org/name/file.gguf", "org/name"),
        ("org/name:file-Q4_K_M.gguf", "org/name:Q4_K_M"),
        ("org/name:Q4_K_M.gguf", "org/name:Q4_K_M"),
        ("models--org--name", "org/name"),
    ],
)
def test_files_of_the_hub_that_are_not_here_get_their_quant(text: str, reading: str) -> None:
    assert refusal(text, ModelNotFound).hint == f"Did you mean '{reading}'?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llama3.2:3b", "names of the Hub (org/name), not those of Ollama"),
        ("name:Q4_K_M", "names of the Hub (org/name), not those of Ollama"),
        ("Qwen3 0.6B", "found a space"),
        ("org/näme", "'ä'"),
        ("org/na--me", "contains '--'"),
        ("org/na..me", "contains '..'"),
        ("org/-name", "begins or ends with '-' or '.'"),
        (f"org/{'x' * 97}", "at most 96 characters"),
        ("https://github.com/ggml-org/llama.cpp", "is an address"),
        ("https://huggingface.co/datasets/org/name", "is an address"),
        ("datasets/org/name", "one of the Hub's datasets"),
        ("org/name@../../etc", "cannot be a branch"),
        ("org/name@-x", "cannot be a branch"),
        ("org/name@a//b", "cannot be a branch"),
        (f"org/name@{'x' * 251}", "cannot be a branch"),
        ("org/name:Q4 K", "is no quant"),
        ("org/name:../x", "is no quant"),
        ("", "empty"),
        ("   ", "empty"),
        *(
            (f"org/name@{name}", "cannot be a branch")
            for name in ("a b", "@", "a@{1}", "a.lock", ".a", "a~1", "a^", "*")
        ),
        *((f"org/name@{name}", "cannot be a branch") for name in ("/a", "a/", "a.", "main\n", "a\u202eb")),
        ("org/name:Q4_K_M\n", "is no quant"),
    ],
)
def test_the_message_says_what_is_wrong(text: str, message: str) -> None:
    assert message in refusal(text).message


def test_bare_names(here: Path) -> None:
    assert "'models'" in str(refusal("modles", ModelNotFound).hint)
    assert "llmkit search gpt2" in str(refusal("gpt2", ModelNotFound).hint)
    assert "org/name" in str(refusal("gpt2", ModelNotFound).hint)
    assert "llmkit search llama3.2`" in str(refusal("llama3.2:3b").hint)


def test_text_without_end_is_refused_at_once() -> None:
    for text in (" " * 100_000 + "x", "org/" + " " * 100_000, "./" + "a/" * 50_000, "Q4_1" * 30_000):
        began = time.monotonic()
        error = refusal(text)
        assert time.monotonic() - began < 1 and len(error.message) < 300 and "too many" in error.message


def test_missing_paths_name_their_neighbours(here: Path) -> None:
    (here / "models" / "loop").symlink_to("loop")
    assert refusal("./models/tinny", ModelNotFound).hint == "Did you mean 'models/tiny'?"
    assert "'small-Q8_0.gguf'" in str(refusal("smal-Q8_0.gguf", ModelNotFound).hint)
    wrong_folder = refusal(here / "model" / "tiny", ModelNotFound)
    assert "there is no folder" in wrong_folder.message and str(here / "models") in str(wrong_folder.hint)
    assert refusal("~/mime", ModelNotFound).hint == f"Did you mean '{here / 'home' / 'mine'}'?"
    assert refusal("~nobody-of-that-name/x", ModelNotFound)
    assert refusal("notes.txt/x.gguf", ModelNotFound)
    assert model.nearest_on_disk(Path("models/tinny")) == ["models/tiny"]


def test_a_quant_after_a_path(here: Path) -> None:
    for text, path in (("small-Q8_0.gguf:Q4_K_M", "small-Q8_0.gguf"), ("./models/tiny:Q4_K_M", "./models/tiny")):
        error = refusal(text)
        assert "follow only a name of the Hub" in error.message and error.hint == f"Did you mean '{path}'?"


def test_parts_of_models(here: Path) -> None:
    later = refusal("big-Q4_K_M-00002-of-00002.gguf")
    assert later.hint == "Give the first part: 'big-Q4_K_M-00001-of-00002.gguf'."
    missing = refusal("gone-00003-of-00009.gguf", ModelNotFound)
    assert missing.hint == "Did you mean 'gone-00001-of-00009.gguf'?"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert refusal(f"models/tiny/{name}").hint == "Give its folder: 'models/tiny'."
    assert refusal("models/model.safetensors", ModelNotFound).hint == "Give the model's folder: 'models'."
    pickle = refusal("models/tiny/pytorch_model.bin", Unsupported)
    assert "pickled" in pickle.message and "safetensors" in str(pickle.hint)
    (here / "small-Q8_0.gguf.partial").touch()
    assert "unfinished" in refusal("small-Q8_0.gguf.partial").message


def test_odd_things_on_disk(here: Path) -> None:
    (here / "link.gguf").symlink_to("blobs/gone")
    assert "a link to blobs/gone" in refusal("link.gguf", ModelNotFound).message
    (here / "loop").symlink_to("loop")
    refusal("./loop", ModelNotFound)
    os.mkfifo(here / "pipe")
    assert "neither a file nor a folder" in refusal("pipe").message
    (here / "models--org--name" / "snapshots").mkdir(parents=True)
    assert refusal("models--org--name").hint == "Did you mean 'org/name'?"
    (here / "bytes-\udcff").mkdir()
    assert parse("bytes-\udcff").local
    refusal("./" + "x" * 4000, ModelNotFound)
    refusal("./a\0b", ModelNotFound)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may look everywhere")
def test_folders_that_may_not_be_looked_into(here: Path) -> None:
    (here / "org" / "name").mkdir(parents=True)
    (here / "org").chmod(0)
    try:
        refusal("./org/name", AccessDenied)
        assert parse("org/name") == ModelRef(repo="org/name")
    finally:
        (here / "org").chmod(0o700)


def test_secrets_are_not_repeated() -> None:
    for text in (
        "https://me:hunter2@huggingface.co/org/name",
        f"https://huggingface.co/org/name?token=hf_{'abcdefgh' * 4}",
    ):
        error = refusal(text)
        assert error.hint == "Did you mean 'org/name'?"
        assert "hunter2" not in error.message and "abcdefgh" not in error.message


@pytest.mark.parametrize(
    ("filename", "label"),
    [
        ("x-q4_k_m-00001-of-00002.gguf", "Q4_K_M"),
        ("Qwen3-30B-A3B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("m.i1-IQ3_XXS.gguf", "IQ3_XXS"),
        ("ggml-model-f16.gguf", "F16"),
        ("Phi-3-mini-4k-instruct-fp16.gguf", "FP16"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("m-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("m-Q4_0_4_4.gguf", "Q4_0_4_4"),
        ("m-TQ1_0.gguf", "TQ1_0"),
        ("m-Q4_K_M_imat.gguf", "Q4_K_M"),
        ("Llama-FP8-Q8_0-v2.gguf", "Q8_0"),
        ("Q5_K_M/model.gguf", "Q5_K_M"),
        ("m-Q4_\N{KELVIN SIGN}.gguf", "Q4"),
        ("m-Q\N{ARABIC-INDIC DIGIT FOUR}_K.gguf", None),
        ("Qwen3-30B-A3B.gguf", None),
        ("model.gguf", None),
    ],
)
def test_labels(filename: str, label: str | None) -> None:
    assert model.quant_label(filename) == label
    if label:
        assert parse(f"org/name:{label}").quant == label
