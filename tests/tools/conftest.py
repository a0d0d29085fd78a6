"""Tests of a tool are collected where it is installed; the head and the end of a run name those that are not."""

from tests.tools.needs import MISSING

__all__ = ["collect_ignore"]

collect_ignore = [*MISSING]
