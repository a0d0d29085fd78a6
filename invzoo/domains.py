"""Domains of what is made of layers, as constraints of `torch.distributions`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

__all__ = ["Domain", "Parts", "end_of", "inside", "of_each", "of_events", "of_parts", "uniform"]

Domain = constraints.Constraint | tuple[constraints.Constraint, ...]  # of one tensor for all, or of each of several


class Parts(constraints.cat):
    """A domain for each part of a tensor along ``dim``, which are those of `torch.chunk` where no sizes are given."""

    def __init__(self, domains: Sequence[constraints.Constraint], dim: int, sizes: Sequence[int] | None) -> None:
        super().__init__(domains, dim, sizes)
        self.sizes = sizes

    def __repr__(self) -> str:
        return f"Parts({self.cseq}, dim={self.dim})"

    def check(self, value: Tensor) -> Tensor:
        return self.map(lambda domain, part: domain.check(part), value)

    def map(self, function: Callable[[constraints.Constraint, Tensor], Tensor], value: Tensor) -> Tensor:
        """Apply a function to each domain and its part of a tensor."""
        domains, sizes = self.cseq, self.sizes or [n.shape[self.dim] for n in value.chunk(len(self.cseq), self.dim)]
        if len(sizes) != len(domains) or sum(sizes) != value.shape[self.dim]:  # of layers that change sizes
            domains, sizes = [constraints.real], [value.shape[self.dim]]
        parts = zip(domains, value.split(sizes, self.dim), strict=True)
        return torch.cat([function(domain, part) for domain, part in parts], self.dim)


def of_parts(domains: Iterable[Domain], dim: int, sizes: Sequence[int] | None) -> constraints.Constraint:
    """Return the domain of a tensor whose parts along ``dim`` have these."""
    each = [constraints.real if isinstance(d, tuple) or d.event_dim else d for d in domains]
    return each[0] if len({*map(id, each)}) < 2 else Parts(each, dim, sizes)


def of_each(domain: Domain, n: int) -> tuple[constraints.Constraint, ...]:
    """Return the domains of ``n`` tensors."""
    if isinstance(domain, Parts) and n == len(domain.cseq):
        return tuple(domain.cseq)
    return domain if isinstance(domain, tuple) else (domain,) * n


def of_events(domain: Any, event_dim: int) -> constraints.Constraint:
    """Return the domain of samples with any number of batch dims, where a layer's inputs have one."""
    return constraints.independent(_from_the_right(domain, event_dim + 1), event_dim - domain.event_dim)


def _from_the_right(domain: constraints.Constraint, ndim: int) -> constraints.Constraint:
    """Count the dims of parts from the last dim, in what has ``ndim`` of them."""
    if not isinstance(domain, Parts):
        return domain
    domains = [_from_the_right(part, ndim) for part in domain.cseq]
    return Parts(domains, domain.dim - ndim if domain.dim >= 0 else domain.dim, domain.sizes)


def inside(domain: Domain, zeros: Tensor) -> Tensor:
    """Return values inside a domain, zeros if that has all real numbers or is not known here."""
    if isinstance(domain, Parts):
        return domain.map(inside, zeros)
    try:
        return transform_to(domain)(zeros)
    except NotImplementedError:
        return zeros


def uniform(domain: Domain) -> constraints.Constraint:
    """Return a domain that is the same for all entries, wherever they go; otherwise all that is known: real numbers."""
    return constraints.real if isinstance(domain, tuple | Parts) or domain.event_dim else domain


def end_of(ends: Iterable[tuple[bool, Any]]) -> Domain:
    """Return the domain of a chain.

    Args:
        ends: of each layer, whether it only rearranges entries, and its domain, from that end of the chain on.
    """
    for i, (rearranges, domain) in enumerate(ends):
        if not rearranges:
            return uniform(domain) if i else domain
    return constraints.real
