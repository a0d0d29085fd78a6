"""Orthonormal transforms: against the matrices that define them, in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from invzoo.containers import InvertibleSequential
from invzoo.layers.rearrangements.permutation import Permute
from invzoo.layers.rearrangements.squeeze import Squeeze
from invzoo.layers.rearrangements.wavelet import DCT, WAVELETS, HaarDownsample, HaarUpsample, Hadamard
from invzoo.module import InvertibleModule
from tests.layers.helpers import close, refused

CASES: dict[str, tuple[Callable[..., InvertibleModule], tuple[int, ...]]] = {
    "haar-1d": (HaarDownsample, (2, 3, 4)),
    "haar-2d": (HaarDownsample, (2, 3, 4, 6)),
    "haar-3d": (HaarDownsample, (2, 1, 2, 4, 2)),
    "haar-positions": (lambda **o: HaarDownsample(order="positions_first", **o), (2, 3, 4, 6)),
    "haar-up": (HaarUpsample, (2, 8, 2, 3)),
    "db2": (lambda **o: HaarDownsample("db2", **o), (2, 1, 8, 6)),
    "db2-short": (lambda **o: HaarDownsample("db2", **o), (2, 1, 2, 4)),
    "db3": (lambda **o: HaarDownsample("db3", **o), (2, 2, 10)),
    "db3-up": (lambda **o: HaarUpsample("db3", order="positions_first", **o), (2, 4, 3, 4)),
    "dct": (DCT, (2, 5)),
    "dct-one": (DCT, (2, 3, 1)),
    "dct-pixels": (lambda **o: DCT((-2, -1), **o), (2, 3, 4, 5)),
    "dct-channels": (lambda **o: DCT(1, **o), (2, 3, 4)),
    "hadamard": (lambda **o: Hadamard(1, **o), (2, 8, 3)),
    "hadamard-one": (Hadamard, (2, 1)),
    "hadamard-pixels": (lambda **o: Hadamard((-1, 2), **o), (2, 3, 4, 2)),
}
WITHOUT_FACTORS = [name for name in CASES if not name.startswith("dct")]

every = pytest.mark.parametrize("name", CASES)
directions = pytest.mark.parametrize("direction", ["function", "inverse"])


def layer_of(name: str, **options: Any) -> InvertibleModule:
    return CASES[name][0](**options)


def input_of(name: str, **kind: Any) -> Tensor:
    return torch.randn(CASES[name][1], **{"dtype": torch.float64, **kind})


def matrix_of(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return the matrix of a linear map of one sample: columns are outputs of unit vectors."""
    unit = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return function(unit).flatten(1).T


# ---- every transform ------------------------------------------------------------------------------------------------


@every
def test_is_orthonormal_and_its_inverse_the_transpose(name: str) -> None:
    layer, x = layer_of(name), input_of(name)
    matrix = matrix_of(layer, x.shape[1:])
    eye = torch.eye(len(matrix), dtype=torch.float64)
    close(matrix @ matrix.T, eye)
    close(matrix_of(layer.inverse, layer(x).shape[1:]), matrix.T)
    assert torch.linalg.slogdet(matrix).logabsdet.abs() < 1e-12
    before = x.clone()
    y = layer(x)
    close(y.flatten(1), x.flatten(1) @ matrix.T)
    close(layer.inverse(y), x)
    assert torch.equal(x, before)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    layer, x = layer_of(name), input_of(name, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x))


@every
def test_sixteen_deep_in_float32(name: str) -> None:
    layer, x = layer_of(name), input_of(name, dtype=torch.float32)
    back = x
    for _ in range(16):
        back = layer.inverse(layer(back))
    close(back, x, 1e-5)


@pytest.mark.parametrize("name", WITHOUT_FACTORS)
def test_nothing_is_saved_for_backward(name: str) -> None:
    layer, saved = layer_of(name, mode="store"), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer.inv(layer(input_of(name).requires_grad_()))
    assert saved == []


@every
@directions
def test_no_more_than_a_row_is_saved_for_backward(name: str, direction: str) -> None:
    layer, sizes = layer_of(name), list[int]()
    x = input_of(name) if direction == "function" else layer(input_of(name))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        getattr(layer, direction)(x.requires_grad_())
    assert all(size in CASES[name][1] for size in sizes)


