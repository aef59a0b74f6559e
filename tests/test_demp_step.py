"""Lasso and noise inside the step of TAM and AdaTAM(W), against both outside it; ``csrc/rules/demp_step.h``."""

from __future__ import annotations

from typing import Any

import pytest
import tolerances
import torch
from helpers import TARGETS, Target, same_bits
from tolerances import close
from torch import Tensor, nn

import torsion
from torsion.optim._perturbation import NoiseRows, Perturbation

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tam": (torsion.TAM, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "tam-clone": (torsion.TAM, {"lr": 0.1, "momentum": 0.9, "init": "clone", "scope": "tensor"}),
    "adatam-clipped": (torsion.AdaTAM, {"lr": 0.01, "max_grad_norm": 0.5, "bias_correction": True}),
    "adatamw-maximize": (torsion.AdaTAMW, {"lr": 0.01, "maximize": True, "scope": "group"}),
}
SHAPES = [(30, 7, 3), (30,), (5, 4), (20000,), ()]
SEED = 2**64 - 5

each_kind = pytest.mark.parametrize("kind", KINDS)


class Pair:
    """One optimizer with lasso and noise inside, one that is given both by hand."""

    def __init__(self, target: Target, kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        torch.manual_seed(1)
        cls, own = KINDS[kind]
        starts = [torch.randn(s).to(dtype) for s in SHAPES]
        self.inside, self.outside = ([nn.Parameter(s.to(target.device, copy=True)) for s in starts] for _ in range(2))
        self.within, self.without = (
            cls(p, backend=target.backend, **{**own, **options}) for p in (self.inside, self.outside)
        )
        live = (torch.arange(30, device=target.device) % 3 != 1).to(torch.uint8)
        rows = torch.arange(30, device=target.device) * 2
        self.maps = {
            0: NoiseRows(21, live, rows, 11),
            1: NoiseRows(1, live, None, 12),
            3: NoiseRows(20000, None, None, 13),
            4: NoiseRows(1, None, None, 14),
        }
        self.scales = (1, 2)
        noise = {self.inside[i]: m for i, m in self.maps.items()}
        self.perturbation = Perturbation({self.inside[i] for i in self.scales}, noise, SEED)
        self.within._perturb(self.perturbation)

    def step(self, t: int, lasso: Any, sigma: Any, spoil: bool = False) -> None:
        self.perturbation.lasso, self.perturbation.sigma, self.perturbation.step = lasso, sigma, t
        for p, q in zip(self.inside, self.outside, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if spoil:
            self.inside[2].grad[0, 0] = self.outside[2].grad[0, 0] = torch.nan
        given = [p.grad.clone() for p in self.inside]
        ascends = -1 if self.without.param_groups[0]["maximize"] else 1
        for i in self.scales:
            self.outside[i].grad += ascends * float(lasso) * self.outside[i].detach().sign()
        self.within.step()
        self.without.step()
        assert same_bits([p.grad for p in self.inside], given), "gradients are the user's"
        if not spoil:
            self.noise(t, float(sigma))

    @torch.no_grad()
    def noise(self, t: int, sigma: float) -> None:
        for i, m in self.maps.items():
            p = self.outside[i]
            lists: list[list[Any]] = [[p], [m.live], [None], [m.row_of], [None], [m.columns if p.dim() > 1 else 1]]
            torsion.ops.demp_update_(*lists, sigma, SEED, t, [m.tensor_id], backend="reference")

    def compare(self, row: tolerances.Row) -> None:
        for p, q in zip(self.inside, self.outside, strict=True):
            close(p, q, row)
        for p, q in zip(self.within.state.values(), self.without.state.values(), strict=True):
            for key in p:
                close(p[key], q[key], row, key)


@each_kind
def test_inside_is_as_outside(compiled_target: Target, kind: str) -> None:
    pair = Pair(compiled_target, kind)
    for t in range(4):
        pair.step(t, 0.01 * (t + 1), 0.05)
        pair.compare(tolerances.REORDERED)
    close(pair.within.grad_norm(), pair.without.grad_norm(), tolerances.REORDERED)


def test_numbers_that_only_the_device_knows(compiled_target: Target) -> None:
    pair = Pair(compiled_target, "tam")
    for t in range(2):
        numbers = (torch.tensor(x, dtype=torch.float64, device=compiled_target.device) for x in (0.02, 0.05))
        pair.step(t, *numbers)
    pair.compare(tolerances.REORDERED)


@each_kind
def test_nothing_to_add_is_the_plain_step(compiled_target: Target, kind: str) -> None:
    pair = Pair(compiled_target, kind, torch.float32)
    pair.without.load_state_dict(pair.within.state_dict())
    for t in range(3):
        pair.step(t, 0.0, 0.0)
        assert same_bits(pair.inside, pair.outside)


def test_a_skipped_step_adds_no_noise(compiled_target: Target) -> None:
    pair = Pair(compiled_target, "adatamw-maximize")
    pair.step(0, 0.1, 0.5)
    before = [p.detach().clone() for p in pair.inside]
    pair.step(1, 0.1, 0.5, spoil=True)
    assert same_bits(pair.inside, before)
    assert int(pair.within.skipped_steps()) == 1


def test_dead_rows_get_no_noise(compiled_target: Target) -> None:
    pair = Pair(compiled_target, "tam", torch.float32, lr=0.0)
    before = pair.inside[0].detach().clone()
    pair.step(0, 0.0, 1.0)
    moved = (pair.inside[0].detach() != before).flatten(1)
    live = pair.maps[0].live
    assert live is not None
    assert not moved[live == 0].any()
    assert moved[live == 1].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_parameters_drift_with_the_noise(compiled_target: Target, dtype: torch.dtype) -> None:
    """A kick far below their last place, rounded at random: the mean over many steps is that of the noise."""
    n, steps, sigma = 4096, 64, 1e-3
    p = nn.Parameter(torch.ones(n, dtype=dtype, device=compiled_target.device))
    optimizer = torsion.TAM([p], lr=0.0, stochastic_rounding=True, backend=compiled_target.backend)
    perturbation = Perturbation((), {p: NoiseRows(n, None, None, 0)}, 3, sigma=sigma)
    optimizer._perturb(perturbation)
    assert optimizer._takes_noise(p)
    assert not torsion.TAM([p])._takes_noise(p), "rounded to nearest the kick would be lost"
    for t in range(steps):
        perturbation.step = t
        p.grad = torch.zeros_like(p)
        optimizer.step()
    wanted = sigma * sum(torsion.ops.philox_normal((n,), 3, t, 0) for t in range(steps))
    assert isinstance(wanted, Tensor)
    drift = p.detach().float().cpu() - 1
    assert torch.corrcoef(torch.stack([drift, wanted]))[0, 1] > 0.25


def test_perturbation_survives_a_load_and_ends() -> None:
    pair = Pair(TARGETS[0], "tam")
    pair.step(0, 0.1, 0.1)
    pair.within.load_state_dict(pair.within.state_dict())
    pair.step(1, 0.1, 0.1)
    pair.compare(tolerances.REORDERED)
    pair.within._perturb(None)
    before = pair.perturbation.sigma
    pair.perturbation.sigma = float("nan")
    for p in pair.inside:
        p.grad = torch.zeros_like(p)
    pair.within.step()
    assert before == 0.1
    assert all(p.isfinite().all() for p in pair.inside)
