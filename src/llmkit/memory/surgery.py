"""Drafts of smaller models, to be measured, not written: with fewer blocks, or fewer tokens.

Their tensors have no place in a file: it would have to be laid out anew.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ..convert.draft import GgufDraft
from ..convert.tensors import first_rows
from ..errors import Unsupported
from ..gguf import Array, Value
from .estimate import n_vocab

_BLOCK = re.compile(r"blk\.(\d+)\.")
_BY_TOKEN = re.compile(r"(token_embd|output|per_layer_token_embd)\.")


def n_layer_of(draft: GgufDraft) -> int:
    """Blocks, by the names of the tensors."""
    numbers = (int(block[1]) for tensor in draft.tensors if (block := _BLOCK.match(tensor.name)))
    return max(numbers, default=-1) + 1


def without_blocks(draft: GgufDraft, count: int) -> GgufDraft:
    """Without the last `count` blocks, but for those that only guess tokens, which stay.

    The last, because all patterns of layers then stay as they are; where blocks are alike bytes do not depend on it.
    Raises Unsupported when no block would be left.
    """
    architecture, n_layer = str(draft.metadata["general.architecture"].data), n_layer_of(draft)
    guessing = draft.metadata.get(f"{architecture}.nextn_predict_layers")
    stop = n_layer - (int(guessing.data) if guessing and isinstance(guessing.data, int) else 0)
    start = stop - count
    if start < 1:
        raise Unsupported(f"{count} of {n_layer} blocks cannot be left out")
    gone = range(start, stop)
    tensors = []
    for tensor in draft.tensors:
        block = _BLOCK.match(tensor.name)
        if block and int(block[1]) >= stop:
            name = f"blk.{int(block[1]) - count}.{tensor.name[block.end() :]}"
            tensors.append(replace(tensor, name=name, span=None))
        elif not block or int(block[1]) < start:
            tensors.append(replace(tensor, span=None))
    found = {
        key: _cut(value, n_layer, gone) if key.startswith(f"{architecture}.") else value
        for key, value in draft.metadata.items()
    }
    found[f"{architecture}.block_count"] = Value.uint32(n_layer - count)
    return replace(draft, metadata=found, tensors=tuple(tensors))


def _cut(value: Value, n_layer: int, gone: range) -> Value:
    """An array with an entry for each block, without those of the blocks that are gone; anything else as it is."""
    if not isinstance(value.data, Array) or len(value.data) != n_layer:
        return value
    return Value.array(value.data.element, [item for index, item in enumerate(value.data) if index not in gone])


def with_tokens(draft: GgufDraft, count: int) -> GgufDraft:
    """With the first `count` tokens only. Raises Unsupported where it has no such number."""
    n_tokens = n_vocab(draft)
    embedding = next((tensor for tensor in draft.tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None or not 0 < count <= n_tokens:
        raise Unsupported("the draft has no token embeddings to cut")
    rows = embedding.shape[0]
    tensors = tuple(
        replace(
            first_rows(tensor, count) if _BY_TOKEN.match(tensor.name) and tensor.shape[0] == rows else tensor, span=None
        )
        for tensor in draft.tensors
    )
    found = dict(draft.metadata)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        listed = found.get(key)
        if listed is not None and isinstance(listed.data, Array):
            found[key] = Value.array(listed.data.element, listed.data[:count])
    merges = found.get("tokenizer.ggml.merges")
    if merges is not None and isinstance(merges.data, Array):  # about one for each token that is no single byte
        kept = merges.data[: len(merges.data) * count // n_tokens]
        found["tokenizer.ggml.merges"] = Value.array(merges.data.element, kept)
    found[f"{found['general.architecture'].data}.vocab_size"] = Value.uint32(count)
    return replace(draft, metadata=found, tensors=tensors)