def test_a_replay_of_the_dct_transforms_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"fft": list[int](), "ifft": list[int]()}
    transforms = {name: getattr(torch.fft, name) for name in sizes}
    layer, x = DCT((-2, -1)), torch.randn(2, 4, 4, requires_grad=True)
    expected = layer.inverse(torch.ones(2, 4, 4))
    y = layer(x)
    for name, transform in transforms.items():
        monkeypatch.setattr(torch.fft, name, lambda v, n=name, f=transform: sizes[n].append(v.numel()) or f(v))
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert sizes == {"fft": [], "ifft": [32, 32]}
    close(gradient, expected, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["haar-2d", "db2-short", "haar-up", "dct-pixels", "hadamard"])
def test_compiles_and_maps(name: str) -> None:
    layer, x = layer_of(name), torch.randn(3, *CASES[name][1])
    torch.compiler.reset()
    expected = torch.stack([layer(one) for one in x])
    close(torch.func.vmap(layer)(x), expected, 1e-6)
    compiled = torch.compile(lambda one: layer.inverse(layer.function(one)), backend="aot_eager", fullgraph=True)
    close(compiled(x[0]), x[0], 1e-5)


@every
@pytest.mark.parametrize(("direction", "argument"), [("function", "x"), ("inverse", "y")])
def test_what_is_no_floating_point_tensor_is_refused(name: str, direction: str, argument: str) -> None:
    layer = layer_of(name)
    owner = type(layer).__name__
    with refused(f"{owner}: Expected {argument} to be a Tensor; got list", TypeError):
        getattr(layer, direction)([1.0])
    with refused(f"{owner}: Expected {argument} to be floating point or complex; got torch.int64", TypeError):
        getattr(layer, direction)(input_of(name).long())


# ---- wavelets -------------------------------------------------------------------------------------------------------


def test_haar_by_hand() -> None:
    a, b, c, d = cell = torch.randn(4, dtype=torch.float64)
    expected = torch.stack((a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d)) / 2
    close(HaarDownsample()(cell.reshape(1, 1, 2, 2)).flatten(), expected)


