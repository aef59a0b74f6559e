"""What an outer step costs besides time: extra buffers, allocations, host syncs, and its capture in one CUDA graph."""

from __future__ import annotations

import pytest
import torch
from cycles import BASE, MOMENTUM, OwnSGD, Run, ahead, each_base, each_reuse, evaluations, everything, give, order_of
from helpers import LOW, TARGETS, ids, same_bits
from test_no_sync import no_sync
from torch import nn
from torch.profiler import ProfilerActivity, profile

import torsion

N = 300_000
"""Elements of the one large parameter: what a launch table or a sum needs is far below a tenth of that."""

SYNCLESS = ("sgd", "sgd-nesterov", "adamw", "tam-tensor-clipped", "adatamw")


# Memory


def _allocations(run):
    """Bytes of every allocation and release while ``run`` runs, below Python too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]"]


def _outer_step(optimizer, k, reuse=True):
    grads = evaluations(optimizer, 1)[0]
    give(optimizer, grads)

    def run():
        for phase in order_of(k, reuse):
            getattr(optimizer, phase)()

    return run


def _large(target, base, dtype=torch.float32, **settings):
    p = nn.Parameter(torch.randn(N, device=target.device).to(dtype))
    return ahead(target, base, [p], **settings)


BUFFERS = {
    "sam": ({"k": 1, "alpha": 1.0}, 2),
    "k=2": ({"k": 2}, 2),
    "k=5": ({"k": 5}, 2),
    "full": ({"k": 3, "reuse_gradients": False}, 2),
    "asam": ({"k": 2, "asam": True}, 2),
    "adaptive-k=2": ({"k": 2, "alpha": "adaptive"}, 2),
    "adaptive-k=3": ({"k": 3, "alpha": "adaptive"}, 3),
    "adaptive-global": ({"k": 4, "alpha": "adaptive", "alpha_scope": "global"}, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=ids)
@pytest.mark.parametrize(("settings", "extra"), BUFFERS.values(), ids=BUFFERS)
def test_extra_buffers(settings, extra, dtype, compiled_target):
    """Fast and slow; the perturbed in float32 for 8 and 11 bits; the first fast ones for adaptive with k >= 3."""
    if compiled_target.device == "cuda":
        pytest.skip("counted by the profiler of the CPU")
    optimizer = _large(compiled_target, BASE["sgd"], dtype, **settings)
    wide = 8 if dtype == torch.float64 else 4
    run = _outer_step(optimizer, settings["k"], settings.get("reuse_gradients", True))
    kept = sum(_allocations(run))
    most = (extra + (dtype in LOW)) * wide * N
    assert kept <= 1.02 * most + 65536
    assert kept >= wide * N, "the profiler saw nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@each_base("sgd-momentum", "adamw", "tam")
def test_nothing_large_is_allocated_after_the_first_outer_step(base, dtype, compiled_target):
    if compiled_target.device == "cuda":
        pytest.skip("counted by the profiler of the CPU")
    optimizer = _large(compiled_target, base, dtype, k=3, alpha="adaptive")
    _outer_step(optimizer, 3)()
    assert max(map(abs, _allocations(_outer_step(optimizer, 3))), default=0) < N // 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_the_general_path_keeps_its_buffers(dtype):
    """What the base allocates within its own step it frees again; nothing more is kept after the first outer step."""
    p = nn.Parameter(torch.randn(N).to(dtype))
    optimizer = torsion.Lookbehind(OwnSGD([p], lr=0.1, momentum=0.9), k=3, alpha="adaptive")
    _outer_step(optimizer, 3)()
    assert sum(_allocations(_outer_step(optimizer, 3))) < N // 10


@pytest.mark.cuda
@each_base("sgd-momentum", "adamw", "tam")
def test_nothing_is_allocated_on_the_gpu_after_the_first_outer_step(base, compiled_target):
    optimizer = _large(compiled_target, base, k=3, alpha="adaptive")
    _outer_step(optimizer, 3)()
    run = _outer_step(optimizer, 3)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    assert torch.cuda.memory_allocated() <= held
    assert torch.cuda.max_memory_allocated() < held + N


# Host syncs


@pytest.mark.parametrize(
    "settings",
    [{}, {"alpha": "adaptive", "k": 3}, {"alpha": "adaptive", "alpha_scope": "global"}, {"asam": True}],
    ids=["fixed", "adaptive", "adaptive-global", "asam"],
)
@each_reuse
@each_base(*SYNCLESS)
def test_no_phase_waits_for_the_device(base, reuse, settings, fast_target):
    """From the very first one on, in an outer step with a bad gradient too; nor do the reports."""
    params = [nn.Parameter(torch.randn(s, device=fast_target.device)) for s in [(5, 3), (7,), ()]]
    k = settings.get("k", 2)
    optimizer = ahead(fast_target, base, params, reuse_gradients=reuse, **settings)
    order = order_of(k, reuse)
    for outer in range(2):
        grads = evaluations(optimizer, len(order))
        if outer == 0:
            grads[2][0][0] = torch.nan
        for phase, each in zip(order, grads, strict=True):
            give(optimizer, each)
            with no_sync():
                getattr(optimizer, phase)()
                with optimizer.slow_weights():
                    optimizer.skipped_steps()
    assert int(optimizer.skipped_steps()) == 1


@pytest.mark.parametrize("dtype", LOW, ids=ids)
@each_base("sgd-momentum", "tam")
def test_no_phase_of_narrow_parameters_waits_for_the_device(base, dtype, compiled_target):
    params = [nn.Parameter(torch.randn(s, device=compiled_target.device).to(dtype)) for s in [(5, 3), (7,)]]
    optimizer = ahead(compiled_target, base, params, k=3, alpha="adaptive")
    for _ in range(2):
        for phase, each in zip(order_of(3), evaluations(optimizer, 4), strict=True):
            give(optimizer, each)
            with no_sync():
                getattr(optimizer, phase)()
                with optimizer.slow_weights():
                    pass


def test_no_abandoning_waits_for_the_device(fast_target):
    run = Run(fast_target, MOMENTUM, {"k": 2})
    run.step(0)
    for phase in order_of(2)[:2]:
        run.closure(1)()
        with no_sync():
            getattr(run.optimizer, phase)()
    with no_sync():
        run.optimizer.abandon()


@each_base("sgd-momentum", "tam")
def test_no_step_with_a_closure_waits_for_the_device(base, fast_target):
    run = Run(fast_target, base, {"k": 2})
    for step in range(3):
        closure = run.closure(step)
        with no_sync():
            run.optimizer.step(closure)


@each_base("sgd-momentum", "adamw")
def test_a_rate_on_the_device_does_not_either(base, fast_target):
    """The reference asks the table of the groups' numbers which rates are tensors; it never leaves the host."""
    rate = torch.tensor(0.01, device=fast_target.device)
    p = nn.Parameter(torch.randn(7, device=fast_target.device))
    optimizer = ahead(fast_target, base, [{"params": [p], "lr": rate}], k=2)
    for _ in range(2):
        for phase, each in zip(order_of(2), evaluations(optimizer, 3), strict=True):
            give(optimizer, each)
            with no_sync(_HostTable(optimizer)):
                rate.mul_(0.5)
                getattr(optimizer, phase)()


