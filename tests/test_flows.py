"""Invertible modules as transforms of `torch.distributions`."""

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.testing import assert_close

import invzoo as iz
from invzoo.engine.memory import track_memory


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4).double()

    def forward(self, x, context):
        return self.net(torch.cat((x, context), -1))


def base(*shape):
    return Independent(Normal(torch.zeros(shape, dtype=torch.float64), 1.0), len(shape))


def flow(depth=2):
    layers = (layer for _ in range(depth) for layer in (iz.AffineCoupling(nn.Linear(2, 4)), iz.Reverse()))
    net = iz.InvertibleSequential(*layers, iz.InvertibleLinear(4, kind="scaled")).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net


def test_a_density_is_that_of_the_change_of_variables():
    net = flow()
    density = TransformedDistribution(base(4), [iz.as_transform(net)])
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y = net(x.flatten(0, 1)).unflatten(0, (2, 3))
    jacobians = [torch.autograd.functional.jacobian(lambda s: net(s[None])[0], s) for s in x.flatten(0, 1)]
    log_dets = torch.stack([torch.linalg.slogdet(j).logabsdet for j in jacobians]).unflatten(0, (2, 3))
    assert_close(density.log_prob(y), base(4).log_prob(x) - log_dets)
    assert_close(density.transforms[0].log_abs_det_jacobian(x, y), log_dets)
    assert_close(density.transforms[0].inv.log_abs_det_jacobian(y, x), -log_dets)
    assert density.event_shape == (4,)
    assert density.batch_shape == ()
    assert density.sample((5, 6)).shape == (5, 6, 4)
    assert density.log_prob(y[0, 0]).shape == ()


def test_both_directions_can_be_trained_through_and_save_memory():
    def peak(depth, mode):
        net = flow(depth)
        net.mode = mode
        density = TransformedDistribution(base(4), [iz.as_transform(net)])
        y = torch.randn(2000, 4, dtype=torch.float64)
        with track_memory() as memory:
            (density.rsample((2000,)).square().mean() - density.log_prob(y).mean()).backward()
        return memory.peak, [p.grad for p in net.parameters()]

    torch.manual_seed(0)
    (small, _), (large, got) = (peak(depth, "invert") for depth in (4, 16))
    assert large < 1.1 * small
    torch.manual_seed(0)
    (_, _), (plain, expected) = (peak(depth, "store") for depth in (4, 16))
    assert plain > 2 * large
    assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_conditions_are_repeated_over_the_samples():
    layer = iz.AffineCoupling(Net())
    context = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    density = TransformedDistribution(base(4).expand((3,)), [iz.as_transform(layer, context=context)])
    y = density.rsample((5,))
    assert y.shape == (5, 3, 4)
    expected = [
        TransformedDistribution(base(4), [iz.as_transform(layer, context=c[None])]).log_prob(y[:, i])
        for i, c in enumerate(context)
    ]
    assert_close(density.log_prob(y), torch.stack(expected, 1))
    assert torch.autograd.grad(density.log_prob(y.detach()).sum(), context)[0].ne(0).all()


def test_events_may_change_their_shape():
    net = iz.MultiScale(iz.Reverse(), iz.Reverse(), input_shape=(2, 3, 4)).inv
    density = TransformedDistribution(base(24), [iz.as_transform(net, (1, 3))])
    assert density.event_shape == (2, 3, 4)
    assert density.log_prob(density.sample((5,))).shape == (5,)
    with pytest.raises(ValueError, match="as_transform: Expected value to have at least 3 dims; got shape"):
        density.transforms[0].inv(torch.zeros(2, 2))


def test_errors():
    with pytest.raises(TypeError, match="as_transform: Expected layer to be an InvertibleModule; got Linear"):
        iz.as_transform(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="as_transform: Expected event_dim to be at least 1, or two such numbers; got"):
        iz.as_transform(iz.Identity(), 0)
    with pytest.raises(TypeError, match="as_transform: Expected layer to be a bijection; got a surjection, Invertible"):
        iz.as_transform(iz.InvertibleSequential(iz.Reverse(), iz.Augment(2)))
    transform = iz.as_transform(iz.InvertibleLinear(2, 3))
    with pytest.raises(TypeError, match="InvertibleLinear: Expected layer to be a bijection with a log-determinant"):
        transform.log_abs_det_jacobian(torch.ones(1, 2), torch.ones(1, 3))
