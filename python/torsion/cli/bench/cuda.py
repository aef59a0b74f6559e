"""Timing on a GPU: graph replays over rotating buffers, and what a step costs the host."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from torsion.cli.bench.comparisons import Limit
from torsion.cli.bench.contestants import CONTESTANTS, COPY, Contestant, copy_of
from torsion.cli.bench.figures import Figure, Place
from torsion.cli.bench.lists import TensorList
from torsion.cli.bench.problem import Gradients, attach, initial
from torsion.cli.bench.timing import Percentiles, Rounds, Sampler, Turn, interleave

__all__ = ["host_figures", "measure"]

_SAMPLE_SECONDS = 2e-3
_L2_MULTIPLE = 3
"""Between two visits to a buffer more than this many times the L2 has gone by, so that it comes from memory."""

_HOST_SECONDS = dict.fromkeys(("TAM", "AdaTAMW"), Limit(100e-6, ("gpt2",)))
_LAUNCHES = {
    "TAM": Limit(2, ()),
    "AdaTAMW": Limit(2, ()),
    "Lookbehind(SGD), k=5": Limit(2 + 4 * 2 + 3, ()),  # the first ascent, descents that ascend again, the last
    "SAM(SGD)": Limit(2 + 3, ()),
}
_HOST = (
    ("tam", ("TAM", "SGD fused")),
    ("adatam", ("AdaTAMW", "AdamW fused")),
    ("lookbehind", ("Lookbehind(SGD), k=5", "SAM(SGD)")),
)
"""Method -> whose host time and launches are counted."""

Step = Callable[[], object]


def measure(
    members: Sequence[Contestant], baselines: Sequence[str], tensors: TensorList, place: Place, lr: float
) -> tuple[Rounds, dict[str, Turn]]:
    """Interleaved rounds of graph replays; every contestant has as many copies of its tensors as the L2 asks for.

    A whole cycle is one graph in which nothing makes gradients: every phase reads the same ones. Where a phase moves
    more than the L2 holds, they come from memory again, as after a backward pass. Also returns each contestant's step.
    """
    sets = _sets(tensors, place.device)
    gradients = [Gradients(tensors, place.device, seed) for seed in range(1, sets + 1)]
    samplers: dict[str, Sampler] = {}
    turns: dict[str, Turn] = {}
    for member in members:
        steps = []
        for own in gradients:
            params = initial(tensors, place.device)
            attach(params, own.live)
            turns[member.name] = Turn(member.build(params, lr), lambda: None)
            steps.append(turns[member.name])
        samplers[member.name] = _replayed(steps, place.device)
    samplers[COPY] = _replayed([copy_of(tensors.numel, place.device) for _ in range(sets)], place.device)

    def refresh(index: int) -> None:
        for own in gradients:
            own.refresh(index)

    return interleave(samplers, baselines, place.rounds, refresh), turns


def _sets(tensors: TensorList, device: torch.device) -> int:
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    # The copy's 8 bytes an element are the smallest set.
    return math.floor(_L2_MULTIPLE * l2 / (8 * tensors.numel)) + 2


def _replayed(steps: Sequence[Step], device: torch.device) -> Sampler:
    """Capture each step in a graph of its own and return what replays them in turn."""
    graphs = [_captured(step, device) for step in steps]
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay(times: int) -> float:
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(times):
            for graph in graphs:
                graph.replay()
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds * 1e-3 / (times * len(graphs))

    replay(1)
    times = max(1, min(100, math.ceil(_SAMPLE_SECONDS / (max(replay(1), 1e-7) * len(graphs)))))
    return lambda: replay(times)


def _captured(step: Step, device: torch.device) -> torch.cuda.CUDAGraph:
    # State, plans and workspaces are made on a side stream first, as torch's notes on graphs ask for.
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def host_figures(tensors: TensorList, methods: Sequence[str], place: Place, lr: float) -> Iterator[Figure]:
    """Host time of a step or cycle without waiting for the device, and its kernel launches."""
    for name in [name for method, names in _HOST if method in methods for name in names]:
        params = initial(tensors, place.device)
        attach(params, Gradients(tensors, place.device).live)
        step = Turn(CONTESTANTS[name].build(params, lr), lambda: None)
        took = Percentiles.of(_host_seconds(step, place.device) for _ in range(max(place.rounds, 20) + 5))
        limit = _HOST_SECONDS.get(name)
        yield Figure.at(
            place, f"{name}: host time of step()", tensors.name, "s",
            limit if limit is not None and tensors.name in limit.lists else None,
            value=took.p50, p20=took.p20, p80=took.p80, clock="wall time",
        )  # fmt: skip
        launches = _launches(step, place.device)
        yield Figure.at(
            place, f"{name}: kernels per step", tensors.name, "launches", _LAUNCHES.get(name),
            value=launches, note="" if launches is not None else "the profiler saw no kernel",
        )  # fmt: skip


def _host_seconds(step: Step, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _launches(step: Step, device: torch.device) -> int | None:
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize(device)
    kernels = [
        event
        for event in seen.events() or ()
        if event.device_type == DeviceType.CUDA and not event.name.startswith("Mem")
    ]
    return len(kernels) or None
