"""Blocks: chains of a few layers that go by one name in the literature."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .containers import Chain, Parallel, set_options
from .errors import refuse
from .layers._checks import check_positive_int
from .layers.activations.activation import Identity
from .layers.conditioned import Conditioner
from .layers.couplings.couplings import AffineCoupling
from .layers.linear.linear import InvertibleConv1x1, InvertibleLinear
from .layers.normalisation.act_norm import ActNorm
from .layers.rearrangements.split import Partition
from .layers.rearrangements.squeeze import Squeeze, sizes_of

__all__ = ["GlowStep", "HINTCoupling", "InvertiblePatchConv"]


class GlowStep(Chain):
    r"""Standardise the features, mix them, and move one half by the other: ActNorm, a matrix, an affine coupling.

    .. math:: y = \mathrm{coupling}(W \, \mathrm{actnorm}(x) + b)

    The log-determinant is the sum of the layers'. ``act_norm`` is set by the first training batch, in either direction.

    Shapes: with ``dim=1``, images (B, features, ...) with one to three dims of pixels, mixed by
    :class:`InvertibleConv1x1`; with ``dim=-1``, vectors and sequences (B, ..., features), mixed by
    :class:`InvertibleLinear`. The subnet maps the second half (the smaller one, if ``features`` is odd) to twice the
    size of the first in ``dim``.

    Args:
        features: size of ``dim``.
        f: the coupling's subnet, a module or a function; it gets the side inputs as keyword arguments.
        kind: of the matrix: ``'householder'``, ``'cayley'``, ``'scaled'``, ``'plu'`` or ``'free'``.
        dim: 1 or -1; 1 by default, but to be given for one tensor of three dims.
        scale, max_log_scale: of the coupling, as for :class:`AffineCoupling`.
        zero_init: set the last weighted module of ``f`` to zero, as the paper does, so that the step starts linear.
        subnet_dtype: what the subnet's input is cast to, while its value is cast back: with ``f`` alone in bfloat16,
            norm, matrix and streams stay in float32. None: it comes as it is.
        device: of the parameters of norm and matrix.
        dtype: likewise, and without autocast that of x and y.
        options: those of :class:`InvertibleModule`. Modes and checks are those of the layers.

    Raises:
        ValueError: for another ``dim``, and as its layers do.
        TypeError: as its layers do.

    Reference:
        "Glow: Generative Flow with Invertible 1x1 Convolutions", Kingma and Dhariwal, 2018.

    Example:
        >>> step = iz.GlowStep(4, nn.Conv2d(2, 4, 3, padding=1))
        >>> x = torch.randn(2, 4, 8, 8)
        >>> torch.allclose(step.inverse(step(x)), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        features: int,
        f: Callable[..., Tensor],
        *,
        kind: str = "householder",
        dim: int | None = None,
        scale: str = "tanh",
        max_log_scale: float = 2.0,
        zero_init: bool = True,
        subnet_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if dim not in (None, 1, -1):
            refuse(self, "dim", "be 1 or -1", repr(dim))
        mix = InvertibleLinear if dim == -1 else InvertibleConv1x1
        self.act_norm = ActNorm(features, dim=dim, device=device, dtype=dtype)
        self.mix = mix(features, kind=kind, device=device, dtype=dtype)
        settings: dict[str, Any] = {"scale": scale, "max_log_scale": max_log_scale, "zero_init": zero_init}
        self.coupling = AffineCoupling(f, dim=dim, subnet_dtype=subnet_dtype, **settings)
        set_options(self, options)


class HINTCoupling(Chain):
    r"""Move the second half by the first, then each half in the same way: a coupling with a triangular Jacobian.

    .. math:: y = h(x), \qquad h(x_1, x_2) = (h_1(x_1), \; h_2(e^{s(x_1)} x_2 + t(x_1)))

    An :class:`AffineCoupling` leaves half of the features as they are; here all of them but the first ones move, and
    with full depth each one depends on all before it. The log-determinant is the sum over all couplings.

    Shapes: as for :class:`AffineCoupling`, of one tensor.

    Args:
        features: size of ``dim``, 2 or more.
        subnet: ``subnet(inputs, outputs)`` makes a module or a function from ``inputs`` features in ``dim`` to
            ``outputs``; it gets the side inputs as keyword arguments.
        depth: how often the features are halved, at most; as often as there are two of them if None.
        dim: the dimension that is split; 1 by default, but to be given for one tensor of three dims.
        scale, max_log_scale: as for :class:`AffineCoupling`.
        zero_init: set the last weighted module of each subnet to zero, so that the layer starts as the identity.
        subnet_dtype: what the subnets' inputs are cast to, as for :class:`GlowStep`.
        options: those of :class:`InvertibleModule`. Modes and checks are those of the layers.

    Raises:
        ValueError: for fewer than 2 features, a ``depth`` below 1, and as :class:`AffineCoupling` does.
        TypeError: for a ``subnet`` that cannot be called, and as :class:`AffineCoupling` does.

    Reference:
        "HINT: Hierarchical Invertible Neural Transport for Density Estimation and Bayesian Inference", Kruse,
        Detommaso, Köthe and Scheichl, 2019.

    Example:
        >>> layer = iz.HINTCoupling(8, lambda n, m: nn.Sequential(nn.Linear(n, 16), nn.Tanh(), nn.Linear(16, m)))
        >>> x = torch.randn(3, 8)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        features: int,
        subnet: Callable[[int, int], Callable[..., Tensor]],
        *,
        depth: int | None = None,
        dim: int | None = None,
        scale: str = "tanh",
        max_log_scale: float = 2.0,
        zero_init: bool = True,
        subnet_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._check_arguments(features, subnet, depth)
        settings: dict[str, Any] = {"scale": scale, "max_log_scale": max_log_scale, "zero_init": zero_init}
        settings |= {"dim": dim, "subnet_dtype": subnet_dtype}
        sizes = Partition("half").sizes(features)
        self.coupling = AffineCoupling(subnet(sizes[0], 2 * sizes[1]), split=sizes, swap=True, **settings)
        if features > 2 and depth != 1:
            settings["depth"] = None if depth is None else depth - 1
            halves = (HINTCoupling(n, subnet, **settings) if n > 1 else Identity() for n in sizes)
            self.halves = Parallel(*halves, dim=dim, sizes=sizes)
        set_options(self, options)

    def _check_arguments(self, features: int, subnet: Any, depth: int | None) -> None:
        check_positive_int(self, "features", features)
        if features < 2:
            refuse(self, "features", "be at least 2", features)
        if not callable(subnet):
            refuse(self, "subnet", "be a function of two sizes", type(subnet).__name__, TypeError)
        if depth is not None:
            check_positive_int(self, "depth", depth)


class InvertiblePatchConv(Chain):
    """Multiplies each patch of pixels, of all channels, by a learned matrix that stays invertible: y = W x + b.

    A convolution whose stride is its kernel's size, as at the entrance of a vision transformer: a :class:`Squeeze`,
    which makes channels of patches, and an :class:`InvertibleConv1x1`, which has the same kinds of W. With more
    out_channels than entries of a patch it is injective, has no log-determinant, and its inverse maps to the nearest
    patch.

    Shapes: x (B, channels, h p, w q), y (B, out_channels, h, w) with kernel_size (p, q); likewise one or three dims of
    pixels.

    Args:
        channels: size of dim 1 of x.
        out_channels: size of dim 1 of y, at least channels p q; that if None.
        kernel_size: the size of a patch, one number for each dim of pixels; an int is meant for both dims of an image.
        bias: whether b is learned; zero otherwise.
        kind, reflections, max_log_scale, conditioner: of the matrix, as for :class:`InvertibleConv1x1`.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`. Modes and checks are those of the layers.

    Raises:
        ValueError: if sizes or options do not fit, and as its layers do.
        TypeError: as its layers do.

    Example:
        >>> layer = iz.InvertiblePatchConv(3, 64, 4)
        >>> x = torch.randn(1, 3, 8, 8)
        >>> layer(x).shape, torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        (torch.Size([1, 64, 2, 2]), True)
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        kernel_size: int | Sequence[int] = 2,
        *,
        bias: bool = True,
        kind: str = "householder",
        reflections: int | None = None,
        max_log_scale: float | None = None,
        conditioner: Conditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_positive_int(self, "channels", channels)
        sizes = sizes_of(self, "kernel_size", kernel_size)
        settings: dict[str, Any] = {"reflections": reflections, "max_log_scale": max_log_scale}
        settings |= {"conditioner": conditioner, "device": device, "dtype": dtype}
        self.squeeze = Squeeze(sizes)
        self.mix = InvertibleConv1x1(channels * math.prod(sizes), out_channels, bias, kind=kind, **settings)
        self.channels, self.out_channels, self.kernel_size = channels, self.mix.out_channels, sizes
        set_options(self, options)

    @property
    def weight(self) -> Tensor:
        """W, of shape ``(out_channels, channels, *kernel_size)``, that of a convolution, in at least float32."""
        return self.mix.weight.unflatten(1, (self.channels, *self.kernel_size))
