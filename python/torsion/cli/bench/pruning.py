"""What a cut network, the detector and the noise cost: `torsion bench demp`."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import torsion
from torsion.cli.bench.comparisons import Limit
from torsion.cli.bench.figures import Figure, Place
from torsion.cli.bench.gate import GateError
from torsion.cli.bench.lists import LISTS
from torsion.cli.bench.problem import Gradients, attach, initial
from torsion.cli.bench.timing import Percentiles
from torsion.cli.bench.versus import BFLOAT16_RELATIVE, Step, agree, versus
from torsion.optim._perturbation import NoiseRows, Perturbation

__all__ = ["demp_figures"]

_LR = 1e-7
_RELATIVE = {torch.float32: 1e-5, torch.bfloat16: BFLOAT16_RELATIVE}
_TOKENS, _BATCH, _LIST = 2048, 64, "resnet18"
_SEEDS, _STEPS = 5, 0
"""Of whole trainings; 0 steps: the task's own."""
_WIDTH, _RATE, _LASSO = 128, 0.4, 0.01
"""Channels of the first convolutions, twice the demo's: with its 64 a step of the cut network is overhead on two
threads. For such a network rate and lasso are the most accurate of (0.4, 0.8) and (0.01, 0.02) on the tuning folds."""
_DENSE, _READ, _ALONE = "dense", "one read", "AdaTAMW"


def demp_figures(place: Place) -> Iterator[Figure]:
    """Figures of pruning.

    Raises:
        GateError: something computes what it should not.
    """
    for dead, limit in ((0.5, 0.57), (0.75, 0.32), (0.9, 0.17)):
        yield from _ffn(place, dead, Limit(limit, ()), _Block(512, 2048, _TOKENS))
    if place.device.type == "cuda":
        for dead in (0.5, 0.75, 0.9):
            yield from _ffn(place, dead, None, _LARGE)
    for dead in (0.5, 1.0):
        yield from _detection(place, dead)
    yield from _update(place)
    yield from _training(place)


@dataclass(frozen=True)
class _Block:
    """A feed-forward block, the rows it takes, and what its live units are rounded up to a multiple of."""

    width: int
    hidden: int
    rows: int
    dtype: torch.dtype = torch.float32
    align: int = 1

    def __str__(self) -> str:
        more = "" if self.dtype == torch.float32 else f", {self.rows} rows, {self.dtype}".replace("torch.", "")
        return f"{self.width} x {self.hidden}{more}"


_LARGE = _Block(4096, 16384, 4096, torch.bfloat16, align=8)
"""For a GPU. Its products in half precision are fast where rows begin at multiples of 16 bytes."""


def _ffn(place: Place, dead: float, limit: Limit | None, block: _Block) -> Iterator[Figure]:
    """A feed-forward block before and after its dead hidden units were cut."""
    torch.manual_seed(0)
    up = nn.Linear(block.width, block.hidden)
    with torch.no_grad():
        up.bias[torch.randperm(block.hidden)[: round(block.hidden * dead)]] = -100.0
    dense = nn.Sequential(up, nn.ReLU(), nn.Linear(block.hidden, block.width)).to(place.device, block.dtype)
    x = torch.randn(block.rows, block.width, device=place.device, dtype=block.dtype)
    cut = copy.deepcopy(dense)
    live = torsion.prune.live_units(cut, [x])
    torsion.prune.compact(cut, live, x, align=block.align)
    name = f"feed-forward, {dead:.0%} dead, cut"
    with torch.no_grad():
        agree(name, [cut(x)], [dense.double()(x.double())], _RELATIVE[block.dtype])
    dense.to(block.dtype)  # exact: the numbers came from there
    limits = {} if limit is None else {name: limit}
    before, after = {_DENSE: _backward(dense, x)}, {name: _backward(cut, x)}
    yield from versus(place, str(block), before, after, limits, dtype=block.dtype)


def _backward(model: nn.Module, x: Tensor) -> Step:
    dy = torch.randn_like(x)
    given = x.clone().requires_grad_()

    def step() -> None:
        model.zero_grad()
        given.grad = None
        model(given).backward(dy)

    return step


def _detection(place: Place, dead: float) -> Iterator[Figure]:
    """The detector on 51 MB; a channel that is dead is read to its end."""
    torch.manual_seed(0)
    y = torch.randn(_BATCH, 256, 28, 28, device=place.device).relu_()
    gone = torch.randperm(256)[: round(256 * dead)]
    y[:, gone.to(place.device)] = 0
    flags = torch.zeros(256, dtype=torch.uint8, device=place.device)
    count = torch.zeros(1, dtype=torch.int64, device=place.device)

    def detect() -> Tensor:
        flags.zero_()
        torsion.ops.active_flags_(y, flags, count)
        return flags

    if not torch.equal(detect().bool().cpu(), (y > 0).flatten(2).any(2).any(0).cpu()):
        raise GateError("active_flags_ is wrong about a channel; nothing is reported")
    name = f"detection, {dead:.0%} of the channels dead"
    reads: dict[str, Step] = {_READ: y.sum, f"{_READ} (amax)": y.amax}
    yield from versus(place, "51 MB activation", reads, {name: detect}, {name: Limit(1.2, ())})


