"""The scales of an affine coupling, and which squares of a checkerboard its subnets move, are the documented ones."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz

SCALES = {
    "tanh": lambda h: torch.exp(2 * torch.tanh(h / 20)),
    "softclip": lambda h: torch.exp(4 / math.pi * torch.atan(h / 2)),
    "sigmoid": lambda h: 0.1 + 0.9 / (1 + torch.exp(-h - 2)),
    "unit": lambda h: (1 + 1 / (1 + torch.exp(-h))) / 2,
    "exp": torch.exp,
}


@pytest.mark.parametrize("scale", SCALES)
def test_scales_and_colours(scale: str):
    net, x = nn.Conv2d(2, 4, 1).double(), torch.randn(3, 2, 4, 5, dtype=torch.float64)
    moved = (torch.arange(4)[:, None] + torch.arange(5)) % 2 == 0
    h, shift = net(x * ~moved).chunk(2, 1)
    expected = torch.where(moved, x * SCALES[scale](h) + shift, x)
    assert_close(iz.AffineCoupling(net, scale=scale, split="checkerboard")(x), expected)
