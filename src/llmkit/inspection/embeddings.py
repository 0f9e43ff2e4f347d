"""Embeddings: the rows of a model's own vocabulary, vectors of texts, and what quantization does to both.

The table is read a few thousand rows at a time, so that a vocabulary of 262,144 × 640 needs megabytes. Rows are
compared by cosine: 1 same direction, 0 nothing in common. Rows are where a model begins, not what it knows: the layers
above give a word its meaning in a sentence. Analogies: Mikolov, Yih, Zweig 2013, "Linguistic Regularities".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..backends import Backend, Pooling, TokenKind
from ..errors import LlmkitError, Unsupported
from . import layers
from .pictures import Point, Scatter
from .tokens import visible

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_CHUNK_NBYTES = 8 << 20  # of dequantized rows held at a time
_SPARE = 64  # more candidates than asked for: some are unused tokens
_LEAST = 1e-12  # a row shorter than this has no direction
MOST_TEXTS = 64
WEAK = (
    "This is a chat model: it was never trained to put a text into one vector, so take these as a hint. "
    "An embedding model tells meanings apart far better."
)


@dataclass(frozen=True)
class Neighbour:
    """A row of the table: the cosine to what was asked for, and its length."""

    id: int
    piece: str
    kind: TokenKind
    cosine: float
    norm: float


@dataclass(frozen=True)
class Neighbours:
    """The rows most like the token `id`, best first; the token itself is left out."""

    id: int
    piece: str
    norm: float
    rows: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Analogy:
    """a is to b as c is to …: the rows nearest b − a + c, without the three words (`itself`: what wins with them)."""

    words: tuple[str, str, str]
    ids: tuple[int, int, int]
    rows: tuple[Neighbour, ...]
    itself: Neighbour


@dataclass(frozen=True)
class Norms:
    """Lengths of the rows: quantiles {share of rows: length}, the shortest and the longest, and a histogram."""

    rows: int
    width: int
    mean: float
    quantiles: dict[str, float]
    shortest: tuple[Neighbour, ...]
    longest: tuple[Neighbour, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Sentences:
    """Texts as vectors [n, width], and how alike they are [n, n]; `warning` when the model was not made for this."""

    model: str
    how: Pooling
    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    vectors: tuple[tuple[float, ...], ...]
    similarity: tuple[tuple[float, ...], ...]
    warning: str | None


@dataclass(frozen=True)
class LayerSimilarity:
    """How alike texts are [n, n] after one layer (-1: what enters the first)."""

    layer: int
    similarity: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class RowShift:
    """A token's row in two files: the cosine, and the length of the difference as a share of the row's own."""

    id: int
    piece: str
    cosine: float
    error: float


@dataclass(frozen=True)
class TextShift:
    """A text's vector in two files."""

    text: str
    cosine: float
    error: float


@dataclass(frozen=True)
class Shift:
    """What another file of the same model has made of the rows (over all of them), and of texts."""

    model: str
    other: str
    rows: int
    mean_cosine: float
    mean_error: float
    quantiles: dict[str, float]
    worst: tuple[RowShift, ...]
    texts: tuple[TextShift, ...]


def chunks(backend: Backend) -> Iterator[tuple[int, Floats]]:
    """The table in parts: the first row's number, and rows [k, width] as the file stores them, dequantized."""
    step = max(1, _CHUNK_NBYTES // (4 * backend.info.n_embd))
    for start in range(0, backend.info.n_vocab, step):
        yield start, backend.embed(range(start, min(start + step, backend.info.n_vocab)))


def neighbours(backend: Backend, token: int, count: int = 10) -> Neighbours:
    """The `count` rows whose direction is nearest to that of `token`."""
    row = backend.embed([token])[0]
    found = nearest(backend, row, count, without=[token])
    return Neighbours(token, visible(backend.piece(token)), float(np.linalg.norm(row)), found)


def nearest(backend: Backend, vector: Floats, count: int = 10, *, without: Sequence[int] = ()) -> tuple[Neighbour, ...]:
    """The `count` rows nearest to a vector [width], best first, without those tokens and the unused ones.

    Raises LlmkitError when the vector has no direction.
    """
    length = float(np.linalg.norm(vector))
    if length < _LEAST:
        raise LlmkitError("the vector is zero, so nothing is near it")
    wanted = count + len(without) + _SPARE
    ids, cosines, norms = np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.float32)
    for start, rows in chunks(backend):
        size = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        near = rows @ (vector / np.float32(length)) / np.maximum(size, np.float32(_LEAST))
        ids = np.concatenate([ids, np.arange(start, start + len(rows))])
        cosines, norms = np.concatenate([cosines, near]), np.concatenate([norms, size])
        if len(ids) > wanted:
            best = np.argpartition(-cosines, wanted)[:wanted]
            ids, cosines, norms = ids[best], cosines[best], norms[best]
    found = []
    for index in np.argsort(-cosines, kind="stable"):
        id = int(ids[index])
        kind = backend.kind(id)
        if id not in without and kind != "unused" and norms[index] > _LEAST:
            shown = visible(backend.piece(id))
            found.append(Neighbour(id, shown, kind, float(cosines[index]), float(norms[index])))
        if len(found) == count:
            break
    return tuple(found)


