"""Checkpoint folders through transformers and PyTorch: the original, and the reference its quants are compared with.

Weights are float32 on the CPU unless asked otherwise, attention is transformers' "eager", its definition, which also
shows the attention weights. KV caches hold every token, of sliding windows too (masks do the sliding), so that any
session can be rewound. Only transformers' own classes run: code that comes with a checkpoint never does.
"""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import checkpoint
from ...errors import EngineError, InvalidModel, MissingDependency, Unsupported
from ...progress import OnProgress, Progress, ignore
from .. import Grammar, ModelInfo, Pooling, TokenKind, choice, hf_tokenizer
from .session import TransformersSession

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

INSTALL = "Run: pip install 'llmkit[transformers]'; PyTorch as your machine needs it: https://pytorch.org"
DTYPES = ("float32", "bfloat16", "float16")
_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "ln_out")
_GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# what transformers and PyTorch raise on folders they cannot load
_LOADING = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, NotImplementedError)


def load(
    path: Path,
    *,
    n_threads: int | None = None,
    gpu_layers: int | None = None,
    on_progress: OnProgress = ignore,
    dtype: str = "float32",
) -> Transformers:
    """Load the checkpoint folder `path` with its weights as `dtype`, one of DTYPES; `gpu_layers` means nothing here.

    Raises as `backends.load`; Unsupported for a checkpoint that needs code of its own, or is in another format.
    """
    if dtype not in DTYPES:
        raise Unsupported(f"weights as {dtype!r}: expected one of {', '.join(DTYPES)}")
    read = checkpoint.read(path)
    if choice.is_mlx_folder(path):
        raise Unsupported(f"{path}: is in MLX's format, which transformers does not read", "Use --backend mlx.")
    torch, transformers = _libraries()
    if n_threads:
        torch.set_num_threads(n_threads)
    total = sum(tensor.nbytes for tensor in read.tensors.values())
    on_progress(Progress("loading", 0, total))
    model = _load_model(torch, transformers, read, dtype)
    on_progress(Progress("loading", total, total))
    return Transformers(path, model, dtype, remark="" if "auto_map" not in read.config else ", not its own code")


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependency(f"the backend transformers needs a package: {error}", INSTALL) from error
    return torch, transformers


