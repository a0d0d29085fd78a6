"""Layers with planted defects, most of them found in other libraries: each makes the right assertion fail."""

import copy
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


@pytest.mark.parametrize("layer", [Scale(), Squash()], ids=["scale", "squash"])
def test_layers_without_a_defect_pass(layer):
    testing.assert_invertible(layer, X)


def test_what_a_layer_can_not_do_is_said():
    testing.assert_invertible(Curve(), X, largest=50.0)


# ---- log-determinants -----------------------------------------------------------------------------------------------


class WrongSign(Scale):
    def log_det(self, x):
        return -super().log_det(x)


class WrongSignBack(Scale):  # FrEIA's LearnedElementwiseScaling
    def inverse_and_log_det(self, y):
        return self.inverse(y), self.log_det(y)


class PerPosition(Squash):  # FrEIA's InvertibleSigmoid on images
    def log_det(self, x):
        return -(nn.functional.softplus(x) + nn.functional.softplus(-x))


class PerFeature(Scale):  # nflows' GatedLinearUnit
    def log_det(self, x):
        return self.s.expand_as(x).reshape(-1)


class Overflow(Squash):  # FrEIA's InvertibleSigmoid
    def log_det(self, x):
        y = torch.sigmoid(x)
        return (y * (1 - y)).log().sum(1)


class Underflow(iz.InvertibleModule):  # nflows' Tanh
    codomain = constraints.interval(-1.0, 1.0)
    saturating = True

    def function(self, x):
        return torch.tanh(x)

    def inverse(self, y):
        return torch.atanh(y)

    def log_det(self, x):
        return torch.log(1 - torch.tanh(x) ** 2).sum(1)


class AtTheOutput(Curve):  # FrEIA's IResNetLayer
    def inverse_and_log_det(self, y):
        return self.inverse(y), -self.log_det(y)


class Float32Slope(iz.InvertibleModule):  # nflows' LeakyReLU
    def function(self, x):
        return x.where(x > 0, 0.01 * x)

    def inverse(self, y):
        return y.where(y > 0, 100 * y)

    def log_det(self, x):
        slope = torch.log(torch.tensor(0.01))
        return sum_per_sample(self, (x < 0).to(x.dtype) * slope)


class ClaimsVolume(Scale):  # FrEIA's InvAutoFC
    volume_preserving = True
    log_det = iz.InvertibleModule.log_det


class Refuses(Scale):
    def log_det(self, x):
        raise TypeError("no")


class PlainDtype(Scale):
    def log_det(self, x):
        return super().log_det(x).float()


class InWords(Scale):  # the log-determinant by its values' slopes
    function, inverse, log_det = (getattr(iz.InvertibleModule, name) for name in ("function", "inverse", "log_det"))

    def move(self, x):
        return Scale.function(self, x)

    def undo(self, y):
        return Scale.inverse(self, y)

    def log_slope(self, x):
        return Scale.log_det(self, x)


class WrongInWords(InWords):
    def log_slope(self, x):
        return -super().log_slope(x)


class WrongAlone(InWords):
    def log_det(self, x):
        return -super().log_det(x)


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (WrongSign, "the log-determinant to be that of autograd's Jacobian"),
        (WrongSignBack, "the inverse's log-determinant to be that of autograd's Jacobian"),
        (PerPosition, r"shape \(3,\); got \(3, 4\)"),
        (PerFeature, r"shape \(3,\); got \(12,\)"),
        (Overflow, "finite log-determinants at inputs up to 100"),
        (Underflow, "finite log-determinants at inputs up to 100"),
        (AtTheOutput, "the inverse's log-determinant to be that of autograd's Jacobian"),
        (Float32Slope, "the log-determinant to be that of autograd's Jacobian"),
        (ClaimsVolume, "the log-determinant to be that of autograd's Jacobian"),
        (Refuses, "no error in assert_log_det; got TypeError"),
        (PlainDtype, "to be torch.float64; got torch.float32"),
        (WrongInWords, "the log-determinant to be that of autograd's Jacobian"),
        (WrongAlone, "the log-determinant to be that of autograd's Jacobian"),
    ],
)
def test_log_det(defect, message):
    with pytest.raises(AssertionError, match=message):
        testing.assert_log_det(defect(), X)


