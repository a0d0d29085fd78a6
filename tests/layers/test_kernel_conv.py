"""What EmergingConv and PeriodicConv share: modes, memory formats, precision, and what they refuse."""

import pytest
import torch
from torch.testing import assert_close

import invzoo as iz
from tests.layers.helpers import perturbed

LAYERS = {
    "raster": iz.EmergingConv,
    "corner": lambda *args, **options: iz.EmergingConv(*args, mask="corner", **options),
    "periodic": iz.PeriodicConv,
}
every = pytest.mark.parametrize("name", LAYERS)
classes = pytest.mark.parametrize("kind", [iz.EmergingConv, iz.PeriodicConv])


def conv(name, channels, dtype=torch.float64):
    return perturbed(LAYERS[name](channels, 3, dtype=dtype), 1.0)


@every
def test_maps_over_samples(name):
    layer, x = conv(name, 4), torch.randn(3, 4, 3, 5, dtype=torch.float64)
    for direction in (layer.function, layer.inverse):
        assert_close(torch.vmap(lambda sample, f=direction: f(sample[None])[0])(x), direction(x))


@pytest.mark.slow
@every
def test_compiles_without_a_break(name):
    layer, x = conv(name, 4), torch.randn(3, 4, 3, 5, dtype=torch.float64)
    for direction in (layer.function, layer.inverse):
        assert_close(torch.compile(direction, fullgraph=True, backend="eager")(x), direction(x))


@every
def test_autocast_loses_nothing(name):
    layer, x = conv(name, 4, torch.float32), torch.randn(2, 4, 5, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.float32
        assert_close(layer.inverse(y), x.float(), rtol=0, atol=1e-5)


@classes
@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((0, 3), {}, ValueError, "Expected channels to be at least 1; got 0"),
        ((4.0, 3), {}, TypeError, "Expected channels to be an int; got 4.0"),
        ((4, 0), {}, ValueError, "Expected kernel_size to be at least 1; got 0"),
        ((4, "3"), {}, TypeError, "Expected kernel_size to be an int or a tuple of them; got '3'"),
        ((4, None), {}, TypeError, "Expected kernel_size to be an int or a tuple of them; got None"),
        ((4, True), {}, TypeError, "Expected kernel_size to be an int; got True"),
        ((4, (3, 2.0)), {}, TypeError, "Expected kernel_size to be an int; got 2.0"),
        ((4, ()), {}, ValueError, r"Expected kernel_size to have one to three sizes; got \(\)"),
        ((4, (3,) * 4), {}, ValueError, r"Expected kernel_size to have one to three sizes; got \(3, 3, 3, 3\)"),
        ((4, 3), {"max_norm": 1.0}, ValueError, "Expected max_norm to be below 1; got 1.0"),
        ((4, 3), {"max_norm": 0}, ValueError, "Expected max_norm to be positive and finite; got 0"),
        ((4, 3), {"max_log_scale": -1.0}, ValueError, "Expected max_log_scale to be positive and finite; got -1.0"),
    ],
)
def test_bad_arguments(kind, arguments, options, error, match):
    with pytest.raises(error, match=f"{kind.__name__}: {match}"):
        kind(*arguments, **options)


@classes
@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (torch.zeros(2, 4), ValueError, r"to have dims \(batch, channels, height, width\); got shape \(2, 4\)"),
        (torch.zeros(2, 4, 3), ValueError, r"to have dims \(batch, channels, height, width\); got shape \(2, 4, 3\)"),
        (torch.zeros(2, 3, 4, 4), ValueError, r"to have size 4 in dim 1; got shape \(2, 3, 4, 4\)"),
        (torch.zeros(2, 4, 0, 4), ValueError, r"to have at least one pixel; got shape \(2, 4, 0, 4\)"),
        (torch.zeros(2, 4, 4, 4, dtype=torch.long), TypeError, "to be real floating point; got torch.int64"),
        (torch.zeros(2, 4, 4, 4, dtype=torch.cfloat), TypeError, "to be real floating point; got torch.complex64"),
        (torch.zeros(2, 4, 4, 4).double(), TypeError, "to be of the layer's dtype torch.float32; got torch.float64"),
        ([1.0], TypeError, "to be a Tensor; got list"),
    ],
)
def test_bad_inputs(kind, value, error, match):
    layer = kind(4, 3)
    for apply, argument in ((layer.function, "x"), (layer.log_det, "x"), (layer.inverse, "y")):
        with pytest.raises(error, match=f"{kind.__name__}: Expected {argument} {match}"):
            apply(value)
