"""`free_input=True`: the caller's input is freed until backward, and reading it meanwhile says who freed it."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz

READS = {
    "arithmetic": lambda x: x + 1,
    "reflected": lambda x: 1 - x,
    "matmul": lambda x: x @ x.T,
    "in place": lambda x: x.add_(1),
    "cat": lambda x: torch.cat([x, x]),
    "conv": lambda x: nn.functional.conv1d(x[None], torch.ones(1, x.shape[0], 1)),
    "index": lambda x: x[0],
    "assign": lambda x: x.__setitem__(0, 1.0),
    "iterate": list,
    "numpy": lambda x: x.numpy(),
    "asarray": np.asarray,
    "dlpack": lambda x: x.__dlpack__(),
    "print": str,
    "repr": repr,
    "format": lambda x: f"{x}",
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "view": lambda x: x.view(-1),
    "clone": lambda x: x.clone(),
    "to": lambda x: x.to(torch.float32),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "module": lambda x: nn.Linear(4, 4, dtype=x.dtype)(x),
    "operator": lambda x: torch.ops.aten.add(x, x),
    "out": lambda x: torch.add(torch.ones(3, 4), 1, out=x),
    "another call": iz.InvertibleLeakyReLU(),
}


def stack(**options):
    couplings = [iz.AdditiveCoupling(nn.Linear(2, 2, dtype=torch.float64), swap=i % 2 == 1) for i in range(3)]
    return iz.InvertibleSequential(*couplings, **options)


def numbers():
    return torch.randn(3, 4, dtype=torch.float64)


def assert_frees_and_restores(net, x, *others, freed=True):
    was, version = x.detach().clone(), x._version
    y = net(x, *others)
    assert all(other.untyped_storage().size() for other in others)
    assert not freed or x.untyped_storage().size() == 0
    sum(t.square().sum() for t in (y if isinstance(y, tuple) else [y])).backward()
    assert type(x) is torch.Tensor
    assert x._version == version
    assert_close(x.detach(), was)


@pytest.fixture
def freed():
    x = numbers()
    y = stack(free_input=True)(x)
    yield x
    y.sum().backward()


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_every_read_says_who_freed_it(freed, read):
    with pytest.raises(
        RuntimeError, match="input of InvertibleSequential not to be read before backward; it was freed"
    ):
        read(freed)


def test_metadata_can_be_read(freed):
    assert (freed.shape, freed.dtype, freed.ndim, len(freed)) == ((3, 4), torch.float64, 2, 3)
    assert not freed.requires_grad
    assert freed.grad_fn is None


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("first", [iz.Reverse, iz.Identity, iz.Interleave])
def test_restored_though_nothing_in_backward_needs_it(first, needs_grad):
    x = numbers().requires_grad_(needs_grad) * 1
    net = iz.InvertibleSequential(first(), *stack(), free_input=True)
    assert_frees_and_restores(net, x, freed=first is not iz.Identity)  # which passes it on


def test_gradients_are_those_of_a_plain_stack():
    net, source = stack(free_input=True), numbers().requires_grad_()
    got = torch.autograd.grad(net(source * 2).square().sum(), [source, *net.parameters()])
    with iz.mode(net, "store"):
        wanted = torch.autograd.grad(net(source * 2).square().sum(), [source, *net.parameters()])
    assert_close(got, wanted)


def test_a_single_layer_frees_and_restores():
    assert_frees_and_restores(iz.InvertibleLinear(4, dtype=torch.float64, free_input=True), numbers())


def test_dropping_the_graph_leaves_the_guard():
    x = numbers()
    y = stack(free_input=True)(x)
    del y
    with pytest.raises(RuntimeError, match="freed"):
        x + 1


@pytest.mark.parametrize("setting", ["no_grad", "store", "recompute", "frozen"])
def test_nothing_is_freed_where_nothing_is_rebuilt(setting):
    net, x = stack(free_input=True), numbers()
    if setting in ("store", "recompute"):
        net.mode = setting
    net.requires_grad_(setting != "frozen")
    with torch.set_grad_enabled(setting != "no_grad"):
        net(x)
    x + 1


REFUSED = {
    "a leaf that needs its gradient": lambda: numbers().requires_grad_(),
    "a Tensor with layout torch.sparse_coo": lambda: torch.eye(3, dtype=torch.float64).to_sparse(),
    "a view": lambda: torch.randn(6, 4, dtype=torch.float64)[:3],
    "memory that is numpy's": lambda: torch.from_numpy(np.ones((3, 4))),
    "other processes' too": lambda: numbers().share_memory_(),
    "memory is in use elsewhere": lambda: numbers().requires_grad_().exp(),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_where_it_is_not_safe(reason):
    x = REFUSED[reason]()
    was = x.detach().clone()
    with pytest.raises(ValueError, match=f"InvertibleSequential: Expected free_input=True for a tensor .*{reason}"):
        stack(free_input=True)(x)
    assert_close(x.detach(), was)


@pytest.mark.parametrize("where", ["first layer", "first layer, nested", "container", "container, set later"])
def test_a_container_frees_its_input_for_its_first_layer(where):
    net = stack(free_input=where == "container")
    if where.startswith("first layer"):
        net[0].free_input = True
        net = iz.InvertibleSequential(net) if where.endswith("nested") else net
    elif where.endswith("later"):
        net.free_input = True
    assert_frees_and_restores(net, numbers())


def test_a_stream_that_is_passed_on_is_not_freed():
    x1, x2 = numbers()[:, :2].clone(), numbers()[:, 2:].clone()
    assert_frees_and_restores(iz.AdditiveCoupling(nn.Linear(2, 2).double(), free_input=True), x1, x2)


def test_refused_while_a_view_of_it_is_held():
    source = numbers().requires_grad_()
    x = iz.checkpoint(torch.exp, source, inverse=torch.log)
    view = x[0]
    with pytest.raises(ValueError, match="a view of it"):
        stack(free_input=True)(x)
    assert_close(torch.autograd.grad(view.sum() + x.sum(), source)[0][1:], x[1:])  # and it is as it was


def test_layers_that_each_free_their_input_hold_one_activation():
    """The caller's tensors die on the way, so that nothing is to be given back to them."""

    def peak(depth, **options):
        layers = [iz.AdditiveCoupling(nn.Linear(8, 8).requires_grad_(False), **options) for _ in range(depth)]
        x = torch.randn(64, 16, requires_grad=True)
        with iz.testing.track_memory() as memory:
            y = x.clone()
            for layer in layers:
                y = layer(y)
            y.sum().backward()
        return memory.peak

    assert peak(4, free_input=True) == peak(16, free_input=True) == peak(4) == peak(16)
