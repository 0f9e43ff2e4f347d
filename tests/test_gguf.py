"""gguf.read and gguf_writer against the package gguf, and against files made to hurt the reader."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from llmkit import gguf, gguf_values, gguf_writer
from llmkit.errors import InvalidModel, LlmkitError, ModelNotFound
from llmkit.gguf import Array, Value, ValueType
from llmkit.quants import TENSOR_TYPES

package = pytest.importorskip("gguf")
RELAXED = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# --- building files byte by byte -------------------------------------------------------------------------------------


def text(content: str | bytes) -> bytes:
    """A GGUF string."""
    raw = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    """A key with its value's type and bytes."""
    return text(name) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    """The bytes of an array value."""
    return struct.pack("<IQ", kind, count) + payload


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor description; `dims` as in the file: width first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_bytes(
    keys: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A whole file; `counts` are the announced numbers of tensors and keys."""
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


ARCHITECTURE = key("general.architecture", 8, text("llama"))
NESTED = array(9, 2, array(4, 2, struct.pack("<2I", 1, 2)) + array(8, 1, text("x")))
EVERY_TYPE = [
    ARCHITECTURE,
    key("u8", 0, b"\xff"), key("i8", 1, b"\xff"), key("u16", 2, b"\xff\xff"), key("i16", 3, b"\xff\xff"),
    key("u32", 4, b"\xff" * 4), key("i32", 5, b"\xff" * 4), key("f32", 6, struct.pack("<f", 0.1)), key("yes", 7, b"\1"),
    key("no", 7, b"\0"), key("text", 8, text("naïve ✅")), key("u64", 10, b"\xff" * 8), key("i64", 11, b"\xff" * 8),
    key("f64", 12, struct.pack("<d", 0.1)), key("texts", 9, array(8, 3, text("a") + text("") + text("ü"))),
    key("floats", 9, array(6, 2, struct.pack("<2f", 1.5, -2.5))), key("truths", 9, array(7, 3, b"\1\0\1")),
    key("empty", 9, array(4, 0, b"")), key("ints", 9, array(3, 2, struct.pack("<2h", -1, 7))),
]  # fmt: skip


def plain(value: Any) -> Any:
    """Arrays as lists, all the way down."""
    return [plain(item) for item in value] if isinstance(value, Array) else value


def described(file: gguf.GgufFile) -> dict[str, tuple[str, Any]]:
    """The metadata as oracle.metadata puts it."""
    found = {}
    for name, value in file.metadata.items():
        kinds, data = value.type.name, value.data
        found[name] = (f"{kinds} {data.element.name}" if isinstance(data, Array) and len(data) else kinds, plain(data))
    return found


def contents(file: gguf.GgufFile) -> dict[str, oracle.Tensor]:
    """The tensors as oracle.tensor_bytes puts them."""
    found = {}
    for name, info in file.tensors.items():
        with info.path.open("rb") as stream:
            stream.seek(info.offset)
            found[name] = oracle.Tensor(info.type.name, info.shape, stream.read(info.nbytes))
    return found


def same_values(ours: dict[str, tuple[str, Any]], theirs: dict[str, tuple[str, Any]]) -> None:
    """Keys, order, types and values are equal; the package names an empty array's type by 'ARRAY' alone, as we do."""
    assert list(ours) == list(theirs)
    for name, (kinds, value) in theirs.items():
        assert ours[name][0] == kinds or value == [], name
        assert ours[name][1] == value, name


# --- whole files -----------------------------------------------------------------------------------------------------


def test_every_value_type(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(file_bytes(EVERY_TYPE, []))
    same_values(described(gguf.read(path)), oracle.metadata(path))


def test_nested_arrays(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(file_bytes([key("nested", 9, NESTED), key("after", 4, b"\7\0\0\0")], []))
    found = gguf.read(path)
    assert plain(found.get("nested")) == [[1, 2], ["x"]] and found.get("after") == 7


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_of_every_plain_type(tmp_path: Path, version: int) -> None:
    path = tmp_path / "model.gguf"
    writer = package.GGUFWriter(path, "llama")
    for kind in ("f4", "f2", "f8", "i1", "i2", "i4", "i8"):
        writer.add_tensor(f"t.{kind}", np.arange(60).astype(kind).reshape(3, 4, 5))
    writer.add_tensor("one", np.ones(3, np.float32))
    writer.add_tensor(
        "blocks", np.arange(36 * 2, dtype=np.uint8).reshape(2, 36), raw_dtype=package.GGMLQuantizationType.Q4_0
    )
    writer.add_uint32("general.alignment", 64)
    writer.data_alignment = 64
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", version)  # versions 2 and 3 differ in nothing else, for little endian
    path.write_bytes(content)
    found = gguf.read(path)
    assert (found.version, found.alignment) == (version, 64)
    assert not list(oracle.differing(contents(found), oracle.tensor_bytes(path)))
    assert found.tensors["blocks"].shape == (2, 64)


def test_published_model(smollm2_gguf: Path) -> None:
    found = gguf.read(smollm2_gguf)
    same_values(described(found), oracle.metadata(smollm2_gguf))
    assert not list(oracle.differing(contents(found), oracle.tensor_bytes(smollm2_gguf)))


def test_writer_is_read_by_the_package(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    metadata = {
        "general.architecture": Value.string("llama"), "a.u32": Value.uint32(2**32 - 1), "a.i32": Value.int32(-5),
        "a.f32": Value.float32(0.1), "a.bool": Value.boolean(True), "a.u8": Value(ValueType.UINT8, 255),
        "a.i64": Value(ValueType.INT64, -(2**63)), "a.f64": Value(ValueType.FLOAT64, 0.1),
        "a.texts": Value.array(ValueType.STRING, ["", "ü", "✅"]), "a.ints": Value.array(ValueType.INT32, range(5)),
    }  # fmt: skip
    chance = np.random.default_rng(0)
    rows = [
        (f"blk.{number}.{name}.weight", (3, 2 * kind.block), kind, chance.bytes(3 * 2 * kind.nbytes))
        for number, (name, kind) in enumerate(TENSOR_TYPES.items())
        if name not in ("Q8_1", "Q8_K", "NVFP4", "Q1_0", "Q2_0")  # never in files, or unknown to the package
    ]
    gguf_writer.write(path, metadata, rows)
    assert path.stat().st_size % 32 == 0
    theirs = oracle.tensor_bytes(path)
    assert {name: (tensor.type, tensor.data) for name, tensor in theirs.items()} == {
        name: (kind.name, data) for name, _, kind, data in rows
    }
    same_values({name: described(gguf.read(path))[name] for name in metadata}, oracle.metadata(path))
    assert not list(oracle.differing(contents(gguf.read(path)), theirs))


def test_sparse_file_has_the_size_of_the_whole(tmp_path: Path) -> None:
    kind, metadata = TENSOR_TYPES["Q4_K"], {"general.architecture": Value.string("llama")}
    rows = [(f"blk.{number}.w.weight", (5, 256), kind) for number in range(3)]
    gguf_writer.write_sparse(tmp_path / "sparse.gguf", metadata, rows)
    gguf_writer.write(tmp_path / "whole.gguf", metadata, [(*row, bytes(5 * kind.nbytes)) for row in rows])
    assert (tmp_path / "sparse.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_large_vocabulary_is_read_in_half_a_second(tmp_path: Path) -> None:
    n_tokens, path = 262_144, tmp_path / "model.gguf"
    tokens = b"".join(text(f"▁token{number}") for number in range(n_tokens))
    keys = [
        ARCHITECTURE,
        key("tokenizer.ggml.tokens", 9, array(8, n_tokens, tokens)),
        key("tokenizer.ggml.scores", 9, array(6, n_tokens, bytes(4 * n_tokens))),
        key("tokenizer.ggml.token_type", 9, array(5, n_tokens, bytes(4 * n_tokens))),
        key("tokenizer.ggml.merges", 9, array(8, n_tokens, tokens)),
    ]
    path.write_bytes(file_bytes(keys, [tensor("w", (4,))], bytes(32)))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        found = gguf.read(path)
        seconds.append(time.process_time() - start)
    assert min(seconds) <= 0.5
    assert (
        found.get("tokenizer.ggml.tokens")[-1] == "▁token262143" and len(found.get("tokenizer.ggml.scores")) == n_tokens
    )


# --- split files -----------------------------------------------------------------------------------------------------


def split_part(number: int, count: int, names: list[str], total: int) -> bytes:
    """One part with a float32 pair for each name."""
    keys = [
        *([ARCHITECTURE] if number == 0 else []),
        key("split.no", 2, struct.pack("<H", number)),
        key("split.count", 2, struct.pack("<H", count)),
        key("split.tensors.count", 5, struct.pack("<i", total)),
    ]
    rows = [tensor(name, (2,), 0, 32 * place) for place, name in enumerate(names)]
    return file_bytes(keys, rows, bytes(32 * len(names)))


def write_split(folder: Path, parts: list[list[str]], total: int | None = None) -> Path:
    """All the parts of a split file; returns the first."""
    count = len(parts)
    total = sum(map(len, parts)) if total is None else total
    for number, names in enumerate(parts):
        path = folder / f"model-{number + 1:05d}-of-{count:05d}.gguf"
        path.write_bytes(split_part(number, count, names, total))
    return folder / f"model-00001-of-{count:05d}.gguf"


def test_split_file(tmp_path: Path) -> None:
    found = gguf.read(write_split(tmp_path, [["a", "b"], ["c"], []]))
    assert list(found.tensors) == ["a", "b", "c"] and len(found.paths) == 3
    assert found.tensors["c"].path.name == "model-00002-of-00003.gguf"
    assert found.get("general.architecture") == "llama"


def test_split_file_misses_a_part(tmp_path: Path) -> None:
    first = write_split(tmp_path, [["a"], ["b"], ["c"]])
    (tmp_path / "model-00002-of-00003.gguf").unlink()
    with pytest.raises(ModelNotFound, match=r"part model-00002-of-00003\.gguf is missing"):
        gguf.read(first)


def test_not_the_first_part(tmp_path: Path) -> None:
    write_split(tmp_path, [["a"], ["b"]])
    with pytest.raises(InvalidModel, match="not the first part") as caught:
        gguf.read(tmp_path / "model-00002-of-00002.gguf")
    assert "model-00001-of-00002.gguf" in (caught.value.hint or "")


def test_split_part_under_another_name(tmp_path: Path) -> None:
    first = write_split(tmp_path, [["a"], ["b"]])
    with pytest.raises(InvalidModel, match="one of 2 parts"):
        gguf.read(first.rename(tmp_path / "renamed.gguf"))


def test_split_tensors_twice_or_too_few(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="'a' is also in an earlier part"):
        gguf.read(write_split(tmp_path, [["a"], ["a"]]))
    with pytest.raises(InvalidModel, match=r"split\.tensors\.count is 3"):
        gguf.read(write_split(tmp_path, [["a"], ["b"]], total=3))


def test_parts_in_the_wrong_order(tmp_path: Path) -> None:
    first = write_split(tmp_path, [["a"], ["b"], ["c"]])
    two, three = (tmp_path / f"model-0000{number}-of-00003.gguf" for number in (2, 3))
    two.rename(tmp_path / "aside")
    three.rename(two)
    (tmp_path / "aside").rename(three)
    with pytest.raises(InvalidModel, match="00002-of-00003"):
        gguf.read(first)


# --- hostile files ---------------------------------------------------------------------------------------------------


def bomb(depth: int) -> bytes:
    """An array in an array in an array …"""
    return array(9, 1, b"") * depth + array(4, 0, b"")


PAIR = tensor("w", (2,))
HUGE = 2**62
HOSTILE = {
    "empty": (b"", "is empty"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "HTML": (b"\n <!DOCTYPE html><html>", "HTML"),
    "something else": (b"PK\3\4" + bytes(60), "is not a GGUF file"),
    "only the magic": (b"GGUF", "version"),
    "old magic": (b"ggjt" + bytes(60), "is not a GGUF file"),
    "version 0": (file_bytes([], [], version=0), "version 0"),
    "version 1": (file_bytes([], [], version=1), "version 1"),
    "version 4": (file_bytes([], [], version=4), "version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "big-endian"),
    "2**64-1 keys": (file_bytes([ARCHITECTURE], [], counts=(0, 2**64 - 1)), "keys"),
    "2**64-1 tensors": (file_bytes([ARCHITECTURE], [PAIR], counts=(2**64 - 1, 1)), "tensors"),
    "more keys than there are": (file_bytes([ARCHITECTURE], [], counts=(0, 3)), "3 keys, but"),
    "key longer than the file": (file_bytes([struct.pack("<Q", 10**9) + b"x" * 40], []), "key"),
    "key not UTF-8": (file_bytes([key(b"\xff\xfe", 4, bytes(4))], []), "not UTF-8"),
    "key twice": (file_bytes([key("a", 4, bytes(4))] * 2, []), "'a' occurs twice"),
    "value type unknown": (file_bytes([key("a", 13, bytes(16))], []), "'a' has the unknown value type 13"),
    "string longer than the file": (file_bytes([key("a", 8, struct.pack("<Q", 2**63))], []), "a at byte"),
    "value cut": (file_bytes([key("a", 10, b"")], [])[:-40], "ends at byte"),
    "array type unknown": (file_bytes([key("a", 9, array(99, 1, bytes(8)))], []), "'a' has the unknown value type 99"),
    "array of 2**64-1 numbers": (file_bytes([key("a", 9, array(4, 2**64 - 1, b""))], []), "items of a"),
    "array of 2**62 strings": (file_bytes([key("a", 9, array(8, HUGE, b""))], []), "items of a"),
    "array of 2**62 arrays": (file_bytes([key("a", 9, array(9, HUGE, b""))], []), "items of a"),
    "array string past the end": (file_bytes([key("a", 9, array(8, 1, struct.pack("<Q", 10**9)))], []), "'a'"),
    "array bomb": (file_bytes([key("a", 9, bomb(100_000))], []), "'a' nests arrays deeper"),
    "alignment zero": (file_bytes([key("general.alignment", 4, bytes(4))], []), "general.alignment is 0"),
    "alignment three": (file_bytes([key("general.alignment", 4, b"\3\0\0\0")], []), "general.alignment is 3"),
    "alignment text": (file_bytes([key("general.alignment", 8, text("32"))], []), "general.alignment is '32'"),
    "tensor name not UTF-8": (file_bytes([], [tensor(b"\xff", (2,))], bytes(32)), "not UTF-8"),
    "tensor twice": (file_bytes([], [PAIR, tensor("w", (2,), 0, 32)], bytes(64)), "'w' occurs twice"),
    "five dimensions": (file_bytes([], [tensor("w", (1,) * 5)], bytes(32)), "'w' has 5 dimensions"),
    "2**32-1 dimensions": (file_bytes([], [text("w") + b"\xff" * 40], bytes(32)), "'w' has 4294967295 dimensions"),
    "shape overflowing": (file_bytes([], [tensor("w", (2**40, 2**40))], bytes(32)), "'w' has the impossible shape"),
    "shape 2**64-1": (file_bytes([], [tensor("w", (2**64 - 1,))], bytes(32)), "'w'"),
    "shape zero times 2**64-1": (file_bytes([], [tensor("w", (0, 2**64 - 1))], bytes(32)), "'w'"),
    "type unknown": (file_bytes([], [tensor("w", (2,), 99)], bytes(32)), "'w' has the unknown type 99"),
    "type removed": (file_bytes([], [tensor("w", (32,), 4)], bytes(32)), "'w' has the unknown type 4"),
    "rows not whole blocks": (file_bytes([], [tensor("w", (33, 32), 2)], bytes(640)), "'w': rows of 33"),
    "offset off the grid": (file_bytes([], [tensor("w", (2,), 0, 8)], bytes(64)), "'w' begins at 8"),
    "offset past the end": (file_bytes([], [tensor("w", (2,), 0, 64)], bytes(32)), "'w' ends at byte"),
    "offset 2**64-32": (file_bytes([], [tensor("w", (2,), 0, 2**64 - 32)], bytes(32)), "'w' ends at byte"),
    "truncated": (file_bytes([], [tensor("w", (64,))], bytes(100)), "cut short"),
    "overlap": (file_bytes([], [tensor("w", (16,)), tensor("v", (4,), 0, 32)], bytes(64)), "'w' and 'v' overlap"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_with_its_name(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidModel) as caught:
        gguf.read(path)
    assert str(path) in caught.value.message and message in caught.value.message


def test_missing_file_folder_and_long_name(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        gguf.read(tmp_path / "nothing.gguf")
    with pytest.raises(LlmkitError, match="folder"):
        gguf.read(tmp_path)
    with pytest.raises(LlmkitError):
        gguf.read(tmp_path / ("x" * 5000))


def test_values_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    keys = [key("tokens", 9, array(8, 2, text(b"\xff\xfe") + text("ok"))), key("name", 8, text(b"\xe4"))]
    path.write_bytes(file_bytes(keys, []))
    found = gguf.read(path)
    assert [gguf_values.encode_string(item) for item in found.get("tokens")] == [text(b"\xff\xfe"), text("ok")]
    again = tmp_path / "again.gguf"
    gguf_writer.write(again, found.metadata, [])
    assert again.read_bytes() == path.read_bytes()


# --- any bytes whatsoever --------------------------------------------------------------------------------------------


def read_or_refuse(path: Path) -> bool:
    """Whether the file is read; only an LlmkitError naming it may come out, and all values must decode."""
    try:
        found = gguf.read(path)
    except LlmkitError as error:
        assert path.name[:5] in error.message
        return False
    size = path.stat().st_size
    for value in found.metadata.values():
        plain(value.data)
    for info in found.tensors.values():
        assert info.offset >= 0 and info.offset + info.nbytes <= size
    return True


SCALARS = st.tuples(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 200]), st.binary(max_size=9))
STRINGS = st.tuples(st.just(8), st.binary(max_size=8).map(text))
LEAVES = SCALARS | STRINGS
ARRAYS = st.recursive(
    st.builds(array, st.sampled_from([0, 4, 7, 8, 10]), st.integers(0, 3), st.binary(max_size=24)),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: array(9, len(items), b"".join(items))), max_leaves=6,
)  # fmt: skip
NAMES = st.sampled_from(["general.alignment", "split.count", "split.no", "a", "b"]) | st.binary(max_size=4)
KEYS = st.tuples(NAMES, LEAVES | ARRAYS.map(lambda payload: (9, payload))).map(lambda row: key(row[0], *row[1]))
SIZES = st.integers(0, 70) | st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1])
TENSORS = st.tuples(
    NAMES, st.lists(SIZES, max_size=5).map(tuple), st.integers(0, 45), st.sampled_from([0, 32, 64, 1, 2**64 - 32])
).map(lambda row: tensor(*row))


@RELAXED
@given(content=st.binary(max_size=200) | st.binary(max_size=200).map(lambda rest: b"GGUF\3\0\0\0" + rest))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    read_or_refuse(path)


@RELAXED
@given(keys=st.lists(KEYS, max_size=4), tensors=st.lists(TENSORS, max_size=3), data=st.binary(max_size=200))
def test_any_header(tmp_path: Path, keys: list[bytes], tensors: list[bytes], data: bytes) -> None:
    path = tmp_path / "model-00001-of-00002.gguf"
    path.write_bytes(file_bytes(keys, tensors, data))
    read_or_refuse(path)


@pytest.mark.slow
def test_twenty_thousand_mutations(tmp_path: Path) -> None:
    rows = [tensor("w", (4, 2)), tensor("b.weight", (32, 2), 2, 32), tensor("c", (), 0, 96)]
    keys = [*EVERY_TYPE, key("nested", 9, NESTED), key("general.alignment", 4, b"\x20\0\0\0")]
    good, chance, whole = file_bytes(keys, rows, bytes(128)), random.Random(7), 0
    path = tmp_path / "model.gguf"
    path.write_bytes(good)
    assert read_or_refuse(path)
    for _ in range(20_000):
        path.write_bytes(_mutated(good, chance))
        whole += read_or_refuse(path)
    assert 100 < whole < 15_000, "the mutations must break most files and leave some whole"


def _mutated(good: bytes, chance: random.Random) -> bytes:
    """`good` with one to three wounds: bytes changed, cut out, repeated, counts inflated, the end lost."""
    content = bytearray(good)
    for _ in range(chance.randint(1, 3)):
        at, span = chance.randrange(4, max(5, len(content))), chance.randint(1, 12)
        wound = chance.randrange(5)
        if wound == 0:
            content[at : at + 1] = bytes([chance.randrange(256)])
        elif wound == 1:
            del content[at : at + span]
        elif wound == 2:
            content[at:at] = content[at : at + span]
        elif wound == 3:
            content[at : at + 8] = chance.choice([bytes(8), b"\xff" * 8, struct.pack("<Q", chance.getrandbits(40))])
        elif chance.random() < 0.3:
            del content[at:]
    return bytes(content)
