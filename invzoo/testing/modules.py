"""Assertions on a layer as a module: what it does to its inputs, to copies and files, and how it trains."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..engine import Mode, tuple_of
from ..module import InvertibleModule, mode
from .running import assert_near, assertion, calls, clones, expect, has_log_det, leaves, named, seed
from .values import assert_log_det, assert_round_trip

__all__ = ["assert_inputs_unchanged", "assert_portable", "assert_trainable"]


@assertion
def assert_inputs_unchanged(layer: InvertibleModule, *inputs: Tensor, **side: Any) -> None:
    """Assert that no call writes into what it is given: neither forward, inverse, log-determinants nor backward.

    It tries tensors with gradients and without, strided ones, and channels-last images, in every mode, and wants the
    same values of each.
    """
    outputs = tuple_of(copy.deepcopy(layer)(*inputs, **side))
    log_det = has_log_det(layer, inputs, outputs)
    images = any(value.ndim in {4, 5} for value in (*inputs, *outputs))
    forms = {form: make for form, make in _FORMS.items() if images or form != "channels-last"}
    for inverted, given in ((False, inputs), (True, clones(outputs))):
        for value in Mode:
            for name in calls(layer, log_det):
                expected: Any = None
                for form, make in forms.items():
                    fresh = copy.deepcopy(layer)
                    with mode(fresh, value):
                        run = calls(fresh.inv if inverted else fresh, True)[name]
                        where = f"{'inv.' * inverted}{name} on {form} inputs in mode {value}"
                        got = _watch(fresh, run, where, tuple(map(make, given)), {n: make(s) for n, s in side.items()})
                    expected = got if expected is None else expected
                    assert_near(layer, f"output of {where} to be that of other forms", got, expected)


def _strided(x: Any) -> Any:
    return torch.stack((x, x), -1)[..., 0] if isinstance(x, Tensor) else x


def _channels_last(x: Any) -> Any:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.clone(memory_format=formats[x.ndim]) if isinstance(x, Tensor) and x.ndim in formats else x


_FORMS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda x: clones([x])[0],
    "leaf": lambda x: leaves([x], None)[0],
    "strided": lambda x: _strided(leaves([x], None)[0]),
    "channels-last": lambda x: _channels_last(leaves([x], None)[0]),
}


def _watch(
    layer: InvertibleModule,
    run: Callable[..., tuple[Any, ...]],
    where: str,
    inputs: tuple[Any, ...],
    side: dict[str, Any],
) -> tuple[Any, ...]:
    """Run forward and backward, and see that inputs, side inputs, parameters and outputs stay what they were."""
    given = {f"input {i}": x for i, x in enumerate(inputs)} | {f"side input {n}": s for n, s in side.items()}
    given |= {f"parameter {n}": p for n, p in layer.named_parameters()}
    given = {n: t for n, t in given.items() if isinstance(t, Tensor)}
    before = _state(given)
    seed()
    outputs = run(*inputs, **side)
    given |= {f"output {i}": y for i, y in enumerate(outputs)}
    before |= _state({n: t for n, t in given.items() if n not in before})
    if any(y.requires_grad for y in outputs):
        torch.autograd.backward([y.abs().sum() for y in outputs if y.requires_grad])
    for name, tensor in given.items():
        version, requires_grad, values = before[name]
        what = f"{name} of {where} to be left alone"
        expect(tensor._version == version, layer, what, "a write into it")
        expect(tensor.requires_grad == requires_grad, layer, what, f"requires_grad={tensor.requires_grad}")
        expect(torch.equal(tensor, values), layer, what, "other values")
    return tuple(y.detach().clone() for y in outputs)


def _state(tensors: dict[str, Tensor]) -> dict[str, tuple[int, bool, Tensor]]:
    return {name: (tensor._version, tensor.requires_grad, tensor.detach().clone()) for name, tensor in tensors.items()}


@assertion
def assert_portable(layer: InvertibleModule, *inputs: Tensor, **side: Any) -> None:
    """Assert that the layer can be printed, copied, pickled, saved and loaded, and then does the same to the bit."""
    expect(type(layer).__name__ in repr(layer), layer, "the class's name in the repr", repr(layer))
    expected = _outputs(copy.deepcopy(layer), inputs, side)
    for way, other in _travels(layer):
        got = _outputs(other, inputs, side)
        assert_near(layer, f"output after {way} to be that before", got, expected, 0.0)


def _outputs(layer: InvertibleModule, inputs: tuple[Tensor, ...], side: dict[str, Any]) -> tuple[Any, ...]:
    seed()
    outputs = tuple_of(layer(*inputs, **side))
    return *outputs, *tuple_of(layer.inverse(*clones(outputs), **side))


def _travels(layer: InvertibleModule) -> Iterator[tuple[str, InvertibleModule]]:
    yield "deepcopy", copy.deepcopy(layer)
    yield "pickle", pickle.loads(pickle.dumps(layer))  # noqa: S301 - what it has just made
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = _elsewhere(layer)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    yield "loading its state", other


def _elsewhere(layer: InvertibleModule) -> InvertibleModule:
    """Copy a layer, and move its parameters and the buffers of its state, so that a state has to bring them back."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for value in (*other.parameters(), *other.state_dict().values()):
            if value.is_floating_point() or value.is_complex():
                value.add_(torch.randn_like(value))
            else:
                value.zero_()
    return other


@assertion
def assert_trainable(
    layer: InvertibleModule, *inputs: Tensor, trained_tolerance: float = 1e-7, steps: int = 20, **side: Any
) -> None:
    """Assert that 20 steps of Adam from perturbed parameters, in float64, leave inverse and log-determinant right.

    Args:
        layer: the layer.
        inputs: inside its domain.
        trained_tolerance: the relative error allowed in the inverse and the log-determinant.
        steps: how many.
        side: the side inputs.
    """
    layer, given = layer.double(), clones(inputs, torch.float64)
    sides = named(clones, side, torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    log_det = has_log_det(layer, given, copy.deepcopy(layer)(*given, **sides))
    if any(p.requires_grad for p in layer.parameters()):
        _train(layer, given, sides, log_det, steps)
    assert_round_trip(layer, *given, round_trip_tolerance=trained_tolerance, **sides)
    assert_log_det(layer, *given, log_det_tolerance=trained_tolerance, **sides)


def _train(
    layer: InvertibleModule, inputs: tuple[Tensor, ...], side: dict[str, Any], log_det: bool, steps: int
) -> None:
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(steps):
        outputs = calls(layer, log_det)["forward_and_log_det" if log_det else "forward"](*inputs, **side)
        loss = sum(y.abs().square().mean() for y in outputs[: -1 if log_det else None])
        optimizer.zero_grad()
        (loss - 0.1 * outputs[-1].mean() if log_det else loss).backward()
        for name, parameter in layer.named_parameters():
            finite = parameter.grad is None or bool(parameter.grad.isfinite().all())
            expect(finite, layer, f"a finite gradient of {name}", parameter.grad)
        optimizer.step()
