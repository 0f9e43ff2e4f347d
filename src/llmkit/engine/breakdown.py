"""What the engine would allocate: bytes of model, context (KV cache, recurrent state) and compute in each buffer type.

Models are loaded with `no_alloc`: the engine lays out its buffers and takes no memory for weights and cache. Two ways
to read the figures: llama_get_memory_breakdown (a C++ function that returns a std::map; the layout below is libstdc++'s
on x86-64), and the log, where that is not to be had. Both may crash the process: call them in a child. Sources:
llama.cpp src/llama-ext.h, src/llama-context.cpp (memory_breakdown), src/llama-kv-cache.cpp (log lines).
"""

from __future__ import annotations

import ctypes as C
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from .library import Engine, load

_BREAKDOWN = "_Z26llama_get_memory_breakdownPK13llama_context"
_MIB = 1 << 20
_DEBUG = 1  # ggml_log_level
_NUMBER = r"\s*([\d.]+) MiB"
# llama-kv-cache.cpp: "size =   45.00 MiB (  2048 cells,  30 layers,  1/1 seqs), K (f16): 22.50 MiB, V (f16): 22.50 MiB"
_KV = re.compile(rf"llama_kv_cache\w*: size ={_NUMBER} \(\s*(\d+) cells,\s*(\d+) layers,\s*(\d+)/")
_RECURRENT = re.compile(rf"llama_memory_recurrent: size ={_NUMBER} \(\s*(\d+) cells,\s*(\d+) layers")
_COMPUTE = re.compile(rf"(\S+)\s+compute buffer size ={_NUMBER}")
_OUTPUT = re.compile(rf"(\S+)\s+output buffer size ={_NUMBER}")