def test_log_det_of_a_layer_in_words():
    testing.assert_log_det(InWords(), X)


class Undefined(Scale):
    log_det = iz.InvertibleModule.log_det


class Nameless(Undefined):
    def forward_and_log_det(self, *inputs):
        raise TypeError("no")


class Invented(Undefined):
    def forward_and_log_det(self, *inputs):
        return self(*inputs), torch.zeros(3)


def test_a_layer_without_log_det_says_so():
    testing.assert_log_det(Undefined(), X)
    with pytest.raises(AssertionError, match="names the layer"):
        testing.assert_log_det(Nameless(), X)
    with pytest.raises(AssertionError, match="since it has no log-determinant"):
        testing.assert_log_det(Invented(), X)


# ---- the two directions ---------------------------------------------------------------------------------------------


class WrongInverse(Scale):
    def inverse(self, y):
        return super().inverse(y) + 1e-6


class Inexact(Scale):
    exact = True

    def inverse(self, y):
        return super().inverse(y) * (1 + 1e-15)


class WrongCodomain(Scale):
    codomain = constraints.positive


class GradOnly(Curve):  # FrEIA's IResNetLayer: autograd inside, which no_grad turns off
    def function(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            z = x.detach().requires_grad_()
            return torch.autograd.grad(torch.cosh(z).sum(), z, create_graph=True)[0]


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (WrongInverse, "the inverse to return the inputs"),
        (Inexact, "the inverse to return the inputs"),
        (WrongCodomain, "outputs in its codomain"),
        (GradOnly, "no error in assert_round_trip"),
    ],
)
def test_round_trip(defect, message):
    with pytest.raises(AssertionError, match=message):
        testing.assert_round_trip(defect(), X)


def test_round_trip_is_as_coarse_as_the_coarsest_tensor():
    with pytest.raises(AssertionError, match="the inverse to return the inputs"):
        testing.assert_round_trip(Coarse(), X)
    testing.assert_round_trip(Coarse().float(), X)


# ---- gradients and modes --------------------------------------------------------------------------------------------


