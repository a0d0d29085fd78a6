"""Every behaviour is tested on each form of net, in each mode."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import FEATURES, FORMS, MODES, Subject


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SAVING = [Subject(form, mode) for form in FORMS for mode in MODES[1:]]
STORING = [Subject(form, "store") for form in ("stack", "streams")]  # there is little to go wrong

# Both modes that free something, every container, and each kind of layer in them; the whole matrix is slow.
USUAL = {Subject("stack", "invert"), Subject("streams", "invert"), Subject("sequential", "recompute")}
USUAL.add(Subject("stack", "store"))


def params(subjects: list[Subject]) -> list[Any]:
    return [pytest.param(s, id=f"{s.form}-{s.mode}", marks=[] if s in USUAL else pytest.mark.slow) for s in subjects]


@pytest.fixture(params=params(STORING + SAVING))
def subject(request) -> Subject:
    return request.param


@pytest.fixture(params=params(SAVING))
def saving(request) -> Subject:
    """The subjects that free something."""
    return request.param


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, FEATURES, requires_grad=True)


@pytest.fixture
def data() -> Tensor:
    return torch.randn(5, FEATURES)
