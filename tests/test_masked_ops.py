"""Masked linear layers: golden figures, dense layers with zeros, planted NaN, every layout and dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from demp import CASES
from helpers import each_dtype, same_bits
from masked import GOLDEN, SHARES, SUMS, check, dead, f64, index, leaves
from tolerances import close

import torsion
from torsion.ops import _native
from torsion.ops._activations import ACTIVATIONS, plain

linear, conv = torsion.ops.masked_linear, torsion.ops.masked_conv2d
needs_c = pytest.mark.skipif(_native.C is None, reason=_native.missing.get("_C", ""))
each_act = pytest.mark.parametrize("act", ACTIVATIONS)


def m1():
    inputs = CASES["M1"]["inputs"]
    x, w, b = leaves(*(f64(inputs[k]) for k in "XWb"))
    lists = [torch.tensor(inputs[k], dtype=torch.int32) for k in ("in_idx", "out_idx")]
    return x, w, b, *lists, f64(inputs["target"])


@pytest.mark.parametrize("function", [linear, torsion.reference.masked_linear], ids=["op", "reference"])
def test_golden_linear(function):
    """M1: the incoming gradient of the dead unit, -9, is ignored."""
    x, w, b, i, o, target = m1()
    y = function(x, w, b, i, o, act="relu")
    expected = CASES["M1"]["expected"]
    close(y, f64(expected["Y"]), GOLDEN)
    dy = y.detach() - target
    close(dy, f64(expected["dY"]), GOLDEN)
    y.backward(dy)
    for t, name in ((x, "dX"), (w, "dW"), (b, "db")):
        close(t.grad, f64(expected[name]), GOLDEN, name)


def test_golden_batchnorm():
    """M2: batch normalization in training between the masked layer and its ReLU, on live units only."""
    x, w, b, i, o, target = m1()
    inputs, expected = CASES["M2"]["inputs"], CASES["M2"]["expected"]
    gamma, beta = leaves(f64(inputs["gamma"]), f64(inputs["beta"]))
    z = linear(x, w, b, i, o, y_compact=True)
    close(z.mean(0), f64(expected["mean"]), GOLDEN)
    close(z.var(0, unbiased=False), f64(expected["var"]), GOLDEN)
    y = torsion.ops.masked_linear_bn_act(x, w, b, gamma, beta, None, None, i, o, eps=inputs["eps"])
    close(y, f64(expected["Y"]), GOLDEN)
    loss = 0.5 * (y - target)[:, o.long()].square().sum()
    close(loss, expected["loss"], GOLDEN)
    loss.backward()
    for t, name in ((x, "dX"), (w, "dW"), (gamma, "dgamma"), (beta, "dbeta")):
        close(t.grad, f64(expected[name]), GOLDEN, name)
    assert b.grad.abs().max() < 1e-14


@pytest.mark.parametrize("shape", [(3, 12), (3, 12, 5), (2, 12, 4, 3)], ids=str)
def test_group_norm_with_virtual_zeros(shape):
    """On live channels that of the whole width, where the dead ones are 0; a group may be dead as a whole."""
    live = torch.tensor([0, 2, 3, 8], dtype=torch.int32)
    x = torch.zeros(shape, dtype=torch.float64)
    x[:, live.long()] = torch.randn(x[:, live.long()].shape, dtype=torch.float64)
    for groups in (1, 3, 4):
        found = torsion.reference.group_norm_live(x[:, live.long()], live, 12, groups)
        close(found, F.group_norm(x, groups)[:, live.long()], SUMS[torch.float64])


def test_golden_norms_with_virtual_zeros():
    """V1: statistics over 8 features of which 3 live, and the full width as witness."""
    inputs, expected = CASES["V1"]["inputs"], CASES["V1"]["expected"]
    x, width, eps = f64(inputs["x_live"]), inputs["width"], inputs["eps"]
    full = F.pad(x, (0, width - x.shape[1]))
    layer = torsion.reference.layer_norm_live(x, width, eps)
    close(layer, f64(expected["layer_norm_live"]), GOLDEN)
    close(layer, F.layer_norm(full, (width,), eps=eps)[:, :3], GOLDEN)
    root = torsion.reference.rms_norm_live(x, width, eps)
    close(root, f64(expected["rms_norm_live"]), GOLDEN)
    close(root, F.rms_norm(full, (width,), eps=eps)[:, :3], GOLDEN)


@each_act
@each_dtype()
@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_against_float64(shares, dtype, act, bias, either_way):
    k, n, rows = 70, 53, 150
    i, o = index(k, shares[0]), index(n, shares[1], 1)
    tensors = [torch.randn(2, rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)]
    tensors.append(torch.randn(n).to(dtype) if bias else None)
    check(linear, torsion.reference.masked_linear, tensors, i, o, k, n, -1, dtype, act=act)


@each_act
@each_dtype(torch.float32, torch.float64)
@pytest.mark.parametrize("sizes", [(1, 1), (16, 32), (40, 53), (70, 20), (68, 50), (0, 5), (5, 0)], ids=str)
def test_prefixes_are_views_with_the_same_result(sizes, dtype, act, either_way):
    """Live units that come first go by other code than scattered ones."""
    k, n, rows = 70, 53, 300
    i, o = (torch.arange(s, dtype=torch.int32) for s in sizes)
    tensors = [torch.randn(rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)]
    check(linear, torsion.reference.masked_linear, tensors, i, o, k, n, -1, dtype, act=act)


@each_dtype(torch.float32, torch.bfloat16)
def test_large_gradients_are_zero_beyond_the_live_block(dtype):
    """Above 1 MB the zeros go around the cache, from and to any byte."""
    k, n = 1031, 1027
    i, o = (torch.arange(s, dtype=torch.int32) for s in (51, 33))
    tensors = [torch.randn(5, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)]
    check(linear, torsion.reference.masked_linear, tensors, i, o, k, n, -1, dtype)


@pytest.mark.parametrize(
    ("k", "n", "m"),
    [(1, 1, 1), (3, 2, 5), (17, 15, 1), (64, 64, 3), (65, 129, 33), (257, 31, 8), (33, 47, 1001), (129, 65, 515)],
)
def test_sizes_that_end_anywhere(k, n, m):
    for seed in range(3):
        i, o = index(k, 0.6, seed), index(n, 0.6, seed + 10)
        tensors = [torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.randn(n)]
        check(linear, torsion.reference.masked_linear, tensors, i, o, k, n, -1, torch.float32, act="relu")


@pytest.mark.parametrize("lead", [(), (0,), (3, 0), (2, 3, 4)], ids=str)
def test_leading_dims(lead):
    x, w = torch.randn(*lead, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    i, o = index(6, 0.5), index(5, 0.6)
    y = linear(x, w, None, i, o, "relu")
    assert y.shape == (*lead, 5)
    close(y, torsion.reference.masked_linear(x, w, None, i, o, "relu"), SUMS[torch.float32])
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_strange_layouts():
    """x transposed, expanded and sliced, the weight transposed, the incoming gradient expanded."""
    k, n = 20, 24
    i, o = index(k, 0.5), index(n, 0.5, 1)
    w = torch.randn(k, n).t()
    apart, shifted = torch.randn(6, 2 * k)[:, ::2], torch.randn(6, k + 3)[:, 3:]
    for x in (torch.randn(k, 6).t(), torch.randn(1, k).expand(6, k), apart, shifted):
        xs, ws = leaves(x, w)
        a, b = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = linear(a, b, None, i, o, "relu")
        expected = torsion.reference.masked_linear(xs, ws, None, i, o, "relu")
        close(y, expected, SUMS[torch.float32])
        y.sum().backward()
        expected.sum().backward()
        close(a.grad, xs.grad, SUMS[torch.float32])
        close(b.grad, ws.grad, SUMS[torch.float32])


@each_act
@each_dtype(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("prefix", [False, True], ids=["scattered", "prefix"])
def test_compact_and_full_agree(act, dtype, prefix):
    k, n = 40, 30
    i = torch.arange(17, dtype=torch.int32) if prefix else index(k, 0.5)
    o = torch.arange(11, dtype=torch.int32) if prefix else index(n, 0.5, 1)
    x, w, b, dy = (torch.randn(s).to(dtype) for s in ((9, k), (n, k), (n,), (9, n)))
    found = []
    for xc, yc in itertools.product([False, True], repeat=2):
        xs, ws, bs = leaves(x[:, i.long()] if xc else x, w, b)
        y = linear(xs, ws, bs, i, o, act, x_compact=xc, y_compact=yc)
        y.backward(dy[:, o.long()] if yc else dy)
        assert y.shape == (9, len(o) if yc else n)
        found.append((y if yc else y[:, o.long()], xs.grad if xc else xs.grad[:, i.long()], ws.grad, bs.grad))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            close(a, b, SUMS[dtype])


@each_act
@each_dtype()
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("lists", ["none", "whole", "mixed"])
def test_all_live_is_dense_bit_for_bit(act, dtype, lists, bias):
    i = None if lists == "none" else torch.arange(20, dtype=torch.int32)
    o = torch.arange(16, dtype=torch.int32) if lists == "whole" else None
    for x, w, dense, op in (
        (torch.randn(7, 20), torch.randn(16, 20), F.linear, linear),
        (torch.randn(2, 20, 6, 6), torch.randn(16, 20, 3, 3), F.conv2d, conv),
    ):
        tensors = [t.to(dtype) for t in (x, w, *([torch.randn(16)] if bias else []))]
        a, b = leaves(*tensors), leaves(*tensors)
        y, expected = op(*a, in_idx=i, out_idx=o, act=act), plain(dense(*b), act)
        assert same_bits(y.detach(), expected.detach())
        y.sum().backward()
        expected.sum().backward()
        assert all(same_bits(s.grad, t.grad) for s, t in zip(a, b, strict=True))


def test_dense_where_the_dead_are_zero():
    """What the definition promises: a dense layer whose dead inputs are 0 and whose dead units stay silent."""
    i, o = index(60, 0.5), index(50, 0.5, 1)
    x, w, b = torch.randn(30, 60).double(), torch.randn(50, 60).double(), torch.randn(50).double()
    x[:, dead(60, i)] = 0
    b[dead(50, o)] = -1e3
    (xs, ws, bs), (xd, wd, bd) = leaves(x, w, b), leaves(x, w, b)
    y, dense = linear(xs, ws, bs, i, o, "relu"), F.relu(F.linear(xd, wd, bd))
    close(y, dense, SUMS[torch.float64])
    dy = torch.randn(30, 50).double()
    y.backward(dy)
    dense.backward(dy)
    close(ws.grad, wd.grad, SUMS[torch.float64])
    close(bs.grad, bd.grad, SUMS[torch.float64])
    close(xs.grad[:, i.long()], xd.grad[:, i.long()], SUMS[torch.float64])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("act", ["none", "relu"])
def test_nan_among_the_living_stays_with_them(act, bad):
    """A NaN or Inf in live inputs, weights or gradients reaches what it touches, and dead entries stay 0."""
    for m in (5, 400):
        i, o = index(20, 0.9, 2), index(16, 0.8, 1)
        for where in ("x", "w", "dy"):
            x, w, dy = torch.randn(m, 20), torch.randn(16, 20), torch.randn(m, 16)
            {"x": x, "w": w, "dy": dy}[where][
                int(o[1]) if where == "w" else 2, int(o[1]) if where == "dy" else int(i[1])
            ] = bad
            a, b = leaves(x, w), leaves(x, w)
            y, expected = linear(*a, None, i, o, act), torsion.reference.masked_linear(*b, None, i, o, act)
            y.backward(dy)
            expected.backward(dy)
            for found, e in ((y, expected), (a[0].grad, b[0].grad), (a[1].grad, b[1].grad)):
                assert torch.equal(found.isfinite(), e.isfinite())
                assert not found.nan_to_num()[e == 0].any()
