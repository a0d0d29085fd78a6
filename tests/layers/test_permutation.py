"""Permutations: against indices by hand, and equal, not close."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from invzoo.layers.rearrangements.permutation import Deinterleave, Interleave, Permute, Reverse, Shuffle, Swap
from invzoo.module import InvertibleModule


def order_of(layer: InvertibleModule, n: int) -> list[int]:
    """Return where each entry of the output comes from, by the definition."""
    half = (n + 1) // 2
    match layer:
        case Permute() | Shuffle():
            return layer.permutation.tolist()
        case Reverse():
            return [*range(n)][::-1]
        case Swap():
            return [*range(half, n), *range(half)]
        case Interleave():
            return [half * (i % 2) + i // 2 for i in range(n)]
        case Deinterleave():
            return [*range(0, n, 2), *range(1, n, 2)]
    raise TypeError(layer)


MAKE: dict[str, Callable[..., InvertibleModule]] = {
    "permute": lambda n, dim=1, **options: Permute(torch.randperm(n), dim, **options),
    "shuffle": Shuffle,
    "reverse": lambda n, dim=1, **options: Reverse(dim, **options),
    "swap": lambda n, dim=1, **options: Swap(dim, **options),
    "interleave": lambda n, dim=1, **options: Interleave(dim, **options),
    "deinterleave": lambda n, dim=1, **options: Deinterleave(dim, **options),
}

every = pytest.mark.parametrize("name", MAKE)
directions = pytest.mark.parametrize("direction", ["function", "inverse"])


def same(x: Tensor, y: Tensor) -> bool:
    """Equal with dtype and shape, and to the sign of 0 and with NaN at the same places."""
    return x.dtype == y.dtype and x.shape == y.shape and x.detach().numpy().tobytes() == y.detach().numpy().tobytes()


def no_log_det(log_det: Tensor, batch: int, dtype: torch.dtype = torch.float64) -> bool:
    return log_det.dtype == dtype and log_det.tolist() == [0] * batch


class Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Draw a tensor, of which any dim but the one permuted may be empty, and that dim, counted from either end."""
    shape = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] = draw(st.integers(2, 9))
    dtype = draw(st.sampled_from([torch.float64, torch.float16, torch.complex64, torch.int64, torch.bool]))
    return torch.randn(shape).mul(10).to(dtype), dim


# ---- every permutation ----------------------------------------------------------------------------------------------


@every
@given(case=cases())
def test_by_the_definition(name: str, case: tuple[Tensor, int]) -> None:
    x, dim = case
    layer = MAKE[name](x.shape[dim], dim)
    assert layer.exact
    y = layer(x)
    assert same(y, x.index_select(dim, torch.tensor(order_of(layer, x.shape[dim]))))
    assert same(layer.inverse(y), x)
    assert same(layer(layer.inverse(x)), x)


@every
@directions
def test_any_bits_are_moved_as_they_are(name: str, direction: str) -> None:
    x = torch.tensor([[-0.0, 0.0, torch.nan, torch.inf, 1e-45]])
    layer = MAKE[name](5)
    y = getattr(layer, direction)(x)
    assert sorted(y.view(torch.int32)[0].tolist()) == sorted(x.view(torch.int32)[0].tolist())
    assert same(getattr(layer, {"function": "inverse", "inverse": "function"}[direction])(y), x)


@pytest.mark.parametrize("make", [lambda: Permute([1, 0, 2], 1), lambda: Shuffle(3, 1)], ids=["permute", "shuffle"])
@pytest.mark.parametrize("again", [False, True])
def test_a_replay_reindexes_once(make: Callable, again: bool) -> None:
    layer, x = make(), torch.randn(2, 3, requires_grad=True)
    y = layer(x)
    with Operators() as run:
        (gradient,) = torch.autograd.grad(y, x, torch.arange(6.0).reshape(2, 3), create_graph=again)
    assert run.names.count("index_select") == 1
    assert same(gradient, layer.inverse(torch.arange(6.0).reshape(2, 3)))


