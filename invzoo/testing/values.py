"""Assertions on what a layer computes: inverse, log-determinant and derivatives, in every dtype and batch."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..domains import of_each
from ..engine import tuple_of
from ..module import InvertibleModule, mode
from .running import (
    assert_near,
    assertion,
    check_log_det,
    clones,
    expect,
    flat,
    has_log_det,
    leaves,
    named,
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
    for inverse in (layer.inverse, layer.inv):
        back = tuple_of(inverse(*clones(outputs), **side))
        assert_near(layer, "the inverse to return the inputs", back, inputs, 0.0 if layer.exact else tolerance)
    with torch.no_grad():
        again = layer(*back, **side)
    assert_near(layer, "the output of the inverse to be the output", again, outputs, 0.0 if layer.exact else tolerance)


def _check_domain(layer: InvertibleModule, what: str, domain: Any, values: tuple[Any, ...]) -> None:
    for one, value in zip(of_each(domain, len(values)), values, strict=True):
        expect(bool(one.check(value.detach()).all()), layer, f"{what}, {one}", f"{value.min()} to {value.max()}")


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
    layer, inputs, side = _in_float64(layer, inputs, side)
    outputs = tuple_of(layer(*clones(inputs), **side))
    if not has_log_det(layer, inputs, outputs):
        _assert_refuses(layer, inputs, side)
        return
    y, log_det = layer.forward_and_log_det(*clones(inputs), **side)
    check_log_det(layer, inputs[0], log_det)
    assert_near(layer, "the output beside the log-determinant to be that of forward", y, outputs)
    expected = jacobian_log_det(layer, inputs, side)
    found = [log_det, layer.log_det(*clones(inputs), **side)]
    for value in found:
        assert_near(layer, "the log-determinant to be that of autograd's Jacobian", value, expected, log_det_tolerance)
    x, inverse_log_det = layer.inverse_and_log_det(*clones(outputs), **side)
    check_log_det(layer, outputs[0], inverse_log_det)
    assert_near(
        layer,
        "the inverse beside its log-determinant to be that of inverse",
        x,
        layer.inverse(*clones(outputs), **side),
    )
    expected = jacobian_log_det(layer.inv, outputs, side)
    assert_near(
        layer,
        "the inverse's log-determinant to be that of autograd's Jacobian",
        inverse_log_det,
        expected,
        log_det_tolerance,
    )
    if layer.domain is torch.distributions.constraints.real:
        _assert_finite_far_out(layer, inputs, side, largest)


def _in_float64(
    layer: InvertibleModule, inputs: tuple[Tensor, ...], side: dict[str, Any]
) -> tuple[InvertibleModule, tuple[Tensor, ...], dict[str, Any]]:
    wide = named(clones, side, torch.float64)
    return layer.double(), clones(inputs, torch.float64), wide


def _assert_refuses(layer: InvertibleModule, inputs: tuple[Tensor, ...], side: dict[str, Any]) -> None:
    names = {type(module).__name__ for module in layer.modules()}
    try:
        layer.forward_and_log_det(*inputs, **side)
    except TypeError as error:
        expect(any(name in str(error) for name in names), layer, "a TypeError that names the layer", error)
    else:
        expect(False, layer, "a TypeError, since it has no log-determinant", "one")


def _assert_finite_far_out(
    layer: InvertibleModule, inputs: tuple[Tensor, ...], side: dict[str, Any], largest: float
) -> None:
    far = tuple(x * (largest / x.abs().max().clamp_min(1e-9)) for x in inputs)
    log_det = layer.forward_and_log_det(*far, **side)[1]
    expect(bool(log_det.isfinite().all()), layer, f"finite log-determinants at inputs up to {largest}", log_det)
    narrow = named(clones, side, torch.float32)
    low = layer.float().forward_and_log_det(*clones(far, torch.float32), **narrow)[1]
    assert_near(
        layer,
        f"the float32 log-determinant at inputs up to {largest} to be that in float64",
        low.double(),
        log_det,
        1e-3,
    )


def jacobian_log_det(layer: InvertibleModule, inputs: tuple[Tensor, ...], side: dict[str, Any]) -> Tensor:
    """Compute log abs det of the Jacobian of each sample, row by row."""
    wanted = leaves(inputs)
    with mode(layer, "store"):
        outputs = tuple_of(layer(*wanted, **side))
    values = torch.cat([_flatten(y) for y in outputs], 1)
    rows = [
        torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
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
    layer, inputs, side = _in_float64(layer, inputs, side)
    outputs = tuple_of(layer(*inputs, **side))
    log_det = has_log_det(layer, inputs, outputs)
    _check_derivatives(layer, leaves(inputs), named(leaves, side), log_det)
    if sum(x.numel() for x in inputs) == sum(y.numel() for y in outputs):
        _check_derivatives(layer.inv, leaves(outputs), named(leaves, side), log_det)


def _check_derivatives(
    layer: InvertibleModule, inputs: tuple[Tensor, ...], side: dict[str, Any], log_det: bool
) -> None:
    wanted = [*inputs, *side.values(), *layer.parameters()]
    tensors = tuple(t for t in wanted if isinstance(t, Tensor) and t.requires_grad)

    def run(*_: Tensor) -> tuple[Tensor, ...]:  # gradcheck moves the tensors themselves
        seed()
        if log_det:
            return flat(*layer.forward_and_log_det(*inputs, **side))
        return tuple_of(layer(*inputs, **side))

    def run_with_graphs(*_: Tensor) -> tuple[Tensor, ...]:  # gradcheck leaves out outputs without one
        nothing = sum(0 * t.real.sum() if t.is_complex() else 0 * t.sum() for t in tensors)
        return tuple(y + nothing if y.is_floating_point() and not y.requires_grad else y for y in run())

    torch.autograd.gradcheck(run_with_graphs, tensors, fast_mode=True)
    _check_second_derivatives(layer, run, tensors)


def _check_second_derivatives(
    layer: InvertibleModule, run: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]
) -> None:
    """Compare along one random direction of all tensors at once: `gradgradcheck` runs the layer for each of them."""
    weights = leaves(torch.randn_like(y) for y in run() if y.requires_grad)
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
        there = layer.to(dtype)
        narrow = named(clones, side, dtype)
        given = clones(inputs, dtype)
        outputs = tuple_of(there(*given, **narrow))
        _assert_like_float64(there, given, narrow, outputs, dtype)
        back = tuple_of(there.inverse(*outputs, **narrow))
        _assert_like_float64(there.inv, clones(outputs), narrow, back, dtype)
        if not layer.saturating:
            assert_near(layer, f"the {dtype} inverse to return the inputs", back, given)


def _assert_like_float64(
    layer: InvertibleModule,
    inputs: tuple[Tensor, ...],
    side: dict[str, Any],
    outputs: tuple[Any, ...],
    dtype: torch.dtype,
) -> None:
    for x, y in zip(inputs[:1] * len(outputs), outputs, strict=True):
        expect(y.dtype == x.dtype, layer, f"outputs of dtype {x.dtype}", y.dtype)
        expect(bool(y.isfinite().all()), layer, f"finite outputs in {dtype}", y)
    wide, wide_inputs, wide_side = _in_float64(copy.deepcopy(layer), inputs, side)
    exact = tuple_of(wide(*wide_inputs, **wide_side))
    tolerance = tolerance_of(*inputs)
    assert_near(layer, f"the {dtype} output to be that in float64", clones(outputs, torch.float64), exact, tolerance)
    if has_log_det(layer, inputs, outputs):
        log_det = layer.forward_and_log_det(*inputs, **side)[1]
        check_log_det(layer, inputs[0], log_det)
        expected = wide.forward_and_log_det(*wide_inputs, **wide_side)[1]
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
    layer, inputs, side = _in_float64(layer, inputs, side)
    outputs = tuple_of(layer(*inputs, **side))
    for module, given in ((layer, inputs), (layer.inv, outputs)):
        log_det = has_log_det(layer, inputs, outputs)
        whole = _run_batch(module, given, side, log_det, slice(None))
        for size in batch_sizes:
            part = _run_batch(module, given, side, log_det, slice(-size, None) if size else slice(0, 0))
            for what, values in part.items():
                expected = tuple(y[len(y) - size :] for y in whole[what])
                wanted, got = shapes(expected), shapes(values)
                expect(got == wanted, module, f"{what} of shapes {wanted}", got)
                if independent_samples:
                    words = f"the {what} of a batch of {size} to be those in a larger one"
                    assert_near(module, words, values, expected)


def _run_batch(
    layer: InvertibleModule, inputs: tuple[Tensor, ...], side: dict[str, Any], log_det: bool, part: slice
) -> dict[str, tuple[Tensor, ...]]:
    batch = len(inputs[0])
    cut: Callable[[Any], Any] = lambda v: v[part] if isinstance(v, Tensor) and v.ndim and len(v) == batch else v  # noqa: E731
    given, sides = leaves(cut(x) for x in inputs), {name: cut(value) for name, value in side.items()}
    outputs = flat(*layer.forward_and_log_det(*given, **sides)) if log_det else tuple_of(layer(*given, **sides))
    gradients = torch.autograd.grad(sum(y.abs().sum() for y in outputs), given, allow_unused=True)
    used = all(gradient is not None for gradient in gradients)
    expect(used, layer, f"gradients of all inputs of shapes {shapes(given)}", gradients)
    return {"outputs": tuple(y.detach() for y in outputs), "gradients": gradients}
