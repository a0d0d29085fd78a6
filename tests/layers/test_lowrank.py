"""WoodburyLinear against the dense matrix that it stands for."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import invzoo as iz
from invzoo.layers.linear.lowrank import squash
from tests.layers.helpers import inputs, perturbed

real_and_complex = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])


def woodbury(*sizes: int, size: float = 0.5, dtype: torch.dtype = torch.float64, **options: Any) -> iz.WoodburyLinear:
    return perturbed(iz.WoodburyLinear(*sizes, dtype=dtype, **options), size)


def dense(layer: iz.WoodburyLinear) -> Tensor:
    """D + U V^H, with U = D^(1/2) A and V = D^(1/2) B."""
    s = layer.max_log_scale * torch.tanh(layer.log_scale / layer.max_log_scale)
    a, b = (squash(p, math.sqrt(layer.max_norm)) for p in (layer.left, layer.right))
    d = s.exp()
    u, v = d.sqrt()[:, None] * a, d.sqrt()[:, None] * b
    return d.diag().to(u.dtype) + u @ v.mH


@real_and_complex
def test_squash_bounds_singular_values(dtype: torch.dtype) -> None:
    a = 0.1 * torch.randn(6, 3, dtype=dtype)
    sigma = torch.linalg.svdvals(a)
    sigma = sigma / (1 + sigma.square().sum() / 1e4).sqrt()
    assert_close(torch.linalg.svdvals(squash(a, 0.7)), 0.7 * sigma / (1 + sigma**2).sqrt())


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e4, 1e8])
def test_squash_survives_parallel_columns_of_any_size(size: float) -> None:
    a = size * (torch.ones(64, 8) + 1e-4 * torch.randn(64, 8))
    assert torch.linalg.svdvals(squash(a, 1.0)).max() <= 1 + 1e-5


@real_and_complex
def test_is_the_dense_matrix(dtype: torch.dtype) -> None:
    layer = woodbury(6, 2, dtype=dtype)
    x, w = inputs(3, 4, 6, dtype=dtype), dense(layer)
    assert_close(layer.weight, w)
    assert_close(layer(x), x @ w.mT + layer.bias)
    assert_close(layer.inverse(x), torch.linalg.solve(w, (x - layer.bias).mT).mT)


def test_starts_as_the_identity_and_learns() -> None:
    layer, x = iz.WoodburyLinear(6, 2, dtype=torch.float64), inputs(3, 6)
    y = layer(x)
    assert_close(y, x)
    y.pow(3).sum().backward()
    assert layer.left.grad is not None
    assert layer.left.grad.count_nonzero() == layer.left.numel()


@given(
    size=st.sampled_from([0.0, 1.0, 10.0, 1e6]),
    rank=st.integers(1, 6),
    max_norm=st.sampled_from([0.1, 0.5, 0.9]),
    max_log_scale=st.sampled_from([0.1, 1.0, 2.0]),
)
def test_the_condition_number_is_bounded(size: float, rank: int, max_norm: float, max_log_scale: float) -> None:
    layer = woodbury(6, rank, size=size, max_norm=max_norm, max_log_scale=max_log_scale)
    bound = math.exp(2 * max_log_scale) * (1 + max_norm) / (1 - max_norm)
    assert torch.linalg.cond(layer.weight) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_over_any_dim(dim: int) -> None:
    layer = woodbury(4, 2, dim=dim)
    last = woodbury(4, 2)
    last.load_state_dict(layer.state_dict())
    x = inputs(*(4 if i == dim % 3 else 3 for i in range(3)))
    y = layer(x)
    assert_close(y, last(x.movedim(dim, -1)).movedim(-1, dim))
    assert_close(layer.inverse(y), x)


def test_channels_last_stays() -> None:
    layer = woodbury(4, 2, dim=1)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, layer(x.contiguous()))
