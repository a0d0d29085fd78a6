"""Assertions on what a layer computes: inverse, log-determinant and derivatives, in every dtype and batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..domains import of_each
from ..engine import tuple_of
from ..module import InvertibleModule, mode
from .running import (
    Call,
    assert_near,
    assertion,
    check_log_det,
    clone,
    clones,
    expect,
    has_log_det,
    leaf,
    seed,
    shapes,
    tolerance_of,
)

__all__ = ["assert_batch_sizes", "assert_dtypes", "assert_gradients", "assert_log_det", "assert_round_trip"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@assertion
def assert_round_trip(
    layer: InvertibleModule, *inputs: Tensor, round_trip_tolerance: float | None = None, **side: Any
) -> None:
    """Assert that x -> y -> x and y -> x -> y, with the layer's values inside its domain and codomain.

    Args:
        layer: the layer.
        inputs: inside its domain.
        round_trip_tolerance: the relative error allowed; by default that of the inputs' dtype.
        side: the side inputs.
    """
    outputs = tuple_of(layer(*clones(inputs), **side))
    _check_domain(layer, "inputs in its domain", layer.domain, inputs)
    _check_domain(layer, "outputs in its codomain", layer.codomain, outputs)
    tolerance = round_trip_tolerance or tolerance_of(*inputs, *outputs, *layer.parameters(), *layer.buffers())
    tolerance = 0.0 if layer.exact else tolerance
    for inverse in (layer.inverse, layer.inv):
        back = tuple_of(inverse(*clones(outputs), **side))
        assert_near(layer, "the inverse to return the inputs", back, inputs, tolerance)
    with torch.no_grad():
        again = layer(*back, **side)
    assert_near(layer, "the output of the inverse to be the output", again, outputs, tolerance)


def _check_domain(layer: InvertibleModule, what: str, domain: Any, values: tuple[Any, ...]) -> None:
    for one, value in zip(of_each(domain, len(values)), values, strict=True):
        if not one.check(value.detach()).all():
            expect(False, layer, f"{what}, {one}", f"{value.min()} to {value.max()}")


@assertion
def assert_log_det(
    layer: InvertibleModule, *inputs: Tensor, largest: float = 100.0, log_det_tolerance: float = 1e-9, **side: Any
) -> None:
    """Assert that all log-determinants are those of autograd's Jacobians, in float64, and finite at large inputs.

    A layer that defines none, or maps to another number of values, must raise a TypeError that names it.

    Args:
        layer: the layer.
        inputs: inside its domain.
        largest: the size of inputs, in a layer that takes any real ones, up to which log-determinants are finite.
        log_det_tolerance: the relative error allowed.
        side: the side inputs.
    """
    call = Call(layer, inputs, side).to(torch.float64)
    outputs = call.each(clone).run()
    if not has_log_det(layer, inputs, outputs):
        _assert_refuses(replace(call, log_det=True))
        return
    for one, whose in ((call, "the"), (call.back(outputs), "the inverse's")):
        *values, log_det = replace(one, log_det=True).each(clone).run()
        check_log_det(layer, one.inputs[0], log_det)
        assert_near(layer, f"{whose} output beside a log-determinant to be that without", values, one.each(clone).run())
        expected = jacobian_log_det(one)
        for value in (log_det, one.module.log_det(*clones(one.inputs), **call.side)):
            words = f"{whose} log-determinant to be that of autograd's Jacobian"
            assert_near(layer, words, value, expected, log_det_tolerance)
    if layer.domain is torch.distributions.constraints.real:
        _assert_finite_far_out(replace(call, log_det=True), largest)


def _assert_refuses(call: Call) -> None:
    names = {type(module).__name__ for module in call.layer.modules()}
    try:
        call.run()
    except TypeError as error:
        expect(any(name in str(error) for name in names), call.layer, "a TypeError that names the layer", error)
    else:
        expect(False, call.layer, "a TypeError, since it has no log-determinant", "one")


def _assert_finite_far_out(call: Call, largest: float) -> None:
    layer = call.layer
    far = replace(call, inputs=tuple(x * (largest / x.abs().max().clamp_min(1e-9)) for x in call.inputs))
    log_det = far.run()[-1]
    expect(bool(log_det.isfinite().all()), layer, f"finite log-determinants at inputs up to {largest}", log_det)
    low = far.to(torch.float32).run()[-1]
    words = f"the float32 log-determinant at inputs up to {largest} to be that in float64"
    assert_near(layer, words, low.double(), log_det, 1e-3)


def jacobian_log_det(call: Call) -> Tensor:
    """Compute log abs det of the Jacobian of each sample, row by row."""
    call = call.each(leaf)
    with mode(call.layer, "store"):
        outputs = call.run()
    values = torch.cat([_flatten(y) for y in outputs], 1)
    rows = [
        torch.autograd.grad(value, call.inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        for value in values.sum(0)
    ]
    jacobian = torch.stack([torch.cat([_flatten(g) for g in row], 1) for row in rows], 1)
    return torch.linalg.slogdet(jacobian).logabsdet


def _flatten(x: Tensor) -> Tensor:
    return (torch.view_as_real(x) if x.is_complex() else x).flatten(1)


@assertion
def assert_gradients(layer: InvertibleModule, *inputs: Tensor, **side: Any) -> None:
    """Assert that first and second derivatives are those of finite differences, in float64, both ways.

    Those of outputs and log-determinants, with respect to inputs, side inputs and parameters. The inverse of a layer
    that returns more values than it takes is left out: it inverts on the layer's range, which differences leave.
    """
    call = Call(layer, inputs, side).to(torch.float64)
    outputs = call.run()
    call = call.kinds(outputs)[-1]
    _check_derivatives(call.each(leaf))
    if sum(x.numel() for x in inputs) == sum(y.numel() for y in outputs):
        _check_derivatives(call.back(outputs).each(leaf))


def _check_derivatives(call: Call) -> None:
    tensors = tuple(t for t in call.tensors().values() if t.requires_grad)

    def run(*_: Tensor) -> tuple[Tensor, ...]:  # gradcheck moves the tensors themselves
        seed()
        return call.run()

    def run_with_graphs(*_: Tensor) -> tuple[Tensor, ...]:  # gradcheck leaves out outputs without one
        nothing = sum(0 * t.real.sum() if t.is_complex() else 0 * t.sum() for t in tensors)
        return tuple(y + nothing if y.is_floating_point() and not y.requires_grad else y for y in run())

    torch.autograd.gradcheck(run_with_graphs, tensors, fast_mode=True)
    _check_second_derivatives(call.module, run, tensors)


def _check_second_derivatives(
    layer: InvertibleModule, run: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]
) -> None:
    """Compare along one random direction of all tensors at once: `gradgradcheck` runs the layer for each of them."""
    weights = tuple(leaf(torch.randn_like(y)) for y in run() if y.requires_grad)
    moving = (*tensors, *weights)
    along, across = (tuple(map(torch.randn_like, moving)) for _ in range(2))

    def slope() -> Tensor:  # of the weighted outputs, along one direction
        outputs = [y for y in run() if y.requires_grad]
        gradients = torch.autograd.grad(outputs, tensors, weights, create_graph=True, allow_unused=True)
        return _dot(along, gradients)

    def slope_at(step: float) -> Tensor:
        with torch.no_grad():
            for tensor, direction in zip(moving, across, strict=True):
                tensor.add_(direction, alpha=step)
        return slope().detach()

    curvature = slope()
    exact = curvature * 0
    if curvature.requires_grad:
        exact = _dot(across, torch.autograd.grad(curvature, moving, allow_unused=True))
    step = 1e-5
    there, back = slope_at(step), slope_at(-2 * step)
    assert_near(layer, "second derivatives to be those of finite differences", exact, (there - back) / (2 * step), 1e-5)


def _dot(directions: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]) -> Tensor:
    pairs = [(d, g) for d, g in zip(directions, gradients, strict=False) if g is not None]
    return torch.stack([(d.conj() * g).real.sum() if g.is_complex() else (d * g).sum() for d, g in pairs]).sum()


@assertion
def assert_dtypes(
    layer: InvertibleModule, *inputs: Tensor, dtypes: tuple[torch.dtype, ...] = _DTYPES, **side: Any
) -> None:
    """Assert that the layer computes in every dtype what it does in float64, up to rounding, and keeps the dtype.

    Args:
        layer: the layer.
        inputs: inside its domain.
        dtypes: those that the layer works in.
        side: the side inputs.
    """
    for dtype in dtypes:
        call = Call(layer, inputs, side).to(dtype)
        outputs = call.run()
        _assert_like_float64(call, outputs, dtype)
        back = tuple_of(layer.inverse(*outputs, **call.side))
        _assert_like_float64(call.back(clones(outputs)), back, dtype)
        if not layer.saturating:
            assert_near(layer, f"the {dtype} inverse to return the inputs", back, call.inputs)


def _assert_like_float64(call: Call, outputs: tuple[Any, ...], dtype: torch.dtype) -> None:
    layer, (x, *_) = call.module, call.inputs
    for y in outputs:
        expect(y.dtype == x.dtype, layer, f"outputs of dtype {x.dtype}", y.dtype)
        expect(bool(y.isfinite().all()), layer, f"finite outputs in {dtype}", y)
    wide = call.anew().to(torch.float64)
    tolerance, exact = tolerance_of(*call.inputs), wide.run()
    assert_near(layer, f"the {dtype} output to be that in float64", clones(outputs, torch.float64), exact, tolerance)
    if has_log_det(layer, call.inputs, outputs):
        log_det, expected = (replace(one, log_det=True).run()[-1] for one in (call, wide))
        check_log_det(layer, x, log_det)
        assert_near(layer, f"the {dtype} log-determinant to be that in float64", log_det.double(), expected, tolerance)


@assertion
def assert_batch_sizes(
    layer: InvertibleModule,
    *inputs: Tensor,
    batch_sizes: tuple[int, ...] = (0, 1),
    independent_samples: bool = True,
    **side: Any,
) -> None:
    """Assert that the layer takes batches of any size, and that no sample's outputs or gradients depend on others.

    Args:
        layer: the layer.
        inputs: inside its domain.
        batch_sizes: sizes below that of the inputs.
        independent_samples: false for a layer that normalises over the batch.
        side: the side inputs; those whose first size is the batch's are cut as it is.
    """
    call = Call(layer, inputs, side).to(torch.float64)
    outputs = call.run()
    call = call.kinds(outputs)[-1]
    for one in (call, call.back(outputs)):
        whole = _run_batch(one, slice(None))
        for size in batch_sizes:
            part = _run_batch(one, slice(-size, None) if size else slice(0, 0))
            for what, values in part.items():
                expected = tuple(y[len(y) - size :] for y in whole[what])
                wanted, got = shapes(expected), shapes(values)
                expect(got == wanted, one.module, f"{what} of shapes {wanted}", got)
                if independent_samples:
                    words = f"the {what} of a batch of {size} to be those in a larger one"
                    assert_near(one.module, words, values, expected)


def _run_batch(call: Call, part: slice) -> dict[str, tuple[Tensor, ...]]:
    batch = len(call.inputs[0])
    call = call.each(lambda v: v[part] if isinstance(v, Tensor) and v.ndim and len(v) == batch else v)
    call = replace(call, inputs=tuple(map(leaf, call.inputs)))
    outputs = call.run()
    gradients = torch.autograd.grad(sum(y.abs().sum() for y in outputs), call.inputs, allow_unused=True)
    used = all(gradient is not None for gradient in gradients)
    expect(used, call.module, f"gradients of all inputs of shapes {shapes(call.inputs)}", gradients)
    return {"outputs": clones(outputs), "gradients": gradients}
