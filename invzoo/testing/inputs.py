"""Draws of inputs from the domain of a layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

__all__ = ["Draw", "Shape", "draw_from"]

Shape = tuple[int, ...]
Draw = Callable[[Shape, Generator], Tensor]


def draw_from(domain: constraints.Constraint, shape: Shape, generator: Generator) -> Tensor:
    """Draw a float64 tensor inside a domain, away from its ends and of size about 1."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if isinstance(domain, constraints.independent):
        return draw_from(domain.base_constraint, shape, generator)
    if domain is constraints.real or domain is constraints.real_vector:
        return normal
    low: Any = getattr(domain, "lower_bound", None)
    high: Any = getattr(domain, "upper_bound", None)
    if domain.is_discrete or low is high is None:
        raise TypeError(f"draw_from: Expected a domain of real numbers between bounds; got {domain}: give draw")
    if low is not None and high is not None:
        return low + (high - low) * (0.02 + 0.96 * normal.sigmoid())
    return high - normal.exp() if low is None else low + normal.exp()
