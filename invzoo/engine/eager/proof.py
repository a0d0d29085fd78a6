"""Whether a replay gives what its forward did."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch import is_hollow
from ..fingerprint import Prints, tolerance
from ..operation import Operation
from ..policy import Policy
from .saved import Saved

__all__ = ["Proof", "is_unverified"]


def is_unverified(policy: Policy, name: str) -> bool:
    """Whether the replay of an operation is to be compared with its forward."""
    return policy.check == "always" or (policy.check == "first" and name not in policy.verified)


@dataclass(slots=True)
class Proof:
    """The fingerprints that the replay of a call is compared by (rule 6)."""

    operation: Operation
    verified_as: str
    prints: Prints

    @classmethod
    def of_inverted(cls, operation: Operation, inputs: Sequence[Any], passed: Collection[int]) -> "Proof | None":
        """Compare the inputs that come back, but for those that were ``passed`` on."""
        if not is_unverified(operation.policy, operation.name):
            return None
        prints = Prints("input", [None if i in passed else x for i, x in enumerate(inputs)])
        return cls(operation, operation.name, prints)

    @classmethod
    def of_recomputed(cls, operation: Operation, outputs: Sequence[Any], saved: Saved) -> "Proof | None":
        """Compare what is saved, or the outputs if all calls are checked."""
        if not is_unverified(operation.policy, name := f"{operation.name}, recomputed"):
            return None
        if operation.policy.check == "always":
            return cls(operation, name, Prints("output", outputs))
        return cls(operation, name, Prints("saved tensor", [x if _is_number(x) else None for x in saved.values()]))

    @property
    def needs_outputs(self) -> bool:
        return self.prints.what == "output"

    def compare(self, values: Sequence[Any], dtypes: set[torch.dtype]) -> None:
        """Refuse values that are farther off than a way through ``dtypes`` explains."""
        self.prints.compare(self.operation.name, values, tolerance(dtypes))
        self.operation.policy.verified.add(self.verified_as)


def _is_number(tensor: Tensor | None) -> bool:
    """Whether a tensor is numbers, and not, say, a kernel's workspace, of which parts may be left unwritten.

    Nor a parameter whose memory FSDP has taken away again.
    """
    return tensor is not None and (tensor.is_floating_point() or tensor.is_complex()) and not is_hollow(tensor)
