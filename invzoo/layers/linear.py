"""Layers that multiply the features by a learned matrix that stays invertible."""

import sys
from collections.abc import Collection
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine import Tape
from ..module import InvertibleModule
from ._checks import (
    check_choice,
    check_dims,
    check_features,
    check_floating,
    check_like,
    check_positive_int,
    refuse,
)
from .matrix import MATRICES, Matrix, full_precision, widen

__all__ = ["InvertibleLinear", "MatrixLayer"]


class MatrixLayer(InvertibleModule):
    """x -> W x + b along ``dim``, and back with the left inverse of W. Abstract: a subclass adds the product.

    Everything is computed in at least float32, under autocast too: a bfloat16 product could not be undone. The output
    has the promoted dtype of input and parameters, which without autocast is the dtype of both.
    """

    dim: ClassVar[int]
    dims: ClassVar[Collection[int]]
    layout: ClassVar[str]
    sizes: ClassVar[tuple[str, str]]

    matrix: Matrix
    bias: nn.Parameter | None

    def __init__(
        self,
        columns: int,
        rows: int | None,
        bias: bool,
        kind: str,
        settings: dict[str, Any],
        factory: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        rows = columns if rows is None else rows
        given = {name: value for name, value in settings.items() if value is not None}
        self._check_arguments(columns, rows, kind, given)
        self.matrix = MATRICES[kind](type(self).__name__, rows, columns, **given, **factory)
        self.bias = nn.Parameter(torch.zeros(rows, **factory)) if bias else None
        self.volume_preserving = self.matrix.volume_preserving and rows == columns  # type: ignore[misc]

    def _check_arguments(self, columns: int, rows: int, kind: str, settings: dict[str, Any]) -> None:
        narrow, wide = self.sizes
        check_positive_int(self, narrow, columns)
        check_positive_int(self, wide, rows)
        check_choice(self, "kind", kind, MATRICES)
        if rows < columns:
            refuse(self, wide, f"be at least {narrow}={columns}", rows)
        if rows > columns and MATRICES[kind].square:
            refuse(self, wide, f"be {narrow}={columns} with kind={kind!r}", rows)
        for name, value in settings.items():
            if name not in MATRICES[kind].options:
                refuse(self, name, f"be None with kind={kind!r}", value)

    def reset_parameters(self) -> None:
        self.matrix.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def weight(self) -> Tensor:
        """W, of shape (rows, columns), in at least float32."""
        with full_precision(self._parameter):
            return self.matrix.weight(*self.matrix.factors())

    def function(self, x: Tensor) -> Tensor:
        self._check("x", x, self.matrix.columns)
        return self._apply_weight(x, *self._factors(x))

    def inverse(self, y: Tensor) -> Tensor:
        self._check("y", y, self.matrix.rows)
        return self._apply_inverse(y, *self._factors(y))

    def replay(self, tape: Tape, *outputs: Tensor, **side: Any) -> None:
        """Build the factors once for both directions."""
        (y,) = outputs
        factors = tape.run(self._factors, y)
        x = tape.input(0, self._apply_inverse(y, *factors))
        tape.run(self._apply_weight, x, *factors)

    @staticmethod
    def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``weight`` x + ``bias`` along ``dim``, all of one dtype."""
        raise NotImplementedError

    @property
    def _parameter(self) -> Tensor:
        return next(self.matrix.parameters())

    @property
    def _shift(self) -> Tensor:
        return widen(self._parameter.new_zeros(self.matrix.rows) if self.bias is None else self.bias)

    def _check(self, argument: str, x: Tensor, size: int) -> None:
        check_floating(self, argument, x)
        check_like(self, argument, x, self._parameter)
        check_dims(self, argument, x, self.dims, self.layout)
        check_features(self, argument, x, self.dim, size)

    def _factors(self, x: Tensor) -> tuple[Tensor, ...]:
        with full_precision(x):
            return self.matrix.factors()

    def _apply_weight(self, x: Tensor, *factors: Tensor) -> Tensor:
        with full_precision(x):
            return self._map(x, self.matrix.weight(*factors), self._shift)

    def _apply_inverse(self, y: Tensor, *factors: Tensor) -> Tensor:
        with full_precision(y):
            inverse = self.matrix.inverse(*factors)
            return self._map(y, inverse, -inverse @ self._shift)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, weight.dtype)
        y = self.affine(x.to(dtype), weight.to(dtype), bias.to(dtype))
        return y.to(torch.promote_types(x.dtype, self._parameter.dtype))


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

    Shapes: x (..., in_features), y (..., out_features).

    Args:
        in_features: size of the last dim of x.
        out_features: size of the last dim of y, ``in_features`` if None.
        bias: whether b is learned; zero otherwise.
        kind: how W is parametrised, as in the table.
        reflections: k, for "householder" and "scaled"; ``in_features`` if None.
        max_log_scale: bound on abs(s) in nats, for "scaled" and "plu"; 1.0 if None.
        device: of the parameters.
        dtype: of the parameters and, without autocast, of x and y.
        options: those of :class:`InvertibleModule`.

    Raises:
        ValueError: if sizes, options, shapes or devices do not fit, or a "free" W is singular.
        TypeError: if an input is no floating point or complex tensor, or not of the layer's dtype.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        settings = {"reflections": reflections, "max_log_scale": max_log_scale}
        super().__init__(in_features, out_features, bias, kind, settings, {"device": device, "dtype": dtype}, **options)
        self.in_features, self.out_features = self.matrix.columns, self.matrix.rows

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    @staticmethod
    def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)
