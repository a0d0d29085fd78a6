"""Invertible modules as transforms of `torch.distributions`."""

import copy
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.distributions import ComposeTransform, Independent, Normal, TransformedDistribution, constraints
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import invzoo as iz
from invzoo.testing.memory import track_memory


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4).double()

    def forward(self, x, context):
        return self.net(torch.cat((x, context), -1))


def base(*shape):
    return Independent(Normal(torch.zeros(shape, dtype=torch.float64), 1.0), len(shape))


def flow(depth=2):
    layers = (layer for _ in range(depth) for layer in (iz.AffineCoupling(nn.Linear(2, 4)), iz.Reverse()))
    net = iz.InvertibleSequential(*layers, iz.InvertibleLinear(4, kind="scaled")).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net


def test_a_density_is_that_of_the_change_of_variables():
    net = flow()
    density = TransformedDistribution(base(4), [iz.as_transform(net)])
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y = net(x.flatten(0, 1)).unflatten(0, (2, 3))
    jacobians = [torch.autograd.functional.jacobian(lambda s: net(s[None])[0], s) for s in x.flatten(0, 1)]
    log_dets = torch.stack([torch.linalg.slogdet(j).logabsdet for j in jacobians]).unflatten(0, (2, 3))
    assert_close(density.log_prob(y), base(4).log_prob(x) - log_dets)
    assert_close(density.transforms[0].log_abs_det_jacobian(x, y), log_dets)
    assert_close(density.transforms[0].inv.log_abs_det_jacobian(y, x), -log_dets)
    assert density.event_shape == (4,)
    assert density.batch_shape == ()
    assert density.sample((5, 6)).shape == (5, 6, 4)
    assert density.log_prob(y[0, 0]).shape == ()


def test_both_directions_can_be_trained_through_and_save_memory():
    def peak(depth, mode):
        net = flow(depth)
        net.mode = mode
        density = TransformedDistribution(base(4), [iz.as_transform(net)])
        y = torch.randn(2000, 4, dtype=torch.float64)
        with track_memory() as memory:
            (density.rsample((2000,)).square().mean() - density.log_prob(y).mean()).backward()
        return memory.peak, [p.grad for p in net.parameters()]

    torch.manual_seed(0)
    (small, _), (large, got) = (peak(depth, "invert") for depth in (4, 16))
    assert large < 1.1 * small
    torch.manual_seed(0)
    (_, _), (plain, expected) = (peak(depth, "store") for depth in (4, 16))
    assert plain > 2 * large
    assert_close(got, expected, rtol=1e-9, atol=1e-12)


class Counted(nn.Linear):
    """Counts how often it is evaluated."""

    def __init__(self):
        super().__init__(2, 4, dtype=torch.float64)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


# ---- what a transform remembers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_density_evaluates_each_subnet_once(grad_mode):
    layer = iz.AffineCoupling(Counted())
    density = TransformedDistribution(base(4), [iz.as_transform(layer)])
    with grad_mode():
        density.log_prob(normal(3, 4))
    assert layer.f.calls == 1


class Shifted(nn.Linear):
    """Depends on a parameter, a buffer, a mere attribute, a context and its mode."""

    def __init__(self):
        super().__init__(2, 4, dtype=torch.float64)
        self.register_buffer("scale", torch.ones(4, dtype=torch.float64))
        self.table = normal(2, 4)
        self.shift = self.table[0]

    def forward(self, x, context):
        return self.scale * super().forward(x) + self.shift + context + self.training


def step(f, context, x):
    with torch.no_grad():
        f.weight.sub_(1.0)


CHANGES = {
    "a step of the optimizer": step,
    "other data of a parameter": lambda f, context, x: setattr(f.weight, "data", normal(4, 2)),
    "another parameter": lambda f, context, x: setattr(f, "weight", nn.Parameter(normal(4, 2))),
    "a buffer in place": lambda f, context, x: f.scale.mul_(2.0),
    "an attribute in place": lambda f, context, x: f.shift.add_(1.0),
    "another row of a table": lambda f, context, x: setattr(f, "shift", f.table[1]),
    "a context in place": lambda f, context, x: context.add_(1.0),
    "another mode": lambda f, context, x: f.eval(),
    "x in place": lambda f, context, x: x.sub_(1.0),
}


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CHANGES)
def test_a_log_determinant_is_not_that_of_before_a_change(name, grad_mode):
    layer, context = iz.AffineCoupling(Shifted()), normal(3, 4)
    transform, y = iz.as_transform(layer, context=context), normal(3, 4)
    with grad_mode():
        x = transform.inv(y)
        CHANGES[name](layer.f, context, x)
        got = transform.log_abs_det_jacobian(x, y)
        assert_close(got, layer.forward_and_log_det(x, context=context)[1], rtol=0, atol=0)