def layouts(*, models: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """In the child: for each model {"path", "model_params", "contexts": [context params]} and each context a layout.

    A layout is {"n_ctx", "buffers": {name: [model, context, compute]} in bytes, "kv": [[bytes to 0.01 MiB, cells,
    layers, streams]], "recurrent": the same, "output": bytes to 0.01 MiB, "weights", "n_params", "exact": bool}, or
    {"error": why} where the engine refuses. Raises EngineError when a model is refused.
    """
    loaded = load()
    return [_of_model(loaded, **model) for model in models]


def _of_model(
    loaded: Engine, path: str, model_params: Mapping[str, Any], contexts: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    llama = loaded.llama
    # mapping a file cannot go with no_alloc: the engine aborts (src/llama-model-loader.cpp)
    fixed = {"no_alloc": True, "load_mode": 0, "n_gpu_layers": 0}
    params = _with(llama.llama_model_default_params(), fixed | dict(model_params))
    with _told(loaded) as lines:
        model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise loaded.error(f"{path}: the engine cannot lay it out", lines)
    try:
        facts = {"weights": llama.llama_model_size(model), "n_params": llama.llama_model_n_params(model)}
        return [facts | _of_context(loaded, model, context) for context in contexts]
    finally:
        llama.llama_model_free(model)


def _of_context(loaded: Engine, model: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    llama = loaded.llama
    params = _with(llama.llama_context_default_params(), wanted)
    with _told(loaded) as lines:
        context = llama.llama_init_from_model(model, params)
    if not context:
        return {"error": _refusal(lines)}
    try:
        return _described(loaded, context, lines)
    finally:
        llama.llama_free(context)


def _described(loaded: Engine, context: Any, lines: Sequence[str]) -> dict[str, Any]:
    """What `layouts` tells of a context, from the engine's table and the log of its making."""
    found = _parsed(lines)
    exact = _exact(loaded.llama, loaded, context)
    return {
        "n_ctx": loaded.llama.llama_n_ctx(context),
        "buffers": found["buffers"] if exact is None else exact,
        "exact": exact is not None,
        **{key: found[key] for key in ("kv", "recurrent", "output")},
    }


@contextmanager
def _told(loaded: Engine) -> Iterator[list[str]]:
    """The engine's log without its debug lines: it writes several for each tensor, which takes longer than the work."""
    with loaded.capture_log() as lines:
        loaded.llama.llama_log_set(_without_debug(loaded), None)
        yield lines


@cache
def _without_debug(loaded: Engine) -> Any:
    """The callback; the engine holds only a pointer to it, so it is kept."""

    def write(level: int, text: bytes, data: Any) -> None:
        if level != _DEBUG:
            loaded.log.write(level, text, data)

    return loaded.llama.llama_log_callback(write)


def _with(params: Any, wanted: Mapping[str, Any]) -> Any:
    """The engine's struct with some fields set."""
    for name, value in wanted.items():
        setattr(params, name, value)
    return params


def _refusal(lines: Sequence[str]) -> str:
    """Why the engine refuses a context, in its own words."""
    telling = [line.strip() for line in lines if "error" in line.lower() or "requires" in line or "must" in line]
    return (telling or [line.strip() for line in lines[-1:]] or ["the engine refuses this context"])[-1]


def _exact(llama: Any, loaded: Engine, context: Any) -> dict[str, list[int]] | None:
    """The engine's own table, or None where its C++ layout is not known to us."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        function = llama._lib[_BREAKDOWN]
    except AttributeError:
        return None
    function.restype, function.argtypes = None, [C.c_void_p, C.c_void_p]  # hidden result pointer, then the context
    name_of = loaded.base["ggml_backend_buft_name"]
    name_of.restype, name_of.argtypes = C.c_char_p, [C.c_void_p]
    # std::map: compare, header node (colour, parent, left, right), count; a node's key at +32, its value at +40
    tree = (C.c_uint64 * 6)()
    function(C.addressof(tree), C.cast(context, C.c_void_p))

    def word(address: int) -> int:
        return C.c_uint64.from_address(address).value

    found: dict[str, list[int]] = {}
    nodes = [word(C.addressof(tree) + 16)]
    while nodes:
        if node := nodes.pop():
            nodes += [word(node + 16), word(node + 24)]
            name = name_of(word(node + 32)).decode()
            before = found.get(name, [0, 0, 0])
            found[name] = [old + word(node + 40 + 8 * index) for index, old in enumerate(before)]
    return found  # the map's few nodes leak; the process is a child's


def reality(
    *,
    path: str,
    model_params: Mapping[str, Any],
    context_params: Mapping[str, Any],
    rows: int,
    seconds: float = 60.0,
    threads: int = 1,
) -> dict[str, Any]:
    """In the child: load `path` for real and fill its context, as far as `seconds` allow; the memory that shows.

    Each batch is a full ubatch and asks for `rows` rows of logits. Returns `layouts`'s row with "evaluated" tokens and
    "resident": bytes this process had more after loading, after the context was made and after the last batch. Raises
    EngineError when the engine refuses.
    """
    loaded = load()
    llama = loaded.llama
    params = _with(llama.llama_model_default_params(), {"n_gpu_layers": 0} | dict(model_params))
    made = _with(llama.llama_context_default_params(), context_params)
    made.n_threads = made.n_threads_batch = threads
    before = resident()
    steps = []
    with _told(loaded) as lines:
        model = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise loaded.error(f"{path}: the engine cannot load it", lines)
        steps.append(resident())
        context = llama.llama_init_from_model(model, made)
        if not context:
            raise loaded.error(f"{path}: the engine cannot make this context: {_refusal(lines)}")
        steps.append(resident())
        evaluated = _fill(loaded, context, made, rows=rows, deadline=time.monotonic() + seconds)
        steps.append(resident())
    return {
        **_described(loaded, context, lines),
        "weights": llama.llama_model_size(model),
        "n_params": llama.llama_model_n_params(model),
        "evaluated": evaluated,
        "resident": [step - before for step in steps],
    }


def _fill(loaded: Engine, context: Any, params: Any, *, rows: int, deadline: float) -> int:
    """Evaluate ubatches until the context is full, or until the deadline but one at least; tokens evaluated.

    The sequences take equal shares of each ubatch.
    """
    llama = loaded.llama
    n_seq = params.n_seq_max
    total = llama.llama_n_ctx(context) if params.kv_unified else n_seq * llama.llama_n_ctx_seq(context)
    size = min(llama.llama_n_ubatch(context), total)
    batch = llama.llama_batch_init(size, 0, 1)
    done = 0
    while done < total and (not done or time.monotonic() < deadline):
        batch.n_tokens = count = min(size, total - done) // n_seq * n_seq
        if not count:
            break
        each = count // n_seq
        for index in range(count):
            batch.token[index], batch.pos[index] = index % 7, done // n_seq + index % each
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, index // each
            batch.logits[index] = index >= count - rows
        if code := llama.llama_decode(context, batch):
            raise loaded.error(f"the engine cannot evaluate {count} tokens (llama_decode: {code})")
        done += count
    llama.llama_batch_free(batch)
    return done


def resident() -> int:
    """Bytes of this process in memory now (Linux; elsewhere the most there ever were)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def _parsed(lines: Sequence[str]) -> dict[str, Any]:
    """The same from the log, to a hundredth of a MiB; lines of the last reserve win."""
    text = "\n".join(lines)
    kv = [[_bytes(size), int(cells), int(layers), int(n)] for size, cells, layers, n in _KV.findall(text)]
    recurrent = [[_bytes(size), int(cells), int(layers), 1] for size, cells, layers in _RECURRENT.findall(text)]
    buffers: dict[str, list[int]] = {}
    for name, size in _COMPUTE.findall(text):
        buffers[name] = [0, 0, _bytes(size)]
    cpu = buffers.setdefault("CPU", [0, 0, 0])
    cpu[1] = sum(row[0] for row in (*kv, *recurrent))
    output = sum({name: _bytes(size) for name, size in _OUTPUT.findall(text)}.values())
    return {"kv": kv, "recurrent": recurrent, "output": output, "buffers": buffers}


def _bytes(mebibytes: str) -> int:
    return round(float(mebibytes) * _MIB)
