"""Draws of inputs from the domain of a layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import constraints

__all__ = ["Draw", "Shape", "bounds", "draw_from", "elementwise", "in_words"]

Shape = tuple[int, ...]
Draw = Callable[[Shape, Generator], Tensor]


def elementwise(domain: constraints.Constraint) -> constraints.Constraint:
    """Return the domain of a single element."""
    return elementwise(domain.base_constraint) if isinstance(domain, constraints.independent) else domain


def bounds(domain: constraints.Constraint) -> tuple[float | None, float | None]:
    """Return the bounds of a domain of real numbers, None for those that it has not.

    Raises:
        TypeError: for another domain.
    """
    domain = elementwise(domain)
    low: Any = getattr(domain, "lower_bound", None)
    high: Any = getattr(domain, "upper_bound", None)
    if domain is not constraints.real and (domain.is_discrete or low is high is None):
        raise TypeError(f"bounds: Expected a domain of real numbers between bounds; got {domain}")
    return low, high


def in_words(domain: constraints.Constraint) -> str:
    """Write a domain as an interval, where it is one.

    Example:
        >>> from invzoo.testing.inputs import in_words
        >>> in_words(torch.distributions.constraints.unit_interval)
        '[0, 1]'
    """
    domain = elementwise(domain)
    if domain is constraints.real:
        return "real"
    ends = (getattr(domain, name, None) for name in ("lower_bound", "upper_bound"))
    low, high = (f"{end:g}" if isinstance(end, float | int) else f"{end}" for end in ends)
    forms: dict[Any, str] = {
        constraints.interval: f"[{low}, {high}]",
        constraints.half_open_interval: f"[{low}, {high})",
        constraints.greater_than: f"> {low}",
        constraints.greater_than_eq: f">= {low}",
        constraints.less_than: f"< {high}",
        constraints.integer_interval: f"integers in [{low}, {high}]",
    }
    return next((form for kind, form in forms.items() if isinstance(domain, kind)), str(domain))


def draw_from(domain: constraints.Constraint, shape: Shape, generator: Generator) -> Tensor:
    """Draw a float64 tensor inside a domain, away from its ends and of size about 1."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    low, high = bounds(domain)
    if low is not None and high is not None:
        return low + (high - low) * (0.02 + 0.96 * normal.sigmoid())
    if low is not None:
        return low + normal.exp()
    return normal if high is None else high - normal.exp()
