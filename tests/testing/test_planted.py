"""The defects of other libraries, planted in this library's layers: each makes the test of a catalogue case fail."""

import gc

import pytest
import torch
from torch import nn

import invzoo as iz
from invzoo.engine.surroundings.snapshot import Surroundings
from invzoo.layers.linear import sampling
from invzoo.layers.linear.matrix import Free, Householder
from invzoo.layers.maps.affine import Shift
from invzoo.protocol import Run

CASES = {case.name: case for case in iz.testing.cases()}


def wrong_sign_back(self, x, h, s, plain=Run._total):
    total = plain(self, x, h, s)
    return -total if self.inverted else total


def per_position(self, x):
    return self.log_slope(x).flatten(1)[:, :-1].sum(1, keepdim=True).expand(-1, 2)


def per_feature(self, x, h, s):
    return self.bijection.log_slope(x, *h, *s).flatten()


def at_the_output(self, y, f, plain=iz.InvertibleResidual.undo):
    with torch.enable_grad():
        return plain(self, y, f), *self.seen(y.detach().requires_grad_(), f)


def marked(self, x, f):
    return x, f(x.requires_grad_() if x.is_leaf else x)


def first_sample(self, x, h, *, create_graph, plain=iz.InvertibleResidual._log_det):
    """Hand the gradient of sample 0 to all samples."""
    log_det = plain(self, x, h, create_graph=create_graph)
    if log_det.requires_grad:
        log_det.register_hook(lambda gradient: gradient[:1].expand_as(gradient))
    return log_det


def outdated(self):
    self.entries_before = self.vectors.new_empty(self.rows, self.reflections)
    torch.qr(self.entries_before)  # gone in torch 2.14, and a warning before
    nn.init.normal_(self.vectors)


def two_dims(owner, argument, value):
    return (value, value) if isinstance(value, int) else (*value, value[0])[:2]


def float32_slope(self, x):
    slope = torch.tensor(self.negative_slope, dtype=torch.float32).log()
    return torch.where(x > 0, torch.zeros(()), slope).to(x.dtype)


def no_longer_orthogonal(self, *_):
    return (torch.eye(self.rows, self.columns, dtype=self.vectors.dtype) + self.vectors,)


FREE = {"inverse": lambda self, *factors: factors[0].mH, "log_det": lambda self, *_: self.entries.new_zeros(())}
DRIFTS = {"undo": lambda self, y, h: y - 1.001 * h, "undo_": lambda self, y, h: y.sub_(1.001 * h)}
SIGMOID_SLOPE = {"log_slope": lambda self, x: (torch.sigmoid(x) * (1 - torch.sigmoid(x))).log()}
TANH_SLOPE = {"log_slope": lambda self, x: (1 - torch.tanh(x) ** 2).log()}
WRITES = {"inverse": lambda self, y: self._up("y", y.mul_(1.0))}
RESIDUAL, ORTHOGONAL = "InvertibleResidual", "InvertibleLinear[householder]"

PLANTED = {  # what is planted where, and the case that it makes fail
    "FrEIA: log-det of the inverse has the wrong sign": (Run, {"_total": wrong_sign_back}, "ElementwiseAffine"),
    "FrEIA: log-det of shape (B, ...)": (iz.InvertibleSigmoid, {"log_det": per_position}, "InvertibleSigmoid"),
    "FrEIA: log-det -inf at large inputs": (iz.InvertibleSigmoid, SIGMOID_SLOPE, "InvertibleSigmoid"),
    "nflows: log-det of shape (B D,)": (Run, {"_total": per_feature}, "ElementwiseAffine"),
    "FrEIA: log-det of the inverse at z": (iz.InvertibleResidual, {"undo": at_the_output}, RESIDUAL),
    "FrEIA: marks the caller's tensor": (iz.InvertibleResidual, {"seen": marked}, RESIDUAL),
    "FrEIA: transposed, though no longer orthogonal": (Householder, {"factors": no_longer_orthogonal}, ORTHOGONAL),
    "FrEIA: the inverse writes into its input": (iz.HaarDownsample, WRITES, "HaarDownsample"),
    "FrEIA: log-det 0 and transposed inverse of a free matrix": (Free, FREE, "InvertibleLinear[free]"),
    "nflows: a log-slope in float32": (iz.InvertibleLeakyReLU, {"log_slope": float32_slope}, "InvertibleLeakyReLU"),
    "nflows: log(1 - y^2)": (iz.InvertibleTanh, TANH_SLOPE, "InvertibleTanh"),
    "nflows: built with torch.qr": (Householder, {"reset_parameters": outdated}, ORTHOGONAL),
    "normflows: the log-det's gradient of sample 0": (iz.InvertibleResidual, {"_log_det": first_sample}, RESIDUAL),
    "iunets: a kernel of two dims": (sampling, {"sizes_of": two_dims}, "OrthogonalDownsample[random]"),
    "memcnn: a replay that evaluates other than its forward": (Shift, DRIFTS, "AdditiveCoupling"),
}


def failures(name):
    """Return the assertions that fail for a case of the catalogue."""
    failed = []
    try:
        assertions = CASES[name].assertions()
    except Exception as error:  # noqa: BLE001 - a layer that cannot be built
        return [repr(error)]
    for assertion, check in assertions.items():
        try:
            check()
        except Exception:  # noqa: BLE001 - any failure will do
            failed.append(assertion)
    return failed


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_defect_is_found(planted, monkeypatch):
    target, changes, case = PLANTED[planted]
    for name, value in changes.items():
        monkeypatch.setattr(target, name, value)
    assert failures(case), planted


@pytest.mark.parametrize("case", sorted({case for _, _, case in PLANTED.values()}))
def test_nothing_is_found_without(case):
    assert failures(case) == []


def random_states_kept(layer):
    """Return how many states of a random number generator a forward keeps."""

    def count():
        return sum(type(t) is torch.Tensor and t.dtype is torch.uint8 and t.nbytes == size for t in gc.get_objects())

    gc.collect()
    size = torch.get_rng_state().nbytes
    before = count()
    y = layer(torch.randn(3, 4, requires_grad=True))
    return count() - before + 0 * len(y)


def test_a_random_state_is_kept_where_it_is_used_alone(monkeypatch):
    assert random_states_kept(iz.InvertibleLinear(4)) == 0
    assert random_states_kept(iz.InvertibleLinear(4, seed=True)) == 1
    assert random_states_kept(iz.AdditiveCoupling(nn.Dropout())) == 1
    close = Surroundings.close
    monkeypatch.setattr(Surroundings, "close", lambda self, seed: close(self, seed=True))  # invtorch: with every call
    assert random_states_kept(iz.InvertibleLinear(4)) == 1
