"""What only a GPU shows of DemP's ops: the CPU's bits, nobody waits, graphs go on with the numbers on the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import bits, each_dtype
from torch.profiler import ProfilerActivity, profile

import torsion
from torsion.ops.flags import CRITERIA

pytestmark = [pytest.mark.cuda, pytest.mark.backend("cuda")]

SHAPES = [(50, 1001), (7, 64), (130, 63), (40, 9), (300, 1), (12, 3, 5, 5), (5,), (), (2, 70_001)]


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@each_dtype()
def test_normals(dtype):
    for shape in SHAPES:
        here, there = (torsion.ops.philox_normal(shape, 2**64 - 5, 2**32 - 1, 3, dtype, d) for d in ("cpu", "cuda"))
        assert torch.equal(bits(here), bits(there))


def lists(dtype, cut):
    """Arguments of demp_update_ from params to orig_cols, for every combination of masks."""
    found = []
    for shape, masks in itertools.product(SHAPES, range(4)):
        p = torch.randn(shape).to(dtype)
        n_rows = shape[0] if shape else 1
        n_cols = p.numel() // n_rows
        found.append(
            (
                p,
                (torch.rand(n_rows) < 0.6).to(torch.uint8) if masks & 1 else None,
                (torch.rand(n_cols) < 0.6).to(torch.uint8) if masks & 2 else None,
                torch.arange(n_rows) * 2 if cut else None,
                torch.randperm(3 * n_cols)[:n_cols].sort()[0] if cut else None,
                3 * n_cols if cut else n_cols,
            )
        )
    return [list(x) for x in zip(*found, strict=True)]


def on_gpu(entries):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in entries]


@each_dtype()
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("known", [True, False])
def test_noise(dtype, cut, known):
    here = lists(dtype, cut)
    there = [on_gpu(x) for x in here]
    ids = list(range(len(here[0])))
    torsion.ops.demp_update_(*here, 0.37, 11, 7, ids)
    sigma, step = (0.37, 7) if known else (torch.tensor(0.37, dtype=torch.float64).cuda(), torch.tensor(7).cuda())
    with no_waiting():
        torsion.ops.demp_update_(*there, sigma, 11, step, ids)
    for a, b in zip(here[0], there[0], strict=True):
        assert torch.equal(bits(a), bits(b))


def test_noise_of_many_parameters_is_few_launches():
    params = [torch.zeros(5, 7, device="cuda") for _ in range(92)]
    none = [None] * len(params)
    arguments = (params, none, none, none, none, [7] * 92, 0.1, 1, 2, list(range(92)))
    torsion.ops.demp_update_(*arguments)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        torsion.ops.demp_update_(*arguments)
        torch.cuda.synchronize()
    kernels = [e.name for e in seen.events() if "kernel" in e.name.lower() and "torsion" in e.name]
    assert len(kernels) == 2


def test_a_graph_takes_the_numbers_of_its_replay():
    p, sigma, step = torch.zeros(60, 90, device="cuda"), torch.tensor(0.5).cuda(), torch.tensor(3).cuda()
    live = (torch.rand(60) < 0.5).to(torch.uint8)

    def update(params, mask, *numbers):
        torsion.ops.demp_update_([params], [mask], [None], [None], [None], [90], numbers[0], 1, numbers[1], [4])

    mask = live.cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        update(torch.zeros_like(p), mask, sigma, step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(p, mask, sigma, step)
    expected = torch.zeros(60, 90)
    for now, t in ((0.25, 9), (0.0, 10), (0.125, 2**32 - 1)):
        sigma.fill_(now)
        step.fill_(t)
        graph.replay()
        update(expected, live, now, t)
        assert torch.equal(bits(p), bits(expected))


def looks(y, **options):
    flags = torch.zeros(y.shape[1], dtype=torch.uint8, device=y.device)
    count = torch.full((1,), 5, device=y.device)
    torsion.ops.active_flags_(y, flags, count, 1, **options)
    return flags, count


VIEWS = [lambda y: y, lambda y: y[:, 1:], lambda y: y[:, :, 0, 0], lambda y: y[:, :, ::2, ::3]]


@each_dtype()
@pytest.mark.parametrize("criterion", CRITERIA)
def test_flags(criterion, dtype):
    """Multiples of 1/64, whose sums are exact: every layout, every way of being live."""
    for shape in ((3, 70, 9, 9), (40, 37, 1, 1), (2, 16, 64, 64), (64, 130, 14, 14), (1, 3, 300, 401), (0, 4, 3, 3)):
        y = -torch.randint(0, 64, shape) / 64
        for c, channel in enumerate(y.unbind(1)):
            if channel.numel() and c % 4:
                channel[(-1,) * 3 if c % 4 == 1 else (0, 0, 0)] = torch.nan if c % 4 == 3 else 0.75
        for here in (y.to(dtype), y.to(dtype).contiguous(memory_format=torch.channels_last)):
            for view, tau in itertools.product(VIEWS, (0.0, 0.3)):
                there = view(here.cuda())
                with no_waiting():
                    flags, count = looks(there, criterion=criterion, tau=tau)
                expected, seen = looks(view(here), criterion=criterion, tau=tau)
                assert flags.tolist() == expected.tolist()
                assert int(count) == int(seen)


def test_flags_twice_are_the_same():
    y = torch.randn(64, 200, 30, 30, device="cuda")
    for criterion in CRITERIA:
        first = looks(y, criterion=criterion, tau=1.0)[0]
        for _ in range(5):
            assert torch.equal(looks(y, criterion=criterion, tau=1.0)[0], first)
