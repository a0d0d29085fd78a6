"""Runs the program of a fuzz case on either way of running its net, and compares every number that comes out."""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.nets import FuzzNet
from tests.fuzz.specs import Case, Forward, Iteration, Step

__all__ = ["Unfit", "check", "record_of"]

Record = dict[str, Tensor | bool | None]
BATCH = 4
TOLERANCE = {"float64": 1e-9, "float32": 2e-3}


class Unfit(Exception):
    """A program whose plain run has numbers too large or not finite: nothing can be learned from it."""


class Graph:
    """One forward of a program, and whether its graph is still there."""

    def __init__(self, forward: Forward, x: Tensor, condition: Tensor | None, outputs: list[Tensor], weights: Tensor):
        self.x, self.condition = x, condition
        self.y, self.mid = outputs[-1], outputs[forward.mid % len(outputs)]
        self.tail = forward.mid % len(outputs) + 1  # the first item behind `mid`, of the last pass
        self.loss = loss_of(forward.loss, self.y, self.mid, weights)
        self.alive = self.loss.requires_grad

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.condition) if t is not None and t.requires_grad and t.is_leaf]


def loss_of(kind: str, y: Tensor, mid: Tensor, weights: Tensor) -> Tensor:
    base = (y * weights).mean()
    match kind:
        case "square":
            return base + y.pow(2).mean()
        case "part":
            return y[:, :1].pow(2).mean()
        case "mid":
            return base + (mid.tanh() * weights).mean()
        case "twice":
            return (y * y.roll(1, 0)).mean() + y.sigmoid().mean()
    return y.transpose(0, 1)[0].sin().mean() + base


