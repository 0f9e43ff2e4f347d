"""A llama.cpp context: sequences that can share cells, batches, and what may be seen of its layers.

What the KV cache can take back is asked of the engine (sliding windows and recurrent states cannot rewind freely). The
engine rounds a context up to 256 cells; ours is the size asked for, so the cells in use are counted here.
"""

from __future__ import annotations

import ctypes as C
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ... import engine
from ...errors import EngineError, Unsupported
from .. import Eval, Part, Rows
from ..cells import Cells
from .tap import ATTENTION, HIDDEN, Tap, rows_of_attention

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import LlamaCpp

    Floats = NDArray[np.float32]

_BATCH = 512  # tokens per call of the engine
# Rows of logits per call: the engine reserves this many × vocabulary × 4 bytes
_OUTPUT_ROWS = 64
_MAX_CONTEXT = 2**31 - 1  # the engine's position type is int32; what is larger would wrap
_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
_SHORT = 15  # batches of so few tokens are not given up half-way: they end soon


class Piece(NamedTuple):
    """Tokens that go to the engine in one call: `rows` of them, the last ones, give logits."""

    part: int
    sequence: int
    tokens: Sequence[int]
    rows: int


class Batch:
    """The engine's llama_batch for up to `size` tokens, on arrays of ours."""

    def __init__(self, llama: Any, size: int = _BATCH) -> None:
        self.token, self.pos, self._counts, self.sequence = (np.zeros(size, np.int32) for _ in range(4))
        self.logits = np.zeros(size, np.int8)
        self._counts[:] = 1
        self._pointers = self.sequence.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
        self.struct = llama.llama_batch()
        kinds = dict(llama.llama_batch._fields_)
        arrays: dict[str, NDArray[Any]] = {
            "token": self.token, "pos": self.pos, "n_seq_id": self._counts, "seq_id": self._pointers,
            "logits": self.logits,
        }  # fmt: skip
        for name, values in arrays.items():
            setattr(self.struct, name, C.cast(values.ctypes.data, kinds[name]))

    def fill(self, pieces: Sequence[Piece], lengths: Sequence[int]) -> None:
        """Set the rows; a sequence's tokens follow the `lengths` it has."""
        end, position = 0, dict[int, int]()
        for _, sequence, tokens, rows in pieces:
            start, end = end, end + len(tokens)
            first = position.get(sequence, lengths[sequence])
            position[sequence] = first + len(tokens)
            if end - start == 1:  # the common case, and numpy's slices have their price
                self.token[start], self.pos[start], self.sequence[start] = tokens[0], first, sequence
                self.logits[start] = rows
                continue
            self.token[start:end], self.sequence[start:end] = tokens, sequence
            self.pos[start:end] = np.arange(first, first + len(tokens))
            self.logits[start : end - rows], self.logits[end - rows : end] = 0, 1
        self.struct.n_tokens = end


class _Single:
    """One token of sequence 0, by the shortest way: between two tokens the caches are cold, and every line costs."""

    def __init__(self, llama: Any) -> None:
        self.token, self.pos = (C.c_int32 * 1)(), (C.c_int32 * 1)()
        counts, sequence, rows = (C.c_int32 * 1)(1), (C.c_int32 * 1)(0), (C.c_int8 * 1)(1)
        self._kept = counts, (C.POINTER(C.c_int32) * 1)(C.cast(sequence, C.POINTER(C.c_int32))), rows
        self.struct = llama.llama_batch(1, self.token, None, self.pos, *self._kept)
        self.decode = llama.llama_decode
        # with an address as result: making a pointer object of it takes longer than the copy
        self.logits = C.CFUNCTYPE(C.c_void_p, C.c_void_p)(C.cast(llama._lib.llama_get_logits, C.c_void_p).value or 0)


