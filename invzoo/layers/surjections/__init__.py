"""Layers that are one-to-one in one direction only."""
