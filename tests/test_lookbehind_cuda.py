"""What only a GPU shows of an outer step: launches per phase, graphs that meet bad gradients or outlive changes."""

from __future__ import annotations

import pytest
import torch
from cycles import BASE, MOMENTUM, ahead, each_base, everything, order_of, values_of
from helpers import Target, same_bits
from torch import nn
from torch.profiler import ProfilerActivity, profile

CUDA = Target("cuda", "cuda", "cuda")
pytestmark = [pytest.mark.cuda, pytest.mark.backend("cuda")]

SETTINGS = {
    "fixed": {"k": 3},
    "asam": {"k": 3, "asam": True},
    "adaptive": {"k": 3, "alpha": "adaptive"},
    "full": {"k": 2, "reuse_gradients": False},
}


def order(settings):
    return order_of(settings["k"], settings.get("reuse_gradients", True))


class Setup:
    """Parameters, and a gradient of its own for each phase, whose place never changes."""

    def __init__(self, base, settings, tensors=3, dtype=torch.float32):
        torch.manual_seed(1)
        self.params = [nn.Parameter(torch.randn(40 + t, 7, device="cuda").to(dtype)) for t in range(tensors)]
        self.order = order(settings)
        self.static = [[torch.zeros_like(p) for p in self.params] for _ in self.order]
        self.optimizer = ahead(CUDA, base, self.params, **settings)

    def fill(self, seed, spoiled=None):
        generator = torch.Generator(device="cuda").manual_seed(seed)
        for grads in self.static:
            for g in grads:
                g.normal_(generator=generator)
        if spoiled is not None:
            self.static[spoiled][0][3, 2] = torch.nan

    def phase(self, number, moved=False):
        for p, grad in zip(self.params, self.static[number], strict=True):
            if moved or p.grad is None:
                p.grad = grad.clone()
            else:
                p.grad.copy_(grad)
        getattr(self.optimizer, self.order[number])()

    def outer_step(self, moved=False):
        for number in range(len(self.order)):
            self.phase(number, moved)

    def captured(self, moved=False):
        """An outer step as a graph, after two on a side stream."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for seed in (1, 2):
                self.fill(seed)
                self.outer_step(moved)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outer_step(moved)
        return graph


def kernels_of(run):
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return [e.name for e in profiler.events() if "torsion" in e.name]


@pytest.mark.parametrize("tensors", [1, 40])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@each_base("sgd", "sgd-momentum", "adamw", "tam-tensor-clipped", "adatamw")
def test_launches_of_a_phase_do_not_grow_with_the_tensors(base, settings, tensors):
    """A reduction and an update; an adaptive interpolation is one more. Gradients stay in place."""
    setup = Setup(base, settings, tensors)
    for seed in (1, 2):
        setup.fill(seed)
        setup.outer_step()
    for number, phase in enumerate(setup.order):
        for p, grad in zip(setup.params, setup.static[number], strict=True):
            p.grad.copy_(grad)
        found = kernels_of(getattr(setup.optimizer, phase))
        if number == 0 and not found:
            pytest.skip("the profiler sees no kernels on this machine")
        closing = number == len(setup.order) - 1 and settings.get("alpha") == "adaptive"
        assert len(found) == (3 if closing else 2), found


@pytest.mark.parametrize("moved", [False, True], ids=["in-place", "moved"])
@pytest.mark.parametrize("spoiled", [0, 1, -1])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replay_with_a_bad_gradient_restores_the_weights(dtype, settings, spoiled, moved):
    """As the eager cycle does: the slow weights bit for bit, counted once, and the next replay goes through."""
    setup, eager = (Setup(MOMENTUM, settings, dtype=dtype) for _ in range(2))
    graph = setup.captured(moved)
    for seed in (1, 2):
        eager.fill(seed)
        eager.outer_step()
    for seed, bad in ((3, None), (4, spoiled), (5, None)):
        before = values_of(setup.optimizer)
        for each in (setup, eager):
            each.fill(seed, bad)
        graph.replay()
        eager.outer_step()
        assert same_bits(values_of(setup.optimizer), before) == (bad is not None)
        assert same_bits(everything(setup.optimizer), everything(eager.optimizer))
    assert int(setup.optimizer.skipped_steps()) == int(eager.optimizer.skipped_steps()) == 1


@pytest.mark.parametrize("moved", [False, True], ids=["in-place", "moved"])
def test_a_graph_outlives_eager_cycles_at_other_addresses(moved):
    settings = SETTINGS["adaptive"]
    setup, eager = (Setup(BASE["tam"], settings) for _ in range(2))
    graph = setup.captured(moved)
    for seed in (1, 2):
        eager.fill(seed)
        eager.outer_step()
    for seed in range(3, 7):
        for each in (setup, eager):
            each.fill(seed)
        if seed % 2:
            graph.replay()
        else:
            setup.outer_step(moved=True)
        eager.outer_step()
        assert same_bits(everything(setup.optimizer), everything(eager.optimizer))
