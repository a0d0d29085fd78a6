"""What the assertions have in common: calls on copies, comparisons, and messages that name the layer."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..engine import tuple_of
from ..log_dets import log_det_dtype
from ..module import InvertibleModule

__all__ = [
    "Call",
    "assert_near",
    "assertion",
    "check_log_det",
    "clone",
    "clones",
    "expect",
    "flat",
    "has_log_det",
    "leaf",
    "options_of",
    "seed",
    "shapes",
    "tolerance_of",
]

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_F = TypeVar("_F", bound=Callable[..., None])


def assertion(function: _F) -> _F:
    """Let an assertion work on copies, from a random state of its own, and fail with the layer's name."""

    @functools.wraps(function)
    def run(layer: InvertibleModule, *inputs: Tensor, **arguments: Any) -> None:
        if not isinstance(layer, InvertibleModule):
            raise TypeError(f"{function.__name__}: Expected layer to be an InvertibleModule; got {layer!r}")
        if not inputs or not all(isinstance(x, Tensor) and x.ndim and len(x) for x in inputs):
            raise TypeError(f"{function.__name__}: Expected inputs to be Tensors with a batch dim; got {inputs!r}")
        devices = {v.device for v in (*inputs, *arguments.values()) if isinstance(v, Tensor) and v.is_cuda}
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            seed()
            copies = {name: clone(value) for name, value in arguments.items()}
            try:
                function(copy.deepcopy(layer), *clones(inputs), **copies)
            except AssertionError as error:
                error.add_note(f"in {function.__name__} of {layer}")
                raise
            except Exception as error:
                got = f"{type(error).__name__}: {error}"
                raise AssertionError(f"{layer._name()}: Expected no error in {function.__name__}; got {got}") from error

    return cast("_F", run)


def options_of(assertion: Callable[..., None]) -> frozenset[str]:
    """Return the names of an assertion's options; all other keyword arguments are side inputs."""
    parameters = inspect.signature(assertion).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def seed() -> None:
    """Start torch's generator of the CPU again; :func:`assertion` keeps the caller's state."""
    torch.default_generator.manual_seed(0)


def clone(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Copy a tensor: a floating one in another dtype if one is given, a complex one in the complex dtype of that."""
    return in_dtype(value.detach().clone(), dtype) if isinstance(value, Tensor) else value


def in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Convert a tensor in the same way, if it has floats."""
    if dtype is None or not _floats(tensor):
        return tensor
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)


