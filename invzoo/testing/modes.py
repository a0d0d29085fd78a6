"""Assertions on what a layer's modes do: the same to every gradient, and to memory what they promise."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Mode, tuple_of
from ..module import InvertibleModule, mode
from .memory import track_memory
from .running import assert_near, assertion, calls, clones, expect, has_log_det, leaves, named, seed

__all__ = ["assert_memory", "assert_modes_agree"]


@assertion
def assert_modes_agree(layer: InvertibleModule, *inputs: Tensor, modes_tolerance: float = 1e-9, **side: Any) -> None:
    """Assert that outputs, gradients and buffers are the same in every mode, in float64, both ways.

    For ``forward`` and ``forward_and_log_det``; gradients are those of inputs, side inputs and every parameter, of a
    loss that weighs every output of every sample differently. Called again in mode ``store``, a layer does the same.

    Args:
        layer: the layer.
        inputs: inside its domain.
        modes_tolerance: the relative error allowed.
        side: the side inputs.
    """
    layer, sides = layer.double(), named(leaves, side)
    outputs = tuple_of(copy.deepcopy(layer)(*clones(inputs, torch.float64), **sides))
    log_det = has_log_det(layer, inputs, outputs)
    for inverted, given in ((False, leaves(inputs)), (True, leaves(outputs))):
        for name in calls(layer, log_det):
            expected = _run(layer, Mode.store, name, inverted, given, sides)
            for value in Mode:
                actual = _run(layer, value, name, inverted, given, sides)
                for what, values in actual.items():
                    words = f"{what} of {'inv.' * inverted}{name} in mode {value} to be that of mode store"
                    assert_near(layer, words, values, expected[what], modes_tolerance)


def _run(
    layer: InvertibleModule, value: Mode, name: str, inverted: bool, inputs: tuple[Tensor, ...], side: dict[str, Any]
) -> dict[str, Any]:
    layer = copy.deepcopy(layer)
    _trust(layer)
    seed()
    with mode(layer, value):
        outputs = calls(layer.inv if inverted else layer, True)[name](*inputs, **side)
        wanted = {f"input {i}": x for i, x in enumerate(inputs)} | {f"side input {n}": s for n, s in side.items()}
        wanted |= {f"parameter {n}": p for n, p in layer.named_parameters()}
        wanted = {n: t for n, t in wanted.items() if isinstance(t, Tensor) and t.requires_grad}
        gradients = torch.autograd.grad(_loss(outputs), [*wanted.values()], allow_unused=True)
    found = {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}
    buffers = {f"buffer {n}": b for n, b in layer.named_buffers()}
    return {"output": clones(outputs), **found, **buffers}


def _trust(layer: nn.Module) -> None:
    """Leave comparisons to the assertion."""
    for module in layer.modules():
        if isinstance(module, InvertibleModule):
            module._policy.check = "never"


def _loss(outputs: Sequence[Tensor]) -> Tensor:
    """Weigh every number of every output differently."""
    return sum(  # type: ignore[return-value]
        (y.abs() if y.is_complex() else y)
        .mul(torch.linspace(0.5, 1.7, y.numel()).reshape(y.shape).cos().to(y.device))
        .sum()
        for y in outputs
        if y.requires_grad
    )


@assertion
def assert_memory(layer: InvertibleModule, *inputs: Tensor, kept_bytes: int | None = None, **side: Any) -> None:
    """Assert, to the byte, that in mode ``invert`` a chain of 8 calls holds no more than one of 4.

    The chain is the layer and its inverse in turn. Mode ``store`` must hold more, if autograd saves anything at all.

    Args:
        layer: the layer.
        inputs: inside its domain.
        kept_bytes: what each call may keep; by default its inputs if the layer is ``saturating`` or has a
            ``slow_inverse``, and else nothing.
        side: the side inputs.
    """
    _trust(layer)
    outputs = tuple_of(layer(*inputs, **side))
    pair = 2 * kept_bytes if kept_bytes is not None else 0
    if kept_bytes is None and (layer.saturating or layer.slow_inverse):
        pair = sum(value.untyped_storage().nbytes() for value in (*inputs, *clones(outputs)))
    for name in calls(layer, has_log_det(layer, inputs, outputs)):
        grown = _growth(layer, Mode.invert, name, inputs, side)
        expect(
            grown <= 2 * pair, layer, f"4 more calls of {name} to keep at most {2 * pair} bytes in mode invert", grown
        )
    if not pair and _saves(layer, inputs, side):
        stored = _growth(layer, Mode.store, "forward", inputs, side)
        expect(stored > 0, layer, "4 more calls of forward to keep more than 0 bytes in mode store", stored)


def _growth(layer: InvertibleModule, value: Mode, name: str, inputs: tuple[Tensor, ...], side: dict[str, Any]) -> int:
    """Count the bytes that a chain of the layer and its inverse in turn holds after 8 calls more than after 4."""
    layers = [copy.deepcopy(layer) for _ in range(8)]
    values, sides, total = leaves(inputs, None), named(leaves, side, None), torch.zeros(())
    held = []
    with track_memory(include=[*layers, *(t for t in (*values, *sides.values()) if isinstance(t, Tensor))]) as memory:
        for index, one in enumerate(layers):
            with mode(one, value):
                values = calls(one.inv if index % 2 else one, True)[name](*values, **sides)
            if name != "forward":
                total, values = total + values[-1], values[:-1]
            held.append(memory.current)
    return held[7] - held[3]


def _saves(layer: InvertibleModule, inputs: tuple[Tensor, ...], side: dict[str, Any]) -> bool:
    """Whether autograd saves anything of a pair of calls that nobody else holds."""
    given, sides = leaves(inputs, None), named(leaves, side, None)
    known = [*given, *sides.values(), *layer.parameters(), *layer.buffers()]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with mode(layer, Mode.store), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = tuple_of(layer.inverse(*tuple_of(layer.function(*given, **sides)), **sides))
    held = {t.untyped_storage().data_ptr() for t in (*known, *outputs) if isinstance(t, Tensor)}
    return any(t.untyped_storage().data_ptr() not in held for t in saved if t.numel())
