"""Fingerprints see errors of every kind, at about their size."""

import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import invzoo as iz
from invzoo.engine.compiled.operators import fingerprints
from invzoo.engine.fingerprint import distance, fingerprint, project

SHAPES = [(4, 6), (64, 8), (64, 64), (2048, 256), (4, 16, 32, 32), (32, 3, 64, 64), (7, 5), (256, 2), (5,), (100,)]
ERRORS = {
    "random": torch.randn,
    "a constant": torch.ones,
    "one for each sample": lambda shape: torch.randn(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape),
    "one for each feature": lambda shape: torch.randn(shape[1:2]).reshape(-1, *[1] * (len(shape) - 2)).expand(shape),
    "half of the samples": lambda shape: (
        (torch.arange(shape[0]) % 2).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    ),
    "half of the values": lambda shape: (torch.arange(torch.Size(shape).numel()) > 10).float().reshape(shape),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_seen_at_about_their_size(shape: tuple[int, ...], error: str):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    e = 1e-3 * ERRORS[error](shape)
    true = float(e.norm() / x.norm())
    assert distance(fingerprint(x), fingerprint(x)) == 0
    assert true / 20 <= distance(fingerprint(x), fingerprint(x + e)) <= 20 * true


@pytest.mark.parametrize("position", range(35))
def test_an_error_in_any_one_value_is_seen(position: int):
    """Four random numbers may be small at once; a tensor has rows, and a rest behind them."""
    x = torch.zeros(35, dtype=torch.float64)
    x[position] = 1
    assert distance(fingerprint(x + 1), fingerprint(torch.ones_like(x))) > 1e-3


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.complex64, torch.complex128, torch.int64]
)
def test_every_dtype_and_empty_tensors(dtype: torch.dtype):
    x = torch.arange(100).reshape(4, 25).to(dtype)
    assert 1e-2 < distance(fingerprint(x), fingerprint(x + x[:, :1])) < 1e1
    assert distance(fingerprint(x[:0]), fingerprint(x[:0])) == 0
    assert len(fingerprint(x)) == 4 + 1


def test_those_of_compiled_chains_are_as_precise():
    x = torch.randn(5, dtype=torch.float64)
    expected = torch.stack([project(x.float()).double(), project(x)])
    assert_close(fingerprints([x.float(), x], -1), expected, rtol=0, atol=0)


def test_autocast_makes_no_difference():
    x = torch.randn(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fingerprint(x)
    assert inside == fingerprint(x)


NETS = {
    "couplings": lambda: [iz.AdditiveCoupling(nn.Linear(4, 4)), iz.AdditiveCoupling(nn.Linear(4, 4), swap=True)],
    "layers that save nothing first": lambda: [iz.Reverse(), iz.Reverse(), iz.AdditiveCoupling(nn.Linear(4, 4))],
    "layers that save nothing last": lambda: [iz.AdditiveCoupling(nn.Linear(4, 4)), iz.Reverse(), iz.Reverse()],
    "a glow": lambda: [iz.ActNorm(8), iz.InvertibleLinear(8), iz.AffineCoupling(nn.Linear(4, 8))],
}


@pytest.mark.parametrize("mode", ["recompute", "invert"])
@pytest.mark.parametrize("name", NETS)
def test_only_the_first_step_takes_them(monkeypatch: pytest.MonkeyPatch, name: str, mode: str):
    """They are read on the CPU, which waits for a device; a call that no backward replays is never compared."""
    taken: list[int] = []
    monkeypatch.setattr(
        sys.modules["invzoo.engine.fingerprint"], "fingerprint", lambda t: taken.append(0) or fingerprint(t)
    )
    net, counts = iz.InvertibleSequential(*NETS[name](), mode=mode), []
    x = torch.randn(5, 8, requires_grad=True)
    for inputs in (lambda: x, lambda: x, lambda: x.sigmoid(), lambda: x):
        taken.clear()
        net(inputs()).square().sum().backward()
        counts.append(len(taken))
    assert counts[0] > 0
    assert counts[1:] == [0, 0, 0]
