"""What the demo compares: one entry in METHODS per torsion method.

To let a method join, add its arms to arms.py, a comparison here (baseline first), and record what the arms are tuned by
with `python -m torsion.cli.demo.grid`. The training loop calls `optimizer.step(closure)`, so methods that evaluate the
loss several times a step fit as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torsion.cli.demo import arms as known
from torsion.cli.demo.arms import Arm
from torsion.cli.usage import UsageError

__all__ = ["ALL", "METHODS", "Block", "Comparison", "Method", "arms_on", "select"]

ALL = "all"


@dataclass(frozen=True)
class Block:
    """Arms that are compared with each other, baseline first.

    Attributes:
        equal: what is equal among them.
        in_gradients: progress is counted in gradients, not in steps.
    """

    equal: str
    arms: tuple[Arm, ...]
    in_gradients: bool = False


@dataclass(frozen=True)
class Comparison:
    """A method's comparison on a task.

    Attributes:
        task: the task that it asks for; a variant where the plain task does not show what the method is for.
        blocks: an arm may be in several of them, and is then trained once.
    """

    task: str
    blocks: tuple[Block, ...]

    @property
    def arms(self) -> list[Arm]:
        """The arms of all blocks."""
        return list({arm.name: arm for block in self.blocks for arm in block.arms}.values())

    @property
    def shrinks(self) -> bool:
        """Whether an arm prunes its network."""
        return any(arm.shrinking for arm in self.arms)


@dataclass(frozen=True)
class Method:
    """A torsion method: the comparisons it brings to each task it supports, by the task's name on the command line.

    More than one where it is shown on several networks: they are trained one after the other and reported together.
    """

    name: str
    summary: str
    comparisons: Mapping[str, tuple[Comparison, ...]]


def _one_block(task: str, *arms: Arm) -> tuple[Comparison]:
    return (Comparison(task, (Block("steps", arms),)),)


def _two_blocks(task: str, *arms: Arm) -> tuple[Comparison]:
    """Over as many epochs for every arm, then with as many gradients as the most expensive of them took."""
    most = max(arm.evaluations for arm in arms)
    spending = tuple(arm.spending(most) for arm in arms)
    return (Comparison(task, (Block("epochs", arms), Block("gradient evaluations", spending, in_gradients=True))),)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "tam",
            "torque-aware momentum",
            {
                "digits": _one_block("digits", known.SGD, known.TAM),
                "text": _one_block("text", known.ADAMW, known.ADATAMW),
            },
        ),
        Method(
            "lookbehind",
            "Lookbehind-SAM and SAM",
            {
                "digits": _two_blocks("digits-wrong-labels", known.DECAYED_SGD, known.SAM, known.LOOKBEHIND),
                "text": _two_blocks("text-short", known.ADAMW, known.LOOKBEHIND_ADAMW),
            },
        ),
        Method(
            "demp",
            "demon pruning",
            {
                "digits": (
                    *_one_block("digits-convolutional", known.DENSE_SGD, known.DEMP_CONVOLUTIONAL),
                    *_one_block("digits-mlp", known.DENSE_SGD, known.DEMP_PERCEPTRON),
                ),
                "text": _one_block("text-relu", known.DENSE_ADAMW, known.DEMP_TRANSFORMER),
            },
        ),
    )
}


def select(method: str, task: str) -> dict[str, tuple[Comparison, ...]]:
    """The comparisons of one method, or of all registered ones, on a task; by the method's name."""
    if method != ALL and method not in METHODS:
        raise UsageError(f"--method {method}: not in this version; choose from {', '.join((*METHODS, ALL))}")
    asked = METHODS if method == ALL else {method: METHODS[method]}
    chosen = {name: entry.comparisons[task] for name, entry in asked.items() if task in entry.comparisons}
    if not chosen:
        able = [name for name, entry in METHODS.items() if task in entry.comparisons]
        raise UsageError(f"--method {method}: has no comparison on --task {task}; choose from {', '.join(able)}")
    return chosen


def arms_on(task: str) -> list[Arm]:
    """Every arm that some comparison trains on this task or variant."""
    every = (entry for method in METHODS.values() for group in method.comparisons.values() for entry in group)
    entries = [entry for entry in every if entry.task == task]
    return list({arm.name: arm for entry in entries for arm in entry.arms}.values())
