"""Activations: a function of each value alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from ..engine._torch import backward_id, functorch_active, tracing
from ..module import InvertibleModule
from ._checks import check_positive, refuse

__all__ = [
    "Identity",
    "InvertibleAtanh",
    "InvertibleLeakyReLU",
    "InvertibleLogit",
    "InvertibleSigmoid",
    "InvertibleTanh",
]

_SYMMETRIC = constraints.interval(-1.0, 1.0)


def _check_real(owner: InvertibleModule, argument: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        refuse(owner, argument, "be a Tensor", type(x).__name__, TypeError)
    if not x.is_floating_point():
        refuse(owner, argument, "be real floating point", x.dtype, TypeError)


def _check_values(owner: InvertibleModule, argument: str, x: Tensor, least: float, most: float) -> None:
    """Values lie in [least, most], or are NaN: those pass on, as in PyTorch."""
    _check_real(owner, argument, x)
    if not _readable(x):
        return
    low, high = torch.stack(x.detach().aminmax()).tolist()  # one synchronisation, not two
    if low < least or high > most:
        text = repr if x.dtype is torch.float64 else "{:.8g}".format
        refuse(owner, argument, f"have values in [{least}, {most}]", f"values from {text(low)} to {text(high)}")


def _readable(x: Tensor) -> bool:
    """Whether Python can look at the values, and should: a replay in backward looks at those that forward looked at."""
    return not (
        torch.compiler.is_compiling()
        or functorch_active()
        or tracing() is not None
        or backward_id() != -1
        or x.is_meta
        or x.numel() == 0
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _logit(x: Tensor) -> Tensor:
    # torch.logit computes log(x / (1 - x)), which loses all digits near 1/2 in half precision.
    return x.log() - torch.log1p(-x)


def _atanh(x: Tensor) -> Tensor:
    # The gradient of torch.atanh has 1 - x ** 2, which has no digits left near 1; the terms here have opposite signs.
    return (torch.log1p(x) - torch.log1p(-x)) / 2


class Identity(InvertibleModule):
    """Return the inputs themselves, ``x -> x``.

    Shapes: any, of any number of inputs: one is returned as it is, several as a tuple.

    Example:
        >>> x = torch.ones(3)
        >>> iz.Identity()(x) is x
        True
    """

    volume_preserving = True
    exact = True

    def function(self, *inputs: Any) -> Any:
        return inputs[0] if len(inputs) == 1 else inputs

    def inverse(self, *outputs: Any) -> Any:
        return outputs[0] if len(outputs) == 1 else outputs


class InvertibleLeakyReLU(InvertibleModule):
    """Scale negative values: ``x -> x`` where ``x > 0`` and ``negative_slope * x`` elsewhere.

    The output has the input's sign, so the inverse divides the negative ones by the slope. The derivative at 0 is the
    slope, as in `torch.nn.LeakyReLU`, and that of the inverse is its reciprocal. In mode ``invert``, an exact zero that
    later layers rebuild may come back as a rounding error of either sign, with the derivative of that side; behind a
    ReLU, whose zeros are many, use mode ``recompute``.

    Shapes: ``(...) -> (...)``.

    Args:
        negative_slope: the slope of the negative side, positive and finite.

    Raises:
        ValueError: for a slope that is not positive and finite.
        TypeError: for values that are not real floating point.

    Example:
        >>> layer = iz.InvertibleLeakyReLU(0.5)
        >>> layer(torch.tensor([-4., 0., 3.]))
        tensor([-2.,  0.,  3.])
        >>> layer.inverse(torch.tensor([-2., 0., 3.]))
        tensor([-4.,  0.,  3.])
    """

    negative_slope: float

    def __init__(self, negative_slope: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        check_positive(self, "negative_slope", negative_slope)
        self.negative_slope = negative_slope

    def function(self, x: Tensor) -> Tensor:
        _check_real(self, "x", x)
        return F.leaky_relu(x, self.negative_slope)

    def inverse(self, y: Tensor) -> Tensor:
        _check_real(self, "y", y)
        return F.leaky_relu(y, 1 / self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class InvertibleSigmoid(InvertibleModule):
    """Squash to the unit interval: ``x -> 1 / (1 + exp(-x))``, ``y -> log(y) - log(1 - y)``.

    It saturates: in float32 no ``x`` above 17 comes back. So mode ``invert`` keeps the input and never inverts. The
    outputs 0 and 1, which rounding makes of large inputs, are in the codomain; their inverses are -inf and inf.

    Shapes: ``(...) -> (...)``.

    Raises:
        ValueError: for the inverse of values outside [0, 1]. NaN passes. Reading the values synchronises with a GPU;
            it is left out where they cannot be read: in compiled code and `torch.func` transforms, which give NaN.
        TypeError: for values that are not real floating point.

    Example:
        >>> layer = iz.InvertibleSigmoid()
        >>> layer(torch.tensor([0.]))
        tensor([0.5000])
        >>> layer.inverse(torch.tensor([0., 0.5, 1.]))
        tensor([-inf, 0., inf])
    """

    codomain = constraints.unit_interval
    saturating = True

    def function(self, x: Tensor) -> Tensor:
        _check_real(self, "x", x)
        return torch.sigmoid(x)

    def inverse(self, y: Tensor) -> Tensor:
        _check_values(self, "y", y, 0, 1)
        return _logit(y)


class InvertibleLogit(InvertibleModule):
    """Stretch the unit interval to the real line: ``x -> log(x) - log(1 - x)``, ``y -> 1 / (1 + exp(-y))``.

    The inverse saturates, so mode ``invert`` keeps the input. 0 and 1 are in the domain and go to -inf and inf.

    Shapes: ``(...) -> (...)``.

    Raises:
        ValueError: for values outside [0, 1]. NaN passes. Reading the values synchronises with a GPU; it is left out
            where they cannot be read: in compiled code and `torch.func` transforms, which give NaN.
        TypeError: for values that are not real floating point.

    Example:
        >>> layer = iz.InvertibleLogit()
        >>> layer(torch.tensor([0., 0.5, 1.]))
        tensor([-inf, 0., inf])
    """

    domain = constraints.unit_interval
    saturating = True

    def function(self, x: Tensor) -> Tensor:
        _check_values(self, "x", x, 0, 1)
        return _logit(x)

    def inverse(self, y: Tensor) -> Tensor:
        _check_real(self, "y", y)
        return torch.sigmoid(y)


class InvertibleTanh(InvertibleModule):
    """Squash to (-1, 1): ``x -> tanh(x)``, ``y -> (log(1 + y) - log(1 - y)) / 2``.

    It saturates: in float32 no ``|x|`` above 9.1 comes back. So mode ``invert`` keeps the input and never inverts. The
    outputs -1 and 1, which rounding makes of large inputs, are in the codomain; their inverses are -inf and inf.

    Shapes: ``(...) -> (...)``.

    Raises:
        ValueError: for the inverse of values outside [-1, 1]. NaN passes. Reading the values synchronises with a GPU;
            it is left out where they cannot be read: in compiled code and `torch.func` transforms, which give NaN.
        TypeError: for values that are not real floating point.

    Example:
        >>> layer = iz.InvertibleTanh()
        >>> layer.inverse(layer(torch.tensor([-1., 0., 2.])))
        tensor([-1.,  0.,  2.])
    """

    codomain = _SYMMETRIC
    saturating = True

    def function(self, x: Tensor) -> Tensor:
        _check_real(self, "x", x)
        return torch.tanh(x)

    def inverse(self, y: Tensor) -> Tensor:
        _check_values(self, "y", y, -1, 1)
        return _atanh(y)


class InvertibleAtanh(InvertibleModule):
    """Stretch (-1, 1) to the real line: ``x -> (log(1 + x) - log(1 - x)) / 2``, ``y -> tanh(y)``.

    The inverse saturates, so mode ``invert`` keeps the input. -1 and 1 are in the domain and go to -inf and inf.

    Shapes: ``(...) -> (...)``.

    Raises:
        ValueError: for values outside [-1, 1]. NaN passes. Reading the values synchronises with a GPU; it is left out
            where they cannot be read: in compiled code and `torch.func` transforms, which give NaN.
        TypeError: for values that are not real floating point.

    Example:
        >>> layer = iz.InvertibleAtanh()
        >>> layer(torch.tensor([-1., 0., 1.]))
        tensor([-inf, 0., inf])
    """

    domain = _SYMMETRIC
    saturating = True

    def function(self, x: Tensor) -> Tensor:
        _check_values(self, "x", x, -1, 1)
        return _atanh(x)

    def inverse(self, y: Tensor) -> Tensor:
        _check_real(self, "y", y)
        return torch.tanh(y)
