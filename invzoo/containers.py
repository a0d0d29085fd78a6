"""Containers: chains of invertible layers of which only the last output stays in memory."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from . import engine
from .compiling import CompiledMethods
from .domains import Domain, end_of, of_parts, uniform
from .engine import Policy, SideNames
from .errors import refuse
from .layers._checks import check_dim_given, given_dim
from .layers.rearrangements.split import Partition, SplitSpec, cut, join, merging, splitting
from .log_dets import LogDets
from .module import Composite, InvertibleModule
from .own_hooks import has_hooks
from .shapes import output_shapes

__all__ = ["Chain", "InvertibleSequential", "Layers", "MultiScale", "Parallel", "Repeat", "set_options"]


class _Container(Composite):
    """A composite whose layers are modules, which are compiled as one function. Abstract."""

    free_input = property(
        lambda self: self._policy.free_input,
        lambda self, value: setattr(self._policy, "free_input", bool(value)),
        doc="Whether a call frees the memory of its input until backward, as it does if the first layer says so.",
    )

    @abstractmethod
    def _layers(self) -> Iterable[tuple[str, InvertibleModule]]:
        """Return the layers and their names, in the order of the forward."""

    @abstractmethod
    def _run(self, values: tuple[Any, ...], side: dict[str, Any], log_dets: LogDets | None, *, inverted: bool) -> Any:
        """Pass ``values`` through the layers, one way or back."""

    def _directed(self, inverted: bool) -> list[tuple[str, InvertibleModule]]:
        """Return the layers or their inverses, in the order of the forward."""
        return [(name, layer.inv if inverted else layer) for name, layer in self._layers()]

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile all layers as one function in place, with the arguments of `torch.compile`.

        Both directions are, with and without log-determinants. Hooks on the container itself run outside.
        """
        self._compiled = CompiledMethods(self, *args, **options)

    def through(
        self, values: tuple[Any, ...], side: dict[str, Any], log_dets: LogDets | None, *, inverted: bool = False
    ) -> Any:
        return engine.run_chain(self, self._policies, partial(self._run, inverted=inverted), values, side, log_dets)

    def through_engine(
        self, values: tuple[Any, ...], side: dict[str, Any], *, inverted: bool = False, log_det: bool = False
    ) -> Any:
        pass_all = super().through_engine
        if self._compiled:
            if self._frees_input():
                refuse(self, "free_input", "be False for a container that is compiled", True)
            pass_all = self._compiled(pass_all)
        return pass_all(values, side, inverted=inverted, log_det=log_det)

    def _frees_input(self) -> bool:
        return self._policy.free_input or any(layer._frees_input() for _, layer in [*self._layers()][:1])

    def side_names(self) -> SideNames:
        return SideNames.union(layer.side_names() for _, layer in self._layers())

    def _policies(self) -> list[Policy]:
        return [policy for _, layer in self._layers() for policy in layer._policies()] or [self._policy]

    bijective = property(lambda self: all(layer.bijective for _, layer in self._layers()))
    volume_preserving = property(lambda self: all(layer.volume_preserving for _, layer in self._layers()))
    rearranges = property(lambda self: all(layer.rearranges for _, layer in self._layers()))


class Chain(_Container):
    """Layers one after the other: those registered as modules, unless a subclass says another order. Abstract.

    Neighbours that split one tensor into the same streams run on the streams, which are merged behind the last of them.
    """

    domain = property(lambda self: end_of((layer.rearranges, layer.domain) for _, layer in self._layers()))
    codomain = property(lambda self: end_of((layer.rearranges, layer.codomain) for _, layer in [*self._layers()][::-1]))

    def _layers(self) -> Iterable[tuple[str, InvertibleModule]]:
        return self._modules.items()  # type: ignore[return-value]

    def _run(self, values: tuple[Any, ...], side: dict[str, Any], log_dets: LogDets | None, *, inverted: bool) -> Any:
        layers = self._directed(inverted)
        streams: Partition | None = None  # by which the values are the streams of one tensor
        for name, layer in reversed(layers) if inverted else layers:
            with engine.place(partial(_place, "layer", name, layer)):
                wanted = _streams(layer, values, streams)
                if streams is not None and wanted != streams:
                    values, streams = (join(streams, values, layer),), None
                if streams is None and wanted is not None:
                    values, streams = cut(wanted, values[0], layer), wanted
                values = _step(layer, values, side, log_dets)
        if streams is not None:
            values = (join(streams, values, layer),)
        return _one_or_all(values)


