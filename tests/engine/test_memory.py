"""The tracker against the allocator's own events, an oracle on random programs, and bytes counted by hand."""

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from invzoo.testing.memory import track_memory

B, D, H = 16, 64, 128  # batch, width and hidden width of the MLP
UNIT = 8  # bytes of one float64


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def no_collector():
    """Nothing here may depend on the garbage collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, H, bias=False), nn.Tanh(), nn.Linear(H, D, bias=False))


def plain_step(net: nn.Sequential, x: Tensor) -> None:
    net(x).square().sum().backward()


def checkpointed_step(net: nn.Sequential, x: Tensor) -> None:
    for layer in net:
        x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    x.square().sum().backward()


def test_a_storage_counts_once_until_its_last_tensor_dies():
    with track_memory() as memory:
        x = torch.empty(10)
        views = [x.detach(), x[2:], x.view(2, 5), x.expand(3, 10), x.t(), *x.chunk(2), x.data, nn.Parameter(x)]
        x.add_(1).mul_(2)
        torch.add(x, x, out=x)
        assert memory.current == memory.peak == 10 * UNIT
        copy = x.clone()
        assert memory.current == 20 * UNIT
        del x, copy
        assert memory.current == 10 * UNIT
    other = torch.empty(10)  # after the context the count falls, and does not rise
    assert memory.current == other.nbytes
    del views
    assert memory.current == 0
    assert memory.peak == 20 * UNIT


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.tensor([1.0, 2.0]),
        lambda: torch.as_tensor(2.0),
        lambda: torch.arange(3),
        lambda: torch.eye(2).to(torch.float32),
        lambda: torch.nn.Linear(3, 4).weight,
        lambda: torch.stack([torch.ones(2), torch.zeros(2)]),
        lambda: torch.randn(4).sort().values,
        lambda: F.dropout(torch.ones(5)),
        lambda: torch.linalg.svd(torch.randn(3, 3)),
        lambda: torch.split_copy(torch.ones(4), 2),
        lambda: torch.cond(torch.ones(()) > 0, torch.sin, torch.cos, (torch.ones(3),)),
    ],
)
def test_every_way_to_make_tensors(make):
    with track_memory() as memory:
        made = make()
        tensors = [made] if isinstance(made, Tensor) else made
        assert memory.current == sum(t.untyped_storage().nbytes() for t in tensors)


def test_earlier_storages_do_not_count_unless_included():
    net, x, norm = mlp(), torch.randn(B, D), nn.BatchNorm1d(4)
    weights = sum(p.nbytes for p in net.parameters())
    with track_memory() as memory:
        net[0].weight.detach().t().add_(0)
        torch.add(x, x, out=x)
        assert memory.current == memory.peak == 0
    with track_memory(include=[net, x, x.t()]) as memory:
        assert memory.current == memory.peak == weights + x.nbytes
        del x
        assert memory.current == weights
    assert track_memory(include=torch.empty(3)).peak == 3 * UNIT
    assert track_memory(include=norm).current == sum(t.nbytes for t in norm.state_dict().values())


def test_include_of_another_type():
    with pytest.raises(TypeError, match="^track_memory: Expected include to hold tensors and modules; got int$"):
        track_memory(include=[1])


def test_storages_that_change_their_size():
    with track_memory() as memory:
        x = torch.ones(10)
        x.untyped_storage().resize_(0)
        other = torch.ones(20)  # nobody has looked meanwhile
        assert memory.peak == other.nbytes  # the two were never alive together
        assert memory.current == other.nbytes
        x.untyped_storage().resize_(x.nbytes)
        x.fill_(1)
        assert memory.current == memory.peak == 30 * UNIT
        del other
        memory.reset_peak()
        assert memory.peak == x.nbytes
        x.resize_(15)
        assert memory.current == memory.peak == 15 * UNIT


# ---- autograd -------------------------------------------------------------------------------------------------------


def test_memory_falls_during_backward():
    x = torch.randn(10, requires_grad=True)
    seen = []
    with track_memory() as memory:
        y = x
        for _ in range(4):
            y = y.exp()
            y.register_hook(lambda grad: seen.append(memory.current // (10 * UNIT)))
        y.backward(torch.ones(10))
    # the four saved outputs and the first gradient; then two gradients and one saved output less each time
    assert seen == [5, 6, 5, 4]


def test_backward_in_another_thread():
    net, x = mlp(), torch.randn(B, D)
    plain_step(net, x)  # the gradients exist
    with track_memory() as memory:
        losses = [net(x).square().sum()]

        def backward() -> None:
            with memory:
                losses.pop().backward()

        held = memory.current
        memory.reset_peak()
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        assert memory.peak > held
        assert memory.current == 0


def test_threads_share_a_tracker():
    memory = track_memory()
    kept: list[list[Tensor]] = [[] for _ in range(4)]

    def work(mine: list[Tensor]) -> None:
        with memory:
            mine.extend(torch.empty(i) + 1 for i in range(200))
            del mine[::2]

    threads = [threading.Thread(target=work, args=(mine,)) for mine in kept]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.current == sum(t.nbytes for mine in kept for t in mine)
    assert memory.peak >= memory.current


# ---- the neighbours -------------------------------------------------------------------------------------------------


def test_device_filter():
    with track_memory(device="cpu") as cpu, track_memory(device="meta") as meta:
        x = torch.empty(10)
        y = torch.empty(20, device="meta")
    assert cpu.current == x.nbytes
    assert meta.current == y.nbytes
    assert track_memory(device="meta:1", include=[x, y]).current == 0


def test_fake_tensors_take_what_real_ones_would():
    def peak_and_current() -> tuple[int, int]:
        with track_memory(device="cpu") as memory:
            net, x = mlp(), torch.randn(B, D)
            plain_step(net, x)
            return memory.peak, memory.current

    real = peak_and_current()
    with FakeTensorMode():
        assert peak_and_current() == real


def test_wrapper_subclasses_count_what_they_wrap():
    with track_memory() as memory:
        pair = TwoTensor(torch.ones(3), torch.ones(3))
        result = pair + 1
        assert memory.current == 12 * UNIT
        del result
        assert memory.current == 6 * UNIT


def test_sparse_tensors_are_not_seen():
    with track_memory() as memory:
        x = torch.eye(3).to_sparse()
        assert x.is_sparse
        assert memory.current == 0


def test_an_error_inside_leaves_the_context():
    with pytest.raises(RuntimeError, match="size of tensor"), track_memory() as memory:
        torch.ones(2) + torch.ones(3)
    x = torch.ones(5)
    assert memory.current == 0
    assert x.sum() == 5


def test_a_tracker_forms_no_cycle():
    with track_memory() as memory:
        x = torch.ones(5)
    tracker = weakref.ref(memory)
    del memory
    assert tracker() is None
    del x


# ---- against the allocator ------------------------------------------------------------------------------------------


def allocator_peak_and_current(step) -> tuple[int, int]:
    """What the CPU allocator reported to the profiler while `step` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak, current


