"""Operators that stand in the graphs of compiled chains: the compiler sees what they take and return, and no more."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..fingerprint import distance, precision_of, project

__all__ = ["again", "fingerprints", "verified"]

_verified: set[int] = set()  # the numbers of chains whose replay was right once


@torch.library.custom_op("invzoo::again", mutates_args=())
def again(tensor: Tensor, after: Tensor) -> Tensor:  # noqa: ARG001
    """Return a copy that cannot be had before ``after``."""
    return tensor.clone()


@torch.library.custom_op("invzoo::fingerprints", mutates_args=())
def fingerprints(tensors: Sequence[Tensor], number: int) -> Tensor:
    """Return the tensors' fingerprints, one in each row, or zeros if the chain of this number is not to be compared."""
    rows = _empty_rows(tensors).zero_()
    if number not in _verified:
        for row, tensor in zip(rows, tensors, strict=True):
            row.copy_(project(tensor))
    return rows


@torch.library.custom_op("invzoo::verified", mutates_args=())
def verified(gradient: Tensor, was: Tensor, now: Tensor, allowed: float, number: int, name: str) -> Tensor:
    """Return a copy of a gradient, if the fingerprints of rebuilt tensors are what they were.

    Args:
        gradient: one that the tensors were rebuilt for.
        was: the fingerprints.
        now: those of the rebuilt tensors.
        allowed: the relative error allowed.
        number: that of the chain, which is compared until it was right once; one below 0 is compared always.
        name: what errors call the chain.

    Raises:
        RuntimeError: if they are not.
    """
    if number not in _verified and not (was.is_cuda and torch.cuda.is_current_stream_capturing()):
        errors = [distance(a, b) for a, b in zip(was.tolist(), now.tolist(), strict=True)]
        if wrong := [error for error in errors if not error <= allowed]:
            raise RuntimeError(
                f"Expected {name} to be replayed within a relative error of {allowed:.1e}; got {wrong[0]:.1e}, for "
                "what its layers' inverses rebuild. One of them is wrong, or not deterministic, or too ill-conditioned "
                "for this precision; without torch.compile the error says which. Mend it, or use mode 'recompute' or "
                "'store' for its layer"
            )
        if number >= 0:
            _verified.add(number)
    return gradient.clone()


@again.register_fake
def _(tensor: Tensor, after: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(tensor)


@fingerprints.register_fake
def _(tensors: Sequence[Tensor], number: int) -> Tensor:  # noqa: ARG001
    return _empty_rows(tensors)


@verified.register_fake
def _(gradient: Tensor, was: Tensor, now: Tensor, allowed: float, number: int, name: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(gradient)


def _empty_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Make room for a fingerprint of each tensor."""
    dtypes = {precision_of(tensor.dtype) for tensor in tensors}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return torch.empty(len(tensors), 5, dtype=dtype, device=tensors[0].device)