class Run:
    """A program under way."""

    def __init__(self, case: Case, plain: bool, mode: str | None) -> None:
        self.mode = mode
        self.case, self.record, self.dtype = case, {}, getattr(torch, case.net.dtype)
        self.net = FuzzNet(case.net, plain)
        self.normalizes = any("running_mean" in name for name, _ in self.net.named_buffers())
        torch.manual_seed(case.seed)
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained or [torch.zeros(1, requires_grad=True)], lr=0.02, momentum=0.5)

    def note(self, name: str, value: Tensor | bool | None) -> None:
        self.record[f"{len(self.record)} {name}"] = value.detach().clone() if isinstance(value, Tensor) else value

    def data(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.case.seed + seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def run(self) -> Record:
        for number, iteration in enumerate(self.case.iterations):
            self.iterate(number, iteration)
        for name, value in (*self.net.named_parameters(), *self.net.named_buffers()):
            self.note(name, value)
        self.record["random state"] = torch.get_rng_state()
        return self.record

    def iterate(self, number: int, iteration: Iteration) -> None:
        self.net.set_modes(self.mode or iteration.mode)
        # Plain backward of a BatchNorm in eval mode is wrong once a forward in training mode has moved its statistics.
        careful = self.normalizes and not all(f.train for f in iteration.forwards)
        graphs = [self.forward(f"{number}.{i}", f, f.train and not careful) for i, f in enumerate(iteration.forwards)]
        if iteration.mode_after:
            self.net.set_modes(self.mode or iteration.mode_after)
        if iteration.flip and not careful:
            self.net.train(not self.net.training)
        for i, step in enumerate(iteration.steps):
            self.step(f"{number} step {i} {step.kind}", step, graphs)
        for i, graph in enumerate(graphs):
            for name, leaf in (("x", graph and graph.x), ("condition", graph and graph.condition)):
                if leaf is not None and leaf.is_leaf:
                    self.note(f"{number}.{i} {name}.grad", leaf.grad)
        for name, parameter in self.net.named_parameters():
            self.note(f"{number} {name}.grad", parameter.grad)
        if iteration.update:
            self.optimizer.step()
        if iteration.clear:
            self.optimizer.zero_grad()

    # ---- forwards ---------------------------------------------------------------------------------------------------

    def input(self, forward: Forward) -> Tensor:
        spec = self.case.net
        shape = [BATCH, spec.features, *((2, 3) if spec.rank == 4 else ())]
        match forward.layout:
            case "slice":
                x = self.data(forward.input, BATCH + 2, *shape[1:])[1:-1]
            case "transposed":
                x = self.data(forward.input, shape[1], BATCH, *shape[2:]).transpose(0, 1)
            case "expanded":
                x = self.data(forward.input, 1, *shape[1:]).expand(shape)
            case _:
                x = self.data(forward.input, *shape)
        if forward.layout == "expanded" and forward.needs_grad:
            x = x.clone()
        return x.detach().requires_grad_(forward.needs_grad)

    def forward(self, name: str, forward: Forward, train: bool) -> Graph | None:
        x, side = self.input(forward), {}
        condition = None
        self.net.train(train)
        with context(forward.grad):
            if forward.condition != "none":
                condition = self.data(9, BATCH, 3).requires_grad_(forward.condition == "leaf")
                shown = self.net.encoder(condition) if forward.condition == "encoder" else condition
                side = {"condition": shown if self.case.net.rank == 2 else shown[:, :, None, None].expand(-1, -1, 2, 3)}
            y, outputs = x, []
            for _ in range(forward.times):
                outputs = self.net(y, side)
                y = outputs[-1]
        for i, output in enumerate(outputs):
            self.note(f"{name} output {i}", output)
            self.note(f"{name} output {i} requires_grad", output.requires_grad)
        if forward.grad != "on":
            return None
        return Graph(forward, x, condition, outputs, self.data(7, *y.shape))

    # ---- backwards --------------------------------------------------------------------------------------------------

    def step(self, name: str, step: Step, graphs: list[Graph | None]) -> None:
        if step.kind == "peek":
            with torch.no_grad():
                self.note(name, self.net(self.data(5, *self.input(Forward()).shape), {})[-1])
        elif step.kind == "draw":
            self.note(name, torch.rand(2))
        elif step.kind == "joint":
            losses = [g for g in graphs if g is not None and g.alive]
            if losses:
                sum(g.loss for g in losses).backward(retain_graph=step.retain)
            for graph in losses:
                graph.alive = step.retain
        else:
            graph = graphs[step.forward % len(graphs)]
            if graph is not None and graph.alive:
                graph.alive = step.retain
                self.backward(name, step, graph)
                if step.kind == "drop":
                    graphs[step.forward % len(graphs)] = None

    def backward(self, name: str, step: Step, graph: Graph) -> None:
        keep = step.retain
        match step.kind:
            case "backward":
                graph.loss.backward(retain_graph=keep)
            case "split":
                self.split(name, graph, keep)
            case "penalty":
                self.penalty(name, graph, keep)
            case "drop":
                graph.alive = False
            case _:
                self.partial(name, step, graph)

    def partial(self, name: str, step: Step, graph: Graph) -> None:
        """Ask for some of the gradients."""
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        some = [p for i, p in enumerate(parameters) if step.pick >> (i % 8) & 1]
        targets = {
            "some": [*some, *graph.leaves()[: step.pick % 3]],
            "inputs": graph.leaves(),
            "parameters": some,
            "mid": [graph.mid] * graph.mid.requires_grad + graph.leaves()[: step.pick % 3],
        }[step.kind]
        if not targets:
            graph.alive = True
        elif step.kind == "some":
            graph.loss.backward(inputs=targets, retain_graph=step.retain)
        else:
            grads = torch.autograd.grad(graph.loss, targets, retain_graph=step.retain, allow_unused=True)
            for i, grad in enumerate(grads):
                self.note(f"{name} {i}", grad)

    def split(self, name: str, graph: Graph, keep: bool) -> None:
        """Go backward to an intermediate output first, and on from there later."""
        if not graph.mid.requires_grad or graph.mid.is_leaf:
            graph.loss.backward(retain_graph=keep)
            return
        behind = [p for item in self.net.held[graph.tail :] for p in item.parameters() if p.requires_grad]
        if self.reached_before(graph, behind):
            behind = []
        grad, *others = torch.autograd.grad(graph.loss, [graph.mid, *behind], retain_graph=keep, allow_unused=True)
        for i, other in enumerate((grad, *others)):
            self.note(f"{name} {i}", other)
        if grad is not None:
            graph.mid.backward(grad, retain_graph=keep)

    def reached_before(self, graph: Graph, behind: list[Tensor]) -> bool:
        """Whether parameters also act in front of `mid`, so that their gradient would use up the graph there."""
        first = [p for item in self.net.held[: graph.tail] for p in item.parameters()]
        return any(f.times > 1 for i in self.case.iterations for f in i.forwards) or not {*behind}.isdisjoint(first)

    def penalty(self, name: str, graph: Graph, keep: bool) -> None:
        if not graph.x.requires_grad:
            graph.loss.backward(retain_graph=keep)
            return
        (grad,) = torch.autograd.grad(graph.loss, graph.x, create_graph=True, allow_unused=True)
        self.note(name, grad)
        penalty = 0 if grad is None else grad.pow(2).sum()
        (graph.loss + penalty).backward(retain_graph=keep)


def context(kind: str) -> AbstractContextManager[Any]:
    return {"on": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[kind]()


# ---- comparison -----------------------------------------------------------------------------------------------------


def record_of(case: Case, plain: bool = False, mode: str | None = None) -> Record:
    """Every number of a case: outputs, gradients, parameters, buffers, random state."""
    return Run(case, plain, mode).run()


def _divides_by_nothing(case: Case) -> bool:
    """Whether BatchNorm sees equal rows: it divides by the root of eps then, and higher derivatives by its powers."""
    layouts = {forward.layout for iteration in case.iterations for forward in iteration.forwards}
    return "expanded" in layouts and "batchnorm" in repr(case.net)


def check(case: Case) -> None:
    """Assert that the case gives the same numbers with InvZoo's layers and with plain maths."""
    if _divides_by_nothing(case):
        raise Unfit
    expected = record_of(case, plain=True)
    numbers = [v.abs().max().item() for v in expected.values() if isinstance(v, Tensor) and v.is_floating_point()]
    scale, tolerance = max(numbers), TOLERANCE[case.net.dtype]
    if not math.isfinite(sum(numbers)) or scale > 1e4:
        raise Unfit
    if case.net.dtype == "float32":  # some nets magnify rounding too much, whatever computes them
        try:
            compare(record_of(case, mode="store"), expected, tolerance / 20, scale)
        except AssertionError:
            raise Unfit from None
    compare(record_of(case), expected, tolerance, scale)


def compare(actual: Record, expected: Record, tolerance: float, scale: float) -> None:
    assert [*actual] == [*expected]
    for name, value in expected.items():
        try:
            same(actual[name], value, tolerance, scale)
        except AssertionError as error:
            error.add_note(f"in {name}")
            raise


def same(actual: Any, expected: Any, tolerance: float, scale: float) -> None:
    """Compare on the scale of the tensor, or on the program's: that of the terms, where a sum cancels."""
    if not isinstance(expected, Tensor):
        assert type(actual) is type(expected)
        assert actual == expected
        return
    assert isinstance(actual, Tensor), f"{expected}, not {actual}"
    exact = not expected.is_floating_point()
    largest = 0.0 if exact or not expected.numel() else max(expected.abs().max().item(), scale)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0 if exact else tolerance * largest)
