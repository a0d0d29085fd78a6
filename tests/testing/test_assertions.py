"""Layers with planted defects, most of them found in other libraries: each makes the right assertion fail."""

import copy
import itertools
import math
import random

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import invzoo as iz
from invzoo import testing
from invzoo.engine import Mode, Policy
from invzoo.log_dets import sum_per_sample

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Scale(iz.InvertibleModule):
    """``y = exp(s) x + b``: right in every way."""

    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))

    def function(self, x):
        return x * self.s.exp() + self.b

    def inverse(self, y):
        return (y - self.b) * (-self.s).exp()

    def log_det(self, x):
        return sum_per_sample(self, self.s.expand_as(x))


class Curve(iz.InvertibleModule):
    """``y = sinh(x)``: right in every way up to moderate inputs."""

    def function(self, x):
        return torch.sinh(x)

    def inverse(self, y):
        return torch.asinh(y)

    def log_det(self, x):
        return sum_per_sample(self, x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - math.log(2))


class Squash(iz.InvertibleModule):
    codomain = constraints.unit_interval
    saturating = True

    def function(self, x):
        return torch.sigmoid(x)

    def inverse(self, y):
        return y.log() - torch.log1p(-y)

    def log_det(self, x):
        return -sum_per_sample(self, nn.functional.softplus(x) + nn.functional.softplus(-x))


class InWords(Scale):
    """`Scale` in words."""

    function, inverse, log_det = (getattr(iz.InvertibleModule, name) for name in ("function", "inverse", "log_det"))
    move, undo, log_slope = Scale.function, Scale.inverse, Scale.log_det


class Undefined(Scale):
    """`Scale` without a log-determinant."""

    log_det = iz.InvertibleModule.log_det


def planted(kind, **changes):
    """Return a layer of a class with other methods and facts."""
    return type("Planted", (kind,), changes)()


def function(change):
    """Plant something behind the function of `Scale`."""
    return planted(Scale, function=lambda self, x: change(self, x, Scale.function(self, x)))


def argument(change):
    """Plant something before the function of `Scale`."""
    return planted(Scale, function=lambda self, x: Scale.function(self, change(x)))


def inverse(change):
    """Plant something behind its inverse."""
    return planted(Scale, inverse=lambda self, y: change(self, y, Scale.inverse(self, y)))


def log_det(change):
    """Plant something behind its log-determinant."""
    return planted(Scale, log_det=lambda self, x: change(self, x, Scale.log_det(self, x)))


def gradient(forward, backward):
    """Return a function with a gradient of its own."""

    class Planted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx, g):
            return backward(g, *ctx.saved_tensors)

    return Planted.apply


@pytest.mark.parametrize("layer", [Scale(), Squash(), InWords()], ids=["scale", "squash", "in words"])
def test_layers_without_a_defect_pass(layer):
    testing.assert_invertible(layer, X)


def test_what_a_layer_can_not_do_is_said():
    testing.assert_invertible(Curve(), X, largest=50.0)


# ---- what each assertion finds --------------------------------------------------------------------------------------


def refuse(*_):
    raise TypeError("no")


def wrong_replay(self, tape, y):
    tape.run(lambda x: x * self.s.expm1() + self.b, tape.input(0, self.inverse(y)))


def only_with_gradients(self, x):  # FrEIA's IResNetLayer: autograd inside, which no_grad turns off
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        z = x.detach().requires_grad_()
        return torch.autograd.grad(torch.cosh(z).sum(), z, create_graph=True)[0]


class MovesInReplay(Scale):
    def __init__(self):
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def function(self, x):
        self.runs = self.runs + 1 + 0.5 * (iz.Mode.invert == self.mode)
        return super().function(x)


class Hoarder(Scale):
    def function(self, x):
        self.__dict__["last"] = x + 1
        return super().function(x)


class KeepsRandomState(Scale):  # invtorch: the state of the generator with every call
    def function(self, x):
        self.__dict__["state"] = torch.empty(5056, dtype=torch.uint8)
        return super().function(x)

    def inverse(self, y):
        self.__dict__["state"] = torch.empty(5056, dtype=torch.uint8)
        return super().inverse(y)


