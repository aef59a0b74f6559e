"""Lookbehind under torch's own GradScaler: ``unscale_`` before each phase, ``update`` after it, no ``scaler.step``."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cycles import MOMENTUM, Base, Run, ahead, each_base, each_kind, each_reuse, loss_of, order_of, values_of
from helpers import same_bits
from torch import nn

import torsion

INF, NAN = float("inf"), float("nan")


def scaler_for(target, scale=2.0**16, **options):
    return torch.amp.GradScaler(target.device, init_scale=scale, **{"growth_interval": 1000, **options})


@dataclass
class Scaled(Run):
    """A run by phases, with a scaler as the recipe has it."""

    scaler: torch.amp.GradScaler | None = None

    def by_phases(self, step):
        for j, phase in enumerate(order_of(self.k, self.reuse)):
            self.optimizer.zero_grad()
            self.scaler.scale(loss_of(self.model, step)).backward()
            self.spoil(self.model, j)
            self.scaler.unscale_(self.optimizer)
            getattr(self.optimizer, phase)()
            self.scaler.update()


def pair(target, base=MOMENTUM, scale=2.0**16, settings=None, **options):
    settings = settings or {"k": 3, "alpha": "adaptive"}
    return Scaled(target, base, settings, scaler=scaler_for(target, scale, **options)), Run(target, base, settings)


@each_reuse
@each_base()
def test_a_scaled_run_equals_an_unscaled_one(base, reuse, compiled_target):
    """2^16 scales float32 gradients without rounding, so even the bits agree."""
    scaled, plain = pair(compiled_target, base, settings={"k": 2, "reuse_gradients": reuse})
    for step in range(4):
        scaled.by_phases(step)
        plain.by_phases(step)
        assert same_bits(scaled.everything(), plain.everything())
    assert int(scaled.optimizer.skipped_steps()) == 0
    assert scaled.scaler.get_scale() == 2.0**16


def test_a_scaled_run_equals_an_unscaled_one_in_triton(triton_target):
    scaled, plain = pair(triton_target, settings={"k": 2})
    scaled.by_phases(0)
    plain.by_phases(0)
    assert same_bits(scaled.everything(), plain.everything())


def test_the_recipe_as_printed(fast_target):
    """Two outer steps of the text in the interface, against the closure without a scaler."""
    k = 2
    torch.manual_seed(0)
    x, y = torch.randn(16, 4, device=fast_target.device), torch.randn(16, 1, device=fast_target.device)
    models = [nn.Linear(4, 1).to(fast_target.device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opt, plain = (torsion.Lookbehind(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), k=k) for m in models)
    scaler = torch.amp.GradScaler(fast_target.device, init_scale=2.0**16)

    def loss():
        return nn.functional.mse_loss(models[0](x), y)

    def closure():
        plain.zero_grad()
        value = nn.functional.mse_loss(models[1](x), y)
        value.backward()
        return value

    for _ in range(2):
        opt.zero_grad(); scaler.scale(loss()).backward(); scaler.unscale_(opt); opt.ascent_step();  scaler.update()  # noqa: E702  # fmt: skip
        for _ in range(k):
            opt.zero_grad(); scaler.scale(loss()).backward(); scaler.unscale_(opt); opt.descent_step(); scaler.update()  # noqa: E702  # fmt: skip
        plain.step(closure)
    assert same_bits(values_of(opt), values_of(plain))


@each_kind
def test_it_trains_in_autocast(base, fast_target):
    run = Run(fast_target, base, {"k": 2})
    scaler = scaler_for(fast_target)
    losses = []
    for _ in range(60):
        for j, phase in enumerate(order_of(2)):
            run.optimizer.zero_grad()
            with torch.autocast(fast_target.device, dtype=torch.bfloat16):
                loss = loss_of(run.model, 0)
            scaler.scale(loss).backward()
            scaler.unscale_(run.optimizer)
            getattr(run.optimizer, phase)()
            scaler.update()
            losses += [loss.item()] if j == 0 else []
    assert losses[-1] < 0.5 * losses[0]


# Overflow


def _infinite(model):
    model[2].weight.grad[0, 1] = INF


@pytest.mark.parametrize("value", [INF, NAN])
@each_reuse
@each_kind
def test_an_overflow_in_any_phase(base, reuse, value, fast_target):
    """Weights back at the slow ones, counted once, the scale halved once, and the next outer step is whole."""
    settings = {"k": 2, "reuse_gradients": reuse}
    for at in range(len(order_of(2, reuse))):
        scaled, _ = pair(fast_target, base, settings=settings)
        scaled.by_phases(0)
        start = scaled.values()

        def spoil(model, j, at=at):
            if j == at:
                model[2].weight.grad[0, 1] = value

        scaled.spoil = spoil
        scaled.by_phases(1)
        assert same_bits(scaled.values(), start)
        assert int(scaled.optimizer.skipped_steps()) == 1
        assert scaled.scaler.get_scale() == 2.0**15
        scaled.spoil = lambda model, j: None
        scaled.by_phases(2)
        assert not same_bits(scaled.values(), start)
        assert all(v.isfinite().all() for v in scaled.everything())
        assert int(scaled.optimizer.skipped_steps()) == 1
        assert scaled.scaler.get_scale() == 2.0**15


@each_kind
def test_an_overflow_of_the_very_first_evaluation_leaves_no_trace(base, fast_target):
    scaled, plain = pair(fast_target, base)
    scaled.spoil = lambda model, j: _infinite(model) if j == 0 else None
    scaled.by_phases(0)
    scaled.spoil = lambda model, j: None
    for step in (1, 2):
        scaled.by_phases(step)
        plain.by_phases(step)
    assert same_bits(scaled.everything(), plain.everything())


def test_a_scale_too_large_is_lowered_until_gradients_fit(fast_target):
    """A slope of 1000 times 2^127 overflows; an outer step that is given up halves the scale once per evaluation."""
    p = fast_target.parameter([1.0, 2.0], torch.float32)
    optimizer = ahead(fast_target, MOMENTUM, [p], k=2)
    scaler = scaler_for(fast_target, 2.0**127, backoff_factor=0.25)
    outer = 0
    while p.tolist() == [1.0, 2.0]:
        for phase in order_of(2):
            optimizer.zero_grad()
            scaler.scale((1000 * p).sum()).backward()
            scaler.unscale_(optimizer)
            getattr(optimizer, phase)()
            scaler.update()
        outer += 1
        assert outer < 9
    # 2^127 4^-n times 1000 is a float32 from n = 5 on: two outer steps of three evaluations are in vain.
    assert outer == 3
    assert int(optimizer.skipped_steps()) == 2
    assert scaler.get_scale() == 2.0 ** (127 - 2 * 5)


def test_the_growth_interval_counts_evaluations(fast_target):
    """k + 1 a step: with an interval of 3 and k = 2 the scale doubles once per outer step."""
    scaled, _ = pair(fast_target, scale=16.0, settings={"k": 2}, growth_interval=3)
    for outer in range(1, 4):
        scaled.by_phases(0)
        assert scaled.scaler.get_scale() == 16.0 * 2**outer


# Accumulation and clipping between unscale_ and the phase


def test_accumulation_within_a_phase(fast_target):
    """Two micro-batches, one ``unscale_``: the gradient of their sum."""
    runs = pair(fast_target, settings={"k": 2})
    for run in runs:
        scaler = getattr(run, "scaler", None)
        for phase in order_of(2):
            run.optimizer.zero_grad()
            for micro in range(2):
                loss = loss_of(run.model, micro) / 2
                (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.unscale_(run.optimizer)
            getattr(run.optimizer, phase)()
            if scaler:
                scaler.update()
    assert same_bits(runs[0].everything(), runs[1].everything())


def test_clipping_between_unscale_and_descent(fast_target):
    """The direction of the next ascent is the same, clipped or not; the descent is the clipped one."""
    runs = pair(fast_target, settings={"k": 2})
    for run in runs:
        scaler = getattr(run, "scaler", None)
        for phase in order_of(2):
            run.optimizer.zero_grad()
            loss = loss_of(run.model, 0)
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.unscale_(run.optimizer)
            norm = nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)
            assert norm > 0.05
            getattr(run.optimizer, phase)()
            if scaler:
                scaler.update()
    assert same_bits(runs[0].everything(), runs[1].everything())


# scaler.step is not used


@pytest.mark.parametrize("overflow", [False, True], ids=["finite", "overflow"])
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("cls", [torsion.Lookbehind, torsion.SAM])
@each_base("sgd-momentum", "tam", "own-sgd")
def test_scaler_step_raises_and_says_what_to_do(base, cls, unscaled, overflow, fast_target):
    """After an overflow too, where the scaler would silently step over an ordinary optimizer."""
    run = Run(fast_target, base, {}, cls=cls)
    scaler = scaler_for(fast_target)
    before = run.everything()
    for place in range(2):  # outside and inside an outer step
        run.optimizer.zero_grad()
        scaler.scale(loss_of(run.model, 0)).backward()
        if overflow:
            _infinite(run.model)
        if unscaled:
            scaler.unscale_(run.optimizer)
        held = run.everything()
        with pytest.raises(RuntimeError, match=r"ascent_step") as caught:
            scaler.step(run.optimizer)
        assert "descent_step" in str(caught.value)
        assert "unscale_" in str(caught.value)
        assert same_bits(run.everything(), held)
        scaler = scaler_for(fast_target)
        if place == 0:
            run.optimizer.zero_grad()
            loss_of(run.model, 0).backward()
            run.optimizer.ascent_step()
    run.optimizer.abandon()
    assert same_bits(run.values(), before[: len(run.values())])
    run.step(0)
    assert int(run.optimizer.skipped_steps()) == 0


def test_a_disabled_scaler_changes_nothing(fast_target):
    scaled, plain = pair(fast_target, enabled=False)
    scaled.by_phases(0)
    plain.by_phases(0)
    assert same_bits(scaled.everything(), plain.everything())


def test_float16_gradients_that_would_vanish_unscaled(fast_target):
    """1e-8 is 0 in float16; times 2^16 it has a direction, and the ascent has its full length."""
    p = fast_target.parameter([1.0, 1.0], torch.float32)
    base = Base("sgd", torch.optim.SGD, {"lr": 0.0}).build([p])
    optimizer = fast_target.optimizer(torsion.Lookbehind, base, rho=0.5)
    for scale, moved in ((1.0, 0.0), (2.0**16, 0.5 / 2**0.5)):
        p.grad = (torch.full_like(p, 1e-8) * scale).half().float() / scale
        optimizer.ascent_step()
        assert p[0].item() - 1 == pytest.approx(moved, rel=1e-3)
        optimizer.abandon()
