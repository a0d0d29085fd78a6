"""Residual blocks whose branch is a contraction: inverted by iteration, with a power series as log-determinant."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...dtypes import full_precision
from ...engine import uncompiled
from ...log_dets import log_det_dtype, sum_per_sample, zero_log_det
from ...protocol import Moving
from .._checks import check_choice, check_positive, check_positive_int
from ..elementwise import check_real
from .branch import BranchLayer
from .fixed_point import Limits, Map, differentiable, fixed_point, vjp

__all__ = ["InvertibleResidual"]

_ESTIMATORS = ("exact", "series", "roulette")
_EXACT_LIMIT = 32  # values per sample up to which the exact log-determinant is the default


def series_coefficients(terms: int, certain: int, keep: float) -> list[float]:
    """The factors of tr(J^k), k = 1 ... terms, in log det(I + J), over the probability that term k is there at all.

    That is 1 up to ``certain`` and decays by ``keep`` from term to term after it.
    """
    return [-((-1) ** k) / k / keep ** max(0, k - certain) for k in range(1, terms + 1)]


class InvertibleResidual(BranchLayer):
    r"""Add a contraction to the input: ``y = x + f(x)`` where f has a Lipschitz constant below 1.

    The inverse iterates ``x = y - f(x)``, with Anderson acceleration, until no value moves by more than ``tolerance``
    times the sample's largest one. It is slow, so mode ``invert`` keeps the input, unless ``solve=True``. Derivatives
    of the inverse solve a linear equation instead of passing through the iteration; two of them are given.

    .. math:: \log\det(I + J) = \sum_{k \ge 1} \frac{(-1)^{k + 1}}{k} \operatorname{tr} J^k, \quad J = df / dx

    ============ ============================================================ =============
    log_det      how                                                          error
    ============ ============================================================ =============
    "exact"      the determinant of I + J, J by as many products as values    none
    "series"     ``terms`` terms, traces by :math:`e^\top J^k e`, e = +-1     noise, bias
    "roulette"   ``terms`` terms, and each further one with probability       noise
                 1 - stop, divided by the probability that it is there
    ============ ============================================================ =============

    The noise comes from torch's generators: seeded, the same again. Its variance is finite for a Lipschitz constant
    below the root of 1 - stop. All are computed at x, in both directions, and have derivatives of every order that f
    has. What makes f a contraction is the caller's business: :func:`lipschitz` does for many nets. f sees each sample
    alone and is the same at each call: no batch normalisation, no dropout. `torch.compile` compiles the map alone and
    leaves the inverse and the log-determinant as they are.

    Shapes: ``(B, ...) -> (B, ...)``.

    Args:
        f: a module or a function that keeps the shape; it gets the side inputs as keyword arguments. Under autocast it
            runs in full precision.
        log_det: how the log-determinant is computed, as in the table. If None, "exact" for at most 32 values per
            sample, "roulette" for more.
        terms: number of terms that are always there; if None, 10 for "series" and 4 for "roulette".
        stop: probability that "roulette" ends before the next term.
        tolerance: relative change at which the inverse stops; if None, 8 roundings of the dtype, 2 of a half.
        max_iterations: steps after which it gives up.
        solve: whether mode ``invert`` frees the input and iterates in backward.
        options: those of :class:`InvertibleModule`.

    Raises:
        RuntimeError: if the inverse, or the equation for its gradient, does not come to rest; in its third derivative.
        ValueError: for bad options, or an f that changes the shape.
        TypeError: for an f that cannot be called, or an input that is not real floating point.

    References:
        "Invertible Residual Networks", Behrmann, Grathwohl, Chen, Duvenaud and Jacobsen, 2019.
        "Residual Flows for Invertible Generative Modeling", Chen, Behrmann, Duvenaud and Jacobsen, 2019 ("roulette").

    Example:
        >>> f = iz.lipschitz(nn.Sequential(nn.Linear(4, 16), nn.ELU(), nn.Linear(16, 4)))
        >>> layer = iz.InvertibleResidual(f)
        >>> x = torch.randn(3, 4)
        >>> y, log_det = layer.forward_and_log_det(x)
        >>> torch.allclose(layer.inverse(y), x, atol=1e-5), log_det.shape
        (True, torch.Size([3]))
    """

    def __init__(
        self,
        f: Callable[..., Tensor],
        *,
        log_det: str | None = None,
        terms: int | None = None,
        stop: float = 0.25,
        tolerance: float | None = None,
        max_iterations: int = 1000,
        solve: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(f, **options)
        check_choice(self, "log_det", log_det, (None, *_ESTIMATORS))
        for name, number in (("terms", terms), ("max_iterations", max_iterations)):
            if number is not None:
                check_positive_int(self, name, number)
        check_positive(self, "stop", stop, below=1)
        if tolerance is not None:
            check_positive(self, "tolerance", tolerance)
        self.estimator, self.terms, self.stop = log_det, terms, stop
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.slow_inverse = not solve  # type: ignore[misc]

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_real(self, argument, x)

    def given(self, like: Moving, /, **side: Any) -> tuple[Map, bool]:
        return partial(self.evaluate, side=side), like.log_det

    def seen(self, x: Tensor, f: Map, log_det: bool) -> tuple[Tensor, Tensor]:
        """Return f(x), and where it was evaluated; with a graph between them, if the log-determinant is asked for."""
        with full_precision(x):
            return self._recorded(x, f) if log_det else (x, f(x))

    @uncompiled
    def _recorded(self, x: Tensor, f: Map) -> tuple[Tensor, Tensor]:
        recording = torch.is_grad_enabled()
        with torch.enable_grad():  # at a point of its own, since a derivative by x itself would call its hooks
            point = x.view_as(x) if recording and x.requires_grad else x.detach().requires_grad_()
            return point, f(point)

    def move(self, x: Tensor, f: Map, log_det: bool, point: Tensor, h: Tensor) -> Tensor:
        return x + (h if torch.is_grad_enabled() else h.detach())

    @uncompiled
    def undo(self, y: Tensor, f: Map, log_det: bool) -> Tensor:
        with full_precision(y):
            x = fixed_point(lambda x: y - f(x), y, self._limits(y))
        return self.undo_at(x, y, f, log_det)

    @uncompiled
    def undo_at(self, x: Tensor, y: Tensor, f: Map, log_det: bool) -> Tensor:
        with full_precision(y):
            return differentiable(lambda x: y - f(x), x, self._limits(y)) if torch.is_grad_enabled() else x

    @uncompiled
    def log_slope(self, x: Tensor, f: Map, log_det: bool, point: Tensor, h: Tensor) -> Tensor:
        recording = torch.is_grad_enabled()
        with full_precision(x), torch.enable_grad():
            value = self._log_det(point, h, create_graph=recording)
        return value if recording else value.detach()

    def _limits(self, y: Tensor) -> Limits:
        return Limits(self._name(), self.tolerance_for(y.dtype), self.max_iterations)

    def tolerance_for(self, dtype: torch.dtype) -> float:
        """Return the relative change at which the inverse of a tensor of ``dtype`` stops."""
        eps = torch.finfo(dtype).eps
        return self.tolerance or (8 if eps < 1e-6 else 2) * eps

    def _log_det(self, x: Tensor, h: Tensor, *, create_graph: bool) -> Tensor:
        def product(v: Tensor) -> Tensor:
            return vjp(h, x, v, create_graph=create_graph)

        zero = zero_log_det(self, (x,))
        if not h.requires_grad or h.numel() == 0:
            return zero
        size = x.shape[1:].numel()
        estimator = self.estimator or ("exact" if size <= _EXACT_LIMIT else "roulette")
        return zero + (exact_log_det(product, h) if estimator == "exact" else self._estimate(estimator, product, h))

    def _estimate(self, estimator: str, product: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        terms = certain = self.terms or (4 if estimator == "roulette" else 10)
        if estimator == "roulette":
            terms += int(math.log1p(-torch.rand((), dtype=torch.float64).item()) / math.log1p(-self.stop))
        noise = torch.empty_like(h.detach()).bernoulli_() * 2 - 1
        return power_series(product, noise, series_coefficients(terms, certain, 1 - self.stop))

    def extra_repr(self) -> str:
        estimator = {} if self.estimator is None else {"log_det": self.estimator, "terms": self.terms}
        options = {**estimator, "solve": not self.slow_inverse or None, "tolerance": self.tolerance}
        return ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)


def exact_log_det(product: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """Compute log abs det(I + J) per sample, from the products v^T J."""
    eye = torch.eye(h.shape[1:].numel(), dtype=h.dtype, device=h.device)
    rows = [product(e.view(h.shape[1:]).expand_as(h)).reshape(len(h), -1) for e in eye]
    dtype = log_det_dtype(h)
    return torch.linalg.slogdet(torch.stack(rows, 1).to(dtype) + eye.to(dtype)).logabsdet


def power_series(product: Callable[[Tensor], Tensor], noise: Tensor, coefficients: list[float]) -> Tensor:
    """Sum up c_k e^T J^k e per sample, from the products v^T J and the noise e."""
    v, terms = noise, []
    for coefficient in coefficients:
        v = product(v)
        terms.append(coefficient * sum_per_sample("InvertibleResidual", v * noise))
    return torch.stack(terms).sum(0)
