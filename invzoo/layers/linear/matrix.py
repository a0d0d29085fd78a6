"""Matrices that stay invertible while they are learned."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...dtypes import bounded, widen
from .._checks import check_choice, check_positive, check_positive_int, refuse
from .orthogonal import cayley, householder, identity

__all__ = ["MATRICES", "Matrix", "cayley", "householder", "make_matrix"]


class Matrix(nn.Module):
    """A learned matrix W of shape (rows, columns), rows >= columns, and its left inverse. Abstract.

    Called as a module, so that hooks on it fire, it makes the factors that W, its inverse and its log-determinant take.
    ``factors`` takes parameters in the order of ``names``, in at least float32 and with leading batch dims if they have
    any; the first has the matrix's dtype.

    Args:
        owner: the layer's name, for errors.
        rows: of W.
        columns: of W.
        reflections: k, of those that have it among their ``options``; ``columns`` if None.
        max_log_scale: bound on a log-scale, likewise; 1.0 if None.
        batch: how many matrices there are, of those that may be several.
        factory: ``device`` and ``dtype`` of the parameters.
    """

    names: ClassVar[tuple[str, ...]]
    square: ClassVar[bool] = False
    volume_preserving: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()
    subnet: ClassVar[bool] = False  # it is compiled with its layer, not for itself

    def __init__(
        self,
        owner: str,
        rows: int,
        columns: int,
        *,
        reflections: int | None = None,
        max_log_scale: float | None = None,
        batch: Sequence[int] = (),
        **factory: Any,
    ) -> None:
        super().__init__()
        self.owner, self.rows, self.columns = owner, rows, columns
        self.reflections = columns if reflections is None else reflections
        self.max_log_scale = 1.0 if max_log_scale is None else max_log_scale
        check_positive_int(owner, "reflections", self.reflections)
        check_positive(owner, "max_log_scale", self.max_log_scale)
        self.make_parameters(batch, **factory)
        self.reset_parameters()

    def make_parameters(self, batch: Sequence[int], **factory: Any) -> None:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        raise NotImplementedError

    def own(self) -> tuple[Tensor, ...]:
        """The matrix's own parameters."""
        return tuple(getattr(self, name) for name in self.names)

    def forward(self, *offsets: Tensor) -> tuple[Tensor, ...]:
        """What W and its inverse are made of, with ``offsets`` added to its parameters."""
        parameters = [widen(p) for p in self.own()]
        if offsets:
            parameters = [p + widen(h) for p, h in zip(parameters, offsets, strict=True)]
        return self.factors(*parameters)

    def factors(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def weight(self, *factors: Tensor) -> Tensor:
        raise NotImplementedError

    def inverse(self, *factors: Tensor) -> Tensor:
        raise NotImplementedError

    def log_det(self, *factors: Tensor) -> Tensor:
        """Log abs det W, if W is square and does not keep volumes."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join([f"{self.rows}, {self.columns}", *(f"{name}={getattr(self, name)}" for name in self.options)])


class Orthonormal(Matrix):
    """W^H W = I, so that W^H is the left inverse. Abstract: a subclass says how the one parameter gives W."""

    volume_preserving = True

    @staticmethod
    def orthonormal(parameter: Tensor, /, columns: int) -> Tensor:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        nn.init.normal_(self.own()[0], std=self.rows**-0.5)

    def factors(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        return (self.orthonormal(parameters[0], self.columns),)

    def weight(self, *factors: Tensor) -> Tensor:
        return factors[0]

    def inverse(self, *factors: Tensor) -> Tensor:
        return factors[0].mH


class Householder(Orthonormal):
    """W = the first columns of H_1 ... H_k."""

    names = ("vectors",)
    options = ("reflections",)
    orthonormal = staticmethod(householder)

    vectors: nn.Parameter

    def make_parameters(self, batch: Sequence[int], **factory: Any) -> None:
        self.vectors = nn.Parameter(torch.empty(*batch, self.rows, self.reflections, **factory))


class Cayley(Orthonormal):
    """W = the first columns of (I + A)^-1 (I - A), A skew."""

    names = ("generator",)
    orthonormal = staticmethod(cayley)

    generator: nn.Parameter

    def make_parameters(self, batch: Sequence[int], **factory: Any) -> None:
        self.generator = nn.Parameter(torch.empty(*batch, self.rows, self.rows, **factory))


class Scaled(Matrix):
    """W = U e^s V^H, where U and V are products of k reflections and |s| <= max_log_scale."""

    names = ("left", "right", "log_scale")
    options = ("reflections", "max_log_scale")

    left: nn.Parameter
    right: nn.Parameter
    log_scale: nn.Parameter

    def make_parameters(self, batch: Sequence[int], **factory: Any) -> None:
        self.left = nn.Parameter(torch.empty(self.rows, self.reflections, **factory))
        self.right = nn.Parameter(torch.empty(self.columns, self.reflections, **factory))
        self.log_scale = nn.Parameter(torch.empty(self.columns, **factory | {"dtype": self.left.dtype.to_real()}))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.left, std=self.rows**-0.5)
        nn.init.normal_(self.right, std=self.columns**-0.5)
        nn.init.zeros_(self.log_scale)

    def factors(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        left, right, log_scale = parameters
        u, v = (householder(vectors, self.columns) for vectors in (left, right))
        return u, bounded(log_scale, self.max_log_scale).unsqueeze(-2), v

    def weight(self, *factors: Tensor) -> Tensor:
        u, s, v = factors
        return u * s.exp() @ v.mH

    def inverse(self, *factors: Tensor) -> Tensor:
        u, s, v = factors
        return v * (-s).exp() @ u.mH

    def log_det(self, *factors: Tensor) -> Tensor:
        return factors[1].sum((-2, -1))


class PLU(Matrix):
    """W = P L (U + diag(sigma e^s)), P and sigma = +-1 fixed, |s| <= max_log_scale; ``packed`` holds L, s and U.

    L and U are in units of 1 / sqrt(columns), so that a change of ``packed`` by one moves W by about one in norm.
    """

    square = True
    names = ("packed",)
    options = ("max_log_scale",)

    packed: nn.Parameter
    permutation: Tensor
    sigma: Tensor

    def make_parameters(self, batch: Sequence[int], **factory: Any) -> None:
        self.packed = nn.Parameter(torch.empty(self.rows, self.rows, **factory))
        self.register_buffer("permutation", torch.empty(self.rows, device=self.packed.device, dtype=torch.long))
        self.register_buffer("sigma", torch.empty_like(self.packed.detach()[0]))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.packed)
        self.permutation.copy_(torch.randperm(self.rows, device=self.permutation.device))
        self.sigma.copy_(torch.randint_like(self.permutation, 2) * 2 - 1)

    def factors(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """L, U + diag(sigma e^s), and s; of a complex one the phase is free."""
        (packed,) = parameters
        units, s = packed * self.rows**-0.5, packed.diagonal(dim1=-2, dim2=-1)
        s = s - s.real + bounded(s.real, self.max_log_scale)
        upper = units.triu(1) + (self.sigma * s.exp()).diag_embed()
        return units.tril(-1) + identity(packed, self.rows), upper, s

    def weight(self, *factors: Tensor) -> Tensor:
        lower, upper, _ = factors
        return (lower @ upper)[..., self.permutation, :]

    def inverse(self, *factors: Tensor) -> Tensor:
        lower, upper, _ = factors
        p = identity(lower, self.rows)[self.permutation]
        z = torch.linalg.solve_triangular(lower, p.mT, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, z, upper=True)

    def log_det(self, *factors: Tensor) -> Tensor:
        return factors[2].real.sum(-1)


class Free(Matrix):
    """W = ``entries``, orthogonal at the start and whatever it learns to be later."""

    square = True
    names = ("entries",)

    entries: nn.Parameter

    def make_parameters(self, batch: Sequence[int], **factory: Any) -> None:
        self.entries = nn.Parameter(torch.empty(self.rows, self.rows, **factory))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.entries.copy_(householder(widen(self.entries.normal_()), self.rows))

    def factors(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        (entries,) = parameters  # whose memory FSDP2 frees behind the call, by a hook
        return (entries.clone() if self._forward_hooks else entries,)

    def weight(self, *factors: Tensor) -> Tensor:
        return factors[0]

    def inverse(self, *factors: Tensor) -> Tensor:
        inverse, info = torch.linalg.inv_ex(factors[0])
        if not (torch.compiler.is_compiling() or inverse.is_meta):
            self._check_condition(factors[0].detach(), inverse.detach(), info)
        return inverse

    def log_det(self, *factors: Tensor) -> Tensor:
        return torch.linalg.slogdet(factors[0]).logabsdet

    def _check_condition(self, weight: Tensor, inverse: Tensor, info: Tensor) -> None:
        condition = torch.linalg.matrix_norm(weight, 1) * torch.linalg.matrix_norm(inverse, 1)
        limit = 1 / torch.finfo(weight.dtype).eps
        if not ((info == 0) & (condition < limit)).all():
            got = "a singular weight" if info.any() else f"{condition.max():.1e}"
            refuse(self.owner, "weight", f"be invertible, with a condition number below {limit:.1e}", got)


MATRICES: dict[str, type[Matrix]] = {
    "householder": Householder,
    "cayley": Cayley,
    "scaled": Scaled,
    "plu": PLU,
    "free": Free,
}


def make_matrix(
    owner: object,
    kinds: Mapping[str, type[Matrix]],
    kind: str,
    rows: int,
    columns: int,
    settings: dict[str, Any],
    **factory: Any,
) -> Matrix:
    """Make a layer's matrix, of one of these kinds; settings are refused that this kind does not have."""
    check_choice(owner, "kind", kind, kinds)
    for name, value in settings.items():
        if value is not None and name not in kinds[kind].options:
            refuse(owner, name, f"be None with kind={kind!r}", value)
    return kinds[kind](type(owner).__name__, rows, columns, **settings, **factory)
