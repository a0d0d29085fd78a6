"""Surjections."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

import invzoo as iz

from ...module import InvertibleModule
from ..entries import Case, Entry
from ..inputs import Shape
from .nets import Conditioned

__all__ = ["SURJECTIONS"]


class _Gaussian(Conditioned):
    """A distribution of features that depends on others and on a context."""

    def __init__(self, inputs: int, context: int, outputs: int) -> None:
        super().__init__(inputs, context, 2 * outputs)

    def forward(self, x: Tensor, context: Tensor) -> Any:
        mean, log_scale = super().forward(x, context).chunk(2, 1)
        return Normal(mean, log_scale.tanh().exp())


class _Coin(nn.Linear):
    """A distribution of signs that depends on the sizes."""

    def forward(self, x: Tensor) -> Any:
        return Bernoulli(logits=super().forward(x), validate_args=False)


def _surjection(
    make: Callable[[], InvertibleModule], *shapes: Shape, without: Mapping[str, str] | None = None, **options: Any
) -> Case:
    reasons = {
        "assert_round_trip": "what is lost one way is drawn the other way",
        "assert_log_det": "it is a term of a bound, not of a Jacobian",
        "assert_dtypes": "two runs draw two values",
        "assert_trainable": "it asserts a round trip",
    }
    return Case(make, *shapes, independent_samples=False, without={**reasons, **(without or {})}, **options)


SURJECTIONS: tuple[Entry, ...] = (
    Entry(
        iz.Slice,
        "(x1, x2) -> x1, and back with x2 drawn given x1",
        "log p(x2 | x1)",
        _surjection(lambda: iz.Slice(2), (4,)),
        _surjection(lambda: iz.Slice(1, -1), (2, 3), id="last"),
        _surjection(lambda: iz.Slice(2, distribution=_Gaussian(2, 3, 2)), (4,), id="context", side={"context": (3,)}),
    ),
    Entry(
        iz.Augment,
        "x -> (x, e) with e drawn given x",
        "-log q(e | x)",
        _surjection(lambda: iz.Augment(2), (3,)),
        _surjection(lambda: iz.Augment(2, distribution=_Gaussian(2, 3, 2)), (2,), id="context", side={"context": (3,)}),
    ),
    Entry(
        iz.Abs,
        "abs(x), and back with signs drawn",
        "log p(sign | y)",
        _surjection(iz.Abs, (4,)),
        _surjection(lambda: iz.Abs(distribution=_Coin(4, 4)), (4,), id="net"),
    ),
    Entry(
        iz.Dequantize,
        "(x + u) / levels with u drawn in [0, 1), and back by floor",
        "-n log(levels) - log q(u | x)",
        _surjection(
            lambda: iz.Dequantize(8, dtype=torch.float64),
            (4,),
            draw=lambda shape, generator: torch.randint(8, shape, generator=generator).double(),
            without=dict.fromkeys(
                ("assert_gradients", "assert_modes_agree", "assert_batch_sizes"), "floor has no gradient"
            ),
        ),
    ),
)
