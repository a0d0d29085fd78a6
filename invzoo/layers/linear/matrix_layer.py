"""The layers that multiply by one learned matrix, in what they have in common."""

import math
import sys
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...dtypes import computed, full_precision, widen
from ...log_dets import for_each_sample
from ...protocol import Moving
from .._checks import (
    check_dims,
    check_features,
    check_floating,
    check_like,
    check_positive_int,
    parameter_of,
    refuse,
)
from ..conditioned import Conditioned, Conditioner
from .matrix import MATRICES, Matrix, make_matrix

__all__ = ["MatrixLayer"]


def per_sample(parameters: Sequence[Tensor], offsets: Tensor) -> list[Tensor]:
    """Cut a flat vector per sample, (B, numbers), to the shapes of parameters; real ones take its real part."""
    pieces = offsets.split([p.numel() for p in parameters], 1)
    pieces = [h.real if h.is_complex() and not p.is_complex() else h for h, p in zip(pieces, parameters, strict=True)]
    return [h.reshape(len(h), *p.shape) for h, p in zip(pieces, parameters, strict=True)]


class MatrixLayer(Conditioned):
    """x -> W x + b along ``dim``, and back with the left inverse of W. Abstract: a subclass adds the product.

    Everything is computed in at least float32, under autocast too: a bfloat16 product could not be undone. The output
    has the promoted dtype of input and parameters, which without autocast is the dtype of both.

    With a ``conditioner``, W and b have a batch dim of their own: each sample has the layer's parameters plus what the
    conditioner makes of its context.
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
        conditioner: Conditioner | None,
        factory: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        narrow, wide = self.sizes
        rows = columns if rows is None else rows
        check_positive_int(self, narrow, columns)
        check_positive_int(self, wide, rows)
        if rows < columns:
            refuse(self, wide, f"be at least {narrow}={columns}", rows)
        self.matrix = make_matrix(self, MATRICES, kind, rows, columns, settings, **factory)
        if rows > columns and self.matrix.square:
            refuse(self, wide, f"be {narrow}={columns} with kind={kind!r}", rows)
        self.bias = nn.Parameter(torch.zeros(rows, **factory)) if bias else None
        self.set_conditioner(conditioner)
        self.volume_preserving = self.matrix.volume_preserving and rows == columns  # type: ignore[misc]

    def reset_parameters(self) -> None:
        self.matrix.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def weight(self) -> Tensor:
        """W, of shape (rows, columns), in at least float32."""
        with full_precision(self._parameter):
            return self.matrix.weight(*self.matrix())

    @property
    def num_parameters(self) -> int:
        """How many numbers a conditioner returns per sample: W's parameters, each row by row, then b if there is one.

        The order is that of ``named_parameters()`` of ``matrix``.
        """
        return sum(p.numel() for p in self._own())

    def given(self, like: Moving, *, context: Any = None) -> tuple[Tensor, ...]:
        """Return b, and behind it the factors of W and its inverse."""
        if like.log_det and like.ndim < 2:
            refuse(self, "x", "have a batch dim, for a log-determinant", f"shape {tuple(like.shape)}")
        offsets, shift = self.evaluate_conditioner(context), self._shift
        with full_precision(like):
            if offsets is None:
                return shift, *self.matrix()
            if offsets.shape != (shape := (len(like), self.num_parameters)):
                refuse(self, "conditioner", f"return shape {shape}, (batch, num_parameters)", tuple(offsets.shape))
            pieces, count = per_sample(self._own(), offsets), len(self.matrix.names)
            return shift if self.bias is None else shift + widen(pieces[count]), *self.matrix(*pieces[:count])

    def move(self, x: Tensor, shift: Tensor, *factors: Tensor) -> Tensor:
        return computed(lambda x: self._map(x, self.matrix.weight(*factors), shift), x, self._parameter)

    def undo(self, y: Tensor, shift: Tensor, *factors: Tensor) -> Tensor:
        def back(y: Tensor) -> Tensor:
            inverse = self.matrix.inverse(*factors)
            return self._map(y, inverse, -(inverse @ shift.unsqueeze(-1)).squeeze(-1))

        return computed(back, y, self._parameter)

    def log_slope(self, x: Tensor, shift: Tensor, *factors: Tensor) -> Tensor:
        if self.matrix.rows != self.matrix.columns:
            refuse(self, "layer", "be a bijection with a log-determinant", "one without", TypeError)
        positions = math.prod(x.shape[1:]) // self.matrix.columns * (2 if x.is_complex() else 1)
        with full_precision(x):
            return for_each_sample(x, positions * self.matrix.log_det(*factors))

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_floating(self, argument, x)
        check_like(self, argument, x, self._parameter)
        check_dims(self, argument, x, self.dims, self.layout)
        check_features(self, argument, x, self.dim, self.matrix.columns if argument == "x" else self.matrix.rows)
        if self.conditioner is not None:
            check_dims(self, "input", x, range(2, sys.maxsize), "(batch, ...), with a conditioner")

    def extra_repr(self) -> str:
        narrow, wide = self.sizes
        return f"{narrow}={self.matrix.columns}, {wide}={self.matrix.rows}, bias={self.bias is not None}"

    @staticmethod
    def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``weight`` x + ``bias`` along ``dim``, all of one dtype."""
        raise NotImplementedError

    @property
    def _parameter(self) -> Tensor:
        return parameter_of(self.matrix, self.matrix.names[0])

    @property
    def _shift(self) -> Tensor:
        return widen(self._parameter.new_zeros(self.matrix.rows) if self.bias is None else self.bias)

    def _own(self) -> tuple[Tensor, ...]:
        return self.matrix.own() if self.bias is None else (*self.matrix.own(), self.bias)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.affine(x, weight.to(x.dtype), bias.to(x.dtype))
