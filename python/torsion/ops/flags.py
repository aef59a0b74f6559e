"""The detector of dead units; kernels in ``csrc/cpu/flags.cpp`` and ``csrc/cuda/flags.cuh``.

The specification is in :mod:`torsion.reference`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torsion.ops import _plain
from torsion.ops.philox import DTYPES
from torsion.reference import demp

CRITERIA = ("ever_active", "abs_max", "sum_le", "dormant")

_plain.register("active_flags_", demp.active_flags_, (1, 2))


def active_flags_(
    y: Tensor,
    flags: Tensor,
    count: Tensor,
    channel_dim: int = 1,
    criterion: str = "ever_active",
    tau: float = 0.0,
    *,
    backend: str | None = None,
) -> None:
    """Flag the channels of an activation that are live, in place (DemP, arXiv 2403.07688).

    ================  ==============================================================================
    ``ever_active``   some y > tau; for ReLU
    ``abs_max``       some |y| > tau; for GELU, SiLU and everything else
    ``sum_le``        sum of y over all but the channel > tau in some call: the rule of the authors' code
    ``dormant``       mean |y| of the channel > tau times the mean of that over the channels, in some call
    ================  ==============================================================================

    A channel with a NaN is live, and one that is not finite stays out of ``dormant``'s mean. The first two leave a
    channel at its first hit, so that only dead ones are read in full; flags that are set already cost nothing. No
    copies for contiguous and channels_last tensors, ``[M, C]`` and slices of either.

    Args:
        y: what the activation put out, float32, float64, bfloat16 or float16; read. Compared in float32 (float64).
        flags: uint8 ``[C]``; receives 1 for live channels, other entries stay.
        count: int64 ``[1]``; grows by ``y.shape[0]``. 0 says that nothing was seen, when no channel is live either.
        channel_dim: dim of y with the C channels; negative ones count from the end.
        criterion: see above.
        tau: threshold, not negative.
        backend: "cuda", "triton", "cpu" or "reference"; TORSION_BACKEND or the best for the device when None.

    Raises:
        ValueError: criterion, tau or channel_dim, or flags and count of another size or device.
        TypeError: a dtype other than those above.
    """
    if criterion == "saturation":
        raise ValueError(
            "active_flags_: criterion='saturation' finds constant units, not silent ones, which no flag stands for; "
            f"use one of {', '.join(CRITERIA)}, or torsion.prune.live_units to watch it"
        )
    if criterion not in CRITERIA:
        raise ValueError(f"active_flags_: criterion={criterion!r} is unknown; use one of {', '.join(CRITERIA)}")
    if not (math.isfinite(tau) and tau >= 0):
        raise ValueError(f"active_flags_: tau={tau} must be finite and not negative")
    if y.dtype not in DTYPES:
        raise TypeError(f"active_flags_: y is {y.dtype}, must be float32, float64, bfloat16 or float16")
    if not -y.dim() <= channel_dim < y.dim():
        raise ValueError(f"active_flags_: channel_dim={channel_dim} is no dim of y, whose shape is {tuple(y.shape)}")
    for name, t, dtype, size in (
        ("flags", flags, torch.uint8, y.shape[channel_dim]),
        ("count", count, torch.int64, 1),
    ):
        if t.dtype != dtype:
            raise TypeError(f"active_flags_: {name} is {t.dtype}, must be {dtype}")
        if t.shape != (size,) or not t.is_contiguous():
            raise ValueError(f"active_flags_: {name} must be contiguous of shape [{size}], is {list(t.shape)}")
        if t.device != y.device:
            raise ValueError(f"active_flags_: {name} is on {t.device}, y on {y.device}")
    _plain.run_("active_flags_", y.device.type, backend, y, flags, count, channel_dim, criterion, float(tau))
