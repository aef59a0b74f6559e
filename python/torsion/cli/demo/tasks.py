"""What a task is: a data set, a model and a measure of success. The tasks themselves: digits.py and text.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Data", "Metric", "Task", "find_task", "task_names"]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Metric:
    """A number that `Data.evaluate` returns, and how to show it."""

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
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Every metric of the task on the held-out part; leaves the model in training mode."""


@dataclass(frozen=True)
class Task(ABC):
    """A data set, a model and the settings under which optimizers are compared on them.

    Attributes:
        metrics: the first is the one reported as the result.
        choose_by: key of the metric by which a rate is chosen; lower is better.
        steps, seeds: defaults of a run that takes about a minute (digits) or a few (text) on two cores.
        warmup: steps over which the rate rises from zero, at most a fifth of the run.
        threads: CPU threads by default. One: at these sizes a second gains a third when the machine is idle, and loses
            far more when it is not, because each small operation then waits for a thread that is not running.
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

    @abstractmethod
    def load(self, device: torch.device, tuning_fold: int | None = None) -> Data:
        """The data; with a fold (any integer from 0), what is held out is a part of the training data instead."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model on the CPU, initialized from torch's default generator."""


def _tasks() -> dict[str, Task]:
    from torsion.cli.demo.digits import DIGITS
    from torsion.cli.demo.text import TEXT

    return {task.name: task for task in (DIGITS, TEXT)}


def task_names() -> list[str]:
    """The tasks there are, for `--task`."""
    return list(_tasks())


def find_task(name: str) -> Task:
    """The task of this name."""
    return _tasks()[name]
