"""ONNX files of a flow and of its inverse, run by ONNX Runtime."""

import onnxruntime
import pytest
import torch
from torch import nn

import invzoo as iz

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # the exporter's own
]


def dense() -> iz.InvertibleSequential:
    def net(outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs))

    couplings = iz.AffineCoupling(net(4)), iz.Reverse(), iz.AdditiveCoupling(net(2), swap=True)
    return iz.InvertibleSequential(iz.ActNorm(4), *couplings, iz.InvertibleLeakyReLU())


def convolutional() -> iz.InvertibleSequential:
    net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    return iz.InvertibleSequential(iz.Squeeze(2), iz.ActNorm(4), iz.AffineCoupling(net), iz.Reverse())


FLOWS = pytest.mark.parametrize(("make", "shape"), [(dense, (4,)), (convolutional, (1, 4, 6))])


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@FLOWS
def test_a_flow(make, shape: tuple[int, ...], direction: str, tmp_path):
    net, x = make(), torch.randn(5, *shape)
    net(x)  # what depends on the first batch is set
    net.eval()
    module, inputs = (net, x) if direction == "forward" else (net.inv, net(x).detach())
    batches = {"inputs": ({0: "batch"},)}  # forward(*inputs)
    torch.onnx.export(module, (inputs,), tmp_path / "net.onnx", dynamo=True, dynamic_shapes=batches, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for batch in (1, 7):
        fresh = torch.randn(batch, *inputs.shape[1:])
        (found,) = session.run(None, {session.get_inputs()[0].name: fresh.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(fresh).detach(), rtol=1e-5, atol=1e-5)


def test_what_onnx_has_no_operator_for_is_refused():
    """Matrices that are the solution of a system, as orthogonal ones here, have none; `torch.export` takes them."""
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="No ONNX function found .*linalg_solve_triangular"):
        torch.onnx.export(iz.InvertibleLinear(4).eval(), (torch.randn(5, 4),), dynamo=True, verbose=False)
