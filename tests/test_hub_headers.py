"""Headers fetched by ranges against the same files read whole; and files made to cost much or to mislead."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import TinyCheckpoint
from llmkit import checkpoint, gguf, gguf_writer
from llmkit.errors import InvalidModel, LlmkitError
from llmkit.gguf import Value, ValueType
from llmkit.hub import headers
from llmkit.hub.headers import gguf_header, safetensors_header
from llmkit.quants import F32

KIB, MIB = 1 << 10, 1 << 20
RELAXED = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Ranges:
    """read_range over bytes or a file, as a server does it, with a log of what was asked."""

    def __init__(self, source: Path | bytes) -> None:
        self.source = source
        self.asked: list[tuple[int, int]] = []

    def __call__(self, start: int, stop: int) -> bytes:
        self.asked.append((start, stop))
        if isinstance(self.source, bytes):
            return self.source[start:stop]
        with self.source.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    @property
    def nbytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def assert_each_byte_once(self, fetched: int) -> None:
        """What was asked is the file's beginning, in order and without an overlap."""
        assert [start for start, _ in self.asked] == [0, *(stop for _, stop in self.asked[:-1])][: len(self.asked)]
        assert self.asked[-1][1] == fetched


def assert_sparse(path: Path, source: Path, header: int) -> None:
    """`path` has the size of `source` and its first `header` bytes, the rest takes no room and reads as zeros."""
    stat = path.stat()
    assert stat.st_size == source.stat().st_size
    assert stat.st_blocks * 512 <= header + 8 * KIB
    with path.open("rb") as ours, source.open("rb") as theirs:
        assert ours.read(header) == theirs.read(header)
        assert ours.read(16 * MIB).strip(b"\0") == b""
    assert list(path.parent.glob("*.header")) == []


