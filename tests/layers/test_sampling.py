"""OrthogonalDownsample and OrthogonalUpsample against torch's own convolutions, and transforms known by name."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import invzoo as iz
from invzoo.layers.linear.sampling import dct_matrix, haar_matrix
from tests.layers.helpers import perturbed

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
STRIDES = [(2,), (4,), (2, 2), (2, 4), (2, 1, 2)]

strides = pytest.mark.parametrize("stride", STRIDES, ids=str)
all_kinds = pytest.mark.parametrize("kind", ["householder", "cayley"])
inits = pytest.mark.parametrize("init", ["haar", "dct", "random"])


def down(*arguments: Any, dtype: torch.dtype = torch.float64, **options: Any) -> iz.OrthogonalDownsample:
    return perturbed(iz.OrthogonalDownsample(*arguments, dtype=dtype, **options), 0.3)


def image(channels: int, stride: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    sizes = [(2 + i) * s for i, s in enumerate(stride)]
    return torch.randn(2, channels, *sizes, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_haar_matrix_is_orthonormal_and_starts_with_the_mean(n: int) -> None:
    h = haar_matrix(n)
    assert_close(h @ h.mT, torch.eye(n, dtype=torch.float64))
    assert_close(h[0], torch.full((n,), n**-0.5, dtype=torch.float64))


def test_haar_matrix_of_four_is_the_known_one() -> None:
    r = 2**0.5
    rows = [[1.0, 1, 1, 1], [1, 1, -1, -1], [r, -r, 0, 0], [0, 0, r, -r]]
    assert_close(haar_matrix(4), torch.tensor(rows, dtype=torch.float64) / 2)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_dct_matrix_is_the_cosine_transform(n: int) -> None:
    k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    scale = torch.where(k == 0, 1.0, 2.0).to(torch.float64).div(n).sqrt()
    assert_close(dct_matrix(n), scale * torch.cos(torch.pi * k * (2 * j + 1) / (2 * n)))


@strides
@all_kinds
@inits
def test_is_a_strided_grouped_convolution(stride: tuple[int, ...], kind: str, init: str) -> None:
    layer, x = down(3, stride, kind=kind, init=init), image(3, stride)
    kernel = layer.weight.reshape(-1, 1, *stride)
    y = layer(x)
    assert_close(y, CONV[len(stride)](x, kernel, stride=stride, groups=3))
    assert_close(layer.inverse(y), TRANSPOSED[len(stride)](y, kernel, stride=stride, groups=3))
    assert_close(layer.inverse(y), x)
    assert_close(torch.linalg.vector_norm(y), torch.linalg.vector_norm(x))


@strides
@all_kinds
def test_upsample_is_downsample_the_other_way_round(stride: tuple[int, ...], kind: str) -> None:
    layer = down(3, stride, kind=kind)
    cell = layer.weight.shape[-1]
    up = iz.OrthogonalUpsample(3 * cell, stride, kind=kind, dtype=torch.float64)
    up.load_state_dict(layer.state_dict())
    x = image(3, stride)
    y = layer(x)
    assert_close(up(y), x)
    assert_close(up.inverse(x), y)
    assert_close(up(up.inverse(x)), x)


@pytest.mark.parametrize("dims", [1, 2, 3])
@all_kinds
def test_haar_at_the_start_is_haar_downsample(dims: int, kind: str) -> None:
    layer, x = iz.OrthogonalDownsample(2, (2,) * dims, kind=kind, dtype=torch.float64), image(2, (2,) * dims)
    assert_close(layer(x), iz.HaarDownsample()(x))


@all_kinds
@pytest.mark.parametrize("reflections", [None, 1, 3])
def test_starts_where_init_says_and_learns_from_there(kind: str, reflections: int | None) -> None:
    if kind == "cayley" and reflections is not None:
        reflections = None
    layer = iz.OrthogonalDownsample(2, (3, 2), kind=kind, init="dct", reflections=reflections, dtype=torch.float64)
    assert_close(layer.weight, torch.kron(dct_matrix(3), dct_matrix(2)).expand(2, -1, -1))
    layer(image(2, (3, 2))).pow(3).sum().backward()
    grad = layer.matrix.own()[0].grad
    assert grad is not None
    assert (grad.abs().amax(-2) > 0).all()


def test_random_channels_differ() -> None:
    weight = iz.OrthogonalDownsample(2, init="random").weight
    assert (weight[0] - weight[1]).abs().max() > 0.1


def test_empty_image() -> None:
    layer, x = down(2, 2), torch.zeros(2, 2, 0, 4, dtype=torch.float64)
    assert layer(x).shape == (2, 8, 0, 2)
    assert layer.inverse(layer(x)).shape == x.shape


@all_kinds
@inits
def test_orthogonal_at_every_precision(kind: str, init: str) -> None:
    layer = perturbed(iz.OrthogonalDownsample(8, (4, 2), kind=kind, init=init).bfloat16(), 0.3)
    eye = torch.eye(8).expand(8, -1, -1)
    assert layer.weight.dtype == torch.float32
    assert_close(layer.weight @ layer.weight.mT, eye, rtol=0, atol=2e-6)
    assert_close(layer.float().weight @ layer.weight.mT, eye, rtol=0, atol=2e-6)
    double = layer.double().weight
    assert_close(double @ double.mT, eye.double(), rtol=0, atol=1e-9)


@inits
def test_from_the_meta_device(init: str) -> None:
    layer = iz.OrthogonalDownsample(2, 2, init=init, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    start = {"haar": haar_matrix, "dct": dct_matrix}.get(init)
    weight = layer.weight
    assert_close(weight @ weight.mT, torch.eye(4).expand(2, -1, -1))
    if start is not None:
        assert_close(weight, torch.kron(start(2), start(2)).float().expand(2, -1, -1))
