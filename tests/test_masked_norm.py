"""Masked layers with batch normalization against dense ones whose dead units are cut, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import same_bits
from masked import index, leaves
from tolerances import Row, close

import torsion

SUMS = Row(1e-11, atol=1e-11, why="the order of summation is free")
K, N = 12, 18
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def made(conv, groups=1):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*((3, K, 6, 5) if conv else (4, 5, K)), generator=g, dtype=torch.float64)
    w = torch.randn(N, K // groups, *((3, 3) if conv else ()), generator=g, dtype=torch.float64)
    b, gamma, beta, mean = torch.randn(4, N, generator=g, dtype=torch.float64)
    return x, w, b, gamma, beta, mean, torch.rand(N, generator=g, dtype=torch.float64) + 0.5


def dense(x, w, b, gamma, beta, mean, var, act, training, groups):
    """All units, as torch computes them: normalization treats each by itself."""
    z = F.conv2d(x, w, b, padding=1, groups=groups) if w.dim() == 4 else F.linear(x, w, b).reshape(-1, N)
    y = F.batch_norm(z, mean, var, gamma, beta, training)
    y = {"none": lambda t: t, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}[act](y)
    return y if w.dim() == 4 else y.view(*x.shape[:-1], N)


def masked(x, w, b, gamma, beta, mean, var, i, o, act, training, groups, **form):
    if w.dim() == 2:
        return torsion.ops.masked_linear_bn_act(x, w, b, gamma, beta, mean, var, i, o, act, training=training, **form)
    return torsion.ops.masked_conv2d_bn_act(
        x, w, b, gamma, beta, mean, var, i, o, padding=1, groups=groups, act=act, training=training, **form
    )


@each_mode
@pytest.mark.parametrize("act", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize(("conv", "groups"), [(False, 1), (True, 1), (True, 3)], ids=["linear", "conv", "grouped"])
def test_live_units_are_those_of_the_dense_layer(conv, groups, act, training):
    """Values, gradients and running statistics, NaN planted wherever something is dead."""
    i, o = index(K, 0.6), index(N, 0.5, 1)
    dim = 1 if conv else -1
    dead_in, dead_out = (torch.ones(n, dtype=torch.bool).index_fill(0, t.long(), False) for n, t in ((K, i), (N, o)))
    x, w, b, gamma, beta, mean, var = made(conv, groups)
    x.movedim(dim, 0)[dead_in] = 0
    right = leaves(x, w, b, gamma, beta)
    stats = mean.clone(), var.clone()
    y = dense(*right, *stats, act, training, groups).index_select(dim, o)
    dy = torch.randn_like(y)
    y.backward(dy)

    x.movedim(dim, 0)[dead_in] = torch.nan
    for t in (w, b, gamma, beta):
        t[dead_out] = torch.nan
    mean[dead_out], var[dead_out] = torch.nan, -1.0
    found = leaves(x, w, b, gamma, beta)
    z = masked(*found, mean, var, i, o, act, training, groups)
    full = torch.full_like(z, torch.nan).index_copy(dim, o.long(), dy)
    z.backward(full)
    close(z.index_select(dim, o), y, SUMS, "y")
    assert not z.movedim(dim, 0)[dead_out].any()
    for t, e, name in zip(found, right, ("dx", "dw", "db", "dgamma", "dbeta"), strict=True):
        grad = e.grad
        if name == "dx":
            grad.movedim(dim, 0)[dead_in] = 0
        elif name == "dw" and groups == 1:
            grad[:, dead_in] = 0
        close(t.grad, grad, SUMS, name)
    for after, e in ((mean, stats[0]), (var, stats[1])):
        close(after[o.long()], e[o.long()], SUMS, "running")
    assert mean[dead_out].isnan().all()
    assert (var[dead_out] == -1).all()


@each_mode
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_all_live_is_dense_bit_for_bit(conv, training):
    x, w, b, gamma, beta, mean, var = (t.float() for t in made(conv))
    stats = mean.clone(), var.clone()
    everything = torch.arange(N, dtype=torch.int32)
    y = masked(x, w, b, gamma, beta, mean, var, None, everything, "relu", training, 1)
    assert same_bits(y, dense(x, w, b, gamma, beta, *stats, "relu", training, 1))
    assert same_bits(mean, stats[0])
    assert same_bits(var, stats[1])


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_compact_forms_and_no_live_output(conv):
    x, *rest = made(conv)
    i, o, dim = index(K, 0.6), index(N, 0.5, 1), 1 if conv else -1
    full = masked(x, *rest, i, o, "relu", True, 1)
    compact = masked(x.index_select(dim, i), *rest, i, o, "relu", True, 1, x_compact=True, y_compact=True)
    close(compact, full.index_select(dim, o), SUMS)
    none = torch.empty(0, dtype=torch.int32)
    assert not masked(x, *rest, i, none, "relu", True, 1).any()


def test_memory_format_is_kept():
    x, *rest = made(True)
    y = masked(x.contiguous(memory_format=torch.channels_last), *rest, None, index(N, 0.5, 1), "relu", True, 1)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(act="tanh"), "act='tanh' is unknown"),
        (dict(gamma=torch.ones(3)), r"gamma must have shape \[18\], has \[3\]"),
        (dict(running_var=None), "kept both or neither"),
        (dict(running_mean=None, running_var=None, training=False), "training=False needs running_mean"),
        (dict(out_idx=torch.tensor([2, 1], dtype=torch.int32)), r"out_idx\[1\]=1 follows 2"),
    ],
    ids=["act", "shape", "one-statistic", "evaluation", "list"],
)
def test_what_does_not_fit_is_refused(change, message):
    names = ("x", "weight", "bias", "gamma", "beta", "running_mean", "running_var")
    arguments = dict(zip(names, made(False), strict=True)) | change
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match=message):
        torsion.ops.masked_linear_bn_act(**arguments)
    assert all(same_bits(arguments[k], v) for k, v in before.items())
