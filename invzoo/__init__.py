"""InvZoo: invertible PyTorch modules that free their activations and rebuild them with the inverse in backward."""

from .containers import InvertibleSequential
from .contract import requires_grad
from .engine import Mode, checkpoint
from .layers.activation import (
    Identity,
    InvertibleAtanh,
    InvertibleLeakyReLU,
    InvertibleLogit,
    InvertibleSigmoid,
    InvertibleTanh,
)
from .layers.conv import InvertibleConv1x1
from .layers.coupling import AdditiveCoupling, AffineCoupling, GINCoupling
from .layers.linear import InvertibleLinear
from .layers.permutation import Deinterleave, Interleave, Permute, Reverse, Shuffle, Swap
from .layers.split import Merge, Split
from .module import Inverse, InvertibleModule, mode

# isort: split
from . import testing  # its catalogue names the classes above

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Deinterleave",
    "GINCoupling",
    "Identity",
    "Interleave",
    "Inverse",
    "InvertibleAtanh",
    "InvertibleConv1x1",
    "InvertibleLeakyReLU",
    "InvertibleLinear",
    "InvertibleLogit",
    "InvertibleModule",
    "InvertibleSequential",
    "InvertibleSigmoid",
    "InvertibleTanh",
    "Merge",
    "Mode",
    "Permute",
    "Reverse",
    "Shuffle",
    "Split",
    "Swap",
    "checkpoint",
    "mode",
    "requires_grad",
    "testing",
]