def analogy(backend: Backend, ids: tuple[int, int, int], count: int = 5) -> Analogy:
    """a is to b as c is to …, for the tokens (a, b, c): the rows nearest b − a + c, each of length 1 before."""
    a, b, c = unit(backend.embed(ids))
    vector = b - a + c
    words = tuple(visible(backend.piece(id)) for id in ids)
    found = nearest(backend, vector, count, without=ids)
    return Analogy((words[0], words[1], words[2]), ids, found, nearest(backend, vector, 1)[0])


def norms(backend: Backend, count: int = 5, bins: int = 24) -> Norms:
    """How long the rows are. Rows hardly ever trained stay short, or as long as chance made them."""
    lengths = np.concatenate([np.linalg.norm(rows, axis=1) for _, rows in chunks(backend)])
    order = np.argsort(lengths, kind="stable")
    counts, edges = np.histogram(lengths, bins)

    def described(ids: NDArray[np.int64]) -> tuple[Neighbour, ...]:
        return tuple(
            Neighbour(id, visible(backend.piece(id)), backend.kind(id), 1.0, float(lengths[id])) for id in ids.tolist()
        )

    return Norms(
        rows=len(lengths),
        width=backend.info.n_embd,
        mean=float(lengths.mean()),
        quantiles=_quantiles(lengths),
        shortest=described(order[:count]),
        longest=described(order[::-1][:count]),
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
    )


# ── texts ──


def sentences(backend: Backend, texts: Sequence[str], how: Pooling | None = None) -> Sentences:
    """One vector for each text: pooled as `how` or as the model says (else the mean), and their cosines.

    Raises LlmkitError for empty texts and too many of them, what `Backend.pool` raises.
    """
    cut = [_encoded(backend, text) for text in _texts(texts)]
    vectors = np.stack([backend.pool(ids, how) for ids in cut])
    return Sentences(
        model=backend.info.name,
        how=how or backend.info.pooling or "mean",
        texts=tuple(texts),
        tokens=tuple(map(len, cut)),
        vectors=_tuples(vectors),
        similarity=_tuples(cosines(vectors)),
        warning=WEAK if backend.info.pooling is None else None,
    )


def by_layer(backend: Backend, texts: Sequence[str]) -> tuple[LayerSimilarity, ...]:
    """The hidden states of `texts` after every layer, as cosines of their means over the tokens after the first.

    The first token's vector grows out of all proportion in most models (see layers.py), so it counts only where it is
    the only one. Raises LlmkitError for empty and too long texts, Unsupported where layers do not show their outputs.
    """
    cut = [_encoded(backend, text) for text in _texts(texts)]
    wanted = range(-1, backend.info.n_layer)
    means: list[list[Floats]] = []
    with layers.inspecting(backend, max(map(len, cut))) as session:
        for ids in cut:
            layers.require(backend, ids, layers.MOST_TOKENS, "hidden states")
            session.rewind(0)
            hidden = session.eval(ids, logits="none", layers=wanted).hidden
            means.append([hidden[layer][1 if len(ids) > 1 else 0 :].mean(axis=0) for layer in wanted])
    stacks = (np.stack([each[index] for each in means]) for index in range(len(wanted)))
    return tuple(LayerSimilarity(layer, _tuples(cosines(each))) for layer, each in zip(wanted, stacks, strict=True))


def _encoded(backend: Backend, text: str) -> list[int]:
    return backend.encode(text, special=False, bos=True)


def _texts(texts: Sequence[str]) -> Sequence[str]:
    if not texts or any(not text.strip() for text in texts):
        raise LlmkitError("a text is empty: it has no vector", "Give texts of one word or more.")
    if len(texts) > MOST_TEXTS:
        raise LlmkitError(f"{len(texts)} texts: expected at most {MOST_TEXTS}", "Give fewer of them.")
    return texts


def cosines(vectors: Floats) -> Floats:
    """The cosine of each two rows: [n, d] → [n, n]."""
    directions = unit(vectors)
    found: Floats = np.clip(directions @ directions.T, -1, 1)
    return found


