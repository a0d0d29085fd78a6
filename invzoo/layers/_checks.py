"""Errors of one form, "<Layer>: Expected <argument> to ...; got ...", for every layer."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import refuse

__all__ = [
    "autocast_enabled",
    "check_callable",
    "check_choice",
    "check_dims",
    "check_features",
    "check_floating",
    "check_like",
    "check_positive",
    "check_positive_int",
    "check_tensor",
    "parameter_of",
    "refuse",
]


def check_callable(owner: object, argument: str, value: Any) -> None:
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


def check_features(owner: object, argument: str, x: Tensor, dim: int, size: int) -> None:
    """``x`` has ``size`` features in ``dim``."""
    if not -x.ndim <= dim < x.ndim or x.shape[dim] != size:
        refuse(owner, argument, f"have size {size} in dim {dim}", f"shape {tuple(x.shape)}")


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """Return a parameter, or a part of what it is computed from, to read its dtype and device: nothing is computed."""
    if (parameter := module._parameters.get(name)) is not None:
        return parameter
    parts: Any = module.parametrizations if parametrize.is_parametrized(module, name) else None
    return getattr(module, name) if parts is None else next(parts[name].parameters())


def autocast_enabled(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_like(owner: object, argument: str, x: Tensor, parameter: Tensor) -> None:
    """``x`` is where the layer's ``parameter`` is, and of its dtype unless autocast rules over dtypes."""
    if x.device != parameter.device:
        refuse(owner, argument, f"be on the layer's device {parameter.device}", x.device)
    if x.dtype != parameter.dtype and not autocast_enabled(x):
        refuse(owner, argument, f"be of the layer's dtype {parameter.dtype}", x.dtype, TypeError)