class Exempt(Scale):
    def forward(self, x):
        with iz.mode(self, "store"):
            return super().forward(x)


class KeepsLambda(Scale):
    def __init__(self):
        super().__init__()
        self.square = lambda x: x


class OffState(Scale):
    def state_dict(self, *args, **kwargs):
        return {"s": self.s.detach(), "extra": torch.zeros(1)}


class ForgetsABuffer(Scale):
    """The buffer is part of the state, but is not loaded."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.ones((), dtype=torch.float64))

    def function(self, x):
        return super().function(x) + self.shift

    def inverse(self, y):
        return super().inverse(y - self.shift)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict | {f"{prefix}shift": self.shift}, prefix, *args)


class Mute(Scale):
    def __repr__(self):
        return "a layer"


class Transposed(iz.InvertibleModule):  # FrEIA's OrthogonalTransform: orthogonal at the start, and then not
    volume_preserving = True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0])

    def function(self, x):
        return x @ self.weight.mT

    def inverse(self, y):
        return y @ self.weight


NUMBERS, SHIFT = itertools.count(), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float32)
first_sample = gradient(torch.clone, lambda g, _: g[:1].expand_as(g))
mean = gradient(torch.clone, lambda g, _: g.mean(0, keepdim=True).expand_as(g) if len(g) else g)
once_differentiable = gradient(lambda x: 2 * x, lambda g, _: (2 * g).detach())
wrong_at_second = gradient(lambda x: 0.01 * x**2, lambda g, x: 0.02 * g * x.detach())

coarse = inverse(lambda self, y, _: (y.float() - self.b.float()).mul((-self.s).exp()).to(y.dtype))
JACOBIAN = "the log-determinant to be that of autograd's Jacobian"
JACOBIAN_BACK = "the inverse's log-determinant to be that of autograd's Jacobian"
DERIVATIVES = r"assert_gradients; got (GradcheckError|RuntimeError)|second derivatives"
FAR_OUT = "finite log-determinants at inputs up to 100"
KEPT = r"keep at most 0 bytes in mode invert; got \d+"
softplus = nn.functional.softplus

DEFECTS = {
    "round_trip": {
        "a wrong inverse": (inverse(lambda self, y, x: x + 1e-6), "the inverse to return the inputs"),
        "not exact": (
            planted(Scale, exact=True, inverse=lambda self, y: Scale.inverse(self, y) * (1 + 1e-15)),
            "the inverse to return the inputs",
        ),
        "another codomain": (planted(Scale, codomain=constraints.positive), "outputs in its codomain"),
        "FrEIA's IResNetLayer": (planted(Curve, function=only_with_gradients), "no error in assert_round_trip"),
        "coarse": (coarse, "the inverse to return the inputs"),
    },
    "log_det": {
        "the wrong sign": (log_det(lambda self, x, d: -d), JACOBIAN),
        "FrEIA's LearnedElementwiseScaling": (
            planted(Scale, inverse_and_log_det=lambda self, y: (self.inverse(y), self.log_det(y))),
            JACOBIAN_BACK,
        ),
        "FrEIA's InvertibleSigmoid on images": (
            planted(Squash, log_det=lambda self, x: -(softplus(x) + softplus(-x))),
            r"shape \(3,\); got \(3, 4\)",
        ),
        "nflows' GatedLinearUnit": (
            log_det(lambda self, x, _: self.s.expand_as(x).reshape(-1)),
            r"shape \(3,\); got \(12,\)",
        ),
        "FrEIA's InvertibleSigmoid": (
            planted(Squash, log_det=lambda self, x: (torch.sigmoid(x) * (1 - torch.sigmoid(x))).log().sum(1)),
            FAR_OUT,
        ),
        "nflows' Tanh": (
            planted(
                Squash,
                codomain=constraints.interval(-1.0, 1.0),
                function=lambda self, x: torch.tanh(x),
                inverse=lambda self, y: torch.atanh(y),
                log_det=lambda self, x: torch.log(1 - torch.tanh(x) ** 2).sum(1),
            ),
            FAR_OUT,
        ),
        "FrEIA's IResNetLayer": (
            planted(Curve, inverse_and_log_det=lambda self, y: (self.inverse(y), -self.log_det(y))),
            JACOBIAN_BACK,
        ),
        "nflows' LeakyReLU": (
            planted(
                iz.InvertibleModule,
                function=lambda self, x: x.where(x > 0, 0.01 * x),
                inverse=lambda self, y: y.where(y > 0, 100 * y),
                log_det=lambda self, x: sum_per_sample(self, (x < 0).to(x.dtype) * torch.tensor(0.01).log()),
            ),
            JACOBIAN,
        ),
        "FrEIA's InvAutoFC": (planted(Undefined, volume_preserving=True), JACOBIAN),
        "a refusal": (planted(Scale, log_det=refuse), "no error in assert_log_det; got TypeError"),
        "the inverse's for each value": (
            planted(Scale, inverse_and_log_det=lambda self, y: (self.inverse(y), -self.s.expand_as(y))),
            r"shape \(3,\); got \(3, 4\)",
        ),
        "the wrong dtype": (log_det(lambda self, x, d: d.float()), "to be torch.float64; got torch.float32"),
        "the wrong sign of slopes": (planted(InWords, log_slope=lambda self, x: -Scale.log_det(self, x)), JACOBIAN),
        "the wrong sign alone": (planted(InWords, log_det=lambda self, x: -Scale.log_det(self, x)), JACOBIAN),
        "nobody is named": (planted(Undefined, forward_and_log_det=refuse), "names the layer"),
        "invented": (
            planted(Undefined, forward_and_log_det=lambda self, *x: (self(*x), torch.zeros(3))),
            "since it has no log-determinant",
        ),
    },
    "gradients": {
        "normflows' Residual": (log_det(lambda self, x, d: first_sample(d)), DERIVATIVES),
        "detached": (log_det(lambda self, x, d: d.detach() + 0 * self.b.sum()), DERIVATIVES),
        "without a graph": (log_det(lambda self, x, d: d.detach()), DERIVATIVES),
        "no double backward": (
            planted(Scale, function=lambda self, x: once_differentiable(x) * self.s.exp() / 2 + self.b),
            DERIVATIVES,
        ),
        "wrong second derivatives": (function(lambda self, x, y: wrong_at_second(x) + y), DERIVATIVES),
        "wrong ones of the inverse": (inverse(lambda self, y, x: x + first_sample(y) - y), DERIVATIVES),
    },
    "modes_agree": {
        "a wrong replay": (planted(Scale, replay=wrong_replay), "Planted"),
        "a wrong replay of the log-det": (
            log_det(lambda self, x, d: d * (1 + 1e-6 * (iz.Mode.invert == self.mode))),
            "Planted",
        ),
        "an inverse that drifts": (inverse(lambda self, y, x: x * (1 + 1e-7)), "Planted"),
        "counting": (function(lambda self, x, y: y + 1e-6 * next(NUMBERS)), "Planted"),
        "the inverse's log-det alone": (
            planted(
                Scale,
                inverse_and_log_det=lambda self, y: (
                    self.inverse(y),
                    (-self.s).sum().expand(len(y)) * (1 + 1e-6 * (iz.Mode.invert == self.mode)),
                ),
            ),
            "Planted",
        ),
        "Python's random numbers": (
            function(lambda self, x, y: y * random.choice([1, 1 + 1e-6, 1 - 1e-6])),  # noqa: S311 - it is the defect
            "Planted",
        ),
        "a buffer moves in a replay": (MovesInReplay(), "MovesInReplay"),
    },
    "memory": {
        "a hoarder": (Hoarder(), KEPT),
        "random states": (KeepsRandomState(), KEPT),
        "exempt": (Exempt(), KEPT),
        "a hoarding log-det": (log_det(lambda self, x, d: (vars(self).update(hoard=x.clone()), d)[1]), KEPT),
        "never stores": (
            planted(Scale, _policy=property(lambda _: Policy(Mode.invert, "never", False, False), lambda *_: None)),
            "more than 0 bytes in mode store; got 0",
        ),
    },
    "inputs_unchanged": {
        "strides are read": (
            function(lambda self, x, y: y + 1e-3 * (not x.is_contiguous())),
            "output of forward on strided inputs in mode store to be that of other forms",
        ),
        "FrEIA's HaarDownsampling": (
            inverse(lambda self, y, x: 0 * y.detach().sub_(self.b).add_(self.b) + x),
            "got a write into it|RuntimeError",
        ),
        "normflows' Shift": (
            planted(Scale, function=lambda self, x: 0 * x.detach().mul_(1) + Scale.function(self, x)),
            "got a write into it|RuntimeError",
        ),
        "FrEIA's IResNetLayer": (argument(lambda x: x.requires_grad_()), "requires_grad=True|RuntimeError"),
        "memory is read": (
            argument(lambda x: x.as_strided(x.shape, (x.shape[1], 1))),
            "on strided inputs|RuntimeError",
        ),
    },
    "portable": {
        "a lambda": (KeepsLambda(), "pickle"),
        "another state": (OffState(), "state_dict|pickle"),
        "a forgotten buffer": (ForgetsABuffer(), "output after loading its state"),
        "no name": (Mute(), "name in the repr"),
    },
    "dtypes": {
        "constants that are no buffers": (
            planted(
                Scale,
                function=lambda self, x: Scale.function(self, x) + SHIFT,
                inverse=lambda self, y: Scale.inverse(self, y - SHIFT),
            ),
            "dtype",
        ),
        "FrEIA's lipschitz_correction": (
            function(lambda self, x, y: y + 0 * x.to(torch.float32) @ torch.eye(4).to(x.dtype)),
            "RuntimeError",
        ),
        "coarse": (coarse, "inverse to return"),
        "a coarse log-det": (
            log_det(lambda self, x, d: d + (x.dtype == torch.float32)),
            "the torch.float32 log-determinant to be that in float64",
        ),
    },
    "batch_sizes": {
        "centred": (
            planted(
                Scale,
                function=lambda self, x: Scale.function(self, x + x.mean(0)),
                inverse=lambda self, y: (x := Scale.inverse(self, y)) - x.mean(0) / 2,
            ),
            "the outputs of a batch of 1",
        ),
        "numbered": (log_det(lambda self, x, d: d + torch.arange(len(x)).to(d)), "the outputs of a batch of 1"),
        "squeezed": (function(lambda self, x, y: y.squeeze(0)), r"outputs of shapes|shape \(1, 4\)"),
        "another log-det of none": (
            log_det(lambda self, x, d: d if len(x) else x.new_zeros(1)),
            "outputs of shapes",
        ),
        "no gradient of none": (argument(lambda x: x if len(x) else x.detach()), "gradients of all inputs of shapes"),
        "the mean of gradients": (function(lambda self, x, y: mean(y)), "the gradients of a batch of 1"),
        "the mean of the inverse's": (inverse(lambda self, y, x: mean(x)), "the gradients of a batch of 1"),
    },
    "trainable": {
        "FrEIA's OrthogonalTransform": (Transposed(), "Its inverse is wrong"),
        "an infinite gradient": (
            log_det(lambda self, x, d: d + (self.s - self.s).abs().sqrt().sum()),
            "finite gradient",
        ),
    },
}


@pytest.mark.parametrize(
    ("assertion", "layer", "message"),
    [
        pytest.param(f"assert_{assertion}", *found, id=f"{assertion}-{words}")
        for assertion, defects in DEFECTS.items()
        for words, found in defects.items()
    ],
)
def test_defects_are_found(assertion, layer, message):
    with pytest.raises(AssertionError, match=message):
        getattr(testing, assertion)(layer, X)


def test_a_layer_without_log_det_says_so():
    testing.assert_log_det(Undefined(), X)


def test_a_wrong_gradient_of_a_side_input_is_found():
    layer = planted(
        Scale,
        function=lambda self, x, *, context: Scale.function(self, x) + first_sample(context),
        inverse=lambda self, y, *, context: Scale.inverse(self, y - context),
        log_det=lambda self, x, *, context: Scale.log_det(self, x),
    )
    with pytest.raises(AssertionError, match=DERIVATIVES):
        testing.assert_gradients(layer, X, context=X.cos())


def test_round_trip_is_as_coarse_as_the_coarsest_tensor():
    testing.assert_round_trip(copy.deepcopy(coarse).float(), X)


def test_memory_that_a_layer_says_it_keeps():
    # The state that the call left behind; the one that it found is that of the call before.
    testing.assert_memory(KeepsRandomState(), X, kept_bytes=5056)
    with pytest.raises(AssertionError, match="keep at most 20220 bytes"):
        testing.assert_memory(KeepsRandomState(), X, kept_bytes=5056 - 1)
    testing.assert_memory(iz.InvertibleSigmoid(), X)
    with pytest.raises(AssertionError, match="keep at most 0 bytes"):
        testing.assert_memory(iz.InvertibleSigmoid(), X, kept_bytes=0)


# ---- the line that users write --------------------------------------------------------------------------------------


@pytest.mark.parametrize("assertion", DEFECTS)
def test_assert_invertible_makes_all_assertions(assertion):
    layer, _ = next(iter(DEFECTS[assertion].values()))
    without = {} if assertion == "portable" else {"assert_portable": "the class is local"}
    with pytest.raises(AssertionError) as failure:
        testing.assert_invertible(layer, X, without=without)
    assert type(layer).__name__ in str(failure.value)
    assert any(note.startswith("in assert_") for note in getattr(failure.value, "__notes__", ())) or (
        "no error in assert_" in str(failure.value)
    )


def test_assertions_can_be_left_out_with_a_reason_only():
    with pytest.raises(ValueError, match="without to give reasons for some of assert_round_trip"):
        testing.assert_invertible(Scale(), X, without={"assert_roundtrip": "a typo"})
    with pytest.raises(ValueError, match="assert_memory: ''"):
        testing.assert_invertible(Scale(), X, without={"assert_memory": ""})
    testing.assert_invertible(KeepsLambda(), X, without={"assert_portable": "it holds a lambda"})


@pytest.mark.parametrize(
    ("layer", "inputs", "message"),
    [
        (nn.Linear(4, 4), (X,), "layer to be an InvertibleModule"),
        (Scale(), (), "inputs to be Tensors with a batch dim"),
        (Scale(), (torch.zeros(()),), "inputs to be Tensors with a batch dim"),
        (Scale(), (torch.zeros(0, 4),), "inputs to be Tensors with a batch dim"),
        (Scale(), (1.0,), "inputs to be Tensors with a batch dim"),
    ],
)
def test_bad_arguments(layer, inputs, message):
    with pytest.raises(TypeError, match=message):
        testing.assert_round_trip(layer, *inputs)


def test_layer_inputs_and_random_state_stay_what_they_were():
    layer, x = (
        iz.InvertibleSequential(iz.AffineCoupling(nn.Sequential(nn.Linear(2, 4), nn.Dropout())), iz.Swap()),
        X.float(),
    )
    before = copy.deepcopy(layer.state_dict()), x.clone(), torch.get_rng_state()
    testing.assert_invertible(
        layer,
        x,
        without={"assert_batch_sizes": "dropout", "assert_dtypes": "dropout"}
        | dict.fromkeys(("assert_log_det", "assert_round_trip", "assert_portable", "assert_trainable"), "dropout"),
    )
    torch.testing.assert_close(layer.state_dict(), before[0], rtol=0, atol=0)
    torch.testing.assert_close(x, before[1], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before[2])
    assert layer.mode == "invert"
    assert layer.check == "first"
    assert all(p.grad is None for p in layer.parameters())


def test_side_inputs():
    layer = planted(
        iz.InvertibleModule,
        volume_preserving=True,
        function=lambda self, x, context: x + context,
        inverse=lambda self, y, context: y - context,
    )
    testing.assert_invertible(layer, X, context=X.flip(0), without={"assert_portable": "the class is local"})
