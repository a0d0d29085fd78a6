"""Residual blocks."""

from typing import Any

import torch
from torch import Tensor, nn

import invzoo as iz

from ..entries import Case, Entry
from .nets import Conditioned, subnet, with_context

__all__ = ["RESIDUAL"]


class _Contraction(nn.Module):
    """A subnet with a Lipschitz constant below 0.8, whatever its weights."""

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(features + context, features)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = x if context is None else torch.cat((x, context), 1)
        return 0.8 * torch.tanh(self.linear(h)) / (1 + self.linear.weight.square().sum())


def _estimated(estimator: str, *shape: int, **options: Any) -> Case:
    without = dict.fromkeys(
        ("assert_log_det", "assert_dtypes", "assert_batch_sizes", "assert_trainable"),
        "the log-determinant is an estimate, with noise",
    )
    make = lambda: iz.InvertibleResidual(_Contraction(3), log_det=estimator, terms=3, **options)  # noqa: E731
    return Case(make, shape, id=estimator, without=without)


RESIDUAL: tuple[Entry, ...] = (
    Entry(
        iz.InvertibleResidual,
        "y = x + f(x), f a contraction",
        "sum over k of -(-1)^k / k tr J^k, J = df / dx",
        Case(lambda: iz.InvertibleResidual(_Contraction(3)), (3,)),
        _estimated("series", 2, 3),
        _estimated("roulette", 3),
        Case(lambda: iz.InvertibleResidual(_Contraction(3), solve=True), (3,), id="solve"),
        with_context(3, lambda: iz.InvertibleResidual(_Contraction(2, 3)), (2,)),
        cost="about 10 runs",
    ),
    Entry(
        iz.Leapfrog,
        "(x_prev, x) -> (x, 2 x - x_prev + h^2 f(x))",
        "0",
        Case(lambda: iz.Leapfrog(subnet(3, 3), 0.5), (3,), (3,)),
        with_context(3, lambda: iz.Leapfrog(Conditioned(2, 3, 2)), (2,), (2,)),
    ),
    Entry(
        iz.MomentumResidual,
        "v' = gamma v + (1 - gamma) f(x), x' = x + v'",
        "log gamma times the size of x",
        Case(lambda: iz.MomentumResidual(subnet(3, 3)), (3,), (3,)),
        with_context(3, lambda: iz.MomentumResidual(Conditioned(2, 3, 2), 0.5), (2,), (2,)),
    ),
)
