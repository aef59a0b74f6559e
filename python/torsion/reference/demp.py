"""DemP's noise and its detector of dead units (arXiv 2403.07688), in plain PyTorch.

e      = row * columns + column of the tensor before any cut
(x0, x1, x2, x3) = Philox(seed; e >> 2, step, tensor_id);  u = (x + 1/2) 2^-32, float32: (x >> 9 + 1/2) 2^-23
xi     = r cos(2 pi u_2) or r sin(2 pi u_2), r = sqrt(-2 ln u_1), for the pairs (x0, x1), (x2, x3); e & 3 says which
w     += sigma xi   on the rows of live units
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torsion.reference.philox import philox, stochastic_round


def normals_of(
    element: Tensor, seed: int, step: int | Tensor, tensor_id: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normals that belong to elements of a tensor.

    Args:
        element: int64 numbers of any shape, row-major positions in the uncut tensor.
        seed: 64-bit key.
        step: 32-bit count of steps, a number or a 0-dim int64 tensor.
        tensor_id: 32-bit number of the tensor.
        dtype: float64 takes 32 bits of a word, float32 23; bfloat16 and float16 are float32 cast once.

    Returns:
        Tensor shaped like ``element``. Computed in float64 from the uniform numbers of the dtype, and cast.
    """
    words = philox(seed, element >> 2, step, tensor_id)
    second = (element & 2) != 0
    a, b = torch.where(second, words[2], words[0]), torch.where(second, words[3], words[1])
    shift, bits = (0, 32) if dtype == torch.float64 else (9, 23)
    u1, u2 = (((x >> shift).double() + 0.5) * 2.0**-bits for x in (a, b))
    angle = 2 * math.pi * u2
    z = (-2 * u1.log()).sqrt() * torch.where((element & 1) != 0, angle.sin(), angle.cos())
    return z.to(torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)


def philox_normal(
    shape: Sequence[int],
    seed: int,
    step: int,
    tensor_id: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals of a whole tensor, see :func:`torsion.ops.philox_normal`."""
    element = torch.arange(math.prod(shape), device=device).reshape(tuple(shape))
    return normals_of(element, seed, step, tensor_id, dtype)


def noise_rounding_bits(element: Tensor, seed: int, step: int | Tensor, tensor_id: int) -> Tensor:
    """16 bits by which an element is rounded after its noise: counters with the top bit set, eight elements a block."""
    index = (element >> 3) + torch.iinfo(torch.int64).min
    words = torch.stack(philox(seed, index, step, tensor_id))
    lane = element & 7
    word = words.gather(0, (lane >> 1).unsqueeze(0)).squeeze(0)
    return (word >> (16 * (lane & 1))) & 0xFFFF


def demp_update_(
    params: Sequence[Tensor],
    row_live: Sequence[Tensor | None],
    col_live: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    orig_cols: Sequence[int],
    sigma: float,
    seed: int,
    step: int,
    tensor_ids: Sequence[int],
    numbers: Tensor | None = None,
) -> None:
    """Add DemP's noise, see :func:`torsion.ops.demp_update_`.

    ``numbers``, float64 ``[2]`` beside the parameters, stand for ``sigma`` and ``step`` and are not read by the host.
    """
    if numbers is None and sigma == 0:
        return
    t = step if numbers is None else numbers[1].to(torch.int64)
    for i, p in enumerate(params):
        if p.numel() == 0:
            continue
        n_rows = p.shape[0] if p.dim() else 1
        n_cols = p.numel() // n_rows
        element = _elements(n_rows, n_cols, rows[i], cols[i], orig_cols[i], p.device)
        live = torch.ones(n_rows, n_cols, dtype=torch.bool, device=p.device)
        for flags, dim in ((row_live[i], 1), (col_live[i], 0)):
            if flags is not None:
                live &= flags.bool().unsqueeze(dim)
        w = p.detach().reshape(n_rows, n_cols)
        math_dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        xi = normals_of(element, seed, t, tensor_ids[i], math_dtype)
        if numbers is None:
            std = torch.tensor(sigma, dtype=math_dtype, device=p.device)
        else:
            std, live = numbers[0].to(math_dtype), live & (numbers[0] != 0)
        noised = w.to(math_dtype) + std * xi
        if p.dtype not in (torch.float32, torch.float64):
            bits = noise_rounding_bits(element.flatten(), seed, t, tensor_ids[i])
            noised = stochastic_round(noised.flatten(), p.dtype, bits).reshape(n_rows, n_cols)
        p.detach().copy_(torch.where(live, noised.to(p.dtype), w).reshape(p.shape))


def _elements(
    n_rows: int, n_cols: int, rows: Tensor | None, cols: Tensor | None, orig_cols: int, device: torch.device
) -> Tensor:
    """Number in the uncut tensor of each entry of a parameter seen as ``[n_rows, n_cols]``."""
    r = torch.arange(n_rows, device=device) if rows is None else rows
    c = torch.arange(n_cols, device=device) if cols is None else cols
    c = c.reshape(-1, n_cols)
    return r.reshape(-1, 1) * orig_cols + c.repeat_interleave(n_rows // c.shape[0], 0)


def active_flags_(
    y: Tensor, flags: Tensor, count: Tensor, channel_dim: int = 1, criterion: str = "ever_active", tau: float = 0.0
) -> None:
    """Flag the channels that are live, see :func:`torsion.ops.active_flags_`."""
    rows = y.detach().movedim(channel_dim, 0).unsqueeze(-1).flatten(1)
    rows = rows if y.dtype == torch.float64 else rows.float()
    if rows.shape[1]:
        flags |= _live(rows, criterion, tau).to(torch.uint8)
    count += y.shape[0]


def _live(rows: Tensor, criterion: str, tau: float) -> Tensor:
    """Which of the channels ``[C, M]`` are live; NaN is."""
    if criterion == "ever_active":
        return ~(rows <= tau).all(1)
    if criterion == "abs_max":
        return ~(rows.abs() <= tau).all(1)
    if criterion == "sum_le":
        return ~(rows.double().sum(1) <= tau)
    if criterion == "dormant":
        sums = rows.double().abs().sum(1)
        finite = sums.isfinite()
        return ~finite | (sums * int(finite.sum()) > tau * sums[finite].sum())
    raise ValueError(f"criterion={criterion!r} is none of ever_active, abs_max, sum_le, dormant")
