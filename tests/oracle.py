"""Ground truth, for tests only: llama.cpp's own converter and quantizer, run in child processes.

The converter comes from the source package of the installed llama-cpp-python (vendor/llama.cpp), fetched once into
~/.cache/llmkit/tests or $LLMKIT_TEST_CACHE. Nothing of it is copied into llmkit.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

FloatArray = npt.NDArray[np.float32]
WANTED = ("conversion", "convert_hf_to_gguf.py", "gguf-py")
RUN_CONVERTER = """
import json, sys
tree, pre, arguments = json.loads(sys.argv[1])
sys.path[:0] = [tree + "/gguf-py", tree]
import convert_hf_to_gguf
if pre:  # a made-up vocabulary has no hash that llama.cpp could know
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = ["convert_hf_to_gguf.py", *arguments]
convert_hf_to_gguf.main()
"""


@dataclass(frozen=True)
class Imatrix:
    """What llama-quantize hands to the engine: importance per tensor name, and what it notes in the file."""

    values: Mapping[str, FloatArray]
    file: str = ""
    dataset: str = ""
    chunks: int = 0


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file as the package gguf reads it: type name, shape in numpy order, raw bytes."""

    type: str
    shape: tuple[int, ...]
    data: bytes = field(repr=False)


# --- llama.cpp's converter -------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where test downloads are kept between runs."""
    return Path(os.environ.get("LLMKIT_TEST_CACHE") or Path.home() / ".cache" / "llmkit" / "tests")


@cache
def llama_cpp_tree() -> Path:
    """The folder vendor/llama.cpp (converter and gguf-py only) of the installed engine's version; else skips."""
    installed = version("llama-cpp-python")
    tree = cache_folder() / f"llama.cpp-{installed}"
    if not tree.is_dir():
        try:
            _fetch(installed, tree)
        except (OSError, subprocess.SubprocessError, tarfile.TarError, StopIteration) as error:
            pytest.skip(f"the source package of llama-cpp-python {installed} cannot be had: {error!r}")
    return tree


def _fetch(installed: str, tree: Path) -> None:
    """Downloads the source package and keeps the wanted part. The last step is a rename, so a kill leaves no half."""
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        subprocess.run(
            [*download, "--dest", folder, f"llama-cpp-python=={installed}"],
            check=True, capture_output=True, timeout=300, env=environment,
        )  # fmt: skip
        archive = next(Path(folder).glob("*.tar.gz"))
        made = Path(folder) / "tree"
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts[1:]
                if not member.isfile() or parts[:2] != ("vendor", "llama.cpp") or ".." in parts:
                    continue
                content = tar.extractfile(member) if len(parts) > 2 and parts[2] in WANTED else None
                if content is not None:
                    target = made.joinpath(*parts[2:])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content.read())
        made.rename(tree)


def reference_convert(folder: Path, out: Path, outtype: str, *, pre: str | None = None) -> Path:
    """`out`, written by llama.cpp's convert_hf_to_gguf.py with `outtype` (f32, f16, bf16, q8_0, auto).

    `pre` is given for vocabularies llama.cpp cannot know. Skips when PyTorch or transformers are missing.
    """
    for package in ("torch", "transformers", "sentencepiece", "yaml"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"llama.cpp's converter needs the package {package}")
    arguments = [str(folder), "--outfile", str(out), "--outtype", outtype]
    _child(["-c", RUN_CONVERTER, json.dumps([str(llama_cpp_tree()), pre, arguments])])
    return out


# --- the engine's quantizer ------------------------------------------------------------------------------------------


def reference_quantize(
    source: Path, out: Path, quant: str, imatrix: Imatrix | None = None, n_threads: int = 1, requantize: bool = False
) -> Path:
    """`out`, written by llama_model_quantize from the GGUF `source`; `quant` is a name of llama.cpp such as Q4_K_M."""
    reference_quantize_all(source, {quant: out}, imatrix, n_threads, requantize)
    return out