def _load_model(torch: Any, transformers: Any, read: checkpoint.Checkpoint, dtype: str) -> Any:
    """The model, whole: what transformers would fill with random numbers is refused."""
    kind = str(read.config.get("model_type", ""))
    if kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        own = "; it brings code of its own (auto_map), which llmkit never runs" if "auto_map" in read.config else ""
        raise Unsupported(f"{read.folder}: transformers knows no model type {kind!r}{own}")
    named = [str(name) for name in read.config.get("architectures") or ("ForCausalLM",)]
    known = kind in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    generates = known and any(name.endswith(_GENERATING) for name in named)
    loader = transformers.AutoModelForCausalLM if generates else transformers.AutoModel
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, report = loader.from_pretrained(
            str(read.folder),
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except _LOADING as error:
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidModel(f"{read.folder}: transformers cannot load it: {what[0]}") from error
    absent = (*report["missing_keys"], *report["mismatched_keys"])
    if missing := sorted(name for name in map(str, absent) if "pooler" not in name):
        raise InvalidModel(f"{read.folder}: {len(missing)} tensors are missing or of another shape: {missing[0]} …")
    return model.eval()


class Transformers:
    """A Backend. Made by `load`."""

    def __init__(self, folder: Path, model: Any, dtype: str, *, remark: str = "") -> None:
        self.folder = folder
        self.torch, self.library = _libraries()
        self._model: Any = model
        self._head = model.get_output_embeddings()
        embeddings = model.get_input_embeddings().weight
        self._decoder = model.get_decoder() if self._head is not None else model
        rows = embeddings if self._head is None else self._head.weight
        self.tokenizer = hf_tokenizer.read(folder, int(rows.shape[0]))
        self._sessions: weakref.WeakSet[TransformersSession] = weakref.WeakSet()
        self._unembeds: bool | None = None
        self.info = self._describe(dtype, remark)
        self.layers = _blocks(self._decoder, self.info.n_layer)
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def _describe(self, dtype: str, remark: str) -> ModelInfo:
        model, ends = self.model, self.tokenizer.ends
        config = model.config.get_text_config()
        parameters = list(model.parameters())  # tied ones count once
        return ModelInfo(
            architecture=str(model.config.model_type),
            name=_name(self.folder),
            n_layer=int(config.num_hidden_layers),
            n_embd=int(config.hidden_size),
            n_vocab=self.tokenizer.n_vocab,
            n_ctx_train=int(getattr(config, "max_position_embeddings", 0) or 0),
            n_params=sum(each.numel() for each in parameters),
            weight_nbytes=sum(each.numel() * each.element_size() for each in parameters),
            chat_template=self.tokenizer.chat_template,
            bos=ends.bos,
            eos=ends.eos,
            eos_token=ends.eos_token,
            add_bos=ends.add_bos,
            n_head=int(getattr(config, "num_attention_heads", 0) or 0),
            pooling=_pooling(self.folder),
            generates=self._head is not None,
            engine=f"transformers {self.library.__version__}, torch {self.torch.__version__} ({dtype}, eager{remark})",
        )

    @property
    def model(self) -> Any:
        """transformers' model. Raises EngineError after `close`."""
        if self._model is None:
            raise EngineError(f"{self.folder}: the model has been closed")
        return self._model

    def encode(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        """See Backend."""
        return self.tokenizer.encode(text, special=special, bos=bos)

    def piece(self, token: int) -> bytes:
        """See Backend. Raises ValueError for ids outside the vocabulary."""
        return self.tokenizer.piece(token)

    def kind(self, token: int) -> TokenKind:
        """See Backend."""
        return self.tokenizer.kind(token)

    def session(self, context: int, *, inspect: bool = False, sequences: int = 1) -> TransformersSession:
        """See Backend. The context is a promise kept by counting: caches grow as they are filled."""
        if not self.info.generates:
            raise Unsupported(f"{self.folder}: {self.info.architecture} models do not generate text")
        if context < 1 or sequences < 1:
            raise Unsupported(f"a context of {context} tokens in {sequences} sequences: expected 1 or more of both")
        session = TransformersSession(self, context, inspect, sequences)
        self._sessions.add(session)
        return session

    def embed(self, tokens: Sequence[int]) -> Floats:
        """See Backend. Raises ValueError for ids outside the table."""
        table = self.model.get_input_embeddings().weight
        self.check(tokens, len(table))
        whole = isinstance(tokens, range) and tokens.step == 1  # a slice is no copy
        return self.array(table[tokens.start : tokens.stop] if whole else table[list(tokens)])  # type: ignore[attr-defined]

    def check(self, tokens: Sequence[int], count: int | None = None) -> None:
        """Raise ValueError unless all tokens are of the vocabulary, or below `count`."""
        limit = self.info.n_vocab if count is None else count
        if len(tokens) and not (0 <= min(tokens) and max(tokens) < limit):
            raise ValueError(f"a token is not in a vocabulary of {limit}")

    def unembed(self, hidden: Floats) -> Floats:
        """See Backend: the final norm, the output matrix, and what the configuration scales or caps."""
        if self._unembeds is None:
            self._unembeds = self._ends_as_known()
        if not self._unembeds:
            raise Unsupported(
                f"{self.folder}: how {self.info.architecture} ends is not known, so layers give no logits"
            )
        return self._unembed(hidden)

    def _ends_as_known(self) -> bool:
        """Whether our end of the model, on the last layer of some tokens, gives the model's own logits."""
        session = self.session(8, inspect=True)
        tokens = [token % self.info.n_vocab for token in (1, 5, 11)]
        last = self.info.n_layer - 1
        found = session.eval(tokens, logits="all", layers=[last])
        session.close()
        try:
            ours = self._unembed(found.hidden[last])
        except Unsupported:
            return False
        spread = float(np.ptp(found.logits)) or 1.0
        return bool(np.abs(ours - found.logits).max() <= 1e-3 * spread)

    def _unembed(self, hidden: Floats) -> Floats:
        norm = next((found for name in _NORMS if (found := getattr(self._decoder, name, None)) is not None), None)
        if norm is None or self._head is None:
            raise Unsupported(f"{self.folder}: the final norm of {self.info.architecture} is not found")
        config, torch = self.model.config.get_text_config(), self.torch
        with torch.inference_mode():
            rows = torch.from_numpy(np.ascontiguousarray(hidden, np.float32)).to(self._head.weight.dtype)
            logits = self._head(norm(rows))
            if scale := getattr(config, "logit_scale", None):  # Cohere
                logits = logits * scale
            if scale := getattr(config, "logits_scaling", None):  # Granite
                logits = logits / scale
            if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
                logits = torch.tanh(logits / cap) * cap
            return self.array(logits)

    def pool(self, tokens: Sequence[int], how: Pooling | None = None) -> Floats:
        """See Backend."""
        self.check(tokens)
        if not tokens:
            raise ValueError("expected one or more tokens")
        with self.torch.inference_mode():
            rows = self.array(self._decoder(input_ids=self.torch.tensor([list(tokens)])).last_hidden_state[0])
        chosen = how or self.info.pooling or "mean"
        pooled: Floats = rows.mean(0, dtype=np.float32) if chosen == "mean" else rows[0 if chosen == "cls" else -1]
        return pooled

    def grammar(self, text: str) -> Grammar:
        """See Backend: there is none."""
        raise Unsupported("the backend transformers has no grammars", "Use a GGUF with llama.cpp for --grammar.")

    def array(self, tensor: Any) -> Floats:
        """A tensor as an array of its own."""
        copied: Floats = tensor.detach().to("cpu", self.torch.float32).numpy().copy()
        return copied

    def close(self) -> None:
        """See Backend. A second call does nothing."""
        for session in list(self._sessions):
            session.close()
        self._model = self._head = self._decoder = None
        self.layers = []


def _blocks(decoder: Any, n_layer: int) -> list[Any]:
    """The model's blocks in order: its one list of `n_layer` modules; empty where there is none."""
    lists = [each for each in decoder.modules() if type(each).__name__ == "ModuleList" and len(each) == n_layer]
    return list(lists[0]) if lists else []


def _name(folder: Path) -> str:
    origin = checkpoint.origin_of(folder)
    return origin.repo.rpartition("/")[2] if origin else folder.resolve().name


def _pooling(folder: Path) -> Pooling | None:
    """What sentence-transformers' module says, of a folder that has one."""
    try:
        told = json.loads((folder / "1_Pooling" / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    ways: dict[str, Pooling] = {
        "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last",
    }  # fmt: skip
    return next((way for key, way in ways.items() if isinstance(told, dict) and told.get(key) is True), None)