@every
@pytest.mark.parametrize(("dtype", "expected"), [(torch.complex128, torch.float64), (torch.int64, torch.float32)])
def test_log_dets_of_other_numbers_are_zeros(name: str, dtype: torch.dtype, expected: torch.dtype) -> None:
    layer, x = MAKE[name](5), torch.randn(5, 5).mul(10).to(dtype)
    for run in (layer.forward_and_log_det, layer.inverse_and_log_det):
        assert no_log_det(run(x)[1], 5, expected)


@every
@directions
@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_output_is_no_view_of_the_input(name: str, direction: str, n: int) -> None:
    x = torch.randn(3, n)
    y = getattr(MAKE[name](n), direction)(x)
    before = x.clone()
    y.zero_()
    assert same(x, before)


@pytest.mark.parametrize("n", [0, 1])
def test_one_entry_can_be_reversed_and_permuted(n: int) -> None:
    x = torch.randn(3, n)
    for layer in (Reverse(), Permute(range(n))):
        assert same(layer(x), x)
        assert same(layer.inverse(x), x)


# ---- Permute --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "permutation",
    [[2, 0, 1], (2, 0, 1), torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1], dtype=torch.uint8)],
    ids=["list", "tuple", "long", "byte"],
)
def test_permute_takes_sequences_and_tensors(permutation: Any) -> None:
    layer, x = Permute(permutation), torch.tensor([[10, 20, 30]])
    assert layer(x).tolist() == [[30, 10, 20]]
    assert layer.inverse(x).tolist() == [[20, 30, 10]]


def test_permute_keeps_a_copy_of_the_order() -> None:
    given = torch.tensor([2, 0, 1])
    layer = Permute(given)
    given.zero_()
    assert layer.permutation.tolist() == [2, 0, 1]


def test_the_order_of_permute_is_no_state() -> None:
    layer = Permute([1, 0])
    assert layer.state_dict() == {}
    layer.load_state_dict({})


def test_permute_survives_a_start_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = Permute([2, 0, 1])
    assert layer.permutation.is_meta
    layer.to_empty(device="cpu").permutation.zero_()
    layer.reset_parameters()
    assert layer.permutation.tolist() == [2, 0, 1]


def test_indices_take_a_device() -> None:
    assert Permute([1, 0], device="meta").permutation.is_meta
    assert Shuffle(3, device="meta").permutation.is_meta


# ---- Shuffle --------------------------------------------------------------------------------------------------------


def test_shuffle_draws_from_its_generator() -> None:
    draws = [Shuffle(50, generator=torch.Generator().manual_seed(seed)).permutation for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    state = torch.get_rng_state()
    Shuffle(50, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_shuffle_draws_from_the_global_generator() -> None:
    torch.manual_seed(7)
    drawn = Shuffle(50).permutation
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.randperm(50))


def test_shuffle_is_a_state_and_loads_in_both_directions() -> None:
    layer, other, x = Shuffle(50), Shuffle(50), torch.randn(2, 50)
    assert [*layer.state_dict()] == ["permutation"]
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert same(other(x), layer(x))
    assert same(other.inverse(layer(x)), x)


def test_shuffle_draws_anew_on_request() -> None:
    layer = Shuffle(50)
    before = layer.permutation.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.permutation, before)
    assert sorted(layer.permutation.tolist()) == [*range(50)]


# ---- Swap -----------------------------------------------------------------------------------------------------------


@directions
def test_swap_returns_two_streams_themselves(direction: str) -> None:
    a, b = torch.randn(2, 3), torch.randn(4)
    first, second = getattr(Swap(), direction)(a, b)
    assert first is b
    assert second is a


@pytest.mark.parametrize("kind", ["store", "recompute", "invert"])
def test_swap_of_streams_is_differentiable_and_copies_nothing(kind: str) -> None:
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    layer = Swap(mode=kind)
    first, second = layer(*layer(*layer(a, b)))
    assert (first.data_ptr(), second.data_ptr()) == (b.data_ptr(), a.data_ptr())
    (first.sum() + 2 * second.sum()).backward()
    assert a.grad.unique().tolist() == [2]
    assert b.grad.unique().tolist() == [1]


# ---- words ----------------------------------------------------------------------------------------------------------
