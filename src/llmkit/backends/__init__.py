"""The one seam between llmkit and the engines that run models: Backend and Session, the smallest both can honour.

    backend = load("model.gguf")            a model in memory: encode, piece, embed
    session = backend.session(4096)         a context of its own: eval, rewind
    session.eval(backend.encode("Hi"))      Eval: logits, and hidden states of the layers asked for

Sampling, templates, stop strings, probabilities live above this, written once for every backend. A backend knows
nothing of chats. One session belongs to one thread at a time; sessions of one backend share its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from ..progress import OnProgress, ignore

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

Rows = Literal["last", "all", "none"]

# key → module with a `load(path, *, n_threads, gpu_layers, on_progress) -> Backend`
BACKENDS = {"llamacpp": "llmkit.backends.llamacpp"}


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model says of itself; sizes in bytes and tokens.

    `eos` holds every token that ends an answer, `eos_token` is the one that templates write.
    """

    architecture: str
    name: str
    n_layer: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_params: int
    weight_nbytes: int
    chat_template: str | None
    bos: int | None
    eos: frozenset[int]
    eos_token: int | None
    add_bos: bool


@dataclass(frozen=True, eq=False)
class Eval:
    """What one evaluation gave: logits [1, V], [T, V] or [0, V]; hidden {layer: [T, d]}, layer -1 the embeddings."""

    logits: Floats
    hidden: Mapping[int, Floats] = field(default_factory=dict)


class Session(Protocol):
    """A context with its KV cache."""

    @property
    def n(self) -> int:
        """Tokens in it."""
        ...

    @property
    def context(self) -> int:
        """Tokens that fit."""
        ...

    def eval(self, tokens: Sequence[int], *, logits: Rows = "last", layers: Sequence[int] = ()) -> Eval:
        """Append `tokens` and evaluate them. Raises EngineError when they do not fit or the engine fails."""
        ...

    def rewind(self, n: int) -> bool:
        """Forget all but the first `n` tokens; False, and nothing changed, when this model cannot. 0 always works."""
        ...

    def close(self) -> None:
        """Free the context."""
        ...


class Backend(Protocol):
    """A model in memory."""

    @property
    def info(self) -> ModelInfo:
        """What the model says of itself."""
        ...

    def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """Token ids of `text`. `special`: it may spell out special tokens. `bos`: begin as the model expects."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes of a token, which may be half a character; of special tokens their written form."""
        ...

    def session(self, context: int, *, inspect: bool = False) -> Session:
        """A new context of `context` tokens. Only with `inspect` can layers be asked for (slower)."""
        ...

    def embed(self, tokens: Sequence[int]) -> Floats:
        """The tokens' input embeddings [n, d], as the file stores them, dequantized."""
        ...

    def close(self) -> None:
        """Free the model and its sessions."""
        ...


def load(
    path: str | Path,
    *,
    backend: str = "llamacpp",
    n_threads: int | None = None,
    gpu_layers: int | None = None,
    on_progress: OnProgress = ignore,
) -> Backend:
    """Load the model in `path`. `n_threads` defaults to all CPUs, `gpu_layers` to all that the build can offload.

    Raises ModelNotFound, InvalidModel, EngineError (refused, with the engine's words), MissingDependency.
    """
    import importlib

    module = importlib.import_module(BACKENDS[backend])
    loaded: Backend = module.load(Path(path), n_threads=n_threads, gpu_layers=gpu_layers, on_progress=on_progress)
    return loaded
