"""Layers that take dim 1 where none is given: one tensor of three dims, in which that may be time, needs it said."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz

N = 4  # batch, features and length alike, so that no size tells one dim from another


class Net(nn.Linear):
    """A subnet over ``dim``, that of the layer it is in."""

    def __init__(self, features, out_features, dim):
        super().__init__(features, out_features)
        self.dim = 1 if dim is None else dim

    def forward(self, x):
        return super().forward(x.movedim(self.dim, -1)).movedim(-1, self.dim)


def coupling(kind, parameters=1):
    return lambda dim=None: kind(Net(2, 2 * parameters, dim), dim=dim)


MAKE = {
    iz.AdditiveCoupling: coupling(iz.AdditiveCoupling),
    iz.AffineCoupling: coupling(iz.AffineCoupling, 2),
    iz.GINCoupling: coupling(iz.GINCoupling, 2),
    iz.MixtureLogisticCoupling: coupling(iz.MixtureLogisticCoupling, 14),
    iz.RationalQuadraticCoupling: coupling(iz.RationalQuadraticCoupling, 23),
    iz.HINTCoupling: lambda dim=None: iz.HINTCoupling(N, lambda n, m: Net(n, m, dim), dim=dim),
    iz.GlowStep: lambda dim=None: iz.GlowStep(N, Net(2, 4, dim), dim=dim),
    iz.Parallel: lambda dim=None: iz.Parallel(iz.Identity(), iz.InvertibleLeakyReLU(), dim=dim),
    iz.MultiScale: lambda dim=None: iz.MultiScale(iz.Identity(), iz.InvertibleLeakyReLU(), dim=dim),
    iz.ConditionalAffine: lambda dim=None: iz.ConditionalAffine(nn.Linear(2, 2 * N), dim=dim),
    iz.Permute: lambda dim=None: iz.Permute([1, 2, 3, 0], dim),
    iz.Pad: lambda dim=None: iz.Pad(1, dim),
    iz.Slice: lambda dim=None: iz.Slice(1, dim),
    iz.Augment: lambda dim=None: iz.Augment(1, dim),
    **{
        kind: lambda dim=None, kind=kind: kind(dim=dim)
        for kind in (iz.Split, iz.Merge, iz.Swap, iz.Interleave, iz.Deinterleave, iz.Reverse, iz.Hadamard)
    },
    **{
        kind: lambda dim=None, kind=kind: kind(N, dim=dim)
        for kind in (
            iz.ActNorm,
            iz.BernsteinPolynomial,
            iz.ElementwiseAffine,
            iz.InvertiblePReLU,
            iz.RationalQuadraticSpline,
            iz.Shuffle,
            iz.SinhArcsinh,
            iz.Snake,
            iz.SumOfSquares,
            iz.UnconstrainedMonotonic,
        )
    },
}
every = pytest.mark.parametrize("kind", MAKE, ids=lambda kind: kind.__name__)
SAYS = r"Expected dim to be given for a tensor of three dims: dim=1 for .*, dim=-1 for .*; got none, .* \(4, \d, 4\)"


def inputs_of(kind, *shape):
    x = torch.randn(shape)
    return x.chunk(2, 1) if kind is iz.Merge else (x,)


def side_of(kind):
    return {"context": torch.randn(N, 2)} if kind is iz.ConditionalAffine else {}


def test_there_is_every_layer_that_assumes_its_dim():
    layers = [getattr(iz, name) for name in iz.__all__]
    assumes = {
        layer
        for layer in layers
        if isinstance(layer, type)
        and issubclass(layer, iz.InvertibleModule)
        and (dim := inspect.signature(layer).parameters.get("dim"))
        and dim.default is None
    }
    assert assumes == MAKE.keys()


@every
def test_one_tensor_of_three_dims_needs_the_dim(kind):
    layer, side = MAKE[kind]().eval(), side_of(kind)
    inputs, outputs = (inputs_of(kind, N, N, N) for _ in range(2))
    if kind in (iz.Split, iz.MultiScale):
        outputs = outputs[0].chunk(2, 1)
    if kind is iz.Merge:
        outputs = (torch.cat(outputs, 1),)
    runs = [layer, layer.function, layer.forward_and_log_det]
    backs = [layer.inverse, layer.inv, layer.inverse_and_log_det]
    for run, values in [*((run, inputs) for run in runs), *((back, outputs) for back in backs)]:
        with pytest.raises(ValueError, match=SAYS):
            run(*values, **side)


@every
@pytest.mark.parametrize(("dim", "shape"), [(None, (N, N)), (1, (N, N, N)), (-1, (N, N, N)), (None, (N, N, N, N))])
def test_elsewhere_it_is_dim_1(kind, dim, shape):
    if kind is iz.GlowStep and len(shape) == 2:
        shape = (N, N, N, N)  # without a dim it takes pixels
    layer, side = MAKE[kind](dim), side_of(kind)
    outputs = layer(*inputs_of(kind, *shape), **side)
    if kind not in (iz.Slice, iz.Augment):
        layer.inverse(*iz.engine.tuple_of(outputs), **side)
    if dim is None:
        torch.manual_seed(0)
        assumed = MAKE[kind]()
        torch.manual_seed(0)
        given = MAKE[kind](1)
        assert repr(assumed) == repr(given)
        assert assumed.state_dict().keys() == given.state_dict().keys()


@every
@pytest.mark.parametrize("dim", ["a", 1.0, True])
def test_dims_are_ints(kind, dim):
    with pytest.raises(ValueError if (kind, dim) == (iz.GlowStep, "a") else TypeError, match=f"Expected dim .*{dim}"):
        MAKE[kind](dim)


@pytest.mark.parametrize("make", [lambda dim: iz.WoodburyLinear(3, 1, dim=dim), iz.DCT])
@pytest.mark.parametrize("dim", ["a", 1.0, (1, 1.0)])
def test_so_are_those_that_are_the_last_by_default(make, dim):
    with pytest.raises(TypeError, match="Expected dim to be an int"):
        make(dim)


def test_two_streams_go_on_without_it():
    layer, (a, b) = iz.AdditiveCoupling(nn.Linear(3, 3)), torch.randn(2, 5, 2, 3)
    assert_close(layer(a, b), (a + layer.f(b), b))


def test_neighbours_share_streams_but_not_the_dim():
    net = iz.InvertibleSequential(MAKE[iz.AdditiveCoupling](1), iz.Swap())
    net(torch.randn(N, N))
    with pytest.raises(ValueError, match=f"Swap: {SAYS}") as info:
        net(torch.randn(N, N, N))
    assert info.value.__notes__ == ["in layer 1 (Swap)"]


def test_copies_remember_that_they_assume_it():
    for layer in (copy.deepcopy(iz.Swap()), pickle.loads(pickle.dumps(iz.Swap())), iz.Swap().inv):
        assert layer.assumes_dim
        with pytest.raises(ValueError, match=SAYS):
            layer(torch.randn(N, N, N))


def test_a_layer_pickled_before_it_could_be_assumed_goes_on():
    layer = iz.Swap()
    del layer.assumes_dim
    assert layer(torch.randn(N, N, N)).shape == (N, N, N)
