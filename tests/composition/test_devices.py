"""Devices besides the CPU: one that is simulated, and one without values."""

import ast
import os
import pathlib
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import invzoo as iz
from invzoo.engine import tuple_of
from tests.reference import assert_near, first_cases

ROOT = pathlib.Path(iz.__file__).parent
HERE = pathlib.Path(__file__).parent


# ---- a simulated device ---------------------------------------------------------------------------------------------


def test_on_a_second_device():
    """A process of its own registers the device: random states, autocast, every layer, and streams."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "on_second_device.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(  # noqa: S603 - ourselves
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# ---- the default device ---------------------------------------------------------------------------------------------


class Positions(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.arange(x.shape[1]))


def test_a_replay_makes_tensors_where_its_forward_did(mode: str):
    """Threads of autograd have no default device, and a context around the forward has ended."""
    net = iz.InvertibleSequential(*[iz.AdditiveCoupling(Positions(2, 2)) for _ in range(3)], mode=mode)
    x = torch.randn(5, 4, requires_grad=True)
    expected = torch.autograd.grad(net(x).square().sum(), x)
    loss = net(x).square().sum()
    with torch.device("meta"):
        loss.backward()
    assert_near([x.grad], [*expected])
    with torch.device("meta"):
        y = net.to("meta")(torch.ones(5, 4))
    y.sum().backward()
    assert all(p.grad.is_meta for p in net.parameters())


# ---- tensors without values -----------------------------------------------------------------------------------------


# What these need to know, only values can tell; torch says so.
LOOK_AT_VALUES = {
    "InvertibleResidual[solve]": "its fixed point ends where it has converged",
    "Augment[context]": "torch.distributions looks at the scale that it is given",
}


@pytest.mark.parametrize("case", first_cases())
def test_every_layer_on_meta(case: iz.testing.Case):
    """A tensor that a layer makes on the CPU cannot meet its inputs there."""
    with pytest.raises(RuntimeError, match="meta tensors") if case.name in LOOK_AT_VALUES else nullcontext():
        step_on_meta(case)


def step_on_meta(case: iz.testing.Case) -> None:
    layer = case.layer().to("meta")
    inputs = [x.to("meta").requires_grad_(x.is_floating_point()) for x in case.inputs()]
    sides = {k: v.to("meta") for k, v in case.side_inputs().items()}
    outputs = tuple_of(layer(*inputs, **sides))
    assert all(y.is_meta for y in outputs)
    assert [y.shape for y in outputs] == [y.shape for y in tuple_of(case.layer()(*case.inputs(), **case.side_inputs()))]
    if any(y.requires_grad for y in outputs):
        sum(y.sum() for y in outputs if y.requires_grad).backward()


# ---- the sources ----------------------------------------------------------------------------------------------------

# Where the name of a device is written, and why that is right.
NAMES = {
    ("cli.py", "cpu"): "the default of the demo's --device, and what `invzoo zoo` counts",
    ("demo.py", "cpu"): "needs no synchronisation",
    ("engine/surroundings/devices.py", "cpu"): "is no accelerator",
    ("engine/surroundings/devices.py", "meta"): "is none either",
    ("engine/_torch.py", "cpu"): "where tensors are made if nobody says otherwise",
    ("engine/surroundings/ambient.py", "cpu"): "its autocast may rule over subnets that go there",
    ("shapes.py", "meta"): "shapes alone are asked for",
    ("shapes.py", "cuda"): "fork_rng asks for some kind of device, of which it then forks none",
    ("layers/__init__.py", "meta"): "there einops learns what a tensor is",
    ("layers/couplings/made.py", "cpu"): "indices from Python go through it, so that meta buffers can be filled",
    ("layers/rearrangements/permutation.py", "cpu"): "likewise, and a generator draws where it is",
}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_device_is_assumed(path: pathlib.Path):
    file = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and node.value in {"cpu", "cuda", "mps", "xpu", "meta", "npu", "hpu"}:
            assert (file, node.value) in NAMES, f"{file}:{node.lineno} names {node.value!r}"
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(
            ("torch.cuda.", "torch.mps.", "torch.xpu.")
        ):
            assert ast.unparse(node) == "torch.cuda.is_current_stream_capturing", f"{file}:{node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in {"cuda", "cpu", "numpy", "xpu"} or file in {"demo.py", "engine/_torch.py"}, (
                f"{file}:{node.lineno} moves to a device of its own choice"
            )