class LlamaCppSession:
    """A Session. Made by `LlamaCpp.session`."""

    def __init__(self, backend: LlamaCpp, context: int, *, inspect: bool = False, sequences: int = 1) -> None:
        if not 1 <= context <= _MAX_CONTEXT:
            raise Unsupported(f"a context of {context} tokens: expected 1 to {_MAX_CONTEXT}")
        if not 1 <= sequences <= _MAX_SEQUENCES:
            raise Unsupported(f"{sequences} sequences: expected 1 to {_MAX_SEQUENCES}")
        backend.require_generation()
        self.context = context
        self.sequences = sequences
        self._backend = backend
        self._engine = backend.engine
        self._cells = Cells(sequences)
        self._output_rows = max(_OUTPUT_ROWS, sequences)  # the engine reserves as many rows as there are sequences
        self._tap = Tap(self._engine) if inspect else None
        self._batch, self._single = Batch(self._engine.llama), _Single(self._engine.llama)
        self._unsure = False  # whether Ctrl-C may have come between the engine's work and our count of it
        self._context = self._make_context()
        self._memory = self._engine.llama.llama_get_memory(self._context)
        self._n_swa = self._engine.llama.llama_model_n_swa(backend.model)
        if not self._memory:
            self.close()
            raise backend.cannot_generate()

    def _make_context(self) -> Any:
        llama = self._engine.llama
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self.context, _BATCH, _BATCH
        params.n_outputs_max = self._output_rows
        params.n_threads = params.n_threads_batch = self._backend.n_threads
        params.pooling_type = llama.LLAMA_POOLING_TYPE_NONE
        params.n_seq_max, params.kv_unified = self.sequences, self.sequences > 1
        # Of sliding-window layers only the window is kept, but not where cells must stay positions, to be seen, nor
        # where sequences share cells: the engine uses none again that two of them hold, and runs out
        params.swa_full = self._tap is not None or self.sequences > 1
        if self._tap is not None:
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it hides the attention weights
            params.cb_eval = self._tap.callback
        return self._backend.make_context(params, f"a context of {self.context} tokens", self.context)

    @property
    def n(self) -> int:
        """See Session."""
        self._settle()
        return self._cells.lengths[0]

    @property
    def used(self) -> int:
        """Cells in use, of all sequences together: a shared beginning counts once."""
        self._settle()
        return self._cells.used

    def length(self, sequence: int = 0) -> int:
        """See Session."""
        return self._cells.lengths[self._known(sequence)]

    def _known(self, sequence: int) -> int:
        if self._context is None:
            raise EngineError(f"{self._backend.file.path}: the session has been closed")
        self._settle()
        if not 0 <= sequence < self.sequences:
            raise ValueError(f"sequence {sequence} is not in a session of {self.sequences}")
        return sequence

    def eval(
        self, tokens: Sequence[int], *, logits: Rows = "last", layers: Sequence[int] = (), attention: Sequence[int] = ()
    ) -> Eval:
        """See Session. After an error or Ctrl-C it holds what it held before the failed batch."""
        if not layers and not attention:
            if len(tokens) == 1 and logits != "none" and self._tap is None and self._fits(tokens[0]):
                return Eval(self._next(int(tokens[0])))
            return Eval(self.eval_parts([Part(0, tokens, logits)])[0])
        self._check_layers(layers, attention)
        self._backend.shown.require(layers, attention)
        # the last layer computes only the rows whose logits are asked for
        rows: Rows = "all" if self._backend.info.n_layer - 1 in layers else logits
        nodes = {i: HIDDEN % i if i >= 0 else self._backend.shown.entry for i in layers}
        all_logits, parts = self.observe(tokens, [*nodes.values(), *(ATTENTION % i for i in attention)], rows)
        kept = {"all": len(all_logits), "last": 1, "none": 0}[logits]
        hidden = {i: np.concatenate(parts[node]) for i, node in nodes.items()}
        weights = {i: rows_of_attention(parts[ATTENTION % i], len(tokens)) for i in attention}
        return Eval(all_logits[len(all_logits) - kept :], hidden, weights)

    def _fits(self, token: int) -> bool:
        """Whether all is as it mostly is; if not, the longer way tells what is wrong."""
        self._settle()
        return self._context is not None and 0 <= token < self._backend.info.n_vocab and self._cells.used < self.context

    def _next(self, token: int) -> Floats:
        """One more token of sequence 0, and its logits [1, V].

        Ctrl-C is not held, as no Python runs inside; where it comes before the count, `_settle` asks the engine.
        """
        single, cells, mark = self._single, self._cells, self._engine.log.count
        single.token[0], single.pos[0] = token, cells.lengths[0]
        self._unsure = True
        code = single.decode(self._context, single.struct)
        if code != 0:
            self._restore({0})
            lines = self._engine.log.since(mark)
            raise self._engine.error(f"the engine failed to evaluate 1 token (llama_decode: {code})", lines)
        cells.append(0, 1)
        self._unsure = False
        row = np.empty((1, self._backend.info.n_vocab), np.float32)
        C.memmove(row.ctypes.data, single.logits(self._context), row.nbytes)
        return row

    def _settle(self) -> None:
        """After Ctrl-C inside `_next`: whether the token went in, the engine knows."""
        if self._unsure and self._context is not None:
            came = self._engine.llama.llama_memory_seq_pos_max(self._memory, 0) + 1 - self._cells.lengths[0]
            if came > 0:
                self._cells.append(0, came)
            self._unsure = False

    def observe(
        self, tokens: Sequence[int], names: Sequence[str], logits: Rows
    ) -> tuple[Floats, Mapping[str, list[Floats]]]:
        """Evaluate, and hand out nodes of the graph: name → parts, none for a node that does not exist. See tap.py.

        Raises EngineError when a node shows other than a row for each token.
        """
        if self._tap is None:
            raise ValueError("layers can be asked for only in a session made with inspect=True")
        self._tap.want(names)
        rows = self.eval_parts([Part(0, tokens, logits)])[0]
        parts = self._tap.take()
        for name, found in parts.items():
            count = sum(part.shape[-2] for part in found)
            if found and count != len(tokens):
                raise EngineError(f"node {name}: the engine showed {count} rows for {len(tokens)} tokens")
        return rows, parts

    def eval_parts(self, parts: Sequence[Part]) -> list[Floats]:
        """See Session. After an error or Ctrl-C it holds what it held before the failed batch."""
        self._check(parts)
        found: list[list[Floats]] = [[] for _ in parts]
        for pieces in self._calls(parts):
            self._decode(pieces)
            start, rows = 0, self._logits(sum(piece.rows for piece in pieces))
            for piece in pieces:
                if piece.rows:
                    found[piece.part].append(rows[start : start + piece.rows])
                    start += piece.rows
        none = np.empty((0, self._backend.info.n_vocab), np.float32)
        return [rows[0] if len(rows) == 1 else np.concatenate(rows) if rows else none for rows in found]

    def _calls(self, parts: Sequence[Part]) -> list[list[Piece]]:
        """The parts, cut so that each call of the engine has at most _BATCH tokens and _output_rows rows."""
        calls: list[list[Piece]] = [[]]
        tokens_left, rows_left = _BATCH, self._output_rows
        for index, part in enumerate(parts):
            done, total = 0, len(part.tokens)
            while done < total:
                if tokens_left == 0 or rows_left == 0:
                    calls.append([])
                    tokens_left, rows_left = _BATCH, self._output_rows
                count = min(total - done, tokens_left, rows_left if part.logits == "all" else total)
                last = done + count == total
                rows = count if part.logits == "all" else int(part.logits == "last" and last)
                calls[-1].append(Piece(index, part.sequence, part.tokens[done : done + count], rows))
                done, tokens_left, rows_left = done + count, tokens_left - count, rows_left - rows
        return calls

    def _check(self, parts: Sequence[Part]) -> None:
        n_vocab, count = self._backend.info.n_vocab, 0
        for part in parts:
            self._known(part.sequence)
            if not len(part.tokens) or not (0 <= min(part.tokens) and max(part.tokens) < n_vocab):
                raise ValueError(f"expected one or more tokens of a vocabulary of {n_vocab}")
            count += len(part.tokens)
        if not count:
            raise ValueError("expected one part or more")
        if self._cells.used + count > self.context:
            held = f"it holds {self._cells.used} of {self.context} tokens, {count} more were to follow"
            raise EngineError(f"the context is full: {held}", "Use a larger context, or begin anew.")

    def _check_layers(self, layers: Sequence[int], attention: Sequence[int]) -> None:
        n_layer = self._backend.info.n_layer
        if self._tap is None:
            raise ValueError("layers can be asked for only in a session made with inspect=True")
        if any(not -1 <= layer < n_layer for layer in layers):
            raise ValueError(f"layers {list(layers)}: expected -1 (the embeddings) to {n_layer - 1}")
        if any(not 0 <= layer < n_layer for layer in attention):
            raise ValueError(f"attention of layers {list(attention)}: expected 0 to {n_layer - 1}")
        if self.sequences > 1:
            raise ValueError("layers can be asked for only in a session of one sequence")
        if attention and self.n:
            raise ValueError("attention can be asked for only in an empty session")

    def _decode(self, pieces: Sequence[Piece]) -> None:
        """One call of the engine."""
        lengths, cells = self._cells.lengths, self._cells
        self._batch.fill(pieces, lengths)
        count = self._batch.struct.n_tokens
        if self._tap is not None:
            self._tap.limit(lengths[0] + count)
        with self._engine.capture_log() as lines, engine.held_interrupts() as held:
            if count > _SHORT and threading.current_thread() is threading.main_thread():  # nowhere else comes Ctrl-C
                code = self._interruptible_decode(held)
            else:
                code = self._engine.llama.llama_decode(self._context, self._batch.struct)
            if code == 0:
                for piece in pieces:
                    cells.append(piece.sequence, len(piece.tokens))
            else:
                self._restore({piece.sequence for piece in pieces})
        if code != 0:
            raise self._engine.error(f"the engine failed to evaluate {count} tokens (llama_decode: {code})", lines)
        if self._tap is not None:
            self._tap.check()

    def _restore(self, sequences: set[int]) -> None:
        """After a failed call: the engine may have kept some of it."""
        self._unsure = False
        for sequence in sequences:
            if not self.rewind(self._cells.lengths[sequence], sequence):
                self.rewind(0, sequence)

    def _interruptible_decode(self, held: list[int]) -> int:
        """llama_decode, given up within the batch when an interrupt is held (CPUs only; single tokens are short)."""
        llama = self._engine.llama
        abort = llama.ggml_abort_callback(lambda _: bool(held))
        llama.llama_set_abort_callback(self._context, abort, None)
        code = int(llama.llama_decode(self._context, self._batch.struct))
        llama.llama_set_abort_callback(self._context, llama.ggml_abort_callback(), None)
        return code

    def _logits(self, rows: int) -> Floats:
        """A copy of the `rows` rows of logits of the last call."""
        n_vocab = self._backend.info.n_vocab
        copied = np.empty((rows, n_vocab), np.float32)
        if rows:
            C.memmove(copied.ctypes.data, self._engine.llama.llama_get_logits(self._context), copied.nbytes)
        return copied

    def share(self, source: int, target: int) -> None:
        """See Session. Cells of a KV cache are shared; a recurrent state is copied when one of the two goes on."""
        if self._known(source) == self._known(target):
            return
        llama = self._engine.llama
        self._forget(target)
        llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self._cells.share(source, target)

    def rewind(self, n: int, sequence: int = 0) -> bool:
        """See Session. The engine is asked what it still holds: a window that has slid on cannot slide back."""
        length = self.length(sequence)
        if not 0 <= n <= length:
            raise ValueError(f"cannot rewind {length} tokens to {n}")
        llama = self._engine.llama
        if n == 0:
            self._forget(sequence)
        elif n < length or llama.llama_memory_seq_pos_max(self._memory, sequence) >= n:
            oldest = llama.llama_memory_seq_pos_min(self._memory, sequence)
            window = max(1, self._n_swa)
            if oldest > max(0, n - window) or not llama.llama_memory_seq_rm(self._memory, sequence, n, -1):
                return False
        self._cells.rewind(sequence, n)
        return True

    def _forget(self, sequence: int) -> None:
        """Empty a sequence in the engine."""
        llama = self._engine.llama
        if all(n == 0 for other, n in enumerate(self._cells.lengths) if other != sequence):
            llama.llama_memory_clear(self._memory, True)
        else:
            llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def close(self) -> None:
        """See Session. A second call does nothing."""
        self._settle()
        context, self._context = self._context, None  # first: Ctrl-C after the freeing must not free it again
        if context is not None:
            self._engine.llama.llama_free(context)
