"""The demo: one deep reversible classifier, trained in several modes side by side; what they share and what they cost.

Every mode starts from the same weights and takes the same steps, one step of each mode in turn, so that a noisy machine
slows them alike. Memory is counted in bytes of live tensors, never read from an allocator or a clock.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import invzoo as iz

from .testing.memory import track_memory

__all__ = ["Counted", "build", "gradient_errors", "peak_bytes", "run"]

_CHANNELS = 16
_CLASSES = 10
_TOLERANCE = 1e-4  # the largest relative error of a gradient in float32

Batch = tuple[Tensor, Tensor]


class Counted(nn.Module):
    """Count the evaluations of a module, those of a replay included.

    Example:
        >>> net = Counted(nn.Identity())
        >>> _ = net(net(torch.ones(1)))
        >>> net.evaluations
        2
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.evaluations = 0

    def forward(self, x: Tensor) -> Tensor:
        self.evaluations += 1
        return self.module(x)


def build(depth: int, seed: int) -> nn.Sequential:
    """Build a classifier of 8 x 8 images with ``depth`` couplings; it starts close to one without any."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        couplings = [iz.AdditiveCoupling(Counted(_subnet(depth)), swap=i % 2 == 1) for i in range(depth)]
        return nn.Sequential(
            nn.Conv2d(1, _CHANNELS, 3, padding=1),
            iz.InvertibleSequential(*couplings),
            nn.GroupNorm(1, _CHANNELS),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * _CHANNELS, _CLASSES),
        )


def _subnet(depth: int) -> nn.Sequential:
    half = _CHANNELS // 2
    conv = nn.Conv2d(half, half, 3, padding=1)
    nn.init.normal_(conv.weight, std=0.3 * (9 * half * depth) ** -0.5)  # so that all couplings together add little
    return nn.Sequential(nn.GroupNorm(1, half), nn.SiLU(), conv)


def _digits(device: torch.device) -> tuple[Batch, Batch]:
    """Load the images and labels to train on and those to test on."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    x_train, x_test = (torch.tensor(x, dtype=torch.float32, device=device).view(-1, 1, 8, 8) / 16 for x in parts[:2])
    y_train, y_test = (torch.tensor(y, dtype=torch.int64, device=device) for y in parts[2:])
    return (x_train, y_train), (x_test, y_test)


def _loss(net: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(net(images), labels)


def gradient_errors(net: nn.Module, batch: Batch, modes: list[iz.Mode]) -> dict[iz.Mode, float]:
    """Measure how far each mode's gradients are from those of mode store, relative to the largest of each parameter."""
    expected = _gradients(net, batch, iz.Mode.store)
    return {
        mode: max(
            float((got - want).abs().max() / want.abs().max().clamp_min(torch.finfo(want.dtype).tiny))
            for got, want in zip(_gradients(net, batch, mode), expected, strict=True)
        )
        for mode in modes
        if mode != iz.Mode.store
    }


def _gradients(net: nn.Module, batch: Batch, mode: iz.Mode) -> tuple[Tensor, ...]:
    with iz.mode(net, mode):
        return torch.autograd.grad(_loss(net, batch), [*net.parameters()])


def peak_bytes(net: nn.Module, batch: Batch, mode: iz.Mode) -> int:
    """Count the bytes that one step adds, at its peak, to parameters, their gradients and the batch."""
    with iz.mode(net, mode):
        _loss(net, batch).backward()  # the gradients exist from here on, and so are not counted
        with track_memory() as memory:
            _loss(net, batch).backward()
    return memory.peak


class _Run:
    """One net that trains in one mode, and what its steps took."""

    def __init__(self, mode: iz.Mode, net: nn.Module, steps: int) -> None:
        self.mode, self.net = mode, net
        net.get_submodule("1").mode = mode  # type: ignore[assignment]
        self.optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.01, total_steps=steps)
        self.seconds: list[float] = []
        self.evaluations = 0, 0

    def step(self, batch: Batch) -> None:
        start, before = _now(batch[0].device), self._count()
        loss = _loss(self.net, batch)
        between = self._count()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.seconds.append(_now(batch[0].device) - start)
        self.evaluations = between - before, self._count() - between

    def _count(self) -> int:
        return sum(m.evaluations for m in self.net.modules() if isinstance(m, Counted))

    @torch.no_grad()
    def accuracy(self, batch: Batch) -> float:
        images, labels = batch
        return (self.net(images).argmax(1) == labels).double().mean().item()


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _batches(data: Batch, batch_size: int, epochs: int, seed: int) -> Iterator[Batch]:
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).to(images.device).split(batch_size):
            yield images[index], labels[index]


def _train(runs: list[_Run], batches: list[Batch], console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(f"Training in {', '.join(run.mode for run in runs)}", total=len(runs) * len(batches))
        for batch in batches:
            for run in runs:
                run.step(batch)
                progress.advance(task)


def _check(net: nn.Module, batch: Batch, modes: list[iz.Mode], console: Console) -> None:
    errors = gradient_errors(net, batch, modes)
    for mode, error in errors.items():
        console.print(f"Gradients on the first batch, {mode} against store: relative error {error:.1e}")
    wrong = [f"{error:.1e} in mode {mode}" for mode, error in errors.items() if not error <= _TOLERANCE]
    if wrong:
        got = ", ".join(wrong)
        raise RuntimeError(f"Expected gradients within {_TOLERANCE:.0e} of those in mode store; got {got}")


def _table(runs: list[_Run], peaks: dict[iz.Mode, int], test: Batch) -> Table:
    numbers = (
        "peak activation\nbytes",
        "evaluations\nin forward",
        "evaluations\nin backward",
        "median\nms",
        "test\naccuracy",
    )
    columns = (Column(name, justify="right") for name in numbers)
    table = Table("mode", *columns, title="One training step in each mode, and where training led")
    for run in runs:
        milliseconds, accuracy = f"{1000 * median(run.seconds):.1f}", f"{run.accuracy(test):.2%}"
        table.add_row(run.mode, f"{peaks[run.mode]:,}", *map(str, run.evaluations), milliseconds, accuracy)
    return table


def _draw(path: Path, peaks: dict[int, dict[iz.Mode, int]]) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="couplings", ylabel="peak activation memory of a step (MiB)")
    for mode in peaks[max(peaks)]:
        axes.plot([*peaks], [peak[mode] / 2**20 for peak in peaks.values()], marker="o", label=mode.value)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def run(
    *, depth: int, modes: list[iz.Mode], device: torch.device, epochs: int, batch_size: int, seed: int, picture: Path
) -> None:
    """Check the modes' gradients, measure memory, train, print the table and draw the picture.

    Raises:
        RuntimeError: gradients differ between modes.
    """
    console = Console()
    train, test = _digits(device)
    batches = [*_batches(train, batch_size, epochs, seed)]
    _check(build(depth, seed).to(device), batches[0], modes, console)
    depths = sorted({max(1, depth * part // 8) for part in (1, 2, 4, 8)})
    peaks = {d: {mode: peak_bytes(build(d, seed).to(device), batches[0], mode) for mode in modes} for d in depths}
    runs = [_Run(mode, build(depth, seed).to(device), len(batches)) for mode in modes]
    _train(runs, batches, console)
    console.print(_table(runs, peaks[depth], test))
    _draw(picture, peaks)
    console.print(f"Memory against depth: {picture}", soft_wrap=True)
