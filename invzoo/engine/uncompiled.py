"""What the compiler leaves to Python, without importing the compiler."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["uncompiled"]

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Leave a function whose steps depend on values to Python.

    So does `torch.compiler.disable`, but it imports the compiler at once.
    """

    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        if not torch.compiler.is_dynamo_compiling():
            return function(*args, **options)
        from .eagerly import eagerly  # noqa: PLC0415 - imports the compiler

        return eagerly(function, *args, **options)

    return run
