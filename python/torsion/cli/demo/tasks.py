"""What a task is: a data set, a model and a measure of success. The tasks: digits.py, text.py, shrinking.py."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["UNDER_WEIGHT_NOISE", "Data", "Metric", "Task", "find_task", "generator", "task_names"]

#: Key of the first metric's mean over all levels of weight noise.
UNDER_WEIGHT_NOISE = "under weight noise"
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Metric:
    """A number that says how good a trained model is, and how to show it."""

    key: str
    label: str
    unit: str
    higher_is_better: bool
    digits: int


class Data(ABC):
    """A task's data on a device, split so that what is reported was never used to choose a rate."""

    #: Sizes and sources, for the record.
    facts: dict[str, Any]

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """An endless stream of training batches whose order depends on the seed alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of one batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module, seed: int, brief: bool = False) -> dict[str, float]:
        """Every metric of the task for a model trained on `batches(seed)`; leaves the model in training mode.

        With `brief` the first one, and what costs nothing beside it.
        """

    def inputs(self, seed: int) -> Iterator[Tensor]:
        """An endless stream of training inputs without labels, in an order of its own: windows for dead units."""
        return (inputs for inputs, _ in self.batches(zlib.crc32(f"windows {seed}".encode())))


@dataclass(frozen=True)
class Task(ABC):
    """A data set, a model and the settings under which optimizers are compared on them.

    Attributes:
        name: as in rates.json, and for `--task` unless it is a variant.
        metrics: what `Data.evaluate` returns; the first is the one reported as the result.
        choose_by: key of the metric by which rates are chosen.
        steps, seeds: defaults of a run that takes about a minute (digits) or a few (text) on two cores.
        warmup: steps over which the rate rises from zero, at most a fifth of the run.
        threads: CPU threads by default. One: at these sizes a second gains a third when the machine is idle, and loses
            far more when it is not, because each small operation then waits for a thread that is not running.
        tuning_seeds: seeds per candidate in the recorded grid, each with a fold of its own.
        evaluations: how often a run is evaluated, evenly spread, the last time at its end.
        variant_of: the task that a user asks for to get this one; None if that is its own name.
        weight_noise: relative levels of noise on the weights, at which the first metric of a finished model is measured
            once more.
        network: what is trained, where a method compares on several networks.
        tolerance: of the first metric, how much worse than dense the recorded search lets a pruned network be.
    """

    name: str
    summary: str
    extra_modules: tuple[tuple[str, str], ...]
    metrics: tuple[Metric, ...]
    choose_by: str
    steps: int
    seeds: int
    warmup: int
    threads: int
    tuning_seeds: int
    evaluations: int = 20
    variant_of: str | None = None
    weight_noise: tuple[float, ...] = ()
    network: str = ""
    tolerance: float = 0.0

    @property
    def chosen_by(self) -> Metric:
        """The metric by which rates are chosen."""
        return next(metric for metric in self.metrics if metric.key == self.choose_by)

    @property
    def results(self) -> tuple[Metric, ...]:
        """Everything that the last evaluation of a run says."""
        if not self.weight_noise:
            return self.metrics
        first = self.metrics[0]
        label = f"{first.label} under weight noise"
        return (*self.metrics, replace(first, key=UNDER_WEIGHT_NOISE, label=label))

    @abstractmethod
    def load(self, device: torch.device, tuning_fold: int | None = None) -> Data:
        """The data; with a fold (any integer from 0), what is held out is a part of the training data instead."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model on the CPU, initialized from torch's default generator."""


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """A generator on the CPU that owes nothing to those of other purposes."""
    # Hashed, because of a seed torch's generator uses the lower 32 bits alone: high bits would tell nothing apart.
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose} {numbers}".encode()))


def _tasks() -> dict[str, Task]:
    from torsion.cli.demo.digits import DIGITS, WRONG_LABELS
    from torsion.cli.demo.shrinking import CONVOLUTIONAL, PERCEPTRON, TRANSFORMER
    from torsion.cli.demo.text import SHORT, TEXT

    return {task.name: task for task in (DIGITS, TEXT, WRONG_LABELS, SHORT, CONVOLUTIONAL, PERCEPTRON, TRANSFORMER)}


def task_names(variants: bool = False) -> list[str]:
    """The tasks there are, for `--task`; with the variants that methods ask for, for the record."""
    return [task.name for task in _tasks().values() if variants or task.variant_of is None]


def find_task(name: str) -> Task:
    """The task or variant of this name."""
    return _tasks()[name]
