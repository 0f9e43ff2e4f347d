"""checkpoint.read against the package safetensors, and against files made to hurt it."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit import checkpoint
from llmkit.errors import InvalidModel, LlmkitError, ModelNotFound

CONFIG = {"architectures": ["LlamaForCausalLM"]}
RELAXED = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file's bytes; `header` is JSON-able or raw bytes, `length` what the first 8 bytes announce."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def folder_with(folder: Path, files: dict[str, bytes], config: Any = CONFIG) -> Path:
    """A checkpoint folder holding config.json and `files`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def read_all(tensors: dict[str, checkpoint.StoredTensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What the headers say, with the bytes they point at."""
    found = {}
    for name, tensor in tensors.items():
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            found[name] = (tensor.dtype, tensor.shape, file.read(tensor.nbytes))
    return found


def truth(*paths: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The same through the package safetensors."""
    package = pytest.importorskip("safetensors")
    found = {}
    for path in paths:
        for name, row in package.deserialize(path.read_bytes()):
            found[name] = (row["dtype"], tuple(row["shape"]), bytes(row["data"]))
    return found


# --- whole checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_reads_what_safetensors_reads(tiny_checkpoint: Callable[..., Path], dtype: str, shards: int) -> None:
    folder = tiny_checkpoint("qwen2", dtype=dtype, shards=shards)
    found = checkpoint.read(folder)
    assert len(found.paths) == shards
    assert found.config == json.loads((folder / "config.json").read_text())
    assert read_all(found.tensors) == truth(*sorted(folder.glob("*.safetensors")))


def test_reads_every_number_type(tmp_path: Path) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    kinds = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
    arrays = {f"t.{kind}": np.arange(24).astype(kind).reshape(2, 3, 4) for kind in kinds}
    arrays |= {"scalar": np.array(7, np.float32), "empty": np.zeros((0, 5), np.float32)}
    numpy_files.save_file(arrays, tmp_path / "model.safetensors")
    found = checkpoint.read(folder_with(tmp_path, {}))
    assert read_all(found.tensors) == truth(tmp_path / "model.safetensors")
    assert {found.tensors[f"t.{kind}"].dtype for kind in kinds} == {
        "F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"
    }  # fmt: skip


def test_one_file_of_another_name_is_found(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"weights.safetensors": safetensors({"a": F32}, bytes(8))})
    assert list(checkpoint.read(folder).tensors) == ["a"]


# --- hostile safetensors ---------------------------------------------------------------------------------------------


def row(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DEEP = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
TWICE = b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2)
HOSTILE = {
    "empty file": (b"", "too few"),
    "seven bytes": (b"1234567", "too few"),
    "header longer than the file": (safetensors({"a": F32}, bytes(8), length=10**6), "header of 1000000 bytes"),
    "header length 2**63": (safetensors({"a": F32}, length=2**63), "header of"),
    "header length 2**64-1": (safetensors({"a": F32}, length=2**64 - 1), "header of"),
    "header not JSON": (safetensors(b"{'a': 1}"), "not JSON"),
    "header cut in a key": (safetensors(b'{"a'), "not JSON"),
    "header is a list": (safetensors([F32]), "expected a JSON object, found list"),
    "header not UTF-8": (safetensors(b'{"\xff\xfe\xfa": 1}'), "not JSON"),
    "deep nesting": (safetensors(DEEP), "header"),
    "duplicate key": (safetensors(TWICE, bytes(8)), "'a' occurs twice"),
    "metadata a number": (safetensors({"__metadata__": 3, "a": F32}, bytes(8)), "__metadata__"),
    "row a number": (safetensors({"a": 3}), "'a'"),
    "no dtype": (safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "'a': unknown dtype None"),
    "dtype unknown": (safetensors({"a": row("F33")}, bytes(8)), "'a': unknown dtype 'F33'"),
    "dtype true": (safetensors({"a": row(True)}, bytes(8)), "'a': unknown dtype True"),
    "dtype a list": (safetensors({"a": row(["F32"])}, bytes(8)), "'a': unknown dtype"),
    "shape negative": (safetensors({"a": row(shape=[-1, -2])}, bytes(8)), "'a': shape"),
    "shape a string": (safetensors({"a": row(shape="2")}, bytes(8)), "'a': shape"),
    "shape of booleans": (safetensors({"a": row(shape=[True, 2])}, bytes(8)), "'a': shape"),
    "shape of floats": (safetensors({"a": row(shape=[2.0])}, bytes(8)), "'a': shape"),
    "shape overflowing 64 bits": (safetensors({"a": row(shape=[2**32, 2**32, 2])}, bytes(8)), "'a'"),
    "shape a giant number": (safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), "header"),
    "offsets backwards": (safetensors({"a": row(offsets=[8, 0])}, bytes(8)), "'a': data_offsets"),
    "offsets negative": (safetensors({"a": row(offsets=[-8, 0])}, bytes(8)), "'a': data_offsets"),
    "three offsets": (safetensors({"a": row(offsets=[0, 4, 8])}, bytes(8)), "'a': data_offsets"),
    "offsets null": (safetensors({"a": row(offsets=None)}, bytes(8)), "'a': data_offsets"),
    "bytes unlike shape": (safetensors({"a": row(shape=[3])}, bytes(8)), "'a': 8 bytes for F32"),
    "past the end": (safetensors({"a": row(offsets=[8, 16])}, bytes(8)), "'a' ends at byte"),
    "truncated": (safetensors({"a": F32}, bytes(7)), "cut short"),
    "overlap": (safetensors({"a": F32, "b": row(offsets=[4, 12])}, bytes(12)), "'b' overlaps"),
    "same place": (safetensors({"a": F32, "b": F32}, bytes(8)), "'b' overlaps"),
    "hole": (safetensors({"a": F32, "b": row(offsets=[12, 20])}, bytes(20)), "'b' leaves a hole"),
    "hole at the start": (safetensors({"a": row(offsets=[4, 12])}, bytes(12)), "'a' leaves a hole"),
    "bytes after the end": (safetensors({"a": F32}, bytes(9)), "1 bytes after the last tensor"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
    "HTML": (b"<!DOCTYPE html><html><body>Not found</body></html>", "HTML"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_with_its_name(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    folder_with(tmp_path, {"model.safetensors": content})
    with pytest.raises(InvalidModel) as caught:
        checkpoint.read(tmp_path)
    assert "model.safetensors" in caught.value.message and message in caught.value.message


# --- hostile folders -------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such folder"):
        checkpoint.read(tmp_path / "nothing")
    with pytest.raises(LlmkitError):
        checkpoint.read(tmp_path / ("x" * 5000))


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ModelNotFound, match="is a file"):
        checkpoint.read(tmp_path / "file")


def test_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match=r"no config\.json") as caught:
        checkpoint.read(tmp_path)
    assert "model.gguf" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"a":1,"a":2}', "occurs twice"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_hostile_config(tmp_path: Path, config: bytes, message: str) -> None:
    folder_with(tmp_path, {"model.safetensors": safetensors({"a": F32}, bytes(8))}, config)
    with pytest.raises(InvalidModel, match=message) as caught:
        checkpoint.read(tmp_path)
    assert "config.json" in caught.value.message


def test_folder_without_weights(tmp_path: Path) -> None:
    folder_with(tmp_path, {})
    with pytest.raises(ModelNotFound, match="no safetensors"):
        checkpoint.read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelNotFound, match="pickled"):
        checkpoint.read(tmp_path)


