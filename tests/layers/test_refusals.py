"""What layers refuse, and in which words: of the arguments that they are built with, and of the tensors they are given.

That every layer names itself and what it got, where that is no tensor or one of other numbers, is in
`test_every_layer.py`.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, ones
from torch.distributions import Normal

import invzoo as iz
from invzoo.layers.maps.affine import Affine

X, Y, net = ones(3, 4), ones(3, 7), nn.Sequential(nn.Linear(3, 3))


# Words of several.
DIMS = "to have dims (batch, channels, ...) with"
MULTIPLES = "to have sizes that are multiples"
RETURNED = "as function returns them; got y"
LOG_DET = "for a log-determinant; got"
BEHIND = "behind the batch, with"


def same(n: int) -> list[iz.Identity]:
    return [iz.Identity() for _ in range(n)]


# By what raises them: what follows ``<name>: Expected``, with dots for any words, and a call that says so.
Refused = dict[Callable[..., Any], dict[str, Callable[[Callable[..., Any]], Any]]]
VALUE_ERRORS: Refused = {
    iz.Split: {
        "input to have a dim 1; got shape (7,)": lambda _: iz.AdditiveCoupling(net)(ones(7)),
        "input to have at least 2 features in dim 1; got shape (3, 1)": lambda _: iz.AdditiveCoupling(net)(ones(3, 1)),
        "split to be ...; got 'thirds'": lambda _: iz.AdditiveCoupling(net, split="thirds"),
        "split to be ...; got 1.5": lambda kind: kind(split=1.5),
        "input to have 6 features in dim 1; got shape (3, 7)": lambda kind: kind(split=(2, 4))(Y),
        "input to have 7 features in dim 1; got shape (2, 6)": lambda _: iz.HINTCoupling(7, nn.Linear)(ones(2, 6)),
    },
    iz.AdditiveCoupling: {
        "f to return a Tensor of shape (3, 4); got shape (3, 5)...": lambda kind: kind(nn.Linear(3, 5))(Y)
    },
    iz.AffineCoupling: {
        "f to return a Tensor of shape (3, 8); got shape (3, 4)...": lambda kind: kind(nn.Linear(3, 4))(Y),
        "scale to be one of ...; got 'cube'": lambda kind: kind(net, scale="cube"),
        "max_log_scale to be positive and finite; got 0": lambda kind: kind(net, max_log_scale=0),
        "scale to be one of ...; got 'cubic'": lambda _: iz.HINTCoupling(4, nn.Linear, scale="cubic"),
    },
    iz.layers.couplings.coupling.Coupling: {
        "input to have spatial dims after dim 1, for a checkerboard; got shape (3, 7)": lambda _: iz.AdditiveCoupling(
            net, split="checkerboard"
        )(Y)
    },
    iz.GINCoupling: {"split to be one into streams; got 'checkerboard'": lambda kind: kind(net, split="checkerboard")},
    iz.RationalQuadraticCoupling: {
        "min_bin to be below 0.125; got 0.2": lambda kind: kind(net, min_bin=0.2),
        "tails to be one of 'linear', 'circular', None; got 'none'": lambda kind: kind(net, tails="none"),
    },
    iz.MixtureLogisticCoupling: {
        "components to be at least 1; got 0": lambda kind: kind(net, components=0),
        "max_mean to be positive and finite; got 0": lambda kind: kind(net, max_mean=0),
        "max_log_scale to be positive and finite; got -1": lambda kind: kind(net, max_log_scale=-1),
    },
    iz.MaskedAutoregressive: {
        "features to be at least 1; got 0": lambda kind: kind(0),
        "hidden to be a sequence of one size or more; got ()": lambda kind: kind(5, ()),
        "hidden to be a sequence of one size or more; got 64": lambda kind: kind(5, 64),
        "hidden to be at least 1; got 0": lambda kind: kind(5, (4, 0)),
        "map to be one of 'affine', 'shift', 'spline'; got 'quadratic'": lambda kind: kind(5, map="quadratic"),
        "map to move each value alone; got Affine(...)": lambda kind: kind(5, map=Affine(centred=True)),
        "scale to be one of ...; got 'cubic'": lambda kind: kind(5, map=Affine("cubic")),
        "order to be one of 'input', 'reversed', 'random'; got 'sorted'": lambda kind: kind(5, order="sorted"),
        "context_features to be at least 1; got 0": lambda kind: kind(5, context_features=0),
        "x to have size 5 in dim -1; got shape (2, 4)": lambda kind: kind(5)(ones(2, 4)),
        "y to have size 5 in dim -1; got shape (2, 4)": lambda kind: kind(5).inverse(ones(2, 4)),
        "x to have dims (batch, ..., features); got shape (5,)": lambda kind: kind(5)(ones(5)),
    },
    iz.InvertibleLinear: {
        "in_features to be at least 1; got 0": lambda kind: kind(0),
        "out_features to be at least 1; got 0": lambda kind: kind(4, 0),
        "out_features to be at least in_features=4; got 3": lambda kind: kind(4, 3),
        "out_features to be in_features=4 with kind='plu'; got 5": lambda kind: kind(4, 5, kind="plu"),
        "out_features to be in_features=4 with kind='free'; got 5": lambda kind: kind(4, 5, kind="free"),
        "kind to be one of 'householder', 'cayley', 'scaled', 'plu', 'free'; got 'qr'": lambda kind: kind(4, kind="qr"),
        "reflections to be at least 1; got 0": lambda kind: kind(4, reflections=0),
        "reflections to be at least 1; got -1": lambda kind: kind(4, kind="scaled", reflections=-1),
        "reflections to be None with kind='cayley'; got 2": lambda kind: kind(4, kind="cayley", reflections=2),
        "max_log_scale to be None with kind='householder'; got 1.0": lambda kind: kind(4, max_log_scale=1.0),
        "max_log_scale to be positive and finite; got 0": lambda kind: kind(4, kind="scaled", max_log_scale=0),
        "max_log_scale to be positive and finite; got inf": lambda kind: kind(4, kind="plu", max_log_scale=math.inf),
        "x to have size 4 in dim -1; got shape (2, 3)": lambda kind: kind(4, 5)(ones(2, 3)),
        "y to have size 5 in dim -1; got shape (2, 3)": lambda kind: kind(4, 5).inverse(ones(2, 3)),
        "x to have dims (..., features); got shape ()": lambda kind: kind(4, 5)(ones(())),
        "x to be on the layer's device cpu; got meta": lambda kind: kind(4, 5)(X.to("meta")),
        "x to have a batch dim, for a log-determinant; got shape (4,)": lambda kind: kind(4).log_det(ones(4)),
        "conditioner to return shape (3, 20), (batch, num_parameters); got (3, 19)": lambda kind: kind(
            4, conditioner=lambda _: ones(3, 19)
        )(X, context=0),
        "conditioner to return shape (3, 20)...; got (1, 20)": lambda kind: kind(
            4, conditioner=lambda _: ones(1, 20)
        ).inverse(X, context=0),
        "conditioner to return shape (3, 20)...; got (20,)": lambda kind: kind(
            4, conditioner=lambda _: ones(20)
        ).log_det(X, context=0),
        "input to have dims (batch, ...), with a conditioner; got shape (4,)": lambda kind: kind(4, conditioner=net)(
            ones(4), context=0
        ),
    },
    iz.InvertibleConv1x1: {
        "channels to be at least 1; got 0": lambda kind: kind(0),
        "out_channels to be at least channels=4; got 3": lambda kind: kind(4, 3),
        "out_channels to be channels=4 with kind='free'; got 5": lambda kind: kind(4, 5, kind="free"),
        "kind to be one of ...; got 'lu'": lambda _: iz.GlowStep(4, net, kind="lu"),
        "kind to be one of ...; got 'qr'": lambda _: iz.InvertiblePatchConv(3, kind="qr"),
        f"x {DIMS} one to three dims of pixels; got shape (4,)": lambda kind: kind(4)(ones(4)),
        f"x {DIMS} one to three dims of pixels; got shape (2, 4)": lambda kind: kind(4)(ones(2, 4)),
        f"y {DIMS} one to three dims of pixels; got shape (2, 4, 1, 1, 1, 1)": lambda kind: kind(4).inverse(
            ones(2, 4, 1, 1, 1, 1)
        ),
        "x to have size 4 in dim 1; got shape (4, 3, 3)": lambda kind: kind(4)(ones(4, 3, 3)),
        "y to have size 4 in dim 1; got shape (2, 3, 4, 4)": lambda kind: kind(4).inverse(ones(2, 3, 4, 4)),
        "out_channels to be at least channels=12; got 11": lambda _: iz.InvertiblePatchConv(3, 11, 2),
        "reflections to be None with kind='cayley'; got 2": lambda _: iz.InvertiblePatchConv(
            3, kind="cayley", reflections=2
        ),
        "y to have size 9 in dim 1; got shape (2, 8, 2, 2)": lambda _: iz.InvertiblePatchConv(2, 9, 2).inverse(
            ones(2, 8, 2, 2)
        ),
    },
    iz.WoodburyLinear: {
        "features to be at least 1; got 0": lambda kind: kind(0, 1),
        "rank to be at least 1; got 0": lambda kind: kind(4, 0),
        "rank to be at most features=4; got 5": lambda kind: kind(4, 5),
        "max_norm to be below 1; got 1.0": lambda kind: kind(4, 2, max_norm=1.0),
        "max_norm to be positive and finite; got 0": lambda kind: kind(4, 2, max_norm=0),
        "max_log_scale to be positive and finite; got -1.0": lambda kind: kind(4, 2, max_log_scale=-1.0),
        "y to have size 4 in dim 1; got shape (2, 3)": lambda kind: kind(4, 2, dim=1).inverse(ones(2, 3)),
        "x to have size 4 in dim 1; got shape (2, 3)": lambda kind: kind(4, 2, dim=1).log_det(ones(2, 3)),
        f"x to have a batch dim before dim 0, {LOG_DET} (4, 3)": lambda kind: kind(4, 2, dim=0).log_det(ones(4, 3)),
        f"x to have a batch dim before dim -1, {LOG_DET} (4,)": lambda kind: kind(4, 2).log_det(ones(4)),
        f"x to have a batch dim before dim -2, {LOG_DET} (4, 3)": lambda kind: kind(4, 2, dim=-2).log_det(ones(4, 3)),
    },
    iz.InvertiblePatchConv: {
        "channels to be at least 1; got 0": lambda kind: kind(0),
        "kernel_size to be at least 1; got 0": lambda kind: kind(3, None, 0),
        "kernel_size to be an int or one to three of them; got (1, 1, 1, 1)": lambda kind: kind(3, None, (1,) * 4),
    },
    iz.OrthogonalDownsample: {
        "channels to be at least 1; got 0": lambda kind: kind(0),
        "stride to be at least 1; got 0": lambda kind: kind(4, 0),
        "stride to be an int or one to three of them; got (1, 1, 1, 1)": lambda kind: kind(4, (1, 1, 1, 1)),
        "stride to be an int or one to three of them; got ()": lambda kind: kind(4, ()),
        "init to be one of 'haar', 'dct', 'random'; got 'db2'": lambda kind: kind(4, init="db2"),
        "kind to be one of 'householder', 'cayley'; got 'plu'": lambda kind: kind(4, kind="plu"),
        f"x {DIMS} 2 dims of pixels; got shape (2, 4, 4)": lambda kind: kind(4)(ones(2, 4, 4)),
        "x to have size 4 in dim 1; got shape (2, 3, 4, 4)": lambda kind: kind(4)(ones(2, 3, 4, 4)),
        "y to have size 16 in dim 1; got shape (2, 8, 2, 2)": lambda kind: kind(4).inverse(ones(2, 8, 2, 2)),
    },
    iz.OrthogonalUpsample: {
        "channels to be at least 1; got 0": lambda kind: kind(0),
        "stride to be powers of two with init='haar'; got (3, 3)": lambda kind: kind(9, 3),
        "reflections to be at least 1; got 0": lambda kind: kind(4, reflections=0),
        "reflections to be None with kind='cayley'; got 2": lambda kind: kind(4, kind="cayley", reflections=2),
        "channels to be a multiple of 4, the pixels of a cell; got 6": lambda kind: kind(6),
        f"y {MULTIPLES} of (2, 2) in dims 2, ...; got shape (2, 4, 3, 4)": lambda kind: kind(16).inverse(
            ones(2, 4, 3, 4)
        ),
    },
    iz.PeriodicConv: {
        "channels to be at least 1; got 0": lambda kind: kind(0, 3),
        "kernel_size to be at least 1; got 0": lambda kind: kind(4, 0),
        "kernel_size to have one to three sizes; got (3, 3, 3, 3)": lambda kind: kind(4, (3,) * 4),
        "max_norm to be positive and finite; got 0": lambda kind: kind(4, 3, max_norm=0),
        "x to have dims (batch, channels, height, width); got shape (2, 4)": lambda kind: kind(4, 3)(ones(2, 4)),
        "y to have size 4 in dim 1; got shape (2, 3, 4, 4)": lambda kind: kind(4, 3).inverse(ones(2, 3, 4, 4)),
    },
    iz.EmergingConv: {
        "kernel_size to have one to three sizes; got ()": lambda kind: kind(4, ()),
        "max_norm to be below 1; got 1.0": lambda kind: kind(4, 3, max_norm=1.0),
        "max_log_scale to be positive and finite; got -1.0": lambda kind: kind(4, 3, max_log_scale=-1.0),
        "kernel_size to be odd with mask='raster'; got (3, 2)": lambda kind: kind(4, (3, 2)),
        "mask to be one of 'raster', 'corner'; got 'lower'": lambda kind: kind(4, 3, mask="lower"),
        "x to have dims (batch, channels, height, width); got shape (2, 4, 3)": lambda kind: kind(4, 3).log_det(
            ones(2, 4, 3)
        ),
        "x to have at least one pixel; got shape (2, 4, 0, 4)": lambda kind: kind(4, 3)(ones(2, 4, 0, 4)),
    },
    iz.ActNorm: {
        "features to be at least 1; got 0": lambda kind: kind(0),
        "min_std to be positive and finite; got 0.0": lambda kind: kind(3, min_std=0.0),
        "x to have size 3 in dim 1; got shape (2, 4)": lambda kind: kind(3)(ones(2, 4)),
        "layer to have seen a training batch before it is transformed or traced; got one that has not": lambda kind: (
            torch.func.grad(kind(3))(ones(2, 3))
        ),
    },
    iz.ElementwiseAffine: {
        "features to be at least 1; got 0": lambda kind: kind(0),
        "max_log_scale to be positive and finite; got 0.0": lambda kind: kind(3, max_log_scale=0.0),
        "x to have size 3 in dim 1; got shape (2, 4)": lambda kind: kind(3)(ones(2, 4)),
        "x to have size 3 in dim 1; got shape (3,)": lambda kind: kind(3)(ones(3)),
        "conditioner to return shape (2, 6); got (2, 3)": lambda kind: kind(3, conditioner=lambda c: c)(
            ones(2, 3), context=ones(2, 3)
        ),
    },
    iz.ConditionalAffine: {
        "scale to be one of 'tanh', 'softclip', 'sigmoid', 'unit', 'exp'; got 'no'": lambda kind: kind(net, scale="no"),
        "conditioner to return shape (2, 6) or (2, 6, 4); got (2, 6, 3)": lambda kind: kind(nn.Identity(), dim=1)(
            ones(2, 3, 4), context=ones(2, 6, 3)
        ),
        "conditioner to return shape (2, 6) or (2, 6, 4); got (3, 6)": lambda kind: kind(nn.Identity(), dim=1)(
            ones(2, 3, 4), context=ones(3, 6)
        ),
        "conditioner to return shape (3, 8); got (3, 4)": lambda kind: kind(nn.Identity())(X, context=X),
        "x to have a dim 3; got shape (2, 3)": lambda kind: kind(nn.Identity(), dim=3)(ones(2, 3), context=ones(2, 6)),
    },
    iz.InvertibleBatchNorm: {
        "features to be at least 1; got 0": lambda kind: kind(0),
        "eps to be positive and finite; got -1.0": lambda kind: kind(3, -1.0),
        "momentum to be None or in [0, 1]; got 2": lambda kind: kind(3, momentum=2),
        "max_log_scale to be positive and finite; got 0": lambda kind: kind(3, max_log_scale=0),
        "input to have more than one value for each feature in training; got shape (1, 3)": lambda kind: kind(3)(
            ones(1, 3)
        ),
        "input to have size 3 in dim 1; got shape (2, 4)": lambda kind: kind(3)(ones(2, 4)),
        "input to have size 3 in dim 1; got shape (3,)": lambda kind: kind(3)(ones(3)),
    },
    iz.InvertibleLayerNorm: {
        "normalized_shape to be at least 1; got 0": lambda kind: kind(0),
        "eps to be positive and finite; got 0.0": lambda kind: kind(3, 0.0),
        "input to end in shape (3,); got shape (3, 4)": lambda kind: kind(3)(X),
    },
    iz.InvertibleRMSNorm: {"max_log_scale to be positive and finite; got -1": lambda kind: kind(3, max_log_scale=-1)},
    iz.InvertibleGroupNorm: {
        "groups to be at least 1; got 0": lambda kind: kind(0, 3),
        "channels to be a multiple of groups=2; got 3": lambda kind: kind(2, 3),
        "input to have size 3 in dim 1; got shape (3,)": lambda kind: kind(1, 3)(ones(3)),
    },
    iz.InvertibleLeakyReLU: {
        "negative_slope to be positive and finite; got 0": lambda kind: kind(0),
        "negative_slope to be positive and finite; got -0.1": lambda kind: kind(-0.1),
        "negative_slope to be positive and finite; got inf": lambda kind: kind(math.inf),
        "negative_slope to be positive and finite; got nan": lambda kind: kind(math.nan),
    },
    iz.SneakyReLU: {
        "negative_slope to be positive and finite; got 0": lambda kind: kind(0),
        "negative_slope to be below 1; got 1": lambda kind: kind(1),
    },
    iz.InvertibleELU: {"alpha to be positive and finite; got -1": lambda kind: kind(-1)},
    iz.InvertibleLogit: {
        "eps to be in [0, 0.5); got 0.5": lambda kind: kind(0.5),
        "eps to be in [0, 0.5); got -1e-06": lambda kind: kind(-1e-6),
        "x to have values in [-0.5, 1.5]; got values from 2 to 2": lambda kind: kind(0.25)(2 * X),
    },
    iz.InvertibleSigmoid: {
        "eps to be in [0, 0.5); got nan": lambda kind: kind(math.nan),
        "y to have values in [-0.5, 1.5]; got values from 2 to 2": lambda kind: kind(0.25).inverse(2 * X),
    },
    iz.InvertibleTanh: {
        "input to have a batch dim, for a log-determinant; got a scalar": lambda kind: kind().log_det(ones(()))
    },
    iz.InvertiblePReLU: {
        "negative_slope to have abs(log) below max_log_slope=2.0; got 0.1": lambda kind: kind(3, 0.1),
        "negative_slope to be positive and finite; got -1": lambda kind: kind(3, -1),
        "max_log_slope to be positive and finite; got 0": lambda kind: kind(3, max_log_slope=0),
    },
    iz.SinhArcsinh: {
        "max_skew to be positive and finite; got 0": lambda kind: kind(3, max_skew=0),
        "max_log_tail to be positive and finite; got -1": lambda kind: kind(3, max_log_tail=-1),
    },
    iz.Snake: {
        "max_log_frequency to be positive and finite; got 0": lambda kind: kind(3, max_log_frequency=0),
        f"x to have a batch dim before dim -1, {LOG_DET} shape (3,)": lambda kind: kind(3, dim=-1).log_det(ones(3)),
    },
    iz.RationalQuadraticSpline: {
        "features to be at least 1; got 0": lambda kind: kind(0),
        "bins to be at least 2; got 1": lambda kind: kind(3, bins=1),
        "bound to be positive and finite; got 0": lambda kind: kind(3, bound=0),
        "tails to be one of 'linear', 'circular', None; got 'none'": lambda kind: kind(3, tails="none"),
        "min_bin to be below 0.125; got 0.2": lambda kind: kind(3, min_bin=0.2),
        "min_bin to be below 0.125; got 0.125": lambda kind: kind(3, min_bin=0.125),
        "min_bin to be below 0.25; got 0.25": lambda kind: kind(3, bins=4, min_bin=0.25),
        "min_slope to be below 1; got 1.5": lambda kind: kind(3, min_slope=1.5),
        "min_slope to be below 1; got 1": lambda kind: kind(3, min_slope=1),
        "x to have size 3 in dim 1; got shape (2, 4)": lambda kind: kind(3)(ones(2, 4)),
    },
    iz.Monotone: {
        "bounds to be increasing; got (1, 1)": lambda kind: kind(torch.sinh, (1, 1)),
        "x to have values in [0, 1]; got values from 2 to 2": lambda kind: kind(torch.logit, (0, 1))(2 * X),
        "y to have values that the curve takes; got 2": lambda kind: kind(torch.tanh).inverse(2 * X),
    },
    iz.UnconstrainedMonotonic: {
        "features to be at least 1; got 0": lambda kind: kind(0),
        "hidden to be at least 1; got 0": lambda kind: kind(3, hidden=0),
        "tail_bound to be positive and finite; got -1": lambda kind: kind(3, tail_bound=-1),
        "max_log_slope to be positive and finite; got 0": lambda kind: kind(3, max_log_slope=0),
    },
    iz.SumOfSquares: {
        "degree to be at least 1; got 0": lambda kind: kind(3, degree=0),
        "polynomials to be at least 1; got 0": lambda kind: kind(3, polynomials=0),
        "tail_bound to be positive and finite; got 0": lambda kind: kind(3, tail_bound=0),
        "min_slope to be positive and finite; got 0": lambda kind: kind(3, min_slope=0),
        "min_slope to be below 1; got 1": lambda kind: kind(3, min_slope=1),
    },
    iz.BernsteinPolynomial: {
        "degree to be at least 1; got 0": lambda kind: kind(3, degree=0),
        "tail_bound to be positive and finite; got inf": lambda kind: kind(3, tail_bound=math.inf),
        "max_log_slope to be positive and finite; got 0": lambda kind: kind(3, max_log_slope=0),
    },
    iz.InvertibleResidual: {
        "f to return a Tensor of shape (3, 3); got shape (3, 2)": lambda kind: kind(nn.Linear(3, 2))(ones(3, 3)),
        "f to return a Tensor of shape (3, 4); got tuple. Let a module of your own...": lambda kind: kind(
            lambda x: (x,)
        )(X),
        "log_det to be one of ...; got 'guess'": lambda kind: kind(net, log_det="guess"),
        "terms to be at least 1; got 0": lambda kind: kind(net, terms=0),
        "stop to be below 1; got 1.0": lambda kind: kind(net, stop=1.0),
        "tolerance to be positive and finite; got 0": lambda kind: kind(net, tolerance=0),
    },
    iz.Leapfrog: {
        "step_size to be positive and finite; got 0": lambda kind: kind(net, 0),
        "second stream to be torch.float32 of shape (3, 4), as the first; got ...(3, 2)": lambda kind: kind(net)(
            X, X[:, :2]
        ),
    },
    iz.MomentumResidual: {
        "gamma to be below 1; got 1": lambda kind: kind(net, 1),
        "gamma to be positive and finite; got -1": lambda kind: kind(net, -1),
        "second stream to be ..., as the first; got torch.float32 of shape (2, 4)": lambda kind: kind(net).inverse(
            X, X[:2]
        ),
        "second stream to be torch.float32 of shape (3, 4), as the first; got torch.float64...": lambda kind: kind(net)(
            X, X.double()
        ),
        "f to return a Tensor of shape (3, 4); got shape (3, 2)": lambda kind: kind(nn.Linear(4, 2))(X, X),
    },
    iz.lipschitz: {
        "net to have parameters in plain linear and convolutional layers; got BatchNorm1d": lambda kind: kind(
            nn.BatchNorm1d(3)
        ),
        "net to have parameters in plain ... layers; got ParametrizedLinear": lambda kind: kind(kind(nn.Linear(3, 3))),
        "net to pad with zeros or circularly; got padding_mode='reflect'": lambda kind: kind(
            nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect")
        ),
        "coeff to be below 1; got 1.0": lambda kind: kind(nn.Linear(2, 2), 1.0),
        "coeff to be positive and finite; got 0": lambda kind: kind(nn.Linear(2, 2), 0),
    },
    iz.Merge: {"inputs to have 4 and 3 features; got 3 and 4": lambda kind: kind()(ones(3, 3), X)},
    iz.Permute: {
        "permutation to hold each of 0, ..., 1 once; got [0, 0]": lambda kind: kind([0, 0]),
        "permutation to hold each of 0, ..., 1 once; got [1, 2]": lambda kind: kind([1, 2]),
        "permutation to hold each of 0, ..., 1 once; got [-1, 0]": lambda kind: kind([-1, 0]),
        "permutation to hold each of 0, ..., 1 once; got [0, 2]": lambda kind: kind(torch.tensor([0, 2])),
        "permutation to hold each of 0, ..., 7 once; got [0, 1, 2, 3, 4, 5, ...]": lambda kind: kind(
            [0, 1, 2, 3, 4, 5, 6, 6]
        ),
        "x to have size 3 in dim 1; got shape (2, 4)": lambda kind: kind([1, 0, 2])(ones(2, 4)),
        "x to have a dim 2; got shape (3, 2)": lambda kind: kind([1, 0], 2)(ones(3, 2)),
    },
    iz.Shuffle: {
        "y to have size 3 in dim 1; got shape (2, 4)": lambda kind: kind(3).inverse(ones(2, 4)),
        "y to have a dim -3; got shape (3, 4)": lambda kind: kind(4, -3).inverse(X),
        "features to be at least 1; got 0": lambda kind: kind(0),
    },
    iz.Reverse: {
        "x to have a dim 0; got shape ()": lambda kind: kind(0)(ones(())),
        "y to have a dim 2; got shape (3, 4)": lambda kind: kind(2).inverse(X),
        "x to have a dim 1; got shape ()": lambda kind: kind().forward_and_log_det(ones(())),
    },
    iz.Swap: {
        "x to have a dim -3; got shape (3, 4)": lambda kind: kind(-3)(X),
        "y to have a dim 0; got shape ()": lambda kind: kind(0).inverse(ones(())),
        "x to have at least 2 entries in dim -1; got shape (3, 0)": lambda kind: kind(-1)(ones(3, 0)),
        f"input to be a Tensor with a batch dim, {LOG_DET} a scalar": lambda kind: kind().log_det(ones(()), ones(())),
    },
    iz.Interleave: {
        "x to have a dim 1; got shape (4,)": lambda kind: kind(1)(ones(4)),
        "y to have at least 2 entries in dim -1; got shape (3, 1)": lambda kind: kind(-1).inverse(ones(3, 1)),
    },
    iz.Deinterleave: {
        "y to have a dim 2; got shape (3, 4)": lambda kind: kind(2).inverse(X),
        "x to have at least 2 entries in dim -1; got shape (3, 1)": lambda kind: kind(-1)(ones(3, 1)),
    },
    iz.Squeeze: {
        "factor to be at least 1; got 0": lambda kind: kind(0),
        "factor to be at least 1; got -1": lambda kind: kind((2, -1)),
        "factor to be an int or one to three of them; got ()": lambda kind: kind(()),
        "factor to be an int or one to three of them; got (1, 2, 1, 2)": lambda kind: kind((1, 2, 1, 2)),
        "order to be one of 'channels_first', 'positions_first'; got 'tf'": lambda kind: kind(order="tf"),
        f"x {DIMS} one to three dims of pixels; got shape (2, 4)": lambda kind: kind()(ones(2, 4)),
        f"y {DIMS} one to three dims of pixels; got shape (2, 4, 2, 2, 2, 2)": lambda kind: kind().inverse(
            ones(2, 4, 2, 2, 2, 2)
        ),
        f"x {DIMS} 1 dims of pixels; got shape (2, 4)": lambda kind: kind((2,))(ones(2, 4)),
        f"x {MULTIPLES} of (2, 3) in dims 2, ...; got shape (1, 1, 4, 4)": lambda kind: kind((2, 3))(ones(1, 1, 4, 4)),
        "y to have a multiple of 6 channels; got shape (1, 8, 4, 4)": lambda kind: kind((2, 3)).inverse(
            ones(1, 8, 4, 4)
        ),
    },
    iz.Reshape: {
        "output_shape to have the 12 entries of (3, 4); got (4, 2)": lambda kind: kind((3, 4), (4, 2)),
        "output_shape to have the 12 entries of (3, 4); got (4, -1, -1)": lambda kind: kind((3, 4), (4, -1, -1)),
        "output_shape to have the 12 entries of (3, 4); got (-1, 0)": lambda kind: kind((3, 4), (-1, 0)),
        "output_shape to have the 12 entries of (3, 4); got (5, -1)": lambda kind: kind((3, 4), (5, -1)),
    },
    iz.Flatten: {
        "input_shape to have sizes of at least 1; got (3, 0)": lambda kind: kind((3, 0)),
        "x to have shape (batch, 3, 4); got shape (2, 4, 3)": lambda kind: kind((3, 4))(ones(2, 4, 3)),
        "y to have shape (batch, 12); got shape (12,)": lambda kind: kind((3, 4)).inverse(ones(12)),
        "x to have shape (batch); got shape ()": lambda kind: kind(())(ones(())),
    },
    iz.Rearrange: {
        "pattern to be an einops pattern 'axes -> axes'; got 'b c': ...": lambda kind: kind("b c"),
        "pattern to be an einops pattern 'axes -> axes'; got 'b c -> c -> b': ...": lambda kind: kind("b c -> c -> b"),
        "pattern to be an einops pattern 'axes -> axes'; got 'b (c -> b c': ...": lambda kind: kind("b (c -> b c"),
        "pattern to be an einops pattern 'axes -> axes'; got 'b b -> b b': ...": lambda kind: kind("b b -> b b"),
        "pattern to be an einops pattern 'axes -> axes'; got 'b c! -> c! b': ...": lambda kind: kind("b c! -> c! b"),
        "pattern to be an einops pattern 'axes -> axes'; got '': ...": lambda kind: kind(""),
        "pattern to have the same axes on both sides; got 'b c -> b'": lambda kind: kind("b c -> b"),
        "pattern to have the same axes on both sides; got 'b -> b c'": lambda kind: kind("b -> b c"),
        "pattern to have the same axes on both sides; got 'b c -> b c 2'": lambda kind: kind("b c -> b c 2"),
        "pattern to have the same axes on both sides; got 'b c ... -> b c'": lambda kind: kind("b c ... -> b c"),
        "pattern to have no '...' inside parentheses, for an inverse; got 'b ... -> (b ...)'": lambda kind: kind(
            "b ... -> (b ...)"
        ),
        "sizes to give all but one of (c h), for function and inverse; got none of c, h": lambda kind: kind(
            "b (c h) -> b c h"
        ),
        "sizes to name axes of the pattern; got 'd', 'e'": lambda kind: kind("b c -> b c", {"e": 1, "d": 2}),
        "size of 'c' to be at least 1; got 0": lambda kind: kind("b c -> b c", {"c": 0}),
        "x to have dims 'b (n p)' with {'p': 2}; got shape (3, 5)": lambda kind: kind("b (n p) -> b n p", {"p": 2})(
            ones(3, 5)
        ),
        "y to have dims 'b n p' with {'p': 2}; got shape (3, 5, 3)": lambda kind: kind(
            "b (n p) -> b n p", {"p": 2}
        ).inverse(ones(3, 5, 3)),
        "x to have dims 'b c'; got shape (3,)": lambda kind: kind("b c -> c b")(ones(3)),
    },
    iz.Pad: {
        "padding to be (before, after), both at least 0; got -1": lambda kind: kind(-1),
        "padding to be (before, after), both at least 0; got (1, -1)": lambda kind: kind((1, -1)),
        "padding to be (before, after), both at least 0; got (1,)": lambda kind: kind((1,)),
        "padding to be (before, after), both at least 0; got (1, 2, 3)": lambda kind: kind((1, 2, 3)),
        "padding to be (before, after), both at least 0; got (1, 0.5)": lambda kind: kind((1, 0.5)),
        "x to have a dim 2; got shape (3, 4)": lambda kind: kind(1, 2)(X),
        "y to have a dim 1 with at least 3 entries; got shape (3, 2)": lambda kind: kind((1, 2)).inverse(ones(3, 2)),
    },
    iz.HaarDownsample: {
        "wavelet to be one of 'haar', 'db2', 'db3'; got 'db4'": lambda kind: kind("db4"),
        f"x {MULTIPLES} of (2, 2) in dims 2, ...; got shape (1, 1, 2, 3)": lambda kind: kind()(ones(1, 1, 2, 3)),
        "y to have a multiple of 4 channels; got shape (1, 2, 2, 2)": lambda kind: kind().inverse(ones(1, 2, 2, 2)),
    },
    iz.HaarUpsample: {
        "order to be one of 'channels_first', 'positions_first'; got 'c'": lambda kind: kind(order="c"),
        f"x {DIMS} one to three dims of pixels; got shape (2, 4)": lambda kind: kind()(ones(2, 4)),
    },
    iz.DCT: {
        "x to have a dim 0 behind the batch; got shape (2, 4, 4)": lambda kind: kind(0)(ones(2, 4, 4)),
        "x to have a dim 0 behind the batch; got shape (2, 4, 5)": lambda kind: kind((1, 0))(ones(2, 4, 5)),
        "x to have entries in dim -1; got shape (2, 0)": lambda kind: kind()(ones(2, 0)),
    },
    iz.Hadamard: {
        "x to have a dim -3 behind the batch; got shape (2, 4, 4)": lambda kind: kind(-3)(ones(2, 4, 4)),
        "x to have a dim 3 behind the batch; got shape (2, 4, 4)": lambda kind: kind(3)(ones(2, 4, 4)),
        "x to have a power of two as its size in dim 1; got shape (2, 6)": lambda kind: kind()(ones(2, 6)),
        "y to have a power of two as its size in dim 1; got shape (2, 0)": lambda kind: kind().inverse(ones(2, 0)),
    },
    iz.Slice: {
        "features to be at least 1; got 0": lambda kind: kind(0),
        f"x to have a dim 1 {BEHIND} at least 3 entries; got shape (4, 2)": lambda kind: kind(3)(ones(4, 2)),
        "y to have a dim 1 behind the batch; got shape (4,)": lambda kind: kind(3).inverse(ones(4)),
        f"x to have a dim 0 {BEHIND} at least 1 entries; got shape (4, 2)": lambda kind: kind(1, 0)(ones(4, 2)),
    },
    iz.Augment: {
        "features to be at least 1; got 0": lambda kind: kind(0),
        f"y to have a dim 1 {BEHIND} at least 3 entries; got shape (4, 2)": lambda kind: kind(3).inverse(ones(4, 2)),
        "x to have a dim 1 behind the batch; got shape (4,)": lambda kind: kind(3)(ones(4)),
        "x to have a dim -2 behind the batch; got shape (4, 2)": lambda kind: kind(1, -2)(ones(4, 2)),
    },
    iz.Dequantize: {
        "x to have integers in [0, 3]; got values from 0 to 4": lambda kind: kind(4)(torch.tensor([[0, 4]])),
        "x to have integers in [0, 3]; got values from -1 to 3": lambda kind: kind(4)(torch.tensor([[-1, 3]])),
        "x to have integers in [0, 3]; got values from 0 to 0.5": lambda kind: kind(4)(torch.tensor([[0.0, 0.5]])),
        "x to have integers in [0, 3]; got values from 255 to 255": lambda kind: kind(4)(torch.tensor([[255]]).byte()),
        "levels to be at least 1; got 0": lambda kind: kind(0),
        "levels to be at most 65536, for room between them in float32; got 65537": lambda kind: kind(65537),
        "dtype to hold 257 levels; got torch.uint8": lambda kind: kind(257),
    },
    iz.Repeat: {"times to be an int of at least 0; got -1": lambda kind: kind(*same(1), -1)},
    iz.Parallel: {
        "sizes to hold 2 sizes, one for each layer; got [1, 2, 3]": lambda kind: kind(*same(2), sizes=(1, 2, 3)),
        "inputs to be 1 or 3 tensors; got 2": lambda kind: kind(*same(3))(ones(1, 1), ones(1, 1)),
        "input to have 5 features in dim 1; got shape (1, 4)": lambda kind: kind(*same(2), sizes=(2, 3))(ones(1, 4)),
        "input to have at least 3 features in dim 1; got shape (1, 2)": lambda kind: kind(*same(3))(ones(1, 2)),
        "input to have a dim 1; got shape (2,)": lambda kind: kind(*same(3))(ones(2)),
    },
    iz.MultiScale: {
        "stages to be at least one; got none": lambda kind: kind(),
        "latents to be 2 tensors, one for each stage; got 1": lambda kind: kind(*same(2)).inverse(ones(1, 2)),
        "y to have shape (batch, 4); got shape (1, 3)": lambda kind: kind(*same(2), input_shape=(4,)).inverse(
            ones(1, 3)
        ),
        "y to have shape (batch, 4); got shape (1, 4, 1)": lambda kind: kind(*same(2), input_shape=(4,)).inverse(
            ones(1, 4, 1)
        ),
    },
    iz.GlowStep: {
        "dim to be 1 or -1; got 0": lambda kind: kind(4, net, dim=0),
        "dim to be 1 or -1; got -2": lambda kind: kind(4, net, dim=-2),
        "dim to be 1 or -1; got 'a'": lambda kind: kind(4, net, dim="a"),
    },
    iz.HINTCoupling: {
        "features to be at least 2; got 1": lambda kind: kind(1, nn.Linear),
        "depth to be at least 1; got 0": lambda kind: kind(4, nn.Linear, depth=0),
    },
}

TYPE_ERRORS: Refused = {
    iz.AdditiveCoupling: {
        "input to be one Tensor or two; got Tensor, Tensor, Tensor": lambda kind: kind(net)(X, X, X),
        "input to be one Tensor or two; got int": lambda kind: kind(net)(3),
        "f to be a module or a function; got int": lambda kind: kind(3),
        "input to be one Tensor, for a checkerboard; got two": lambda kind: kind(net, split="checkerboard")(Y, Y),
        "input to be numbers; got torch.bool": lambda kind: kind(net)(X.bool()),
        "f to return real numbers, for a real stream; got torch.complex64": lambda kind: kind(lambda x: x + 0j)(X),
    },
    iz.AffineCoupling: {
        "f to return real numbers, for a real stream; got torch.complex64": lambda kind: kind(
            lambda x: ones(3, 4) + 0j
        )(X),
        "f to be a module or a function; got int": lambda _: iz.GlowStep(4, 3),
        "f to be a module or a function; got NoneType": lambda _: iz.HINTCoupling(4, lambda n, m: None),
    },
    iz.MaskedAutoregressive: {
        "hidden to be an int; got 2.0": lambda kind: kind(5, (4, 2.0)),
        "activation to be a function; got str": lambda kind: kind(5, activation="relu"),
        "side inputs among []; got ['context']": lambda kind: kind(5)(ones(2, 5), context=ones(2, 3)),
    },
    iz.InvertibleLinear: {
        "in_features to be an int; got 2.0": lambda kind: kind(2.0),
        "in_features to be an int; got True": lambda kind: kind(True),
        "max_log_scale to be a number; got '1'": lambda kind: kind(4, kind="plu", max_log_scale="1"),
        "layer to be a bijection with a log-determinant; got one without": lambda kind: kind(4, 6).log_det(ones(2, 4)),
        "conditioner to return a Tensor; got list": lambda kind: kind(4, conditioner=lambda _: [1.0])(X, context=0),
        "conditioner to be a module or a function; got int": lambda kind: kind(4, conditioner=3),
        "context to be what the conditioner takes; got None": lambda kind: kind(4, conditioner=net)(X),
        "side inputs among []; got ['context']": lambda kind: kind(4)(X, context=ones(3, 2)),
    },
    iz.InvertibleConv1x1: {
        "layer to be a bijection with a log-determinant; got one without": lambda kind: kind(4, 6).log_det(
            ones(2, 4, 4)
        ),
        "conditioner to be a module or a function; got str": lambda kind: kind(4, conditioner="net"),
        "out_channels to be an int; got 12.0": lambda _: iz.InvertiblePatchConv(3, 12.0, 2),
    },
    iz.WoodburyLinear: {"rank to be an int; got 1.0": lambda kind: kind(4, 1.0)},
    iz.OrthogonalUpsample: {"stride to be an int; got 2.0": lambda kind: kind(4, (2, 2.0))},
    iz.EmergingConv: {
        "channels to be an int; got 4.0": lambda kind: kind(4.0, 3),
        "kernel_size to be an int or a tuple of them; got '3'": lambda kind: kind(4, "3"),
        "kernel_size to be an int; got True": lambda kind: kind(4, True),
    },
    iz.PeriodicConv: {
        "kernel_size to be an int or a tuple of them; got None": lambda kind: kind(4, None),
        "kernel_size to be an int; got 2.0": lambda kind: kind(4, (3, 2.0)),
    },
    iz.ActNorm: {
        "max_log_scale to be a number; got 'a'": lambda kind: kind(3, max_log_scale="a"),
        "side inputs among []; got ['context']": lambda kind: kind(3)(ones(2, 3), context=1),
    },
    iz.ElementwiseAffine: {
        "conditioner to be a module or a function; got int": lambda kind: kind(3, conditioner=3),
        "side inputs among []; got ['context']": lambda kind: kind(3)(ones(2, 3), context=1),
        "context to be what the conditioner takes; got None": lambda kind: kind(3, conditioner=net)(ones(2, 3)),
    },
    iz.ConditionalAffine: {
        "conditioner to return real numbers; got torch.complex64": lambda kind: kind(lambda c: c + 0j)(
            X, context=ones(3, 8)
        ),
        "conditioner to be a module or a function; got NoneType": lambda kind: kind(None),
        "conditioner to return a Tensor; got list": lambda kind: kind(lambda c: [c])(ones(2, 3), context=1),
    },
    iz.InvertibleBatchNorm: {
        "input to be of the layer's dtype torch.float32; got torch.float64": lambda kind: kind(3, affine=False)(
            ones(2, 3).double()
        ),
        f"inverse to be given y, mean and std, {RETURNED} and 1 statistics": lambda kind: kind(3).inverse(
            ones(2, 3), ones(3)
        ),
        f"inverse to be given y, mean and std, {RETURNED} alone": lambda kind: kind(3, track_running_stats=False).inv(
            ones(2, 3)
        ),
    },
    iz.InvertibleRMSNorm: {
        "input to be of the layer's dtype torch.float32; got torch.float64": lambda kind: kind(4)(X.double()),
    },
    iz.InvertibleLayerNorm: {
        "normalized_shape to be an int; got 1.5": lambda kind: kind(1.5),
        f"inverse to be given y, mean, rstd, {RETURNED} and 1 statistics": lambda kind: kind(3).inverse(ones(2, 3), X),
    },
    iz.InvertibleLeakyReLU: {"negative_slope to be a number; got '0.1'": lambda kind: kind("0.1")},
    iz.InvertibleSigmoid: {"eps to be a number; got None": lambda kind: kind(None)},
    iz.InvertibleTanh: {"x to be real floating point; got torch.int64": lambda kind: kind().log_det(ones(3).long())},
    iz.Monotone: {"curve to be a module or a function; got int": lambda kind: kind(3)},
    iz.UnconstrainedMonotonic: {"order to be an int; got 1.5": lambda kind: kind(3, order=1.5)},
    iz.InvertibleResidual: {
        "f to be a module or a function; got int": lambda kind: kind(3),
        "max_iterations to be an int; got 1.5": lambda kind: kind(net, max_iterations=1.5),
        "x to be real floating point; got torch.int64": lambda kind: kind(net).log_det(ones(2, 3).long()),
        "side inputs among []; got ['mask']": lambda kind: kind(len)(X, mask=1),
    },
    iz.Leapfrog: {
        "f to be a module or a function; got int": lambda kind: kind(3),
        "first stream to be floating point or complex; got torch.int64": lambda kind: kind(net)(X.long(), X),
    },
    iz.MomentumResidual: {"f to be a module or a function; got NoneType": lambda kind: kind(None)},
    iz.Permute: {
        "permutation to be a sequence of ints; got 3": lambda kind: kind(3),
        "permutation to be a sequence of ints; got '10'": lambda kind: kind("10"),
        "permutation to be a sequence of ints; got [0.0, 1.0]": lambda kind: kind([0.0, 1.0]),
        "permutation to be a sequence of ints; got [[1, 0]]": lambda kind: kind([[1, 0]]),
        "permutation to be a sequence of ints; got tensor([1., 0.])": lambda kind: kind(torch.tensor([1.0, 0.0])),
        "permutation to be a sequence of ints; got tensor(0)": lambda kind: kind(torch.tensor(0)),
        "permutation to be a sequence of ints; got tensor([[1, 0]])": lambda kind: kind(torch.tensor([[1, 0]])),
    },
    iz.Shuffle: {"features to be an int; got 2.0": lambda kind: kind(2.0)},
    iz.Swap: {
        "inputs to be one tensor or several; got none": lambda kind: kind()(),
        "y to be one Tensor or two; got int, int": lambda kind: kind().inverse(1, 2),
        "x to be one Tensor or two; got Tensor, Tensor, Tensor": lambda kind: kind()(X, X, X),
    },
    iz.Unsqueeze: {
        "factor to be an int; got 2.0": lambda kind: kind(2.0),
        "factor to be an int; got True": lambda kind: kind(True),
        "factor to be an int; got '2'": lambda kind: kind("2"),
    },
    iz.Squeeze: {
        "factor to be an int; got 1.5": lambda kind: kind([2, 1.5]),
        "factor to be an int; got None": lambda kind: kind(None),
    },
    iz.Reshape: {
        "input_shape to be a sequence of ints; got 3": lambda kind: kind(3, (12,)),
        "output_shape to be a sequence of ints; got '34'": lambda kind: kind((12,), "34"),
        "input_shape to be a sequence of ints; got (3.0, 4)": lambda kind: kind((3.0, 4), (12,)),
        "output_shape to be a sequence of ints; got None": lambda kind: kind((12,), None),
    },
    iz.Augment: {"side inputs among []; got ['context']": lambda kind: kind(1)(ones(2, 3), context=ones(2, 1))},
    iz.Slice: {
        "distribution to be a module or a function that returns a Distribution; got Normal": lambda kind: kind(
            1, distribution=Normal(0.0, 1.0)
        )
    },
    iz.Abs: {
        "distribution to return a Distribution; got Tensor": lambda kind: kind(distribution=torch.sign).inverse(
            ones(2, 3)
        )
    },
    iz.Dequantize: {
        "x to be a Tensor of integers, of any dtype; got torch.complex64": lambda kind: kind()(ones(1, 1) + 0j),
        "y to be real floating point; got torch.int64": lambda kind: kind().inverse(ones(1, 1).long()),
    },
    iz.Repeat: {
        "layer to be an InvertibleModule; got Linear. Plain layers belong outside the stack...": lambda kind: kind(
            nn.Linear(1, 1), 2
        )
    },
    iz.HINTCoupling: {
        "features to be an int; got 2.0": lambda kind: kind(2.0, nn.Linear),
        "subnet to be a function of two sizes; got int": lambda kind: kind(4, 3),
    },
}


CASES = [
    pytest.param(error, kind, message, call, id=f"{kind.__name__}: {message}")
    for error, refused in ((ValueError, VALUE_ERRORS), (TypeError, TYPE_ERRORS))
    for kind, calls in refused.items()
    for message, call in calls.items()
]


@pytest.mark.filterwarnings("ignore:ActNorm")
@pytest.mark.parametrize(("error", "kind", "message", "call"), CASES)
def test_what_is_refused(error, kind, message, call):
    words = re.escape(f"{kind.__name__}: Expected {message}").replace(r"\.\.\.", "(?s:.*)")
    with pytest.raises(error, match=f"^{words}(\n|$)"):
        call(kind)
