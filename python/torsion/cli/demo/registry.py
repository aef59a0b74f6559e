"""Which optimizers the demo can compare: one entry in METHODS per torsion method.

To let a method join, add its arms here (baseline first) and record its rates with `python -m torsion.cli.demo.grid`.
The training loop calls `optimizer.step(closure)`, so methods that evaluate the loss several times a step fit as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import torsion
from torsion.cli.usage import UsageError

__all__ = ["ALL", "METHODS", "Arm", "Method", "select_arms"]

ALL = "all"


def _nothing(optimizer: Optimizer) -> dict[str, Tensor]:
    return {}


def _damping_and_cosine(optimizer: Optimizer) -> dict[str, Tensor]:
    assert isinstance(optimizer, (torsion.TAM, torsion.AdaTAMW))
    return {"damping": optimizer.damping()["global"], "cosine": optimizer.cosine()["global"]}


@dataclass(frozen=True)
class Arm:
    """One optimizer of a comparison.

    Attributes:
        name: as shown in tables, plots and rates.json.
        settings: everything but the learning rate, in words, for the record.
        rates: learning rates that the recorded grid starts from.
        build: (model, rate) -> optimizer.
        observe: 0-dim tensors to record after a step; read at the end of the run, so that no step waits for the device.
        op: the torsion op it runs on, None for torch's own optimizers.
        after_backward: what its user would do between backward and step; counted as the optimizer's time.
    """

    name: str
    settings: str
    rates: tuple[float, ...]
    build: Callable[[nn.Module, float], Optimizer]
    observe: Callable[[Optimizer], dict[str, Tensor]] = _nothing
    op: str | None = None
    after_backward: Callable[[nn.Module], object] | None = None


@dataclass(frozen=True)
class Method:
    """A torsion method: what to compare it with on each task it supports (baseline first)."""

    name: str
    summary: str
    arms: Mapping[str, tuple[Arm, ...]]


def _octaves(lowest: float, count: int) -> tuple[float, ...]:
    return tuple(lowest * 2**power for power in range(count))


# fused=True is the fastest of torch's own implementations at these sizes, on the CPU as on a GPU.
_SGD = Arm(
    name="SGD",
    settings="torch.optim.SGD(momentum=0.9, weight_decay=5e-4, fused=True)",
    rates=_octaves(0.0125, 6),
    build=lambda model, rate: torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, fused=True),
)
_TAM = Arm(
    name="TAM",
    settings="torsion.TAM(momentum=0.9, weight_decay=5e-4)",
    rates=_octaves(0.025, 6),
    build=lambda model, rate: torsion.TAM(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4),
    observe=_damping_and_cosine,
    op="tam_",
)
# beta2 = 0.99 rather than 0.999: a run of a few hundred steps must be able to warm up for 1/(1 - beta2) steps,
# which AdaTAM needs because its second moment starts small and uncorrected (specs/tam.md, start-up burst).
_ADAMW = Arm(
    name="AdamW",
    settings="torch.optim.AdamW(betas=(0.9, 0.99), weight_decay=0.1, fused=True) after clip_grad_norm_(1.0)",
    rates=_octaves(1e-3, 3),
    build=lambda model, rate: torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    ),
    after_backward=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
)
_ADATAMW = Arm(
    name="AdaTAMW",
    settings="torsion.AdaTAMW(betas=(0.9, 0.99), weight_decay=0.1, max_grad_norm=1.0)",
    rates=_octaves(2e-4, 3),
    build=lambda model, rate: torsion.AdaTAMW(
        model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.1, max_grad_norm=1.0
    ),
    observe=_damping_and_cosine,
    op="adatam_",
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (Method("tam", "torque-aware momentum", {"digits": (_SGD, _TAM), "text": (_ADAMW, _ADATAMW)}),)
}


def select_arms(method: str, task: str) -> list[Arm]:
    """The arms of one method, or of all registered ones, on a task; a shared baseline appears once."""
    if method != ALL and method not in METHODS:
        raise UsageError(f"--method {method}: not in this version; choose from {', '.join((*METHODS, ALL))}")
    chosen = list(METHODS.values()) if method == ALL else [METHODS[method]]
    arms = {arm.name: arm for entry in chosen for arm in entry.arms.get(task, ())}
    if not arms:
        able = [name for name, entry in METHODS.items() if task in entry.arms]
        raise UsageError(f"--method {method}: has no comparison on --task {task}; choose from {', '.join(able)}")
    return list(arms.values())
