"""A model file nobody has loaded yet is first loaded in a child process, without its weights.

The header decides whether the engine accepts, refuses or crashes on a file, so a load that allocates no weights, a
small context and a little tokenizing tell (0.2–0.5 s, whatever the size). Files that passed are remembered by path,
size, time and engine build.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

from ... import engine, gguf, settings
from ...errors import InvalidModel

_TIMEOUT = 120.0
# every class of character a tokenizer has rules for; the C0 control asks for byte tokens
_SAMPLE = "The 1st word, naïve — 東京 🙂 عربى\t\x01\r\n  x = {'a': 3.14}\n\n"


def vet(file: gguf.GgufFile, model_params: Mapping[str, bool]) -> None:
    """Raise EngineError or InvalidModel when the engine does not survive loading `file`, naming the engine's words."""
    mark = settings.home() / "engine" / "vetted" / _fingerprint(file)
    if os.path.exists(mark):  # never raises, as Path.exists does for a home that cannot be
        return
    try:
        engine.run_in_child(
            function="llmkit.backends.llamacpp.vetting:load_without_weights",
            arguments={"path": str(file.path), "model_params": dict(model_params)},
            timeout=_TIMEOUT,
        )
    except engine.EngineDied as error:
        raise InvalidModel(f"{file.path}: the engine does not survive this file: {error.message}") from error
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:  # then the next run vets it again
        pass


def _fingerprint(file: gguf.GgufFile) -> str:
    facts = [engine.load().build]
    for path in file.paths:
        status = path.stat()
        facts.append(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def load_without_weights(path: str, model_params: dict[str, bool]) -> None:
    """Load the header and vocabulary, reserve a small context, tokenize. Runs in the child."""
    loaded = engine.load()
    llama = loaded.llama
    params = llama.llama_model_default_params()
    for name, value in model_params.items():
        setattr(params, name, value)
    params.no_alloc, params.load_mode, params.n_gpu_layers = True, llama.LLAMA_LOAD_MODE_NONE, 0
    with loaded.capture_log() as lines:
        model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise loaded.error(f"{path}: the engine cannot load it", lines)
    vocab = llama.llama_model_get_vocab(model)
    if llama.llama_vocab_type(vocab):
        sample = _SAMPLE.encode()
        llama.llama_tokenize(vocab, sample, len(sample), (llama.llama_token * 1000)(), 1000, True, True)
    context_params = llama.llama_context_default_params()
    context_params.n_ctx, context_params.n_outputs_max, context_params.swa_full = 256, 1, False
    with loaded.capture_log() as lines:
        context = llama.llama_init_from_model(model, context_params)
    if not context:
        raise loaded.error(f"{path}: the engine cannot make a context for it", lines)
