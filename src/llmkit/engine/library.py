"""The loaded engine: llama-cpp-python's low-level module, ggml's own functions, and the engine's log.

Nothing of it writes to the terminal: log lines go into a ring buffer, from which `capture_log` and error messages
take them. Loading is cheap (no model), happens once per process, and refuses an engine that is not the expected one.
"""

from __future__ import annotations

import ctypes as C
import hashlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EngineError, MissingDependency, Unsupported
from . import symbols

_DEVICE_KINDS = ("cpu", "gpu", "integrated gpu", "accelerator", "meta")  # ggml_backend_dev_type
_KEPT_LINES = 400


@dataclass(frozen=True)
class Device:
    """Something the engine can compute on. Memory in bytes, 0 where the engine does not say."""

    name: str
    description: str
    kind: str
    free_nbytes: int
    total_nbytes: int


class Engine:
    """Made by `load`. `llama` is llama-cpp-python's low-level module, `functions` the table of symbols.py, bound."""

    def __init__(self, llama: Any, version: str) -> None:
        folder = Path(llama._lib._name).parent  # LLAMA_CPP_LIB_PATH moves it
        self.libraries = {name: C.CDLL(str(library_path(folder, name))) for name in ("ggml-base", "ggml")}
        self.llama = llama
        self.version = version
        self.folder = folder
        self.base = self.libraries["ggml-base"]
        self.functions: dict[str, Any] = symbols.bind(self.libraries, version)
        symbols.check(self.functions, llama, version)
        self.build = _build_id(folder)
        self.log = Log()
        self._log_callback = llama.llama_log_callback(self.log.write)  # kept alive: the engine holds only a pointer
        llama.llama_log_set(self._log_callback, None)  # sets ggml's too (src/llama-impl.cpp)
        llama.llama_backend_init()
        self._to_float: dict[int, Any] = {}

    def quantize_chunk(
        self,
        type_id: int,
        src_address: int,
        dst_address: int,
        start: int,
        nrows: int,
        n_per_row: int,
        imatrix_address: int | None = None,
    ) -> int:
        """Quantize `nrows` float32 rows; returns the bytes written. Releases the GIL. See ggml_quantize_chunk.

        `start` counts weights. A type that needs an imatrix aborts the process without one: ask `requires_imatrix`.
        """
        chunk = self.functions["ggml_quantize_chunk"]
        return int(chunk(type_id, src_address, dst_address, start, nrows, n_per_row, imatrix_address))

    def requires_imatrix(self, type_id: int) -> bool:
        """Whether the kernel of this type aborts without an imatrix."""
        return bool(self.functions["ggml_quantize_requires_imatrix"](type_id))

    def row_size(self, type_id: int, width: int) -> int:
        """Bytes of a row of `width` weights; `width` must be a multiple of the block."""
        return int(self.functions["ggml_row_size"](type_id, width))

    def validate_rows(self, type_id: int, address: int, nbytes: int) -> bool:
        """Whether the blocks hold no NaN or infinite scale. The engine itself prints the block's number to stderr."""
        return bool(self.functions["ggml_validate_row_data"](type_id, address, nbytes))

    def to_float(self, type_id: int, src_address: int, dst_address: int, count: int) -> None:
        """Dequantize `count` weights (a multiple of the block) to float32. Raises Unsupported for integer types.

        The reference conversion of ggml's type traits, bit for bit what the engine's CPU code does for single rows.
        """
        if type_id == 0:
            C.memmove(dst_address, src_address, 4 * count)
            return
        function = self._to_float.get(type_id)
        if function is None:
            address = self.functions["ggml_get_type_traits"](type_id).contents.to_float
            if not address:
                name = self.functions["ggml_type_name"](type_id)
                raise Unsupported(f"the engine cannot turn type {name.decode() if name else type_id} into floats")
            function = self._to_float[type_id] = symbols.TO_FLOAT(address)
        function(src_address, dst_address, count)

    @contextmanager
    def capture_log(self) -> Iterator[list[str]]:
        """Collect the log lines the engine emits inside the block (from all threads)."""
        lines: list[str] = []
        self.llama.llama_log_set(self._log_callback, None)  # another user of the library may have set its own
        self.log.flush()  # what was begun before is not ours
        self.log.add(lines)
        try:
            yield lines
        finally:
            self.log.flush()
            self.log.remove(lines)

    def error(self, what: str, lines: list[str] | None = None, hint: str | None = None) -> EngineError:
        """An EngineError with the last few telling log lines attached (of `lines`, else of the process)."""
        return EngineError(what + quoted(lines if lines is not None else list(self.log.recent)), hint)

    def system_info(self) -> dict[str, str]:
        """CPU and build features as the engine reports them, e.g. {"AVX2": "1"}."""
        pairs = str(self.llama.llama_print_system_info().decode("utf-8", "replace")).replace(" : ", " | ").split("|")
        return {key.strip(): value.strip() for key, _, value in (pair.partition("=") for pair in pairs) if value}

    def gpu_offload(self) -> bool:
        """Whether this build can put layers on a GPU (and finds one)."""
        return bool(self.llama.llama_supports_gpu_offload())

    def devices(self) -> list[Device]:
        """Everything this build finds to compute on."""
        functions, found = self.functions, []
        for index in range(functions["ggml_backend_dev_count"]()):
            device = functions["ggml_backend_dev_get"](index)
            free, total = C.c_size_t(), C.c_size_t()
            functions["ggml_backend_dev_memory"](device, C.byref(free), C.byref(total))
            kind = functions["ggml_backend_dev_type"](device)
            name, about = (functions[f"ggml_backend_dev_{what}"](device) or b"" for what in ("name", "description"))
            word = _DEVICE_KINDS[kind] if 0 <= kind < len(_DEVICE_KINDS) else "other"
            found.append(Device(name.decode(), about.decode("utf-8", "replace"), word, free.value, total.value))
        return found


