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
from .running import Call, assert_near, assertion, clone, clones, expect, leaf, seed
from .values import assert_log_det, assert_round_trip

__all__ = ["assert_inputs_unchanged", "assert_portable", "assert_trainable"]


@assertion
def assert_inputs_unchanged(layer: InvertibleModule, *inputs: Tensor, **side: Any) -> None:
    """Assert that no call writes into what it is given: neither forward, inverse, log-determinants nor backward.

    It tries tensors with gradients and without, strided ones, and channels-last images, in every mode, and wants the
    same values of each.
    """
    call = Call(layer, inputs, side)
    outputs = call.anew().run()
    images = any(value.ndim in {4, 5} for value in (*inputs, *outputs))
    forms = {form: make for form, make in _FORMS.items() if images or form != "channels-last"}
    for one in (*call.kinds(outputs), *call.back(clones(outputs)).kinds(inputs)):
        for value in Mode:
            expected: Any = None
            for form, make in forms.items():
                where = f"{one} on {form} inputs in mode {value}"
                got = _watch(one.anew().each(make), value, where)
                expected = got if expected is None else expected
                assert_near(layer, f"output of {where} to be that of other forms", got, expected)


def _strided(x: Any) -> Any:
    return torch.stack((x, x), -1)[..., 0] if isinstance(x, Tensor) else x


def _channels_last(x: Any) -> Any:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.clone(memory_format=formats[x.ndim]) if isinstance(x, Tensor) and x.ndim in formats else x


_FORMS: dict[str, Callable[[Any], Any]] = {
    "plain": clone,
    "leaf": leaf,
    "strided": lambda x: _strided(leaf(x)),
    "channels-last": lambda x: _channels_last(leaf(x)),
}


def _watch(call: Call, value: Mode, where: str) -> tuple[Any, ...]:
    """Run forward and backward, and see that inputs, side inputs, parameters and outputs stay what they were."""
    given = call.tensors()
    before = _state(given)
    seed()
    with mode(call.layer, value):
        outputs = call.run()
        given |= {f"output {i}": y for i, y in enumerate(outputs)}
        before |= _state({n: t for n, t in given.items() if n not in before})
        if any(y.requires_grad for y in outputs):
            torch.autograd.backward([y.abs().sum() for y in outputs if y.requires_grad])
    for what, tensor in given.items():
        version, requires_grad, values = before[what]
        alone = f"{what} of {where} to be left alone"
        expect(tensor._version == version, call.layer, alone, "a write into it")
        expect(tensor.requires_grad == requires_grad, call.layer, alone, f"requires_grad={tensor.requires_grad}")
        expect(torch.equal(tensor, values), call.layer, alone, "other values")
    return clones(outputs)


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
    call = Call(layer, inputs, side).to(torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    call = call.kinds(call.anew().run())[-1]
    if any(p.requires_grad for p in layer.parameters()):
        _train(call, steps)
    assert_round_trip(layer, *call.inputs, round_trip_tolerance=trained_tolerance, **call.side)
    assert_log_det(layer, *call.inputs, log_det_tolerance=trained_tolerance, **call.side)


def _train(call: Call, steps: int) -> None:
    optimizer = torch.optim.Adam(call.layer.parameters(), lr=1e-2)
    for _ in range(steps):
        *outputs, log_det = call.run() if call.log_det else (*call.run(), torch.zeros(()))
        loss = sum(y.abs().square().mean() for y in outputs) - 0.1 * log_det.mean()
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in call.layer.named_parameters():
            finite = parameter.grad is None or bool(parameter.grad.isfinite().all())
            expect(finite, call.layer, f"a finite gradient of {name}", parameter.grad)
        optimizer.step()