def _step(
    layer: InvertibleModule, values: tuple[Any, ...], side: dict[str, Any], log_dets: LogDets | None
) -> tuple[Any, ...]:
    """Run a layer on the side inputs that it takes; add its log-determinant to the list, if there is one."""
    if side:
        side = layer.side_names().choose(side)
    if log_dets is None or layer.volume_preserving:
        return engine.tuple_of(layer(*values, **side))
    outputs, log_det = layer.forward_and_log_det(*values, **side)
    log_dets.add(log_det)
    return engine.tuple_of(outputs)


def _place(kind: str, name: str, layer: InvertibleModule) -> str:
    return f"{kind} {name} ({layer._name()})"


def _one_or_all(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


class _Guarded:
    """Let only layers into a list of them; an edit that would bring another module leaves it as it was."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, _checked(self, f"layer {name}", module))  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) or name in vars(self).get("_modules", ()):
            _checked(self, f"layer {name}", value)
        super().__setattr__(name, value)

    def insert(self, index: int, module: nn.Module) -> Any:
        return super().insert(index, _checked(self, f"layer {index}", module))  # type: ignore[misc]

    def extend(self, modules: Iterable[nn.Module]) -> Any:
        start: int = len(self)  # type: ignore[arg-type]
        layers = [_checked(self, f"layer {i}", module) for i, module in enumerate(modules, start)]
        return super().extend(layers)  # type: ignore[misc]


class Layers(_Guarded, nn.ModuleList):
    """The layers of a container that is no sequence of them."""


class InvertibleSequential(Chain, _Guarded, nn.Sequential):
    """Apply invertible layers one after the other; backward holds one activation, however many they are.

    It has `torch.nn.Sequential`'s interface (index, slice, edits in place, ``+`` and ``*``, named layers), and what
    comes of it is an InvertibleSequential. Neighbouring couplings that split alike run on two streams, so that a stack
    splits once and merges once. Each side input goes to the layers that have an argument of its name.

    Args:
        layers: invertible modules, or one ordered dict of them.
        options: those of :class:`InvertibleModule`. Modes and checks are those of the layers.

    Raises:
        TypeError: for a layer that is not an invertible module, now or put in later, or a side input that no layer
            takes.

    Example:
        >>> net = iz.InvertibleSequential(iz.AdditiveCoupling(nn.Linear(2, 2)), iz.Reverse())
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(net.inverse(net(x)), x, atol=1e-6)
        True
    """

    def __init__(self, *layers: Any, **options: Any) -> None:
        super().__init__(**options)
        given = layers[0].items() if len(layers) == 1 and isinstance(layers[0], dict) else enumerate(layers)
        for name, layer in given:
            self.add_module(str(name), layer)
        set_options(self, options)

    def __add__(self, other: nn.Sequential) -> "InvertibleSequential":
        return InvertibleSequential(*super().__add__(other))

    def __iadd__(self, other: nn.Sequential) -> Self:
        return self.extend(other) if isinstance(other, nn.Sequential) else super().__iadd__(other)

    def __mul__(self, other: int) -> "InvertibleSequential":
        return InvertibleSequential(*super().__mul__(other))


class Repeat(Chain):
    """Apply one layer several times, with the same weights: ``y = layer(layer(... layer(x)))``.

    Args:
        layer: an invertible module whose outputs can be its inputs.
        times: how often, 0 or more.
        options: those of :class:`InvertibleModule`. Modes and checks are those of the layer.

    Raises:
        TypeError: for a layer that is not an invertible module.
        ValueError: for a negative number of times.

    Example:
        >>> layer = iz.Repeat(iz.Permute([1, 2, 0]), 2)
        >>> layer(torch.tensor([[10, 20, 30]]))
        tensor([[30, 10, 20]])
    """

    def __init__(self, layer: InvertibleModule, times: int, **options: Any) -> None:
        super().__init__(**options)
        if not isinstance(times, int) or times < 0:
            refuse(self, "times", "be an int of at least 0", repr(times))
        self.layer, self.times = _checked(self, "layer", layer), times
        set_options(self, options)

    def _layers(self) -> Iterable[tuple[str, InvertibleModule]]:
        return [(f"layer, time {i}", self.layer) for i in range(self.times)]

    def extra_repr(self) -> str:
        return f"times={self.times}"


class Parallel(_Container):
    """Apply each layer to a part of its own, ``(x1, ..., xn) -> (layer1(x1), ..., layern(xn))``.

    Shapes: several tensors, one for each layer, which are returned as several; or one, which is split along ``dim`` and
    merged again.

    Args:
        layers: invertible modules that take and return one tensor each.
        dim: the dimension that one tensor is split along; 1 by default, but to be given for one tensor of three dims.
        sizes: those of the parts in ``dim``; as `torch.chunk` would have them, if None.
        options: those of :class:`InvertibleModule`. Modes and checks are those of the layers.

    Raises:
        TypeError: for a layer that is not an invertible module.
        ValueError: for other sizes, or another number of inputs than 1 or one for each layer.

    Example:
        >>> layer = iz.Parallel(iz.Identity(), iz.Reverse())
        >>> layer(torch.arange(4).unsqueeze(0))
        tensor([[0, 1, 3, 2]])
    """

    def __init__(
        self, *layers: InvertibleModule, dim: int | None = None, sizes: Sequence[int] | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        if sizes is not None and len(sizes) != len(layers):
            refuse(self, "sizes", f"hold {len(layers)} sizes, one for each layer", list(sizes))
        self.layers = Layers(_checked(self, f"layer {i}", layer) for i, layer in enumerate(layers))
        self.dim, self.sizes = given_dim(self, dim), None if sizes is None else tuple(sizes)
        two = len(layers) == 2  # then neighbours may leave it two streams
        self.streams = Partition(self.sizes or "half", self.dim) if two else None  # type: ignore[arg-type]
        set_options(self, options)

    def _layers(self) -> Iterable[tuple[str, InvertibleModule]]:
        return self.layers._modules.items()  # type: ignore[return-value]

    domain = property(lambda self: of_parts([layer.domain for _, layer in self._layers()], self.dim, self.sizes))
    codomain = property(lambda self: of_parts([layer.codomain for _, layer in self._layers()], self.dim, self.sizes))

    def _run(self, values: tuple[Any, ...], side: dict[str, Any], log_dets: LogDets | None, *, inverted: bool) -> Any:
        layers = self._directed(inverted)
        if len(values) == 1 != len(layers):
            parts = engine.call(splitting(self, self._cut, self._join), values, {})
            outputs = self._run(parts, side, log_dets, inverted=inverted)
            sizes = [y.shape[self.dim] for y in outputs]

            def cut_back(y: Tensor) -> tuple[Tensor, ...]:
                return y.split(sizes, self.dim)

            return engine.call(merging(self, self._join, cut_back), outputs, {})
        if len(values) != len(layers):
            refuse(self, "inputs", f"be 1 or {len(layers)} tensors", len(values))
        outputs = []
        for (name, layer), value in zip(layers, values, strict=True):
            with engine.place(partial(_place, "layer", name, layer)):
                outputs += _step(layer, (value,), side, log_dets)
        return _one_or_all(outputs)

    def _cut(self, x: Tensor) -> tuple[Tensor, ...]:
        check_dim_given(self, x)
        if not -x.ndim <= self.dim < x.ndim:
            refuse(self, "input", f"have a dim {self.dim}", f"shape {tuple(x.shape)}")
        parts = x.chunk(len(self.layers), self.dim)
        sizes = self.sizes or [part.shape[self.dim] for part in parts]
        if sum(sizes) != x.shape[self.dim] or len(sizes) != len(self.layers):
            expected = f"{sum(self.sizes)} features" if self.sizes else f"at least {len(self.layers)} features"
            refuse(self, "input", f"have {expected} in dim {self.dim}", f"shape {tuple(x.shape)}")
        return x.split(sizes, self.dim)

    def _join(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, sizes={self.sizes}"


class MultiScale(_Container):
    """Apply stages of layers, and let a part of the features go after each: ``x -> (z1, z2, ..., zn)``.

    After every stage but the last the features are split into two streams. The first one goes on to the next stage, the
    second one is a latent; what the last stage returns is the last latent.

    Shapes: one tensor -> n tensors, one for each of the n stages; or one of shape (B, D), if ``input_shape`` is given.

    Args:
        stages: invertible modules that take and return one tensor each.
        dim, split: how the features are split, as for :class:`AdditiveCoupling`.
        input_shape: the shape of one sample; with it the latents are flattened and concatenated. The stages must then
            do without side inputs.
        options: those of :class:`InvertibleModule`. Modes and checks are those of the stages.

    Raises:
        TypeError: for a stage that is not an invertible module.
        ValueError: for another ``split``, another number of latents, or without stages.

    Reference:
        "Density estimation using Real NVP", Dinh, Sohl-Dickstein and Bengio, 2016.

    Example:
        >>> net = iz.MultiScale(iz.Reverse(), iz.Reverse())
        >>> net(torch.arange(4.).unsqueeze(0))
        (tensor([[1., 0.]]), tensor([[2., 3.]]))
    """

    def __init__(
        self,
        *stages: InvertibleModule,
        dim: int | None = None,
        split: SplitSpec = "half",
        input_shape: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not stages:
            refuse(self, "stages", "be at least one", "none")
        self.stages = Layers(_checked(self, f"stage {i}", stage) for i, stage in enumerate(stages))
        self.partition = Partition(split, given_dim(self, dim))
        self.latent_shapes: list[torch.Size] | None = None
        if input_shape is not None:
            self.latent_shapes = [shape[1:] for shape in output_shapes(self, (1, *input_shape), {})]
        set_options(self, options)

    def _layers(self) -> Iterable[tuple[str, InvertibleModule]]:
        return self.stages._modules.items()  # type: ignore[return-value]

    domain = property(lambda self: self.stages[0].domain)

    @property
    def codomain(self) -> Domain:  # type: ignore[override]
        latents: list[constraints.Constraint] = [constraints.real]
        for _, layer in self._layers():
            latents.append(latents[-1] if layer.rearranges else uniform(layer.codomain))
        if self.latent_shapes is None:
            return tuple(latents[1:]) if len(latents) > 2 else latents[1]
        return of_parts(latents[1:], 1, [shape.numel() for shape in self.latent_shapes])

    def _run(self, values: tuple[Any, ...], side: dict[str, Any], log_dets: LogDets | None, *, inverted: bool) -> Any:
        return (self._back if inverted else self._there)(values, side, log_dets)

    def _there(self, values: tuple[Any, ...], side: dict[str, Any], log_dets: LogDets | None) -> Any:
        latents: list[Tensor] = []
        for i, (name, stage) in enumerate(self._layers()):
            with engine.place(partial(_place, "stage", name, stage)):
                if i:
                    operation = splitting(stage, self._let_go, self.partition.join)
                    going, latent = engine.call(operation, values, {})
                    values, latents = (going,), [*latents, latent]
                values = _step(stage, values, side, log_dets)
        latents += values
        if self.latent_shapes is None:
            return _one_or_all(latents)
        return engine.call(merging(self, self._join, self._cut), tuple(latents), {})

    def _let_go(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_dim_given(self, x)
        going, latent = self.partition.cut(x)
        return going, latent.clone()  # a view would keep all of x

    def _back(self, values: tuple[Any, ...], side: dict[str, Any], log_dets: LogDets | None) -> Any:
        if self.latent_shapes is not None:
            values = engine.call(splitting(self, self._cut, self._join), values, {})
        if len(values) != len(self.stages):
            refuse(self, "latents", f"be {len(self.stages)} tensors, one for each stage", len(values))
        *latents, x = values
        for i, (name, stage) in reversed([*enumerate(self._layers())]):
            with engine.place(partial(_place, "stage", name, stage)):
                (x,) = _step(stage.inv, (x,), side, log_dets)
                if i:
                    check_dim_given(self, x)
                    x = join(self.partition, (x, latents.pop()), stage)
        return x

    def _join(self, *latents: Tensor) -> Tensor:
        return torch.cat([z.flatten(1) for z in latents], 1)

    def _cut(self, y: Tensor) -> tuple[Tensor, ...]:
        shapes = self.latent_shapes or []
        sizes = [shape.numel() for shape in shapes]
        if y.ndim != 2 or y.shape[1] != sum(sizes):
            refuse(self, "y", f"have shape (batch, {sum(sizes)})", f"shape {tuple(y.shape)}")
        return tuple(z.unflatten(1, shape) for z, shape in zip(y.split(sizes, 1), shapes, strict=True))


def _streams(layer: InvertibleModule, values: tuple[Any, ...], streams: Partition | None) -> Partition | None:
    """Return how the layer wants one tensor (or its ``streams``) to be split, if it does."""
    wanted = layer.streams
    if wanted is None or (streams is None and len(values) != 1):
        return None
    if has_hooks(layer):
        return None  # whoever watches a layer sees the tensors that it would get alone, not streams
    if not all(isinstance(value, Tensor) and -value.ndim <= wanted.dim < value.ndim for value in values):
        return None  # the layer says what is wrong
    check_dim_given(layer, values[0])  # also where it would go on with the streams of a layer before it
    n = sum(value.shape[wanted.dim] for value in values)
    return wanted if layer.takes_streams(*wanted.sizes(n)) else None


def _checked(owner: object, argument: str, layer: Any) -> InvertibleModule:
    if not isinstance(layer, InvertibleModule):
        hint = "Plain layers belong outside the stack, or into a coupling's subnet"
        refuse(owner, argument, "be an InvertibleModule", f"{type(layer).__name__}. {hint}", TypeError)
    return layer


def set_options(owner: InvertibleModule, options: dict[str, Any]) -> None:
    """Pass a container's options on to its layers."""
    for name, value in options.items():
        if name != "free_input":
            setattr(owner, name, value)
