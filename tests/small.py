"""A few small parameters, their gradients and two equal optimizers: what the tests of behaviour start from."""

from __future__ import annotations

import torch
from torch import nn

import torsion

TORCH = {torsion.TAM: torch.optim.SGD, torsion.AdaTAM: torch.optim.Adam, torsion.AdaTAMW: torch.optim.AdamW}
SHAPES = [(4, 3), (5,), ()]
MOMENTUM = {torsion.TAM: "momentum_buffer", torsion.AdaTAM: "exp_avg", torsion.AdaTAMW: "exp_avg"}


def parameters(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradients(steps, shapes=SHAPES, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator) for s in shapes] for _ in range(steps)]


def pair(cls, **options):
    """Two optimizers over equal parameters of their own."""
    return cls(parameters(), lr=0.01, **options), cls(parameters(), lr=0.01, **options)


def spoil(params):
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