class _HostTable:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def _hyper(self):
        numbers = self.optimizer._cycle._numbers
        return None if numbers is None else numbers[1]


def test_a_grad_scaler_does_not_either(fast_target):
    run = Run(fast_target, MOMENTUM, {"k": 2})
    scaler = torch.amp.GradScaler(fast_target.device, init_scale=16.0)
    for outer in range(2):
        for phase in order_of(2):
            run.optimizer.zero_grad()
            scaler.scale(run.closure(outer)()).detach()
            with no_sync():
                scaler.unscale_(run.optimizer)
                getattr(run.optimizer, phase)()
                scaler.update()


def test_the_general_path_asks_once_per_descent():
    """No more than documented: the finiteness check that decides whether the base steps."""
    run = Run(TARGETS[0], BASE["own-plain-sgd"], {"k": 3, "alpha": "adaptive"})
    run.step(0)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "__bool__", "__float__"):
            before = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda self, before=before: (asked.append(1), before(self))[1])
        run.step(1)
    assert len(asked) == 3


# One CUDA graph


@pytest.mark.cuda
@pytest.mark.parametrize("settings", [{"k": 2}, {"k": 3, "alpha": "adaptive"}, {"k": 1, "alpha": 1.0}], ids=str)
@each_base("sgd-momentum", "adamw", "tam", "adatamw")
def test_an_outer_step_replays_as_one_graph(base, settings, compiled_target):
    """k + 1 forward and backward passes and all phases; a rate on the device may change between replays."""
    k = settings["k"]

    def build():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).cuda()
        rate = torch.tensor(base.options["lr"], device="cuda")
        group = {"params": list(model.parameters()), "lr": rate}
        return model, rate, ahead(compiled_target, base, [group], **settings)

    def outer_step(model, optimizer, x):
        for phase in order_of(k):
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            getattr(optimizer, phase)()

    batches = [torch.randn(8, 6, device="cuda") for _ in range(6)]
    (model, rate, optimizer), (other, other_rate, eager) = build(), build()
    x = batches[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for b in batches[:3]:
            x.copy_(b)
            outer_step(model, optimizer, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outer_step(model, optimizer, x)
    for b in batches[:3]:
        outer_step(other, eager, b)
    for b in batches[3:]:
        for r in (rate, other_rate):
            r.mul_(0.5)
        x.copy_(b)
        graph.replay()
        outer_step(other, eager, b)
        assert same_bits(everything(optimizer), everything(eager))
