"""Assertions on what a layer's modes do: the same to every gradient, and to memory what they promise."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Mode, tuple_of
from ..module import InvertibleModule, mode
from .memory import track_memory
from .running import Call, assert_near, assertion, clones, expect, leaf, seed

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
    call = Call(layer, inputs, side).to(torch.float64)
    outputs = call.anew().run()
    for one in (*call.kinds(outputs), *call.back(outputs).kinds(inputs)):
        given = one.each(leaf)
        expected = _run(given, Mode.store)
        for value in Mode:
            for what, values in _run(given, value).items():
                words = f"{what} of {one} in mode {value} to be that of mode store"
                assert_near(layer, words, values, expected[what], modes_tolerance)


def _run(call: Call, value: Mode) -> dict[str, Any]:
    call = call.anew()
    _trust(call.layer)
    seed()
    with mode(call.layer, value):
        outputs = call.run()
        wanted = {n: t for n, t in call.tensors().items() if t.requires_grad}
        gradients = torch.autograd.grad(_loss(outputs), [*wanted.values()], allow_unused=True)
    found = {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}
    buffers = {f"buffer {n}": b for n, b in call.layer.named_buffers()}
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
    call = Call(layer, inputs, side)
    outputs = call.run()
    pair = 2 * kept_bytes if kept_bytes is not None else 0
    if kept_bytes is None and (layer.saturating or layer.slow_inverse):
        pair = sum(value.untyped_storage().nbytes() for value in (*inputs, *clones(outputs)))
    for one in call.kinds(outputs):
        grown = _growth(one, Mode.invert)
        most = f"at most {2 * pair} bytes in mode invert"
        expect(grown <= 2 * pair, layer, f"4 more calls of {one} to keep {most}", grown)
    if not pair and _saves(call):
        stored = _growth(call, Mode.store)
        expect(stored > 0, layer, "4 more calls of forward to keep more than 0 bytes in mode store", stored)


def _growth(call: Call, value: Mode) -> int:
    """Count the bytes that a chain of the layer and its inverse in turn holds after 8 calls more than after 4."""
    layers = [copy.deepcopy(call.layer) for _ in range(8)]
    call, total = call.each(leaf), torch.zeros(())
    held = []
    with track_memory(include=[*layers, *call.tensors().values()]) as memory:
        for layer in layers:
            with mode(layer, value):
                values = replace(call, layer=layer).run()
            if call.log_det:
                total, values = total + values[-1], values[:-1]
            call = call.back(values)
            held.append(memory.current)
    return held[7] - held[3]


def _saves(call: Call) -> bool:
    """Whether autograd saves anything of a pair of calls that nobody else holds."""
    call, layer = call.each(leaf), call.layer
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with mode(layer, Mode.store), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = tuple_of(layer.inverse(*tuple_of(layer.function(*call.inputs, **call.side)), **call.side))
    known = [*call.tensors().values(), *layer.buffers(), *outputs]
    held = {t.untyped_storage().data_ptr() for t in known if isinstance(t, Tensor)}
    return any(t.untyped_storage().data_ptr() not in held for t in saved if t.numel())
