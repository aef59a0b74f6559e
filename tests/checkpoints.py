"""What the tests of checkpoints share."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from helpers import same_bits, snapshot, take_steps
from torch import nn

import torsion

SHAPES = [(4, 3), (5,), ()]
SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
TAM, ADATAM, ADATAMW = torsion.TAM, torsion.AdaTAM, torsion.AdaTAMW
ADAPTIVE = (ADAM, ADAMW, ADATAM, ADATAMW)
STATES = {TAM: ["momentum_buffer"], ADATAM: ["exp_avg", "exp_avg_sq"], ADATAMW: ["exp_avg", "exp_avg_sq"]}
OURS = tuple(STATES)
CROSSINGS = [(SGD, TAM), *itertools.product((ADAM, ADAMW), (ADATAM, ADATAMW))]


def parameters(dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def gradients(steps, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator) for s in SHAPES] for _ in range(steps)]


def through_a_file(checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def copies(optimizer):
    return [nn.Parameter(p.detach().clone()) for g in optimizer.param_groups for p in g["params"]]


def resumed(cls, optimizer, **options):
    """A new optimizer over copies of the parameters, from the checkpoint of ``optimizer``."""
    other = cls(copies(optimizer), **options)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    return other


def torch_options(cls):
    return {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.1} if cls is SGD else {
        "lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1
    }  # fmt: skip


def settings(optimizer):
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def refused(optimizer, checkpoint, error, *words):
    groups = settings(optimizer)
    before, reports = snapshot(optimizer), (optimizer.cosine(), optimizer.skipped_steps())
    params = [p for g in optimizer.param_groups for p in g["params"]]
    twin = copy.deepcopy(optimizer)
    with pytest.raises(error) as caught:
        optimizer.load_state_dict(checkpoint)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert same_bits(snapshot(optimizer), before)
    assert settings(optimizer) == groups
    assert all(p is q for p, q in zip(params, (p for g in optimizer.param_groups for p in g["params"]), strict=True))
    assert (optimizer.cosine(), optimizer.skipped_steps()) == reports
    for o in (optimizer, twin):
        take_steps(o, gradients(2, seed=5))
    assert same_bits(snapshot(optimizer), snapshot(twin)), "the refused load left something behind"


def running(cls, **options):
    optimizer = cls([(f"layer.{i}", p) for i, p in enumerate(parameters())], lr=0.01, **options)
    take_steps(optimizer, gradients(2))
    return optimizer
