"""Hypothesis strategies: inputs inside a layer's domain, and random stacks of layers. They need hypothesis."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import constraints

from ..containers import InvertibleSequential
from ..domains import of_each
from ..module import InvertibleModule
from .catalogue import cases
from .entries import Case
from .inputs import Shape, bounds, elementwise

__all__ = ["inputs", "stacks"]

_WIDTHS = {torch.float64: 64, torch.float32: 32, torch.float16: 16}


@st.composite
def inputs(
    draw: st.DrawFn,
    /,
    of: Case | InvertibleModule,
    *shapes: Shape,
    batch: int | st.SearchStrategy[int] = 3,
    dtype: torch.dtype = torch.float64,
    largest: float = 10.0,
) -> tuple[Tensor, ...]:
    """Draw the inputs of a layer: any values of its domain up to a size, both ends among them if they belong to it.

    Args:
        draw: hypothesis's own.
        of: a case of the catalogue, whose shapes are known, or a layer.
        shapes: of the inputs, without the batch, for a layer.
        batch: how many samples, or a strategy for it.
        dtype: of the inputs.
        largest: the size of the largest values where the domain has no bound.

    Raises:
        TypeError: for a domain that is neither all real numbers nor those between bounds.
    """
    size = batch if isinstance(batch, int) else draw(batch)
    if isinstance(of, Case):
        if of.draw is not None:
            return of.inputs(batch=size, dtype=dtype, seed=draw(st.integers(0, 2**32 - 1)))
        shapes = shapes or of.shapes
        of = of.layer()
    pairs = zip(shapes, of_each(of.domain, len(shapes)), strict=True)
    return tuple(draw(tensors((size, *shape), domain, dtype, largest)) for shape, domain in pairs)


def tensors(
    shape: Shape, domain: constraints.Constraint, dtype: torch.dtype, largest: float
) -> st.SearchStrategy[Tensor]:
    """Return a strategy for tensors whose elements lie in a domain."""
    n, element = math.prod(shape), elements(domain, dtype, largest)
    return st.lists(element, min_size=n, max_size=n).map(
        lambda values: torch.tensor(values, dtype=dtype).reshape(shape)
    )


def elements(domain: constraints.Constraint, dtype: torch.dtype, largest: float) -> st.SearchStrategy[float]:
    """Return a strategy for the numbers of a domain that the dtype can hold, ends that belong to it included."""
    domain, (low, high) = elementwise(domain), bounds(domain)
    tiny = torch.finfo(dtype).tiny
    near, far = (-largest if low is None else low), (largest if high is None else high)
    ends = torch.tensor([near, far, near + tiny, far - tiny, 0.0, 1.0, -1.0, tiny, 1e-4], dtype=torch.float64)
    ends = ends.to(dtype).double()
    inside = ends[domain.check(ends) & (ends >= near) & (ends <= far)].unique().tolist()
    width = _WIDTHS.get(dtype, 16)  # bfloat16 has fewer digits than float16, and rounds what hypothesis draws
    real = st.floats(_round(near, dtype), _round(far, dtype), width=width, allow_subnormal=False)  # type: ignore[arg-type]
    return st.one_of(st.sampled_from(inside), real.filter(lambda x: bool(domain.check(torch.tensor(x, dtype=dtype)))))


def _round(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=torch.float16 if dtype == torch.bfloat16 else dtype).item()


@st.composite
def stacks(
    draw: st.DrawFn,
    /,
    depth: int | st.SearchStrategy[int] | None = None,
    shape: Shape = (4,),
    **options: Any,
) -> InvertibleSequential:
    """Draw a stack of the catalogue's layers, in float64, away from their start.

    Its layers take any real numbers of one shape and return the same. Those that saturate are left out, since a stack
    of them has no inverse in floating point, and so are those that take side inputs or know no log-determinant.

    Args:
        draw: hypothesis's own.
        depth: how many layers, or a strategy for it; 1 to 6 by default.
        shape: of one sample: ``(features,)`` or ``(channels, height, width)``.
        options: those of :class:`invzoo.InvertibleSequential`.
    """
    n = st.integers(1, 6) if depth is None else depth
    size = n if isinstance(n, int) else draw(n)
    chosen = draw(st.lists(st.sampled_from(stackable(tuple(shape))), min_size=size, max_size=size))
    seeds = draw(st.lists(st.integers(0, 2**16), min_size=size, max_size=size))
    return InvertibleSequential(*(case.layer(seed) for case, seed in zip(chosen, seeds, strict=True)), **options)


@functools.cache
def stackable(shape: Shape) -> Sequence[Case]:
    """Return the cases that map tensors of a shape to others of that shape, and may be stacked."""
    return [case for case in cases() if not case.side and case.draw is None and _fits(case, shape)]


def _fits(case: Case, shape: Shape) -> bool:
    layer = case.layer()
    plain = constraints.real
    if layer.saturating or layer.slow_inverse or layer.domain is not plain or layer.codomain is not plain:
        return False
    x = torch.zeros(2, *shape, dtype=torch.float64)
    try:
        y, _ = layer.forward_and_log_det(x)
    except (ValueError, TypeError, RuntimeError):  # another shape, no log-determinant, or a subnet of another size
        return False
    return isinstance(y, Tensor) and y.shape == x.shape