class _FirstSample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_slopes):
        ctx.shape = log_slopes.shape
        return log_slopes.sum(1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[0].expand(ctx.shape)


class FirstSample(Scale):  # normflows' Residual with reduce_memory=True
    def log_det(self, x):
        return _FirstSample.apply(self.s.expand_as(x))


class Detached(Scale):
    def log_det(self, x):
        return super().log_det(x).detach() + 0 * self.b.sum()


class WithoutGraph(Scale):
    def log_det(self, x):
        return super().log_det(x).detach()


class NoDoubleBackward(Scale):
    def function(self, x):
        return _Twice.apply(x) * self.s.exp() / 2 + self.b


class WrongSecond(Scale):
    def function(self, x):
        return _Square.apply(x) + super().function(x)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 0.01 * x**2

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 0.02 * x.detach()


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return (2 * gradient).detach()


@pytest.mark.parametrize("defect", [FirstSample, Detached, WithoutGraph, NoDoubleBackward, WrongSecond])
def test_gradients(defect):
    with pytest.raises(AssertionError, match=r"assert_gradients; got (GradcheckError|RuntimeError)|second derivatives"):
        testing.assert_gradients(defect(), X)


class WrongReplay(Scale):
    def replay(self, tape, y):
        x = tape.input(0, self.inverse(y))
        tape.run(lambda x: x * self.s.expm1() + self.b, x)


class DriftingInverse(Scale):
    def inverse(self, y):
        return super().inverse(y) * (1 + 1e-7)


class Counting(Scale):
    calls = 0

    def function(self, x):
        type(self).calls += 1
        return super().function(x) + 1e-6 * self.calls


class RandomPython(Scale):
    def function(self, x):
        return super().function(x) * random.choice([1, 1 + 1e-6, 1 - 1e-6])  # noqa: S311 - it is the defect


class MovesInReplay(Scale):
    def __init__(self):
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def function(self, x):
        self.runs = self.runs + 1 + 0.5 * (iz.Mode.invert == self.mode)
        return super().function(x)


class WrongReplayOfLogDet(Scale):
    def log_det(self, x):
        return super().log_det(x) * (1 + 1e-6 * (iz.Mode.invert == self.mode))


@pytest.mark.parametrize(
    "defect", [WrongReplay, WrongReplayOfLogDet, DriftingInverse, Counting, RandomPython, MovesInReplay]
)
def test_modes(defect):
    with pytest.raises(AssertionError, match=f"{defect.__name__}"):
        testing.assert_modes_agree(defect(), X)


# ---- memory ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("defect", [Hoarder, KeepsRandomState, Exempt])
def test_memory(defect):
    with pytest.raises(AssertionError, match=r"keep at most 0 bytes in mode invert; got \d+"):
        testing.assert_memory(defect(), X)


class NeverStores(Scale):
    _policy = property(lambda self: Policy(Mode.invert, "never", False, False), lambda self, policy: None)


def test_memory_of_mode_store_is_that_of_autograd():
    with pytest.raises(AssertionError, match="more than 0 bytes in mode store; got 0"):
        testing.assert_memory(NeverStores(), X)


def test_memory_that_a_layer_says_it_keeps():
    # The state that the call left behind; the one that it found is that of the call before.
    testing.assert_memory(KeepsRandomState(), X, kept_bytes=5056)
    with pytest.raises(AssertionError, match="keep at most 20220 bytes"):
        testing.assert_memory(KeepsRandomState(), X, kept_bytes=5056 - 1)
    testing.assert_memory(iz.InvertibleSigmoid(), X)
    with pytest.raises(AssertionError, match="keep at most 0 bytes"):
        testing.assert_memory(iz.InvertibleSigmoid(), X, kept_bytes=0)


# ---- inputs ---------------------------------------------------------------------------------------------------------


class WritesBack(Scale):  # FrEIA's HaarDownsampling
    def inverse(self, y):
        return y.detach().sub_(self.b).add_(self.b) * 0 + super().inverse(y)


class Writes(Scale):  # normflows' Shift
    def function(self, x):
        x.detach().mul_(1)
        return super().function(x)


class Marks(Scale):  # FrEIA's IResNetLayer
    def function(self, x):
        x.requires_grad_()
        return super().function(x)


class ReadsMemory(Scale):
    def function(self, x):
        return super().function(torch.as_strided(x, x.shape, (x.shape[1], 1), x.storage_offset()))


class ReadsStrides(Scale):
    def function(self, x):
        return super().function(x) + 1e-3 * (not x.is_contiguous())


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (ReadsStrides, "output of forward on strided inputs in mode store to be that of other forms"),
        (WritesBack, "got a write into it|RuntimeError"),
        (Writes, "got a write into it|RuntimeError"),
        (Marks, "requires_grad=True|RuntimeError"),
        (ReadsMemory, "on strided inputs|RuntimeError"),
    ],
)
def test_inputs_unchanged(defect, message):
    with pytest.raises(AssertionError, match=message):
        testing.assert_inputs_unchanged(defect(), X)


# ---- modules --------------------------------------------------------------------------------------------------------


class KeepsLambda(Scale):
    def __init__(self):
        super().__init__()
        self.square = lambda x: x


class OffState(Scale):
    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(self.s.detach(), requires_grad=True)
        self.register_state_dict_pre_hook(lambda *_: None)

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


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (KeepsLambda, "pickle"),
        (OffState, "state_dict|pickle"),
        (ForgetsABuffer, "output after loading its state"),
        (Mute, "name in the repr"),
    ],
)
def test_portable(defect, message):
    with pytest.raises(AssertionError, match=message):
        testing.assert_portable(defect(), X)


