"""A comparison of two models as one page."""

from __future__ import annotations

from . import page as html
from .compare import Comparison, Passage, Predicted

_NAMES = {"prompt": "The prompt", "a": "A's continuation", "b": "B's continuation"}


def page(comparison: Comparison) -> str:
    """The whole page: figures, each passage with its tokens, the layers."""
    a, b = comparison.a, comparison.b
    body = [
        html.table(
            ("", "A (reference)", "B"),
            [
                ("name", a.name, b.name),
                ("weights", f"{a.weight_nbytes:,} bytes", f"{b.weight_nbytes:,} bytes"),
                ("engine", a.engine, b.engine),
            ],
        ),
        html.paragraph(
            "Measured on raw probabilities, before any sampler. KL(A‖B) = Σ p_A · ln(p_A / p_B): 0 where both say the"
            " same. A token's ground is coloured by exp(-KL); it is underlined where the two find different ones most"
            " likely.",
            "quiet",
        ),
        html.table(
            ("text read", "tokens", "mean KL nats", "bits", "largest nats", "same top-1", "perplexity A", "B"),
            [_figures(each) for each in comparison.passages if each.tokens],
            "lrrrrrrr",
        ),
    ]
    for passage in comparison.passages:
        if passage.tokens:
            body += [html.heading(_NAMES[passage.name]), html.tokens(map(_token, passage.tokens)), _list(passage)]
    if comparison.parts_at is None:
        body.append(html.paragraph("Both go on alike."))
    else:
        body.append(html.paragraph(f"The continuations part at token {comparison.parts_at + 1}."))
    if comparison.layers:
        rows = [
            ("embeddings" if each.layer < 0 else each.layer, f"{each.relative_error:.3%}", f"{each.added:+.3%}",
             f"{each.cosine:.6f}")
            for each in comparison.layers
        ]  # fmt: skip
        body += [html.heading("Layers"), html.table(("layer", "|A-B| / |A|", "new here", "cosine"), rows, "lrrr")]
    body += [html.paragraph(f"Note: {note}", "quiet") for note in comparison.notes]
    return html.page(f"{a.name} against {b.name}", body)


def _figures(passage: Passage) -> tuple[object, ...]:
    numbers = (passage.mean_kl_nats, passage.mean_kl_bits, passage.max_kl_nats)
    return (
        _NAMES[passage.name], len(passage.tokens), *(f"{number:.5f}" for number in numbers),
        f"{passage.agreement:.1%}", f"{passage.perplexity_a:.3f}", f"{passage.perplexity_b:.3f}",
    )  # fmt: skip


def _token(each: Predicted) -> str:
    from math import exp

    text = each.piece.replace("␣", " ").replace("↵", "↵\n").replace("⇥", "\t")
    return html.token(text, exp(-each.kl_nats), _words(each), flip=not each.agree)


def _words(each: Predicted) -> str:
    return (
        f"KL {each.kl_nats:.4f} nats; this token: {each.probability_a:.2%} in A, {each.probability_b:.2%} in B;"
        f" most likely: {each.best_a.piece} {each.best_a.probability:.1%} in A,"
        f" {each.best_b.piece} {each.best_b.probability:.1%} in B"
    )


def _list(passage: Passage) -> str:
    rows = [
        (each.position, each.piece, f"{each.kl_nats:.5f}", f"{each.kl_bits:.5f}", f"{each.probability_a:.2%}",
         f"{each.probability_b:.2%}", f"{each.best_a.piece} {each.best_a.probability:.1%}",
         f"{each.best_b.piece} {each.best_b.probability:.1%}")
        for each in passage.tokens
    ]  # fmt: skip
    headers = ("position", "token", "KL nats", "bits", "p in A", "p in B", "A's best", "B's best")
    return html.details("token by token", html.table(headers, rows, "rlrrrrll"))
