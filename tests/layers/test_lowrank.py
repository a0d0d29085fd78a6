"""WoodburyLinear against the dense matrix that it stands for."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import invzoo as iz
from invzoo.layers.linear.lowrank import squash
from tests.layers.helpers import inputs, perturbed, there_and_back

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


@real_and_complex
@pytest.mark.parametrize(("shape", "dim"), [((3, 4), -1), ((3, 2, 4), -1), ((3, 4, 2, 5), 1), ((3, 2, 4, 2), 2)])
def test_log_det_is_that_of_the_dense_matrix(dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    layer, x = woodbury(4, 2, dim=dim, dtype=dtype), inputs(*shape, dtype=dtype)
    positions = x[0].numel() // 4 * (2 if dtype.is_complex else 1)
    expected = positions * torch.linalg.slogdet(dense(layer)).logabsdet.expand(3)
    assert_close(layer.forward_and_log_det(x)[1], expected)
    assert_close(layer.inverse_and_log_det(x), (layer.inverse(x), -expected))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_over_any_dim(dim: int) -> None:
    layer = woodbury(4, 2, dim=dim)
    last = woodbury(4, 2)
    last.load_state_dict(layer.state_dict())
    x = inputs(*(4 if i == dim % 3 else 3 for i in range(3)))
    y = layer(x)
    assert_close(y, last(x.movedim(dim, -1)).movedim(-1, dim))
    assert_close(layer.inverse(y), x)


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (2, 0, 4), (4,)], ids=str)
def test_odd_sizes(shape: tuple[int, ...]) -> None:
    layer = woodbury(4, 4, bias=False)
    x = inputs(*shape)
    assert_close(layer.inverse(layer(x)), x)
    if len(shape) > 1:
        assert layer.log_det(x).shape == shape[:1]


@pytest.mark.parametrize("direction", ["function", "inverse", "log_det"])
def test_gradients_of_complex_values(direction: str) -> None:
    layer = woodbury(3, 2, dtype=torch.complex128)
    apply, leaves = getattr(layer, direction), (inputs(2, 3, dtype=torch.complex128), *layer.parameters())
    assert gradcheck(lambda x, *_: apply(x), leaves, fast_mode=True)
    assert gradgradcheck(lambda x, *_: apply(x), leaves, fast_mode=True)


def test_drift_of_a_deep_stack_in_float32() -> None:
    layers = [woodbury(64, 8, size=0.1, dtype=torch.float32) for _ in range(16)]
    x = torch.randn(32, 64)
    assert_close(there_and_back(layers, x), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_one_rounding(dtype: torch.dtype) -> None:
    layer, x = woodbury(8, 2, size=0.1, dtype=dtype), torch.randn(16, 8, dtype=dtype)
    y = layer(x)
    assert y.dtype == layer.inverse(y).dtype == dtype
    assert layer.log_det(x).dtype == torch.float32
    assert_close(y, (x.float() @ layer.weight.mT + layer.bias.float()).to(dtype))
    assert_close(layer.inverse(y), x, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_loses_nothing(dtype: torch.dtype) -> None:
    layer, x = woodbury(8, 2, dtype=torch.float32), torch.randn(16, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, log_det = layer.forward_and_log_det(x)
    assert y.dtype == log_det.dtype == torch.float32
    assert_close(y, layer(x.float()), rtol=0, atol=0)
    assert_close(log_det, layer.log_det(x.float()), rtol=0, atol=0)


def test_channels_last_stays() -> None:
    layer = woodbury(4, 2, dim=1)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, layer(x.contiguous()))


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["function", "inverse", "log_det"])
def test_compiles_without_a_break(direction: str) -> None:
    layer, x = woodbury(4, 2), inputs(2, 4)
    apply = getattr(layer, direction)
    torch.compiler.reset()  # layers share the code of these methods, and its limit of recompilations
    assert_close(torch.compile(apply, fullgraph=True, backend="aot_eager")(x), apply(x))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((0, 1), {}, ValueError, "WoodburyLinear: Expected features to be at least 1; got 0"),
        ((4, 0), {}, ValueError, "WoodburyLinear: Expected rank to be at least 1; got 0"),
        ((4, 1.0), {}, TypeError, "WoodburyLinear: Expected rank to be an int; got 1.0"),
        ((4, 5), {}, ValueError, "WoodburyLinear: Expected rank to be at most features=4; got 5"),
        ((4, 2), {"max_norm": 1.0}, ValueError, "WoodburyLinear: Expected max_norm to be below 1; got 1.0"),
        ((4, 2), {"max_norm": 0}, ValueError, "WoodburyLinear: Expected max_norm to be positive and finite; got 0"),
        ((4, 2), {"max_log_scale": -1.0}, ValueError, "Expected max_log_scale to be positive and finite; got -1.0"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        iz.WoodburyLinear(*arguments, **options)


def test_bad_inputs() -> None:
    layer = iz.WoodburyLinear(4, 2, dim=1)
    for direction, name in (("function", "x"), ("inverse", "y"), ("log_det", "x")):
        apply = getattr(layer, direction)
        with pytest.raises(ValueError, match=rf"Expected {name} to have size 4 in dim 1; got shape \(2, 3\)"):
            apply(torch.zeros(2, 3))
        with pytest.raises(TypeError, match=f"Expected {name} to be of the layer's dtype torch.float32; got"):
            apply(torch.zeros(2, 4).double())
        with pytest.raises(TypeError, match=f"WoodburyLinear: Expected {name} to be a Tensor; got list"):
            apply([1.0])


@pytest.mark.parametrize(("dim", "shape"), [(0, (4, 3)), (-1, (4,)), (-2, (4, 3))])
def test_no_log_det_without_a_batch_dim(dim: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"Expected x to have a batch dim before dim {dim}, for a log-determinant"):
        iz.WoodburyLinear(4, 2, dim=dim).log_det(torch.zeros(shape))
