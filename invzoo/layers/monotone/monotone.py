"""Monotone functions that are inverted numerically: given ones, and integrals of learned positive functions."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ...dtypes import widen
from ...engine import SideNames, functorch_active
from ...module import InvertibleModule
from ...protocol import Like
from .._checks import check_callable, refuse
from ..conditioned import Conditioner
from ..elementwise import check_domain, readable
from ..elementwise_map import PerFeatureMap
from ..maps.integrals import BernsteinIntegral, NetIntegral, SquaresIntegral
from ..maps.roots import bracket, newton, with_gradients

__all__ = ["BernsteinPolynomial", "Monotone", "SumOfSquares", "UnconstrainedMonotonic"]


def _slope(curve: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Differentiate an elementwise function by autograd."""
    if functorch_active():
        return torch.func.grad(lambda v: curve(v).sum())(x)
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        # Of its own, so that this calls no hooks of x.
        point = x.view_as(x) if recording and x.requires_grad else x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(curve(point).sum(), point, create_graph=recording)
    return slope


class Monotone(InvertibleModule):
    """Make any strictly increasing function of each value invertible: ``x -> curve(x)``.

    The inverse brackets the root and solves for it by Newton's method, to the precision of the dtype; its gradients
    are those of the implicit function, the first two of them. The log-determinant comes from autograd's derivative of
    the curve, so that no double backward of it is to be had where the curve has none. The inverse takes many
    evaluations, so mode ``invert`` keeps the input and never inverts.

    Shapes: as the curve's, ``(...) -> (...)``.

    Args:
        curve: a module or function of x and side inputs, by keyword. It must be elementwise, strictly increasing and
            differentiable, which is not checked.
        bounds: the ends of its domain. Where they are infinite, roots are looked for up to 2^40.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for bounds that are not increasing, values outside of them, and the inverse of values that the
            curve does not take. Where values cannot be read (in compiled code and `torch.func` transforms), the
            last give NaN.
        TypeError: for a curve that is not callable, and values that are not real floating point.

    Example:
        >>> layer = iz.Monotone(lambda x: x + x ** 3)
        >>> layer.inverse(torch.tensor([-10., 0., 2.]))
        tensor([-2.,  0.,  1.])
    """

    slow_inverse = True

    curve: Callable[..., Tensor]
    bounds: tuple[float, float]

    def __init__(
        self,
        curve: Callable[..., Tensor],
        bounds: tuple[float, float] = (-math.inf, math.inf),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_callable(self, "curve", curve)
        if not bounds[0] < bounds[1]:
            refuse(self, "bounds", "be increasing", bounds)
        self.curve, self.bounds = curve, bounds
        if bounds != (-math.inf, math.inf):
            self.domain = constraints.interval(*bounds)  # type: ignore[misc]

    def side_names(self) -> SideNames:
        return SideNames.of(self.curve)

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_domain(self, argument, x, self.domain if argument == "x" else self.codomain)

    def given(self, like: Like, /, **side: Any) -> Callable[..., Tensor]:
        return partial(self.curve, **side) if side else self.curve

    def move(self, x: Tensor, curve: Callable[..., Tensor]) -> Tensor:
        return curve(x)

    def undo(self, y: Tensor, curve: Callable[..., Tensor]) -> Tensor:
        low, high = bracket(curve, y, *self.bounds)
        if readable(low) and low.isnan().any():
            refuse(self, "y", "have values that the curve takes", f"{y[low.isnan()][0].item():.8g}")
        return self.undo_at(newton(curve, partial(_slope, curve), y, low, high, low + (high - low) / 2), y, curve)

    def undo_at(self, x: Tensor, y: Tensor, curve: Callable[..., Tensor]) -> Tensor:
        return with_gradients(curve, partial(_slope, curve), y, x)

    def log_slope(self, x: Tensor, curve: Callable[..., Tensor]) -> Tensor:
        return widen(_slope(curve, x)).log()


class UnconstrainedMonotonic(PerFeatureMap):
    """Integrate a positive net: ``x -> c + integral from 0 to x of exp(n(t)) dt``.

    n is a net with one hidden layer, of its own for each feature: ``m tanh(net(t) / m)``, ``net(t) = sum of v tanh(w t
    + b), + d``. Beyond ``tail_bound`` on either side the slope stays what it is there. The quadrature is that of
    Clenshaw and Curtis, its derivative in x that of the integral. A net that bends within less than
    tail_bound / order needs a higher ``order``. At the start it is the identity. The inverse takes many evaluations, so
    mode ``invert`` keeps the input.

    Shapes: x and y (B, features, ...), or with the features in ``dim``.

    Args:
        features: size of dim ``dim``.
        dim: the dim of the features, not the first; 1 by default, but to be given for one tensor of three dims.
        hidden: width of the net.
        order: of the quadrature: order + 1 evaluations of the net.
        tail_bound: where the linear tails begin.
        max_log_slope: m, in nats: slopes are between exp(-m) and exp(m).
        conditioner: a module or function that makes of ``context`` what is added to the layer's own parameters, the
            rows of ``weight``, n in number: (B, n * features), or of the dims of x with that in ``dim``.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an option that is not positive, and if sizes, shapes or devices do not fit.
        TypeError: for values that are not real floating point, or not of the layer's dtype.

    Reference:
        "Unconstrained Monotonic Neural Networks", Wehenkel and Louppe, 2019, with a net of bounded logarithm.

    Example:
        >>> layer, x = iz.UnconstrainedMonotonic(3), torch.randn(2, 3)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
    """

    slow_inverse = True

    def __init__(
        self,
        features: int,
        dim: int | None = None,
        *,
        hidden: int = 8,
        order: int = 32,
        tail_bound: float = 5.0,
        max_log_slope: float = 3.0,
        conditioner: Conditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        curve, factory = NetIntegral(tail_bound, hidden, order, max_log_slope), {"device": device, "dtype": dtype}
        super().__init__(curve, features, dim, conditioner, factory, **options)


class SumOfSquares(PerFeatureMap):
    """Integrate a mean of squares of polynomials: ``x -> c + integral from 0 to x of m + (1 - m) mean(p_k(t)^2) dt``.

    ``p_k(t) = 1 + a_k0 + a_k1 u + a_k2 u^2 + ...`` with ``u = t / tail_bound`` and all abs(a) < 1. Beyond
    ``tail_bound`` on either side the slope stays what it is there: y does not grow like a power of x. The integral is
    exact. At the start it is nearly the identity. The inverse takes many evaluations, so mode ``invert`` keeps the
    input.

    Shapes: x and y (B, features, ...), or with the features in ``dim``.

    Args:
        features: size of dim ``dim``.
        dim: the dim of the features, not the first; 1 by default, but to be given for one tensor of three dims.
        degree: of the polynomials p_k; y is one of degree 2 * degree + 1.
        polynomials: how many.
        tail_bound: where the linear tails begin.
        min_slope: m.
        conditioner: a module or function that makes of ``context`` what is added to the layer's own parameters, the
            rows of ``weight``, n in number: (B, n * features), or of the dims of x with that in ``dim``.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an option that is not positive, and if sizes, shapes or devices do not fit.
        TypeError: for values that are not real floating point, or not of the layer's dtype.

    Reference:
        "Sum-of-Squares Polynomial Flow", Jaini, Selby and Yu, 2019, here with linear tails.

    Example:
        >>> layer, x = iz.SumOfSquares(3), torch.randn(2, 3)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
    """

    slow_inverse = True

    def __init__(
        self,
        features: int,
        dim: int | None = None,
        *,
        degree: int = 3,
        polynomials: int = 2,
        tail_bound: float = 5.0,
        min_slope: float = 1e-2,
        conditioner: Conditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        curve, factory = SquaresIntegral(tail_bound, degree, polynomials, min_slope), {"device": device, "dtype": dtype}
        super().__init__(curve, features, dim, conditioner, factory, **options)


class BernsteinPolynomial(PerFeatureMap):
    """A monotone polynomial in Bernstein's form, linear beyond ``tail_bound`` on either side.

    Its derivative is ``sum of d_k C(n - 1, k) u^k (1 - u)^(n - 1 - k)`` with ``u = (x / tail_bound + 1) / 2`` and
    ``log d_k = m tanh(h_k / m)``: positive coefficients, of which the slope at each x is a mean. With ``y(0) = c``. At
    the start it is the identity. The inverse takes many evaluations, so mode ``invert`` keeps the input.

    Shapes: x and y (B, features, ...), or with the features in ``dim``.

    Args:
        features: size of dim ``dim``.
        dim: the dim of the features, not the first; 1 by default, but to be given for one tensor of three dims.
        degree: n, of y as a polynomial of x.
        tail_bound: where the linear tails begin.
        max_log_slope: m, in nats: slopes are between exp(-m) and exp(m).
        conditioner: a module or function that makes of ``context`` what is added to the layer's own parameters, c and
            the h_k: (B, (n + 1) * features), or of the dims of x with that in ``dim``.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an option that is not positive, and if sizes, shapes or devices do not fit.
        TypeError: for values that are not real floating point, or not of the layer's dtype.

    Reference:
        "Robust normalizing flows using Bernstein-type polynomials", Ramasinghe, Fernando, Khan and Barnes, 2021.

    Example:
        >>> layer, x = iz.BernsteinPolynomial(3), torch.randn(2, 3)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
    """

    slow_inverse = True

    def __init__(
        self,
        features: int,
        dim: int | None = None,
        *,
        degree: int = 8,
        tail_bound: float = 5.0,
        max_log_slope: float = 3.0,
        conditioner: Conditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        curve, factory = BernsteinIntegral(tail_bound, degree, max_log_slope), {"device": device, "dtype": dtype}
        super().__init__(curve, features, dim, conditioner, factory, **options)