def test_haar_in_two_dims_is_exact_for_small_integers() -> None:
    x = 2 * torch.randint(-50, 50, (2, 3, 4, 4)).float()
    assert torch.equal(HaarDownsample().inverse(HaarDownsample()(x)), x)


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("n", [2, 4, 6, 10])
def test_rows_are_shifted_filters(wavelet: str, n: int) -> None:
    low = torch.tensor(WAVELETS[wavelet], dtype=torch.float64) / math.sqrt(2)
    high = low.flip(0) * torch.tensor([1, -1] * (len(low) // 2))
    expected = torch.zeros(2, n // 2, n, dtype=torch.float64)
    for band, taps in enumerate((low, high)):
        for i in range(n // 2):
            for k, tap in enumerate(taps):
                expected[band, i, (2 * i + k) % n] += tap
    close(matrix_of(HaarDownsample(wavelet), (1, n)), expected.flatten(0, 1))


@pytest.mark.parametrize(("wavelet", "moments"), [("haar", 1), ("db2", 2), ("db3", 3)])
def test_high_bands_do_not_see_polynomials(wavelet: str, moments: int) -> None:
    t = torch.linspace(-1, 1, 32, dtype=torch.float64)
    for power in range(moments + 1):
        high = HaarDownsample(wavelet)((t**power)[None, None])[0, 1, :12]  # away from the border
        assert (high.abs().max() < 1e-12) == (power < moments)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_orders_are_those_of_squeeze(wavelet: str) -> None:
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    y, z = (HaarDownsample(wavelet, order=order)(x) for order in ("channels_first", "positions_first"))
    assert torch.equal(y.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2), z)
    close(HaarUpsample(wavelet, order="positions_first")(z), x)
    low = y[:, ::4]
    close(low.sum(), x.sum() / 2)


def test_wavelets_take_complex_values() -> None:
    x = torch.randn(2, 1, 8, dtype=torch.complex128)
    close(HaarDownsample("db2")(x), torch.complex(HaarDownsample("db2")(x.real), HaarDownsample("db2")(x.imag)))


def test_wavelets_refuse_options_and_sizes() -> None:
    with refused("HaarDownsample: Expected wavelet to be one of 'haar', 'db2', 'db3'; got 'db4'"):
        HaarDownsample("db4")
    with refused("HaarUpsample: Expected order to be one of 'channels_first', 'positions_first'; got 'c'"):
        HaarUpsample(order="c")
    with refused(
        "HaarDownsample: Expected x to have sizes that are multiples of (2, 2) in dims 2, ...; got shape (1, 1, 2, 3)"
    ):
        HaarDownsample()(torch.zeros(1, 1, 2, 3))
    with refused("HaarDownsample: Expected y to have a multiple of 4 channels; got shape (1, 2, 2, 2)"):
        HaarDownsample().inverse(torch.zeros(1, 2, 2, 2))
    dims = "(batch, channels, ...) with one to three dims of pixels"
    with refused(f"HaarUpsample: Expected x to have dims {dims}; got shape (2, 4)"):
        HaarUpsample()(torch.zeros(2, 4))


# ---- DCT, Hadamard --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16])
def test_the_matrix_of_the_dct(n: int) -> None:
    k, m = torch.arange(n, dtype=torch.float64).unsqueeze(1), torch.arange(n, dtype=torch.float64)
    expected = (math.pi * k * (2 * m + 1) / (2 * n)).cos() * math.sqrt(2 / n)
    expected[0] /= math.sqrt(2)
    close(matrix_of(DCT(), (n,)), expected)


def test_the_dct_of_large_sizes() -> None:
    x = torch.randn(2, 4099)
    close(DCT().inverse(DCT()(x)), x, 1e-5)
    close(DCT()(x).double(), DCT()(x.double()), 1e-4)


@pytest.mark.parametrize("n", [1, 2, 8, 16])
def test_the_matrix_of_hadamard(n: int) -> None:
    expected = torch.ones(1, 1, dtype=torch.float64)
    while len(expected) < n:
        expected = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), expected)
    close(matrix_of(Hadamard(), (n,)), expected / math.sqrt(n))


def test_several_dims_are_transformed_one_after_the_other() -> None:
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    for layer in (DCT, Hadamard):
        close(layer((1, 2))(x), layer(2)(layer(1)(x)))
        close(layer((1, -2))(x), layer(1)(x))  # a dim named twice is one dim


@pytest.mark.parametrize("layer", [DCT, Hadamard])
@pytest.mark.parametrize("dim", [0, -3, 3, (1, 0)])
def test_the_batch_and_dims_that_are_not_there_are_refused(layer: type, dim: Any) -> None:
    name, bad = layer.__name__, dim if isinstance(dim, int) else 0
    with refused(f"{name}: Expected x to have a dim {bad} behind the batch; got shape (2, 4, 4)"):
        layer(dim)(torch.zeros(2, 4, 4))


def test_sizes_and_values_that_have_no_transform_are_refused() -> None:
    with refused("Hadamard: Expected x to have a power of two as its size in dim 1; got shape (2, 6)"):
        Hadamard()(torch.zeros(2, 6))
    with refused("Hadamard: Expected y to have a power of two as its size in dim 1; got shape (2, 0)"):
        Hadamard().inverse(torch.zeros(2, 0))
    with refused("DCT: Expected x to have entries in dim -1; got shape (2, 0)"):
        DCT()(torch.zeros(2, 0))
    with refused("DCT: Expected y to be real floating point; got torch.complex64", TypeError):
        DCT().inverse(torch.zeros(2, 3, dtype=torch.complex64))


# ---- in chains ------------------------------------------------------------------------------------------------------


def test_a_pyramid_has_the_gradients_of_a_plain_one() -> None:
    net = InvertibleSequential(
        HaarDownsample(), DCT((2, 3)), Permute([3, 1, 2, 0]), Hadamard(), HaarUpsample("db2"), Squeeze()
    )
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    y, log_det = net.forward_and_log_det(x)
    assert log_det.tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad((y**2).sum(), x)
    close(gradient, 2 * x)
    close(net.inverse(y), x)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (HaarDownsample(), "HaarDownsample('haar', order='channels_first')"),
        (HaarUpsample("db2", order="positions_first"), "HaarUpsample('db2', order='positions_first')"),
        (DCT(), "DCT(dim=-1)"),
        (Hadamard((1, 2)), "Hadamard(dim=(1, 2))"),
    ],
    ids=str,
)
def test_repr(layer: InvertibleModule, expected: str) -> None:
    assert repr(layer) == expected