def _update(place: Place) -> Iterator[Figure]:
    """Lasso on the scales and noise on every weight, inside the update and after it."""
    tensors = LISTS[_LIST]
    gradients = Gradients(tensors, place.device)
    steps: dict[str, Step] = {}
    results: dict[str, list[Tensor]] = {}
    inside, lasso, after = "AdaTAMW, lasso and noise inside", "AdaTAMW, lasso inside", "AdaTAMW, then noise"
    for name in (_ALONE, inside, lasso, after):
        params = initial(tensors, place.device)
        attach(params, [g.clone() for g in gradients.live])
        optimizer = torsion.AdaTAMW(params, lr=_LR)
        results[name] = params
        if name in (inside, lasso) and optimizer._takes_perturbation():
            noised = enumerate(params) if name == inside else ()
            maps = {p: NoiseRows(max(1, p[0].numel()), None, None, i) for i, p in noised}
            scales = [p for p in params if p.dim() == 1]
            optimizer._perturb(Perturbation(set(scales), maps, 0, lasso=0.0, sigma=5e-5, step=1))
        steps[name] = optimizer.step if name != after else _noised(optimizer, params)
    members = {name: steps[name] for name in (inside, lasso, after)}
    for step in steps.values():
        step()
    agree(inside, results[inside], results[after], 1e-6)
    agree(lasso, results[lasso], results[_ALONE], 0)
    yield from versus(place, _LIST, {_ALONE: steps[_ALONE]}, members, {inside: Limit(1.10, ()), lasso: Limit(1.10, ())})


def _noised(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> Step:
    none = [None] * len(params)
    columns = [p[0].numel() if p.dim() else 1 for p in params]
    ids = list(range(len(params)))

    def step() -> None:
        optimizer.step()
        torsion.ops.demp_update_(params, none, none, none, none, columns, 5e-5, 0, 1, ids)

    return step


def _training(place: Place) -> Iterator[Figure]:
    """Whole runs of the demo's convolutional network, made wider, on digits: dense and with DemP, over five seeds."""
    from torsion.cli.demo.arms import Choice
    from torsion.cli.demo.rates import best_choice
    from torsion.cli.demo.registry import select
    from torsion.cli.demo.shrinking import CONVOLUTIONAL, convolutional
    from torsion.cli.demo.training import Plan, Run, train

    comparison = next(c for c in select("demp", "digits")["demp"] if c.task == CONVOLUTIONAL.name)
    runs: dict[str, list[Run]] = {arm.name: [] for arm in comparison.arms}
    task = dataclasses.replace(CONVOLUTIONAL, build=partial(convolutional, _WIDTH))
    data, steps = task.load(place.device), _STEPS or task.steps
    for seed in range(_SEEDS):
        for arm in comparison.arms:
            choice = Choice(_RATE, _LASSO) if arm.shrinking else best_choice(task.name, arm.name)
            plan = Plan(task, arm, choice, seed, steps, place.device)
            runs[arm.name].append(train(plan, data, lambda *_: None, lambda: False))
    dense, pruned = runs.values()
    where, note = f"digits, {_WIDTH} channels, {_SEEDS} seeds", f"{steps} steps each; evaluations off the clock"
    ratios = Percentiles.of(b.seconds / a.seconds for a, b in zip(dense, pruned, strict=True))
    left = statistics.fmean(run.parameters_left / run.parameters for run in pruned)
    accuracy = [statistics.fmean(run.final("accuracy") for run in group) for group in (dense, pruned)]
    yield Figure.at(
        place, "training with DemP", where, "x", Limit(0.5, ()), value=ratios.p50, against="dense", clock="wall time",
        p20=ratios.p20, p80=ratios.p80, seconds=statistics.median(r.seconds for r in pruned),
        baseline_seconds=statistics.median(r.seconds for r in dense), seeds=_SEEDS, note=note,
    )  # fmt: skip
    yield Figure.at(place, "training with DemP: parameters left", where, "%", Limit(20, ()), value=100 * left)
    loss = accuracy[0] - accuracy[1]
    yield Figure.at(place, "training with DemP: points of accuracy lost", where, "points", Limit(0.5, ()), value=loss)
