"""Weights of a stack go to a safetensors file and back, strictly, and to the plain net whose keys they have."""

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import invzoo as iz


def stack(seed: int) -> iz.InvertibleSequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 6))
    layers = iz.ActNorm(6), iz.InvertibleLinear(6), iz.AffineCoupling(net), iz.InvertibleBatchNorm(6)
    return iz.InvertibleSequential(*layers, iz.Reverse())


@pytest.mark.parametrize("mode", ["store", "recompute", "invert"])
def test_a_stack(tmp_path, mode: str):
    net, other, x = stack(0), stack(1), torch.randn(8, 6)
    with iz.mode(net, mode):
        net(x).sum().backward()  # what depends on the first batch is set, statistics have moved
        save_model(net, tmp_path / "net.safetensors")
    assert load_model(other, tmp_path / "net.safetensors") == (set(), [])
    assert other.state_dict().keys() == net.state_dict().keys()
    torch.testing.assert_close(other.eval()(x), net.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(other.inverse(net(x)), x, rtol=1e-4, atol=1e-4)


def test_a_tied_block_is_saved_once(tmp_path):
    def tied() -> nn.Sequential:
        layer = iz.AdditiveCoupling(nn.Linear(3, 3))
        return nn.Sequential(layer, iz.Reverse(), layer)

    net, other, x = tied(), tied(), torch.randn(2, 6)
    save_model(net, tmp_path / "net.safetensors")
    assert sum(t.numel() for t in load_file(tmp_path / "net.safetensors").values() if t.ndim == 2) == 9
    load_model(other, tmp_path / "net.safetensors")
    torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)


def test_weights_of_a_plain_net(tmp_path):
    """A coupling adds no keys to those of its subnets."""
    plain = nn.ModuleDict({"f": nn.Linear(3, 3), "g": nn.Linear(3, 3)})
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    layer = iz.AdditiveCoupling(nn.Linear(3, 3), nn.Linear(3, 3))
    layer.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    assert all(a.equal(b) for a, b in zip(layer.parameters(), plain.parameters(), strict=True))
