"""The one seam between llmkit and the engines that run models: Backend and Session, the smallest both can honour.

    backend = load("model.gguf")            a model in memory: encode, piece, embed
    session = backend.session(4096)         a context of its own: eval, rewind, share
    session.eval(backend.encode("Hi"))      Eval: logits, and hidden states and attention of the layers asked for

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
Pooling = Literal["mean", "last", "cls"]
# normal text · control: a mark no text spells · user: added by hand · byte: half a character · unknown · unused
TokenKind = Literal["normal", "control", "user", "byte", "unknown", "unused"]

# key → module with a `load(path, *, n_threads, gpu_layers, on_progress) -> Backend`
BACKENDS = {
    "llamacpp": "llmkit.backends.llamacpp",
    "mlx": "llmkit.backends.mlx",
    "transformers": "llmkit.backends.transformers",
}


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
    n_head: int = 0
    pooling: Pooling | None = None  # of embedding models: how they make one vector of a text
    generates: bool = True  # False for encoders, which cannot continue a text
    files: tuple[Path, ...] = ()  # that its weights are read from
    engine: str = ""  # what computes, with its version and build: "llama.cpp 0.3.36 (3f2a…)"


@dataclass(frozen=True, eq=False)
class Eval:
    """What one evaluation of T tokens gave.

    logits [1, V], [T, V] or [0, V]; hidden {layer: [T, d]}, the residual stream after the layer, -1 the embeddings as
    they enter the first; attention {layer: [heads, T, keys]}, key j is position j, rows sum to 1.
    """

    logits: Floats
    hidden: Mapping[int, Floats] = field(default_factory=dict)
    attention: Mapping[int, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Tokens to append to one sequence of a session, as part of a batch."""

    sequence: int
    tokens: Sequence[int]
    logits: Rows = "last"


class Session(Protocol):
    """A context with its KV cache. It holds one sequence of tokens, or several that can share their beginnings."""

    @property
    def n(self) -> int:
        """Tokens in sequence 0."""
        ...

    @property
    def context(self) -> int:
        """Tokens that fit, of all sequences together; a beginning they share counts once where the engine can."""
        ...

    @property
    def sequences(self) -> int:
        """Sequences it can hold, numbered from 0."""
        ...

    def length(self, sequence: int = 0) -> int:
        """Tokens in that sequence."""
        ...

    def eval(
        self, tokens: Sequence[int], *, logits: Rows = "last", layers: Sequence[int] = (), attention: Sequence[int] = ()
    ) -> Eval:
        """Append `tokens` to sequence 0 and evaluate them. `attention`: layers to show it of; needs an empty session.

        Raises EngineError when they do not fit or the engine fails, Unsupported where a layer has no such thing.
        """
        ...

    def eval_parts(self, parts: Sequence[Part]) -> list[Floats]:
        """Append to several sequences in one go; the logits of each part, as `Eval.logits`. Errors as `eval`."""
        ...

    def share(self, source: int, target: int) -> None:
        """Make sequence `target` begin anew with all that `source` holds, without evaluating it."""
        ...

    def rewind(self, n: int, sequence: int = 0) -> bool:
        """Forget all but the first `n` tokens; False, and nothing changed, when this model cannot. 0 always works."""
        ...

    def close(self) -> None:
        """Free the context."""
        ...


class Grammar(Protocol):
    """A grammar on its way through a text: which tokens may come next. Holds memory until closed."""

    def allows(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
        """For each of `tokens` whether it may come next."""
        ...

    def accept(self, token: int) -> None:
        """Go on: `token` has come. Raises EngineError when the grammar does not allow it."""
        ...

    def close(self) -> None:
        """Free it."""
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

    def kind(self, token: int) -> TokenKind:
        """What sort of token it is."""
        ...

    def session(self, context: int, *, inspect: bool = False, sequences: int = 1) -> Session:
        """A new context of `context` tokens. Only with `inspect` can layers and attention be asked for (slower)."""
        ...

    def embed(self, tokens: Sequence[int]) -> Floats:
        """The tokens' input embeddings [n, d], as the file stores them, dequantized."""
        ...

    def unembed(self, hidden: Floats) -> Floats:
        """Logits [n, V] of rows of the residual stream [n, d]: the final norm and the output matrix.

        Raises Unsupported where the model's end is not known, or does not give the model's own logits.
        """
        ...

    def pool(self, tokens: Sequence[int], how: Pooling | None = None) -> Floats:
        """One vector [d] of a text: `how`, else as the model says, else the mean; of the last layer's normed output."""
        ...

    def grammar(self, text: str) -> Grammar:
        """A grammar in GBNF, from its rule "root". Raises LlmkitError if wrong, Unsupported where there is none."""
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
