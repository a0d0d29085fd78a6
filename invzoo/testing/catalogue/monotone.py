"""Splines and other monotone functions."""

import torch
from torch import Tensor, nn

import invzoo as iz

from ..entries import Case, Entry
from .nets import with_context

__all__ = ["MONOTONE"]


class _Cubic(nn.Module):
    """An increasing function of each value."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x + self.a.square() * x**3 + (0 if context is None else context)


MONOTONE: tuple[Entry, ...] = (
    # ---- splines ----
    Entry(
        iz.RationalQuadraticSpline,
        "spline(x) for each feature",
        "sum of log slopes",
        Case(lambda: iz.RationalQuadraticSpline(3, dim=1), (3, 2)),
        Case(lambda: iz.RationalQuadraticSpline(3, dim=-1, bins=3, tails="circular"), (2, 3), id="circular"),
        Case(lambda: iz.RationalQuadraticSpline(3, dim=1, bins=3, tails=None), (3, 2), id="no_tails"),
        with_context(2, lambda: iz.RationalQuadraticSpline(3, dim=1, bins=4, conditioner=nn.Linear(2, 33)), (3, 2)),
    ),
    # ---- monotone functions ----
    Entry(
        iz.Monotone,
        "curve(x), any increasing one",
        "sum of log of autograd's derivative",
        Case(lambda: iz.Monotone(_Cubic()), (3, 4)),
        with_context(4, lambda: iz.Monotone(_Cubic()), (4,)),
        Case(lambda: iz.Monotone(torch.logit, (0, 1)), (4,), id="bounds"),
        cost="about 20 evaluations",
    ),
    Entry(
        iz.UnconstrainedMonotonic,
        "c + integral from 0 to x of exp(net(t)) dt",
        "sum of net(x)",
        Case(lambda: iz.UnconstrainedMonotonic(3, dim=1, hidden=3), (3, 2)),
        with_context(2, lambda: iz.UnconstrainedMonotonic(3, dim=1, hidden=2, conditioner=nn.Linear(2, 24)), (3,)),
        cost="about 20 evaluations",
    ),
    Entry(
        iz.SumOfSquares,
        "c + integral from 0 to x of a mean of squared polynomials",
        "sum of log of that mean",
        Case(lambda: iz.SumOfSquares(3, dim=1), (3, 2)),
        with_context(2, lambda: iz.SumOfSquares(3, dim=1, degree=2, conditioner=nn.Linear(2, 21)), (3,)),
        cost="about 20 evaluations",
    ),
    Entry(
        iz.BernsteinPolynomial,
        "an increasing polynomial, linear beyond tail_bound",
        "sum of log of its derivative",
        Case(lambda: iz.BernsteinPolynomial(3, dim=1), (3, 2)),
        with_context(
            2, lambda: iz.BernsteinPolynomial(3, dim=1, degree=3, tail_bound=1.0, conditioner=nn.Linear(2, 12)), (3,)
        ),
        cost="about 20 evaluations",
    ),
)
