"""Surjections: layers that lose something in one direction and draw it in the other.

They follow "SurVAE Flows: Surjections to Bridge the Gap between VAEs and Flows", Nielsen, Jaini, Hoogeboom, Winther
and Welling, 2020.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Normal, constraints

from ...dtypes import widen
from ...engine import SideNames
from ...log_dets import sum_per_sample
from ...module import InvertibleModule
from ...protocol import Like
from .._checks import check_dim, check_positive_int, given_dim, refuse
from ..elementwise import check_real

__all__ = ["Abs", "Augment", "Noise", "Slice", "Surjection", "fair_coin", "standard_normal", "zero_and_one"]

Noise = Callable[..., Distribution]


def standard_normal(x: Tensor) -> Distribution:
    """Features that do not depend on the others."""
    return Normal(*zero_and_one(x), validate_args=False)


def fair_coin(x: Tensor) -> Distribution:
    """Signs that do not depend on the size."""
    return Bernoulli(logits=zero_and_one(x)[0], validate_args=False)


def zero_and_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return these scalars, in at least float32, where ``x`` is."""
    zero = widen(x).new_zeros(())
    return zero, zero + 1


class Surjection(InvertibleModule):
    """A map that loses something one way and draws it the other way, from a distribution given what is left. Abstract.

    In place of the log-determinant stands a term of a bound on the likelihood: the log-density of what is lost, or
    minus that of what is drawn. With it ``log p(x) >= E[log p(y) + log_det]``, and equal where the function loses. The
    inverse has minus the term, at the values at hand.

    Draws are from torch's global generators, and a replay in backward draws the same again. Nothing rebuilds what is
    lost, so that mode ``invert`` keeps the input.

    A subclass writes :meth:`lose`, :meth:`join` and, if need be, :meth:`lost_shape` and :meth:`log_prob`.

    Args:
        distribution: a module or a function; it gets what is left, and the side inputs as keyword arguments, and
            returns the `torch.distributions.Distribution` of what is lost. Gradients go through draws with `rsample`.
        options: those of :class:`InvertibleModule`.
    """

    bijective = False
    draws: ClassVar[bool]  # whether the function is the way that draws
    saturating = True

    def __init__(self, distribution: Noise, **options: Any) -> None:
        super().__init__(**options)
        if not callable(distribution):
            expected = "be a module or a function that returns a Distribution"
            refuse(self, "distribution", expected, type(distribution).__name__, TypeError)
        self.distribution = distribution

    def lose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is left of ``x``, and what is lost."""
        raise NotImplementedError

    def lost_shape(self, left: Tensor) -> tuple[int, ...]:
        """Return the shape of what was lost beside ``left``."""
        return tuple(left.shape)

    def join(self, left: Tensor, lost: Tensor) -> Tensor:
        """Undo :meth:`lose`."""
        raise NotImplementedError

    def log_prob(self, noise: Distribution, lost: Tensor) -> Tensor:
        """Compute the log-density of the whole given what is left, per sample."""
        values = noise.log_prob(widen(lost)) if lost.numel() else lost  # Independent refuses an empty batch
        return sum_per_sample(self, values)

    def given(self, like: Like, /, **side: Any) -> dict[str, Any]:
        return side

    def seen(self, x: Tensor, side: dict[str, Any]) -> tuple[Any, ...]:
        """Return y, what is lost and, where that is drawn, the distribution."""
        return self._draw(x, side) if self.draws else (*self.lose(x), None)

    def move(self, x: Tensor, side: dict[str, Any], y: Tensor, *_: Any) -> Tensor:
        return y

    def undo(self, y: Tensor, side: dict[str, Any]) -> tuple[Any, ...]:
        x, *lost = (*self.lose(y), None) if self.draws else self._draw(y, side)
        return x, y, *lost

    def log_slope(self, x: Tensor, side: dict[str, Any], y: Tensor, lost: Tensor, noise: Distribution | None) -> Tensor:
        if noise is None:
            noise = self._noise(x if self.draws else y, tuple(lost.shape), side)
        log_prob = self.log_prob(noise, lost)
        return -log_prob if self.draws else log_prob

    def _draw(self, left: Tensor, side: dict[str, Any]) -> tuple[Tensor, Tensor, Distribution]:
        noise = self._noise(left, self.lost_shape(left), side)
        lost = noise.rsample() if noise.has_rsample else noise.sample()
        return self.join(left, lost), lost, noise

    def _noise(self, left: Tensor, shape: tuple[int, ...], side: dict[str, Any]) -> Distribution:
        """Return the distribution of what is lost, in this shape."""
        noise = self.distribution(left if left.is_floating_point() else left.to(torch.get_default_dtype()), **side)
        if not isinstance(noise, Distribution):
            refuse(self, "distribution", "return a Distribution", type(noise).__name__, TypeError)
        batch = shape[: len(shape) - len(noise.event_shape)]
        try:
            fits = batch and torch.broadcast_shapes(batch, noise.batch_shape) + noise.event_shape == shape
        except RuntimeError:
            fits = False
        if not fits:
            got = f"batch shape {tuple(noise.batch_shape)} and event shape {tuple(noise.event_shape)}"
            refuse(self, "distribution", f"return one of values of shape {shape}", got)
        return noise if noise.batch_shape == batch else noise.expand(torch.Size(batch))

    def side_names(self) -> SideNames:
        return SideNames.of(self.distribution)


class _Features(Surjection):
    """Features that are lost or drawn. Abstract."""

    def __init__(
        self, features: int, dim: int | None = None, *, distribution: Noise = standard_normal, **options: Any
    ) -> None:
        super().__init__(distribution, **options)
        check_positive_int(self, "features", features)
        self.features, self.dim = features, given_dim(self, dim)

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_real(self, argument, x)
        at_least = 0 if self.draws == (argument == "x") else self.features
        check_dim(self, argument, x, self.dim, at_least, inner=True)

    def lose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, lost = x.split((x.shape[self.dim] - self.features, self.features), self.dim)
        return left, lost

    def lost_shape(self, left: Tensor) -> tuple[int, ...]:
        dim = self.dim % left.ndim
        return (*left.shape[:dim], self.features, *left.shape[dim + 1 :])

    def join(self, left: Tensor, lost: Tensor) -> Tensor:
        return torch.cat((left, lost.to(left.dtype)), self.dim)

    def extra_repr(self) -> str:
        return f"{self.features}, dim={self.dim}"


class Slice(_Features):
    """Drop the last features, ``(x1, x2) -> x1``; the inverse draws them: ``x2 ~ p(x2 | x1)``.

    The log-likelihood term is ``log p(x2 | x1)``, and the likelihood exact.

    Shapes: ``(B, ..., n, ...) -> (B, ..., n - features, ...)``.

    Args:
        features: how many are dropped.
        dim: the dimension, which may be negative, but not the batch's; 1 by default, but to be given for one tensor of
            three dims.
        distribution: gives p(x2 | x1), as in :class:`Surjection`; standard normal by default.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input without ``dim`` or with fewer features in it, or a distribution of other shapes.
        TypeError: for values that are not real floating point, or a distribution that is none.

    Reference:
        "SurVAE Flows", Nielsen, Jaini, Hoogeboom, Winther and Welling, 2020.

    Example:
        >>> y, log_det = iz.Slice(1).forward_and_log_det(torch.tensor([[1., 2., 0.]]))
        >>> y, log_det
        (tensor([[1., 2.]]), tensor([-0.9189]))
    """

    draws = False


class Augment(_Features):
    """Draw more features, ``x -> (x, e)`` with ``e ~ q(e | x)``; the inverse drops them.

    The log-likelihood term is ``-log q(e | x)``, of one draw.

    Shapes: ``(B, ..., n, ...) -> (B, ..., n + features, ...)``.

    Args:
        features: how many are drawn.
        dim: the dimension, which may be negative, but not the batch's; 1 by default, but to be given for one tensor of
            three dims.
        distribution: gives q(e | x), as in :class:`Surjection`; standard normal by default.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for an input without ``dim``, or a distribution of other shapes.
        TypeError: for values that are not real floating point, or a distribution that is none.

    Reference:
        "SurVAE Flows", Nielsen, Jaini, Hoogeboom, Winther and Welling, 2020.

    Example:
        >>> layer = iz.Augment(2)
        >>> y, log_det = layer.forward_and_log_det(torch.ones(5, 3))
        >>> y.shape, torch.allclose(log_det, -torch.distributions.Normal(0, 1).log_prob(y[:, 3:]).sum(1))
        (torch.Size([5, 5]), True)
    """

    draws = True


class Abs(Surjection):
    """Drop the signs, ``x -> |x|``; the inverse draws them. That of 0 counts as minus.

    The log-likelihood term is ``log p(sign | y)``, which is ``-n log(2)`` for fair signs, and the likelihood exact.

    Shapes: ``(B, ...) -> (B, ...)``.

    Args:
        distribution: gives p(sign | y), of 1 and 0 for plus and minus, as in :class:`Surjection`; fair by default.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for a distribution of other shapes.
        TypeError: for values that are not real floating point, or a distribution that is none.

    Reference:
        "SurVAE Flows", Nielsen, Jaini, Hoogeboom, Winther and Welling, 2020.

    Example:
        >>> iz.Abs().forward_and_log_det(torch.tensor([[1., -2.]]))
        (tensor([[1., 2.]]), tensor([-1.3863]))
    """

    codomain = constraints.nonnegative
    draws = False

    def __init__(self, *, distribution: Noise = fair_coin, **options: Any) -> None:
        super().__init__(distribution, **options)

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_real(self, argument, x)

    def lose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.abs(), (x > 0).to(x.dtype)

    def join(self, left: Tensor, lost: Tensor) -> Tensor:
        return left * (2 * lost - 1).to(left.dtype)
