"""What is measured on the networks of runs that are over: which units act, and how long inference takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from torsion.cli.demo.pruner import finite
from torsion.cli.demo.tasks import Data
from torsion.cli.demo.training import Run
from torsion.prune import live_units

__all__ = ["measure"]

_BATCHES = 4  # of training inputs, on which a unit that acts has to show it
_ROUNDS = 15


def measure(runs: Sequence[Run], data: Data) -> None:
    """Fill in `units`, `live` and `inference_ms` of every run whose network did not diverge."""
    trained = [(run, run.model, list(islice(data.inputs(run.plan.seed), _BATCHES))) for run in runs if run.model]
    sound = [(run, model, batches) for run, model, batches in trained if finite(model, batches[0])]
    for run, model, batches in sound:
        masks = live_units(model, batches)
        run.units = {name: len(mask) for name, mask in masks.items()}
        run.live = {name: int(mask.sum()) for name, mask in masks.items()}
    # All networks take turns, so that a disturbance of the machine falls on all of them.
    for index in range(_ROUNDS + 1):
        for run, model, batches in sound:
            spent = _inference(model, batches[0])
            if index:  # the first round warms up
                run.inference_ms.append(spent)


@torch.no_grad()
def _inference(model: nn.Module, inputs: Tensor) -> float:
    """Milliseconds for one batch as in training."""
    model.eval()
    _wait(inputs)
    begin = time.perf_counter()
    model(inputs)
    _wait(inputs)
    spent = 1e3 * (time.perf_counter() - begin)
    model.train()
    return spent


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()
