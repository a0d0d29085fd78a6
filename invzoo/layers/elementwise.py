"""What functions of each value alone have in common: checks of values, and maths."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from ..engine import functorch_active, tracing
from ..module import InvertibleModule
from ._checks import check_tensor, refuse

__all__ = ["Elementwise", "check_domain", "check_real", "log_cosh", "readable", "softplus"]


def check_real(owner: object, argument: str, x: Any) -> None:
    """``x`` is a tensor of floating point numbers, none complex."""
    check_tensor(owner, argument, x)
    if not x.is_floating_point():
        refuse(owner, argument, "be real floating point", x.dtype, TypeError)


def check_domain(owner: object, argument: str, x: Tensor, domain: Any) -> None:
    """Values lie in a domain, the real numbers or an interval, or are NaN: those pass on, as in PyTorch."""
    check_real(owner, argument, x)
    if domain is constraints.real or not readable(x):
        return
    least, most = domain.lower_bound, getattr(domain, "upper_bound", math.inf)
    low, high = torch.stack(x.detach().aminmax()).tolist()  # one synchronisation, not two
    if low < least or high > most:
        ends = torch.tensor((least, most), dtype=x.dtype).tolist()  # as near as the dtype gets, which may be outside
        if low < ends[0] or high > ends[1]:
            text = repr if x.dtype is torch.float64 else "{:.8g}".format
            refuse(owner, argument, f"have values in [{least:g}, {most:g}]", f"values from {text(low)} to {text(high)}")


def readable(x: Tensor) -> bool:
    """Whether Python can look at the values."""
    return not (
        torch.compiler.is_compiling()
        or functorch_active()
        or tracing() is not None
        or x.is_meta
        or x.numel() == 0
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), to the last digit (torch's own cuts at 20, which float64 notices)."""
    return 0 - F.logsigmoid(-x)  # which is 0, not -0, for x far below 0


def log_cosh(x: Tensor) -> Tensor:
    """log(cosh(x)), smooth and, but for the last factor of 2, without overflow."""
    return (softplus(2 * x) + softplus(-2 * x)) / 2 - math.log(2)


class Elementwise(InvertibleModule):
    """A function of each value alone. Abstract."""

    def check_argument(self, argument: str, x: Tensor) -> None:
        check_domain(self, argument, x, self.domain if argument == "x" else self.codomain)
