"""Steps that the optimizer took. Where it skips on the device, only the device knows, and nobody waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

from torsion.prune._schedule import Schedule


class StepCounter:
    """The step t, counted from 0, and the value of a schedule there.

    A plain integer, until an optimizer that may skip a step without telling the host is seen; then an int64 tensor
    beside the parameters. ``most`` stays a bound from above that costs nothing to ask.
    """

    def __init__(self, schedule: Schedule) -> None:
        """Start at 0."""
        self._schedule = schedule
        self._device: Tensor | None = None
        self.most = 0

    def exact(self) -> int:
        """The number of steps taken; waits for the device where it counts."""
        if self._device is not None:
            self.most = int(self._device)
        return self.most

    def set(self, t: int) -> None:
        """Go on from ``t``."""
        self.most, self._device = t, None

    def follow(self, device: torch.device) -> None:
        """Count on ``device`` from now on."""
        if self._device is None:
            self._device = torch.full((), self.most, dtype=torch.int64, device=device)
        elif self._device.device != device:
            self._device = self._device.to(device)

    def now(self) -> int | Tensor:
        """The step t: a tensor, which later steps leave as it is, where the device counts."""
        return self.most if self._device is None else self._device

    def scaled(self, peak: float) -> float | Tensor:
        """``peak * s(t)``, a float or a 0-dim float64 tensor."""
        if self._device is None:
            return peak * self._schedule.at(self.most)
        return peak * self._schedule.on_device(self._device)

    def count(self, skipped: Tensor | None) -> None:
        """Count a step, unless the 0-dim bool tensor ``skipped`` says that it was none."""
        self.most += 1
        if self._device is not None:
            self._device = self._device + (1 if skipped is None else (~skipped).to(self._device.device))
