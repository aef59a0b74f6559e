"""What TAM and AdaTAM share: the sums and the smoothed cosine."""

from __future__ import annotations

import torch
from torch import Tensor

from torsion.reference._step import Pass

N_SUMS, GRAD_NORM2 = 3, 1


def reduce(grad: Tensor, momentum: Tensor, *_other: Tensor) -> list[Tensor]:
    """<m, g>, |g|^2, |m|^2."""
    m = momentum.double()
    return [(m * grad).sum(), (grad * grad).sum(), (m * m).sum()]


def advance(tensors: Pass, sums: Tensor) -> None:
    """Move the scopes to the cosines of this step.

    s = <m, g> / (|m| |g|), 0 if either norm is 0; s^ = decay s^ + (1 - decay) s.
    """
    mg, gg, mm = sums[:, :N_SUMS].unbind(1)
    rows = {}
    for scope, numbers in tensors.scopes().items():
        decay = numbers["decay"]
        norms = gg[scope].sqrt() * mm[scope].sqrt()
        cosine = torch.where(norms == 0, 0.0, mg[scope] / norms).clamp(-1.0, 1.0)
        smoothed = decay * tensors.step.shared[scope, 0].double() + (1 - decay) * cosine
        rows[scope] = torch.stack([smoothed, cosine, (1 + smoothed) / 2])
    tensors.set_shared(rows)