def test_a_log_determinant_is_not_that_of_another_value():
    layer = iz.AffineCoupling(nn.Linear(2, 4)).double()
    transform, y = iz.as_transform(layer), normal(3, 4)
    x, other = transform.inv(y), normal(3, 4)
    assert_close(transform.log_abs_det_jacobian(other, layer(other)), layer.forward_and_log_det(other)[1])
    x = transform.inv(y)
    part = x[:1]  # of the same memory
    assert_close(transform.log_abs_det_jacobian(part, y[:1]), layer.forward_and_log_det(part)[1])


def test_a_log_determinant_has_the_graph_that_is_asked_for():
    layer = iz.AffineCoupling(nn.Linear(2, 4)).double().requires_grad_(False)
    transform, y = iz.as_transform(layer), normal(3, 4)
    x = transform.inv(y).requires_grad_()  # known without a graph
    (grad,) = torch.autograd.grad(transform.log_abs_det_jacobian(x, y).sum(), x)
    assert grad.ne(0).any()
    layer.requires_grad_()
    with torch.no_grad():
        x = transform.inv(y)
    transform.log_abs_det_jacobian(x, y).sum().backward()
    assert layer.f.weight.grad.ne(0).any()
    x = transform.inv(y)
    with torch.no_grad():
        assert not transform.log_abs_det_jacobian(x, y).requires_grad


@pytest.mark.parametrize("mode", ["store", "recompute", "invert"])
def test_no_graph_outlives_its_tensors(mode):
    layer = iz.InvertibleSequential(iz.AffineCoupling(nn.Linear(2, 4)), iz.Identity()).double()
    layer.mode = mode
    transform, y, factor = iz.as_transform(layer), normal(3, 4).requires_grad_(), normal(3, 4)
    saved = weakref.ref(factor)
    x = transform.inv(y * factor)
    del factor
    assert saved() is not None
    del x
    assert saved() is None
    x = transform.inv(y)
    log_det = transform.log_abs_det_jacobian(x, y)
    used = weakref.ref(log_det)
    del log_det
    assert used() is None


@pytest.mark.parametrize("cache_size", [0, 1])
def test_copies_leave_out_what_is_remembered(cache_size):
    transform = iz.as_transform(flow(), cache_size=cache_size)
    model = nn.Module()
    model.layer, model.transform = transform.layer, transform
    y = normal(3, 4).requires_grad_()
    x = transform.inv(y)
    transform(x)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    assert averaged.module.transform.layer is averaged.module.layer
    for other in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)), averaged.module.transform):
        assert other.inv(y) is not x
        assert_close(other.inv(y), x, rtol=0, atol=0)
        assert other._cache_size == cache_size


def test_with_a_cache_the_density_of_a_sample_takes_no_inverse(monkeypatch):
    layer = iz.InvertibleSequential(iz.MaskedAutoregressive(4, (8,)), iz.Reverse()).double()
    transform = iz.as_transform(layer)
    assert transform.with_cache(0) is transform
    for cached in (
        [transform.with_cache()],
        [iz.as_transform(layer, cache_size=1)],
        [ComposeTransform([transform, iz.as_transform(flow())], cache_size=1)],
        [iz.as_transform(layer.inv, cache_size=1).inv],
    ):
        density = TransformedDistribution(base(4), cached)
        sample = density.rsample((3,))
        expected = TransformedDistribution(base(4), [t.with_cache(0) for t in cached]).log_prob(sample)
        with monkeypatch.context() as patch:
            patch.setattr(iz.MaskedAutoregressive, "undo", None)  # whoever calls it fails
            assert_close(density.log_prob(sample), expected)


def test_with_a_cache_saturated_samples_have_a_density():
    density = TransformedDistribution(base(1), [iz.as_transform(iz.InvertibleTanh(), cache_size=1)])
    sample = density.transforms[0](torch.full((1, 1), 20.0, dtype=torch.float64))
    assert sample.item() == 1.0
    assert_close(
        density.log_prob(sample), base(1).log_prob(torch.full((1, 1), 20.0)) + 2 * (20 - torch.tensor(2).log())
    )


# ---- supports -------------------------------------------------------------------------------------------------------


def sigmoid(*others):
    return iz.InvertibleSequential(iz.InvertibleSigmoid(), *others)


def affine():
    return iz.ElementwiseAffine(2)


