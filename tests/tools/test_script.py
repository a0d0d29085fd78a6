"""TorchScript: `torch.jit.script` is refused by name, traces of both directions are saved and loaded."""

import io

import pytest
import torch
from torch import nn

import invzoo as iz

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # shapes are checked, and traced shapes are tensors
]


def flow() -> iz.InvertibleSequential:
    return iz.InvertibleSequential(iz.AffineCoupling(nn.Linear(2, 4)), iz.Reverse(), iz.InvertibleLeakyReLU())


@pytest.mark.parametrize(
    "module",
    [iz.InvertibleLeakyReLU(), iz.Reverse().inv, flow(), flow().inv, nn.Sequential(nn.Linear(4, 4), flow()[0])],
    ids=["layer", "inverse", "flow", "inverse of a flow", "inside a plain net"],
)
def test_script_is_refused(module: nn.Module):
    words = r"\w+: Expected layer to be given to torch.export or torch.jit.trace; got torch.jit.script"
    with pytest.raises(TypeError, match=words):
        torch.jit.script(module)


@pytest.mark.parametrize("direction", [lambda net: net, lambda net: net.inv], ids=["forward", "inverse"])
def test_traces_are_saved_and_loaded(direction):
    module, x = direction(flow()), torch.randn(3, 4)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, x), file)
    file.seek(0)
    fresh = torch.randn(5, 4)
    torch.testing.assert_close(torch.jit.load(file)(fresh), module(fresh))