def unit(vectors: Floats) -> Floats:
    """Rows of length 1 (zero rows stay zero)."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    directions: Floats = vectors / np.maximum(lengths, np.float32(_LEAST))
    return directions


# ── pictures ──


def vocabulary_map(backend: Backend, groups: Sequence[Sequence[int]]) -> Scatter:
    """Tokens in the plane that shows most of how they differ; each group is drawn with a mark of its own."""
    ids = list(dict.fromkeys(id for group in groups for id in group))
    number = {id: index for index, group in reversed(list(enumerate(groups))) for id in group}
    labels = [visible(backend.piece(id)) for id in ids]
    return scatter(unit(backend.embed(ids)), labels, [number[id] for id in ids])


def text_map(found: Sentences) -> Scatter:
    """Texts in the plane that shows most of how their vectors differ."""
    return scatter(unit(np.array(found.vectors, np.float32)), [_short(text) for text in found.texts])


def _short(text: str, width: int = 32) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def scatter(vectors: Floats, labels: Sequence[str], groups: Sequence[int] = ()) -> Scatter:
    """The two principal components of the rows of `vectors` [n, d], by singular values (numpy).

    Raises LlmkitError for fewer than three rows.
    """
    if len(vectors) < 3:
        raise LlmkitError(f"{len(vectors)} vectors are too few for a picture: expected three or more")
    centred = (vectors - vectors.mean(axis=0)).astype(np.float64)
    left, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])  # else left and right are chance
    places = left * sizes * signs
    energy = sizes**2
    shares = energy / max(float(energy.sum()), _LEAST)
    points = tuple(
        Point(label, float(place[0]), float(place[1]), groups[index] if groups else 0)
        for index, (label, place) in enumerate(zip(labels, places, strict=True))
    )
    return Scatter(points, (float(shares[0]), float(shares[1])))


# ── the same model in another file ──


def shift(backend: Backend, other: Backend, texts: Sequence[str] = (), *, count: int = 10) -> Shift:
    """How far the rows of `other` are from those of `backend`, and the vectors of `texts`.

    Raises Unsupported when the two are not one model: vocabularies or widths differ.
    """
    _require_alike(backend, other)
    near, errors = [], []
    for start, rows in chunks(backend):
        theirs = other.embed(range(start, start + len(rows)))
        near.append(np.einsum("ij,ij->i", unit(rows), unit(theirs)))
        errors.append(_relative(rows, theirs))
    cosine, error = np.concatenate(near), np.concatenate(errors)
    worst = np.argsort(-error, kind="stable")[:count]
    return Shift(
        model=backend.info.name,
        other=other.info.name,
        rows=len(error),
        mean_cosine=float(cosine.mean()),
        mean_error=float(error.mean()),
        quantiles=_quantiles(error),
        worst=tuple(
            RowShift(id, visible(backend.piece(id)), float(cosine[id]), float(error[id])) for id in worst.tolist()
        ),
        texts=tuple(_text_shift(backend, other, text) for text in (_texts(texts) if texts else ())),
    )


def _text_shift(backend: Backend, other: Backend, text: str) -> TextShift:
    ours = backend.pool(_encoded(backend, text))[None]
    theirs = other.pool(_encoded(other, text))[None]
    return TextShift(text, float((unit(ours) * unit(theirs)).sum()), float(_relative(ours, theirs)[0]))


def _require_alike(backend: Backend, other: Backend) -> None:
    mine, theirs = backend.info, other.info
    shapes = [f"{info.n_vocab:,} × {info.n_embd}" for info in (mine, theirs)]
    if shapes[0] != shapes[1]:
        raise Unsupported(f"the tables differ: {mine.name} has {shapes[0]}, {theirs.name} {shapes[1]}")
    for id in range(0, mine.n_vocab, max(1, mine.n_vocab // 256)):
        if backend.piece(id) != other.piece(id):
            ours, others = visible(backend.piece(id)), visible(other.piece(id))
            raise Unsupported(
                f"the vocabularies differ: token {id} is {ours} in {mine.name}, {others} in {theirs.name}"
            )


def _relative(rows: Floats, others: Floats) -> Floats:
    lengths = np.maximum(np.linalg.norm(rows, axis=1), np.float32(_LEAST))
    found: Floats = np.linalg.norm(rows - others, axis=1) / lengths
    return found


def _quantiles(values: Floats) -> dict[str, float]:
    shares = (0, 1, 25, 50, 75, 99, 100)
    return {f"{share} %": float(value) for share, value in zip(shares, np.percentile(values, shares), strict=True)}


def _tuples(rows: Floats) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in rows.tolist())