coupling = iz.AffineCoupling(nn.Linear(2, 4)).double()
SUPPORTS = {
    "chain": (lambda: iz.InvertibleSequential(coupling, sigmoid()), constraints.unit_interval),
    "behind a permutation": (lambda: sigmoid(iz.Reverse(), iz.Interleave()), constraints.unit_interval),
    "behind streams": (lambda: sigmoid(iz.Split(), iz.Merge()), constraints.unit_interval),
    "a layer that mixes": (lambda: sigmoid(iz.InvertibleLinear(4)), constraints.real),
    "inverse": (
        lambda: iz.InvertibleSequential(iz.Reverse(), iz.InvertibleLogit(), coupling).inv,
        constraints.unit_interval,
    ),
    "repeat": (lambda: iz.Repeat(sigmoid(), 2), constraints.unit_interval),
    "repeat never": (lambda: iz.Repeat(sigmoid(), 0), constraints.real),
    "empty": (iz.InvertibleSequential, constraints.real),
    "parallel": (lambda: iz.Parallel(iz.InvertibleExp(), sigmoid()).inv.inv, None),
    "parallel alike": (lambda: iz.Parallel(sigmoid(), iz.InvertibleSigmoid()), constraints.unit_interval),
    "several scales": (lambda: iz.MultiScale(iz.Reverse(), sigmoid(), input_shape=(4,)), None),
    "several scales alike": (
        lambda: iz.MultiScale(sigmoid(), iz.Reverse(), input_shape=(4,)),
        constraints.unit_interval,
    ),
    "parts that are mixed": (
        lambda: iz.InvertibleSequential(iz.Parallel(sigmoid(), sigmoid(affine())), iz.Reverse()),
        constraints.real,
    ),
    "a block": (lambda: iz.GlowStep(4, nn.Linear(2, 4), dim=-1), constraints.real),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_the_support_is_that_of_the_layers(name):
    make, support = SUPPORTS[name]
    density = TransformedDistribution(base(4), [iz.as_transform(make().double())])
    sample = density.sample((5, 3))
    assert density.log_prob(sample).shape == (5, 3)
    assert density.support.event_dim == 1
    assert support is None or density.support.base_constraint is support
    if support is not constraints.real:
        with pytest.raises(ValueError, match="support"):
            density.log_prob(torch.full_like(sample, -1.0))


@pytest.mark.parametrize("dim", [1, -3])
def test_the_support_of_parts_is_along_their_dim(dim):
    net = iz.Parallel(
        iz.InvertibleExp(), iz.Parallel(iz.InvertibleSigmoid(), iz.Identity(), dim=dim), dim=dim, sizes=(1, 2)
    )
    density = TransformedDistribution(base(3, 2, 2), [iz.as_transform(net, 3)])
    sample = density.sample((5, 3))
    assert density.log_prob(sample).shape == (5, 3)
    for channel, value, inside in ((0, -1.0, False), (0, 2.0, True), (1, 2.0, False), (1, 0.5, True), (2, -1.0, True)):
        changed = sample.clone()
        changed[..., channel, :, :] = value
        assert density.support.check(changed).all() == density.support.check(changed).any() == inside


def test_parts_of_two_streams_have_domains_of_their_own():
    layer, streams = iz.Parallel(iz.InvertibleSigmoid(), iz.InvertibleExp()), (normal(3, 2), 2 + normal(3, 2).abs())
    iz.testing.assert_round_trip(layer, *streams)
    iz.testing.assert_round_trip(layer.inv, *layer(*streams))


def test_a_density_of_composed_transforms_has_the_support_of_the_last():
    parts = [sigmoid(iz.Reverse()), iz.InvertibleLogit(), iz.InvertibleSequential(coupling, iz.InvertibleExp())]
    density = TransformedDistribution(base(4), [ComposeTransform([iz.as_transform(part) for part in parts])])
    assert density.support.base_constraint is constraints.positive
    assert density.log_prob(density.sample((3,))).shape == (3,)


class OnSimplex(iz.InvertibleModule):
    """Another order on the simplex: its domain takes the last dim as a whole."""

    domain = codomain = constraints.simplex
    volume_preserving = True

    def function(self, x):
        return x.flip(-1)

    inverse = function


def test_a_domain_may_be_one_of_whole_events():
    density = TransformedDistribution(torch.distributions.Dirichlet(torch.ones(4)), [iz.as_transform(OnSimplex())])
    assert density.support.event_dim == 1
    assert density.log_prob(density.sample((5,))).shape == (5,)


# ---- contexts -------------------------------------------------------------------------------------------------------


def test_conditions_are_repeated_over_the_samples():
    layer = iz.AffineCoupling(Net())
    context = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    density = TransformedDistribution(base(4).expand((3,)), [iz.as_transform(layer, context=context)])
    y = density.rsample((5,))
    assert y.shape == (5, 3, 4)
    expected = [
        TransformedDistribution(base(4), [iz.as_transform(layer, context=c[None])]).log_prob(y[:, i])
        for i, c in enumerate(context)
    ]
    assert_close(density.log_prob(y), torch.stack(expected, 1))
    assert torch.autograd.grad(density.log_prob(y.detach()).sum(), context)[0].ne(0).all()


CONTEXTS = {  # batch shapes of the base, of the samples, and of the context
    "one": ((), (5, 3), (3,)),
    "two": ((6, 5), (2, 6, 5), (6, 5)),
    "a square": ((5, 5), (5, 5), (5, 5)),
    "broadcast over the first": ((6, 5), (6, 5), (1, 5)),
    "broadcast over the last": ((6, 5), (2, 6, 5), (6, 1)),
    "none": ((3,), (5, 3), ()),
    "ones": ((), (), (1, 1)),
    "ones before the first": ((6, 5), (6, 5), (1, 1, 6, 5)),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_broadcast_from_the_right(name):
    batch, given, shape = CONTEXTS[name]
    layer = iz.InvertibleSequential(iz.AffineCoupling(Net()), iz.Reverse())
    context, y = normal(*shape, 1), normal(*given, 4)
    density = TransformedDistribution(base(4).expand(batch), [iz.as_transform(layer, context=context)])
    each = context.squeeze((0, 1)) if len(shape) > len(given) else context
    x, log_det = layer.inverse_and_log_det(y.reshape(-1, 4), context=each.expand(*given, 1).reshape(-1, 1))
    assert_close(density.log_prob(y), (base(4).log_prob(x) + log_det).reshape(given))
    assert density.batch_shape == batch
    assert density.sample(given[: len(given) - len(batch)]).shape == (*given, 4)


def test_samples_are_broadcast_over_contexts():
    layer = iz.AffineCoupling(Net())
    context, y = normal(3, 5, 1), normal(5, 4)
    density = TransformedDistribution(base(4).expand((3, 5)), [iz.as_transform(layer, context=context)])
    assert_close(density.log_prob(y), density.log_prob(y.expand(3, 5, 4)))
    assert_close(density.log_prob(y[0]), density.log_prob(y[0].expand(3, 5, 4)))
    transform = iz.as_transform(layer, context=context)
    assert transform(y[0]).shape == (3, 5, 4)


def test_contexts_may_have_events_of_their_own():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(1, 4, 3, dtype=torch.float64)

        def forward(self, x, image):
            return self.net(image).mean((2, 3))

    layer = iz.AffineCoupling(Pooled())
    for images, given in ((normal(3, 1, 5, 5), (2, 3)), (normal(1, 1, 5, 5), (2, 1)), (normal(2, 3, 1, 5, 5), (2, 3))):
        y = normal(*given, 4)
        got = TransformedDistribution(base(4), [iz.as_transform(layer, image=images)]).log_prob(y)
        each = images.expand(*given, 1, 5, 5).flatten(0, 1)
        x, log_det = layer.inverse_and_log_det(y.flatten(0, 1), image=each)
        assert_close(got, (base(4).log_prob(x) + log_det).reshape(given))


def test_each_sample_may_have_a_number_for_a_context():
    class Timed(nn.Module):
        def forward(self, x, t):
            return torch.cat((x * t[:, None], x), 1)

    layer, t = iz.AffineCoupling(Timed()), normal(3)
    transform, y = iz.as_transform(layer, t=t), normal(3, 4)
    assert_close(transform.inv(y), layer.inverse(y, t=t))


def test_events_may_change_their_shape():
    net = iz.MultiScale(iz.Reverse(), iz.Reverse(), input_shape=(2, 3, 4)).inv
    density = TransformedDistribution(base(24), [iz.as_transform(net, (1, 3))])
    assert density.event_shape == (2, 3, 4)
    assert density.log_prob(density.sample((5,))).shape == (5,)
    with pytest.raises(ValueError, match="as_transform: Expected value to have at least 3 dims; got shape"):
        density.transforms[0].inv(torch.zeros(2, 2))


# ---- shapes ---------------------------------------------------------------------------------------------------------


class Eager(nn.Module):
    """What a meta tensor cannot go through, and leaves traces wherever it can."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout())
        self.double()
        self.table, self.scale, self.calls, self.generator = (
            [torch.ones(2)],
            torch.ones(2).double(),
            0,
            torch.Generator(),
        )

    def forward(self, x):
        if not x.isfinite().all():
            raise ValueError("Expected finite values")
        self.calls += 1
        self.latest = x
        self.table[0].mul_(2.0)
        self.scale += 1
        noise = torch.rand(2, dtype=torch.float64) + torch.rand(2, generator=self.generator)
        x = x + 0 * torch.from_numpy(x.detach().numpy()) + noise * torch.tensor([1.0, 2.0]) * self.table[0] * self.scale
        return self.net(torch.where(x > 0, x, 0.5 * x)).masked_fill(torch.zeros(1, 4, dtype=torch.bool), 0.0)


class Locked(Eager):
    """It cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize("kind", [Eager, Locked])
@pytest.mark.parametrize("behind", ["a module", "a function"])
def test_shapes_of_what_meta_tensors_cannot_go_through(kind, behind):
    subnet, hooks = kind(), []
    subnet.register_forward_hook(lambda *_: hooks.append(1))
    f = subnet if behind == "a module" else lambda x: subnet(x)
    net = iz.InvertibleSequential(iz.InvertibleLogit(), iz.AffineCoupling(f))  # zeros would come out as -inf
    state, seed = copy.deepcopy(subnet.state_dict()), torch.get_rng_state()
    flow = TransformedDistribution(base(4), [iz.as_transform(net)])
    scales = iz.MultiScale(net, iz.Identity(), input_shape=(4,))
    assert flow.event_shape == (4,)
    assert scales.latent_shapes == [(2,), (2,)]
    assert_close(subnet.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), seed)
    assert not hooks
    assert subnet.training
    assert (subnet.calls, subnet.scale.tolist(), subnet.table[0].tolist()) == (0, [1, 1], [1, 1])
    assert not hasattr(subnet, "latest")


def test_shapes_that_meta_tensors_say_take_no_real_run():
    devices = []

    class Subnet(nn.Module):
        def forward(self, x):
            devices.append(x.device.type)
            return 2 * x

    iz.MultiScale(iz.AdditiveCoupling(Subnet()), iz.Identity(), input_shape=(4,))
    assert devices == ["meta"]


def test_shapes_leave_layers_to_the_first_call():
    net = iz.InvertibleSequential(iz.ActNorm(4), iz.AffineCoupling(nn.LazyLinear(4)))
    TransformedDistribution(base(4), [iz.as_transform(net)])
    assert net[1].f.has_uninitialized_params()
    assert net.training
    y = net(torch.randn(64, 4))
    assert_close(net[0](torch.zeros(1, 4)), net[0](torch.zeros(1, 4)))
    assert y.shape == (64, 4)


def test_shapes_of_edited_layers_are_asked_again():
    net = iz.InvertibleSequential(iz.Reshape((4,), (2, 2)))
    transform = iz.as_transform(net, (1, 2))
    assert transform.forward_shape((5, 4)) == (5, 2, 2)
    net[0] = iz.Reshape((4,), (4, 1))
    assert transform.forward_shape((5, 4)) == (5, 4, 1)


def test_what_is_wrong_with_a_layer_is_said_where_its_shapes_are_asked_for():
    with pytest.raises(ValueError, match="Linear: Expected|mat1 and mat2|Expected"):
        iz.MultiScale(iz.InvertibleLinear(3), iz.Identity(), input_shape=(4,))


def test_errors():
    with pytest.raises(TypeError, match="as_transform: Expected layer to be an InvertibleModule; got Linear"):
        iz.as_transform(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="as_transform: Expected event_dim to be at least 1, or two such numbers; got"):
        iz.as_transform(iz.Identity(), 0)
    with pytest.raises(TypeError, match="as_transform: Expected layer to be a bijection; got a surjection, Invertible"):
        iz.as_transform(iz.InvertibleSequential(iz.Reverse(), iz.Augment(2)))
    transform = iz.as_transform(iz.InvertibleLinear(2, 3))
    with pytest.raises(TypeError, match="InvertibleLinear: Expected layer to be a bijection with a log-determinant"):
        transform.log_abs_det_jacobian(torch.ones(1, 2), torch.ones(1, 3))
    with pytest.raises(TypeError, match="as_transform: Expected layer to take and return one tensor; got MultiScale"):
        iz.as_transform(iz.MultiScale(iz.Reverse(), iz.InvertibleExp()))
    layer = OnSimplex()
    layer.codomain = constraints.independent(constraints.real, 2)
    with pytest.raises(ValueError, match="as_transform: Expected event_dim to be at least 2, as that of Indep"):
        iz.as_transform(layer)
    with pytest.raises(ValueError, match="as_transform: Expected context to have batch dims that broadcast with those"):
        iz.as_transform(iz.AffineCoupling(Net()), context=normal(2, 1))(normal(3, 4))