def clones(values: Iterable[Any], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Copy the tensors."""
    return tuple(clone(value, dtype) for value in values)


def leaf(value: Any) -> Any:
    """Copy a tensor as a leaf, which requires gradients if it can."""
    copied = clone(value)
    return copied.requires_grad_() if _floats(copied) else copied


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


@dataclass(frozen=True)
class Call:
    """A layer, what it is called with, in which direction, and whether for its log-determinant, too."""

    layer: InvertibleModule
    inputs: tuple[Any, ...]
    side: dict[str, Any]
    inverted: bool = False
    log_det: bool = False

    def __str__(self) -> str:
        return f"{'inv.' * self.inverted}forward{'_and_log_det' * self.log_det}"

    @property
    def module(self) -> InvertibleModule:
        """What is called: the layer or its inverse."""
        return self.layer.inv if self.inverted else self.layer

    def run(self) -> tuple[Any, ...]:
        """Return outputs, and behind them the log-determinant if it is asked for."""
        if self.log_det:
            return flat(*self.module.forward_and_log_det(*self.inputs, **self.side))
        return tuple_of(self.module(*self.inputs, **self.side))

    def kinds(self, outputs: Any) -> list["Call"]:
        """Return the call without the log-determinant, and the one with it if there is any."""
        with_log_det = [replace(self, log_det=True)] if has_log_det(self.layer, self.inputs, outputs) else []
        return [self, *with_log_det]

    def back(self, outputs: tuple[Any, ...]) -> "Call":
        """Call the other direction."""
        return replace(self, inputs=outputs, inverted=not self.inverted)

    def anew(self) -> "Call":
        """Call a copy of the layer."""
        return replace(self, layer=copy.deepcopy(self.layer))

    def each(self, change: Callable[[Any], Any]) -> "Call":
        """Change every input and every side input."""
        return replace(self, inputs=tuple(map(change, self.inputs)), side={n: change(s) for n, s in self.side.items()})

    def to(self, dtype: torch.dtype) -> "Call":
        """Change the layer's dtype, and copy all that it is called with in that dtype."""
        layer = self.layer._apply(lambda tensor: in_dtype(tensor, dtype))
        return replace(self, layer=layer).each(lambda value: clone(value, dtype))

    def tensors(self) -> dict[str, Tensor]:
        """Return the inputs, side inputs and parameters by name."""
        values = {f"input {i}": x for i, x in enumerate(self.inputs)}
        values |= {f"side input {name}": value for name, value in self.side.items()}
        values |= {f"parameter {name}": value for name, value in self.layer.named_parameters()}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def shapes(values: Any) -> list[tuple[int, ...]]:
    """Return the shapes of one tensor or several."""
    return [tuple(value.shape) for value in tuple_of(values)]


def tolerance_of(*values: Tensor) -> float:
    """Return the relative error that is allowed at the coarsest precision of some tensors."""
    dtypes = [value.dtype.to_real() if value.is_complex() else value.dtype for value in values]
    return max((_TOLERANCES[dtype] for dtype in dtypes if dtype in _TOLERANCES), default=0.0)


def expect(condition: bool, layer: InvertibleModule, what: str, got: Any) -> None:
    """Raise ``<layer>: Expected <what>; got <got>`` unless the condition holds."""
    if not condition:
        raise AssertionError(f"{layer._name()}: Expected {what}; got {got}")


def assert_near(layer: InvertibleModule, what: str, actual: Any, expected: Any, tolerance: float | None = None) -> None:
    """Assert equal numbers, shapes and dtypes of tensors, and errors below ``tolerance`` times the largest element."""
    actual, expected = tuple_of(actual), tuple_of(expected)
    expect(len(actual) == len(expected), layer, f"{what}, {len(expected)} tensors", len(actual))
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        name = what if len(expected) == 1 else f"{what} (tensor {index})"
        expect(isinstance(a, Tensor) == isinstance(e, Tensor), layer, f"{name}, {_kind(e)}", _kind(a))
        if isinstance(e, Tensor):
            relative = (tolerance_of(e) if tolerance is None else tolerance) if _floats(e) else 0.0
            largest = max(_largest(e), 1e-2)
            torch.testing.assert_close(
                a.detach(),
                e.detach(),
                rtol=relative,
                atol=relative * largest,
                equal_nan=True,
                msg=lambda text, name=name: f"{layer._name()}: Expected {name}; got: {text}",  # type: ignore[misc]
            )


def _largest(x: Tensor) -> float:
    """Return the size of the largest finite element."""
    sizes = x.detach().to(torch.complex128 if x.is_complex() else torch.float64).abs()
    return sizes.nan_to_num(0, 0, 0).amax().item() if x.numel() else 0.0


def _kind(value: Any) -> str:
    return f"a Tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def has_log_det(layer: InvertibleModule, inputs: Any, outputs: Any) -> bool:
    """Whether the layer maps as many values as it returns, and says that it has a log-determinant."""
    sizes = [sum(value[0].numel() for value in tuple_of(values)) for values in (inputs, outputs)]
    return layer.has_log_det() and sizes[0] == sizes[1]


def flat(outputs: Any, log_det: Tensor) -> tuple[Any, ...]:
    """Return outputs and log-determinant as one tuple."""
    return *tuple_of(outputs), log_det


def check_log_det(layer: InvertibleModule, x: Tensor, log_det: Any) -> None:
    """Assert the shape (B,) and the dtype of a log-determinant at ``x``."""
    expect(isinstance(log_det, Tensor), layer, "the log-determinant to be a Tensor", type(log_det).__name__)
    what, dtype = f"the log-determinant to have shape ({len(x)},)", log_det_dtype(x)
    expect(log_det.shape == (len(x),), layer, what, tuple(log_det.shape))
    expect(log_det.dtype == dtype, layer, f"the log-determinant to be {dtype}", log_det.dtype)
