"""Couplings and autoregressive layers; a map of one's own makes a :class:`Coupling` of its own."""

from .coupling import Coupling

__all__ = ["Coupling"]
