"""What InvertibleLinear and InvertibleConv1x1 share: log-determinants, and parameters per sample from a conditioner."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close

import invzoo as iz
from invzoo.layers.linear.matrix import MATRICES
from tests.layers.helpers import perturbed

KINDS = ["householder", "cayley", "scaled", "plu", "free"]
WIDE = ["householder", "cayley", "scaled"]
MODES = ["store", "recompute", "invert"]
LAYERS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "linear": (iz.InvertibleLinear, (4,)),
    "linear, positions": (iz.InvertibleLinear, (2, 3, 4)),
    "conv": (iz.InvertibleConv1x1, (4, 5)),
    "conv, pixels": (iz.InvertibleConv1x1, (4, 2, 3)),
}

all_kinds = pytest.mark.parametrize("kind", KINDS)
all_layers = pytest.mark.parametrize("name", LAYERS)
real_and_complex = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])


def plain(name: str, kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return perturbed(LAYERS[name][0](4, kind=kind, dtype=dtype, **options), 0.2)


def conditioned(
    name: str, kind: str, dtype: torch.dtype = torch.float64, net: type[nn.Linear] = nn.Linear, **options: Any
) -> Any:
    layer = plain(name, kind, dtype, **options)
    layer.conditioner = net(2, layer.num_parameters, dtype=dtype)
    return layer


TOOLS: dict[str, Callable[[nn.Module], Any]] = {
    "prune": lambda matrix: prune.l1_unstructured(matrix, "packed", 0.5),
    "hook": lambda matrix: nn.utils.weight_norm(matrix, "packed"),
    "parametrization": lambda matrix: nn.utils.parametrizations.spectral_norm(matrix, "packed"),
}


def draw(name: str, batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """An input and a context."""
    x = torch.randn(batch, *LAYERS[name][1], dtype=dtype, requires_grad=True)
    return x, torch.randn(batch, 2, dtype=dtype, requires_grad=True)


def of_sample(layer: Any, context: Tensor) -> Any:
    """The plain layer that the conditioned one is for one context."""
    twin = copy.deepcopy(layer)
    twin.conditioner = None
    vector = layer.conditioner(context)
    with torch.no_grad():
        for p in (*twin.matrix.parameters(), *([] if twin.bias is None else [twin.bias])):
            piece, vector = vector[: p.numel()], vector[p.numel() :]
            p.add_((piece if p.is_complex() or not piece.is_complex() else piece.real).reshape(p.shape))
    assert len(vector) == 0
    return twin


# Matrices in a batch


@all_kinds
def test_own_parameters_are_all_in_order(kind: str) -> None:
    matrix = MATRICES[kind]("Layer", 4, 4)
    assert [*map(id, matrix.own())] == [*map(id, matrix.parameters())]


# Tools that change the matrix


@pytest.mark.parametrize("method", ["forward", "forward_and_log_det", "inverse_and_log_det", "inverse", "log_det"])
@pytest.mark.parametrize("with_context", [False, True], ids=["plain", "context"])
@pytest.mark.parametrize("mode", iz.Mode)
def test_hooks_on_the_matrix_fire_once_in_every_method(method: str, with_context: bool, mode: str) -> None:
    layer = (conditioned if with_context else plain)("linear", "plu", mode=mode)
    (x, context), calls = draw("linear"), []
    layer.matrix.register_forward_hook(lambda *_: calls.append(1))
    values = iz.engine.tuple_of(getattr(layer, method)(x, **({"context": context} if with_context else {})))
    sum(value.sum() for value in values).backward()
    assert len(calls) == 1


@all_kinds
@torch.no_grad()
def test_no_parameter_is_read_behind_the_call_of_the_matrix(kind: str) -> None:
    """FSDP2 frees them there."""
    layer, (x, _) = plain("linear", kind), draw("linear")
    expected = layer.forward_and_log_det(x), layer.inverse_and_log_det(x)
    values = [p.data for p in layer.matrix.parameters()]

    def gather(matrix: nn.Module, *_: Any) -> None:
        for p, value in zip(matrix.parameters(), values, strict=True):
            p.data = value

    def free(matrix: nn.Module, *_: Any) -> None:
        for p in matrix.parameters():
            p.data = p.data.new_empty(0)

    layer.matrix.register_forward_pre_hook(gather)
    layer.matrix.register_forward_hook(free)
    assert_close((layer.forward_and_log_det(x), layer.inverse_and_log_det(x)), expected)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("with_context", [False, True], ids=["plain", "context"])
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("mode", iz.Mode)
def test_tools_on_the_matrix_act_in_every_method(tool: str, with_context: bool, mode: str) -> None:
    layer = (conditioned if with_context else plain)("linear", "plu", mode=mode)
    x, context = draw("linear")
    side = {"context": context} if with_context else {}
    TOOLS[tool](layer.matrix)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(3):
        y, log_det = layer.forward_and_log_det(x, **side)
        optimizer.zero_grad()
        (y.square().sum() - log_det.sum() + layer.inv(x, **side).square().sum()).backward()
        optimizer.step()
    layer.eval()
    with torch.no_grad():
        x_again, inverse_log_det = layer.inverse_and_log_det(x, **side)  # the first to see the last step
        assert_close(layer(x_again, **side), x)
        assert_close(layer.log_det(x_again, **side), -inverse_log_det)


# Log-determinants


@pytest.mark.parametrize("kind", ["householder", "cayley", "scaled", "plu"])
def test_no_slogdet_where_the_scales_are_known(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = plain("conv", kind)
    monkeypatch.setattr(torch.linalg, "slogdet", lambda _: pytest.fail("slogdet"))
    layer.log_det(draw("conv")[0])


def test_log_det_of_no_positions_is_zero() -> None:
    x = torch.zeros(2, 4, 0, dtype=torch.float64)
    assert_close(plain("conv", "free").log_det(x), torch.zeros(2, dtype=torch.float64), rtol=0, atol=0)


@all_kinds
def test_log_det_may_be_changed_in_place(kind: str) -> None:
    layer, (x, _) = plain("linear", kind), draw("linear")
    with torch.no_grad():
        log_det = layer.log_det(x)
        log_det[0] += 1.0
    assert_close(log_det[1:], layer.log_det(x).detach()[1:])


# Conditioners


@all_layers
@all_kinds
@real_and_complex
@pytest.mark.parametrize("bias", [True, False])
def test_each_sample_has_parameters_of_its_own(name: str, kind: str, dtype: torch.dtype, bias: bool) -> None:
    layer = conditioned(name, kind, dtype, bias=bias)
    x, context = draw(name, dtype=dtype)
    y, log_det = layer.forward_and_log_det(x, context=context)
    for i in range(3):
        twin = of_sample(layer, context[i])
        assert_close(y[i : i + 1], twin.function(x[i : i + 1]))
        assert_close(log_det[i : i + 1], twin.log_det(x[i : i + 1]))
    assert_close(layer.inverse(y, context=context), x)
    assert_close(layer.log_det(x, context=context), log_det)
    assert_close(layer.inverse_and_log_det(y, context=context), (x, -log_det))


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize(("cls", "shape"), [(iz.InvertibleLinear, (2, 5, 3)), (iz.InvertibleConv1x1, (2, 3, 5))])
def test_wide_and_conditioned(kind: str, cls: Callable[..., Any], shape: tuple[int, ...]) -> None:
    layer = cls(3, 5, kind=kind, dtype=torch.float64)
    layer.conditioner = nn.Linear(2, layer.num_parameters, dtype=torch.float64)
    x, context = torch.randn(shape, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    y = layer(x, context=context)
    assert_close(y[:1], of_sample(layer, context[0])(x[:1]))
    assert_close(layer.inverse(y, context=context), x)
    with pytest.raises(TypeError, match="Expected layer to be a bijection with a log-determinant"):
        layer.forward_and_log_det(x, context=context)


def test_a_conditioner_may_be_a_function_of_a_module() -> None:
    layer, (x, context) = plain("linear", "scaled"), draw("linear")
    net = nn.Sequential(nn.Linear(2, layer.num_parameters), nn.BatchNorm1d(layer.num_parameters), nn.Dropout(0.5))
    net.double()
    layer.conditioner = lambda c: net(c)
    layer.add_module("net", net)
    leaves = (x, context, *layer.parameters())
    grads = []
    for mode in MODES:
        torch.manual_seed(1)
        with iz.mode(layer, mode):
            y, log_det = layer.forward_and_log_det(x, context=context)
            torch.manual_seed(2)
            grads.append(torch.autograd.grad(y.pow(3).sum() + log_det.sum(), leaves))
    assert_close(grads[1], grads[0])
    assert_close(grads[2], grads[0])
    assert net[1].num_batches_tracked == 3


def test_channels_last_stays() -> None:
    layer, (x, context) = conditioned("conv, pixels", "scaled"), draw("conv, pixels")
    y = layer(x.to(memory_format=torch.channels_last), context=context)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, layer(x, context=context))


@all_kinds
def test_drift_of_a_deep_stack_in_float32(kind: str) -> None:
    size = 0.01 if kind == "free" else 0.1
    layers = [perturbed(iz.InvertibleLinear(16, kind=kind), size) for _ in range(16)]
    for layer in layers:
        layer.conditioner = nn.Linear(2, layer.num_parameters)
        nn.init.normal_(layer.conditioner.weight, std=size)
        nn.init.normal_(layer.conditioner.bias, std=size)
    x = h = torch.randn(32, 16)
    context = torch.randn(32, 2)
    with torch.no_grad():
        for layer in layers:
            h = layer(h, context=context)
        for layer in reversed(layers):
            h = layer.inverse(h, context=context)
    assert_close(h, x, rtol=0, atol=3e-4)


def test_autocast_rules_over_the_conditioner_alone() -> None:
    layer, (x, context) = conditioned("linear", "scaled", torch.float32), draw("linear", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        offsets = layer.conditioner(context)
        y, log_det = layer.forward_and_log_det(x, context=context)
        back = layer.inverse(y, context=context)
    assert offsets.dtype == torch.bfloat16
    assert y.dtype == log_det.dtype == torch.float32
    del layer.conditioner
    layer.conditioner = lambda _: offsets
    assert_close(y, layer(x, context=context), rtol=0, atol=0)
    assert_close(back, x, rtol=0, atol=1e-5)


def test_names_in_the_state() -> None:
    names = ["bias", "matrix.left", "matrix.right", "matrix.log_scale", "conditioner.weight", "conditioner.bias"]
    assert [*conditioned("linear", "scaled").state_dict()] == names


@pytest.mark.parametrize(
    ("kind", "bias", "expected"),
    [("householder", True, 20), ("cayley", False, 16), ("scaled", True, 40), ("plu", True, 20), ("free", False, 16)],
)
def test_num_parameters(kind: str, bias: bool, expected: int) -> None:
    assert iz.InvertibleLinear(4, bias=bias, kind=kind).num_parameters == expected


def test_the_vector_holds_the_matrix_row_by_row_and_then_the_bias() -> None:
    vector = torch.arange(6.0).expand(1, -1)
    layer = iz.InvertibleLinear(2, kind="free", conditioner=lambda _: vector)
    with torch.no_grad():
        layer.matrix.entries.zero_()
    assert_close(layer(torch.eye(2)[:1], context=0).detach(), torch.tensor([[0.0 + 4, 2.0 + 5]]))


# What is refused


def refusing(conditioner: Any, **options: Any) -> iz.InvertibleLinear:
    return iz.InvertibleLinear(4, conditioner=conditioner, **options)


def test_one_singular_free_weight_of_a_batch_is_refused() -> None:
    layer = refusing(lambda c: c, kind="free", bias=False, dtype=torch.float64)
    offsets = torch.zeros(3, 16, dtype=torch.float64)
    offsets[1] = -layer.matrix.entries.detach().flatten()
    y = layer(torch.ones(3, 4, dtype=torch.float64), context=offsets)
    with pytest.raises(
        ValueError, match="InvertibleLinear: Expected weight to be invertible, .*; got a singular weight"
    ):
        layer.inverse(y, context=offsets)
