"""The detector of dead units: criteria, layouts, NaN, empty batches, early exit, and what is refused."""

from __future__ import annotations

import pytest
import torch
from demp import CASES, each_backend, in_child
from helpers import each_dtype, lay

import torsion
from torsion.ops import _native
from torsion.ops.flags import CRITERIA

needs_c = pytest.mark.skipif(_native.C is None, reason=_native.missing.get("_C", ""))
each_criterion = pytest.mark.parametrize("criterion", CRITERIA)


def look(y, channel_dim=1, criterion="ever_active", tau=0.0, start=None, **options):
    flags = torch.zeros(y.shape[channel_dim], dtype=torch.uint8) if start is None else start.clone()
    count = torch.tensor([5])
    torsion.ops.active_flags_(y, flags, count, channel_dim, criterion, tau, **options)
    assert int(count) == 5 + y.shape[0]
    return flags.tolist()


def judge(y, channel_dim, criterion, tau):
    """Channel by channel, in Python numbers of float64."""
    channels = [c.flatten().double() for c in y.unbind(channel_dim)]
    if criterion == "ever_active":
        return [int(any(v > tau for v in c.tolist())) for c in channels]
    if criterion == "abs_max":
        return [int(any(abs(v) > tau for v in c.tolist())) for c in channels]
    if criterion == "sum_le":
        return [int(float(c.sum()) > tau) for c in channels]
    means = [float(c.abs().mean()) for c in channels]
    return [int(m > tau * sum(means) / len(means)) for m in means]


@each_backend
def test_golden(backend):
    case = CASES["D1"]
    for dtype in (torch.float64, torch.float32):
        y = torch.tensor(case["inputs"]["y"], dtype=dtype)
        for criterion, expected in case["expected"].items():
            tau = case["inputs"].get(f"tau_{criterion}", 0.0)
            assert look(y, criterion=criterion, tau=tau, backend=backend) == expected, criterion


def activation(shape, dtype, dim=1, seed=0):
    """Channels of every kind: silent, negative, one hit at the end or the start, small, ordinary."""
    y = -torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.01
    for c, channel in enumerate(y.unbind(dim)):
        flat = channel.reshape(-1)
        kind = c % 6
        if kind == 0:
            channel.zero_()
        elif kind == 1:
            flat[-1] = 0.5
            channel.copy_(flat.view(channel.shape))
        elif kind == 2:
            flat[0] = 0.5
            channel.copy_(flat.view(channel.shape))
        elif kind == 3:
            channel.mul_(1e-3)
        elif kind == 4:
            channel.neg_()
    return y.to(dtype)


SHAPES = [((3, 7, 5, 4), 1), ((2, 70, 9, 9), 1), ((40, 37), 1), ((300, 130), 1), ((4, 6, 11), -1), ((9, 5), 0),
          ((200, 1), 1), ((1, 200), 1), ((2, 3, 4, 5, 6), 2), ((7,), 0), ((2, 3, 50, 60), 1)]  # fmt: skip


@each_backend
@each_dtype()
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@each_criterion
def test_against_the_judge(shape, dim, dtype, criterion, backend):
    y = activation(shape, dtype, dim)
    for tau in (0.0, 0.05, 0.6):
        assert look(y, dim, criterion, tau, backend=backend) == judge(y, dim, criterion, tau), tau


@each_backend
@each_dtype(torch.float32, torch.float16)
@pytest.mark.parametrize(
    "layout", ["channels_last", "transposed", "every_second", "misaligned", "batch-slice", "channel-slice"]
)
@each_criterion
def test_layouts(layout, dtype, criterion, backend):
    y = activation((4, 37, 6, 5), dtype)
    if layout == "batch-slice":
        y = torch.cat([torch.full_like(y[:1], 9), y, torch.full_like(y[:1], 9)])[1:-1]
    elif layout == "channel-slice":
        y = torch.cat([torch.full_like(y[:, :3], 9), y, torch.full_like(y[:, :3], 9)], 1)[:, 3:-3]
    else:
        y = lay(y, layout)
    for t in (y, y.contiguous(memory_format=torch.channels_last)):
        assert look(t, 1, criterion, 0.05, backend=backend) == judge(t, 1, criterion, 0.05)
    rows = y[:, :, 0, 0]
    for t in (rows, rows.t().contiguous().t(), rows[::2], rows[:, 3:]):
        assert look(t, 1, criterion, 0.05, backend=backend) == judge(t, 1, criterion, 0.05)


@each_backend
@each_dtype()
@each_criterion
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_marks_its_channel_live_and_no_other(layout, dtype, criterion, backend):
    y = lay(torch.zeros(3, 40, 4, 4).to(dtype), layout)
    y[2, 17, 3, 1] = float("nan")
    assert [c for c, live in enumerate(look(y, 1, criterion, 0.1, backend=backend)) if live] == [17]


@each_backend
@each_criterion
def test_infinities(criterion, backend):
    """+Inf is live by every rule, -Inf by those that look at sizes; no other channel changes for it."""
    y = torch.zeros(2, 6)
    y[0, 1], y[1, 2], y[1, 4] = torch.inf, -torch.inf, 0.5
    expected = {"abs_max": [1, 2, 4], "dormant": [1, 2, 4]}.get(criterion, [1, 4])
    assert [c for c, live in enumerate(look(y, 1, criterion, 0.0, backend=backend)) if live] == expected


