"""What the catalogue's assertions do not ask of every layer: vmap, compilers, autocast, depth, and what it refuses."""

import copy

import pytest
import torch
from torch.testing import assert_close

import invzoo as iz
from invzoo.engine import tuple_of
from invzoo.layers.linear.matrix import MATRICES
from invzoo.module import Composite
from invzoo.testing.running import Call
from invzoo.testing.values import jacobian_log_det
from tests.layers.helpers import perturbed

CASES = {case.name: case for case in iz.testing.cases()}
LAYERS = {name: case.layer() for name, case in CASES.items()}
DRAWS = {name for name, layer in LAYERS.items() if not layer.bijective}  # what is drawn is another each time
BATCH = {"InvertibleBatchNorm[training]"}  # samples depend on each other
WIDE = {name for name in CASES if "wide" in name}  # the inverse is a projection
STATISTICS = {name for name in CASES if "statistics" in name or "plain" in name}  # the inverse takes some of its own
STEEP = {f"Invertible{layer}[{kind}, context]" for layer in ("Linear", "Conv1x1") for kind in ("scaled", "plu", "free")}
LOOKS = {name for name in CASES if "Residual[" in name or "free, context" in name} | {"InvertibleResidual"}  # at values
LINEAR = {
    name for name in CASES if name.startswith(("InvertibleConv", "Woodbury", "Orthogonal", "Emerging", "Periodic"))
}

directions = pytest.mark.parametrize("direction", ["function", "inverse"])


def every(*but):
    return pytest.mark.parametrize("name", sorted(CASES.keys() - set().union(*but)))


def drawn(name, direction="function", dtype=torch.float64):
    """Return a case's layer, the values that it takes in a direction, and its side inputs."""
    case = CASES[name]
    layer, values, side = case.layer(dtype=dtype), case.inputs(dtype=dtype), case.side_inputs(dtype=dtype)
    if direction == "inverse":
        values = tuple(y.detach() for y in tuple_of(layer(*values, **side)))
    return layer, values, side


@every(DRAWS, BATCH, LOOKS)
@directions
def test_maps_over_samples(name, direction):
    layer, values, side = drawn(name, direction)
    run = getattr(layer, direction)

    def of_sample(values, side):
        return run(*(v[None] for v in values), **{key: v[None] for key, v in side.items()})

    got = torch.func.vmap(of_sample)(values, side)
    assert_close([y.squeeze(1) for y in tuple_of(got)], [*tuple_of(run(*values, **side))])


COMPOSITE = {name for name, layer in LAYERS.items() if isinstance(layer, Composite)}  # see test_fullgraph.py
FIRST = {entry.cases[0].name for entry in iz.testing.CATALOGUE} | {f"InvertibleLinear[{kind}]" for kind in MATRICES}


@pytest.mark.slow
@every(DRAWS, LOOKS, CASES.keys() - FIRST, COMPOSITE)
def test_compiles_without_a_break(name):
    for direction in ("function", "inverse")[: 1 if name == "Monotone" else 2]:  # which looks whether there is a root
        layer, values, side = drawn(name, direction)
        run = getattr(layer, direction)
        torch.compiler.reset()  # layers share the code of these methods, and its limit of recompilations
        assert_close(torch.compile(run, fullgraph=True, backend="eager")(*values, **side), run(*values, **side))


@every(DRAWS, BATCH)
def test_autocast_can_be_undone(name):
    layer, values, side = drawn(name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = tuple_of(layer(*values, **side))
        back = layer.inverse(*outputs, **side)
    assert {y.dtype for y in outputs} == {torch.float32}
    assert_close(tuple_of(back), values, rtol=1e-4, atol=1e-4)
    if not any(True for _ in layer.children()):  # nothing in it is autocast's business
        assert_close(outputs, tuple_of(layer(*values, **side)), rtol=0, atol=0)


@every(CASES.keys() - LINEAR)
def test_autocast_widens_what_is_multiplied(name):
    layer, values, side = drawn(name, dtype=torch.float32)
    x = values[0].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, **side)
        back = layer.inverse(y, **side)
    assert y.dtype == torch.float32
    assert_close(back, x.float(), rtol=1e-4, atol=1e-4)


@every(DRAWS, {name for name, case in CASES.items() if "assert_dtypes" in case.allowances.get("without", {})})
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_once(name, dtype):
    layer, values, side = drawn(name, dtype=dtype)
    outputs = tuple_of(layer(*values, **side))
    wide = copy.deepcopy(layer).float()(*(v.float() for v in values), **{key: v.float() for key, v in side.items()})
    eps = torch.finfo(dtype).eps
    for y, expected in zip(outputs, tuple_of(wide), strict=True):
        assert y.dtype == dtype
        assert_close(y.float(), expected, rtol=eps, atol=eps * expected.abs().max().item())


