"""Fixed points of contractions, and their derivatives.

The iteration is Anderson's ("Iterative Procedures for Nonlinear Integral Equations", Anderson, 1965), one for each
sample. It departs from the paper in that a sample whose residual has grown takes a plain step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ...engine import unrecorded

__all__ = ["Limits", "Map", "differentiable", "fixed_point", "vjp"]

Map = Callable[[Tensor], Tensor]

_HISTORY = 5


class Limits(NamedTuple):
    """When an iteration ends: at a relative change of ``tolerance``, or, as an error of ``owner``, after ``steps``."""

    owner: str
    tolerance: float
    steps: int

    def missed(self, change: float) -> RuntimeError:
        return RuntimeError(
            f"{self.owner}: Expected iteration to come to a relative change of {self.tolerance:.1e} within "
            f"{self.steps} steps; got {change:.1e}. Is the Lipschitz constant of f below 1, and f the same at each "
            "call? If so, raise max_iterations or tolerance"
        )


def vjp(y: Tensor | GradientEdge, x: Tensor | GradientEdge, v: Tensor, *, create_graph: bool = False) -> Tensor:
    """The product v^T dy/dx, for y and x of one shape; the graph of y stays."""
    options: dict[str, bool] = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True}
    (product,) = torch.autograd.grad(y, x, v, **options)
    return torch.zeros_like(v) if product is None else product


def _samples(x: Tensor) -> Tensor:
    """One row per sample."""
    return x.reshape(len(x), -1) if x.ndim > 1 else x.reshape(1, -1)


def _size(x: Tensor) -> Tensor:
    return x.abs().amax(1, keepdim=True)


def _accelerated(value: Tensor, residual: Tensor, history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The combination of the values so far whose residual would be least, if the map were affine; rows are samples."""
    values, residuals = (torch.stack(parts, -1) for parts in zip(*history, strict=True))
    d_values, d_residuals = value.unsqueeze(-1) - values, residual.unsqueeze(-1) - residuals
    norm = torch.linalg.vector_norm(d_residuals, dim=1, keepdim=True).clamp_min(torch.finfo(value.dtype).tiny)
    d_values, d_residuals = d_values / norm, d_residuals / norm
    ridge = 10 * torch.finfo(value.dtype).eps * torch.eye(len(history), dtype=value.dtype, device=value.device)
    gram = d_residuals.mT @ d_residuals + ridge
    weights = torch.linalg.solve_ex(gram, d_residuals.mT @ residual.unsqueeze(-1))[0]
    return value - (d_values @ weights).squeeze(-1)


@unrecorded
def fixed_point(step: Map, start: Tensor, limits: Limits) -> Tensor:
    """Iterate ``x = step(x)`` until no value of a sample moves by more than the tolerance times its largest one.

    Samples that start with a value that is not finite need not come to rest.

    Raises:
        RuntimeError: if that takes too many steps.
    """
    if start.numel() == 0:
        return step(start)
    first = _samples(start).to(torch.promote_types(start.dtype, torch.float32))
    hopeless = ~first.isfinite().all(1, keepdim=True)
    x, history = first, list[tuple[Tensor, Tensor]]()
    before = torch.full_like(_size(x), float("inf"))
    for _ in range(limits.steps):
        value = _samples(step(x.to(start.dtype).view_as(start))).to(x.dtype)
        residual = value - x
        change = _size(residual)
        relative = change / torch.maximum(_size(value), _size(first)).clamp_min(torch.finfo(start.dtype).tiny)
        if bool(((relative <= limits.tolerance) | hopeless).all()):
            return value.to(start.dtype).view_as(start)
        mixed = _accelerated(value, residual, history) if history else value
        history = [*history[1 - _HISTORY :], (value, residual)]
        x, before = mixed.where((change < before) & mixed.isfinite().all(1, keepdim=True), value), change
    raise limits.missed(float(relative.where(~hopeless, 0).max()))


def differentiable(step: Map, solution: Tensor, limits: Limits) -> Tensor:
    r"""Give the fixed point of ``step`` its first and second derivatives, at the cost of three linear equations.

    With A = I - d step / dx at the solution, held fixed, each of the two corrections x + A^-1 (step(x) - x) changes no
    value but makes x right to one more order of differentiation.

    Raises:
        RuntimeError: in the third derivative, which it does not give.
    """
    with torch.enable_grad():
        point = solution + solution.new_empty(0, requires_grad=True).sum()  # a leaf that takes no memory
        value = step(point)
        if not value.requires_grad:
            return solution
        system = _System(get_gradient_edge(value), get_gradient_edge(point), limits)
        x = solution + _Solve.apply(value - solution, point, system, 0)
        return x + _Solve.apply(step(x) - x, point, system, 0)


@dataclass(slots=True)
class _System:
    """Equations (I - J) u = v and (I - J)^T u = v, J = d value / d point a contraction; no tensors, but a graph."""

    value: GradientEdge
    point: GradientEdge
    limits: Limits

    def solve(self, v: Tensor, *, transposed: bool) -> Tensor:
        product = self._transposed_product if transposed else self._product
        return fixed_point(lambda u: v + product(u), v, self.limits)

    def _transposed_product(self, u: Tensor) -> Tensor:
        return vjp(self.value, self.point, u)

    def _product(self, u: Tensor) -> Tensor:
        with torch.enable_grad():
            w = torch.zeros_like(u, requires_grad=True)
            product = vjp(self.value, self.point, w, create_graph=True)
            return vjp(product, w, u) if product.requires_grad else torch.zeros_like(u)


class _Solve(torch.autograd.Function):
    """The solution of a linear equation as a function of its right side, whose gradient solves the transposed one."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, point: Tensor, system: _System, order: int) -> Tensor:
        ctx.save_for_backward(point)
        ctx.system, ctx.order = system, order
        # At order 0, v is a residual that is as good as 0, and so is the solution.
        return system.solve(v, transposed=order == 1) if order else v.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.order == 2:
            raise RuntimeError("Expected at most two derivatives of an iterative inverse; got a third")
        (point,) = ctx.saved_tensors  # rebuilds a call that forgot the graph of the system, once for all products
        return _Solve.apply(grads[0], point, ctx.system, ctx.order + 1), None, None, None