def reference_quantize_all(
    source: Path,
    outs: Mapping[str, Path],
    imatrix: Imatrix | None = None,
    n_threads: int = 1,
    requantize: bool = False,
) -> None:
    """Several quants of one file in one child process (quant name → file to write)."""
    from llmkit.quants import QUANTS

    task: dict[str, Any] = {"source": str(source), "threads": n_threads, "requantize": requantize}
    task["outs"] = [[QUANTS[name].ftype, str(path)] for name, path in outs.items()]
    with tempfile.TemporaryDirectory() as folder:
        if imatrix is not None:
            task["imatrix"] = {"file": imatrix.file, "dataset": imatrix.dataset, "chunks": imatrix.chunks}
            task["values"] = str(Path(folder) / "values.npz")
            arrays: dict[str, Any] = dict(imatrix.values)
            np.savez(task["values"], **arrays)
        _child([__file__, json.dumps(task)])


def _child(arguments: list[str]) -> None:
    """Runs Python; a failure shows what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, encoding="utf-8", errors="replace", timeout=1800
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def _quantize_in_child(task: dict[str, Any]) -> None:
    """The child's side: parameters as llama.cpp's tools/quantize fills them."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.allow_requantize = task["threads"], task["requantize"]
    keep: list[Any] = []
    if "imatrix" in task:
        entries = dict(np.load(task["values"]))
        rows = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))()
        for row, (name, values) in zip(rows, entries.items(), strict=False):
            flat = np.ascontiguousarray(values, np.float32).ravel()
            keep.append(flat)
            row.name, row.size = name.encode(), flat.size
            row.data = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = rows
        params.kv_overrides = _kv_overrides(llama_cpp, task["imatrix"], len(entries))
    for ftype, out in task["outs"]:
        params.only_copy = (
            ftype == 1024
        )  # COPY is no type of its own: tools/quantize asks for F32 and nothing but copies
        params.ftype = 0 if params.only_copy else ftype
        code = llama_cpp.llama_model_quantize(task["source"].encode(), out.encode(), ctypes.byref(params))
        if code:
            raise SystemExit(f"llama_model_quantize returned {code} for file type {ftype}")


def _kv_overrides(llama_cpp: Any, imatrix: dict[str, Any], n_entries: int) -> Any:
    """What llama-quantize notes about an imatrix: tags 0 int and 3 string, an empty key ends the list."""
    notes: list[tuple[str, str | int]] = [("quantize.imatrix.file", imatrix["file"])]
    if imatrix["dataset"]:
        notes.append(("quantize.imatrix.dataset", imatrix["dataset"]))
    notes.append(("quantize.imatrix.entries_count", n_entries))
    if imatrix["chunks"]:
        notes.append(("quantize.imatrix.chunks_count", imatrix["chunks"]))
    rows = (llama_cpp.llama_model_kv_override * (len(notes) + 1))()
    for row, (key, value) in zip(rows, notes, strict=False):
        row.key = key.encode()
        if isinstance(value, int):
            row.tag, row.value.val_i64 = 0, value
        else:
            row.tag, row.value.val_str = 3, value.encode()[:127]
    return rows


# --- reading files ---------------------------------------------------------------------------------------------------


def tensor_bytes(path: Path) -> dict[str, Tensor]:
    """Every tensor of a GGUF in the file's order, read by the package gguf (slow on large vocabularies)."""
    return {
        tensor.name: Tensor(
            tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape)), tensor.data.tobytes()
        )
        for tensor in _open(path).tensors
    }


def metadata(path: Path) -> dict[str, tuple[str, Any]]:
    """Every key in the file's order with its type ("UINT32", "ARRAY STRING", …) and plain value."""
    found = {}
    for name, field_ in _open(path).fields.items():
        if not name.startswith("GGUF."):
            found[name] = (" ".join(kind.name for kind in field_.types), field_.contents())
    return found


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(path)


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterable[str]:
    """One line for each tensor that differs in presence, place, type, shape or bytes."""
    if list(ours) != list(theirs):
        only = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
        yield f"names or their order differ: only ours {only[0]}, only theirs {only[1]}"
    for name in ours.keys() & theirs.keys():
        mine, other = ours[name], theirs[name]
        if (mine.type, mine.shape) != (other.type, other.shape):
            yield f"{name}: {mine.type} {mine.shape}, expected {other.type} {other.shape}"
        elif mine.data != other.data:
            yield f"{name}: {mine.type} bytes differ"


if __name__ == "__main__":
    _quantize_in_child(json.loads(sys.argv[1]))
