"""What DemP adds inside the step of an optimizer of ours: a lasso on some gradients, noise on some parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseRows:
    """Where a parameter's noise comes from; it is seen as ``[rows, columns]``, contiguous.

    Attributes:
        columns: length of a row, as in the uncut parameter.
        live: uint8 ``[rows]``, 0 where no noise is added; None for none of these.
        row_of: int64 ``[rows]``, number of each row in the uncut parameter; None where they are as they were.
        tensor_id: number of the parameter in the uncut model.
    """

    columns: int
    live: Tensor | None
    row_of: Tensor | None
    tensor_id: int

    def packed(self) -> list[int]:
        """As a launch table takes it; the tensors must outlive the table."""
        pointers = [0 if t is None else t.data_ptr() for t in (self.live, self.row_of)]
        return [self.columns, *pointers, self.tensor_id]


@dataclass(eq=False)
class Perturbation:
    r"""Lasso and noise of the steps to come (arXiv 2403.07688); ``csrc/rules/demp_step.h`` has the equations.

    Attributes:
        scales: parameters whose gradient takes ``lasso * sign(p)``.
        noise: parameters that take ``sigma`` times standard normal numbers after the update.
        seed: 64-bit key of the numbers.
        lasso, sigma, step: of the next step; 0-dim tensors where only the device knows them.
    """

    scales: Collection[Tensor] = ()
    noise: Mapping[Tensor, NoiseRows] = field(default_factory=dict)
    seed: int = 0
    lasso: float | Tensor = 0.0
    sigma: float | Tensor = 0.0
    step: int | Tensor = 0

    @property
    def seed_of_op(self) -> int:
        """The seed as an op takes it, a signed 64-bit integer."""
        return self.seed - 2**64 if self.seed >= 2**63 else self.seed

    def numbers(self, device: torch.device) -> Tensor:
        """Lambda, sigma and step as kernels on ``device`` take them: float64 ``[3]``."""
        values = (self.lasso, self.sigma, self.step)
        if not any(isinstance(v, Tensor) for v in values):
            return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)
        parts = [torch.as_tensor(v, dtype=torch.float64).reshape(()) for v in values]
        return torch.stack([t.to(device, non_blocking=True) for t in parts])
