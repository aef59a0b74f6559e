"""DemP in a training run of the demo: windows and cuts as they fall due, what they took and what they left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import torsion
from torsion.cli.demo.arms import Shrinking

if TYPE_CHECKING:
    from torsion.cli.demo.training import Run

__all__ = ["Pruner", "finite", "parameters_of"]


def parameters_of(model: nn.Module) -> int:
    """How many numbers the model trains."""
    return sum(weight.numel() for weight in model.parameters())


@torch.no_grad()
def finite(model: nn.Module, inputs: Tensor) -> bool:
    """Whether the model, in evaluation, gives finite numbers for these inputs; left in training mode."""
    model.eval()
    sound = bool(model(inputs).isfinite().all())
    model.train()
    return sound


class Pruner:
    """Attaches DemP to an optimizer and writes into the run what it does.

    Args:
        run: its plan says how DemP is set; `sizes` and `window_ms` are filled.
        model: what trains, on the plan's device.
        optimizer: of the model.
        inputs: an endless stream of training inputs, for windows alone.
        shrinking: settings of the arm.
    """

    def __init__(
        self, run: Run, model: nn.Module, optimizer: Optimizer, inputs: Iterator[Tensor], shrinking: Shrinking
    ) -> None:
        self._run, self._model, self._inputs, self._joined = run, model, inputs, shrinking.batches
        plan = run.plan
        self._demp = torsion.DemP(
            model,
            optimizer,
            next(inputs),
            total_steps=max(1, int(shrinking.span * plan.steps)),
            lasso=plan.choice.strength,
            noise_std=shrinking.noise_std,
            prune_every=max(1, plan.steps // shrinking.windows),
            window=1,
            seed=plan.seed,
        )
        self._record(0)

    def after_step(self, made: int) -> None:
        """Look at a window and cut if one is due, and once more after the last step."""
        last = made == self._run.plan.steps
        if not (last or self._demp.due):
            return
        begin = self._now()
        window = torch.cat(list(islice(self._inputs, self._joined)))
        try:
            if last:
                self._demp.finish((window,))
            else:
                self._demp.step((window,))
        except RuntimeError:
            if finite(self._model, window):
                raise
            return  # a network that diverged is reported as it is
        self._run.window_ms.append(1e3 * (self._now() - begin))
        self._record(made)

    def _record(self, made: int) -> None:
        units = {name: len(mask) for name, mask in self._demp.live().items()}
        size: dict[str, Any] = {"step": made, "parameters": parameters_of(self._model), "units": units}
        self._run.sizes.append(size)

    def _now(self) -> float:
        if self._run.plan.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
