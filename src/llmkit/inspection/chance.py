"""How likely chance alone is: the chi-square distribution, in the standard library's functions."""

from __future__ import annotations

from math import exp, inf, lgamma, log

_MOST_TERMS = 100_000
_CLOSE = 1e-15


def chi_square_p(statistic: float, degrees: int) -> float:
    """Probability that chi-square with `degrees` of freedom is at least `statistic`; 1 with no freedom at all."""
    if statistic == inf:
        return 0.0
    if degrees <= 0 or statistic <= 0:
        return 1.0
    return upper_gamma(degrees / 2, statistic / 2)


def upper_gamma(a: float, x: float) -> float:
    """Q(a, x), the regularized upper incomplete gamma function, for a > 0 and x >= 0.

    The series of P for small x, Legendre's continued fraction else (Numerical Recipes, 6.2; DLMF 8.7.1 and 8.9.2).
    """
    if x <= 0:
        return 1.0
    scale = exp(a * log(x) - x - lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        for n in range(1, _MOST_TERMS):
            term *= x / (a + n)
            total += term
            if term < total * _CLOSE:
                break
        return 1 - scale * total
    return scale * _fraction(a, x)


def _fraction(a: float, x: float) -> float:
    """1/(x+1-a- 1(1-a)/(x+3-a- 2(2-a)/(x+5-a- …))), by Lentz's method."""
    tiny = 1e-300
    b = x + 1 - a
    c, d = 1 / tiny, 1 / b
    found = d
    for n in range(1, _MOST_TERMS):
        numerator = -n * (n - a)
        b += 2
        d = 1 / (numerator * d + b or tiny)
        c = b + numerator / c or tiny
        found *= c * d
        if abs(c * d - 1) < _CLOSE:
            break
    return found
