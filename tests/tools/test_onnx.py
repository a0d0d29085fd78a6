"""ONNX files of every layer of the catalogue that ONNX has operators for, there and back, run by ONNX Runtime."""

import re
from functools import partial
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import invzoo as iz
from invzoo.engine import tuple_of
from tests.tools.families import DIRECTIONS, FAMILIES, REFUSED, given, take_few_steps, together

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # the exporter's own
]

# What ONNX has no operator for, or torch no translation, by the layers and directions that need it.
MISSING = {
    "linalg_solve_triangular": r"Invertible(Linear|Conv1x1)\[(householder|scaled|wide).*"
    r"|Invertible(Linear|Conv1x1)\[plu.*-inverse|InvertiblePatchConv(-.*|\[plu\]-inverse)|Orthogonal(Down|Up)sample(\[random\])?-.*"
    r"|EmergingConv.*-inverse|InvertibleSequential-.*|GlowStep(\[context\])?-.*|GlowStep\[vectors\]-inverse|Inverse-forward",
    "_linalg_solve_ex": r".*\[cayley\]-.*|InvertiblePatchConv\[wide\]-.*|OrthogonalDownsample\[dct\]-.*",
    "linalg_inv_ex": r".*\[free\]-inverse",
    "linalg_cholesky_ex": r"WoodburyLinear.*",
    "mm": r"PeriodicConv.*",  # of complex numbers
    "mul": r"DCT.*-inverse",  # likewise
    "hypot": r"SneakyReLU.*",
}
DRAWN = ("Slice-inverse", "Augment-forward", "Abs-inverse", "Dequantize-forward")  # at random, by ONNX anew

CASES = {f"{case.name}-{direction}": (case, direction) for case in iz.testing.cases() for direction in DIRECTIONS}

export = partial(torch.onnx.export, dynamo=True, verbose=False)


def run(file: Path, *inputs: object) -> list[Tensor]:
    session = onnxruntime.InferenceSession(file)
    tensors = [x.numpy() for x in pytree.tree_leaves(inputs)]
    found = session.run(None, {spec.name: x for spec, x in zip(session.get_inputs(), tensors, strict=True)})
    return [torch.from_numpy(y) for y in found]


def left_out(name: str) -> bool:
    layer = re.sub(r"\[.*\]", "", name)
    return layer in DRAWN or name in REFUSED or any(re.fullmatch(pattern, name) for pattern in MISSING.values())


GROUPS = [(family, direction) for family in FAMILIES for direction in DIRECTIONS]
GROUPS.remove(("LINEAR", "inverse"))  # all of them solve systems, or take complex numbers


@pytest.mark.parametrize(("family", "direction"), GROUPS)
@torch.no_grad()
def test_families(family: str, direction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    take_few_steps(monkeypatch)
    net, inputs = together(family, direction, left_out, torch.float32)
    searches = (family, direction) == ("MONOTONE", "inverse")  # whose unrolled loops take minutes to optimise
    export(net.eval(), inputs, tmp_path / "net.onnx", optimize=not searches)
    for found, expected in zip(run(tmp_path / "net.onnx", *inputs), net(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * max(expected.abs().max().item(), 1e-3))


@pytest.mark.parametrize("name", DRAWN)
@torch.no_grad()
def test_what_is_drawn_is_what_the_inverse_drops(name: str, tmp_path: Path):
    layer, values, side = given(*CASES[name], torch.float32)
    export(layer.eval(), values, tmp_path / "layer.onnx", kwargs=side)
    found = run(tmp_path / "layer.onnx", values, side)
    torch.testing.assert_close(tuple_of(layer.inverse(*found, **side)), values, check_dtype=False)


@pytest.mark.parametrize("missing", MISSING)
def test_what_onnx_has_no_operator_for_is_refused(missing: str):
    names = [name for name in CASES if re.fullmatch(MISSING[missing], name)]
    layer, values, side = given(*CASES[names[0]], torch.float32)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=rf"No ONNX function found .*'\w+\.{missing}'"):
        export(layer.eval(), values, kwargs=side)


@pytest.mark.usual
@torch.no_grad()
def test_a_matrix_is_folded(tmp_path: Path):
    """What solves a system to make its matrix hands it to a layer that holds it."""
    layer, x = iz.InvertibleLinear(4), torch.randn(5, 4)
    folded = iz.InvertibleLinear(4, kind="free")
    folded.matrix.entries.copy_(layer.weight)
    folded.bias.copy_(layer.bias)
    export(folded.eval(), (x,), tmp_path / "layer.onnx")
    torch.testing.assert_close(run(tmp_path / "layer.onnx", x), [layer(x)])


def dense() -> iz.InvertibleSequential:
    def net(outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs))

    couplings = iz.AffineCoupling(net(4)), iz.Reverse(), iz.AdditiveCoupling(net(2), swap=True)
    return iz.InvertibleSequential(iz.ActNorm(4), *couplings, iz.InvertibleLeakyReLU())


def convolutional() -> iz.InvertibleSequential:
    net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    return iz.InvertibleSequential(iz.Squeeze(2), iz.ActNorm(4), iz.AffineCoupling(net), iz.Reverse())


FLOWS = pytest.mark.parametrize(("make", "shape"), [(dense, (4,)), (convolutional, (1, 4, 6))])


@pytest.mark.parametrize("direction", DIRECTIONS)
@FLOWS
def test_a_flow(make, shape: tuple[int, ...], direction: str, tmp_path: Path):
    net, x = make(), torch.randn(5, *shape)
    net(x)  # what depends on the first batch is set
    net.eval()
    module, inputs = (net, x) if direction == "forward" else (net.inv, net(x).detach())
    batches = {"inputs": ({0: "batch"},)}  # forward(*inputs)
    export(module, (inputs,), tmp_path / "net.onnx", dynamic_shapes=batches)
    for batch in (1, 7):
        fresh = torch.randn(batch, *inputs.shape[1:])
        (found,) = run(tmp_path / "net.onnx", fresh)
        torch.testing.assert_close(found, module(fresh).detach(), rtol=1e-5, atol=1e-5)
