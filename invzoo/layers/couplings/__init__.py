"""Couplings and autoregressive layers."""