_echo: int | None = None


def show_log() -> None:
    """From now on, let the engine's log be seen on stderr."""
    global _echo
    _echo = 2
    for engine in _loaded:
        engine.log.echo = _echo


class Log:
    """The engine's log: it comes in pieces, is kept as lines. Only the last lines are kept."""

    def __init__(self) -> None:
        self.recent: deque[str] = deque(maxlen=_KEPT_LINES)
        self.count = 0  # of all lines there ever were
        self._listeners: list[list[str]] = []
        self.echo = _echo  # a file descriptor: a child process shows its last words there
        self._pending = ""
        self._lock = threading.Lock()

    def write(self, _level: int, text: bytes, _data: Any) -> None:
        """The engine's callback. Raises nothing: an exception would be printed by ctypes."""
        piece = (text or b"").decode("utf-8", "replace")
        if self.echo is not None:
            try:
                os.write(self.echo, piece.encode())
            except OSError:  # nobody reads any more
                self.echo = None
        with self._lock:
            *lines, self._pending = (self._pending + piece).split("\n")
            self._keep(lines)

    def add(self, listener: list[str]) -> None:
        """Lines go there too from now on."""
        with self._lock:
            self._listeners.append(listener)

    def remove(self, listener: list[str]) -> None:
        """No longer."""
        with self._lock:
            self._listeners = [other for other in self._listeners if other is not listener]

    def flush(self) -> None:
        """Take an unfinished line for a line."""
        with self._lock:
            lines, self._pending = [self._pending], ""
            self._keep(lines)

    def since(self, count: int) -> list[str]:
        """The lines after the first `count`, of those that are kept."""
        self.flush()
        new = self.count - count
        return list(self.recent)[-new:] if new > 0 else []

    def _keep(self, lines: list[str]) -> None:
        lines = [line.rstrip() for line in lines if line.strip()]
        self.recent.extend(lines)
        self.count += len(lines)
        for listener in self._listeners:
            listener.extend(lines)


def quoted(lines: list[str], count: int = 4) -> str:
    """The last `count` lines that tell most, for the end of an error message; empty without lines."""
    telling = [line for line in lines if any(word in line.lower() for word in ("error", "fail", "invalid", "unknown"))]
    chosen = (telling or [line for line in lines if line.strip()])[-count:]
    return "".join(f"\n    engine: {line.strip()[:300]}" for line in chosen)


def library_path(folder: Path, name: str) -> Path:
    """The shared library `name` in `folder`, under any of the names platforms give it. Raises MissingDependency."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    for candidate in (f"lib{name}{suffix}", f"{name}{suffix}", f"lib{name}.so"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise MissingDependency(
        f"{folder}: the engine's library lib{name}{suffix} is missing", "Install llama-cpp-python again."
    )


def _build_id(folder: Path) -> str:
    """Names, sizes and times of the engine's library files, hashed: another build has another id."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    facts = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


_lock = threading.Lock()
_loaded: list[Engine] = []


def load() -> Engine:
    """The engine of this process. Raises MissingDependency when it is absent or not the expected one."""
    with _lock:
        if not _loaded:
            _loaded.append(_load())
        return _loaded[0]


def schema_converter() -> Callable[[str], str]:
    """llama-cpp-python's function from a JSON schema to a grammar. Raises MissingDependency."""
    load()
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    convert: Callable[[str], str] = json_schema_to_gbnf
    return convert


def _load() -> Engine:
    try:
        import llama_cpp
        import llama_cpp.llama_cpp as llama
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"the engine is not installed: no module named '{error.name}'",
            'Run: pip install "llama-cpp-python==0.3.36"',
        ) from None
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise MissingDependency(
            f"the installed llama-cpp-python cannot be loaded: {error}",
            "Build it for this machine: pip install --no-cache-dir --force-reinstall llama-cpp-python==0.3.36",
        ) from error
    symbols.check_version(llama_cpp.__version__)
    return Engine(llama, llama_cpp.__version__)
