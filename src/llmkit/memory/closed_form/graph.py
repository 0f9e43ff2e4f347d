"""What the engine computes in one batch, as tensors with sizes: the blocks of a decoder of any usual kind.

Blocks are as llama.cpp builds them (src/llama-graph.cpp: build_attn_mha, build_ffn, build_moe_ffn; src/models/: llama,
deepseek2, mamba-base, qwen3next). Biases, scales and most norms are written over their input and take
nothing of their own; nothing is written over a view. Activations are F32, the mask is F16 under flash attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...quants import TENSOR_TYPES
from ..setting import Setting
from . import cells
from .placement import Peak, Tape
from .shape import BOTH, MLA, NEITHER, RECURRENT, WINDOW, Layer, Shape

_F16, _F32, _I64 = 2, 4, 8
# families whose last block works on all tokens of the batch, others only on those that get logits
_ALL_ROWS = {
    "gpt-oss", "qwen3next", "qwen35", "qwen35moe", "gemma4", "bailingmoe3", "nemotron_h", "nemotron_h_moe", "step35",
    "cohere2moe", "hy_v3",
}  # fmt: skip
_ROWS_FIRST = {"gpt-oss", "step35"}  # of these, those whose last norm does not
_GATED_QUERIES = {"qwen3next", "qwen35", "qwen35moe", "qwen4exp"}  # half of what the query matrix gives is a gate


def compute(shape: Shape, setting: Setting) -> Peak:
    """Bytes of the compute buffer on the CPU, and the tensor at which it is largest."""
    return _Pass(shape, setting).peak()


@dataclass(frozen=True)
class _Inputs:
    """Tensors filled from outside; places, mask and rotations by cache: that of windows (True), that of all else."""

    position: int
    k_index: dict[bool, int]
    v_index: dict[bool, int]
    mask: dict[bool, int]
    k_turn: dict[bool, int]
    v_turn: dict[bool, int]
    rows: int


class _Pass:
    """A worst batch: `n` tokens, of which `rows` get logits."""

    def __init__(self, shape: Shape, setting: Setting) -> None:
        self.shape = shape
        self.cells = cells.of(shape, setting)
        self.flash = setting.flash_attention is not False
        sequences = max(1, setting.parallel)
        n = min(self.cells.context, setting.batch, setting.ubatch)
        self.n = -(-n // sequences) * sequences
        self.sequences = sequences
        self.rows = min(n, setting.reserved_rows)
        self.turns_k = self._turns(setting.kv_k, {layer.head_k for layer in shape.layers if layer.n_head_kv})
        self.turns_v = self._turns(setting.kv_v, {layer.head_v for layer in shape.layers if layer.v_width})
        self.tape = Tape()
        self.inputs = self._inputs()

    def peak(self) -> Peak:
        """Build all blocks and place them."""
        shape, tape = self.shape, self.tape
        stream = self._of("embedding", shape.n_embd, self._tokens)
        last = len(shape.layers) - 1
        for index, layer in enumerate(shape.layers):
            stream = self._block(layer, stream, last=index == last)
        all_rows = shape.architecture in _ALL_ROWS
        if norm_first := all_rows and shape.architecture not in _ROWS_FIRST:
            stream = self._of("output norm", shape.n_embd, stream, over=True)
        kept = (stream,) if all_rows else ()  # what a drafting model would go on from stays to the end
        if all_rows:
            stream = self._chosen(stream)
            self.n = self.rows
        if not norm_first:
            stream = self._of("output norm", shape.n_embd, stream, over=True)
        tape.tensor("logits", _F32 * self.rows * shape.n_vocab, stream, *kept)
        return tape.peak()

    # ── inputs ──

    @staticmethod
    def _turns(kind: str, widths: set[int]) -> bool:
        """Quantized K and V are rotated by a Hadamard matrix where all heads are alike and divide by 64."""
        return TENSOR_TYPES[kind.upper()].quantized and len(widths) == 1 and not next(iter(widths)) % 64

    def _inputs(self) -> _Inputs:
        shape, tape, n = self.shape, self.tape, self.n
        self._tokens = tape.input("tokens", _F32 * n)
        tape.input("embeddings instead of tokens", _F32 * n * shape.n_embd)
        attending = [layer for layer in shape.layers if layer.kind not in (RECURRENT, NEITHER)]
        position = tape.input("positions", _F32 * n) if attending else self._tokens
        if shape.recurrent is not None:
            self._sequences = tape.input("sequences", _F32 * self.sequences)
        k_index: dict[bool, int] = {}
        v_index: dict[bool, int] = {}
        mask: dict[bool, int] = {}
        k_turn: dict[bool, int] = {}
        v_turn: dict[bool, int] = {}
        widest = max((layer.v_width for layer in shape.layers), default=0)
        for window in dict.fromkeys(layer.kind == WINDOW for layer in attending):
            if self.turns_k:
                head = max(layer.head_k for layer in attending)
                k_turn[window] = tape.input("rotation of K", _F32 * (head & -head) ** 2)
            if self.turns_v:
                v_turn[window] = tape.input("rotation of V", _F32 * 64**2)
            k_index[window] = tape.input("places of K", _I64 * n)
            if widest:  # latent attention keeps no V
                v_index[window] = tape.input("places of V", _I64 * n * (1 if self.flash else widest))
            columns = self.cells.window if window else self.cells.full
            mask[window] = tape.input("attention mask", (_F16 if self.flash else _F32) * n * columns)
        rows = tape.input("rows to put out", _F32 * self.rows)
        return _Inputs(position, k_index, v_index, mask, k_turn, v_turn, rows)

    def _of(self, name: str, width: int, *sources: int, over: bool = False) -> int:
        """`width` numbers for each token of the batch (or each row to put out, after the last block's attention)."""
        return self.tape.tensor(name, _F32 * self.n * width, *sources, over=over)

    # ── blocks ──

    def _block(self, layer: Layer, stream: int, *, last: bool) -> int:
        shape = self.shape
        mixed: int | None = None
        if layer.kind != NEITHER:
            normed = self._of("norm", shape.n_embd, stream)
            if layer.kind in (RECURRENT, BOTH):
                mixed = self._recurrent(normed)
            if layer.kind != RECURRENT:
                attended = self._latent(layer, normed) if layer.kind == MLA else self._attention(layer, normed)
                mixed = attended if mixed is None else self._of("sum", shape.n_embd, mixed, attended, over=True)
        chosen = last and shape.architecture not in _ALL_ROWS
        if chosen:
            mixed = None if mixed is None else self._chosen(mixed)
            stream = self._chosen(stream)
            self.n = self.rows
        if mixed is not None:
            # what a recurrent layer gives is a view, which nothing is written over
            pair = (stream, mixed) if layer.kind == RECURRENT and not chosen else (mixed, stream)
            stream = self._of("attention output", shape.n_embd, *pair, over=True)
        if layer.n_ff or layer.experts:
            normed = self._of("norm", shape.n_embd, stream)
            made = self._mixture(normed) if layer.experts else self._feed_forward(normed, layer.n_ff)
            stream = self._of("block output", shape.n_embd, made, stream, over=True)
        return stream

    def _chosen(self, stream: int) -> int:
        """Only the rows that are put out go on."""
        return self.tape.tensor("chosen rows", _F32 * self.rows * self.shape.n_embd, stream, self.inputs.rows)

    def _attention(self, layer: Layer, normed: int) -> int:
        inputs, window = self.inputs, layer.kind == WINDOW
        gates = self.shape.architecture in _GATED_QUERIES
        raw = self._of("queries", layer.n_head * layer.head_k * (2 if gates else 1), normed)
        query = self._of("queries", layer.n_head * layer.head_k, raw, inputs.position)
        if window in inputs.k_turn:
            query = self._of("queries", layer.n_head * layer.head_k, query, inputs.k_turn[window])
        if layer.owns_cache:
            value = self._of("values", layer.v_width, normed)
            if window in inputs.v_turn:
                value = self._of("values", layer.v_width, value, inputs.v_turn[window])
            key = self._of("keys", layer.k_width, normed)
            key = self._of("keys", layer.k_width, key, inputs.position)
            if window in inputs.k_turn:
                key = self._of("keys", layer.k_width, key, inputs.k_turn[window])
            self.tape.tensor("cache", 0, key, inputs.k_index[window])
            self.tape.tensor("cache", 0, value, inputs.v_index[window])
        found = self._attend(layer, query, layer.n_head * layer.head_v)
        if window in inputs.v_turn:
            found = self._of("attention", layer.n_head * layer.head_v, found, inputs.v_turn[window])
        if gates:
            gate = self._of("attention", layer.n_head * layer.head_v, raw)
            found = self._of("attention", layer.n_head * layer.head_v, gate, found, over=True)
        return self._of("attention output", self.shape.n_embd, found)

    def _attend(self, layer: Layer, query: int, width: int, cached: int | None = None) -> int:
        """Flash attention makes only its result; without it there is a score for every head, token and cell."""
        window = layer.kind == WINDOW
        mask = self.inputs.mask[window]
        if self.flash:
            return self._of("attention", width, query, mask)
        columns = self.cells.window if window else self.cells.full
        scores = self._of("attention scores", layer.n_head * columns, query)
        scores = self._of("attention scores", layer.n_head * columns, scores, mask, over=True)
        found = self._of("attention", width, scores, *(() if cached is None else (cached,)))
        return found if cached is not None else self._of("attention", width, found)

    def _latent(self, layer: Layer, normed: int) -> int:
        """Queries are carried over into the latent space, the result back (multi-head latent attention, absorbed)."""
        mla, heads = self.shape.mla, layer.n_head
        if mla is None:
            return normed
        low = self._of("queries", mla.q_rank, normed) if mla.q_rank else normed
        raw = self._of("queries", heads * mla.qk, low)
        latent = self._of("latent queries", heads * mla.kv_rank, raw)
        turned = self._of("queries", heads * mla.rope, raw, self.inputs.position)
        query = self._of("latent queries", heads * layer.head_k, latent, turned)
        both = self._of("keys", layer.k_width, normed)
        inner = self._of("keys", mla.kv_rank, both)
        turned = self._of("keys", mla.rope, both, self.inputs.position)
        key = self._of("keys", layer.k_width, inner, turned)
        self.tape.tensor("cache", 0, key, self.inputs.k_index[False])
        cached = None
        if not self.flash:  # V is a view of K here, and has to be laid out again
            cached = self.tape.tensor("values", _F16 * mla.kv_rank * self.cells.full * self.cells.streams)
        found = self._attend(layer, query, heads * mla.kv_rank, cached)
        found = self._of("attention", heads * mla.v, found)
        found = self._of("attention", heads * mla.v, found)
        return self._of("attention output", self.shape.n_embd, found)

    def _feed_forward(self, normed: int, width: int, name: str = "feed-forward") -> int:
        if not self.shape.gated:
            up = self._of(name, width, normed)
            return self._of(name, self.shape.n_embd, self._of(name, width, up, over=True))
        gate = self._of(name, width, normed)
        up = self._of(name, width, normed)
        return self._of(name, self.shape.n_embd, self._of(name, width, gate, up))

    def _mixture(self, normed: int) -> int:
        """All experts a token uses at once: their widths count `used` times."""
        experts, embd = self.shape.experts, self.shape.n_embd
        if experts is None:
            return normed
        odds = self._of("routing", experts.n, normed)
        odds = self._of("routing", experts.n, odds, over=True)
        order = self._of("routing", experts.n, odds)
        weights = self._of("routing", experts.used, odds, order)
        gate = self._of("experts", experts.used * experts.n_ff, normed, order)
        up = self._of("experts", experts.used * experts.n_ff, normed, order)
        inner = self._of("experts", experts.used * experts.n_ff, gate, up)
        down = self._of("experts", experts.used * embd, inner, order)
        down = self._of("experts", experts.used * embd, down, weights, over=True)
        total = self._of("experts", embd, *[down] * min(2, experts.used))
        for _ in range(experts.used - 2):
            total = self._of("experts", embd, total, down, over=True)
        if experts.n_ff_shared:
            shared = self._feed_forward(normed, experts.n_ff_shared, "shared expert")
            total = self._of("experts", embd, total, shared, over=True)
        return total

    def _recurrent(self, normed: int) -> int:
        """Projections, a short convolution, the state's update; for Mamba and for gated delta nets."""
        state = self.shape.recurrent
        if state is None:
            return normed
        per_sequence = _F32 * self.sequences
        before = self.tape.tensor("recurrent state", per_sequence * state.rolling)
        if state.kind == "delta":
            return self._delta(normed, before)
        if state.kind == "rwkv":
            return self._token_shift(normed, before)
        both = self._of("recurrent", 2 * state.d_inner, normed)
        rolled = _F32 * self.n * state.channels + per_sequence * state.rolling
        joined = self.tape.tensor("recurrent", rolled, before, both)
        inner = self._of("recurrent", state.channels, joined)
        inner = self._of("recurrent", state.channels, inner, over=True)
        step = self._of("recurrent", state.d_inner, inner)
        new = _F32 * self.n * state.d_inner + per_sequence * state.state
        scanned = self.tape.tensor("recurrent", new, inner, step)
        aside = self._of("recurrent", state.d_inner, both)
        direct = self._of("recurrent", state.d_inner, inner, over=True)
        mixed = self._of("recurrent", state.d_inner, direct, scanned, over=True)
        return self._of("recurrent", self.shape.n_embd, self._of("recurrent", state.d_inner, aside, mixed))

    def _token_shift(self, normed: int, before: int) -> int:
        """RWKV: six mixtures of each token with the one before it, what is projected out of them, the state's update.

        Ten projections live at once: receptance, decay, key, value, rate, gate, and four made of these.
        """
        state, embd = self.shape.recurrent, self.shape.n_embd
        if state is None:
            return normed
        difference = self._of("recurrent", embd, normed, before)
        mixtures = self._of("recurrent", 6 * embd, normed, difference)
        mixtures = self._of("recurrent", 6 * embd, mixtures, over=True)
        parts = [self._of("recurrent", embd, mixtures) for _ in range(10)]
        new = _F32 * self.n * embd + _F32 * self.sequences * state.state
        return self._of("recurrent", embd, self.tape.tensor("recurrent", new, *parts))

    def _delta(self, normed: int, before: int) -> int:
        state = self.shape.recurrent
        if state is None:
            return normed
        per_sequence, keys = _F32 * self.sequences, state.n_group * state.d_state
        both = self._of("recurrent", state.channels, normed)
        rolled = _F32 * self.n * state.channels + per_sequence * state.rolling
        joined = self.tape.tensor("recurrent", rolled, before, both)
        kept = self.tape.tensor("recurrent state", per_sequence * state.state)
        inner = self._of("recurrent", state.channels, joined)
        inner = self._of("recurrent", state.channels, inner, over=True)
        parts = []
        for _ in range(2):
            part = self._of("recurrent", keys, inner)
            parts.append(self._of("recurrent", state.d_inner, part) if state.d_inner != keys else part)
        new = _F32 * self.n * state.d_inner + per_sequence * state.state
        updated = self.tape.tensor("recurrent", new, *parts, inner, kept)
        found = self._of("recurrent", state.d_inner, updated)
        gate = self._of("recurrent", state.d_inner, normed)
        return self._of("recurrent", self.shape.n_embd, self._of("recurrent", state.d_inner, found, gate, over=True))
