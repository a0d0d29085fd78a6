"""InvZoo: invertible PyTorch modules that free their activations and rebuild them with the inverse in backward."""

from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from .blocks import GlowStep, HINTCoupling, InvertiblePatchConv
from .containers import InvertibleSequential, MultiScale, Parallel, Repeat
from .contract import requires_grad
from .engine import Mode, checkpoint
from .flows import as_transform
from .layers.act_norm import ActNorm
from .layers.activation import Identity, InvertibleELU, InvertibleLeakyReLU, SneakyReLU
from .layers.adaptive import InvertiblePReLU, SinhArcsinh, Snake
from .layers.affine import ConditionalAffine, ElementwiseAffine
from .layers.autoregressive import MaskedAutoregressive
from .layers.batch_norm import InvertibleBatchNorm
from .layers.conv import InvertibleConv1x1
from .layers.couplings import AdditiveCoupling, AffineCoupling, GINCoupling
from .layers.dequantize import Dequantize
from .layers.emerging import EmergingConv
from .layers.halves import Deinterleave, Interleave, Swap
from .layers.layer_norm import InvertibleLayerNorm, InvertibleRMSNorm
from .layers.linear import InvertibleLinear
from .layers.lipschitz import lipschitz
from .layers.lowrank import WoodburyLinear
from .layers.mixture import MixtureLogisticCoupling
from .layers.monotone import BernsteinPolynomial, Monotone, SumOfSquares, UnconstrainedMonotonic
from .layers.norm import InvertibleGroupNorm
from .layers.periodic import PeriodicConv
from .layers.permutation import Permute, Reverse, Shuffle
from .layers.reshape import Flatten, Pad, Rearrange, Reshape
from .layers.residual import InvertibleResidual
from .layers.reversible_ode import Leapfrog, MomentumResidual
from .layers.sampling import OrthogonalDownsample, OrthogonalUpsample
from .layers.spline_layers import RationalQuadraticCoupling, RationalQuadraticSpline
from .layers.split import Merge, Split
from .layers.squash import (
    InvertibleAtanh,
    InvertibleExp,
    InvertibleLog,
    InvertibleLogit,
    InvertibleSigmoid,
    InvertibleSoftplus,
    InvertibleTanh,
)
from .layers.squeeze import Squeeze, Unsqueeze
from .layers.surjection import Abs, Augment, Slice
from .layers.wavelet import DCT, HaarDownsample, HaarUpsample, Hadamard
from .log_dets import sum_per_sample
from .module import Inverse, InvertibleModule, mode

if TYPE_CHECKING:
    from . import testing

    __version__: str

__all__ = [
    "DCT",
    "Abs",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Augment",
    "BernsteinPolynomial",
    "ConditionalAffine",
    "Deinterleave",
    "Dequantize",
    "ElementwiseAffine",
    "EmergingConv",
    "Flatten",
    "GINCoupling",
    "GlowStep",
    "HINTCoupling",
    "HaarDownsample",
    "HaarUpsample",
    "Hadamard",
    "Identity",
    "Interleave",
    "Inverse",
    "InvertibleAtanh",
    "InvertibleBatchNorm",
    "InvertibleConv1x1",
    "InvertibleELU",
    "InvertibleExp",
    "InvertibleGroupNorm",
    "InvertibleLayerNorm",
    "InvertibleLeakyReLU",
    "InvertibleLinear",
    "InvertibleLog",
    "InvertibleLogit",
    "InvertibleModule",
    "InvertiblePReLU",
    "InvertiblePatchConv",
    "InvertibleRMSNorm",
    "InvertibleResidual",
    "InvertibleSequential",
    "InvertibleSigmoid",
    "InvertibleSoftplus",
    "InvertibleTanh",
    "Leapfrog",
    "MaskedAutoregressive",
    "Merge",
    "MixtureLogisticCoupling",
    "Mode",
    "MomentumResidual",
    "Monotone",
    "MultiScale",
    "OrthogonalDownsample",
    "OrthogonalUpsample",
    "Pad",
    "Parallel",
    "PeriodicConv",
    "Permute",
    "RationalQuadraticCoupling",
    "RationalQuadraticSpline",
    "Rearrange",
    "Repeat",
    "Reshape",
    "Reverse",
    "Shuffle",
    "SinhArcsinh",
    "Slice",
    "Snake",
    "SneakyReLU",
    "Split",
    "Squeeze",
    "SumOfSquares",
    "Swap",
    "UnconstrainedMonotonic",
    "Unsqueeze",
    "WoodburyLinear",
    "as_transform",
    "checkpoint",
    "lipschitz",
    "mode",
    "requires_grad",
    "sum_per_sample",
    "testing",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what training does without when it is first used, and look up the version of what is installed."""
        if name == "testing":
            return import_module(".testing", __name__)
        if name == "__version__":
            with suppress(PackageNotFoundError):  # a checkout that is not installed has none
                return version(__name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
