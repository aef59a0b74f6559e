"""What the tests of masked layers share: lists of live units, and a check against the reference in float64."""

from __future__ import annotations

import torch
from tolerances import Row, close

GOLDEN = Row(1e-13, atol=1e-13, why="the golden figure")

SUMS = {
    torch.float64: Row(0.0, scale=1e-13, why="the order of summation is free"),
    torch.float32: Row(0.0, scale=1e-5, why="1e-5 sqrt(K') of the specification, K' below 100"),
    torch.bfloat16: Row(0.0, scale=4e-2, why="8 bits, once for the product and once for the activation"),
    torch.float16: Row(0.0, scale=5e-3, why="11 bits, once for the product and once for the activation"),
}


SHARES = [(0.0, 0.5), (0.5, 0.0), (0.0, 0.0), (0.5, 0.5), (0.9, 0.3), (1.0, 0.5), (0.5, 1.0)]


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def i32(*entries):
    return torch.tensor(entries, dtype=torch.int32)


def index(n, share, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(n, generator=g) < share).nonzero().flatten().int()


def dead(n, live):
    mask = torch.ones(n, dtype=torch.bool)
    mask[live.long()] = False
    return mask


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def check(op, reference, tensors, i, o, k, n, channel, dtype, **options):
    """Values and gradients, with NaN, then with finite rubbish planted wherever something is dead."""
    wide = torch.float64
    x, w, b = tensors
    expected = leaves(*(None if t is None else t.to(wide) for t in (x, w)), *([] if b is None else [b.to(wide)]))
    y64 = reference(*expected, *([None] if b is None else []), i, o, **options)
    dy = torch.randn(y64.shape, dtype=wide).to(dtype)
    y64.backward(dy.to(wide))
    row = SUMS[dtype]
    for rubbish in (torch.nan, 3.0):
        planted = [None if t is None else t.clone() for t in (x, w, b, dy)]
        plant(planted, i, o, k, n, channel, rubbish)
        found = [t.requires_grad_() for t in planted[:3] if t is not None]
        y = op(*found, *([None] if b is None else []), i, o, **options)
        y.backward(planted[3])
        assert y.dtype == dtype
        close(y, y64, row, "y")
        for t, e, name in zip(found, expected, ("dx", "dw", "db"), strict=False):
            close(t.grad, e.grad, row, name)
            assert t.grad.dtype == dtype
        assert not y.movedim(channel, 0)[dead(n, o)].any()
        assert not found[0].grad.movedim(channel, 0)[dead(k, i)].any()
        assert not found[1].grad[dead(n, o)].any()


def plant(tensors, i, o, k, n, channel, rubbish):
    x, w, b, dy = tensors
    x.movedim(channel, 0)[dead(k, i)] = rubbish
    dy.movedim(channel, 0)[dead(n, o)] = rubbish
    w[dead(n, o)] = rubbish
    if w.shape[1] == k:
        w[:, dead(k, i)] = rubbish
    if b is not None:
        b[dead(n, o)] = rubbish
