"""One training run: an arm, a rate and a seed in, curves and times out."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torsion.cli.demo.arms import Arm, Choice
from torsion.cli.demo.pruner import Pruner, parameters_of
from torsion.cli.demo.tasks import UNDER_WEIGHT_NOISE, Data, Task
from torsion.cli.demo.weight_noise import under_weight_noise

__all__ = ["Plan", "Run", "rate_factor", "train"]

_REFRESH = 10  # steps between two readings of the loss for the progress bar, each of which waits for the device
_SAMPLE_ON_GPU = 5  # every so many steps is timed there, because timing one means waiting for the device around it


@dataclass(frozen=True)
class Plan:
    """What a run is asked to do."""

    task: Task
    arm: Arm
    choice: Choice
    seed: int
    steps: int
    device: torch.device


@dataclass
class Run:
    """What a run did. Lists over steps unless said otherwise; a run that was stopped has shorter ones."""

    plan: Plan
    parameters: int = 0
    loss: list[float] = field(default_factory=list)
    observed: dict[str, list[float]] = field(default_factory=dict)
    #: One dictionary of metrics per evaluation, with the "step" after which it was made.
    evaluations: list[dict[str, float]] = field(default_factory=list)
    #: Gradients computed, all steps together.
    gradients: int = 0
    #: level -> the first metric for each draw of the noise; empty where the task has no levels, or the run was stopped.
    weight_noise: dict[float, list[float]] = field(default_factory=dict)
    optimizer_ms: list[float] = field(default_factory=list)
    training_ms: list[float] = field(default_factory=list)
    #: Of an arm that prunes: one entry per window, the first before training, with "step", "parameters" and "units".
    sizes: list[dict[str, Any]] = field(default_factory=list)
    #: Of each window, the cut included; apart from `training_ms`.
    window_ms: list[float] = field(default_factory=list)
    #: Where networks are pruned, of the finished model: layer -> units, and how many act; inference on one batch.
    units: dict[str, int] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)
    inference_ms: list[float] = field(default_factory=list)
    skipped_steps: int | None = None
    #: As it stands after the last step made.
    model: nn.Module | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        """Whether every planned step was made."""
        return len(self.loss) == self.plan.steps

    @property
    def parameters_left(self) -> int:
        """Parameters after the last cut; all where nothing was cut."""
        left: int = self.sizes[-1]["parameters"] if self.sizes else self.parameters
        return left

    def final(self, metric: str) -> float:
        """The metric after the last step made; nan when it was not measured."""
        return self.evaluations[-1].get(metric, math.nan) if self.evaluations else math.nan

    def median_ms(self, which: str) -> float:
        """Median of `optimizer_ms`, `training_ms` or `inference_ms`; nan when nothing was timed."""
        times: list[float] = getattr(self, which)
        return statistics.median(times) if times else math.nan

    @property
    def seconds(self) -> float:
        """Time spent in training steps and in windows, evaluations left out; from those steps that were timed."""
        if not self.training_ms:
            return math.nan
        return 1e-3 * (statistics.fmean(self.training_ms) * len(self.loss) + sum(self.window_ms))

    @property
    def timed_steps(self) -> list[int]:
        """The steps, from 1, that `training_ms` is of."""
        every = _SAMPLE_ON_GPU if self.plan.device.type == "cuda" else 1
        return [1 + every * index for index in range(len(self.training_ms))]


def rate_factor(step: int, steps: int, warmup: int) -> float:
    """The schedule every arm runs on: linear warm-up, then half a cosine down to zero after the last step."""
    warmup = min(warmup, steps // 5)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _timed_step(
    optimizer: Optimizer, compute: Callable[[], Tensor], prepare: Callable[[], object], run: Run, index: int
) -> Tensor:
    """Make one step and add to the run how long it took, and how long of that outside `compute`."""
    on_gpu = run.plan.device.type == "cuda"
    timed = not on_gpu or index % _SAMPLE_ON_GPU == 0
    inside = 0.0

    def now() -> float:
        if on_gpu and timed:
            torch.cuda.synchronize()
        return time.perf_counter()

    def closure() -> Any:  # this form fits every optimizer, also those that evaluate the loss several times a step
        nonlocal inside
        begin = now()
        loss = compute()
        inside += now() - begin
        run.gradients += 1
        prepare()
        return loss

    begin = now()
    loss: Any = optimizer.step(closure)
    total = now() - begin
    if timed:
        run.training_ms.append(1e3 * total)
        run.optimizer_ms.append(1e3 * (total - inside))
    assert isinstance(loss, Tensor)
    return loss


def train(plan: Plan, data: Data, progress: Callable[[int, float, float], None], stop: Callable[[], bool]) -> Run:
    """Train once, from a seed that fixes initialization and data order.

    Args:
        plan: what to do.
        data: the task's data, on the plan's device.
        progress: called now and then with the steps made, the last loss and the current rate.
        stop: asked after every step; True ends the run with what it has.
    """
    torch.manual_seed(plan.seed)
    model = plan.task.model().to(plan.device)
    run = Run(plan, parameters=parameters_of(model), model=model)
    with plan.arm.around(model):
        _loop(run, model, data, progress, stop)
    if run.finished and plan.task.weight_noise:
        metric = plan.task.metrics[0].key
        run.weight_noise = under_weight_noise(
            model, plan.task.weight_noise, plan.seed, lambda: data.evaluate(model, plan.seed, brief=True)[metric]
        )
        run.evaluations[-1][UNDER_WEIGHT_NOISE] = statistics.fmean(chain.from_iterable(run.weight_noise.values()))
    return run


def _loop(
    run: Run, model: nn.Module, data: Data, progress: Callable[[int, float, float], None], stop: Callable[[], bool]
) -> None:
    plan = run.plan
    optimizer = plan.arm.build(model, plan.choice)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, plan.steps, plan.task.warmup)
    )
    batches = data.batches(plan.seed)
    shrinking = plan.arm.shrinking
    pruner = shrinking and Pruner(run, model, optimizer, data.inputs(plan.seed), shrinking)
    losses: list[Tensor] = []
    observed: dict[str, list[Tensor]] = {}
    evaluate_every = max(1, plan.steps // plan.task.evaluations)

    def prepare() -> None:
        if plan.arm.after_backward is not None:
            plan.arm.after_backward(model)

    def forward_backward(batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = data.loss(model, batch)
        torch.autograd.backward(loss)
        return loss.detach()

    for index in range(plan.steps):
        rate, batch = float(schedule.get_last_lr()[0]), next(batches)
        losses.append(_timed_step(optimizer, partial(forward_backward, batch), prepare, run, index))
        schedule.step()
        for name, value in plan.arm.observe(optimizer).items():
            observed.setdefault(name, []).append(value.detach().clone())
        made, stopping = index + 1, stop()
        if pruner:
            pruner.after_step(made)
        if made % evaluate_every == 0 or made == plan.steps or stopping:
            run.evaluations.append({"step": made, **data.evaluate(model, plan.seed)})
        if made % _REFRESH == 0 or made == plan.steps or stopping:
            progress(made, losses[-1].item(), rate)
        if stopping:
            break
    run.loss = _read(losses)
    run.observed = {name: _read(values) for name, values in observed.items()}
    if plan.arm.op is not None:
        run.skipped_steps = _skipped(optimizer)


def _skipped(optimizer: Optimizer) -> int | None:
    count = getattr(optimizer, "skipped_steps", None)
    return int(count()) if count is not None else None


def _read(values: list[Tensor]) -> list[float]:
    numbers: list[float] = torch.stack(values).tolist() if values else []
    return numbers
