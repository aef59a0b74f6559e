"""Everything that one comparison of the demo asked for and did."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torsion.cli.demo.arms import Arm
from torsion.cli.demo.comparison import Difference
from torsion.cli.demo.registry import Block, Comparison
from torsion.cli.demo.tasks import Task
from torsion.cli.demo.training import Run

__all__ = ["Outcome", "backends_used", "count"]


@dataclass(frozen=True)
class Outcome:
    """Everything that was asked and done in one call of the demo.

    Attributes:
        task: what was trained on.
        comparison: the optimizers compared.
        runs: those that made at least one step, in the order they were made.
        interrupted: whether Ctrl-C ended it early.
        seconds: wall time of all runs together.
        settings: the arguments as used.
        facts: what the data were.
        environment: versions, device, threads and back ends.
    """

    task: Task
    comparison: Comparison
    runs: Sequence[Run]
    interrupted: bool
    seconds: float
    settings: dict[str, Any]
    facts: dict[str, Any]
    environment: dict[str, Any]

    def of(self, arm: Arm) -> list[Run]:
        """The runs of one arm."""
        return [run for run in self.runs if run.plan.arm.name == arm.name]

    @property
    def several(self) -> bool:
        """Whether there is more than one block of arms, because their steps do not take equally many gradients."""
        return len(self.comparison.blocks) > 1

    @property
    def window(self) -> int:
        """Steps over which loss curves are averaged, for plots and for the final training loss."""
        return max(1, int(self.settings["steps"]) // 20)

    def differences(self, block: Block) -> list[Difference]:
        """Of every pair of the block's arms and every metric, pair by pair."""
        pairs = itertools.combinations([runs for arm in block.arms if (runs := self.of(arm))], 2)
        return [Difference(*pair, metric) for pair in pairs for metric in self.task.results]


def backends_used(environment: dict[str, Any]) -> str:
    """Which optimizers run on which back end, as `TAM on back end cpu`."""
    used: dict[str, list[str]] = {}
    for name, backend in environment["back ends"].items():
        used.setdefault(backend, []).append(name)
    return ", ".join(f"{' and '.join(names)} on back end {backend}" for backend, names in used.items())


def count(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
