"""Autoregressive layers: each feature moves by parameters that a masked net makes of the features before it."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dtypes import widen
from ...engine import SideNames, tuple_of
from ...module import InvertibleModule, modules_behind
from ...protocol import Like, moved, seen, undone
from .._checks import check_choice, check_dims, check_features, check_like, check_positive_int, refuse
from ..elementwise import check_real
from ..maps.affine import Affine, Shift
from ..maps.base import Map, register_functions
from ..maps.spline import RationalQuadratic
from .made import MADE

__all__ = ["MaskedAutoregressive"]

_MAPS: dict[str, Map] = {"affine": Affine(), "shift": Shift(), "spline": RationalQuadratic(gain=0.1)}
_ORDERS: dict[str, Callable[[int], Tensor]] = {
    "input": torch.arange,
    "reversed": lambda n: torch.arange(n).flip(0),
    "random": torch.randperm,
}


class MaskedAutoregressive(InvertibleModule):
    r"""Move each feature by a map whose parameters are functions of the features before it: ``y_i = map(x_i; h_i)``.

    .. math:: h_i = \mathrm{net}_i(x_1, \dots, x_{i - 1}), \qquad x_i = \mathrm{map}^{-1}(y_i; h_i)

    All h come from one evaluation of a masked net (MADE), and the log-determinant is the sum of the map's log-slopes.
    The inverse takes a step for each feature: it costs about one evaluation, but one that cannot run in parallel. This
    is a masked autoregressive flow (MAF); its ``.inv``, fast where this one is slow, is an inverse autoregressive flow
    (IAF). Either keeps its input in mode ``invert``, so that training does not depend on the precision of the slow
    direction. The layer starts as the identity.

    ========= =============================================================================================
    map       y
    ========= =============================================================================================
    "affine"  exp(s) x + t with the bounded s of :class:`AffineCoupling`
    "shift"   x + t, which keeps volumes
    "spline"  that of :class:`RationalQuadraticCoupling`, with 8 bins in [-3, 3]
    a ``Map`` what it says: one of :mod:`invzoo.layers.maps`, such as ``Affine("softclip", max_log_scale=1.0)``, or
              ``RationalQuadratic(tails=None)`` of :mod:`invzoo.layers.maps.spline` for data between bounds
    ========= =============================================================================================

    Shapes: x and y (B, ..., features); context (B, context_features), or as many dims as x, which broadcast to x's.

    Args:
        features: size of the last dim.
        hidden: sizes of the net's hidden layers, one at least.
        map: how a feature moves by its parameters, as in the table.
        order: in which features see each other: ``'input'``, ``'reversed'``, or ``'random'``, which is drawn when the
            layer is made, and saved in `state_dict`.
        context_features: size of the last dim of the side input ``context``, which every hidden layer then sees.
        activation: of the net, a function of each value.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, options, shapes or devices do not fit, and for values outside the map's domain.
        TypeError: for values that are not real floating point or not of the layer's dtype, and if there are
            ``context_features`` and no context or the other way round.

    References:
        "Masked Autoregressive Flow for Density Estimation", Papamakarios, Pavlakou and Murray, 2017.
        "Improving Variational Inference with Inverse Autoregressive Flow", Kingma, Salimans, Jozefowicz, Chen,
        Sutskever and Welling, 2016.

    Example:
        >>> layer = iz.MaskedAutoregressive(3, context_features=2)
        >>> x, context = torch.randn(4, 3), torch.randn(4, 2)
        >>> y, log_det = layer.forward_and_log_det(x, context=context)
        >>> torch.allclose(layer.inverse(y, context=context), x, atol=1e-5), log_det.shape
        (True, torch.Size([4]))
    """

    slow_inverse = True
    domain = codomain = property(lambda self: self.map.domain)

    features: int
    context_features: int | None
    permutation: Tensor

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64),
        *,
        map: Map | str = "affine",  # noqa: A002 - the field's word
        order: str = "input",
        context_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._check_arguments(features, hidden, map, order, context_features, activation)
        self.map = map if isinstance(map, Map) else _MAPS[map]
        self.map_functions = register_functions(self, self.map)
        self.map.check(self)
        self.volume_preserving = self.map.volume_preserving  # type: ignore[misc]
        self.features, self.order, self.context_features = features, order, context_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.net = MADE(features, self.map.parameters, hidden, context_features, activation, **factory)
        self.register_buffer("permutation", torch.empty(features, dtype=torch.long, device=device))
        self._reset_order()

    def _check_arguments(
        self, features: int, hidden: Sequence[int], map_: Any, order: str, context_features: int | None, activation: Any
    ) -> None:
        check_positive_int(self, "features", features)
        if not isinstance(hidden, Sequence) or not hidden:
            refuse(self, "hidden", "be a sequence of one size or more", repr(hidden))
        for size in hidden:
            check_positive_int(self, "hidden", size)
        if context_features is not None:
            check_positive_int(self, "context_features", context_features)
        if not isinstance(map_, Map):
            check_choice(self, "map", map_, [*_MAPS])
        elif isinstance(map_, Affine) and map_.centred:
            refuse(self, "map", "move each value alone", map_)
        check_choice(self, "order", order, [*_ORDERS])
        if not callable(activation):
            refuse(self, "activation", "be a function", type(activation).__name__, TypeError)

    def reset_parameters(self) -> None:
        """Start anew, with another order if that is random."""
        self.net.reset_parameters()
        self._reset_order()

    def given(self, like: Like, *, context: Any = None) -> tuple[Tensor | None]:
        if self.context_features is None:
            return (None,)
        check_real(self, "context", context)
        check_like(self, "context", context, self._parameter(context))
        return (self._aligned(context, like.shape[:-1]),)

    def seen(self, x: Tensor, context: Tensor | None) -> tuple[Any, ...]:
        """Return x in the layer's order, and what its map gets there."""
        x = x.index_select(-1, self.permutation)
        h = tuple_of(self.map.parts(self.net(x, context), x, -1))
        return x, h, seen(self.map, x, *h)

    def move(self, x: Tensor, context: Tensor | None, ordered: Tensor, h: Any, s: Any) -> Tensor:
        y = moved(self.map, ordered, *h, s=s)[0]
        return self._restored(y.to(x.dtype))

    def log_slope(self, x: Tensor, context: Tensor | None, ordered: Tensor, h: Any, s: Any) -> Tensor:
        return self.map.log_slope(widen(ordered) if self.map.widens else ordered, *h, *s)

    def undo_at(self, x: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        return self.undo(y, context, x)

    def undo(self, y: Tensor, context: Tensor | None, known: Tensor | None = None) -> Tensor:
        found = None if known is None else iter(known.index_select(-1, self.permutation).split(1, -1))

        def inverse(value: Tensor, h: Tensor, dim: int) -> Tensor:
            x = None if found is None else next(found)
            return undone(self.map, value, *tuple_of(self.map.parts(h, value, dim)), known=x)[0]

        return self._restored(self.net.solve(y.index_select(-1, self.permutation), inverse, context))

    def _roots(self) -> tuple[nn.Module, ...]:
        return (*super()._roots(), *modules_behind(self, self.net.activation, *self.map_functions))

    def side_names(self) -> SideNames:
        return SideNames(frozenset(() if self.context_features is None else ("context",)), any=False)

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_real(self, argument, x)
        self.map.check_value(self, argument, x)
        check_like(self, argument, x, self._parameter(x))
        check_dims(self, argument, x, range(2, sys.maxsize), "(batch, ..., features)")
        check_features(self, argument, x, -1, self.features)

    def _parameter(self, otherwise: Any) -> Tensor:
        return next(self.net.parameters(), otherwise)  # what takes a layer's place may have none

    def _aligned(self, context: Tensor, shape: torch.Size) -> Tensor:
        """View a context so that it broadcasts to positions of ``shape``."""
        if context.ndim == 2:
            context = context.view(len(context), *[1] * (len(shape) - 1), context.shape[1])
        fits = all(m in (1, n) for m, n in zip(context.shape, shape, strict=False))
        if context.ndim != len(shape) + 1 or not fits or context.shape[-1] != self.context_features:
            expected = f"have shape {(shape[0], self.context_features)}, or one for {(*shape, self.context_features)}"
            refuse(self, "context", expected, f"shape {tuple(context.shape)}")
        return context

    def _restored(self, y: Tensor) -> Tensor:
        return y.index_select(-1, self.permutation.argsort())

    def _reset_order(self) -> None:
        self.permutation.copy_(_ORDERS[self.order](self.features))

    def extra_repr(self) -> str:
        context = "" if self.context_features is None else f", context_features={self.context_features}"
        return f"{self.features}, map={self.map}, order={self.order!r}{context}"
