"""The recipes users start from: a plain loop, a GradScaler, accumulation; on data, and as the examples run them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from cycles import MOMENTUM, Run, each_kind, each_reuse, loss_of, order_of, values_of
from helpers import same_bits
from tolerances import REORDERED, close
from torch import nn

import torsion

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_plain_loop_as_printed():
    """The line of the interface, at a fifth of its rate: momentum 0.9 over five inner steps amplifies what 0.1 does.

    Least squares with rate 0.1 and k = 5 diverges in the published form as it does here.
    """
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    x = torch.randn(64, 4)
    y = x @ torch.randn(4, 1)
    opt = torsion.Lookbehind(torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), k=5)

    def closure():
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


@each_reuse
@each_kind
def test_accumulation_equals_one_large_batch(base, reuse, fast_target):
    """Micro-batches whose losses are averaged, the same ones in every phase."""
    small, large = (Run(fast_target, base, {"k": 2, "reuse_gradients": reuse}, torch.float64) for _ in range(2))
    for step in range(3):
        micro = [2 * step, 2 * step + 1]
        for phase in order_of(2, reuse):
            small.optimizer.zero_grad()
            for m in micro:
                (loss_of(small.model, m) / 2).backward()
            getattr(small.optimizer, phase)()
            large.optimizer.zero_grad()
            ((loss_of(large.model, micro[0]) + loss_of(large.model, micro[1])) / 2).backward()
            getattr(large.optimizer, phase)()
            for a, b in zip(small.values(), large.values(), strict=True):
                close(a, b, REORDERED, f"step {step}")


def test_accumulation_within_a_closure(fast_target):
    by_closure, by_phases = (Run(fast_target, MOMENTUM, {"k": 2}) for _ in range(2))

    def accumulate(run):
        run.optimizer.zero_grad()
        total = 0.0
        for micro in range(2):
            loss = loss_of(run.model, micro) / 2
            loss.backward()
            total = total + loss.detach()
        return total

    for _ in range(2):
        by_closure.optimizer.step(lambda: accumulate(by_closure))
        for phase in order_of(2):
            accumulate(by_phases)
            getattr(by_phases.optimizer, phase)()
    assert same_bits(by_closure.everything(), by_phases.everything())


def test_dropout_needs_its_seed_or_fresh_gradients():
    """With the random numbers fixed per outer step, reuse is exact under dropout too."""
    results = []
    for reuse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        opt = torsion.Lookbehind(torch.optim.SGD(model.parameters(), lr=0.1), k=3, reuse_gradients=reuse)
        for step in range(2):

            def closure(step=step, model=model, opt=opt):
                torch.manual_seed(step)
                opt.zero_grad()
                loss = model(torch.ones(8, 4)).square().mean()
                loss.backward()
                return loss

            opt.step(closure)
        results.append(values_of(opt))
    assert same_bits(*results)


@pytest.mark.parametrize(
    ("example", "bound"), [("lookbehind", None), ("lookbehind_amp", 0.2), ("lookbehind_accumulation", 0.2)]
)
def test_example(example, bound, capsys):
    """It runs as a user would run it, and learns."""
    result = runpy.run_path(str(EXAMPLES / f"{example}.py"))["main"]()
    if bound is None:
        assert result > 0.9, "accuracy"
    else:
        assert result < bound, "loss"
    assert capsys.readouterr().out
