"""InvertiblePatchConv against torch's own convolutions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import invzoo as iz
from tests.layers.helpers import perturbed

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
KERNELS = [(3,), (2, 2), (1, 3), (2, 1, 2)]

kernels = pytest.mark.parametrize("kernel", KERNELS, ids=str)
all_kinds = pytest.mark.parametrize("kind", ["householder", "cayley"])
extra_channels = pytest.mark.parametrize("extra", [0, 3])


def conv(channels: int, kernel: Any, extra: int = 0, size: float = 0.3, **options: Any) -> iz.InvertiblePatchConv:
    options = {"dtype": torch.float64} | options
    wanted = channels * iz.InvertiblePatchConv(1, None, kernel).out_channels + extra
    return perturbed(iz.InvertiblePatchConv(channels, wanted, kernel, **options), size)


def image(channels: int, kernel: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, channels, *((2 + i) * k for i, k in enumerate(kernel)), dtype=dtype, requires_grad=True)


@kernels
@all_kinds
@extra_channels
def test_is_a_strided_convolution_with_orthonormal_columns(kernel: tuple[int, ...], kind: str, extra: int) -> None:
    layer, x = conv(2, kernel, extra, kind=kind), image(2, kernel)
    y = layer(x)
    q = layer.weight.flatten(1)
    assert_close(q.mT @ q, torch.eye(q.shape[1], dtype=q.dtype))
    assert_close(y, CONV[len(kernel)](x, layer.weight, layer.mix.bias, stride=kernel))
    assert_close(layer.inverse(y), x)


@kernels
def test_wide_inverse_is_the_nearest_patch(kernel: tuple[int, ...]) -> None:
    layer = conv(2, kernel, 3)
    y = torch.randn(2, layer.out_channels, *(2 for _ in kernel), dtype=torch.float64)
    gap = (layer(layer.inverse(y)) - y).flatten(2)
    assert (gap.abs() > 1e-3).any()
    assert_close(layer.weight.flatten(1).mT @ gap, torch.zeros(2, layer.weight[0].numel(), gap.shape[-1]).double())


def test_names() -> None:
    layer = iz.InvertiblePatchConv(1, bias=False)
    assert [name for name, _ in layer.named_parameters()] == ["mix.matrix.vectors"]
    assert (layer.channels, layer.out_channels, layer.kernel_size) == (1, 4, (2, 2))


def test_bad_inputs_name_the_layer_inside() -> None:
    layer = iz.InvertiblePatchConv(2, 9, 2)
    for shape, where, match in (
        ((2, 3, 4, 4), "mix (InvertibleConv1x1)", r"Expected x to have size 8 in dim 1; got shape \(2, 12, 2, 2\)"),
        ((2, 2, 3, 4), "squeeze (Squeeze)", r"Expected x to have sizes that are multiples of \(2, 2\) in dims 2, ..."),
        ((2, 2, 4), "squeeze (Squeeze)", r"Expected x to have dims \(batch, channels, ...\) with 2 dims of pixels"),
    ):
        with pytest.raises(ValueError, match=match) as info:
            layer(torch.zeros(shape))
        assert any(f"layer {where}" in note for note in info.value.__notes__)
    with pytest.raises(ValueError, match=r"InvertibleConv1x1: Expected y to have size 9 in dim 1"):
        layer.inverse(torch.zeros(2, 8, 2, 2))
    with pytest.raises(TypeError, match="InvertibleConv1x1: Expected x to be of the layer's dtype torch.float32; got"):
        layer(torch.zeros(2, 2, 4, 4).double())