@each_backend
@each_criterion
def test_nothing_seen(criterion, backend):
    """No batch: no channel is live, and count says why."""
    flags, count = torch.zeros(4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    for shape in ((0, 4), (0, 4, 3, 3)):
        torsion.ops.active_flags_(torch.zeros(shape), flags, count, 1, criterion, backend=backend)
    assert not flags.any()
    assert int(count) == 0
    torsion.ops.active_flags_(torch.ones(3, 4, 0), flags, count, 1, criterion, backend=backend)
    assert not flags.any()
    assert int(count) == 3


@each_backend
@each_criterion
def test_flags_are_never_cleared(criterion, backend):
    start = torch.tensor([1, 0, 1, 0, 0], dtype=torch.uint8)
    assert look(-torch.zeros(3, 5), criterion=criterion, start=start, backend=backend) == start.tolist()


@each_backend
def test_windows_add_up(backend):
    """Batch by batch says what one look at all of them says; sum_le and dormant are or-ed over calls by definition."""
    y = torch.randn(40, 30) - 2.2
    for criterion in ("ever_active", "abs_max"):
        flags, count = torch.zeros(30, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
        for part in y.split(7):
            torsion.ops.active_flags_(part, flags, count, 1, criterion, 1.0, backend=backend)
        assert flags.tolist() == look(y, 1, criterion, 1.0, backend=backend)
        assert int(count) == 40


@needs_c
def test_flagged_channels_are_not_read():
    """A NaN does not show where a flag is set, and reading ends with the first hit of the last channel."""
    y = torch.full((2, 3, 100_000), float("nan"))
    flags, count = torch.ones(3, dtype=torch.uint8) * 3, torch.zeros(1, dtype=torch.int64)
    for t in (y, y.transpose(1, 2).contiguous().transpose(1, 2)):
        for criterion in CRITERIA:
            torsion.ops.active_flags_(t, flags, count, 1, criterion, backend="cpu")
    assert flags.bool().all()


@needs_c
def test_threads_and_instruction_sets_agree():
    code = (
        "import torch, torsion\n"
        "torch.set_num_threads({threads})\n"
        "y = torch.randn(3000, 67, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 1, 67)\n"
        "found = []\n"
        "for t in (y, y.t().contiguous().t(), y.view(30, 100, 67).transpose(1, 2).contiguous()):\n"
        "    for c, tau in (('ever_active', 2.), ('abs_max', 2.), ('sum_le', 10.), ('dormant', .7)):\n"
        "        f = torch.zeros(67, dtype=torch.uint8)\n"
        "        torsion.ops.active_flags_(t, f, torch.zeros(1, dtype=torch.int64), 1, c, tau)\n"
        "        found.append(f.tolist())\n"
        "print(found)"
    )
    first = in_child(code.format(threads=1), TORSION_ISA="0")
    assert "0, 1" in first
    assert in_child(code.format(threads=3), TORSION_ISA="2") == first
    assert in_child(code.format(threads=2), TORSION_ISA="1") == first


def test_no_graph_and_no_random_numbers():
    y = torch.randn(3, 4, requires_grad=True) * 2
    before = torch.get_rng_state()
    look(y)
    torch.ops.torsion.active_flags_(y, torch.zeros(4, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@each_criterion
def test_opcheck(criterion):
    arguments = (
        torch.randn(3, 4, 5),
        torch.zeros(4, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int64),
        1,
        criterion,
    )
    assert set(torch.library.opcheck(torch.ops.torsion.active_flags_.default, arguments).values()) == {"SUCCESS"}


BAD = {
    "criterion": (dict(criterion="silent"), ValueError, "criterion='silent' is unknown; use one of ever_active"),
    "saturation": (dict(criterion="saturation"), ValueError, "saturation.*live_units"),
    "tau": (dict(tau=-0.1), ValueError, "tau=-0.1"),
    "nan": (dict(tau=float("nan")), ValueError, "tau=nan"),
    "dim": (dict(channel_dim=2), ValueError, r"channel_dim=2 is no dim of y, whose shape is \(3, 4\)"),
    "dtype": (dict(y=torch.zeros(3, 4, dtype=torch.int64)), TypeError, "y is torch.int64"),
    "flags-size": (dict(flags=torch.zeros(3, dtype=torch.uint8)), ValueError, r"flags must be .*\[4\], is \[3\]"),
    "flags-dtype": (dict(flags=torch.zeros(4, dtype=torch.bool)), TypeError, "flags is torch.bool"),
    "count-dtype": (dict(count=torch.zeros(1)), TypeError, "count is torch.float32"),
    "count-size": (dict(count=torch.zeros(2, dtype=torch.int64)), ValueError, "count must be"),
}
GOOD = dict(
    y=torch.ones(3, 4), flags=torch.zeros(4, dtype=torch.uint8), count=torch.zeros(1, dtype=torch.int64), channel_dim=1,
    criterion="ever_active", tau=0.0,
)  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_change_nothing(name):
    change, error, message = BAD[name]
    arguments = {**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in GOOD.items()}, **change}
    with pytest.raises(error, match=message):
        torsion.ops.active_flags_(**arguments)
    assert not arguments["flags"].any()
    assert not arguments["count"].any()


@needs_c
@pytest.mark.parametrize("name", [n for n in BAD if n not in ("tau", "nan", "count-size")])
def test_the_op_refuses_by_runtime_error(name):
    with pytest.raises(RuntimeError, match="active_flags_"):
        torch.ops.torsion.active_flags_(*{**GOOD, **BAD[name][0]}.values())
