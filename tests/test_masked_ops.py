"""Masked layers: golden figures, dense layers with zeros, planted NaN, every layout and dtype, autograd, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from demp import CASES
from helpers import each_dtype, same_bits
from tolerances import Row, close

import torsion
from torsion.ops import _native
from torsion.ops._activations import ACTIVATIONS, plain

linear, conv = torsion.ops.masked_linear, torsion.ops.masked_conv2d
needs_c = pytest.mark.skipif(_native.C is None, reason=_native.missing.get("_C", ""))
each_act = pytest.mark.parametrize("act", ACTIVATIONS)
GOLDEN = Row(1e-13, atol=1e-13, why="the golden figure")
SUMS = {
    torch.float64: Row(0.0, scale=1e-13, why="the order of summation is free"),
    torch.float32: Row(0.0, scale=1e-5, why="1e-5 sqrt(K') of the specification, K' below 100"),
    torch.bfloat16: Row(0.0, scale=4e-2, why="8 bits, once for the product and once for the activation"),
    torch.float16: Row(0.0, scale=5e-3, why="11 bits, once for the product and once for the activation"),
}


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def index(n, share, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(n, generator=g) < share).nonzero().flatten().int()


def dead(n, live):
    mask = torch.ones(n, dtype=torch.bool)
    mask[live.long()] = False
    return mask


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


# Golden


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
    live = F.relu(F.batch_norm(z, None, None, gamma[o.long()], beta[o.long()], True, 0.1, inputs["eps"]))
    y = torch.zeros(3, 3, dtype=torch.float64).index_copy(1, o.long(), live)
    close(y, f64(expected["Y"]), GOLDEN)
    loss = 0.5 * (live - target[:, o.long()]).square().sum()
    close(loss, expected["loss"], GOLDEN)
    loss.backward()
    for t, name in ((x, "dX"), (w, "dW"), (gamma, "dgamma"), (beta, "dbeta")):
        close(t.grad, f64(expected[name]), GOLDEN, name)
    assert b.grad.abs().max() < 1e-14


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


# Linear layers against the reference

SHARES = [(0.0, 0.5), (0.5, 0.0), (0.0, 0.0), (0.5, 0.5), (0.9, 0.3), (1.0, 0.5), (0.5, 1.0)]


def check(op, reference, tensors, i, o, k, n, channel, dtype, **options):
    """Values and gradients, with NaN planted wherever something is dead."""
    wide = torch.float64
    x, w, b = tensors
    expected = leaves(*(None if t is None else t.to(wide) for t in (x, w)), *([] if b is None else [b.to(wide)]))
    y64 = reference(*expected, *([None] if b is None else []), i, o, **options)
    dy = torch.randn(y64.shape, dtype=wide).to(dtype)
    y64.backward(dy.to(wide))
    x, w, b = x.clone(), w.clone(), b if b is None else b.clone()
    dy = dy.clone()
    x.movedim(channel, 0)[dead(k, i)] = torch.nan
    dy.movedim(channel, 0)[dead(n, o)] = torch.nan
    w[dead(n, o)] = torch.nan
    if w.shape[1] == k:
        w[:, dead(k, i)] = torch.nan
    if b is not None:
        b[dead(n, o)] = torch.nan
    found = [t.requires_grad_() for t in (x, w, b) if t is not None]
    y = op(*found, *([None] if b is None else []), i, o, **options)
    y.backward(dy)
    row = SUMS[dtype]
    assert y.dtype == dtype
    close(y, y64, row, "y")
    for t, e, name in zip(found, expected, ("dx", "dw", "db"), strict=False):
        close(t.grad, e.grad, row, name)
        assert t.grad.dtype == dtype
    assert not y.movedim(channel, 0)[dead(n, o)].any()
    assert not x.grad.movedim(channel, 0)[dead(k, i)].any()
    assert not w.grad[dead(n, o)].any()


@each_act
@each_dtype()
@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_against_float64(shares, dtype, act, bias):
    k, n = 70, 53
    i, o = index(k, shares[0]), index(n, shares[1], 1)
    tensors = [torch.randn(2, 9, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)]
    tensors.append(torch.randn(n).to(dtype) if bias else None)
    check(linear, torsion.reference.masked_linear, tensors, i, o, k, n, -1, dtype, act=act)


@each_act
@each_dtype(torch.float32, torch.float64)
@pytest.mark.parametrize("sizes", [(1, 1), (16, 32), (40, 53), (70, 20), (0, 5), (5, 0)], ids=str)
def test_prefixes_are_views_with_the_same_result(sizes, dtype, act):
    """Live units that come first go by other code than scattered ones."""
    k, n = 70, 53
    i, o = (torch.arange(s, dtype=torch.int32) for s in sizes)
    tensors = [torch.randn(9, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)]
    check(linear, torsion.reference.masked_linear, tensors, i, o, k, n, -1, dtype, act=act)


@pytest.mark.parametrize(("k", "n", "m"), [(1, 1, 1), (3, 2, 5), (17, 15, 1), (64, 64, 3), (65, 129, 33), (257, 31, 8)])
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


# All live


@each_act
@each_dtype()
@pytest.mark.parametrize("lists", ["none", "whole", "mixed"])
def test_all_live_is_dense_bit_for_bit(act, dtype, lists):
    i = None if lists == "none" else torch.arange(20, dtype=torch.int32)
    o = torch.arange(16, dtype=torch.int32) if lists == "whole" else None
    for x, w, dense, op in (
        (torch.randn(7, 20), torch.randn(16, 20), F.linear, linear),
        (torch.randn(2, 20, 6, 6), torch.randn(16, 20, 3, 3), F.conv2d, conv),
    ):
        a, b = leaves(x.to(dtype), w.to(dtype)), leaves(x.to(dtype), w.to(dtype))
        y, expected = op(*a, None, i, o, act=act), plain(dense(*b), act)
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


# Convolutions

CONVS = {
    "plain": dict(),
    "same": dict(padding="same"),
    "same-even": dict(padding="same", kernel=(2, 4)),
    "strided": dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "pointwise": dict(kernel=(1, 1)),
    "grouped": dict(groups=3, padding=1),
    "depthwise": dict(groups=12, padding=1),
    "multiplier": dict(groups=6, padding=1),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_convolutions_against_float64(name, shares, layout, act):
    options = dict(CONVS[name])
    kernel, groups = options.pop("kernel", (3, 3)), options.get("groups", 1)
    k, n = 12, 24
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(2, k, 9, 8).contiguous(memory_format=form)
    w = torch.randn(n, k // groups, *kernel) / (k // groups * kernel[0] * kernel[1]) ** 0.5
    i, o = index(k, shares[0]), index(n, shares[1], 1)
    check(
        conv, torsion.reference.masked_conv2d, [x, w, torch.randn(n)], i, o, k, n, 1, torch.float32, act=act, **options
    )


@each_dtype()
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_convolution_dtypes(dtype, layout):
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(2, 12, 6, 5).to(dtype).contiguous(memory_format=form)
    tensors = [x, (torch.randn(10, 12, 3, 3) / 10).to(dtype), torch.randn(10).to(dtype)]
    check(
        conv, torsion.reference.masked_conv2d, tensors, index(12, 0.6), index(10, 0.6, 1), 12, 10, 1, dtype,
        act="relu", padding=1,
    )  # fmt: skip


def test_memory_format_is_that_of_the_dense_layer():
    w, i, o = torch.randn(8, 6, 3, 3), index(6, 0.6), index(8, 0.6, 1)
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 5, 5).contiguous(memory_format=form)
        assert conv(x, w, None, i, o).is_contiguous(memory_format=form)
    assert conv(torch.randn(6, 5, 5), w, None, i, o, act="relu").shape == (8, 3, 3)


def test_compact_convolution():
    x, w, b = torch.randn(2, 6, 5, 5), torch.randn(8, 6, 3, 3), torch.randn(8)
    i, o = index(6, 0.6), index(8, 0.6, 1)
    full = conv(x, w, b, i, o, act="relu")
    compact = conv(x[:, i.long()], w, b, i, o, act="relu", x_compact=True, y_compact=True)
    assert same_bits(compact, full[:, o.long()].contiguous())


# Autograd


@each_act
def test_gradcheck(act):
    i, o = index(7, 0.6), index(6, 0.6, 1)
    torch.manual_seed(1)
    x, w, b = leaves(torch.randn(4, 7).double(), torch.randn(6, 7).double(), torch.randn(6).double())
    assert torch.autograd.gradcheck(lambda *t: linear(*t, i, o, act), (x, w, b))
    x, w, b = leaves(torch.randn(1, 4, 5, 5).double(), torch.randn(6, 2, 3, 3).double(), torch.randn(6).double())
    i, o = index(4, 0.7), index(6, 0.6, 1)
    assert torch.autograd.gradcheck(lambda *t: conv(*t, i, o, groups=2, act=act), (x, w, b))


@pytest.mark.parametrize("through", ["function", "op"])
def test_second_derivatives_raise(through):
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    i = torch.tensor([0, 2], dtype=torch.int32)
    op = linear if through == "function" else torch.ops.torsion.masked_linear
    y = op(x, w, None, i, None, "silu")
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        g.sum().backward()


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_wanted_gradients(wanted):
    i, o = index(7, 0.6), index(6, 0.6, 1)
    for op, xs, ws in ((linear, (4, 7), (6, 7)), (conv, (2, 7, 5, 5), (6, 7, 3, 3))):
        tensors = [torch.randn(s, requires_grad=r) for s, r in zip((xs, ws, (6,)), wanted, strict=True)]
        y = op(*tensors, i, o, act="relu")
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.sum().backward()
        assert [t.grad is not None for t in tensors] == list(wanted)


def test_what_is_saved():
    """One bit per live output for ReLU, nothing without activation; x and the weight by reference."""
    m, k, n = 64, 40, 30
    i, o = index(k, 0.5), index(n, 0.5, 1)
    x, w = torch.randn(m, k, requires_grad=True), torch.randn(n, k, requires_grad=True)
    operands = {t.data_ptr() for t in (x, w, i, o)}

    def saved(act):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            linear(x, w, None, i, o, act)
        return sum(t.nbytes for t in kept if t.data_ptr() not in operands)

    sizes = {act: saved(act) for act in ACTIVATIONS}
    assert sizes["none"] == 0
    assert sizes["relu"] == (m * len(o) + 7) // 8
    assert sizes["gelu"] == sizes["silu"] == m * len(o) * 4


def test_relu_takes_nan_as_torch_does():
    x = torch.tensor([[1.0, torch.nan, -1.0, 0.0]]).t().contiguous().requires_grad_()
    w, o = torch.eye(1).repeat(3, 1), torch.tensor([1], dtype=torch.int32)
    y = linear(x, w, None, None, o, "relu")
    y.backward(torch.ones_like(y))
    z = x.detach().clone().requires_grad_()
    F.relu(z).backward(torch.ones_like(z))
    assert same_bits(y[:, 1].detach(), F.relu(z).detach()[:, 0])
    assert same_bits(x.grad, z.grad)


def test_writing_to_an_operand_is_noticed():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y = linear(x, w, None, torch.tensor([0, 2], dtype=torch.int32))
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does(dtype):
    i, o = index(8, 0.6), index(6, 0.6, 1)
    x, w, b = torch.randn(5, 8), torch.randn(6, 8, requires_grad=True), torch.randn(6, dtype=dtype)
    for op in (linear, torch.ops.torsion.masked_linear):
        with torch.autocast("cpu", dtype):
            y = op(x, w, b, i, o, "relu")
            assert y.dtype == F.linear(x, w, b).dtype == dtype
            assert op(x, w, b).dtype == dtype
        close(y, torsion.reference.masked_linear(x, w, b.float(), i, o, "relu"), SUMS[dtype])
        y.sum().backward()
        assert w.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        assert linear(x.double(), w.double(), None, i, o).dtype == torch.float64
        assert conv(torch.randn(1, 4, 5, 5), torch.randn(3, 4, 3, 3), None, index(4, 0.6)).dtype == dtype


# The ops


@each_act
def test_opcheck(act):
    i, o = index(7, 0.6), index(6, 0.6, 1)
    x, w, b = leaves(torch.randn(4, 7), torch.randn(6, 7), torch.randn(6))
    ops = torch.ops.torsion
    compact = (x[:, i.long()].detach(), w, None, i, o, act, True, True, True)
    for arguments in ((x, w, b, i, o, act, False, False, True), compact):
        assert set(torch.library.opcheck(ops.masked_linear_forward.default, arguments).values()) == {"SUCCESS"}
    x, w, b = leaves(torch.randn(2, 7, 5, 5), torch.randn(6, 7, 3, 3), torch.randn(6))
    for form in (torch.contiguous_format, torch.channels_last):
        a = x.detach().contiguous(memory_format=form).requires_grad_()
        arguments = (a, w, b, i, o, [2, 1], [1, 1], [1, 1], 1, act, False, False, True)
        assert set(torch.library.opcheck(ops.masked_conv2d_forward.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["masked_linear", "masked_conv2d"])
def test_the_op_is_the_function(name):
    i, o = index(7, 0.6), index(6, 0.6, 1)
    shapes = ((4, 7), (6, 7)) if name == "masked_linear" else ((2, 7, 5, 5), (6, 7, 3, 3))
    a, b = leaves(*map(torch.randn, shapes)), None
    b = leaves(*a)
    y = getattr(torsion.ops, name)(*a, None, i, o, act="relu")
    z = getattr(torch.ops.torsion, name)(*b, None, i, o, act="relu")
    assert same_bits(y.detach(), z.detach())
    y.sum().backward()
    z.sum().backward()
    assert all(same_bits(s.grad, t.grad) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["masked_linear", "masked_conv2d"])
def test_compile(name):
    """One graph for forward and backward; lists are looked into when it runs."""
    i, o = index(7, 0.6), index(6, 0.6, 1)
    shapes = ((4, 7), (6, 7)) if name == "masked_linear" else ((2, 7, 5, 5), (6, 7, 3, 3))
    op = getattr(torsion.ops, name)
    compiled = torch.compile(lambda x, w, i: op(x, w, None, i, o, act="relu"), backend="aot_eager", fullgraph=True)
    a = leaves(*map(torch.randn, shapes))
    b = leaves(*a)
    y, z = compiled(*a, i), op(*b, None, i, o, act="relu")
    assert same_bits(y.detach(), z.detach())
    y.sum().backward()
    z.sum().backward()
    assert all(same_bits(s.grad, t.grad) for s, t in zip(a, b, strict=True))
    with pytest.raises(Exception, match="sort it and drop repetitions"):
        compiled(*a, i.flip(0).contiguous())


def test_fake_tensors_need_no_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w = torch.empty(4, 1 << 20), torch.empty(1 << 19, 1 << 20)
        i = torch.empty(7, dtype=torch.int32)
        assert torch.ops.torsion.masked_linear(x, w, None, i, None, "relu").shape == (4, 1 << 19)
        y = torch.ops.torsion.masked_conv2d(torch.empty(2, 9, 8, 8), torch.empty(5, 9, 3, 3), None, i)
        assert y.shape == (2, 5, 6, 6)


# Errors


def i32(*entries):
    return torch.tensor(entries, dtype=torch.int32)


BAD = {
    "int64": (dict(in_idx=torch.tensor([0, 1])), TypeError, r"in_idx is torch.int64, must be torch.int32"),
    "dims": (dict(out_idx=i32(0, 1).view(1, 2)), ValueError, r"out_idx must have one dim, has shape \[1, 2\]"),
    "order": (dict(in_idx=i32(0, 3, 1)), ValueError, r"in_idx\[2\]=1 follows 3; sort it and drop repetitions"),
    "twice": (dict(out_idx=i32(1, 1)), ValueError, r"out_idx\[1\]=1 follows 1"),
    "above": (dict(in_idx=i32(0, 4)), ValueError, r"in_idx\[1\]=4 lies outside \[0, 4\)"),
    "below": (dict(out_idx=i32(-1, 2)), ValueError, r"out_idx\[0\]=-1 lies outside \[0, 5\)"),
    "too-many": (dict(in_idx=i32(0, 1, 2, 3, 4)), ValueError, "in_idx lists 5 of 4 units"),
    "whole-but-wrong": (dict(in_idx=i32(0, 1, 3, 3)), ValueError, r"in_idx\[3\]=3 follows 3"),
    "act": (dict(act="tanh"), ValueError, "act='tanh' is unknown; use one of none, relu, gelu, silu"),
    "weight-dtype": (dict(weight="double"), TypeError, "weight is torch.float64, x is torch.float32"),
    "bias-dtype": (dict(bias=torch.zeros(5).half()), TypeError, "bias is torch.float16"),
    "bias-size": (dict(bias=torch.zeros(4)), ValueError, r"bias must have shape \[5\], has \[4\]"),
    "integers": (dict(x="int"), TypeError, "x is torch.int64"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("layer", ["masked_linear", "masked_conv2d"])
def test_bad_arguments(layer, name):
    change, error, message = BAD[name]
    shapes = ((3, 4), (5, 4)) if layer == "masked_linear" else ((3, 4, 6, 6), (5, 4, 3, 3))
    good = dict(
        x=torch.ones(shapes[0]), weight=torch.ones(shapes[1]), bias=None, in_idx=None, out_idx=i32(0, 2), act="none"
    )
    if isinstance(change.get("weight"), str) or isinstance(change.get("x"), str):
        ((name, _),) = change.items()
        change = {name: good[name].double() if name == "weight" else good[name].long()}
    arguments = {**good, **change}
    with pytest.raises(error, match=message):
        getattr(torsion.ops, layer)(**arguments)
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.torsion, layer)(**arguments)


def test_bad_shapes():
    with pytest.raises(ValueError, match="x has 3 columns, the weight takes 4"):
        linear(torch.ones(2, 3), torch.ones(5, 4))
    with pytest.raises(ValueError, match="x has 4 columns, the weight takes 2"):
        linear(torch.ones(2, 4), torch.ones(5, 4), None, i32(0, 1), x_compact=True)
    with pytest.raises(ValueError, match=r"weight must be \[N, K\]"):
        linear(torch.ones(2, 4), torch.ones(5, 4, 1, 1))
    with pytest.raises(ValueError, match="x has 3 channels, the weight takes 4"):
        conv(torch.ones(2, 3, 5, 5), torch.ones(5, 4, 3, 3), None, i32(0))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        conv(torch.ones(2, 4, 2, 5), torch.ones(5, 4, 3, 3), None, i32(0))
    with pytest.raises(ValueError, match="groups=2 does not divide the 5"):
        conv(torch.ones(2, 4, 5, 5), torch.ones(5, 2, 3, 3), None, i32(0), groups=2)
    with pytest.raises(ValueError, match="stride=0"):
        conv(torch.ones(2, 4, 5, 5), torch.ones(5, 4, 3, 3), None, i32(0), stride=0)
    with pytest.raises(ValueError, match="padding='full'"):
        conv(torch.ones(2, 4, 5, 5), torch.ones(5, 4, 3, 3), None, i32(0), padding="full")
    with pytest.raises(ValueError, match="needs stride 1"):
        conv(torch.ones(2, 4, 5, 5), torch.ones(5, 4, 3, 3), None, i32(0), padding="same", stride=2)


# The order of live units, packing, shortcuts


def test_live_prefix():
    live = torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.uint8)
    order = torsion.ops.LivePrefix(live)
    assert order.order.tolist() == [1, 3, 4, 0, 2, 5]
    assert order.inverse.tolist() == [3, 0, 4, 1, 2, 5]
    assert order.count == 3
    assert order.index.tolist() == [0, 1, 2]
    assert order.index.dtype == torch.int32
    t = torch.randn(6, 4)
    assert torch.equal(order.restore(order.sort(t)), t)
    assert torch.equal(order.sort(t.t(), 1), order.sort(t).t())
    with pytest.raises(TypeError, match=r"live is torch\.float32"):
        torsion.ops.LivePrefix(live.float())
    with pytest.raises(ValueError, match="one dim"):
        torsion.ops.LivePrefix(live.view(2, 3))


def test_a_sorted_network_is_the_masked_one():
    """Two layers with scattered lists against the same two sorted once, compact in between."""
    hidden = torch.rand(40) < 0.5
    order, o = torsion.ops.LivePrefix(hidden), hidden.nonzero().flatten().int()
    x, w1, b1, w2 = torch.randn(9, 20), torch.randn(40, 20), torch.randn(40), torch.randn(10, 40)
    expected = linear(linear(x, w1, b1, None, o, "relu"), w2, None, o)
    h = linear(x, order.sort(w1), order.sort(b1), None, order.index, "relu", y_compact=True)
    found = linear(h, order.sort(w2, 1), None, order.index, x_compact=True)
    close(found, expected, SUMS[torch.float32])


@each_dtype()
@pytest.mark.parametrize("kernel", [(), (3, 2)], ids=["linear", "conv"])
@pytest.mark.parametrize("align", [1, 8, 16])
def test_pack_and_unpack(dtype, kernel, align):
    i, o = index(21, 0.5), index(17, 0.5, 1)
    w = torch.randn(17, 21, *kernel).to(dtype)
    packed = torsion.ops.pack_weight(w, i, o, align)
    assert packed.shape[:2] == (-(-len(o) // align) * align, -(-len(i) // align) * align)
    assert same_bits(packed[: len(o), : len(i)].contiguous(), w[o.long()][:, i.long()].contiguous())
    assert not packed[len(o) :].any()
    assert not packed[:, len(i) :].any()
    packed[len(o) :] = torch.nan
    full = torch.full_like(w, torch.nan)
    version = full._version
    assert torsion.ops.unpack_grad_(full, packed, i, o) is full
    assert full._version > version
    expected = torch.zeros_like(w)
    expected[o.long().unsqueeze(1), i.long()] = w[o.long()][:, i.long()]
    assert same_bits(full, expected)
    assert same_bits(torch.ops.torsion.pack_weight(w), torsion.ops.pack_weight(w, align=16))
    with pytest.raises(ValueError, match="align=0"):
        torsion.ops.pack_weight(w, i, o, 0)
    with pytest.raises(ValueError, match="live block is"):
        torsion.ops.unpack_grad_(full, packed[: len(o) - 1], i, o)


@pytest.mark.parametrize("prefix", [False, True], ids=["scattered", "prefix"])
def test_residual_select_add(prefix):
    """Branches with differing live sets: the channels alive in both are added, and gradients go the same way back."""
    src, dst = (torch.arange(3, dtype=torch.int32),) * 2 if prefix else (i32(0, 2, 5), i32(1, 3, 4))
    x, out = torch.randn(2, 6, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4, requires_grad=True)
    y = torsion.ops.residual_select_add_(out * 1, x, src, dst)
    expected = out.detach().clone()
    expected[:, dst.long()] += x.detach()[:, src.long()]
    assert torch.equal(y.detach(), expected)
    g = torch.randn_like(y)
    y.backward(g)
    assert torch.equal(out.grad, g)
    dx = torch.zeros_like(x)
    dx[:, src.long()] = g[:, dst.long()]
    assert torch.equal(x.grad, dx)
    with pytest.raises(ValueError, match="src_idx lists 3 channels, dst_idx 1"):
        torsion.ops.residual_select_add_(y.detach(), x, src, dst[:1])
    with pytest.raises(RuntimeError, match=r"src_idx is torch\.int64"):
        torch.ops.torsion.residual_select_add_(y.detach(), x, src.long(), dst)


# The compiled parts against plain torch


@needs_c
@each_dtype()
@pytest.mark.parametrize("inner", [None, 1, 5], ids=str)
def test_gather_and_scatter(dtype, inner):
    ops = torch.ops.torsion
    for rows, columns in itertools.product((1, 5, 40), (1, 8, 17, 100)):
        shape = (rows, columns) if inner is None else (rows, columns, inner)
        t = torch.randn(shape).to(dtype)
        lists = [None, index(columns, 0.5), torch.arange(columns, dtype=torch.int32), index(columns, 0.95, 3),
                 torch.randperm(columns).int(), index(columns, 0.0)]  # fmt: skip
        for r, c in itertools.product((None, index(rows, 0.6, 2)), lists):
            found = ops.gather_blocks(t, r, c)
            expected = t if r is None else t[r.long()]
            expected = expected if c is None else expected[:, c.long()]
            assert same_bits(found, expected.contiguous())
            back = torch.full(shape, torch.nan).to(dtype)
            ops.scatter_blocks_(back, found, r, c)
            whole = torch.zeros(shape).to(dtype)
            whole[(torch.arange(rows) if r is None else r.long()).unsqueeze(1),
                  torch.arange(columns) if c is None else c.long()] = expected  # fmt: skip
            assert same_bits(back, whole)
        padded = torch.cat([index(columns, 0.5), i32(-1, -1)])
        assert not ops.gather_blocks(t, None, padded)[:, -2:].any()


@needs_c
@each_dtype()
def test_relu_bits(dtype):
    for n in (0, 1, 7, 8, 9, 63, 64, 65, 1000):
        z = torch.randn(n).to(dtype)
        z[::5] = 0
        z[1::7] = torch.nan
        y = z.clone()
        bits = torch.ops.torsion.relu_bits_(y)
        assert same_bits(y.nan_to_num(7.0), F.relu(z).nan_to_num(7.0) + 0)
        assert bits.shape == ((n + 7) // 8,)
        found = [(int(bits[i // 8]) >> (i % 8)) & 1 for i in range(n)]
        assert found == [int(not v <= 0) for v in z.tolist()]
        dz = torch.randn(n).to(dtype)
        kept = dz.clone()
        torch.ops.torsion.keep_bits_(kept, bits)
        assert same_bits(kept, torch.where(torch.tensor(found, dtype=torch.bool), dz, torch.zeros_like(dz)))


def test_without_compiled_code_the_parts_are_the_same(monkeypatch):
    """A build without ``_C``, and other devices, take plain torch for what surrounds the products."""
    i, o = index(20, 0.5), index(16, 0.5, 1)
    x, w, b = torch.randn(9, 20), torch.randn(16, 20), torch.randn(16)
    xc, wc = torch.randn(2, 20, 5, 5), torch.randn(16, 5, 3, 3)

    def run():
        found = []
        for op, a, k, options in ((linear, x, w, {}), (conv, xc, wc, dict(groups=4, padding=1))):
            tensors = leaves(a, k, b)
            y = op(*tensors, i, o, act="relu", **options)
            y.square().sum().backward()
            found += [y.detach(), *(t.grad for t in tensors)]
        return found

    compiled = run()
    monkeypatch.setattr(_native, "C", None)
    for a, e in zip(run(), compiled, strict=True):
        close(a, e, SUMS[torch.float32])
    with pytest.raises(ValueError, match=r"in_idx\[1\]=0 follows 1"):
        linear(x, w, None, i32(1, 0))
