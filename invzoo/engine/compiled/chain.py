"""The engine under `torch.compile`: a chain is one `torch.autograd.Function` whose backward inverts layer by layer.

NOTE [How a compiled chain forgets and remembers]

1. Hooks on saved tensors cannot be traced, so the compiler would store what the eager engine forgets. Instead the
   outermost container runs as one function of its inputs, side inputs and parameters. It saves what no call in it can
   rebuild: the outputs, and the inputs of calls that keep them.
2. Its forward runs the layers as ever. Their calls arrive at the `Record`, which notes which values each took and gave.
   Values are told apart by identity: nothing may happen to them between two calls.
3. Its backward goes through the record in reverse: a call's replay rebuilds its inputs and runs its function again, as
   in the eager engine, so that both share one evaluation of a subnet. `torch.func.vjp` of each piece that it runs gives
   the gradients of inputs, side inputs and parameters.
4. The compiler may move whatever does not depend on a gradient into the forward, and merge it with what is computed
   there: of side inputs alone, or around a batch norm, it would save something for each layer. So backward begins with
   an opaque copy of what was saved that has to wait for a gradient.
5. A replay must be what the forward was. Both are traced together, so flags and modules are the same; autocast is set
   again. Parameters and buffers are saved, and put into the modules again: torch refuses them if they changed. Random
   numbers would differ, and so would buffers that a call moves: both are refused while the compiler traces, but for
   the statistics of batch norms, which training does not read. So is a tensor that needs a gradient and is no
   parameter, since the function would not know of it.
6. It is checked, once or always as the layers' policies say: backward takes fingerprints of what it rebuilds last,
   which any wrong inverse spoils, and returns no gradient if they are not those of the forward.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..operation import Through
from .operators import fingerprints
from .record import Record
from .replay import Replay

__all__ = ["run"]


def run(owner: nn.Module, through: Through, values: tuple[Any, ...], side: dict[str, Any], log_dets: Any) -> Any:
    """Return ``through(values, side, log_dets)``, as one function."""
    parameters = [p for p in owner.parameters() if p.requires_grad]
    names = [k for k, v in side.items() if isinstance(v, Tensor)]
    positions: dict[Tensor, int] = {p: k for k, p in enumerate(parameters)}
    record = Record(
        type(owner).__name__, through, len(values), names, side, positions, len(parameters), log_dets is not None
    )
    outputs = _Chain.apply(record, *parameters, *_distinct([*values, *[side[k] for k in names]], positions))
    if record.has_log_det:
        log_dets.add(outputs[-1])
        outputs = outputs[:-1]
    return outputs[0] if record.single else outputs


def _distinct(tensors: list[Any], known: dict[Tensor, int]) -> list[Any]:
    """Copy tensors that are given twice, or are parameters: `apply` takes each only once."""
    return [t.clone() if t in known or any(t is other for other in tensors[:i]) else t for i, t in enumerate(tensors)]


class _Chain(torch.autograd.Function):
    """A container's layers as one function."""

    @staticmethod
    def forward(ctx: Any, record: Record, *tensors: Any) -> tuple[Tensor, ...]:
        """Run the chain, and save its outputs and what no call rebuilds (rule 1)."""
        outputs = record.run(tensors)
        ctx.record = record
        n = record.weights
        prints = [fingerprints([record.values[i] for i in record.checked], record.number)] if record.checked else []
        # Copies, since nobody looks at versions inside a graph, and who changes these in place later must not change
        # what backward gets. Inductor takes that of an output back where nobody does.
        others = [*record.others, *tensors[n + record.width :], *[record.values[i] for i in record.saved]]
        copies = [t.clone() for t in others]
        ctx.save_for_backward(*prints, *tensors[:n], *copies)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Go through the record in reverse (rule 3), with autocast as it was (rule 5)."""
        record = ctx.record
        replay = Replay(record, ctx.saved_tensors, gradients)
        device, dtype, enabled = record.autocast
        with torch.autocast(device, dtype, enabled):
            for step in reversed(record.steps):
                replay.undo(step)
        return None, *replay.results()
