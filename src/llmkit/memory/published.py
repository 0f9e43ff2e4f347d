"""Published quality of quants, looked up: a hint until the file at hand has been measured itself.

Mean KL divergence (nats) against F16 on the Wikitext-2 test set, Llama 3 8B, from llama.cpp's
tools/perplexity/README.md ("LLaMA 3 8b Scoreboard", revision f364eb6f). Other models differ: smaller ones lose more.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "llama.cpp's scoreboard, Llama 3 8B on Wikitext-2"


@dataclass(frozen=True)
class Hint:
    """Mean KL divergence in nats; whether the file was made with an importance matrix; the word for it."""

    divergence: float
    imatrix: bool = False

    @property
    def word(self) -> str:
        """A verdict, with the thresholds of quantpicker: 0.01 near lossless, 0.1 good, 0.3 noticeable."""
        rows = ((0.01, "near lossless"), (0.1, "good"), (0.3, "noticeable loss"), (1.0, "heavy loss"))
        return next((word for limit, word in rows if self.divergence < limit), "broken")


HINTS = {
    "F16": Hint(0.000551),
    "Q8_0": Hint(0.001355),
    "Q6_K": Hint(0.005452),
    "Q5_K_M": Hint(0.010762),
    "Q5_K_S": Hint(0.016595),
    "Q5_1": Hint(0.018045),
    "Q5_0": Hint(0.022239),
    "Q4_K_M": Hint(0.031273),
    "Q4_K_S": Hint(0.043136),
    "IQ4_NL": Hint(0.035742, imatrix=True),
    "IQ4_XS": Hint(0.036334, imatrix=True),
    "Q4_1": Hint(0.071683),
    "Q4_0": Hint(0.071940),
    "Q3_K_L": Hint(0.087176),
    "Q3_K_M": Hint(0.101913),
    "Q3_K_S": Hint(0.228217),
    "IQ3_M": Hint(0.102534, imatrix=True),
    "IQ3_S": Hint(0.111278, imatrix=True),
    "IQ3_XS": Hint(0.138693, imatrix=True),
    "IQ3_XXS": Hint(0.183625, imatrix=True),
    "IQ2_M": Hint(0.325989, imatrix=True),
    "IQ2_S": Hint(0.439197, imatrix=True),
    "Q2_K": Hint(0.445132),
    "Q2_K_S": Hint(0.403360, imatrix=True),
    "IQ2_XS": Hint(0.546290, imatrix=True),
    "IQ2_XXS": Hint(0.812022, imatrix=True),
    "IQ1_M": Hint(1.393084, imatrix=True),
    "IQ1_S": Hint(2.211278, imatrix=True),
}


def hint(label: str) -> Hint | None:
    """What is published about `label`; the full-precision types are lossless by definition."""
    if label in ("F32", "BF16"):
        return Hint(0.0)
    return HINTS.get(label)
