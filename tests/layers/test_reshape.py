"""Reshapes and squeezes: against torch's own and indices by hand, and equal, not close."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from invzoo.layers.rearrangements.reshape import Flatten, Pad, Rearrange, Reshape
from invzoo.layers.rearrangements.squeeze import Squeeze, Unsqueeze
from invzoo.testing import CATALOGUE

CASES = {
    case.name: case
    for entry in CATALOGUE
    if entry.layer in (Squeeze, Unsqueeze, Flatten, Reshape, Rearrange, Pad)
    for case in entry.cases
}
every = pytest.mark.parametrize("name", CASES)
orders = pytest.mark.parametrize("order", ["channels_first", "positions_first"])


def same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)


# ---- every layer ----------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint8, torch.bool])
def test_moves_every_entry_and_back(name: str, dtype: torch.dtype) -> None:
    layer, (x,) = CASES[name].layer(), CASES[name].inputs()
    assert layer.exact
    x = x.mul(100).to(dtype)
    y = layer(x)
    assert same(layer.inverse(y), x)
    if not isinstance(layer, Pad):
        y = torch.rand(y.shape).mul(100).to(dtype)
        assert same(layer(layer.inverse(y)), y)


# ---- Squeeze --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_the_order_of_pixel_unshuffle(factor: int) -> None:
    x = torch.randn(2, 3, 6, 12)
    assert same(Squeeze(factor)(x), F.pixel_unshuffle(x, factor))
    y = torch.randn(2, 18, 2, 3)
    assert same(Unsqueeze(3)(y), F.pixel_shuffle(y, 3))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_order_of_space_to_depth(dims: int) -> None:
    x = torch.randn(2, 3, *[4] * dims)
    offsets = torch.cartesian_prod(*[torch.arange(2)] * dims).reshape(-1, dims).tolist()
    parts = [x[(..., *(slice(i, None, 2) for i in offset))] for offset in offsets]
    assert same(Squeeze(order="positions_first")(x), torch.cat(parts, 1))
    assert same(Squeeze()(x), torch.stack(parts, 2).flatten(1, 2))


@orders
def test_unsqueeze_undoes_squeeze(order: str) -> None:
    x = torch.randn(2, 3, 4, 6)
    assert same(Unsqueeze((2, 3), order=order)(Squeeze((2, 3), order=order)(x)), x)


# ---- Reshape, Flatten -----------------------------------------------------------------------------------------------


def test_flatten_and_reshape_keep_the_order() -> None:
    x = torch.randn(2, 3, 4)
    assert same(Flatten((3, 4))(x), x.flatten(1))
    assert same(Reshape([3, 4], [-1, 2, 2])(x), x.reshape(2, 3, 2, 2))


def test_a_scalar_sample() -> None:
    assert Flatten(())(torch.arange(3)).tolist() == [[0], [1], [2]]
    assert Reshape((1,), ())(torch.arange(3).unsqueeze(1)).tolist() == [0, 1, 2]


# ---- Rearrange ------------------------------------------------------------------------------------------------------


def test_rearrange_moves_any_axes() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert same(Rearrange("b c ... -> b ... c")(x), x.movedim(1, -1))
    assert same(Rearrange("b c ... -> c b ...")(x), x.movedim(0, 1))


def test_rearrange_takes_unit_axes() -> None:
    x = torch.randn(2, 3)
    layer = Rearrange("b c -> b 1 c")
    assert same(layer(x), x.unsqueeze(1))
    assert same(layer.inverse(x.unsqueeze(1)), x)


# ---- Pad ------------------------------------------------------------------------------------------------------------


def test_pad_adds_zeros_where_it_says() -> None:
    x = torch.randn(2, 3, 4)
    assert same(Pad(2, 1)(x), F.pad(x, (0, 0, 0, 2)))
    assert same(Pad((1, 2), -1)(x), F.pad(x, (1, 2)))
    assert same(Pad((0, 1), (1, -1))(x), F.pad(x, (0, 1, 0, 1)))
    assert same(Pad((0, 1), (1, -2))(x), F.pad(x, (0, 0, 0, 1)))  # a dim named twice is one dim


def test_pad_crops_whatever_is_there() -> None:
    y = torch.randn(2, 5)
    assert same(Pad((1, 2), 1).inverse(y), y[:, 1:3])
    assert same(Pad((2, 3), 1).inverse(y), y[:, 2:2])


# ---- in chains ------------------------------------------------------------------------------------------------------


# ---- words ----------------------------------------------------------------------------------------------------------
