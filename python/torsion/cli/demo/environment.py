"""What a run depends on beyond its arguments: made reproducible, and written into the record."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils import deterministic

import torsion
from torsion.cli.demo.arms import Arm, Choice
from torsion.cli.usage import UsageError, usable_processors
from torsion.ops._backends import choose

__all__ = ["backend_of", "describe", "interruptible", "reproducible"]


@contextlib.contextmanager
def reproducible(threads: int, device: torch.device) -> Iterator[None]:
    """Same seed, same numbers, and a thread count, for the duration; everything as it was afterwards."""
    threads_before = torch.get_num_threads()
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    fill_before = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_num_threads(threads)
    # Only where it is needed: on the CPU these models are deterministic anyway, and filling memory would cost time.
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic_before)
        deterministic.fill_uninitialized_memory = fill_before  # type: ignore[attr-defined]
        torch.set_num_threads(threads_before)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a request to stop after the current step; a second one interrupts at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def backend_of(arm: Arm, device: torch.device) -> str:
    """The back end that the arm's op uses on this device, or "torch" where torch's own operations do all the work."""
    if arm.op is None:
        return "torch"
    try:
        optimizer = arm.build(nn.Linear(1, 1, device=device), Choice(arm.rates[0]))
        # Not torsion.backends(), which speaks of the GPU wherever there is one, also when this run is on the CPU.
        return choose(device.type)[0] if getattr(optimizer, "fused", True) else "torch"
    except ValueError as error:  # an impossible TORSION_BACKEND; the message says what it needs
        raise UsageError(str(error)) from None


def describe(device: torch.device, arms: Sequence[Arm]) -> dict[str, Any]:
    """Everything about this machine that the numbers may depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "torsion": torsion.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "processors": usable_processors(),
        "load average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "back ends": {arm.name: backend_of(arm, device) for arm in arms if arm.op is not None and arm.length == 1},
    }
