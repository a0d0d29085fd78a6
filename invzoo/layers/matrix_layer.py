"""The layers that multiply by one learned matrix, in what they have in common."""

import math
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..dtypes import full_precision, widen
from ..engine import Tape
from ..log_dets import log_det_dtype
from ._checks import (
    check_choice,
    check_dims,
    check_features,
    check_floating,
    check_like,
    check_positive_int,
    parameter_of,
    refuse,
)
from .conditioned import Conditioned, Conditioner
from .matrix import MATRICES, Matrix

__all__ = ["MatrixLayer"]

Product = Callable[..., Tensor]


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """The product of a matrix and a vector, or of a batch of each."""
    return matrix @ vector if vector.ndim == 1 else (matrix @ vector.unsqueeze(-1)).squeeze(-1)


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
        rows = columns if rows is None else rows
        given = {name: value for name, value in settings.items() if value is not None}
        self._check_arguments(columns, rows, kind, given)
        self.matrix = MATRICES[kind](type(self).__name__, rows, columns, **given, **factory)
        self.bias = nn.Parameter(torch.zeros(rows, **factory)) if bias else None
        self.set_conditioner(conditioner)
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
            return self.matrix.weight(*self.matrix()[0])

    @property
    def num_parameters(self) -> int:
        """How many numbers a conditioner returns per sample: W's parameters, each row by row, then b if there is one.

        The order is that of ``named_parameters()`` of ``matrix``.
        """
        return sum(p.numel() for p in self._own())

    def function(self, x: Tensor, *, context: Any = None) -> Tensor:
        self._check("x", x, self.matrix.columns)
        factors, _ = self._build(x, context)
        return self._apply_weight(x, *factors)

    def inverse(self, y: Tensor, *, context: Any = None) -> Tensor:
        self._check("y", y, self.matrix.rows)
        factors, _ = self._build(y, context)
        return self._apply_inverse(y, *factors)

    def log_det(self, x: Tensor, *, context: Any = None) -> Tensor:
        self._check("x", x, self.matrix.columns)
        _, log_det = self._build(x, context, log_det=True)
        return self._log_det(x, log_det)

    def function_and_log_det(self, x: Tensor, *, context: Any = None) -> tuple[Tensor, Tensor]:
        self._check("x", x, self.matrix.columns)
        factors, log_det = self._build(x, context, log_det=True)
        return self._apply_weight(x, *factors), self._log_det(x, log_det)

    def inverse_with_log_det(self, y: Tensor, *, context: Any = None) -> tuple[Tensor, Tensor]:
        self._check("y", y, self.matrix.rows)
        factors, log_det = self._build(y, context, log_det=True)
        x = self._apply_inverse(y, *factors)
        return x, -self._log_det(x, log_det)

    def replay(self, tape: Tape, *outputs: Tensor, **side: Any) -> None:
        self._replay(self._apply_inverse, self._apply_weight, tape, *outputs, **side)

    def replay_with_log_det(self, tape: Tape, *outputs: Tensor, **side: Any) -> None:
        self._replay(self._apply_inverse, self._apply_weight, tape, *outputs, log_det=True, **side)

    def replay_inverse(self, tape: Tape, *inputs: Tensor, **side: Any) -> None:
        self._replay(self._apply_weight, self._apply_inverse, tape, *inputs, **side)

    def replay_inverse_with_log_det(self, tape: Tape, *inputs: Tensor, **side: Any) -> None:
        self._replay(self._apply_weight, self._apply_inverse, tape, *inputs, log_det=True, **side)

    def _replay(
        self, back: Product, there: Product, tape: Tape, value: Tensor, context: Any = None, *, log_det: bool = False
    ) -> None:
        """Run the conditioner, and build the factors, once for both directions."""
        factors, _ = tape.run(self._build, value, context, log_det=log_det)  # of log_det nothing more is saved
        tape.run(there, tape.input(0, back(value, *factors)), *factors)

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

    def _check(self, argument: str, x: Tensor, size: int) -> None:
        check_floating(self, argument, x)
        check_like(self, argument, x, self._parameter)
        check_dims(self, argument, x, self.dims, self.layout)
        check_features(self, argument, x, self.dim, size)

    def _build(self, x: Tensor, context: Any, *, log_det: bool = False) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return b, and behind it what W and its inverse share; and log abs det W, if asked for."""
        if self.conditioner is not None:
            check_dims(self, "input", x, range(2, sys.maxsize), "(batch, ...), with a conditioner")
        offsets, shift = self.evaluate_conditioner(context), self._shift
        with full_precision(x):
            if offsets is None:
                factors, volume = self.matrix(log_det=log_det)
            else:
                self._check_offsets(offsets, (len(x), self.num_parameters))
                pieces, count = per_sample(self._own(), offsets), len(self.matrix.names)
                factors, volume = self.matrix(*pieces[:count], log_det=log_det)
                shift = shift if self.bias is None else shift + widen(pieces[count])
        return (shift, *factors), volume

    def _check_offsets(self, offsets: Tensor, shape: tuple[int, int]) -> None:
        if offsets.shape != shape:
            refuse(self, "conditioner", f"return shape {shape}, (batch, num_parameters)", tuple(offsets.shape))

    def _apply_weight(self, x: Tensor, shift: Tensor, *factors: Tensor) -> Tensor:
        with full_precision(x):
            return self._map(x, self.matrix.weight(*factors), shift)

    def _apply_inverse(self, y: Tensor, shift: Tensor, *factors: Tensor) -> Tensor:
        with full_precision(y):
            inverse = self.matrix.inverse(*factors)
            return self._map(y, inverse, -times(inverse, shift))

    def _log_det(self, x: Tensor, volume: Tensor | None) -> Tensor:
        if self.matrix.rows != self.matrix.columns or volume is None:
            return super().log_det(x)
        if x.ndim < 2:
            refuse(self, "x", "have a batch dim, for a log-determinant", f"shape {tuple(x.shape)}")
        positions = math.prod(x.shape[1:]) // self.matrix.columns * (2 if x.is_complex() else 1)
        with full_precision(x):
            log_det = positions * volume.to(log_det_dtype(x))
        return log_det.expand(len(x)).contiguous()

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, weight.dtype)
        y = self.affine(x.to(dtype), weight.to(dtype), bias.to(dtype))
        return y.to(torch.promote_types(x.dtype, self._parameter.dtype))
