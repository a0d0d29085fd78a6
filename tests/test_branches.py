"""Containers that branch, repeat and let features go."""

import pytest
import torch
from torch import nn

import invzoo as iz
from invzoo.testing.memory import track_memory


def affine(features):
    half = features // 2
    return iz.AffineCoupling(nn.Linear(half, 2 * (features - half)))


def together(outputs):
    return torch.cat([z.flatten(1) for z in iz.engine.tuple_of(outputs)], 1)


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


def test_what_multiscale_nets_know_of_their_stages():
    assert iz.MultiScale(iz.InvertibleTanh()).codomain is iz.InvertibleTanh.codomain
    with pytest.raises(ValueError, match="Permute: Expected x to have size 4") as error:
        iz.MultiScale(iz.Identity(), iz.Permute([0, 1, 2, 3]), input_shape=(4,))
    assert "stage 1 (Permute)" in error.value.__notes__[0]
