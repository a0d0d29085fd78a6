"""What layers that say their maths in words promise those who write them, and those who change them."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz


class Tripled(iz.ElementwiseAffine):
    """A layer in words, whose subclass writes its methods."""

    def function(self, x, *, context=None):
        return 3 * super().function(x)

    def inverse(self, y, *, context=None):
        return super().inverse(y / 3)

    def log_det(self, x, *, context=None):
        return super().log_det(x) + x.shape[1:].numel() * math.log(3)


class Doubled(iz.InvertibleModule):
    """A layer in words, but for its log-determinant."""

    def move(self, x):
        return 2 * x

    def undo(self, y):
        return y / 2

    def log_det(self, x):
        return x.shape[1:].numel() * math.log(2) * torch.ones(len(x), dtype=torch.promote_types(x.dtype, torch.float32))


@pytest.mark.parametrize(("kind", "factor"), [(lambda: Tripled(4), 3), (Doubled, 2)])
def test_methods_that_a_class_writes_are_what_its_calls_run(kind, factor):
    layer, x = kind(), torch.randn(3, 4)
    layer.check = "always"
    assert_close(layer(x), factor * x)
    assert_close(layer.inverse(layer(x)), x)
    assert_close(layer.inv.forward_and_log_det(x)[1], torch.full((3,), -4 * math.log(factor)))
    iz.testing.assert_invertible(layer, x)


def test_words_that_no_call_would_run_are_refused():
    with pytest.raises(TypeError, match=r"Halved: Expected function and inverse, since .*; got \['move', 'undo'\]"):

        class Halved(Tripled):
            def move(self, x, *h):
                return x / 2

            def undo(self, y, *h):
                return 2 * y


@pytest.mark.parametrize("word", ["move", "given", "passed"])
def test_a_module_with_the_name_of_a_word_is_refused(word):
    layer = iz.Identity()
    with pytest.raises(TypeError, match=f"Identity: Expected {word} to be the method of that name.*; got Linear"):
        setattr(layer, word, nn.Linear(2, 2))
    assert not [*layer.children()]


@pytest.mark.parametrize("call", ["function", "inverse", "log_det", "forward_and_log_det", "inverse_and_log_det"])
@pytest.mark.parametrize("inverted", [False, True])
def test_arguments_are_checked_before_every_method(call, inverted):
    layer = iz.ElementwiseAffine(4)
    with pytest.raises(TypeError, match="ElementwiseAffine: Expected . to be real floating point; got torch.int64"):
        getattr(layer.inv if inverted else layer, call)(torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="ElementwiseAffine: Expected . to be a Tensor; got int"):
        getattr(layer.inv if inverted else layer, call)(3)


class Cubed(iz.layers.maps.Map):
    """A map of one's own: ``x -> h^3 + x``, in the words alone."""

    parameters = 1
    volume_preserving = True

    def parts(self, h, like, dim):
        return h**3

    def move(self, x, cube):
        return x + cube

    def undo(self, y, cube):
        return y - cube


@pytest.mark.parametrize(
    "make",
    [
        lambda: iz.layers.couplings.Coupling(Cubed(), nn.Linear(2, 2), nn.Linear(2, 2)),
        lambda: iz.layers.couplings.Coupling(Cubed(), nn.Identity(), dim=2, split="checkerboard"),
        lambda: iz.MaskedAutoregressive(4, (8,), map=Cubed()),
    ],
)
def test_a_map_of_ones_own(make):
    layer = make()
    shape = (2, 3, 4, 4) if getattr(layer, "split", None) == "checkerboard" else (3, 4)
    iz.testing.assert_invertible(layer, torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_log_slopes_are_summed_in_at_least_float32(dtype):
    values = torch.full((2, 4096), 0.01, dtype=dtype)
    total = iz.sum_per_sample(iz.Identity(), values)
    assert_close(total, values.to(torch.promote_types(dtype, torch.float32)).sum(1), rtol=1e-6, atol=0)


class Scaled(iz.InvertibleModule):
    def __init__(self, slopes):
        super().__init__()
        self.slopes = slopes

    def move(self, x):
        return 2 * x

    def undo(self, y):
        return y / 2

    def log_slope(self, x):
        return self.slopes(x)


@pytest.mark.parametrize("shape", [(4,), (5, 1), (7, 4), ()], ids=str)
@pytest.mark.parametrize("inverted", [False, True])
def test_log_slopes_of_another_shape_are_refused(shape, inverted):
    layer = Scaled(lambda x: torch.zeros(shape))
    with pytest.raises(ValueError, match=r"Scaled: Expected log_slope to return one slope .*, \(5, 4\), or"):
        (layer.inv if inverted else layer).forward_and_log_det(torch.ones(5, 4))
    with pytest.raises(TypeError, match="Scaled: Expected log_slope to return a Tensor; got float"):
        Scaled(lambda x: 0.5).log_det(torch.ones(5, 4))


def test_methods_below_words_have_no_log_det_of_those():
    class Shifted(iz.ElementwiseAffine):
        def function(self, x, *, context=None):
            return 3 * super().function(x)

        def inverse(self, y, *, context=None):
            return super().inverse(y / 3)

    layer = Shifted(4)
    assert not layer.has_log_det()
    with pytest.raises(TypeError, match="Shifted: Expected layer to be a bijection with a log-det.*; got one without"):
        layer.forward_and_log_det(torch.ones(5, 4))


def test_a_word_that_is_missing_is_named():
    class Oneway(iz.InvertibleModule):
        def move(self, x):
            return 2 * x

    with pytest.raises(NotImplementedError, match=r"Expected Oneway to define undo\(y, \*h\); got none"):
        Oneway().inverse(torch.ones(5, 4))


def test_options_of_a_chain_whose_layers_differ():
    net = iz.InvertibleSequential(iz.Reverse(mode="store"), iz.Reverse(mode="recompute"))
    assert (net.mode, net.checkpoint, net.invertible, net.check) == (None, None, None, "first")
    net.mode = "invert"
    assert [layer.mode for layer in net] == ["invert", "invert"]
