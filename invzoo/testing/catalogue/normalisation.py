"""Scales, shifts and normalisation."""

from collections.abc import Callable

from torch import Tensor, nn

import invzoo as iz

from ...module import InvertibleModule
from ..entries import Case, Entry
from .nets import after_a_batch, convolutions, with_context

__all__ = ["NORMALISATION"]


class _WithStatistics(InvertibleModule):
    """A layer that normalises each sample, and shows the statistics that its inverse needs."""

    def __init__(self, norm: InvertibleModule) -> None:
        super().__init__()
        self.norm, self._policy = norm, norm._policy

    def function(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.norm.function(x)

    def inverse(self, *outputs: Tensor) -> Tensor:
        return self.norm.inverse(*outputs)

    @property
    def inv(self) -> InvertibleModule:
        return self.norm.inv


def _with_statistics(make: Callable[[], InvertibleModule], *shape: int, id: str = "statistics") -> Case:  # noqa: A002
    without = {
        "assert_dtypes": "statistics stay in float32",
        "assert_memory": "the inverse keeps its inputs, and the forward its statistics",
    }
    return Case(lambda: _WithStatistics(make()), shape, id=id, without=without)


NORMALISATION: tuple[Entry, ...] = (
    Entry(
        iz.ElementwiseAffine,
        "y = e^s x + b for each feature",
        "pixels times the sum of s",
        Case(lambda: iz.ElementwiseAffine(3, dim=1), (3, 2)),
        Case(lambda: iz.ElementwiseAffine(3, dim=-1, bias=False), (2, 3), id="last"),
        with_context(2, lambda: iz.ElementwiseAffine(3, dim=1, conditioner=nn.Linear(2, 6)), (3, 2)),
    ),
    Entry(
        iz.ConditionalAffine,
        "y = exp(s(c)) x + t(c)",
        "sum of s",
        Case(lambda: iz.ConditionalAffine(nn.Linear(2, 6), dim=1), (3, 2), side={"context": (2,)}),
        Case(
            lambda: iz.ConditionalAffine(convolutions(1, 6), scale="softclip"),
            (3, 2, 4),
            id="images",
            side={"context": (1, 2, 4)},
        ),
    ),
    Entry(
        iz.ActNorm,
        "y = e^s (x - mean) / std + b, mean and std of the first batch",
        "pixels times the sum of s - log std",
        Case(lambda: after_a_batch(iz.ActNorm(3, dim=1), 3, 2), (3, 2)),
    ),
    Entry(
        iz.InvertibleBatchNorm,
        "y = e^s (x - mean) / std + b, mean and std of the batch, or running ones",
        "pixels times the sum of s - log std",
        Case(lambda: after_a_batch(iz.InvertibleBatchNorm(3), 3, 2).eval(), (3, 2), id="eval"),
        Case(
            lambda: after_a_batch(iz.InvertibleBatchNorm(3), 3, 2),
            (3, 2),
            id="training",
            independent_samples=False,
            kept_bytes=256,
            without=dict.fromkeys(
                ("assert_round_trip", "assert_log_det", "assert_dtypes", "assert_trainable"),
                "the public inverse and the log-determinant hold statistics fixed",
            ),
        ),
        keeps="mean and std",
    ),
    Entry(
        iz.InvertibleLayerNorm,
        "y = e^s (x - mean) rstd + b for each token",
        "none",
        _with_statistics(lambda: iz.InvertibleLayerNorm(4), 3, 4),
        _with_statistics(lambda: iz.InvertibleLayerNorm((3, 4), elementwise_affine=False), 3, 4, id="plain"),
        keeps="mean and rstd",
    ),
    Entry(
        iz.InvertibleRMSNorm,
        "y = e^s x rrms for each token",
        "none",
        _with_statistics(lambda: iz.InvertibleRMSNorm(4), 3, 4),
        keeps="rrms",
    ),
    Entry(
        iz.InvertibleGroupNorm,
        "y = e^s (x - mean) rstd + b for each group of channels",
        "none",
        _with_statistics(lambda: iz.InvertibleGroupNorm(2, 4), 4, 3),
        keeps="mean and rstd",
    ),
)
