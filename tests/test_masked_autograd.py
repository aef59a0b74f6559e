"""Masked layers as torch ops: gradients, what is saved, autocast, compile, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import same_bits
from masked import SUMS, i32, index, leaves
from tolerances import close

import torsion
from torsion.ops import _native
from torsion.ops._activations import ACTIVATIONS

linear, conv = torsion.ops.masked_linear, torsion.ops.masked_conv2d
needs_c = pytest.mark.skipif(_native.C is None, reason=_native.missing.get("_C", ""))
each_act = pytest.mark.parametrize("act", ACTIVATIONS)


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
    m, k, n = 500, 40, 30
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


@each_act
def test_gradcheck(act):
    i, o = index(7, 0.6), index(6, 0.6, 1)
    torch.manual_seed(1)
    x, w, b = leaves(torch.randn(4, 7).double(), torch.randn(6, 7).double(), torch.randn(6).double())
    assert torch.autograd.gradcheck(lambda *t: linear(*t, i, o, act), (x, w, b))
    x, w, b = leaves(torch.randn(1, 4, 5, 5).double(), torch.randn(6, 2, 3, 3).double(), torch.randn(6).double())
    i, o = index(4, 0.7), index(6, 0.6, 1)
    assert torch.autograd.gradcheck(lambda *t: conv(*t, i, o, groups=2, act=act), (x, w, b))
