"""Matrices with orthonormal columns, made of any numbers; leading dims are a batch.

The reflections are accumulated by the UT transform ("Accumulating Householder Transformations, Revisited", Joffrain,
Low, Quintana-Ortí, van de Geijn and Van Zee, 2006). It departs from the paper in three ways: a vector of zeros stands
for the identity, vectors are rescaled first, which their reflections do not notice, and the product is polished.
"""

import torch
from torch import Tensor

__all__ = ["cayley", "householder", "identity", "polish"]


def identity(like: Tensor, columns: int) -> Tensor:
    """The first ``columns`` of the identity with the rows, device and dtype of ``like``."""
    return torch.eye(like.shape[-2], columns, device=like.device, dtype=like.dtype)


def polish(q: Tensor) -> Tensor:
    """One Newton-Schulz step, q (3 I - q^H q) / 2, which takes q back to orthonormal columns from a few roundings off.

    It changes nothing in exact arithmetic, whatever q was computed from, so it has no gradient.
    """
    fixed = q.detach()
    gram = fixed.mH @ fixed
    return q + fixed @ (identity(gram, q.shape[-1]) - gram) / 2


def householder(vectors: Tensor, columns: int) -> Tensor:
    """The first ``columns`` of H_1 ... H_k, H = I - 2 v v^H / v^H v with v = ``vectors[..., i]``, or I where v = 0."""
    # H does not depend on the scale of v, so the scale may be detached at every order of differentiation.
    scale = vectors.detach().abs().amax(-2, keepdim=True)
    u = vectors / torch.where(scale > 0, scale, 1)
    gram = u.mH @ u
    half = gram.diagonal(dim1=-2, dim2=-1).real / 2
    t = gram.triu(1) + torch.where(half > 0, half, 1).to(gram.dtype).diag_embed()
    return polish(identity(u, columns) - u @ torch.linalg.solve_triangular(t, u[..., :columns, :].mH, upper=True))


def cayley(generator: Tensor, columns: int) -> Tensor:
    """The first ``columns`` of (I + A)^-1 (I - A), where A = ``generator`` - ``generator``^H is skew."""
    skew, eye = generator - generator.mH, identity(generator, generator.shape[-1])
    return polish(torch.linalg.solve(eye + skew, (eye - skew)[..., :columns]))