def sharded(folder: Path, weight_map: Any, *, raw: bytes | None = None) -> Path:
    """Two shards with one tensor each (a, b), and an index that says what `weight_map` says."""
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode() if raw is None else raw
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    files = {one: safetensors({"a": F32}, bytes(8)), two: safetensors({"b": F32}, bytes(8))}
    return folder_with(folder, files | {"model.safetensors.index.json": index})


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEXES: dict[str, tuple[Any, type[LlmkitError], str]] = {
    "a shard that is missing": ({"a": ONE, "b": TWO, "c": "model-00003.safetensors"}, ModelNotFound, "model-00003"),
    "a tensor no shard holds": ({"a": ONE, "b": TWO, "c": TWO}, InvalidModel, "'c'"),
    "a tensor in the other shard": ({"a": TWO, "b": ONE}, InvalidModel, "'a'"),
    "a path outside": ({"a": "../" + ONE}, InvalidModel, "outside the folder"),
    "an absolute path": ({"a": "/etc/passwd"}, InvalidModel, "outside the folder"),
    "a name too long for a file": ({"a": "x" * 5000}, LlmkitError, "index"),
    "a name with a zero byte": ({"a": "x\0y"}, LlmkitError, "index"),
    "an empty name": ({"a": ""}, LlmkitError, "index"),
    "two dots": ({"a": ".."}, LlmkitError, "index"),
    "a list": ([ONE, TWO], InvalidModel, "weight_map"),
    "numbers": ({"a": 1}, InvalidModel, "weight_map"),
    "nothing": ({}, LlmkitError, "index"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_hostile_index(tmp_path: Path, case: str) -> None:
    weight_map, error, message = INDEXES[case]
    sharded(tmp_path, weight_map)
    with pytest.raises(error) as caught:
        checkpoint.read(tmp_path)
    assert message in caught.value.message


def test_a_shard_with_a_tensor_the_index_leaves_out(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": ONE, "b": TWO})
    (tmp_path / TWO).write_bytes(safetensors({"b": F32, "c": row(offsets=[8, 16])}, bytes(16)))
    with pytest.raises(InvalidModel, match=f"{TWO} holds 'c'"):
        checkpoint.read(tmp_path)


def test_hostile_index_file(tmp_path: Path) -> None:
    sharded(tmp_path, {}, raw=b"<html>")
    with pytest.raises(InvalidModel, match=r"index\.json.*not JSON"):
        checkpoint.read(tmp_path)


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": ONE, "b": TWO})
    (tmp_path / TWO).write_bytes(safetensors({"a": F32, "b": row(offsets=[8, 16])}, bytes(16)))
    with pytest.raises(InvalidModel, match="'a' is also in"):
        checkpoint.read(tmp_path)


def test_a_shard_that_is_truncated(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama", shards=3), tmp_path / "model")
    victim = folder / "model-00002-of-00003.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(InvalidModel, match=r"model-00002-of-00003\.safetensors: tensor '[^']+' ends at byte"):
        checkpoint.read(folder)


# --- any bytes whatsoever --------------------------------------------------------------------------------------------


def read_or_refuse(folder: Path) -> None:
    """Reads; only an LlmkitError may come out, and a success must keep every tensor inside its file, apart."""
    try:
        found = checkpoint.read(folder)
    except LlmkitError as error:
        assert str(folder) in error.message
        return
    end = dict.fromkeys(found.paths, 0)
    for tensor in sorted(found.tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        assert tensor.offset >= end[tensor.path]
        end[tensor.path] = tensor.offset + tensor.nbytes
    assert all(end[path] <= path.stat().st_size for path in found.paths)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16", "BOOL", "__metadata__"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=12,
)  # fmt: skip
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I8", "BOOL", "F64"]) | JSON_VALUES,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON_VALUES,
        "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)) | JSON_VALUES,
    },
)


@RELAXED
@given(content=st.binary(max_size=200))
def test_any_bytes_as_weights(tmp_path: Path, content: bytes) -> None:
    read_or_refuse(folder_with(tmp_path, {"model.safetensors": content}))


@RELAXED
@given(header=st.dictionaries(st.text(max_size=6), ROWS | JSON_VALUES, max_size=4), data=st.binary(max_size=40))
def test_any_header(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    read_or_refuse(folder_with(tmp_path, {"model.safetensors": safetensors(header, data)}))


@RELAXED
@given(config=st.binary(max_size=60) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_config(tmp_path: Path, config: bytes) -> None:
    read_or_refuse(folder_with(tmp_path, {"model.safetensors": safetensors({"a": F32}, bytes(8))}, config))


@RELAXED
@given(index=st.binary(max_size=60) | JSON_VALUES.map(lambda value: json.dumps({"weight_map": value}).encode()))
def test_any_index(tmp_path: Path, index: bytes) -> None:
    read_or_refuse(sharded(tmp_path, {}, raw=index))


def mutated(good: bytes, chance: random.Random) -> bytes:
    """`good` with one to three wounds: bytes changed, cut out, repeated, digits inflated, the end lost."""
    content = bytearray(good)
    for _ in range(chance.randint(1, 3)):
        at, span = chance.randrange(len(content) or 1), chance.randint(1, 12)
        wound = chance.randrange(6)
        if wound == 0:
            content[at : at + 1] = bytes([chance.randrange(256)])
        elif wound == 1:
            del content[at : at + span]
        elif wound == 2:
            content[at:at] = content[at : at + span]
        elif wound == 3:
            content[at : at + 8] = chance.choice([bytes(8), b"\xff" * 8, struct.pack("<Q", chance.getrandbits(40))])
        elif wound == 4:
            content[at : at + 1] = chance.choice([b"9999999999", b"-", b"[", b'"', b"\\u0000", b"1e9"])
        else:
            del content[at:]
    return bytes(content)


def test_metadata_may_be_null(tmp_path: Path) -> None:
    """As MLX writes it."""
    folder = folder_with(tmp_path, {})
    (folder / "model.safetensors").write_bytes(safetensors({"__metadata__": None, "a": F32}, bytes(8)))
    assert set(checkpoint.read(folder).tensors) == {"a"}


@pytest.mark.slow
def test_twenty_thousand_mutations(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "a": F32, "b.weight": row("BF16", [2, 3], [8, 20])}
    header |= {"c": row("I64", [1], [20, 28]), "d": row("F32", [], [28, 32])}
    good, chance, refused = safetensors(header, bytes(range(32))), random.Random(5), 0
    folder = folder_with(tmp_path, {})
    for _ in range(20_000):
        (folder / "model.safetensors").write_bytes(mutated(good, chance))
        try:
            read_or_refuse(folder)
            checkpoint.read(folder)
        except LlmkitError:
            refused += 1
    assert 10_000 < refused < 20_000, "the mutations must break most files and leave some whole"