@every(DRAWS, BATCH, WIDE, STATISTICS, STEEP)
@torch.no_grad()
def test_sixteen_layers_come_back_in_float32(name):
    """Others of its kind and their inverses in turn."""
    _, values, side = drawn(name, dtype=torch.float32)
    chain = [CASES[name].layer(seed, torch.float32) for seed in range(16)]
    chain = [layer.inv if i % 2 else layer for i, layer in enumerate(chain)]
    x = values
    for layer in chain:
        x = tuple_of(layer(*x, **side))
    for layer in reversed(chain):
        x = tuple_of(layer.inverse(*x, **side))
    assert_close(x, values, rtol=0, atol=1e-4)


# Orders that are given are saved with indices, and the transforms of the DCT with its factors.
PLAIN = [name for name, layer in LAYERS.items() if layer.exact and not name.startswith(("Permute", "Shuffle"))]
PLAIN += [name for name in CASES if name.startswith(("Haar", "Hadamard"))]


@pytest.mark.parametrize("name", PLAIN)
def test_a_linear_map_without_parameters_saves_nothing(name):
    layer, values, saved = CASES[name].layer(), CASES[name].inputs(), []
    layer.mode = "store"
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        outputs = layer(*(x.requires_grad_() for x in values))
        layer.inv(*tuple_of(outputs))
    assert saved == []


@every(DRAWS, BATCH)
@directions
def test_nan_passes_and_harms_no_other_sample(name, direction):
    layer, values, side = drawn(name, direction)
    run = getattr(layer, direction)
    spoilt = [v.index_fill(0, torch.tensor([1]), torch.nan) for v in values]
    for y, expected in zip(tuple_of(run(*spoilt, **side)), tuple_of(run(*values, **side)), strict=True):
        assert_close(y[::2], expected[::2])
        assert y[1].isnan().any()


# What moves values as they are takes any, and of sums and in containers it is those inside that refuse some.
TAKE_ANY = {name for name, layer in LAYERS.items() if layer.exact or "AdditiveCoupling" in name}
TAKE_ANY |= {name for name in CASES if name.startswith(("Dequantize", "Parallel", "MultiScale", "HINTCoupling"))}


def assert_refuses(name, direction, change, got):
    layer, values, side = drawn(name, direction)
    for run in (getattr(layer, direction), layer if direction == "function" else layer.inv):
        with pytest.raises(TypeError, match=rf"^\w+: Expected \w+( stream)? to be .*; got {got}"):
            run(change(values[0]), *values[1:], **side)


@every({name for name in CASES if name.startswith(("Identity", "MultiScale"))})
@directions
def test_what_is_no_tensor_is_refused(name, direction):
    assert_refuses(name, direction, lambda x: x.tolist(), "list")


def has_dtype(layer):
    tensors = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    return any(t.is_floating_point() for t in tensors) or hasattr(layer, "matrix") or hasattr(layer, "net")


@every({name for name, layer in LAYERS.items() if not has_dtype(layer)})
@directions
def test_values_of_another_precision_are_refused(name, direction):
    assert_refuses(name, direction, lambda x: x.float(), "torch.float32")


@every(TAKE_ANY)
@directions
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_other_numbers_are_refused(name, direction, dtype):
    assert_refuses(name, direction, lambda x: x.to(dtype), dtype)


@every(TAKE_ANY, {name for name in CASES if name.startswith(("Haar", "Hadamard", "Leapfrog", "Momentum"))})
@directions
def test_complex_numbers_are_refused(name, direction):
    assert_refuses(name, direction, lambda x: x + 0j, "torch.complex128")


