"""Containers: chains of invertible layers of which only the last output stays in memory."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import engine
from .engine import Policy, SideNames
from .layers.split import Partition, cut, join
from .log_dets import total
from .module import InvertibleModule

__all__ = ["InvertibleSequential"]


class InvertibleSequential(InvertibleModule, nn.Sequential):
    """Apply invertible layers one after the other; backward holds one activation, however many they are.

    It has `torch.nn.Sequential`'s interface (index, slice, append, named layers). Neighbouring couplings that split
    alike run on two streams, so that a stack splits once and merges once. Each side input goes to the layers that have
    an argument of its name.

    Args:
        layers: invertible modules, or one ordered dict of them.
        options: those of :class:`InvertibleModule`. Modes and checks are those of the layers.

    Raises:
        TypeError: for a layer that is not an invertible module, or a side input that no layer takes.

    Example:
        >>> net = iz.InvertibleSequential(iz.AdditiveCoupling(nn.Linear(2, 2)), iz.Reverse())
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(net.inverse(net(x)), x, atol=1e-6)
        True
    """

    composite = True

    def __init__(self, *layers: Any, **options: Any) -> None:
        super().__init__(**options)
        given = layers[0].items() if len(layers) == 1 and isinstance(layers[0], dict) else enumerate(layers)
        for name, layer in given:
            self.add_module(str(name), layer)
        for name, value in options.items():
            if name != "free_input":
                setattr(self, name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if not isinstance(module, InvertibleModule):
            raise TypeError(
                f"InvertibleSequential: Expected layer {name} to be an InvertibleModule; got {type(module).__name__}. "
                "Plain layers belong outside the stack, or into a coupling's subnet"
            )
        super().add_module(name, module)

    def _layers(self) -> Iterable[tuple[str, InvertibleModule]]:
        return self._modules.items()  # type: ignore[return-value]

    def _policies(self) -> list[Policy]:
        return [policy for _, layer in self._layers() for policy in layer._policies()]

    @property
    def volume_preserving(self) -> bool:  # type: ignore[override]
        return all(layer.volume_preserving for _, layer in self._layers())

    def function(self, *inputs: Any, **side: Any) -> Any:
        return self._chain([*self._layers()], inputs, side, None)

    def inverse(self, *outputs: Any, **side: Any) -> Any:
        return self._chain(self._backwards(), outputs, side, None)

    def function_and_log_det(self, *inputs: Any, **side: Any) -> tuple[Any, Tensor]:
        outputs = self._chain([*self._layers()], inputs, side, log_dets := list[Tensor]())
        return outputs, total(self, inputs, log_dets)

    def inverse_and_log_det(self, *outputs: Any, **side: Any) -> tuple[Any, Tensor]:
        inputs = self._chain(self._backwards(), outputs, side, log_dets := list[Tensor]())
        return inputs, total(self, outputs, log_dets)

    def side_names(self) -> SideNames:
        return SideNames.union(layer.side_names() for _, layer in self._layers())

    def _backwards(self) -> list[tuple[str, InvertibleModule]]:
        return [(name, layer.inv) for name, layer in self._layers()][::-1]

    def _chain(
        self,
        layers: list[tuple[str, InvertibleModule]],
        values: tuple[Any, ...],
        side: dict[str, Any],
        log_dets: list[Tensor] | None,
    ) -> Any:
        self.side_names().check(self, side)
        streams: Partition | None = None  # by which the values are the streams of one tensor
        for name, layer in layers:
            with engine.place(f"layer {name} ({layer._name()})"):
                wanted = _streams(layer, values, streams)
                if streams is not None and wanted != streams:
                    values, streams = (join(streams, values, layer._policy),), None
                if streams is None and wanted is not None:
                    values, streams = cut(wanted, values[0], layer._policy), wanted
                values = step(layer, values, side, log_dets)
        if streams is not None:
            values = (join(streams, values, layer._policy),)
        return values[0] if len(values) == 1 else tuple(values)


def step(
    layer: InvertibleModule, values: tuple[Any, ...], side: dict[str, Any], log_dets: list[Tensor] | None
) -> tuple[Any, ...]:
    """Run a layer on the side inputs that it takes; add its log-determinant to the list, if there is one."""
    side = layer.side_names().choose(side)
    if log_dets is None or layer.volume_preserving:
        return engine.tuple_of(layer(*values, **side))
    outputs, log_det = layer.forward_and_log_det(*values, **side)
    log_dets.append(log_det)
    return engine.tuple_of(outputs)


def _streams(layer: InvertibleModule, values: tuple[Any, ...], streams: Partition | None) -> Partition | None:
    """Return how the layer wants one tensor (or its ``streams``) to be split, if it does."""
    wanted = layer.streams
    if wanted is None or _has_hooks(layer) or (streams is None and len(values) != 1):
        return None
    if not all(isinstance(value, Tensor) and -value.ndim <= wanted.dim < value.ndim for value in values):
        return None  # the layer says what is wrong
    n = sum(value.shape[wanted.dim] for value in values)
    return wanted if layer.takes_streams(*wanted.sizes(n)) else None


def _has_hooks(layer: nn.Module) -> bool:
    """Whether somebody watches the layer; then it gets the tensors that it would get alone, not streams."""
    tables = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return any(tables) or torch_module._has_any_global_hook()
