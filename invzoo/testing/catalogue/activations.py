"""Activations."""

from torch import nn

import invzoo as iz

from ..entries import Case, Entry
from .nets import with_context

__all__ = ["ACTIVATIONS"]

ACTIVATIONS: tuple[Entry, ...] = (
    Entry(
        iz.InvertibleLeakyReLU,
        "x where x > 0, slope x elsewhere",
        "sum of log slope over x < 0",
        Case(iz.InvertibleLeakyReLU, (3, 4)),
        Case(lambda: iz.InvertibleLeakyReLU(2.0), (5,), id="steep"),
    ),
    Entry(
        iz.InvertiblePReLU,
        "a x where x > 0, b x elsewhere, a and b learned",
        "sum of log a and log b",
        Case(lambda: iz.InvertiblePReLU(3, dim=1), (3, 4)),
        Case(lambda: iz.InvertiblePReLU(4, 2.0, dim=-1), (3, 4), id="last"),
        with_context(2, lambda: iz.InvertiblePReLU(3, dim=1, conditioner=nn.Linear(2, 6)), (3, 2)),
    ),
    Entry(
        iz.SneakyReLU,
        "(x + a (sqrt(1 + x^2) - 1)) / (1 + a)",
        "sum of log((1 + a x / sqrt(1 + x^2)) / (1 + a))",
        Case(iz.SneakyReLU, (3, 4)),
    ),
    Entry(
        iz.InvertibleELU,
        "x where x > 0, alpha (exp(x) - 1) elsewhere",
        "sum of x + log alpha over x < 0",
        Case(iz.InvertibleELU, (3, 4)),
        Case(lambda: iz.InvertibleELU(0.5), (5,), id="alpha"),
    ),
    Entry(
        iz.InvertibleSigmoid,
        "1 / (1 + exp(-x))",
        "-sum(softplus(x) + softplus(-x))",
        Case(iz.InvertibleSigmoid, (3, 4)),
        Case(lambda: iz.InvertibleSigmoid(eps=0.25), (3,), id="eps"),
    ),
    Entry(
        iz.InvertibleLogit,
        "log(x) - log(1 - x)",
        "-sum(log(x) + log(1 - x))",
        Case(iz.InvertibleLogit, (3, 4)),
        Case(lambda: iz.InvertibleLogit(eps=0.25), (3,), id="eps"),
    ),
    Entry(iz.InvertibleTanh, "tanh(x)", "2 sum(log 2 - x - softplus(-2 x))", Case(iz.InvertibleTanh, (3, 4))),
    Entry(iz.InvertibleAtanh, "atanh(x)", "-sum(log(1 + x) + log(1 - x))", Case(iz.InvertibleAtanh, (3, 4))),
    Entry(iz.InvertibleSoftplus, "log(1 + exp(x))", "-sum softplus(-x)", Case(iz.InvertibleSoftplus, (3, 4))),
    Entry(iz.InvertibleExp, "exp(x)", "sum of x", Case(iz.InvertibleExp, (3, 4))),
    Entry(iz.InvertibleLog, "log(x)", "-sum log(x)", Case(iz.InvertibleLog, (3, 4))),
    Entry(
        iz.SinhArcsinh,
        "sinh(exp(t) asinh(x) + s), s and t learned",
        "sum of t + log cosh(exp(t) asinh(x) + s) - log cosh(asinh(x))",
        Case(lambda: iz.SinhArcsinh(3, dim=1), (3, 4)),
        with_context(2, lambda: iz.SinhArcsinh(3, dim=1, conditioner=nn.Linear(2, 6)), (3, 2)),
    ),
    Entry(
        iz.Snake,
        "x + sin(a x)^2 / (2 a), a learned",
        "sum log(1 + sin(2 a x) / 2)",
        Case(lambda: iz.Snake(3, dim=1), (3, 4)),
        with_context(2, lambda: iz.Snake(3, dim=1, conditioner=nn.Linear(2, 3)), (3, 2)),
        cost="about 8 evaluations",
    ),
)
