"""Containers that branch, repeat and let features go."""

import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz
from invzoo.testing.memory import track_memory


def affine(features):
    half = features // 2
    return iz.AffineCoupling(nn.Linear(half, 2 * (features - half)))


NETS = {
    "repeat": (lambda: iz.Repeat(iz.InvertibleSequential(affine(4), iz.Reverse()), 3), (4,)),
    "parallel": (lambda: iz.Parallel(affine(4), iz.InvertibleLinear(2, kind="scaled"), sizes=(4, 2)), (6,)),
    "three": (lambda: iz.Parallel(affine(3), affine(3), affine(2)), (8,)),
    "multiscale": (lambda: iz.MultiScale(affine(8), affine(4), iz.InvertibleSequential(iz.Swap(), affine(2))), (8,)),
    "concatenated": (lambda: iz.MultiScale(affine(8), affine(4), affine(2), input_shape=(8,)), (8,)),
    "unequal": (lambda: iz.MultiScale(affine(8), affine(2), split=0.25), (8,)),
}


def together(outputs):
    return torch.cat([z.flatten(1) for z in iz.engine.tuple_of(outputs)], 1)


@pytest.fixture(params=NETS)
def case(request):
    build, shape = NETS[request.param]
    net = build().double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    return net, torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("mode", iz.Mode)
def test_round_trips_log_dets_and_gradients(case, mode):
    net, x = case
    net.mode = mode
    y, log_det = net.forward_and_log_det(x)
    assert_close(net(x), y)
    jacobians = [torch.autograd.functional.jacobian(lambda s: together(net(s[None]))[0], s) for s in x]
    assert_close(log_det, torch.stack([torch.linalg.slogdet(j).logabsdet for j in jacobians]))
    assert_close(net.inverse(*iz.engine.tuple_of(y)), x)
    back, inverse_log_det = net.inverse_and_log_det(*iz.engine.tuple_of(y))
    assert_close((back, inverse_log_det), (x, -log_det))

    def loss():
        z, log_det = net.forward_and_log_det(x)
        return together(z).sin().sum() + log_det.square().sum() + together(net(x * 2)).square().sum()

    got = torch.autograd.grad(loss(), [x, *net.parameters()])
    with iz.mode(net, "store"):
        assert_close(got, torch.autograd.grad(loss(), [x, *net.parameters()]), rtol=1e-9, atol=1e-12)


def test_they_are_portable(case):
    net, x = case
    assert_close(pickle.loads(pickle.dumps(net))(x), net(x))
    assert all(not key.startswith("_") for key in net.state_dict())


def test_a_multiscale_net_holds_its_latents():
    def held(depth):
        stages = [iz.InvertibleSequential(*[affine(n) for _ in range(depth)]) for n in (64, 32, 16)]
        net = iz.MultiScale(*stages)
        x = torch.randn(100, 64)
        with track_memory() as memory:
            z = net(x)
            assert memory.current < 1.1 * 100 * 64 * 4
            sum(t.square().sum() for t in z).backward()
        return memory.peak - sum(p.numel() for p in net.parameters()) * 4

    assert held(12) < 1.05 * held(4)


def test_branches_on_two_streams_split_and_merge_once(monkeypatch):
    net = iz.InvertibleSequential(affine(8), iz.Parallel(affine(4), affine(4)), affine(8))
    merged = []
    cat = torch.cat

    def counted(tensors, *args, **kwargs):
        out = cat(tensors, *args, **kwargs)
        if out.dim() == 2:  # fingerprints are of one dimension
            merged.append(out.shape[1])
        return out

    monkeypatch.setattr(torch, "cat", counted)
    net(torch.randn(3, 8))
    assert sorted(merged) == [4, 4, 8]  # the inner couplings, and the end


def test_side_inputs_go_where_they_are_taken():
    class Net(nn.Linear):
        def forward(self, x, context):
            return super().forward(x) * context

    net = iz.MultiScale(iz.Parallel(iz.AdditiveCoupling(Net(1, 1)), iz.Reverse()), iz.Repeat(iz.Identity(), 2))
    context = torch.randn(3, 1, requires_grad=True)
    together(net(torch.randn(3, 4), context=context)).sum().backward()
    assert context.grad is not None
    with pytest.raises(TypeError, match=r"MultiScale: Expected side inputs among \[.*'context'.*\]; got \['mask'\]"):
        net(torch.randn(3, 4), mask=context)


def test_errors():
    with pytest.raises(TypeError, match="Repeat: Expected layer to be an InvertibleModule; got Linear"):
        iz.Repeat(nn.Linear(1, 1), 2)
    with pytest.raises(ValueError, match="Repeat: Expected times to be an int of at least 0; got -1"):
        iz.Repeat(iz.Identity(), -1)
    with pytest.raises(ValueError, match="Parallel: Expected sizes to hold 2 sizes"):
        iz.Parallel(iz.Identity(), iz.Identity(), sizes=(1, 2, 3))
    with pytest.raises(ValueError, match="Parallel: Expected inputs to be 1 or 3 tensors; got 2"):
        iz.Parallel(iz.Identity(), iz.Identity(), iz.Identity())(torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="Parallel: Expected input to have 5 features in dim 1; got shape"):
        iz.Parallel(iz.Identity(), iz.Identity(), sizes=(2, 3))(torch.ones(1, 4))
    with pytest.raises(ValueError, match="Parallel: Expected input to have at least 3 features in dim 1"):
        iz.Parallel(iz.Identity(), iz.Identity(), iz.Identity())(torch.ones(1, 2))
    with pytest.raises(ValueError, match="Parallel: Expected input to have a dim 1"):
        iz.Parallel(iz.Identity(), iz.Identity(), iz.Identity())(torch.ones(2))
    with pytest.raises(ValueError, match="MultiScale: Expected stages to be at least one; got none"):
        iz.MultiScale()
    with pytest.raises(ValueError, match="MultiScale: Expected latents to be 2 tensors, one for each stage; got 1"):
        iz.MultiScale(iz.Identity(), iz.Identity()).inverse(torch.ones(1, 2))
    assert iz.MultiScale(iz.InvertibleTanh()).codomain is iz.InvertibleTanh.codomain
    with pytest.raises(ValueError, match=r"MultiScale: Expected y to have shape \(batch, 4\); got shape \(1, 3\)"):
        iz.MultiScale(iz.Identity(), iz.Identity(), input_shape=(4,)).inverse(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"MultiScale: Expected y to have shape \(batch, 4\); got shape \(1, 4, 1\)"):
        iz.MultiScale(iz.Identity(), iz.Identity(), input_shape=(4,)).inverse(torch.ones(1, 4, 1))
    with pytest.raises(ValueError, match="Permute: Expected x to have size 4") as error:
        iz.MultiScale(iz.Identity(), iz.Permute([0, 1, 2, 3]), input_shape=(4,))
    assert "stage 1 (Permute)" in error.value.__notes__[0]
