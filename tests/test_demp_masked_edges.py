"""Edge case 14 and its neighbours: empty lists, lists looked into at every call, what convolutions save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from masked import i32
from torch import Tensor

import torsion

ACTS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
OPS = {
    "linear": (torsion.ops.masked_linear, (5, 4), (6, 4), (5, 6)),
    "conv": (torsion.ops.masked_conv2d, (2, 4, 5, 5), (6, 4, 3, 3), (2, 6, 3, 3)),
}
each_op = pytest.mark.parametrize("name", OPS)
each_act = pytest.mark.parametrize("act", ACTS)
NONE = i32()


def operands(name: str, bias: bool = True) -> tuple[Any, list[Tensor | None], Tensor]:
    """The op, leaves x, weight and bias, and an incoming gradient."""
    op, x, w, y = OPS[name]
    torch.manual_seed(0)
    tensors = [torch.randn(s).double().requires_grad_() for s in (x, w)]
    return op, [*tensors, torch.randn(6).double().requires_grad_() if bias else None], torch.randn(y).double()


@each_op
@each_act
@pytest.mark.parametrize("ins", [None, i32(1, 2), NONE], ids=["all", "some", "none"])
def test_no_live_output(name: str, act: str, ins: Tensor | None) -> None:
    """All zero, and nothing is read: x, weight, bias and incoming gradient may hold NaN."""
    op, leaves, dy = operands(name)
    with torch.no_grad():
        for t in (*leaves, dy):
            t.fill_(torch.nan)
    y = op(*leaves, ins, NONE, act=act)
    assert y.shape == dy.shape
    assert not y.any()
    y.backward(dy)
    for t in leaves:
        assert t.grad.shape == t.shape
        assert not t.grad.any()


@each_op
@each_act
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("outs", [None, i32(0, 2, 5)], ids=["all", "some"])
def test_no_live_input(name: str, act: str, bias: bool, outs: Tensor | None) -> None:
    """What is left is the activation of the bias, and the bias's gradient."""
    op, leaves, dy = operands(name, bias)
    x, w, b = leaves
    with torch.no_grad():
        x.fill_(torch.nan)
        w.fill_(torch.nan)
    live = torch.arange(6) if outs is None else outs.long()
    y = op(x, w, b, NONE, outs, act=act)
    shape = (1, 6) + (1,) * (dy.dim() - 2)
    z = (torch.zeros(6).double() if b is None else b.detach()).view(shape).expand(dy.shape).clone().requires_grad_()
    full = ACTS[act](z)
    expected = torch.zeros_like(dy)
    expected[:, live] = full.detach()[:, live]
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=0)
    y.backward(dy)
    assert not x.grad.any()
    assert not w.grad.any()
    if b is not None:
        full.backward(dy)
        sums = z.grad.sum([d for d in range(dy.dim()) if d != 1])
        db = torch.zeros(6).double()
        db[live] = sums[live]
        torch.testing.assert_close(b.grad, db, rtol=1e-13, atol=1e-14)


@each_op
def test_lists_are_looked_into_at_every_call(name: str) -> None:
    """On the CPU a list that was right may be changed in place: it is not remembered."""
    op, leaves, _ = operands(name)
    for which in ("in_idx", "out_idx"):
        index = i32(0, 1, 3)
        op(*leaves, **{which: index})
        index[2] = 2
        prefix = op(*leaves, **{which: index})
        assert torch.equal(prefix, op(*leaves, **{which: i32(0, 1, 2)}))
        index[1] = 2
        with pytest.raises(ValueError, match=rf"{which}\[2\]=2 follows 2; sort it and drop repetitions"):
            op(*leaves, **{which: index})


BAD = {
    "int64": (torch.tensor([0, 1]), TypeError, r"is torch\.int64, must be torch\.int32"),
    "order": (i32(1, 0), ValueError, r"\[1\]=0 follows 1"),
    "twice": (i32(1, 1), ValueError, r"\[1\]=1 follows 1"),
    "outside": (i32(0, 4), ValueError, r"\[1\]=4 lies outside \[0, 4\)"),
    "dims": (i32(0, 1).view(1, 2), ValueError, "must have one dim"),
}


@pytest.mark.parametrize("bad", BAD)
def test_every_op_with_lists_refuses_them_by_name(bad: str) -> None:
    index, error, message = BAD[bad]
    weight, out = torch.ones(4, 4), torch.zeros(2, 4, 3)
    calls = {
        "in_idx": [
            lambda: torsion.ops.pack_weight(weight, index, None),
            lambda: torsion.ops.unpack_grad_(weight, torch.ones(4, 2), index, None),
        ],
        "out_idx": [
            lambda: torsion.ops.pack_weight(weight, None, index),
            lambda: torsion.ops.unpack_grad_(weight, torch.ones(2, 4), None, index),
        ],
        "src_idx": [lambda: torsion.ops.residual_select_add_(out, torch.ones(2, 4, 3), index, i32(0, 1))],
        "dst_idx": [lambda: torsion.ops.residual_select_add_(out, torch.ones(2, 4, 3), i32(0, 1), index)],
    }
    for name, several in calls.items():
        for call in several:
            with pytest.raises(error, match=f"{name}.*{message}" if bad in ("int64", "dims") else name + message):
                call()
    assert not out.any()
    assert (weight == 1).all()


def test_a_shortcut_reads_no_dead_channel_and_touches_none() -> None:
    x, out = torch.ones(2, 4, 3), torch.zeros(2, 5, 3)
    x[:, [0, 2]] = torch.nan
    out[:, [0, 4]] = torch.nan
    torsion.ops.residual_select_add_(out, x, i32(1, 3), i32(1, 2))
    assert (out[:, 1:3] == 1).all()
    assert not out[:, 3].any()
    assert out[:, [0, 4]].isnan().all()
    before = out.clone()
    torsion.ops.residual_select_add_(out, x, NONE, NONE)
    assert torch.equal(out.nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_convolution_saves_one_bit_for_each_live_output() -> None:
    """And nothing without activation; x and weight by reference, no second copy of either."""
    x, w = torch.randn(3, 8, 9, 9, requires_grad=True), torch.randn(16, 8, 3, 3, requires_grad=True)
    i, o = i32(0, 3, 5), i32(1, 2, 7, 9, 15)
    operands_ = {t.data_ptr() for t in (x, w, i, o)}

    def saved(act: str) -> int:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            # Compact, for where few are dead a layer may compute, and keep bits of, all of them.
            torsion.ops.masked_conv2d(x, w, None, i, o, act=act, y_compact=True)
        return sum(t.nbytes for t in kept if t.data_ptr() not in operands_)

    elements = 3 * 5 * 7 * 7
    assert saved("none") == 0
    assert saved("relu") == (elements + 7) // 8
    assert saved("gelu") == 4 * elements
