"""What the assertions have in common: copies to run on, comparisons, and messages that name the layer."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..engine import tuple_of
from ..log_dets import log_det_dtype
from ..module import InvertibleModule

__all__ = [
    "Assertion",
    "assert_near",
    "assertion",
    "calls",
    "check_log_det",
    "clones",
    "expect",
    "flat",
    "has_log_det",
    "leaves",
    "named",
    "seed",
    "shapes",
    "to_dtype",
    "tolerance_of",
]

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Assertion(Protocol):
    """``assertion(layer, *inputs, **side)``; its options are keyword arguments too."""

    __name__: str
    __doc__: str | None
    options: frozenset[str]

    def __call__(self, layer: InvertibleModule, *inputs: Tensor, **side: Any) -> None: ...


def assertion(function: Callable[..., None]) -> Assertion:
    """Let an assertion work on copies, from a random state of its own, and fail with the layer's name."""
    parameters = inspect.signature(function).parameters.values()
    options = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    @functools.wraps(function)
    def run(layer: InvertibleModule, *inputs: Tensor, **arguments: Any) -> None:
        if not isinstance(layer, InvertibleModule):
            raise TypeError(f"{function.__name__}: Expected layer to be an InvertibleModule; got {layer!r}")
        values = [value for value in (*inputs, *arguments.values()) if isinstance(value, Tensor)]
        if not inputs or not all(isinstance(x, Tensor) and x.ndim and len(x) for x in inputs):
            raise TypeError(f"{function.__name__}: Expected inputs to be Tensors with a batch dim; got {inputs!r}")
        devices = {value.device for value in values if value.is_cuda}
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            seed()
            copies = {name: _copy(value) for name, value in arguments.items()}
            try:
                function(copy.deepcopy(layer), *map(_copy, inputs), **copies)
            except AssertionError as error:
                error.add_note(f"in {function.__name__} of {layer}")
                raise
            except Exception as error:
                words = (
                    f"{layer._name()}: Expected no error in {function.__name__}; got {type(error).__name__}: {error}"
                )
                raise AssertionError(words) from error

    run.options = options  # type: ignore[attr-defined]
    return cast("Assertion", run)


def seed() -> None:
    """Start torch's generator of the CPU again; :func:`assertion` keeps the caller's state."""
    torch.default_generator.manual_seed(0)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def clones(values: Iterable[Any], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Copy the tensors, the floating ones in another dtype if one is given."""
    return tuple(to_dtype(_copy(value), dtype) for value in values)


def to_dtype(value: Any, dtype: torch.dtype | None) -> Any:
    """Change the dtype of a floating tensor, of a complex one to the complex dtype of that precision."""
    if dtype is None or (isinstance(value, Tensor) and not _floats(value)):
        return value
    if isinstance(value, Tensor):
        return value.to(dtype.to_complex() if value.is_complex() else dtype)
    return value


def leaves(values: Iterable[Any], dtype: torch.dtype | None = torch.float64) -> tuple[Any, ...]:
    """Copy the tensors as leaves that require gradients, in float64 unless told otherwise."""
    return tuple(
        value.requires_grad_() if isinstance(value, Tensor) and _floats(value) else value
        for value in clones(values, dtype)
    )


def named(
    copies: Callable[..., tuple[Any, ...]], side: Mapping[str, Any], dtype: torch.dtype | None = torch.float64
) -> dict[str, Any]:
    """Make :func:`clones` or :func:`leaves` of side inputs."""
    return dict(zip(side, copies(side.values(), dtype), strict=True))


def _floats(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


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


def calls(layer: InvertibleModule, log_det: bool) -> Mapping[str, Callable[..., tuple[Any, ...]]]:
    """Return, by name, the calls of a layer that backward can go through; each returns a flat tuple."""
    named: dict[str, Callable[..., tuple[Any, ...]]] = {"forward": lambda *x, **side: tuple_of(layer(*x, **side))}
    if log_det:
        named["forward_and_log_det"] = lambda *x, **side: flat(*layer.forward_and_log_det(*x, **side))
    return named


def flat(outputs: Any, log_det: Tensor) -> tuple[Any, ...]:
    """Return outputs and log-determinant as one tuple."""
    return *tuple_of(outputs), log_det


def check_log_det(layer: InvertibleModule, x: Tensor, log_det: Any) -> None:
    """Assert the shape (B,) and the dtype of a log-determinant at ``x``."""
    expect(isinstance(log_det, Tensor), layer, "the log-determinant to be a Tensor", type(log_det).__name__)
    what, dtype = f"the log-determinant to have shape ({len(x)},)", log_det_dtype(x)
    expect(log_det.shape == (len(x),), layer, what, tuple(log_det.shape))
    expect(log_det.dtype == dtype, layer, f"the log-determinant to be {dtype}", log_det.dtype)
