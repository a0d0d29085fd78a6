"""InvertibleLinear: its matrices, its two directions, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from invzoo.dtypes import bounded
from invzoo.layers.linear.linear import InvertibleLinear
from invzoo.layers.linear.matrix import cayley, householder
from tests.layers.helpers import inputs, perturbed

KINDS = ["householder", "cayley", "scaled", "plu", "free"]
ORTHONORMAL = ["householder", "cayley"]
WIDE = ["householder", "cayley", "scaled"]

all_kinds = pytest.mark.parametrize("kind", KINDS)
orthonormal_kinds = pytest.mark.parametrize("kind", ORTHONORMAL)
wide_kinds = pytest.mark.parametrize("kind", WIDE)
real_and_complex = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])


def linear(*sizes: int, perturb: float = 0.1, dtype: torch.dtype = torch.float64, **options: Any) -> InvertibleLinear:
    return perturbed(InvertibleLinear(*sizes, dtype=dtype, **options), perturb)


def eye_like(w: Tensor) -> Tensor:
    return torch.eye(w.shape[1], dtype=w.dtype)


def product_of_reflections(vectors: Tensor) -> Tensor:
    q = torch.eye(len(vectors), dtype=vectors.dtype)
    for v in vectors.mT[vectors.mT.abs().sum(1) > 0]:
        q = q - 2 * torch.outer(q @ v, v.conj()) / torch.linalg.vector_norm(v) ** 2
    return q


# The matrices


@real_and_complex
@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_householder_is_the_product_of_its_reflections(k: int, dtype: torch.dtype) -> None:
    vectors = torch.randn(5, k, dtype=dtype)
    assert_close(householder(vectors, 5), product_of_reflections(vectors), rtol=0, atol=1e-13)
    assert_close(householder(vectors, 3), product_of_reflections(vectors)[:, :3], rtol=0, atol=1e-13)


@real_and_complex
def test_cayley_is_the_transform_of_a_skew_matrix(dtype: torch.dtype) -> None:
    a = torch.randn(5, 5, dtype=dtype)
    skew, eye = a - a.mH, torch.eye(5, dtype=dtype)
    assert_close(cayley(a, 5), (eye - skew) @ torch.linalg.inv(eye + skew), rtol=0, atol=1e-13)


@real_and_complex
@orthonormal_kinds
@given(columns=st.integers(1, 8), more=st.integers(0, 4), perturb=st.sampled_from([0.0, 0.1, 1.0, 100.0]))
def test_columns_are_orthonormal(kind: str, dtype: torch.dtype, columns: int, more: int, perturb: float) -> None:
    w = linear(columns, columns + more, kind=kind, perturb=perturb, dtype=dtype).weight
    assert_close(w.mH @ w, eye_like(w), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_reflections_do_not_depend_on_the_scale_of_their_vectors(scale: float) -> None:
    vectors = torch.randn(6, 4, dtype=torch.float64)
    scales = torch.tensor([scale, 1.0, 1e200, scale], dtype=torch.float64)
    assert_close(householder(scales * vectors, 6), householder(vectors, 6), rtol=0, atol=1e-13)
    batch = torch.stack((vectors, scale * vectors))
    assert_close(householder(batch, 6), householder(vectors, 6).expand(2, -1, -1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("columns", [1, 64])
def test_parallel_reflections_stay_orthogonal(columns: int) -> None:
    q = householder(torch.ones(64, 64) + 1e-3 * torch.randn(64, 64), columns)
    assert_close(q.mT @ q, eye_like(q), rtol=0, atol=1e-6)


@real_and_complex
def test_a_zero_vector_is_the_identity_and_has_a_zero_gradient(dtype: torch.dtype) -> None:
    vectors = torch.randn(4, 3, dtype=dtype)
    vectors[:, 1] = 0
    vectors.requires_grad_()
    q = householder(vectors, 4)
    (grad,) = torch.autograd.grad(q.abs().pow(3).sum(), vectors, create_graph=True)
    (second,) = torch.autograd.grad(grad.abs().pow(2).sum(), vectors)
    assert_close(q, product_of_reflections(vectors.detach()))
    assert_close(grad[:, 1], torch.zeros_like(grad[:, 1]))
    assert second.isfinite().all()


def test_all_vectors_zero_are_the_identity() -> None:
    layer = InvertibleLinear(4, dtype=torch.float64)
    nn.init.zeros_(layer.matrix.vectors)
    x = inputs(2, 4)
    layer(x).sum().backward()
    assert_close(layer.weight, torch.eye(4, dtype=torch.float64))
    assert_close(layer.matrix.vectors.grad, torch.zeros(4, 4, dtype=torch.float64))


@given(
    bound=st.floats(0.01, 3.0),
    size=st.sampled_from([0.1, 1.0, 1e3, 1e30]),
    rows=st.integers(4, 6),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
)
def test_scaled_has_a_bounded_condition_number(bound: float, size: float, rows: int, dtype: torch.dtype) -> None:
    layer = linear(4, rows, kind="scaled", max_log_scale=bound, perturb=size, dtype=dtype)
    singular = torch.linalg.svdvals(layer.weight.detach())
    assert singular.max() / singular.min() <= math.exp(2 * bound) * (1 + 1e-12)


def test_scaled_has_the_singular_values_that_it_says() -> None:
    layer = linear(5, kind="scaled", max_log_scale=0.5)
    expected = bounded(layer.matrix.log_scale, 0.5).exp().sort(descending=True).values
    assert_close(torch.linalg.svdvals(layer.weight), expected)


@real_and_complex
def test_plu_is_what_its_name_says(dtype: torch.dtype) -> None:
    layer = linear(5, kind="plu", max_log_scale=0.5, dtype=dtype)
    matrix = layer.matrix
    lu = torch.empty_like(layer.weight)
    lu[:] = layer.weight[matrix.permutation.argsort()]
    lower, upper, _ = matrix.factors(*matrix.own())
    assert_close(lower @ upper, lu)
    assert_close(lower, lower.tril() - lower.tril().diagonal().diag() + eye_like(lower))
    assert_close(upper, upper.triu())
    assert_close(upper.diagonal().abs().log(), bounded(matrix.packed.diagonal().real, 0.5))


@given(size=st.sampled_from([1.0, 1e3, 1e30]))
def test_plu_never_becomes_singular(size: float) -> None:
    layer = InvertibleLinear(6, kind="plu", dtype=torch.float64)
    with torch.no_grad():
        layer.matrix.packed.diagonal().copy_(-size * torch.rand(6))
    assert torch.linalg.cond(layer.weight) <= math.exp(2) + 1e-9


@all_kinds
def test_condition_number_at_the_start_is_one(kind: str) -> None:
    assert_close(torch.linalg.cond(InvertibleLinear(7, kind=kind, dtype=torch.float64).weight).item(), 1.0)


# The two directions


@wide_kinds
def test_wide_inverse_projects(kind: str) -> None:
    layer = linear(3, 5, kind=kind)
    y = inputs(7, 5)
    solution = torch.linalg.lstsq(layer.weight, (y - layer.bias).mT).solution.mT
    assert_close(layer.inverse(y), solution)


@all_kinds
@real_and_complex
def test_function_is_that_of_nn_linear(kind: str, dtype: torch.dtype) -> None:
    layer = linear(4, kind=kind, dtype=dtype)
    x = inputs(2, 3, 4, dtype=dtype)
    assert_close(layer(x), x @ layer.weight.mT + layer.bias)
    assert_close(layer.inverse(layer(x)), x)


@all_kinds
def test_a_large_bias_does_no_harm(kind: str) -> None:
    layer = linear(8, kind=kind, dtype=torch.float32)
    nn.init.constant_(layer.bias, 100.0)
    x = inputs(16, 8, dtype=torch.float32)
    assert_close(layer.inverse(layer(x)), x, rtol=0, atol=2e-3)


@all_kinds
@pytest.mark.parametrize("direction", ["function", "inverse"])
def test_gradients_reach_every_parameter(kind: str, direction: str) -> None:
    layer = linear(4, kind=kind)
    getattr(layer, direction)(inputs(5, 4)).pow(3).sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() > 0 for p in layer.parameters())


@pytest.mark.parametrize("mode", ["store", "recompute", "invert"])
def test_strided_inputs(mode: str) -> None:
    layer, x = linear(4, mode=mode), inputs(6, 8, 3)
    for view in (x[::2, ::2].mT, x[:, :4].mT, x[:1, :4].mT.expand(5, -1, -1), x[:, 4:, 0], x[0, :4].T):
        expected = torch.autograd.grad(layer.function(view.contiguous()).pow(3).sum(), (x, *layer.parameters()))
        assert_close(torch.autograd.grad(layer(view).pow(3).sum(), (x, *layer.parameters())), expected)


@all_kinds
def test_a_replay_builds_the_matrix_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, builds = linear(4, kind=kind), []
    factors = layer.matrix.factors
    monkeypatch.setattr(layer.matrix, "factors", lambda *p: builds.append(kind) or factors(*p))
    y = layer(inputs(2, 4))
    y.sum().backward()
    assert len(builds) == 2


# Precision


@orthonormal_kinds
def test_polishing_keeps_float32_at_its_rounding(kind: str) -> None:
    w = linear(256, kind=kind, perturb=1.0, dtype=torch.float32).weight
    assert (w.mT @ w - eye_like(w)).square().mean().sqrt() < 3e-8


@all_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_loses_nothing(kind: str, dtype: torch.dtype) -> None:
    layer = linear(16, kind=kind, dtype=torch.float32)
    x = torch.randn(32, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        back = layer.inverse(y)
        weight = layer.weight
    assert (y.dtype, back.dtype, weight.dtype) == (torch.float32,) * 3
    assert_close(y, layer(x.float()), rtol=0, atol=0)
    assert_close(weight, layer.weight, rtol=0, atol=0)
    assert_close(back, x.float(), rtol=0, atol=1e-4)
    assert_close(back.to(dtype), x, rtol=0, atol=1e-4)


@all_kinds
def test_autocast_gradients_are_those_of_float32(kind: str) -> None:
    layer = linear(8, kind=kind, dtype=torch.float32)
    x = inputs(4, 8, dtype=torch.float32)
    plain = torch.autograd.grad(layer(x).pow(3).sum(), (x, *layer.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert_close(torch.autograd.grad(y.pow(3).sum(), (x, *layer.parameters())), plain)


@all_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_one_rounding(kind: str, dtype: torch.dtype) -> None:
    layer = linear(16, kind=kind, dtype=dtype)
    x = torch.randn(32, 16, dtype=dtype, requires_grad=True)
    y = layer(x)
    wide = x.float() @ layer.weight.mT + layer.bias.float()
    y.sum().backward()
    assert y.dtype == x.grad.dtype == layer.inverse(y).dtype == dtype
    assert layer.weight.dtype == torch.float32
    assert_close(y, wide.to(dtype))
    error = torch.linalg.vector_norm((layer.inverse(y) - x).float()) / torch.linalg.vector_norm(x.float())
    assert error < 2 * torch.finfo(dtype).eps * torch.linalg.cond(layer.weight)


# A module like others


@all_kinds
def test_reset_parameters_starts_afresh(kind: str) -> None:
    layer = InvertibleLinear(4, kind=kind, device="meta", dtype=torch.float64)
    x = torch.empty(2, 4, device="meta", dtype=torch.float64)
    assert layer.inverse(layer.function(x)).shape == (2, 4)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    first = layer.weight.clone()
    layer.reset_parameters()
    assert_close(first @ first.mT, eye_like(first))
    assert (layer.weight - first).abs().max() > 0.01
    assert_close(layer.bias.detach(), torch.zeros(4, dtype=torch.float64))


def test_same_seed_same_layer() -> None:
    first = [InvertibleLinear(8, kind=kind).weight for kind in KINDS]
    torch.manual_seed(0)
    assert_close([InvertibleLinear(8, kind=kind).weight for kind in KINDS], first, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, in jacfwd
@all_kinds
def test_transforms_of_torch_func(kind: str) -> None:
    layer, x = linear(4, kind=kind), torch.randn(5, 4, dtype=torch.float64)
    assert_close(torch.func.jacrev(layer.function)(x[0]), layer.weight)
    assert_close(torch.func.jacfwd(layer.inverse)(x[0]), torch.linalg.inv(layer.weight))


def test_volume_preserving_is_said_of_square_orthonormal_weights_only() -> None:
    assert {kind for kind in KINDS if InvertibleLinear(4, kind=kind).volume_preserving} == set(ORTHONORMAL)
    assert not any(InvertibleLinear(4, 5, kind=kind).volume_preserving for kind in WIDE)
    assert not InvertibleLinear.volume_preserving


def test_no_bias_no_parameter() -> None:
    layer = InvertibleLinear(4, 4, bias=False)
    assert [name for name, _ in layer.named_parameters()] == ["matrix.vectors"]
    assert "bias=False" in repr(layer)


# What is refused


@pytest.mark.parametrize(
    ("entries", "got"),
    [
        (torch.zeros(4, 4), "a singular weight"),
        (torch.ones(4, 4), "a singular weight"),
        (torch.tensor([1.0, 1.0, 1.0, 1e-17]).diag(), r"1.0e\+17"),
        (torch.full((4, 4), math.nan), "nan"),
    ],
    ids=["zeros", "ones", "nearly singular", "nan"],
)
def test_a_singular_free_weight_is_refused(entries: Tensor, got: str) -> None:
    layer = InvertibleLinear(4, kind="free", dtype=torch.float64)
    with torch.no_grad():
        layer.matrix.entries.copy_(entries)
    match = r"InvertibleLinear: Expected weight to be invertible, with a condition number below 4.5e\+15; got " + got
    with pytest.raises(ValueError, match=match):
        layer.inverse(inputs(2, 4))


def test_the_name_in_an_error_is_that_of_the_subclass() -> None:
    class Mixer(InvertibleLinear):
        pass

    with pytest.raises(ValueError, match="^Mixer: Expected reflections"):
        Mixer(4, reflections=0)
    with pytest.raises(ValueError, match="^Mixer: Expected x"):
        Mixer(4)(torch.zeros(3))
