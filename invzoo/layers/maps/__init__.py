"""Maps of each value by parameters of its own: what couplings, conditioned and autoregressive layers have in common.

A map of one's own is a subclass of :class:`Map`; any coupling, or masked autoregressive layer, takes it.
"""

from .affine import Affine, Shift
from .base import Map
from .mixture import MixtureOfLogistics
from .spline import RationalQuadratic

__all__ = ["Affine", "Map", "MixtureOfLogistics", "RationalQuadratic", "Shift"]
