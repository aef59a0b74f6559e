"""The order in which live units come first, so that they are a view."""

from __future__ import annotations

import torch
from torch import Tensor


class LivePrefix:
    """Sorts the units of a layer: live ones first, each kind in its own order.

    What is sorted so once, weights, biases and activations, is from then on cut by a view: with ``index`` as list of
    live units, :func:`masked_linear` and :func:`masked_conv2d` gather nothing.

    Args:
        live: bool or uint8 ``[n]``, not 0 for live units.

    Attributes:
        order: int64 ``[n]``, the old number of each unit in the new order.
        inverse: int64 ``[n]``, the new number of each unit.
        count: live units.
        index: int32 ``[count]``, 0, 1, 2, ...: the live units in the new order.

    Raises:
        TypeError: ``live`` is neither bool nor uint8.
        ValueError: it has not one dim.
    """

    def __init__(self, live: Tensor) -> None:
        if live.dtype not in (torch.bool, torch.uint8):
            raise TypeError(f"LivePrefix: live is {live.dtype}, must be torch.bool or torch.uint8")
        if live.dim() != 1:
            raise ValueError(f"LivePrefix: live must have one dim, has shape {list(live.shape)}")
        self.order = torch.argsort((live == 0).to(torch.uint8), stable=True)
        self.inverse = torch.empty_like(self.order)
        self.inverse[self.order] = torch.arange(len(live), device=live.device)
        self.count = int((live != 0).sum())
        self.index = torch.arange(self.count, dtype=torch.int32, device=live.device)

    def sort(self, t: Tensor, dim: int = 0) -> Tensor:
        """``t`` with the units along ``dim`` in the new order."""
        return t.index_select(dim, self.order)

    def restore(self, t: Tensor, dim: int = 0) -> Tensor:
        """``t`` with the units along ``dim`` as they were."""
        return t.index_select(dim, self.inverse)
