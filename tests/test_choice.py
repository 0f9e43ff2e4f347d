"""Which files of a repository are taken, and which listings are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from llmkit.errors import InvalidModel, LlmkitError, ModelNotFound, Unsupported
from llmkit.hub.choice import Choice, choose, ggufs
from llmkit.hub.repository import RemoteFile, Repository, checked

GB = 10**9
INDEX = "model.safetensors.index.json"
# what stands beside the weights in most repositories of checkpoints
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE")
SHARDS = tuple(f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))


def repository(*paths: str, sizes: Mapping[str, int] | None = None) -> Repository:
    sizes = sizes or {}
    files = tuple(RemoteFile(path, sizes.get(path, 1000), f"{number:040x}") for number, path in enumerate(paths))
    return checked(Repository("org/name", "main", "0" * 40, files))


def chosen(*paths: str, quant: str | None = None, index: object = None, **options: object) -> Choice:
    """The choice among these paths; `index` is what the index of the shards says (default: the shards listed)."""
    if index is None:
        index = {"weight_map": {f"t{number}": name for number, name in enumerate(SHARDS)}}
    data = index if isinstance(index, bytes) else json.dumps(index).encode()

    def read(file: RemoteFile) -> bytes:
        assert file.path == INDEX
        return data

    return choose(repository(*paths), quant=quant, read=read, **options)  # type: ignore[arg-type]


def names(choice: Choice) -> set[str]:
    return {file.path for file in choice.files}


# ── checkpoints ──


def test_one_file_of_weights_and_what_belongs_to_it() -> None:
    wanted = {
        *TEXTS, "model.safetensors", "tokenizer.model", "special_tokens_map.json", "vocab.json", "merges.txt",
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "qwen.tiktoken", "LICENSE.txt", "NOTICE",
    }  # fmt: skip
    others = {
        "pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "original/params.json",
        "onnx/model.onnx", "onnx/model_quantized.onnx_data", "tf_model.h5", "flax_model.msgpack", "rust_model.ot",
        "model.fp16.safetensors", ".gitattributes", "assets/chart.png", "runs/events.out", "training_args.bin",
        "coreml/text.mlpackage/Data/model.mlmodel", "openvino/openvino_model.xml", "pytorch_model.bin.index.json",
        "optimizer.pt", "evals/results.json", "modeling_custom.py",
    }  # fmt: skip
    choice = chosen(*wanted, *others)
    assert names(choice) == wanted
    assert (choice.kind, choice.to_make, choice.first) == ("checkpoint", None, None)
    assert sum(choice.left_out.values()) == len(others)
    assert choice.left_out["pickled weights (opening them can run code)"] == 4
    assert choice.left_out["other formats of the weights"] == 8


def test_shards_as_the_index_names_them() -> None:
    choice = chosen(*TEXTS, INDEX, *SHARDS, "consolidated.safetensors", "model-00001-of-00002.safetensors")
    assert names(choice) == {*TEXTS, INDEX, *SHARDS}


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": SHARDS[0], "b": "model-00009-of-00009.safetensors"}}, "names 1 shard.*00009-of-00009"),
        (b"{", "does not map tensors to files"),
        (b"\xff", "does not map"),
        ([], "does not map"),
        ({"weight_map": [1]}, "does not map"),
        ({"weight_map": {"a": 1}}, "names no files"),
        ({"weight_map": {"a": {}}}, "does not map"),
        ({"weight_map": {}}, "names no files"),
        ({"weight_map": {"a": "../secrets.safetensors"}}, "other folders"),
        ({"weight_map": {"a": "config.json"}}, "config.json"),
        (b"[" * 100_000, "does not map"),
    ],
)
def test_an_index_that_is_wrong(index: object, words: str) -> None:
    with pytest.raises(InvalidModel, match=f"org/name: .*{words}"):
        chosen(*TEXTS, INDEX, *SHARDS, index=index)


def test_shards_without_an_index_are_refused_before_they_are_fetched() -> None:
    with pytest.raises(InvalidModel, match=r"3 shards.* no model\.safetensors\.index\.json"):
        chosen(*TEXTS, *SHARDS)


def test_sentence_transformers() -> None:
    wanted = {
        *TEXTS, "model.safetensors", "modules.json", "sentence_bert_config.json", "vocab.txt",
        "config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/config.json",
        "2_Dense/model.safetensors",
    }  # fmt: skip
    others = {"2_Dense/pytorch_model.bin", "pytorch_model.bin", "onnx/model_O4.onnx", "train_script.py"}
    assert names(chosen(*wanted, *others)) == wanted


def test_companions_are_no_quants() -> None:
    choice = chosen("x-Q8_0.gguf", "x-Q4_K_M.gguf", "mmproj-F16.gguf", "imatrix.gguf", quant="Q8_0")
    assert choice.left_out == {"other quants": 1, "no models of their own": 2}


def test_one_file_of_another_name() -> None:
    assert names(chosen("config.json", "weights.safetensors")) == {"config.json", "weights.safetensors"}


def test_a_quant_that_is_to_be_made() -> None:
    choice = chosen(*TEXTS, "model.safetensors", quant="Q4_K_M")
    assert (choice.kind, choice.to_make) == ("checkpoint", "Q4_K_M")
    assert names(choice) == {*TEXTS, "model.safetensors"}


# ── nothing that is read ──


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "model.pt", "weights.pth", "epoch=1.ckpt", "model.PKL"])
@pytest.mark.parametrize("quant", [None, "Q4_K_M"])
def test_pickles_alone_are_refused(pickled: str, quant: str | None) -> None:
    with pytest.raises(Unsupported, match="only pickled .*can run code") as caught:
        chosen(*TEXTS, pickled, quant=quant)
    assert pickled in caught.value.message and "safetensors" in (caught.value.hint or "")


@pytest.mark.parametrize("paths", [TEXTS, ("README.md", "mmproj-F16.gguf", "imatrix.gguf"), ("x.onnx",), ()])
def test_no_weights_at_all(paths: tuple[str, ...]) -> None:
    with pytest.raises(ModelNotFound, match="no safetensors and no GGUF"):
        chosen(*paths)


# ── GGUF ──


def test_the_only_gguf() -> None:
    choice = chosen("README.md", "config.json", "tiny-q8_0.gguf", "mmproj-tiny-f16.gguf", "tiny.imatrix.gguf")
    assert names(choice) == {"tiny-q8_0.gguf"} and choice.kind == "gguf"
    assert choice.first is not None and choice.first.path == "tiny-q8_0.gguf"


MANY = (
    "README.md", ".gitattributes", "imatrix_unsloth.gguf", "mmproj-BF16.gguf", "m-Q2_K.gguf", "m-Q4_K_M.gguf",
    "m-UD-Q4_K_XL.gguf", "m-IQ4_XS.gguf", "m-MXFP4_MOE.gguf", "m-Q8_0-00001-of-00002.gguf",
    "m-Q8_0-00002-of-00002.gguf", "BF16/m-BF16-00001-of-00003.gguf", "BF16/m-BF16-00002-of-00003.gguf",
    "BF16/m-BF16-00003-of-00003.gguf", "Q6_K/part-00001-of-00002.gguf", "Q6_K/part-00002-of-00002.gguf",
)  # fmt: skip


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ("Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("UD-Q4_K_XL", ["m-UD-Q4_K_XL.gguf"]),
        ("IQ4_XS", ["m-IQ4_XS.gguf"]),
        ("MXFP4_MOE", ["m-MXFP4_MOE.gguf"]),
        ("Q8_0", ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]),
        ("BF16", [f"BF16/m-BF16-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]),
        ("Q6_K", ["Q6_K/part-00001-of-00002.gguf", "Q6_K/part-00002-of-00002.gguf"]),
    ],
)
def test_the_one_of_many_that_was_named(quant: str, expected: list[str]) -> None:
    choice = chosen(*MANY, quant=quant)
    assert [file.path for file in choice.files] == expected
    assert choice.first == choice.files[0] and choice.kind == "gguf"


def test_many_and_none_named() -> None:
    with pytest.raises(LlmkitError, match="holds 8 GGUF models: .*Q4_K_M") as caught:
        chosen(*MANY)
    assert "e.g. org/name:Q4_K_M" in (caught.value.hint or "")
    with pytest.raises(LlmkitError, match="holds 2 GGUF models: a.gguf") as caught:
        chosen("a.gguf", "b.gguf")
    assert "--include" in (caught.value.hint or "")


def test_a_quant_that_is_not_there_gets_the_nearest() -> None:
    with pytest.raises(ModelNotFound, match="has no Q4_K_S") as caught:
        chosen(*MANY, quant="Q4_K_S")
    assert "Q4_K_M" in (caught.value.hint or "").split(": ")[1].split(",")[0]
    sizes = {"a-Q4_0.gguf": 2 * GB, "a-Q8_0.gguf": 4 * GB}
    with pytest.raises(ModelNotFound, match=r"It has Q4_0 \(2\.0 GB\), Q8_0 \(4\.0 GB\)"):
        choose(repository(*sizes, sizes=sizes), quant="Q6_K")


def test_a_part_that_is_missing() -> None:
    paths = [path for path in MANY if path != "BF16/m-BF16-00002-of-00003.gguf"]
    with pytest.raises(InvalidModel, match=r"BF16/m-BF16-00002-of-00003\.gguf is missing"):
        chosen(*paths, quant="BF16")
    with pytest.raises(InvalidModel, match="00001-of-00002"):
        chosen("m-Q8_0-00002-of-00002.gguf")
    assert names(chosen(*paths, quant="Q4_K_M")) == {"m-Q4_K_M.gguf"}


def test_two_files_of_one_quant() -> None:
    with pytest.raises(LlmkitError, match=r"2 files are Q4_K_M: a-Q4_K_M\.gguf, b-Q4_K_M\.gguf") as caught:
        chosen("a-Q4_K_M.gguf", "b-Q4_K_M.gguf", quant="Q4_K_M")
    assert "--include" in (caught.value.hint or "")
    assert names(chosen("a-Q4_K_M.gguf", "b-Q4_K_M.gguf", include=["b-Q4_K_M.gguf"])) == {"b-Q4_K_M.gguf"}


def test_companions_of_a_model_are_no_models() -> None:
    companions = (
        "mmproj-F16.gguf", "m-mmproj-Q8_0.gguf", "MMPROJ.gguf", "imatrix.gguf", "m.imatrix.gguf", "m-bf16-imatrix.gguf"
    )  # fmt: skip
    models = ("m-Q4_K_M.gguf", "m-IQ3_M-imatrix.gguf", "m-imatrix-Q8_0.gguf", "no-label.gguf")
    assert set(ggufs(repository(*companions, *models))) == set(models)


def test_both_kinds_in_one_repository() -> None:
    both = (*TEXTS, "model.safetensors", "m-Q4_K_M.gguf", "m-Q8_0.gguf")
    assert names(chosen(*both)) == {*TEXTS, "model.safetensors"}
    assert names(chosen(*both, quant="Q8_0")) == {"m-Q8_0.gguf"}
    made = chosen(*both, quant="Q5_K_M")
    assert (made.kind, made.to_make) == ("checkpoint", "Q5_K_M")


# ── by hand ──


def test_include_replaces_the_choice_and_exclude_takes_from_it() -> None:
    paths = (*TEXTS, "model.safetensors", "onnx/model.onnx", "onnx/deep/x.onnx", "pytorch_model.bin")
    assert names(chosen(*paths, include=["onnx/*"])) == {"onnx/model.onnx", "onnx/deep/x.onnx"}
    assert names(chosen(*paths, include=["onnx"])) == {"onnx/model.onnx", "onnx/deep/x.onnx"}
    assert names(chosen(*paths, include=["*.json", "LICENSE"])) == {*TEXTS} - {"README.md"}
    assert names(chosen(*paths, exclude=["*.md", "LICENSE"])) == {*TEXTS, "model.safetensors"} - {
        "README.md",
        "LICENSE",
    }
    assert names(chosen(*paths, include=["*"], exclude=["*.bin", "onnx/"])) == {*TEXTS, "model.safetensors"}
    choice = chosen(*paths, include=["*.json"], exclude=["token*"])
    assert choice.kind == "files" and choice.left_out["excluded by --exclude"] == 2
    assert chosen("a/model[1].gguf", "b.gguf", include=["a/model[1].gguf"]).files, "a name is a name before a pattern"


def test_what_is_asked_for_by_hand_and_not_given() -> None:
    with pytest.raises(Unsupported, match=r"pytorch_model\.bin is pickled"):
        chosen(*TEXTS, "pytorch_model.bin", include=["*"])
    with pytest.raises(ModelNotFound, match=r"no file matches \*\.gguf"):
        chosen(*TEXTS, include=["*.gguf"])
    with pytest.raises(ModelNotFound, match="leaves nothing"):
        chosen(*TEXTS, "model.safetensors", exclude=["*"])


def test_a_first_part_that_was_excluded() -> None:
    choice = chosen("m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", exclude=["*-00001-*"])
    assert choice.first is None


# ── hostile listings, where HTTP cannot carry them ──


@pytest.mark.parametrize(
    "path",
    ["x\udc80", "\ud800.json", "a\x00b", "a\x85b", "COM1", "lpt9.txt", "Aux", "a/NUL.json", "a /b", ".GIT/hooks/x",
     "x.partial", "x.partial.json", "x.partial.lock", "é" * 116, "z:x", "\\\\host\\x"],
    ids=ascii,
)  # fmt: skip
def test_names_that_may_not_be_written(path: str) -> None:
    with pytest.raises(InvalidModel, match="is refused") as caught:
        repository("config.json", path)
    caught.value.message.encode()


@pytest.mark.parametrize("path", ["a..b", "..a", "x…", "コン.json", "con-fig.json", "a b/c d", ".gitattributes", "#?%"])
def test_names_that_are_only_odd(path: str) -> None:
    assert repository("config.json", path).files[1].path == path


@pytest.mark.parametrize(
    "file",
    [
        RemoteFile("x", -1, "0" * 40),
        RemoteFile("x", 1, "0" * 39),
        RemoteFile("x", 1, "0" * 40, "0" * 63 + "g"),
        RemoteFile("x", 1, "../../../../etc/passwd"),
        RemoteFile("x", 1, "0" * 40, "/" + "0" * 63),
        RemoteFile("x", 1, "0" * 40 + "\n"),
        RemoteFile("x", 1, "A" * 40),
    ],
)
def test_sizes_and_hashes_that_are_none(file: RemoteFile) -> None:
    with pytest.raises(InvalidModel, match="is listed with size"):
        checked(Repository("org/name", "main", "0" * 40, (file,)))


@pytest.mark.parametrize("commit", ["", "main", "../" * 10, "0" * 64, "0" * 40 + "\n"])
def test_commits_that_are_none(commit: str) -> None:
    with pytest.raises(InvalidModel, match="the commit"):
        checked(Repository("org/name", "main", commit, ()))


def test_a_file_that_is_a_folder_too() -> None:
    for pair in (("a", "a/b"), ("A/b/c", "a/B")):
        with pytest.raises(InvalidModel, match="as the folder of"):
            repository(*pair)