COMPLEX = {
    **{kind: lambda o, kind=kind: iz.InvertibleLinear(3, kind=kind, **o) for kind in MATRICES},
    "pixels": lambda o: iz.InvertibleConv1x1(3, **o),
    "low rank": lambda o: iz.WoodburyLinear(3, 2, dim=1, **o),
    "cells": lambda o: iz.OrthogonalDownsample(3, (2,), kind="cayley", **o),
    "patches": lambda o: iz.InvertiblePatchConv(3, None, (2,), **o),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_layers(name):
    layer = perturbed(COMPLEX[name]({"dtype": torch.complex128}), 0.3)
    x = torch.randn((2, 3) if name in MATRICES else (2, 3, 2), dtype=torch.complex128)
    y = layer(x).detach()
    assert_close(layer.inverse(y), x)
    if layer.has_log_det():
        assert_close(layer.forward_and_log_det(x)[1], jacobian_log_det(Call(layer, (x,), {})))
        assert_close(layer.inverse_and_log_det(y)[1], jacobian_log_det(Call(layer, (y,), {}, inverted=True)))
    iz.testing.assert_gradients(layer, x)
    iz.testing.assert_modes_agree(layer, x)


REPRS = {
    "InvertibleLeakyReLU(negative_slope=0.2)": iz.InvertibleLeakyReLU(0.2),
    "SneakyReLU(negative_slope=0.2)": iz.SneakyReLU(0.2),
    "InvertibleELU(alpha=0.2)": iz.InvertibleELU(0.2),
    "InvertibleLogit()": iz.InvertibleLogit(),
    "InvertibleLogit(eps=1e-06)": iz.InvertibleLogit(1e-6),
    "InvertibleSigmoid()": iz.InvertibleSigmoid(),
    "InvertibleSigmoid(eps=1e-06)": iz.InvertibleSigmoid(1e-6),
    "Permute([2, 0, 1], dim=-1)": iz.Permute([2, 0, 1], -1),
    "Permute([0, 1, 2, 3, 4, 5, ...], dim=1)": iz.Permute(range(9)),
    "Shuffle(4, dim=2)": iz.Shuffle(4, 2),
    "Reverse(dim=-1)": iz.Reverse(-1),
    "Swap(dim=-1)": iz.Swap(-1),
    "Interleave(dim=-1)": iz.Interleave(-1),
    "Deinterleave(dim=-1)": iz.Deinterleave(-1),
    "Squeeze(2, order='channels_first')": iz.Squeeze(),
    "Unsqueeze((2, 1), order='positions_first')": iz.Unsqueeze([2, 1], order="positions_first"),
    "Flatten((3, 4))": iz.Flatten([3, 4]),
    "Reshape((3, 4), (2, 6))": iz.Reshape((3, 4), (2, -1)),
    "Rearrange('b c -> c b')": iz.Rearrange("b c -> c b"),
    "Rearrange('b (c d) -> b c d', {'c': 2})": iz.Rearrange("b (c d) -> b c d", {"c": 2}),
    "Pad((0, 2), dim=1)": iz.Pad(2),
    "Pad((1, 1), dim=(2, 3))": iz.Pad((1, 1), (2, 3)),
    "HaarDownsample('haar', order='channels_first')": iz.HaarDownsample(),
    "HaarUpsample('db2', order='positions_first')": iz.HaarUpsample("db2", order="positions_first"),
    "DCT(dim=-1)": iz.DCT(),
    "Hadamard(dim=(1, 2))": iz.Hadamard((1, 2)),
    "Slice(2, dim=1)": iz.Slice(2),
    "Augment(2, dim=-1)": iz.Augment(2, -1),
    "Abs()": iz.Abs(),
    "Dequantize(4)": iz.Dequantize(4),
    "PeriodicConv(4, kernel_size=(3, 3))": iz.PeriodicConv(4, 3),
    "PeriodicConv(4, kernel_size=(5,), bias=False)": iz.PeriodicConv(4, (5,), bias=False),
    "EmergingConv(4, kernel_size=(3, 3), mask='raster')": iz.EmergingConv(4, 3),
    "EmergingConv(4, kernel_size=(5,), bias=False, mask='raster')": iz.EmergingConv(4, (5,), bias=False),
    "Householder(4, 4, reflections=4)": iz.InvertibleLinear(4).matrix,
    "Householder(4, 4, reflections=2)": iz.InvertibleLinear(4, reflections=2).matrix,
    "Cayley(6, 4)": iz.InvertibleConv1x1(4, 6, kind="cayley").matrix,
    "Scaled(4, 4, reflections=4, max_log_scale=1.0)": iz.InvertibleLinear(4, kind="scaled").matrix,
    "PLU(4, 4, max_log_scale=0.5)": iz.InvertibleLinear(4, kind="plu", max_log_scale=0.5).matrix,
    "InvertibleLinear(\n  in_features=4, out_features=4, bias=True\n  (matrix): Free(4, 4)\n)": iz.InvertibleLinear(
        4, kind="free"
    ),
    "InvertibleConv1x1(\n  channels=4, out_channels=4, bias=False\n  (matrix): Free(4, 4)\n)": iz.InvertibleConv1x1(
        4, bias=False, kind="free"
    ),
}


@pytest.mark.parametrize("words", REPRS)
def test_reprs(words):
    assert repr(REPRS[words]) == words
