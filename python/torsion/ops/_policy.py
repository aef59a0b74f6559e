"""Whether a masked layer leaves out what is dead, or computes it with zeros in the weight.

Leaving out saves multiplications and moves numbers: live columns are gathered, results spread. Where nearly all live,
the dense product is cheaper. One number moved costs as much as some multiplications spared in each of the three
products; the wider the layer, the more, for large products run faster: 11, 16, 21, 31 for widths of 128, 256, 512, 1024
(one thread, AVX-512, float32, 256 to 4096 rows), which is about the root of the width.

By sizes alone, not by what the lists hold: what is saved for the backward depends on it, and a compiler has no more to
go by.
"""

from __future__ import annotations

import math

from torch import Tensor

_CHANNELS = 16
"""A convolution computes channels by so many, needed or not."""


def _live(index: Tensor | None, size: int) -> int:
    return size if index is None else index.shape[0]


def _nothing_to_choose(k: int, k_live: int, n: int, n_live: int) -> bool:
    return (k_live == k and n_live == n) or k_live == 0 or n_live == 0


def _per_move(k: int, n: int) -> float:
    return math.sqrt(math.sqrt(k * n))


def linear_is_dense(m: int, weight: Tensor, in_idx: Tensor | None, out_idx: Tensor | None, compact: bool) -> bool:
    """Whether a linear layer of ``m`` rows is computed dense; ``compact``: x or y holds live units only."""
    n, k = weight.shape
    k_live, n_live = _live(in_idx, k), _live(out_idx, n)
    if compact or _nothing_to_choose(k, k_live, n, n_live):
        return False
    # The dense form moves numbers too: it makes two copies of the weight.
    moved = m * (2 * k_live + n_live + n + k) + 2 * (n_live * k_live - n * k)
    return m * (k * n - k_live * n_live) < _per_move(k, n) * moved


def conv_is_dense(
    x: Tensor, size: list[int], weight: Tensor, in_idx: Tensor | None, out_idx: Tensor | None, groups: int,
    compact: bool,
) -> bool:  # fmt: skip
    """Whether a convolution of ``x`` to planes of ``size`` is computed dense."""
    n, k = weight.shape[0], weight.shape[1] * groups
    k_live, n_live = _live(in_idx, k), _live(out_idx, n)
    # On other devices the host would have to wait for a look at the result.
    if compact or x.device.type != "cpu" or _nothing_to_choose(k, k_live, n, n_live):
        return False
    inputs, outputs = x.shape[0] * x.shape[2] * x.shape[3], x.shape[0] * size[0] * size[1]
    computed = [min(full, -(-live // _CHANNELS) * _CHANNELS) for live, full in ((k_live, k), (n_live, n))]
    spared = (k * n - computed[0] * computed[1]) * weight.shape[2] * weight.shape[3] // groups
    moved = inputs * (2 * k_live + k) + outputs * (n_live + n)
    return outputs * spared < _per_move(k, n) * moved
