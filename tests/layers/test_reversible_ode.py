"""Leapfrog and momentum steps."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz


def leapfrog(f, **options):
    return iz.Leapfrog(f, step_size=0.5, **options)


KINDS = [leapfrog, iz.MomentumResidual]


class Net(nn.Module):
    """A small net that counts its evaluations."""

    def __init__(self, features=3, dtype=torch.float64):
        super().__init__()
        self.inner, self.outer = nn.Linear(features, 5, dtype=dtype), nn.Linear(5, features, dtype=dtype)
        self.evaluations = 0

    def forward(self, x):
        self.evaluations += 1
        return self.outer(torch.tanh(self.inner(x)))


def streams(*shape, dtype=torch.float64, requires_grad=True):
    shape = shape or (4, 3)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for _ in range(2))


def test_maps_are_the_documented_ones():
    f, (a, b) = Net(), streams()
    assert_close(iz.Leapfrog(f, 0.3)(a, b), (b, 2 * b - a + 0.09 * f(b)))
    v = 0.7 * b + 0.3 * f(a)
    assert_close(iz.MomentumResidual(f, 0.7)(a, b), (a + v, v))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("mode", iz.Mode)
def test_backward_evaluates_the_net_once(kind, inverted, mode):
    layer = kind(Net(), mode=mode)
    (a, b), log_det = (layer.inv if inverted else layer).forward_and_log_det(*streams())
    assert layer.f.evaluations == 1
    (a.square().sum() + b.exp().sum() + log_det.sum()).backward()
    assert layer.f.evaluations == (1 if mode == "store" else 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", iz.Mode)
@pytest.mark.parametrize("same", [True, False])
def test_chains_from_one_tensor(kind, mode, same):
    net = iz.InvertibleSequential(*(kind(Net()) for _ in range(6)))
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def outcome(m):
        with iz.mode(net, m):
            h = 1 * x
            a, b = net(h, h if same else torch.zeros_like(h))
        return a, b, *torch.autograd.grad(a.square().sum() + b.exp().sum(), [x, *net.parameters()])

    assert_close(outcome(mode), outcome("store"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm_statistics_move_once(kind):
    norm, plain = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    inputs = streams()
    layer = kind(norm)
    sum(y.square().sum() for y in layer(*inputs)).backward()
    plain(inputs[1] if kind is leapfrog else inputs[0])
    assert_close(dict(norm.named_buffers()), dict(plain.named_buffers()))