@pytest.mark.parametrize("step", [plain_step, checkpointed_step])
@pytest.mark.parametrize("make", [nn.Identity, nn.Linear, nn.GELU, nn.LayerNorm, nn.PReLU, nn.BatchNorm1d, nn.Softplus])
def test_equal_to_the_allocator_byte_for_byte(step, make):
    sizes = {nn.Linear: (D, 7), nn.LayerNorm: (D,), nn.BatchNorm1d: (D,)}
    net, x = nn.Sequential(*mlp(), make(*sizes.get(make, ()))), torch.randn(B, D)
    step(net, x)
    net.zero_grad()
    expected = allocator_peak_and_current(lambda: step(net, x))
    net.zero_grad()
    with track_memory() as memory:
        step(net, x)
    assert (memory.peak, memory.current) == expected


# ---- against an oracle ----------------------------------------------------------------------------------------------

OPERATIONS = {
    "new": lambda pool, i: pool.append(torch.zeros(i)),
    "view": lambda pool, i: pool.append(pool[i % len(pool)].view(-1)[:1]),
    "copy": lambda pool, i: pool.append(pool[i % len(pool)].clone()),
    "detach": lambda pool, i: pool.append(pool[i % len(pool)].detach()),
    "in place": lambda pool, i: pool[i % len(pool)].zero_(),
    "drop": lambda pool, i: pool.pop(i % len(pool)),
    "free": lambda pool, i: pool.pop(i % len(pool)).untyped_storage().resize_(0),
}


@given(program=st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 50)), max_size=40))
def test_random_programs(program):
    def alive() -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in pool}.values())

    with track_memory() as memory:
        pool: list[Tensor] = []
        peak = 0
        for name, i in [("new", 5), *program]:
            if name != "new" and (not pool or (name != "drop" and pool[i % len(pool)].untyped_storage().nbytes() == 0)):
                continue
            OPERATIONS[name](pool, i)
            assert memory.current == alive()
            peak = max(peak, alive())
            assert memory.peak == peak
