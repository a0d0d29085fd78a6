"""Where a net in mode `invert` saves its memory, and where it steps aside and stores what a plain one stores."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import invzoo as iz
from invzoo.testing.memory import track_memory

# Forward mode decomposes some operators with a compiler that torch itself no longer recommends.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")

BATCH, WIDTH = 512, 8  # activations are much larger than weights

Step = Callable[[nn.Module, Tensor], object]


def loss(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return net(x).square().sum()


def within(context: Callable[[], AbstractContextManager[object]]) -> Step:
    def step(net: nn.Module, x: Tensor) -> None:
        with context():
            loss(net, x).backward()

    return step


def checkpointed(use_reentrant: bool) -> Step:
    def step(net: nn.Module, x: Tensor) -> None:
        loss(lambda v: checkpoint(net, v, use_reentrant=use_reentrant), x.clone().requires_grad_()).backward()

    return step


def kept_graph(net: nn.Module, x: Tensor) -> None:
    y = loss(net, x)
    y.backward(retain_graph=True)
    y.backward()


def batched_gradients(net: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    y = net(x)
    torch.autograd.grad(y, x, torch.stack([y.detach()] * 2), is_grads_batched=True)


def second_derivative(net: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(net, x), x, create_graph=True)
    g.square().sum().backward()


def other_parameters(net: nn.Module, x: Tensor) -> None:
    values = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    loss(lambda v: functional_call(net, values, (v,)), x).backward()


def func_grad(net: nn.Module, x: Tensor) -> None:
    values = {name: p.detach() for name, p in net.named_parameters()}
    grad(lambda v: loss(lambda t: functional_call(net, v, (t,)), x))(values)


def func_grad_of_grad(net: nn.Module, x: Tensor) -> None:
    grad(lambda t: grad(lambda u: loss(net, u))(t).square().sum())(x)


def mapped(net: nn.Module, x: Tensor) -> None:
    loss(vmap(net), x.unsqueeze(1)).backward()


def tangents(net: nn.Module, x: Tensor) -> None:
    with forward_ad.dual_level():
        loss(net, forward_ad.make_dual(x, x)).backward()


SAVES: dict[str, Step] = {
    "a step": within(nullcontext),
    "a kept graph": kept_graph,
    "batched gradients": batched_gradients,
    "functional_call": other_parameters,
    "checkpoint": checkpointed(False),
    "reentrant checkpoint": checkpointed(True),
    "save_on_cpu": within(save_on_cpu),
    "hooks of others": within(lambda: saved_tensors_hooks(torch.clone, torch.clone)),
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "fake tensors": within(lambda: FakeTensorMode(allow_non_fake_inputs=True)),
    "torch.func.grad": func_grad,
    "anomaly mode": within(lambda: torch.autograd.set_detect_anomaly(True)),
}

STORES: dict[str, Step] = {
    "a second derivative": second_derivative,
    "torch.func.grad of a gradient": func_grad_of_grad,
    "vmap": mapped,
    "forward mode": tangents,
    "hooks disabled": within(lambda: disable_saved_tensors_hooks("hooks are disabled here")),
    "cached parametrizations": within(parametrize.cached),
}


def growth(step: Step, mode: str) -> int:
    """Return how many bytes more the peak of a deeper net is."""

    def peak(depth: int) -> int:
        half = WIDTH // 2
        nets = [nn.Sequential(nn.Linear(half, half), nn.Tanh(), nn.Linear(half, half)) for _ in range(depth)]
        net = iz.InvertibleSequential(*map(iz.AdditiveCoupling, nets))
        net.mode = mode
        x = torch.randn(BATCH, WIDTH)
        loss(net, x).backward()  # a first step checks more
        with track_memory(include=net) as memory:
            step(net, x)
        return memory.peak

    return peak(12) - peak(4)


@pytest.mark.parametrize("name", SAVES)
def test_saves(name: str):
    assert growth(SAVES[name], "invert") < 0.1 * growth(SAVES[name], "store")


@pytest.mark.parametrize("name", STORES)
def test_stores(name: str):
    assert growth(STORES[name], "invert") > 0.9 * growth(STORES[name], "store")
