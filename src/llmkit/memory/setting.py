"""How a model is run, as far as memory depends on it; and what each runtime does unless told otherwise.

Facts about the runtimes: llama.cpp common/common.h, tools/server/server.cpp and server-context.cpp; llama-cpp-python
llama_cpp/llama.py; Ollama's is derived from its documentation. llmkit's own are asserted against a real session.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import Unsupported, nearest_hint
from ..quants import TENSOR_TYPES

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")  # common/arg.cpp kv_cache_types
_NO_MMAP, _MMAP = 0, 1  # llama_load_mode


@dataclass(frozen=True)
class Setting:
    """`context` tokens for all `parallel` sequences together; `ubatch` tokens are worked on at once.

    `output_rows`: rows of logits that are reserved; `asked_rows` of them are asked for at once: a conversation asks for
    one in each sequence, who measures perplexity for all. `flash_attention` None lets the engine decide.
    `swa_full` keeps all tokens in sliding-window layers too. `mmap` and `repack` concern weights on the CPU.
    """

    context: int
    batch: int = 512
    ubatch: int = 512
    parallel: int = 1
    output_rows: int = 64
    asked_rows: int = 1
    kv_k: str = "f16"
    kv_v: str = "f16"
    flash_attention: bool | None = None
    swa_full: bool = False
    unified: bool = False
    mmap: bool = True
    repack: bool = True

    @property
    def reserved_rows(self) -> int:
        """Rows of logits the engine is told to reserve; fewer than sequences would make it abort."""
        return max(self.output_rows, self.parallel)

    @property
    def rows(self) -> int:
        """Rows of logits that are asked for at once; the engine has room for one in each sequence at least."""
        return max(min(self.asked_rows, self.reserved_rows), self.parallel)

    def model_params(self) -> dict[str, Any]:
        """The engine's model parameters."""
        return {"load_mode": _MMAP if self.mmap else _NO_MMAP} | ({} if self.repack else {"use_extra_bufts": False})

    def context_params(self) -> dict[str, Any]:
        """The engine's context parameters."""
        return {
            "n_ctx": self.context,
            "n_batch": self.batch,
            "n_ubatch": min(self.ubatch, self.batch),
            "n_seq_max": self.parallel,
            "n_outputs_max": self.reserved_rows,
            "flash_attn_type": -1 if self.flash_attention is None else int(self.flash_attention),
            "type_k": TENSOR_TYPES[self.kv_k.upper()].ggml_id,
            "type_v": TENSOR_TYPES[self.kv_v.upper()].ggml_id,
            "swa_full": self.swa_full,
            "kv_unified": self.unified,
        }


@dataclass(frozen=True)
class Runtime:
    """A program that runs GGUFs: its defaults, and a remark where they are not read from its source, or not all.

    `rows_per_sequence`: rows of logits it reserves for each sequence, None: as in the setting; `rows_per_batch`: one
    for each token of a batch. `shares`: conversations have one cache unless their number is given.
    """

    name: str
    setting: Setting
    rows_per_sequence: int | None = None
    rows_per_batch: bool = False
    shares: bool = False
    remark: str = ""

    def with_context(self, context: int, **changes: Any) -> Setting:
        """Its setting for `context`, with what the user changes (None changes nothing)."""
        given = {key: value for key, value in changes.items() if value is not None}
        made = replace(self.setting, context=context, **given)
        made = replace(made, ubatch=min(made.ubatch, made.batch))
        if self.rows_per_sequence is not None:
            made = replace(made, output_rows=self.rows_per_sequence * made.parallel)
        if self.rows_per_batch:
            made = replace(made, output_rows=made.batch)
        if self.shares and "unified" not in given:
            made = replace(made, unified="parallel" not in given)
        return replace(made, output_rows=min(made.output_rows, made.batch))


RUNTIMES = {
    row.name: row
    for row in (
        Runtime("llmkit", Setting(4096)),
        Runtime(
            "llama-server", Setting(4096, batch=2048, parallel=4, unified=True), rows_per_sequence=1, shares=True,
            remark="llama-server keeps earlier prompts in up to 8 GiB more, unless --cache-ram says otherwise",
        ),
        Runtime(
            "llama-cpp-python", Setting(512, output_rows=512, flash_attention=False, swa_full=True), rows_per_batch=True
        ),
        Runtime(
            "ollama", Setting(4096), rows_per_sequence=1,
            remark="Ollama lays models out by its own engine for some families: derived from llama.cpp, not measured",
        ),
    )
}  # fmt: skip


def runtime(name: str) -> Runtime:
    """The row of that name. Raises Unsupported with the nearest."""
    if found := RUNTIMES.get(name.lower()):
        return found
    raise Unsupported(f"unknown runtime '{name}'", nearest_hint(name, RUNTIMES))
