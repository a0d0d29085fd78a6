"""InvZoo: invertible PyTorch modules that free their activations and rebuild them with the inverse in backward."""

from .containers import InvertibleSequential, MultiScale, Parallel, Repeat
from .contract import requires_grad
from .engine import Mode, checkpoint
from .flows import as_transform
from .layers.activation import Identity, InvertibleELU, InvertibleLeakyReLU, SneakyReLU
from .layers.conv import InvertibleConv1x1
from .layers.coupling import AdditiveCoupling, AffineCoupling, GINCoupling
from .layers.linear import InvertibleLinear
from .layers.permutation import Deinterleave, Interleave, Permute, Reverse, Shuffle, Swap
from .layers.reshape import Flatten, Pad, Rearrange, Reshape
from .layers.split import Merge, Split
from .layers.squeeze import Squeeze, Unsqueeze
from .layers.wavelet import DCT, HaarDownsample, HaarUpsample, Hadamard
from .layers.squash import (
    InvertibleAtanh,
    InvertibleExp,
    InvertibleLog,
    InvertibleLogit,
    InvertibleSigmoid,
    InvertibleSoftplus,
    InvertibleTanh,
)
from .module import Inverse, InvertibleModule, mode

# isort: split
from . import testing  # its catalogue names the classes above

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "DCT",
    "Deinterleave",
    "Flatten",
    "GINCoupling",
    "HaarDownsample",
    "HaarUpsample",
    "Hadamard",
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
    "MultiScale",
    "Pad",
    "Parallel",
    "Permute",
    "Rearrange",
    "Repeat",
    "Reshape",
    "Reverse",
    "Shuffle",
    "Split",
    "Squeeze",
    "Swap",
    "Unsqueeze",
    "as_transform",
    "checkpoint",
    "mode",
    "requires_grad",
    "testing",
]
