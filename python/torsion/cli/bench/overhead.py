"""What a step costs beside time: memory beyond parameters, gradients and state, and the time of ``import torsion``."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from torsion.cli.bench.comparisons import Limit
from torsion.cli.bench.figures import Figure, Place
from torsion.cli.bench.lists import TensorList
from torsion.cli.bench.probe import make_params, make_step

__all__ = ["import_figure", "memory_figures"]

_OPTIMIZERS = {"tam": ("TAM", 1), "adatam": ("AdaTAMW", 2), "lookbehind": ("Lookbehind", 3)}
"""Method -> class, tensors of state for each parameter: moments, and the fast and slow weights."""

_CHUNK = 16384  # elements; the planner's unit
_STEPS = 3
_IMPORT_LIMIT = Limit(0.5, ())
_IMPORT_PAIRS = 5


def _memory_limit(tensors: TensorList) -> Limit:
    chunks = sum(math.ceil(math.prod(shape) / _CHUNK) for shape in tensors.shapes)
    return Limit(2**20 + 64 * chunks, ())


def memory_figures(tensors: TensorList, methods: Sequence[str], place: Place) -> Iterator[Figure]:
    """Bytes beyond parameters, gradients and state: at the peak of the first steps, and held between steps."""
    for name, states in (_OPTIMIZERS[method] for method in methods if method in _OPTIMIZERS):
        what, limit = f"{name}: extra memory", _memory_limit(tensors)
        if place.device.type == "cuda":
            used: dict[str, int | None] = _on_gpu(name, states, tensors, place.device)
            note = "by torch's allocator"
        elif Path("/proc/self/clear_refs").exists():
            stepped, bare = (_child(name, states, tensors, place, steps) for steps in (_STEPS, 0))
            used = {key: stepped[key] - bare[key] for key in bare}
            note = "resident memory of a process that takes three steps or cycles less that of one that makes the state"
        else:
            used, note = {"peak": None, "held": None}, "not measured: Linux alone can reset the peak of resident memory"
        yield Figure.at(place, f"{what}, peak", tensors.name, "bytes", limit, value=used["peak"], note=note)
        yield Figure.at(place, f"{what}, held", tensors.name, "bytes", value=used["held"], note=note)


def _child(name: str, states: int, tensors: TensorList, place: Place, steps: int) -> dict[str, int]:
    task = {"optimizer": name, "states": states, "steps": steps, "shapes": tensors.shapes, "threads": place.threads}
    done = subprocess.run(
        [sys.executable, "-m", "torsion.cli.bench.probe"],
        input=json.dumps(task),
        env={**os.environ, "PYTHONMALLOC": "malloc"},  # Python's own pools would hide small objects in old pages
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _on_gpu(name: str, states: int, tensors: TensorList, device: torch.device) -> dict[str, int | None]:
    params = make_params(tensors.shapes, device)
    step = make_step(name, params)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(_STEPS):
        step()
    torch.cuda.synchronize(device)
    # The allocator rounds every tensor up to 512 bytes.
    own = before + states * sum(math.ceil(4 * p.numel() / 512) * 512 for p in params)
    return {"peak": torch.cuda.max_memory_allocated(device) - own, "held": torch.cuda.memory_allocated(device) - own}


def import_figure(place: Place) -> Figure:
    """Processor seconds of ``import torsion`` beyond ``import torch``, in processes that do one or other in turn."""
    code = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"

    def once(module: str) -> float:
        command = [sys.executable, "-c", code.format(module)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    pairs = [(once("torch"), once("torsion")) for _ in range(min(_IMPORT_PAIRS, place.rounds))]
    extra = statistics.median(with_torsion - alone for alone, with_torsion in pairs)
    return Figure.at(
        place, "import torsion beyond import torch", "", "s", _IMPORT_LIMIT,
        value=extra, rounds=len(pairs), clock="process CPU time",
    )  # fmt: skip
