"""Layers that multiply the features, or the channels, by a learned matrix that stays invertible."""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..conditioned import Conditioner
from .matrix_layer import MatrixLayer

__all__ = ["InvertibleConv1x1", "InvertibleLinear", "mix_channels"]


def mix_channels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``weight`` x + ``bias`` along dim 1, in the memory format of x; both may be one per sample.

    Not F.conv, whose float32 products are TF32 on CUDA by default, good to 1e-3 only.
    """
    pixels = x.flatten(2)
    # A replay may find other strides of the batch, or of dims of size one: neither may decide.
    channels_last = pixels.shape[1] > 1 and pixels.shape[2] > 1 and pixels.stride(1) == 1
    # The gradient of the batched product holds a matrix per image: more than the images themselves if they are small.
    if weight.ndim == 3:
        y = torch.baddbmm(bias.unsqueeze(-1), weight, pixels)
        y = y.mT.contiguous().mT if channels_last else y
    elif channels_last or pixels.shape[2] < len(weight):
        y = F.linear(pixels.mT.contiguous(), weight, bias).mT
        y = y if channels_last else y.contiguous()
    else:
        y = torch.baddbmm(bias[:, None], weight.expand(len(x), -1, -1), pixels)
    return y.reshape(*y.shape[:2], *x.shape[2:])


class InvertibleLinear(MatrixLayer):
    """Multiplies the last dim by a learned matrix that stays invertible: y = W x + b.

    .. math:: x = W^{-1} (y - b)

    ============= ================================ ============================ ==========================
    kind          W                                condition number             out_features > in_features
    ============= ================================ ============================ ==========================
    "householder" H_1 ... H_k, H = I - 2 v v^H     1                            yes
    "cayley"      (I + A)^-1 (I - A), A skew       1                            yes
    "scaled"      U e^s V^H, U and V householder   at most e^(2 max_log_scale)  yes
    "plu"         P L (U + diag(sigma e^s))        about 1 for small weights    no
    "free"        any                              1 at the start, then any     no
    ============= ================================ ============================ ==========================

    With out_features > in_features the layer is injective, and its inverse the left one (of the first two kinds, W^H):
    it maps what lies outside the range of W to the nearest point of it. Complex dtypes make W unitary.
    A "plu" starts as a permutation with random signs, P and sigma, which stay; L and U are learned in units of
    1 / sqrt(in_features). Deep stacks of "free" layers do not stay invertible in float32 once they are far from their
    start.

    The log-determinant is that of W, known from s but for "free", times the number of positions between the batch dim
    and the last; for complex dtypes that of the real map, 2 log abs det W. Layers with out_features > in_features have
    none.

    Shapes: x (..., in_features), y (..., out_features). A conditioner and a log-determinant need a batch dim before it.

    Args:
        in_features: size of the last dim of x.
        out_features: size of the last dim of y, ``in_features`` if None.
        bias: whether b is learned; zero otherwise.
        kind: how W is parametrised, as in the table.
        reflections: k, for "householder" and "scaled"; ``in_features`` if None.
        max_log_scale: bound on abs(s) in nats, for "scaled" and "plu"; 1.0 if None.
        conditioner: makes a vector per sample, of shape (B, num_parameters), of the side input ``context``; the layer
            adds it to its parameters: to W's in the order of ``matrix.named_parameters()``, and then to b. A layer
            built with the same arguments and no conditioner says how many numbers that are, and may be given one later.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, options, shapes or devices do not fit, or a "free" W is singular.
        TypeError: if an input is no floating point or complex tensor, or not of the layer's dtype, or there is a
            conditioner and no context or the other way round.

    References:
        "Improving Variational Auto-Encoders using Householder Flow", Tomczak and Welling, 2016.
        "Orthogonal Recurrent Neural Networks with Scaled Cayley Transform", Helfrich, Willmott and Ye, 2018.
        "Glow: Generative Flow with Invertible 1x1 Convolutions", Kingma and Dhariwal, 2018 ("plu").

    Example:
        >>> layer = iz.InvertibleLinear(4, 6)
        >>> x = torch.randn(2, 3, 4)
        >>> y = layer(x)
        >>> y.shape, torch.allclose(layer.inverse(y), x, atol=1e-5)
        (torch.Size([2, 3, 6]), True)
    """

    dim = -1
    dims = range(1, sys.maxsize)
    layout = "(..., features)"
    sizes = ("in_features", "out_features")

    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        bias: bool = True,
        *,
        kind: str = "householder",
        reflections: int | None = None,
        max_log_scale: float | None = None,
        conditioner: Conditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        settings = {"reflections": reflections, "max_log_scale": max_log_scale}
        factory = {"device": device, "dtype": dtype}
        super().__init__(in_features, out_features, bias, kind, settings, conditioner, factory, **options)
        self.in_features, self.out_features = self.matrix.columns, self.matrix.rows

    @staticmethod
    def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if weight.ndim == 2:
            # What F.linear saves of more than two dims depends on their strides, which a replay need not find again.
            return F.linear(x if x.ndim < 3 else x.contiguous(), weight, bias)
        y = rearrange(x, "b ... f -> b (...) f") @ weight.mT + bias.unsqueeze(-2)
        return y.reshape(*x.shape[:-1], weight.shape[-2])


class InvertibleConv1x1(MatrixLayer):
    """Multiplies the channels of every pixel by a learned matrix that stays invertible: y = W x + b.

    .. math:: x = W^{-1} (y - b)

    :class:`InvertibleLinear` over dim 1, which describes the kinds of W, what they guarantee, and every option. The
    log-determinant is that of W times the number of pixels.

    Shapes: x (B, channels, ...), y (B, out_channels, ...) with one to three dims of pixels, of any size.

    Args:
        channels: size of dim 1 of x.
        out_channels: size of dim 1 of y, at least ``channels``; ``channels`` if None.
        bias: whether b is learned; zero otherwise.
        kind: "householder", "cayley", "scaled", "plu" or "free".
        reflections: how many, for "householder" and "scaled"; ``channels`` if None.
        max_log_scale: bound on the log-scale in nats, for "scaled" and "plu"; 1.0 if None.
        conditioner: makes a vector per sample, of shape (B, num_parameters), of the side input ``context``.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, options, shapes or devices do not fit, or a "free" W is singular.
        TypeError: if an input is no floating point or complex tensor, or not of the layer's dtype, or there is a
            conditioner and no context or the other way round.

    Reference:
        "Glow: Generative Flow with Invertible 1x1 Convolutions", Kingma and Dhariwal, 2018.

    Example:
        >>> layer = iz.InvertibleConv1x1(3, kind="scaled")
        >>> x = torch.randn(2, 3, 8, 8)
        >>> y = layer(x)
        >>> y.shape, torch.allclose(layer.inverse(y), x, atol=1e-5)
        (torch.Size([2, 3, 8, 8]), True)
    """

    dim = 1
    dims = (3, 4, 5)
    layout = "(batch, channels, ...) with one to three dims of pixels"
    sizes = ("channels", "out_channels")

    channels: int
    out_channels: int

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        bias: bool = True,
        *,
        kind: str = "householder",
        reflections: int | None = None,
        max_log_scale: float | None = None,
        conditioner: Conditioner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        settings = {"reflections": reflections, "max_log_scale": max_log_scale}
        factory = {"device": device, "dtype": dtype}
        super().__init__(channels, out_channels, bias, kind, settings, conditioner, factory, **options)
        self.channels, self.out_channels = self.matrix.columns, self.matrix.rows

    affine = staticmethod(mix_channels)
