"""InvertibleConv1x1: InvertibleLinear over dim 1, in any memory format."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from invzoo.layers.linear.linear import InvertibleConv1x1, InvertibleLinear
from tests.layers.helpers import inputs

KINDS = ["householder", "cayley", "scaled", "plu", "free"]
WIDE = ["householder", "cayley", "scaled"]

all_kinds = pytest.mark.parametrize("kind", KINDS)
directions = pytest.mark.parametrize("direction", ["function", "inverse"])

# Both ways to multiply: images with fewer pixels than channels, and with more.
SHAPES = [
    (2, 4, 3),
    (2, 4, 7),
    (2, 4, 1, 3),
    (2, 4, 3, 5),
    (2, 4, 1, 1, 2),
    (2, 4, 2, 3, 2),
    (1, 4, 3, 3),
    (0, 4, 3, 3),
    (2, 4, 0),
    (2, 4, 3, 0),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def pair(*sizes: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[InvertibleConv1x1, InvertibleLinear]:
    """A convolution and a linear layer with the same perturbed weight."""
    conv, linear = InvertibleConv1x1(*sizes, dtype=dtype, **options), InvertibleLinear(*sizes, dtype=dtype, **options)
    with torch.no_grad():
        for p in conv.parameters():
            p.add_(0.1 * torch.randn_like(p))
    linear.load_state_dict(conv.state_dict())
    return conv, linear


@all_kinds
@shapes
@directions
def test_equals_linear_over_dim_1(kind: str, shape: tuple[int, ...], direction: str) -> None:
    conv, linear = pair(4, kind=kind)
    x = inputs(*shape)
    expected = getattr(linear, direction)(x.movedim(1, -1)).movedim(-1, 1)
    assert_close(getattr(conv, direction)(x), expected)


@pytest.mark.parametrize("kind", WIDE)
@shapes
def test_wide_equals_linear_over_dim_1(kind: str, shape: tuple[int, ...]) -> None:
    conv, linear = pair(4, 6, kind=kind)
    x = inputs(*shape)
    y = conv(x)
    assert y.shape == (shape[0], 6, *shape[2:])
    assert_close(y, linear(x.movedim(1, -1)).movedim(-1, 1))
    assert_close(conv.inverse(y), x)


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize(
    ("ndim", "memory_format"),
    [(4, torch.contiguous_format), (4, torch.channels_last), (5, torch.contiguous_format), (5, torch.channels_last_3d)],
)
@directions
def test_memory_format_is_kept(size: int, ndim: int, memory_format: torch.memory_format, direction: str) -> None:
    conv, _ = pair(8)
    x = torch.randn(2, 8, *[size] * (ndim - 2), dtype=torch.float64)
    y = getattr(conv, direction)(x.to(memory_format=memory_format))
    assert y.is_contiguous(memory_format=memory_format)
    assert_close(y, getattr(conv, direction)(x))


@pytest.mark.parametrize("mode", ["store", "recompute", "invert"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 4])
def test_strided_inputs_are_replayed(mode: str, memory_format: torch.memory_format, channels: int) -> None:
    conv, _ = pair(channels, mode=mode)
    for pixels in (1, 2, 6):
        x = torch.randn(3, 8, pixels, pixels, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
        views = x[:, :channels], x[:, :: 8 // channels], x[:1, :channels].expand(3, -1, -1, -1), x[:, -channels:].mT
        for view in (*views, x[:, :channels, :, :1], x[:, :1].expand(-1, channels, -1, -1)):
            expected = torch.autograd.grad(conv.function(view).pow(3).sum(), (x, *conv.parameters()))
            assert_close(torch.autograd.grad(conv(view).pow(3).sum(), (x, *conv.parameters())), expected)
