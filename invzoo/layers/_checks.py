"""Errors of one form, "<Layer>: Expected <argument> to ...; got ...", for every layer."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import refuse

__all__ = [
    "autocast_enabled",
    "check_callable",
    "check_choice",
    "check_dim_given",
    "check_dims",
    "check_features",
    "check_floating",
    "check_like",
    "check_positive",
    "check_positive_int",
    "check_tensor",
    "given_dim",
    "given_dims",
    "refuse",
]


def check_callable(owner: object, argument: str, value: Any) -> None:
    if isinstance(value, type):
        refuse(owner, argument, "be a module or a function", f"the class {value.__name__}: make one of it", TypeError)
    if not callable(value):
        refuse(owner, argument, "be a module or a function", type(value).__name__, TypeError)


def check_choice(owner: object, argument: str, value: Any, choices: Collection[Any]) -> None:
    if value not in choices:
        refuse(owner, argument, f"be one of {', '.join(map(repr, choices))}", repr(value))


def check_positive_int(owner: object, argument: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        refuse(owner, argument, "be an int", repr(value), TypeError)
    if value < 1:
        refuse(owner, argument, "be at least 1", value)


def check_positive(owner: object, argument: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        refuse(owner, argument, "be a number", repr(value), TypeError)
    if not 0 < value < float("inf"):
        refuse(owner, argument, "be positive and finite", value)


def check_tensor(owner: object, argument: str, x: Any) -> None:
    """Of any dtype."""
    if not isinstance(x, Tensor):
        refuse(owner, argument, "be a Tensor", type(x).__name__, TypeError)


def check_floating(owner: object, argument: str, x: Any) -> None:
    """Floating point or complex."""
    check_tensor(owner, argument, x)
    if not (x.is_floating_point() or x.is_complex()):
        refuse(owner, argument, "be floating point or complex", x.dtype, TypeError)


def check_dims(owner: object, argument: str, x: Tensor, dims: Collection[int], layout: str) -> None:
    """The number of dims is one of ``dims``; ``layout`` says in words what they mean."""
    if x.ndim not in dims:
        refuse(owner, argument, f"have dims {layout}", f"shape {tuple(x.shape)}")


def given_dim(owner: Any, dim: Any) -> int:
    """Return ``dim`` if it is an int. For None that is 1, where ``owner`` only assumes the features."""
    if dim is None:
        owner.assumes_dim = True
        return 1
    if not isinstance(dim, int) or isinstance(dim, bool):
        refuse(owner, "dim", "be an int", repr(dim), TypeError)
    return dim


def given_dims(owner: Any, dim: Any) -> tuple[int, ...]:
    """As :func:`given_dim`, where several will do."""
    several = isinstance(dim, Sequence) and not isinstance(dim, str)
    return tuple(given_dim(owner, d) for d in (dim if several else (dim,)))


def check_dim_given(owner: Any, x: Tensor) -> None:
    """``owner`` was given its dim, or ``x`` has other than three dims: of those, dim 1 may be time."""
    if owner.assumes_dim and x.ndim == 3:
        expected = "be given for a tensor of three dims: dim=1 for the channels of a signal (batch, channels, length), "
        expected += "dim=-1 for the features of tokens (batch, tokens, features)"
        refuse(owner, "dim", expected, f"none, and shape {tuple(x.shape)}")


def check_features(owner: object, argument: str, x: Tensor, dim: int, size: int) -> None:
    """``x`` has ``size`` features in ``dim``."""
    if not -x.ndim <= dim < x.ndim or x.shape[dim] != size:
        refuse(owner, argument, f"have size {size} in dim {dim}", f"shape {tuple(x.shape)}")


def autocast_enabled(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_like(owner: object, argument: str, x: Tensor, parameter: Tensor) -> None:
    """``x`` is where the layer's ``parameter`` is, and of its dtype unless autocast rules over dtypes."""
    if x.device != parameter.device:
        refuse(owner, argument, f"be on the layer's device {parameter.device}", x.device)
    if x.dtype != parameter.dtype and not autocast_enabled(x):
        refuse(owner, argument, f"be of the layer's dtype {parameter.dtype}", x.dtype, TypeError)
