"""InvZoo: invertible PyTorch modules that free their activations and rebuild them with the inverse in backward."""

from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from .blocks import GlowStep, HINTCoupling, InvertiblePatchConv
from .containers import InvertibleSequential, MultiScale, Parallel, Repeat
from .engine import Mode, checkpoint
from .flows import as_transform
from .invtorch import requires_grad
from .layers.activations.activation import Identity, InvertibleELU, InvertibleLeakyReLU, SneakyReLU
from .layers.activations.adaptive import InvertiblePReLU, SinhArcsinh, Snake
from .layers.activations.squash import (
    InvertibleAtanh,
    InvertibleExp,
    InvertibleLog,
    InvertibleLogit,
    InvertibleSigmoid,
    InvertibleSoftplus,
    InvertibleTanh,
)
from .layers.couplings.autoregressive import MaskedAutoregressive
from .layers.couplings.couplings import (
    AdditiveCoupling,
    AffineCoupling,
    GINCoupling,
    MixtureLogisticCoupling,
    RationalQuadraticCoupling,
)
from .layers.linear.emerging import EmergingConv
from .layers.linear.linear import InvertibleConv1x1, InvertibleLinear
from .layers.linear.lowrank import WoodburyLinear
from .layers.linear.periodic import PeriodicConv
from .layers.linear.sampling import OrthogonalDownsample, OrthogonalUpsample
from .layers.monotone.monotone import BernsteinPolynomial, Monotone, SumOfSquares, UnconstrainedMonotonic
from .layers.monotone.spline import RationalQuadraticSpline
from .layers.normalisation.act_norm import ActNorm
from .layers.normalisation.affine import ConditionalAffine, ElementwiseAffine
from .layers.normalisation.batch_norm import InvertibleBatchNorm
from .layers.normalisation.norm import InvertibleGroupNorm, InvertibleLayerNorm, InvertibleRMSNorm
from .layers.rearrangements.permutation import Deinterleave, Interleave, Permute, Reverse, Shuffle, Swap
from .layers.rearrangements.reshape import Flatten, Pad, Rearrange, Reshape
from .layers.rearrangements.split import Merge, Split
from .layers.rearrangements.squeeze import Squeeze, Unsqueeze
from .layers.rearrangements.wavelet import DCT, HaarDownsample, HaarUpsample, Hadamard
from .layers.residual.lipschitz import lipschitz
from .layers.residual.residual import InvertibleResidual
from .layers.residual.reversible_ode import Leapfrog, MomentumResidual
from .layers.surjections.dequantize import Dequantize
from .layers.surjections.surjection import Abs, Augment, Slice
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
