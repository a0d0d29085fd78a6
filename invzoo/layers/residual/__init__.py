"""Residual blocks, and steps of reversible integrators."""