class Plain(Scale):
    """Constants that are no buffers stay in float32."""

    def __init__(self):
        super().__init__()
        self.__dict__["shift"] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float32)

    def function(self, x):
        return super().function(x) + self.shift

    def inverse(self, y):
        return super().inverse(y - self.shift)


class Only32(Scale):  # FrEIA's lipschitz_correction
    def function(self, x):
        return super().function(x) + 0 * (x.to(torch.float32) @ torch.eye(4).to(x.dtype))[:, :4]


class Coarse(Scale):
    def inverse(self, y):
        return (y.to(torch.float32) - self.b.to(torch.float32)).mul((-self.s).exp()).to(y.dtype)


class CoarseLogDet(Scale):
    def log_det(self, x):
        return super().log_det(x) + (x.dtype == torch.float32)


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (Plain, "dtype"),
        (Only32, "RuntimeError"),
        (Coarse, "inverse to return"),
        (CoarseLogDet, "the torch.float32 log-determinant to be that in float64"),
    ],
)
def test_dtypes(defect, message):
    with pytest.raises(AssertionError, match=message):
        testing.assert_dtypes(defect(), X)


class Centred(Scale):
    def function(self, x):
        return super().function(x + x.mean(0))

    def inverse(self, y):
        x = super().inverse(y)
        return x - x.mean(0) / 2


class FirstOnly(Scale):
    def log_det(self, x):
        return super().log_det(x) + torch.arange(len(x), dtype=x.dtype)


class Squeezes(Scale):
    def function(self, x):
        return super().function(x).squeeze(0)


class OddLogDet(Scale):
    def log_det(self, x):
        return super().log_det(x) if len(x) else x.new_zeros(1)


class Detaches(Scale):
    def function(self, x):
        return super().function(x if len(x) else x.detach())


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mean(0, keepdim=True).expand_as(gradient) if len(gradient) else gradient


class MeanGradient(Scale):
    def function(self, x):
        return _Mean.apply(super().function(x))


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (Centred, "the outputs of a batch of 1"),
        (FirstOnly, "the outputs of a batch of 1"),
        (Squeezes, r"outputs of shapes|shape \(1, 4\)"),
        (OddLogDet, "outputs of shapes"),
        (Detaches, "gradients of all inputs of shapes"),
        (MeanGradient, "the gradients of a batch of 1"),
    ],
)
def test_batch_sizes(defect, message):
    with pytest.raises(AssertionError, match=message):
        testing.assert_batch_sizes(defect(), X)


class Transposed(iz.InvertibleModule):  # FrEIA's OrthogonalTransform: orthogonal at the start, and then not
    volume_preserving = True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0])

    def function(self, x):
        return x @ self.weight.mT

    def inverse(self, y):
        return y @ self.weight


class Explodes(Scale):
    def log_det(self, x):
        return super().log_det(x) + (self.s - self.s).abs().sqrt().sum()


@pytest.mark.parametrize(("defect", "message"), [(Transposed, "Its inverse is wrong"), (Explodes, "finite gradient")])
def test_trainable(defect, message):
    with pytest.raises(AssertionError, match=message):
        testing.assert_trainable(defect(), X)


# ---- the line that users write --------------------------------------------------------------------------------------


@pytest.mark.parametrize("defect", [WrongSign, WrongInverse, FirstSample, WrongReplay, Hoarder, Writes, KeepsLambda])
def test_assert_invertible_makes_all_assertions(defect):
    with pytest.raises(AssertionError) as failure:
        testing.assert_invertible(defect(), X)
    assert defect.__name__ in str(failure.value)
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
    class Shift(iz.InvertibleModule):
        volume_preserving = True

        def function(self, x, context):
            return x + context

        def inverse(self, y, context):
            return y - context

    layer = Shift()
    layer.__class__.__qualname__ = "Shift"
    without = {"assert_portable": "the class is local"}
    testing.assert_invertible(layer, X, context=X.flip(0), without=without)
