"""Maps of each value alone whose parameters are weights, or functions of a condition."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import SideNames, Tape
from ..log_dets import sum_per_sample
from ..module import InvertibleModule
from ._checks import check_features, check_like, check_positive, check_positive_int, refuse
from .elementwise import check_real
from .maps import Affine, Map
from .matrix import bounded, widen

__all__ = ["ConditionalAffine", "ElementwiseAffine", "ElementwiseMap", "per_feature"]

Conditioner = Callable[..., Tensor]


def per_feature(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """View one value per feature so that it broadcasts to ``x``, whose features are in ``dim``."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return values.view(shape)


class ElementwiseMap(InvertibleModule):
    """``x -> map(x)`` with parameters of the map that the layer finds without looking at values of x. Abstract.

    A subclass says what they are; they, and a conditioner behind them, are evaluated once in a call and once in its
    replay.
    """

    map: Map
    dim: int
    conditioner: Conditioner | None

    def __init__(self, map: Map, dim: int, conditioner: Conditioner | None, **options: Any) -> None:  # noqa: A002
        super().__init__(**options)
        map.check(self)
        if not (conditioner is None or callable(conditioner)):
            refuse(self, "conditioner", "be a module or a function", type(conditioner).__name__, TypeError)
        self.map, self.dim, self.conditioner = map, dim, conditioner

    @abstractmethod
    def map_parameters(self, x: Tensor, context: Any = None) -> Tensor:
        """Return the parameters stacked along ``dim``; their other dims are those of ``x``, or broadcast to them."""

    def function(self, x: Tensor, context: Any = None) -> Tensor:
        return self.map.forward(x, self.map_parameters(x, context), self.dim)

    def inverse(self, y: Tensor, context: Any = None) -> Tensor:
        return self.map.inverse(y, self.map_parameters(y, context), self.dim)

    def log_det(self, x: Tensor, context: Any = None) -> Tensor:
        return self._log_det(x, self.map_parameters(x, context))

    def function_and_log_det(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        return self._map_and_log_det(x, self.map_parameters(x, context))

    def replay(self, tape: Tape, *outputs: Tensor, **side: Any) -> None:
        """Evaluate the parameters once for both directions."""
        tape.run(self.map.forward, *self._rebuild(tape, *outputs, **side), self.dim)

    def side_names(self) -> SideNames:
        return SideNames(frozenset({"context"} if self.conditioner is not None else ()), any=False)

    def conditions(self, x: Tensor, context: Any) -> Tensor:
        """Return what the conditioner makes of the context, in the dims of ``x`` and in at least float32."""
        if context is None:
            refuse(self, "context", "be what the conditioner takes", None, TypeError)
        h = self.conditioner(context)  # type: ignore[misc]  # there is one
        shape = [*x.shape]
        shape[self.dim] *= self.map.parameters
        if not isinstance(h, Tensor):
            refuse(self, "conditioner", "return a Tensor", type(h).__name__, TypeError)
        aligned = _aligned(h, x.ndim, self.dim)
        if not _broadcasts(aligned, shape, self.dim):
            shapes = dict.fromkeys(((shape[0], shape[self.dim]), tuple(shape)))
            refuse(self, "conditioner", f"return shape {' or '.join(map(str, shapes))}", tuple(h.shape))
        return aligned.to(torch.promote_types(x.dtype, torch.float32))

    def _log_det(self, x: Tensor, h: Tensor) -> Tensor:
        return sum_per_sample(self, self.map.log_slope(x, h, self.dim))

    def _map_and_log_det(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope = self.map.forward_and_log_slope(x, h, self.dim)
        return y, sum_per_sample(self, log_slope)

    def _rebuild(self, tape: Tape, y: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        h = tape.run(self.map_parameters, y, context)
        return tape.input(0, self.map.inverse(y, h, self.dim)), h

    def replay_with_log_det(self, tape: Tape, *outputs: Tensor, **side: Any) -> None:
        tape.run(self._map_and_log_det, *self._rebuild(tape, *outputs, **side))


def _aligned(h: Tensor, ndim: int, dim: int) -> Tensor:
    """View (B, features) as a tensor of ``ndim`` dims that has its features in ``dim``."""
    if h.ndim != 2 or ndim < 2:
        return h
    shape = [len(h), *[1] * (ndim - 1)]
    shape[dim] = h.shape[1]
    return h.reshape(shape)


def _broadcasts(h: Tensor, shape: list[int], dim: int) -> bool:
    """Whether ``h`` broadcasts to ``shape``, and has the very size of it in ``dim``."""
    return (
        h.ndim == len(shape)
        and h.shape[dim] == shape[dim]
        and all(m in (1, n) for m, n in zip(h.shape, shape, strict=True))
    )


class ElementwiseAffine(ElementwiseMap):
    r"""Scale and shift each feature: ``y = e^s x + b``, with ``s = a tanh(r / a)`` below ``a = max_log_scale``.

    The inverse is ``x = (y - b) e^{-s}``; the log-determinant is the sum of ``s`` over the features, times the number
    of pixels (of positions in all dims but the batch's and the features'). With a conditioner, ``r`` and ``b`` are the
    layer's own plus its two blocks, so one that returns zeros changes nothing.

    Shapes: ``(B, ...) -> (B, ...)`` with ``features`` in ``dim``. The conditioner returns ``(B, 2 * features)``, or the
    shape of x with twice the features in ``dim``, or one that broadcasts to it: the block of ``r``, then that of ``b``.

    Args:
        features: size of ``dim``.
        dim: the dimension that has a scale and a shift for each entry.
        bias: whether the layer has a ``b`` of its own.
        max_log_scale: the bound ``a``, in nats.
        conditioner: a module or a function of the side input ``context``, or None.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, shapes or devices do not fit.
        TypeError: for values that are not real floating point, and if there is a conditioner without a context.

    Example:
        >>> layer = iz.ElementwiseAffine(3, conditioner=nn.Linear(2, 6))
        >>> x, context = torch.randn(4, 3, 5), torch.randn(4, 2)
        >>> y = layer(x, context=context)
        >>> torch.allclose(layer.inverse(y, context=context), x, atol=1e-5)
        True
    """

    features: int
    max_log_scale: float
    log_scale: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        *,
        dim: int = 1,
        bias: bool = True,
        max_log_scale: float = 2.0,
        conditioner: Conditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(Affine("exp"), dim, conditioner, **options)
        check_positive_int(self, "features", features)
        check_positive(self, "max_log_scale", max_log_scale)
        self.features, self.max_log_scale = features, max_log_scale
        self.log_scale = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def map_parameters(self, x: Tensor, context: Any = None) -> Tensor:
        check_real(self, "input", x)
        check_like(self, "input", x, self.log_scale)
        check_features(self, "input", x, self.dim, self.features)
        shift = torch.zeros_like(self.log_scale) if self.bias is None else self.bias
        h = per_feature(widen(torch.cat((self.log_scale, shift))), x, self.dim)
        if self.conditioner is None:
            self.side_names().check(self, {} if context is None else {"context": context})
        else:
            h = h + self.conditions(x, context)
        raw, shift = h.chunk(2, self.dim)
        return torch.cat((bounded(raw, self.max_log_scale), shift), self.dim)

    def extra_repr(self) -> str:
        return f"{self.features}, dim={self.dim}, bias={self.bias is not None}, max_log_scale={self.max_log_scale}"


class ConditionalAffine(ElementwiseMap):
    r"""Scale and shift by functions of a condition alone: ``y = e^{s(c)} x + t(c)``.

    The inverse is ``x = (y - t) e^{-s}``; the log-determinant is the sum of ``s``. Behind a normalisation without
    parameters this is conditional, or spatially adaptive, normalisation.

    Shapes: ``(B, ...) -> (B, ...)``. With F features in ``dim``, the conditioner returns ``(B, 2 F)``, or the shape of
    x with 2 F features, or one that broadcasts to it: the argument of the log-scale, then the shift.

    Args:
        conditioner: a module or a function of the side input ``context``.
        dim: the dimension along which the conditioner stacks its blocks.
        scale, max_log_scale: as for :class:`AffineCoupling`.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: for another ``scale``, or a conditioner that returns another shape.
        TypeError: for values that are not real floating point, or if there is no context.

    Reference:
        Semantic Image Synthesis with Spatially-Adaptive Normalization, Park, Liu, Wang and Zhu, 2019.

    Example:
        >>> layer = iz.ConditionalAffine(nn.Linear(2, 6))
        >>> x, context = torch.randn(4, 3), torch.randn(4, 2)
        >>> torch.allclose(layer.inverse(layer(x, context=context), context=context), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        conditioner: Conditioner,
        *,
        dim: int = 1,
        scale: str = "tanh",
        max_log_scale: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(Affine(scale, max_log_scale), dim, conditioner, **options)
        if conditioner is None:
            refuse(self, "conditioner", "be a module or a function", None, TypeError)

    def map_parameters(self, x: Tensor, context: Any = None) -> Tensor:
        check_real(self, "input", x)
        if not -x.ndim <= self.dim < x.ndim:
            refuse(self, "input", f"have a dim {self.dim}", f"shape {tuple(x.shape)}")
        return self.conditions(x, context)

    def extra_repr(self) -> str:
        return f"{self.map}, dim={self.dim}"
