"""Scale: ten thousand couplings trained for real, and a transformer of seven billion parameters on fake tensors."""

import time
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from . import contestants
from .measure import one_thread, peak_of_tensors
from .workloads import attention, mlp

__all__ = ["run"]

DTYPE = torch.bfloat16  # of the transformer


def run(*, smoke: bool) -> dict[str, Any]:
    """Train the deep stack, and count the activations of the large transformer."""
    if smoke:
        return {"deep": train(depth=20, steps=2), "transformer": transformer(32, blocks=(1, 2), tokens=(4, 8))}
    deep = train(depth=10_000, steps=8)
    return {"deep": deep, "transformer": transformer(4096, blocks=(5, 10, 20, 35), tokens=(1024, 2048, 4096, 8192))}


@one_thread()
def train(depth: int, steps: int, batch: int = 64, width: int = 64) -> dict[str, Any]:
    """Fit a random linear map of the inputs by a stack of couplings, and count the peak of the last step."""
    torch.manual_seed(0)
    half = width // 2
    subnets = [nn.Sequential(nn.Linear(half, half), nn.Tanh(), nn.Linear(half, half)) for _ in range(depth)]
    for net in subnets:
        nn.init.normal_(net[2].weight, std=0.1 / depth**0.5)
        nn.init.zeros_(net[2].bias)
    net = contestants.build("invzoo invert", subnets)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1 / depth)
    x = torch.randn(batch, width)
    target = x @ nn.init.orthogonal_(torch.empty(width, width))
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        loss = F.mse_loss(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    if not losses[-1] < losses[0]:
        raise ArithmeticError(f"Expected the loss to fall; got {losses}")
    memory = peak_of_tensors(lambda: F.mse_loss(net(x), target))
    parameters = sum(p.numel() for p in net.parameters())
    return {
        "depth": depth,
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "activation": x.nbytes,
        "losses": losses,
        "seconds": seconds,
        **memory,
    }


def transformer(width: int, blocks: tuple[int, ...], tokens: tuple[int, ...]) -> dict[str, Any]:
    """Count the activations of one sample against depth at the fewest tokens, and against tokens at the full depth.

    Everything is bfloat16 and fake: shapes without memory.
    """
    settings = dict.fromkeys([*((n, tokens[0]) for n in blocks), *((blocks[-1], t) for t in tokens)])
    with FakeTensorMode():
        subnets = [net for _ in range(blocks[-1]) for net in (attention(width, 128, DTYPE), mlp(width, DTYPE))]
        rows = [
            {"contestant": name, "blocks": n, "tokens": t, **_activations(name, subnets[: 2 * n], t, width)}
            for n, t in settings
            for name in ("plain", "torch checkpoint", "invzoo invert")
        ]
    parameters = sum(p.numel() for net in subnets for p in net.parameters())
    return {"width": width, "parameters": parameters, "rows": rows}


def _activations(name: str, subnets: list[nn.Module], tokens: int, width: int) -> dict[str, int]:
    net = contestants.build(name, subnets)
    x = torch.randn(1, 2 * tokens, width, dtype=DTYPE, requires_grad=True)
    for p in net.parameters():
        p.grad = torch.empty_like(p)
    x.grad = torch.empty_like(x)
    return {"activation": x.nbytes, **peak_of_tensors(lambda: net(x), torch.empty_like(x))}
