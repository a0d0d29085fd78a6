"""Increasing functions of each value, with many parameters."""
