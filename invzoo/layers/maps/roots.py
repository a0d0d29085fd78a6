"""Roots of increasing functions, value by value: Newton's method in a bracket, with gradients of the implicit function.

"Numerical Recipes", Press, Teukolsky, Vetterling and Flannery, 2007, safeguards Newton's method the same way.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...engine import unrecorded
from ..elementwise import readable

__all__ = ["bracket", "newton", "with_gradients"]

Function = Callable[[Tensor], Tensor]


@unrecorded
def bracket(curve: Function, y: Tensor, least: float, most: float, doublings: int = 40) -> tuple[Tensor, Tensor]:
    """Find bounds in [least, most] on the roots of ``curve(x) = y``; NaN where there is none within 2^doublings."""
    y = y.detach()
    width = torch.ones_like(y)
    for _ in range(doublings):
        low, high = (-width).clamp(least, most), width.clamp(least, most)
        missing = ((curve(low) > y) | (curve(high) < y)) & y.isfinite()
        if readable(y) and not missing.any():
            break
        width = torch.where(missing, 2 * width, width)
    return low.masked_fill(missing, torch.nan), high


@unrecorded
def newton(
    curve: Function, slope: Function, y: Tensor, low: Tensor, high: Tensor, guess: Tensor, steps: int = 60
) -> Tensor:
    """Solve ``curve(x) = y`` for x in [low, high], to the precision of the dtype.

    Where Newton's method leaves the bracket or does not at least halve its step, the bracket is halved instead. A value
    that has settled stays, so that no value depends on how long others take. A guess at infinity is one.
    """
    y, settled = y.detach(), ~(y.isfinite() & guess.isfinite())
    eps = torch.finfo(y.dtype).eps
    x, last = guess, high - low
    for _ in range(steps):
        residual = curve(x) - y
        settled = settled | (residual == 0)
        low, high = torch.where(residual < 0, x, low), torch.where(residual > 0, x, high)
        step = residual / slope(x)
        fast = (x - step >= low) & (x - step <= high) & (step.abs() <= last / 2)
        following = torch.where(fast, x - step, low + (high - low) / 2)
        x, last = torch.where(settled, x, following), (following - x).abs()
        settled = settled | (last <= 2 * eps * x.abs())
        if readable(x) and settled.all():
            break
    return x


@unrecorded
def _constant(function: Function, x: Tensor) -> Tensor:
    return function(x)


def with_gradients(curve: Function, slope: Function, y: Tensor, root: Tensor) -> Tensor:
    """Give a root, found without gradients, the first two derivatives that it has by ``curve(x) = y``.

    Each step with the slope held constant changes the value by no more than rounding, and makes one more derivative
    right: with e the error of x as a function of y and of the curve's parameters, e becomes e (1 - curve'(x) / slope),
    whose second factor is 0 at the root. A root at infinity stays there.
    """
    root = root.detach()
    fixed = _constant(slope, root)
    infinite = root.isinf()
    x = root.masked_fill(infinite, 0)
    for _ in range(2):
        residual = curve(x) - y
        x = x - residual.masked_fill(infinite | residual.isinf(), 0) / fixed  # it overflows close to the largest number
    return x.where(~infinite, root)
