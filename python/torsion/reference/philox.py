"""Philox4x32-10 (Salmon et al., 2011) and stochastic rounding, in plain PyTorch integers."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def philox(seed: int, index: Tensor, step: int | Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each counter ``(index, step, stream)`` under the key ``seed``.

    Args:
        seed: 64-bit key.
        index: int64 tensor of any shape, the low 64 bits of the counter.
        step: third 32-bit word of the counter.
        stream: fourth 32-bit word.

    Returns:
        Four int64 tensors shaped like ``index`` with values in [0, 2^32).
    """
    c0, c1 = index & _LOW, (index >> 32) & _LOW
    c2, c3 = torch.zeros_like(index) + step, torch.full_like(index, stream)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 products wrap around; their 64 bits are right all the same.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((b >> 32) & _LOW) ^ c1 ^ k0, ((a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def rounding_bits(n: int, seed: int, key: int, step: int | Tensor, stream: int, device: torch.device) -> Tensor:
    """16 random bits for each of the elements ``key`` ... ``key + n - 1``: int64 ``[n]``."""
    element = torch.arange(key, key + n, device=device)
    words = torch.stack(philox(seed, element >> 3, step, stream))
    lane = element & 7
    word = words.gather(0, (lane >> 1).unsqueeze(0)).squeeze(0)
    return (word >> (16 * (lane & 1))) & 0xFFFF


def stochastic_round(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 ``x`` to bfloat16 or float16 up or down, with odds by distance, by 16 random bits per element.

    Args:
        x: float32 tensor ``[n]``.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        noise: int64 ``[n]`` in [0, 2^16); float16 uses the low 13 bits.

    Returns:
        Tensor ``[n]`` of ``dtype``. Inf and NaN stay; |x| beyond the largest float16 becomes Inf.
    """
    bits = x.view(torch.int32).to(torch.int64) & _LOW
    if dtype == torch.bfloat16:
        kept = (bits + noise) & 0xFFFF0000
        rounded = kept.to(torch.int32).view(torch.float32).to(dtype)
        return torch.where(torch.isfinite(x), rounded, x.to(dtype))
    noise = noise & 0x1FFF
    normal = ((bits & 0x7FFFFFFF) + noise) & ~0x1FFF
    normal_value = normal.to(torch.int32).view(torch.float32)
    subnormal_value = torch.floor(x.abs() * 2.0**24 + noise.to(torch.float32) * 2.0**-13) * 2.0**-24
    magnitude = torch.where(x.abs() < 2.0**-14, subnormal_value, normal_value)
    rounded = torch.copysign(magnitude, x).to(dtype)
    return torch.where(torch.isfinite(x), rounded, x.to(dtype))
