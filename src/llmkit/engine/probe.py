"""Does the engine's usual fast path work on this CPU? Tried once per build and CPU, in child processes, and remembered.

Builds that use AMX crash on the first quantized matrix product (llama.cpp issues 20824, 26954, 28756), and a build
made for another CPU dies of an illegal instruction. Where the usual settings die, those without repacked kernels
(use_extra_bufts=False) are tried; they are slower but run the plain kernels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .. import gguf_writer, settings
from ..errors import EngineError
from ..gguf import Value
from ..quants import F32, TENSOR_TYPES, TensorType
from .child import run_in_child
from .library import load

_EVALUATE = "llmkit.engine.probe:evaluate"
_TIMEOUT = 60.0
_FORMAT = 2  # of the remembered file; raise it when the probe tests more
_WIDTH, _VOCAB, _LAYERS = 256, 256, 3
# every type with kernels of its own for some CPU (ggml/src/ggml-cpu: amx/mmq.cpp, repack.cpp), then others
PROBED_TYPES = tuple("Q4_0 Q4_1 Q8_0 Q4_K Q5_K Q6_K IQ4_XS IQ4_NL Q2_K Q3_K Q5_0 Q5_1 MXFP4 F16 BF16".split())
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_NO_NUMBERS = "logits that are no numbers"
# ends of a child that tell of this CPU; others (killed, too slow, no memory) may not come again
_TELLING = (
    *(f"died of {name}" for name in ("SIGILL", "SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE")),
    "crashed (code",  # Windows
    _NO_NUMBERS,
)
_ATTEMPTS: tuple[dict[str, bool], ...] = ({}, {"use_extra_bufts": False})
REBUILD = (
    'Build the engine for this machine, without AMX: CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON'
    ' -DGGML_F16C=ON -DGGML_BMI2=ON" pip install --no-cache-dir --force-reinstall llama-cpp-python==0.3.36'
)


@dataclass(frozen=True)
class Verdict:
    """What the probe found: model parameters that are safe here, why, and when (ISO date).

    `full_speed` is False where the usual settings crash and slower ones are used.
    """

    build: str
    cpu: str
    settings: Mapping[str, bool] = field(default_factory=dict)
    found: str = ""
    when: str = ""

    @property
    def full_speed(self) -> bool:
        """Whether the usual settings work."""
        return not self.settings


def safe_model_params() -> dict[str, bool]:
    """Model parameters this CPU and build need ({} when none). Probes at the first call; raises as `verdict`."""
    return dict(verdict().settings)


@cache
def verdict() -> Verdict:
    """The remembered verdict for this build and CPU, else a new one (about a second).

    Raises MissingDependency (no engine), EngineError with the command to rebuild it (no setting works).
    """
    build, cpu = load().build, cpu_features()
    path = settings.home() / "engine" / f"{_key(build, cpu)}.json"
    known = _remembered(path)
    if known is None:
        known, certain = _probe(build, _digest(cpu))
        if certain:
            _remember(path, known)
    return known


def cpu_features() -> str:
    """What the CPU can do, as text: Linux's flags, elsewhere the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.partition(":")[2].split()))
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _key(build: str, cpu: str) -> str:
    return _digest(f"{_FORMAT}\n{build}\n{cpu}")


def _remembered(path: Path) -> Verdict | None:
    """The verdict in `path`; None when there is none, or it cannot be understood (it is then written again)."""
    try:
        row = json.loads(path.read_bytes())
        known = Verdict(**row)
    except (OSError, ValueError, TypeError):
        return None
    return known if dict(known.settings) in _ATTEMPTS else None


