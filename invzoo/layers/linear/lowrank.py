"""A diagonal matrix plus one of low rank, multiplied, inverted and measured at the cost of the low rank."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...dtypes import bounded, computed, full_precision, widen
from ...log_dets import for_each_sample
from ...module import InvertibleModule
from ...protocol import Like
from .._checks import (
    check_features,
    check_floating,
    check_like,
    check_positive,
    check_positive_int,
    given_dim,
    parameter_of,
    refuse,
)
from .orthogonal import identity

__all__ = ["WoodburyLinear"]

_LARGEST = 100.0  # singular value before it is squashed: the Cholesky factor stays good in float32


def squash(a: Tensor, bound: float) -> Tensor:
    """Bound the singular values of A: ``bound * sigma / sqrt(1 + sigma^2)``, by a Cholesky factor of I + A^H A."""
    a = a / (1 + a.abs().square().sum() / _LARGEST**2).sqrt()
    gram = a.mH @ a
    lower = torch.linalg.cholesky(gram + identity(gram, len(gram)))
    return bound * torch.linalg.solve_triangular(lower.mH, a, upper=True, left=False)


def capacitance(a: Tensor, b: Tensor) -> Tensor:
    """I + B^H A, as small as the rank."""
    gram = b.mH @ a
    return gram + identity(gram, len(gram))


def multiply(x: Tensor, root: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """R (I + A B^H) R x over the last dim, with R = diag(root)."""
    z = root * x
    return root * (z + (z @ b.conj()) @ a.mT)


class WoodburyLinear(InvertibleModule):
    """Multiplies one dim by a diagonal matrix plus one of low rank: y = (D + U V^H) x + b.

    .. math:: x = D^{-1} z - D^{-1} U (I + V^H D^{-1} U)^{-1} V^H D^{-1} z, z = y - b

    D = diag(e^s) with bounded s, U = D^(1/2) A and V = D^(1/2) B, where the norms of A and B are at most
    sqrt(``max_norm``). So V^H D^-1 U = B^H A has a norm of at most ``max_norm`` < 1: the matrix stays invertible, and
    its condition number is at most e^(2 max_log_scale) (1 + max_norm) / (1 - max_norm). It starts as the identity. A
    product takes O(features rank) a position.

    The log-determinant is sum s + log det(I + V^H D^-1 U), by the matrix determinant lemma, times the number of
    positions; for complex dtypes that of the real map, 2 log abs det.

    Shapes: x and y (..., features, ...) with features in ``dim``. A log-determinant needs a batch dim before it.

    Args:
        features: size of ``dim``.
        rank: number of columns of U and V, at most ``features``; 1 unless said.
        bias: whether b is learned; zero otherwise.
        dim: the dim that is multiplied.
        max_log_scale: bound on abs(s) in nats.
        max_norm: bound on the spectral norm of V^H D^-1 U, below 1.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, bounds, shapes or devices do not fit.
        TypeError: if an input is no floating point or complex tensor, or not of the layer's dtype.

    Reference:
        "Woodbury Transformations for Deep Generative Flows", Lu and Huang, 2020.

    Example:
        >>> layer = iz.WoodburyLinear(8, 2)
        >>> x = torch.randn(5, 8)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
    """

    features: int
    rank: int
    dim: int
    max_log_scale: float
    max_norm: float
    log_scale: nn.Parameter
    left: nn.Parameter
    right: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        rank: int = 1,
        *,
        bias: bool = True,
        dim: int = -1,
        max_log_scale: float = 1.0,
        max_norm: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_positive_int(self, "features", features)
        check_positive_int(self, "rank", rank)
        check_positive(self, "max_log_scale", max_log_scale)
        check_positive(self, "max_norm", max_norm)
        if rank > features:
            refuse(self, "rank", f"be at most features={features}", rank)
        if max_norm >= 1:
            refuse(self, "max_norm", "be below 1", max_norm)
        self.features, self.rank, self.dim = features, rank, given_dim(self, dim)
        self.max_log_scale, self.max_norm = max_log_scale, max_norm
        self.left = nn.Parameter(torch.empty(features, rank, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(features, rank, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(features, device=device, dtype=self.left.dtype.to_real()))
        self.bias = nn.Parameter(torch.empty(features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.left)  # one of the two, so that the other gives it a gradient
        nn.init.normal_(self.right, std=self.features**-0.5)
        nn.init.zeros_(self.log_scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def weight(self) -> Tensor:
        """D + U V^H, of shape (features, features), in at least float32."""
        with full_precision(self.left):
            s, a, b = self._factors()
            return multiply(identity(a, self.features), (s / 2).exp(), a, b).mT

    def given(self, like: Like) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with full_precision(like):
            s, a, b = self._factors()
        return s, a, b, a.new_zeros(self.features) if self.bias is None else widen(self.bias)

    def move(self, x: Tensor, s: Tensor, a: Tensor, b: Tensor, shift: Tensor) -> Tensor:
        return self._along(lambda x: multiply(x, (s / 2).exp(), a, b) + shift, x)

    def undo(self, y: Tensor, s: Tensor, a: Tensor, b: Tensor, shift: Tensor) -> Tensor:
        def back(y: Tensor) -> Tensor:
            solved = torch.linalg.solve(capacitance(a, b), b.mH).mH
            return multiply(y - shift, (-s / 2).exp(), -a, solved)

        return self._along(back, y)

    def log_slope(self, x: Tensor, s: Tensor, a: Tensor, b: Tensor, shift: Tensor) -> Tensor:
        if x.ndim < 2 or self.dim % x.ndim == 0:
            refuse(self, "x", f"have a batch dim before dim {self.dim}, for a log-determinant", tuple(x.shape))
        positions = math.prod(x.shape[1:]) // self.features * (2 if x.is_complex() else 1)
        with full_precision(x):
            return for_each_sample(x, positions * (s.sum() + torch.linalg.slogdet(capacitance(a, b)).logabsdet))

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_floating(self, argument, x)
        check_like(self, argument, x, parameter_of(self, "left"))
        check_features(self, argument, x, self.dim, self.features)

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (squash(widen(p), math.sqrt(self.max_norm)) for p in (self.left, self.right))
        return bounded(widen(self.log_scale), self.max_log_scale), a, b

    def _along(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return computed(function, x.movedim(self.dim, -1), parameter_of(self, "left")).movedim(-1, self.dim)

    def extra_repr(self) -> str:
        return f"features={self.features}, rank={self.rank}, dim={self.dim}, bias={self.bias is not None}"