def safetensors(rows: dict[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file."""
    text = json.dumps(rows).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- safetensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_of_headers_reads_as_the_checkpoint(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, shards: int
) -> None:
    whole = checkpoint.read(tiny_checkpoint("llama", width=256, shards=shards))
    assert len(whole.paths) == shards
    folder = tmp_path / "headers"
    for source in whole.paths:
        ranges = Ranges(source)
        fetched = safetensors_header(ranges, ranges.nbytes, folder / source.name)
        assert len(ranges.asked) == 1 and fetched == min(256 * KIB, ranges.nbytes) < ranges.nbytes
        header = 8 + struct.unpack("<Q", source.read_bytes()[:8])[0]
        assert_sparse(folder / source.name, source, header)
    for name in ("config.json", "model.safetensors.index.json"):
        if (whole.folder / name).exists():
            shutil.copy(whole.folder / name, folder)
    found = checkpoint.read(folder)
    assert list(found.tensors) == list(whole.tensors)
    assert {name: replace(each, path=whole.folder / each.path.name) for name, each in found.tensors.items()} == (
        whole.tensors
    )


def test_a_long_header_takes_a_second_request(tmp_path: Path) -> None:
    rows = {
        f"model.layers.{i}.a_rather_long_name": {
            "dtype": "U8",
            "shape": [100],
            "data_offsets": [100 * i, 100 * i + 100],
        }
        for i in range(5000)
    }
    source = tmp_path / "whole.safetensors"
    source.write_bytes(safetensors(rows, os.urandom(500_000)))
    ranges = Ranges(source)
    path = tmp_path / "headers" / "whole.safetensors"
    fetched = safetensors_header(ranges, ranges.nbytes, path)
    header = ranges.nbytes - 500_000
    assert ranges.asked == [(0, 256 * KIB), (256 * KIB, header)] and fetched == header > 256 * KIB
    assert_sparse(path, source, header)
    expected = list(checkpoint.read_safetensors(source))
    assert [replace(each, path=source) for each in checkpoint.read_safetensors(path)] == expected
    assert len(expected) == 5000


@pytest.mark.parametrize("size", [256 * KIB - 1, 256 * KIB, 256 * KIB + 1])
def test_headers_as_long_as_the_guess(tmp_path: Path, size: int) -> None:
    row = {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}
    text = json.dumps({"a": row}).encode().ljust(size - 8)
    ranges = Ranges(struct.pack("<Q", len(text)) + text + b"\1" * 64)
    assert safetensors_header(ranges, ranges.nbytes, tmp_path / "x") == max(size, min(256 * KIB, size + 64))
    (tensor,) = checkpoint.read_safetensors(tmp_path / "x")
    assert (tensor.offset, tensor.nbytes) == (size, 64)
    assert (tmp_path / "x").read_bytes()[size:] == bytes(64)


def announcing(length: int) -> bytes:
    return struct.pack("<Q", length) + b"{}" * 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, too few"),
        (b"1234567", "7 bytes, too few"),
        (announcing(2001), "announces a header of 2001 bytes"),
        (announcing(100_000_001), "announces a header of 100000001 bytes"),
        (announcing((1 << 64) - 1), "announces a header of"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "HTML"),
        (struct.pack("<Q", 10) + b"not JSON!!", "not JSON"),
        (safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"short"), "cut short"),
        (safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}, bytes(24)), "leaves a hole"),
        (safetensors({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}}, bytes(16)), "expected"),
        (safetensors({}, bytes(5)), "5 bytes after the last tensor"),
    ],
)
def test_safetensors_that_are_none(content: bytes, message: str, tmp_path: Path) -> None:
    ranges = Ranges(content)
    with pytest.raises(InvalidModel, match=message) as caught:
        safetensors_header(ranges, ranges.nbytes, tmp_path / "a.safetensors")
    assert caught.value.message.startswith(f"{tmp_path / 'a.safetensors'}")
    assert list(tmp_path.iterdir()) == [] and len(ranges.asked) <= 1


def test_an_absurd_length_in_a_huge_file_costs_one_request(tmp_path: Path) -> None:
    ranges = Ranges(struct.pack("<Q", 100_000_001) + bytes(MIB))
    with pytest.raises(InvalidModel, match="announces a header"):
        safetensors_header(ranges, 5_000_000_000, tmp_path / "a")
    assert ranges.asked == [(0, 256 * KIB)] and list(tmp_path.iterdir()) == []


# --- GGUF ------------------------------------------------------------------------------------------------------------


def assert_same(found: gguf.GgufFile, whole: gguf.GgufFile) -> None:
    """All but the paths."""
    assert (found.version, found.alignment) == (whole.version, whole.alignment)
    assert found.metadata == whole.metadata and list(found.metadata) == list(whole.metadata)
    assert list(found.tensors) == list(whole.tensors)
    for name, info in whole.tensors.items():
        assert replace(found.tensors[name], path=info.path) == info


def test_a_real_gguf(smollm2_gguf: Path, tmp_path: Path) -> None:
    ranges = Ranges(smollm2_gguf)
    path = tmp_path / "model.gguf"
    fetched = gguf_header(ranges, ranges.nbytes, path)
    whole = gguf.read(smollm2_gguf)
    header = min(info.offset for info in whole.tensors.values())
    assert header > MIB  # or this would not show that more is asked for
    assert fetched < 2 * header
    ranges.assert_each_byte_once(fetched)
    assert_sparse(path, smollm2_gguf, header)
    assert_same(gguf.read(path), whole)


def small_gguf(path: Path, number: int = 0, count: int = 1, width: int = 512) -> Path:
    """A GGUF of two square tensors, 1 MiB each; a part of a split file when `count` is above 1."""
    metadata = {
        "general.architecture": Value.string("llama"),
        "texts": Value.array(ValueType.STRING, ["a", "", "three words here", "ü"]),
        "numbers": Value.array(ValueType.INT32, range(9)),
        "scores": Value.array(ValueType.FLOAT32, [0.5, -1.0]),
        "truth": Value.boolean(True),
    }
    if count > 1:
        metadata["split.no"] = Value(ValueType.UINT16, number)
        metadata["split.count"] = Value(ValueType.UINT16, count)
        metadata["split.tensors.count"] = Value.int32(2 * count)
    names = [f"blk.{2 * number + i}.weight" for i in range(2)]
    gguf_writer.write(path, metadata, [(name, (width, width), F32, os.urandom(4 * width**2)) for name in names])
    return path


def test_the_parts_of_a_split_gguf(tmp_path: Path) -> None:
    folder = tmp_path / "headers"
    names = [f"x-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        ranges = Ranges(small_gguf(tmp_path / name, number, 3))
        assert gguf_header(ranges, ranges.nbytes, folder / name) == MIB
        assert (folder / name).stat().st_blocks * 512 <= 8 * KIB
    assert_same(gguf.read(folder / names[0]), gguf.read(tmp_path / names[0]))
    assert len(gguf.read(folder / names[0]).tensors) == 6


def test_every_beginning_of_a_header(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "x.gguf")
    content, whole = path.read_bytes(), gguf.read(path)
    data = min(info.offset for info in whole.tensors.values())
    ends = set()
    for length in range(4, data + 1):
        try:
            found = gguf.read_start(path, content[:length], len(content))
        except gguf.Truncated as error:
            assert length < error.needed <= data
        else:
            ends.add(length)
            assert_same(found, whole)
    assert ends == set(range(min(ends), data + 1)) and data - min(ends) < 32  # only the padding may be missing
    for length in range(4, min(ends)):  # the whole file ends there: nothing to wait for
        with pytest.raises(InvalidModel) as caught:
            gguf.read_start(path, content[:length], length)
        assert not isinstance(caught.value, gguf.Truncated)


def test_an_array_of_strings_at_the_very_end(tmp_path: Path) -> None:
    strings = b"".join(struct.pack("<Q", len(word)) + word for word in (b"one", b"", b"three", b""))
    content = head(n_keys=1) + key("a", 9, struct.pack("<IQ", 8, 4) + strings)
    assert list(gguf.read_start(tmp_path, content, len(content)).get("a")) == ["one", "", "three", ""]
    for length in range(4, len(content)):
        with pytest.raises(gguf.Truncated) as caught:
            gguf.read_start(tmp_path, content[:length], len(content))
        assert length < caught.value.needed <= len(content)


def test_a_long_value_is_asked_for_at_once(tmp_path: Path) -> None:
    content = head(n_keys=1) + key("a", 8, struct.pack("<Q", 9 * MIB) + b"x" * 9 * MIB)
    ranges = Ranges(content + bytes(MIB))
    assert gguf_header(ranges, ranges.nbytes, tmp_path / "a.gguf") == len(content)
    assert ranges.asked == [(0, MIB), (MIB, len(content))]


@RELAXED
@given(damage=st.lists(st.tuples(st.integers(0, 383), st.integers(0, 255)), max_size=3))
def test_a_damaged_header_is_read_alike_whole_and_by_ranges(damage: list[tuple[int, int]], tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "x.gguf", width=8)
    content = bytearray(path.read_bytes())
    for position, byte in damage:
        content[position] = byte
    path.write_bytes(content)
    try:
        whole: gguf.GgufFile | str = gguf.read(path)
    except LlmkitError as error:
        whole = error.message
    path.unlink()
    ranges = Ranges(bytes(content))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(headers, "_GGUF_GUESS", 64)
            fetched = gguf_header(ranges, len(content), path)
    except LlmkitError as error:
        assert error.message == whole and not path.exists()
    else:
        assert gguf.read(path) == whole
        ranges.assert_each_byte_once(fetched)
        assert len(ranges.asked) > 2


def head(n_tensors: int = 0, n_keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys)


def key(name: str, kind: int, payload: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + payload


HUGE = 200_000_000_000  # what the Hub lists as the file's size
STRINGS = struct.pack("<IQ", 8, 1_000_000_000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (head(n_keys=1 << 60), "announces 1152921504606846976 keys"),
        (head(n_keys=1_000_000_000), "longer than 256 MiB"),
        (head(n_tensors=1_000_000_000), "longer than 256 MiB"),
        (head(n_keys=1) + struct.pack("<Q", 10_000_000_000), "longer than 256 MiB"),
        (head(n_keys=1) + key("a", 8, struct.pack("<Q", 1 << 63)), "announces 9223372036854775808 bytes of a"),
        (head(n_keys=1) + key("a", 9, struct.pack("<IQ", 0, 10_000_000_000)), "longer than 256 MiB"),
        (head(n_keys=1) + key("a", 9, STRINGS), "longer than 256 MiB"),
        (head(n_keys=1) + key("a", 9, struct.pack("<IQQ", 8, 9, 1 << 63)), "strings of 'a' run past the end"),
        (b"<html>" + bytes(100), "HTML"),
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1), "version 1"),
    ],
)
def test_gguf_headers_made_to_cost_much(content: bytes, message: str, tmp_path: Path) -> None:
    ranges = Ranges(content + bytes(2 * MIB))
    with pytest.raises(InvalidModel, match=message) as caught:
        gguf_header(ranges, HUGE, tmp_path / "a.gguf")
    assert caught.value.message.startswith(str(tmp_path / "a.gguf"))
    assert ranges.asked == [(0, MIB)] and list(tmp_path.iterdir()) == []


def test_an_endless_header_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "_LONGEST_GGUF", 4 * MIB)
    begin = head(n_keys=1) + key("a", 9, struct.pack("<IQ", 8, 500_000))  # these would fit, were they empty
    ranges = Ranges(begin + 500_000 * (struct.pack("<Q", 10) + b"0123456789"))
    with pytest.raises(InvalidModel, match="longer than 4 MiB"):
        gguf_header(ranges, HUGE, tmp_path / "a.gguf")
    ranges.assert_each_byte_once(4 * MIB)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_gguf(tmp_path: Path) -> None:
    ranges = Ranges(b"")
    with pytest.raises(InvalidModel, match="is empty"):
        gguf_header(ranges, 0, tmp_path / "a.gguf")
    assert ranges.asked == []


def test_a_download_to_go_on_with_is_left_alone(tmp_path: Path) -> None:
    source = small_gguf(tmp_path / "source")
    (tmp_path / "a.gguf.partial").write_bytes(b"half of it")
    gguf_header(Ranges(source), source.stat().st_size, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf.partial").read_bytes() == b"half of it"
    assert_same(gguf.read(tmp_path / "a.gguf"), gguf.read(source))


def test_whole_weights_become_a_header_again(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "a.gguf")
    whole, before = gguf.read(path), path.stat()
    assert before.st_blocks * 512 >= 2 * MIB
    gguf_header(Ranges(path), before.st_size, path)
    assert (path.stat().st_size, gguf.read(path)) == (before.st_size, whole)
    assert path.stat().st_blocks * 512 <= 8 * KIB and list(tmp_path.iterdir()) == [path]


# --- both ------------------------------------------------------------------------------------------------------------

Fetch = Callable[[Ranges, int, Path], int]


@pytest.mark.parametrize("fetch", [safetensors_header, gguf_header])
def test_a_size_that_lies(fetch: Fetch, tmp_path: Path) -> None:
    ranges = Ranges(small_gguf(tmp_path / "x").read_bytes()[:1000])
    with pytest.raises(InvalidModel, match="1000 bytes came for the range 0 to"):
        fetch(ranges, HUGE, tmp_path / "out" / "a")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fetch", [safetensors_header, gguf_header])
def test_a_broken_connection_leaves_nothing(fetch: Fetch, tmp_path: Path) -> None:
    def broken(start: int, stop: int) -> bytes:
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    with pytest.raises(ConnectionResetError):
        fetch(broken, MIB, tmp_path / "a")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("nbytes", [(1 << 63) - 1, 1 << 63, 1 << 70])
def test_a_size_no_disk_has(nbytes: int, tmp_path: Path) -> None:
    content = head() + bytes(2 * MIB)
    with pytest.raises(LlmkitError, match="cannot be written"):
        gguf_header(Ranges(content), nbytes, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fetch", [safetensors_header, gguf_header])
def test_a_folder_that_cannot_be(fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    source = safetensors({}) if fetch is safetensors_header else head()
    with pytest.raises(LlmkitError, match="cannot be written"):
        fetch(Ranges(source), len(source), tmp_path / "file" / "a")