def _remember(path: Path, found: Verdict) -> None:
    """Write the verdict whole or not at all; a home that cannot be written costs a probe per process, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        with os.fdopen(handle, "w") as file:
            json.dump(asdict(found), file, indent=1)
        os.replace(partial, path)
    except OSError:
        pass


def _probe(build: str, cpu: str) -> tuple[Verdict, bool]:
    """A verdict, and whether it may be remembered: all that failed did so in a way that tells of the CPU."""
    with tempfile.TemporaryDirectory(prefix="llmkit-probe-") as folder:
        path = Path(folder) / "probe.gguf"
        _write_tiny_model(path)
        failures: list[str] = []
        for attempt in _ATTEMPTS:
            try:
                run_in_child(
                    function=_EVALUATE,
                    arguments={"path": str(path), "model_params": attempt},
                    timeout=_TIMEOUT,
                )
            except EngineError as error:
                reason = error.message.partition("\n")[0].removeprefix(f"{_EVALUATE}: ")
                failures.append(f"with {_words(attempt)} {reason}")
                continue
            found = failures[0] if failures else "the usual settings work"
            certain = all(any(end in failure for end in _TELLING) for failure in failures)
            return Verdict(build, cpu, attempt, found, time.strftime("%Y-%m-%d")), certain
    raise EngineError("the engine does not run on this CPU:\n  " + "\n  ".join(failures), REBUILD)


def _words(attempt: Mapping[str, bool]) -> str:
    return ", ".join(f"{name}={value}" for name, value in attempt.items()) or "the usual settings"


def _write_tiny_model(path: Path) -> None:
    """A llama of three layers whose matrices are of all the probed types, with small pseudo-random weights."""
    numbers: dict[str, int] = {
        "vocab_size": _VOCAB, "block_count": _LAYERS, "context_length": 128, "embedding_length": _WIDTH,
        "feed_forward_length": _WIDTH, "attention.head_count": 4, "attention.head_count_kv": 4,
        "rope.dimension_count": _WIDTH // 4,
    }  # fmt: skip
    metadata = {
        "general.architecture": Value.string("llama"),
        "tokenizer.ggml.model": Value.string("no_vocab"),
        "llama.attention.layer_norm_rms_epsilon": Value.float32(1e-5),
        **{f"llama.{key}": Value.uint32(number) for key, number in numbers.items()},
    }
    matrices = ["token_embd", "output"]
    matrices += [f"blk.{layer}.{matrix}" for layer in range(_LAYERS) for matrix in _MATRICES]
    norms = ["output_norm"] + [f"blk.{layer}.{norm}" for layer in range(_LAYERS) for norm in ("attn_norm", "ffn_norm")]
    types = [TENSOR_TYPES[PROBED_TYPES[index % len(PROBED_TYPES)]] for index in range(len(matrices))]
    rows = [(f"{name}.weight", (_VOCAB, _WIDTH), kind, _weights(kind, index)) for index, (name, kind) in
            enumerate(zip(matrices, types, strict=True))]  # fmt: skip
    ones = b"\0\0\x80\x3f" * _WIDTH
    gguf_writer.write(path, metadata, rows + [(f"{name}.weight", (_WIDTH,), F32, ones) for name in norms])


def _weights(kind: TensorType, seed: int) -> bytes:
    """256 × 256 weights around zero, quantized by the engine's own kernel."""
    import numpy as np

    engine = load()
    values = np.random.default_rng(seed).normal(0, _WIDTH**-0.5, (_VOCAB, _WIDTH)).astype(np.float32)
    blocks = np.empty(kind.row_nbytes(_WIDTH) * _VOCAB, np.uint8)
    engine.quantize_chunk(kind.ggml_id, values.ctypes.data, blocks.ctypes.data, 0, _VOCAB, _WIDTH)
    return blocks.tobytes()


def evaluate(path: str, model_params: dict[str, Any]) -> float:
    """Load `path` and evaluate 48 tokens, then one; return the largest logit. Runs in the child.

    Both are needed: batches and single tokens take different kernels. Raises EngineError when logits are not finite.
    """
    engine = load()
    llama = engine.llama
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    for name, value in model_params.items():
        setattr(params, name, value)
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise engine.error("the engine cannot load the probe's model")
    context_params = llama.llama_context_default_params()
    context_params.n_ctx, context_params.n_threads, context_params.n_threads_batch = 64, 1, 1
    context = llama.llama_init_from_model(model, context_params)
    if not context:
        raise engine.error("the engine cannot make a context for the probe's model")
    largest = 0.0
    for count in (48, 1):
        tokens = (llama.llama_token * count)(*range(3, 3 + count))
        if llama.llama_decode(context, llama.llama_batch_get_one(tokens, count)):
            raise engine.error("the engine cannot evaluate the probe's model")
        logits = llama.llama_get_logits_ith(context, -1)[:_VOCAB]
        if not all(map(math.isfinite, logits)) or not any(logits):
            raise EngineError(f"{count} tokens through the probe's model gave {_NO_NUMBERS}, or all zero")
        largest = max(largest, *logits)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return largest
