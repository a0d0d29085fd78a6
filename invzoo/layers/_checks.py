"""Errors of one form, "<Layer>: Expected <argument> to ...; got ...", for every layer."""

import math
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..dtypes import autocast_enabled
from ..errors import refuse

__all__ = [
    "check_callable",
    "check_choice",
    "check_dim",
    "check_dim_given",
    "check_dims",
    "check_features",
    "check_floating",
    "check_like",
    "check_positive",
    "check_positive_int",
    "check_returned",
    "check_tensor",
    "explain",
    "given_dim",
    "given_dims",
    "in_words",
    "parameter_of",
    "refuse",
]


def check_callable(owner: object, argument: str, value: Any) -> None:
    if isinstance(value, type):
        refuse(owner, argument, "be a module or a function", f"the class {value.__name__}: make one of it", TypeError)
    if not callable(value):
        refuse(owner, argument, "be a module or a function", type(value).__name__, TypeError)


def check_returned(owner: object, argument: str, h: Any, shape: Sequence[int], hint: str = "") -> None:
    """A subnet called ``argument`` returned a tensor of ``shape``."""
    if isinstance(h, Tensor) and [*h.shape] == [*shape]:
        return
    got = f"shape {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
    if isinstance(h, tuple):
        hint = f". Let a module of your own return the one of them to use: `return self.net(x)[0]`{hint}"
    refuse(owner, argument, f"return a Tensor of shape {tuple(shape)}", f"{got}{hint}")


def explain(owner: object, argument: str, value: Any, error: Exception, hint: str = "") -> None:
    """Say in what a subnet raised what it was given; what torch's modules raise about that becomes an error of ours."""
    origin = _origin(error)
    called = isinstance(error, TypeError) and origin.startswith(__package__)  # with other arguments than it has
    if origin.startswith(__package__.split(".")[0]) and not called:
        return  # which says it all
    kind = {RuntimeError: ValueError, TypeError: TypeError}.get(type(error))
    machine = any(word in str(error) for word in ("CUDA", "cuDNN", "memory"))
    if kind and not machine and (called or origin.startswith(("torch.nn.modules", "torch.nn.functional"))):
        refuse(owner, argument, f"take {in_words(value)}", f"{type(error).__name__}: {error}{hint}", kind)
    error.add_note(f"{type(owner).__name__}: {argument} was given {in_words(value)}{hint}")


def _origin(error: Exception) -> str:
    """Name the module whose code raised, or called what raised in the depths of torch."""
    origin, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if not name.startswith("torch.") or name.startswith(("torch.nn.", "torch.distributed")):
            origin = name
        trace = trace.tb_next
    return origin


def in_words(value: Any) -> str:
    """Say what a tensor is, or of which type another value is."""
    tensor = isinstance(value, Tensor)
    return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}" if tensor else type(value).__name__


def check_choice(owner: object, argument: str, value: Any, choices: Collection[Any]) -> None:
    if value not in choices:
        refuse(owner, argument, f"be one of {', '.join(map(repr, choices))}", repr(value))


def check_positive_int(owner: object, argument: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        refuse(owner, argument, "be an int", repr(value), TypeError)
    if value < 1:
        refuse(owner, argument, "be at least 1", value)


def check_positive(owner: object, argument: str, value: float, *, below: float = math.inf) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        refuse(owner, argument, "be a number", repr(value), TypeError)
    if not 0 < value < math.inf:
        refuse(owner, argument, "be positive and finite", value)
    if value >= below:
        refuse(owner, argument, f"be below {below:.4g}", value)


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
    check_tensor(owner, "input", x)
    if owner.assumes_dim and x.ndim == 3:
        expected = "be given for a tensor of three dims: dim=1 for the channels of a signal (batch, channels, length), "
        expected += "dim=-1 for the features of tokens (batch, tokens, features)"
        refuse(owner, "dim", expected, f"none, and shape {tuple(x.shape)}")


def check_dim(owner: Any, argument: str, x: Tensor, dim: int, at_least: int = 0, *, inner: bool = False) -> None:
    """``x`` has ``dim`` (behind the batch's, if ``inner``) with so many entries; ``owner`` may assume it."""
    check_dim_given(owner, x)
    if not -x.ndim <= dim < x.ndim or (inner and dim % x.ndim == 0) or x.shape[dim] < at_least:
        wanted = f"have a dim {dim}" + " behind the batch" * inner
        wanted += ("," * inner + f" with at least {at_least} entries") if at_least else ""
        refuse(owner, argument, wanted, f"shape {tuple(x.shape)}")


def check_features(owner: Any, argument: str, x: Tensor, dim: int, size: int) -> None:
    """``x`` has ``size`` features in ``dim``, which ``owner`` may assume."""
    check_dim_given(owner, x)
    if not -x.ndim <= dim < x.ndim or x.shape[dim] != size:
        refuse(owner, argument, f"have size {size} in dim {dim}", f"shape {tuple(x.shape)}")


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """Return a parameter, or a part of what it is computed from, to read its dtype and device: nothing is computed."""
    if (parameter := module._parameters.get(name)) is not None:
        return parameter
    parts: Any = module.parametrizations if parametrize.is_parametrized(module, name) else None
    return getattr(module, name) if parts is None else next(parts[name].parameters())


def check_like(owner: object, argument: str, x: Tensor, parameter: Tensor) -> None:
    """``x`` is where the layer's ``parameter`` is, and of its dtype unless autocast rules over dtypes."""
    if x.device != parameter.device:
        refuse(owner, argument, f"be on the layer's device {parameter.device}", x.device)
    if x.dtype != parameter.dtype and not autocast_enabled(x):
        refuse(owner, argument, f"be of the layer's dtype {parameter.dtype}", x.dtype, TypeError)
