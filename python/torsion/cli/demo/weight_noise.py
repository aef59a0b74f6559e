"""How much a trained model loses when its weights are disturbed: a measure of the flatness of the minimum it is in.

Every tensor w of parameters becomes w + level * rms(w) * z with z from a standard normal distribution. BatchNorm's
running statistics are no parameters and stay. The draws of z depend on the run's seed alone: all optimizers and all
levels meet the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from torsion.cli.demo.tasks import generator

__all__ = ["DRAWS", "under_weight_noise"]

DRAWS = 3


@torch.no_grad()
def under_weight_noise(
    model: nn.Module, levels: Sequence[float], seed: int, measure: Callable[[], float]
) -> dict[float, list[float]]:
    """What `measure` says of the disturbed model; its weights are afterwards what they were, bit for bit.

    Args:
        model: a trained model.
        levels: standard deviations of the noise, relative to each tensor's root mean square.
        seed: that of the run.
        measure: called once per level and draw.

    Returns:
        level -> one value per draw.
    """
    weights = list(model.parameters())
    kept = [weight.clone() for weight in weights]
    values: dict[float, list[float]] = {level: [] for level in levels}
    try:
        for draw in range(DRAWS):
            stream = generator("weight noise", seed, draw)
            # Drawn on the CPU, so that every device meets the same noise.
            noise = [torch.randn(weight.shape, generator=stream).to(weight.device) for weight in kept]
            for level in levels:
                for weight, before, z in zip(weights, kept, noise, strict=True):
                    weight.copy_(before + level * before.square().mean().sqrt() * z)
                values[level].append(measure())
    finally:
        for weight, before in zip(weights, kept, strict=True):
            weight.copy_(before)
    return values
