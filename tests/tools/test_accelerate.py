"""A loop written with Accelerate trains a net with an invertible trunk as it would a plain one."""

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader

from tests.tools.nets import BATCH, Net, assert_learns_and_saves, examples


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Accelerate keeps what the first accelerator of a process was told."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(net: nn.Module, epochs: int = 4, **options) -> list[float]:
    accelerator = Accelerator(cpu=True, **options)
    dtype = next(net.parameters()).dtype
    data = [{k: v.to(dtype) for k, v in example.items()} for example in examples()]
    net, optimizer, loader = accelerator.prepare(
        net, torch.optim.Adam(net.parameters(), 3e-3), DataLoader(data, BATCH, shuffle=True)
    )
    losses = []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(net):
                loss = net(**batch)["loss"]
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_loop(accumulated: int):
    assert_learns_and_saves(lambda: Net().double(), lambda net: train(net, 6, gradient_accumulation_steps=accumulated))


@pytest.mark.slow
def test_a_loop_in_mixed_precision():
    assert_learns_and_saves(Net, lambda net: train(net, 4, mixed_precision="bf16"), rtol=5e-2, less=2)


def test_states(tmp_path):
    accelerator = Accelerator(cpu=True)
    net = accelerator.prepare(Net(depth=2))
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path)
    torch.testing.assert_close(dict(net.state_dict()), weights)
