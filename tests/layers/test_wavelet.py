"""Orthonormal transforms: against the matrices that define them, in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from invzoo.layers.rearrangements.wavelet import DCT, WAVELETS, HaarDownsample, HaarUpsample, Hadamard
from invzoo.testing import CATALOGUE
from tests.layers.helpers import close

CASES = {
    case.name: case
    for entry in CATALOGUE
    if entry.layer in (HaarDownsample, HaarUpsample, DCT, Hadamard)
    for case in entry.cases
}

every = pytest.mark.parametrize("name", CASES)
directions = pytest.mark.parametrize("direction", ["function", "inverse"])


def matrix_of(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return the matrix of a linear map of one sample: columns are outputs of unit vectors."""
    unit = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return function(unit).flatten(1).T


# ---- every transform ------------------------------------------------------------------------------------------------


@every
def test_is_orthonormal_and_its_inverse_the_transpose(name: str) -> None:
    layer, (x,) = CASES[name].layer(), CASES[name].inputs()
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
@directions
def test_no_more_than_a_row_is_saved_for_backward(name: str, direction: str) -> None:
    layer, (x,), sizes = CASES[name].layer(), CASES[name].inputs(), list[int]()
    shape = x.shape
    x = x if direction == "function" else layer(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        getattr(layer, direction)(x.requires_grad_())
    assert all(size in shape for size in sizes)


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


# ---- in chains ------------------------------------------------------------------------------------------------------
