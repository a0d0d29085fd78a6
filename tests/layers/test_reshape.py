"""Reshapes and squeezes: against torch's own and indices by hand, and equal, not close."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invzoo.containers import InvertibleSequential
from invzoo.layers.rearrangements.permutation import Permute
from invzoo.layers.rearrangements.reshape import Flatten, Pad, Rearrange, Reshape
from invzoo.layers.rearrangements.squeeze import Squeeze, Unsqueeze
from invzoo.module import InvertibleModule
from invzoo.testing import CATALOGUE
from tests.layers.helpers import refused

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


@every
def test_nothing_is_saved_for_backward(name: str) -> None:
    layer, (x,), saved = CASES[name].layer(), CASES[name].inputs(), list[Tensor]()
    layer.mode = "store"
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer.inv(layer(x.requires_grad_()))
    assert saved == []


@every
def test_maps(name: str) -> None:
    layer, x = CASES[name].layer(), torch.stack([CASES[name].inputs(seed=seed)[0] for seed in range(3)])
    expected = torch.stack([layer(one) for one in x])
    assert same(torch.func.vmap(layer)(x), expected)
    assert same(torch.func.vmap(layer.inverse)(expected), x)


@every
@pytest.mark.parametrize(("direction", "argument"), [("function", "x"), ("inverse", "y")])
def test_what_is_no_tensor_is_refused(name: str, direction: str, argument: str) -> None:
    layer = CASES[name].layer()
    with refused(f"{type(layer).__name__}: Expected {argument} to be a Tensor; got list", TypeError):
        getattr(layer, direction)([[1, 2]])


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


@orders
def test_squeeze_in_channels_last(order: str) -> None:
    x = torch.randn(2, 3, 4, 6).to(memory_format=torch.channels_last)
    assert same(Squeeze(order=order)(x), Squeeze(order=order)(x.contiguous()))


@pytest.mark.parametrize("factor", [0, -1, (2, 0)])
def test_factors_below_one_are_refused(factor: Any) -> None:
    with pytest.raises(ValueError, match=r"^Squeeze: Expected factor to be at least 1; got (0|-1)$"):
        Squeeze(factor)


@pytest.mark.parametrize("factor", [2.0, True, "2", [2, 1.5], None])
def test_factors_that_are_no_ints_are_refused(factor: Any) -> None:
    with pytest.raises(TypeError, match=r"^Unsqueeze: Expected factor to be an int; got "):
        Unsqueeze(factor)


@pytest.mark.parametrize("factor", [(), (1, 2, 1, 2)])
def test_another_number_of_factors_is_refused(factor: Any) -> None:
    with refused(f"Squeeze: Expected factor to be an int or one to three of them; got {factor}"):
        Squeeze(factor)


def test_another_order_is_refused() -> None:
    with refused("Squeeze: Expected order to be one of 'channels_first', 'positions_first'; got 'tf'"):
        Squeeze(order="tf")


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 2, 2, 2, 2)])
def test_another_number_of_dims_is_refused(shape: tuple[int, ...]) -> None:
    expected = f"to have dims (batch, channels, ...) with one to three dims of pixels; got shape {shape}"
    with refused(f"Squeeze: Expected x {expected}"):
        Squeeze()(torch.zeros(shape))
    with refused(f"Squeeze: Expected y {expected}"):
        Squeeze().inverse(torch.zeros(shape))
    with refused(f"Squeeze: Expected x {expected.replace('one to three', '1')}"):
        Squeeze((2,))(torch.zeros(shape))


def test_sizes_that_are_no_multiples_are_refused() -> None:
    with refused(
        "Squeeze: Expected x to have sizes that are multiples of (2, 3) in dims 2, ...; got shape (1, 2, 4, 4)"
    ):
        Squeeze((2, 3))(torch.zeros(1, 2, 4, 4))
    with refused("Squeeze: Expected y to have a multiple of 6 channels; got shape (1, 8, 4, 4)"):
        Squeeze((2, 3)).inverse(torch.zeros(1, 8, 4, 4))


# ---- Reshape, Flatten -----------------------------------------------------------------------------------------------


def test_flatten_and_reshape_keep_the_order() -> None:
    x = torch.randn(2, 3, 4)
    assert same(Flatten((3, 4))(x), x.flatten(1))
    assert same(Reshape([3, 4], [-1, 2, 2])(x), x.reshape(2, 3, 2, 2))


def test_a_scalar_sample() -> None:
    assert Flatten(())(torch.arange(3)).tolist() == [[0], [1], [2]]
    assert Reshape((1,), ())(torch.arange(3).unsqueeze(1)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(4, 2), (4, -1, -1), (-1, 0), (5, -1)])
def test_shapes_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^Reshape: Expected output_shape to have "):
        Reshape((3, 4), shape)


@pytest.mark.parametrize("shape", [3, "34", (3.0, 4), None])
def test_shapes_that_are_not_made_of_ints_are_refused(shape: Any) -> None:
    with refused(f"Reshape: Expected input_shape to be a sequence of ints; got {shape!r}", TypeError):
        Reshape(shape, (12,))
    with refused(f"Reshape: Expected output_shape to be a sequence of ints; got {shape!r}", TypeError):
        Reshape((12,), shape)


def test_sizes_below_one_are_refused() -> None:
    with refused("Flatten: Expected input_shape to have sizes of at least 1; got (3, 0)"):
        Flatten((3, 0))


def test_inputs_of_another_shape_are_refused() -> None:
    with refused("Flatten: Expected x to have shape (batch, 3, 4); got shape (2, 4, 3)"):
        Flatten((3, 4))(torch.zeros(2, 4, 3))
    with refused("Flatten: Expected y to have shape (batch, 12); got shape (12,)"):
        Flatten((3, 4)).inverse(torch.zeros(12))
    with refused("Flatten: Expected x to have shape (batch); got shape ()"):
        Flatten(())(torch.zeros(()))


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


@pytest.mark.parametrize("pattern", ["b c", "b c -> c -> b", "b (c -> b c", "b b -> b b", "b c! -> c! b", ""])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"^Rearrange: Expected pattern to be an einops pattern 'axes -> axes'; got "):
        Rearrange(pattern)


@pytest.mark.parametrize("pattern", ["b c -> b", "b -> b c", "b c -> b c 2", "b c ... -> b c"])
def test_patterns_that_lose_or_repeat_are_refused(pattern: str) -> None:
    with refused(f"Rearrange: Expected pattern to have the same axes on both sides; got {pattern!r}"):
        Rearrange(pattern)


def test_dots_in_parentheses_are_refused() -> None:
    message = "Rearrange: Expected pattern to have no '...' inside parentheses, for an inverse; got 'b ... -> (b ...)'"
    with refused(message):
        Rearrange("b ... -> (b ...)")


@pytest.mark.parametrize(("pattern", "axes"), [("b c h -> b (c h)", "c h"), ("b (c h) -> b c h", "c h")])
def test_sizes_that_a_direction_lacks_are_refused(pattern: str, axes: str) -> None:
    message = "Rearrange: Expected sizes to give all but one of (c h), for function and inverse; got none of c, h"
    with refused(message):
        Rearrange(pattern)
    Rearrange(pattern, {"c": 2})


def test_sizes_of_other_axes_are_refused() -> None:
    with refused("Rearrange: Expected sizes to name axes of the pattern; got 'd', 'e'"):
        Rearrange("b c -> b c", {"e": 1, "d": 2})
    with refused("Rearrange: Expected size of 'c' to be at least 1; got 0"):
        Rearrange("b c -> b c", {"c": 0})


def test_inputs_that_do_not_fit_are_refused() -> None:
    layer = Rearrange("b (n p) -> b n p", {"p": 2})
    with refused("Rearrange: Expected x to have dims 'b (n p)' with {'p': 2}; got shape (3, 5)"):
        layer(torch.zeros(3, 5))
    with refused("Rearrange: Expected y to have dims 'b n p' with {'p': 2}; got shape (3, 5, 3)"):
        layer.inverse(torch.zeros(3, 5, 3))
    with refused("Rearrange: Expected x to have dims 'b c'; got shape (3,)"):
        Rearrange("b c -> c b")(torch.zeros(3))


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


@pytest.mark.parametrize("padding", [-1, (1, -1), (1,), (1, 2, 3), (1, 0.5)])
def test_another_padding_is_refused(padding: Any) -> None:
    with refused(f"Pad: Expected padding to be (before, after), both at least 0; got {padding}"):
        Pad(padding)


def test_pad_refuses_dims_and_sizes() -> None:
    with refused("Pad: Expected x to have a dim 2; got shape (3, 4)"):
        Pad(1, 2)(torch.zeros(3, 4))
    with refused("Pad: Expected y to have a dim 1 with at least 3 entries; got shape (3, 2)"):
        Pad((1, 2)).inverse(torch.zeros(3, 2))


# ---- in chains ------------------------------------------------------------------------------------------------------


def test_a_pyramid_of_reshapes_keeps_log_dets_and_gradients() -> None:
    net = InvertibleSequential(Squeeze(), Permute([3, 1, 2, 0]), Flatten((4, 2, 2)), Reshape((16,), (2, 8)))
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    y, log_det = net.forward_and_log_det(x)
    assert log_det.tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad((y**2).sum(), x)
    assert same(gradient, 2 * x)
    assert same(net.inverse(y), x)


def test_padded_channels_train_as_plain_ones() -> None:
    layers = Pad(3), nn.Linear(6, 2, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(nn.Sequential(*layers)(x).pow(2).sum(), x)
    (expected,) = torch.autograd.grad(layers[1](F.pad(x, (0, 3))).pow(2).sum(), x)
    assert same(gradient, expected)


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Squeeze(), "Squeeze(2, order='channels_first')"),
        (Unsqueeze([2, 1], order="positions_first"), "Unsqueeze((2, 1), order='positions_first')"),
        (Flatten([3, 4]), "Flatten((3, 4))"),
        (Reshape((3, 4), (2, -1)), "Reshape((3, 4), (2, 6))"),
        (Rearrange("b c -> c b"), "Rearrange('b c -> c b')"),
        (Rearrange("b (c d) -> b c d", {"c": 2}), "Rearrange('b (c d) -> b c d', {'c': 2})"),
        (Pad(2), "Pad((0, 2), dim=1)"),
        (Pad((1, 1), (2, 3)), "Pad((1, 1), dim=(2, 3))"),
    ],
    ids=str,
)
def test_repr(layer: InvertibleModule, expected: str) -> None:
    assert repr(layer) == expected
