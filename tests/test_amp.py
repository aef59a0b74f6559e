"""Mixed precision with torch's own GradScaler, and clipping inside the step.

The scaler hands its scale and its finding over as tensors (``grad_scale``, ``found_inf``); dividing by the scale, the
check for overflow and the clipping all happen in the two passes a step makes anyway.
"""

from __future__ import annotations

import pytest
import torch
from helpers import CLASSES, LOW, each_class, each_dtype, ids, same_bits, snapshot
from tolerances import NORM, STATE, Row, close
from torch import nn

import torsion

MOMENTUM = {torsion.TAM: "momentum_buffer", torsion.AdaTAM: "exp_avg", torsion.AdaTAMW: "exp_avg"}


def network(dtype=torch.float32, device="cpu"):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(device, dtype)


def batch(step, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(8, 6, generator=generator)
    return x.to(device, dtype), x[:, :2].to(device, dtype)


def loss_of(model, step):
    p = next(model.parameters())
    x, y = batch(step, p.dtype, p.device)
    return nn.functional.mse_loss(model(x), y)


class Run:
    """A model, its optimizer, a scaler or none."""

    def __init__(self, target, cls, scaler=None, dtype=torch.float32, lr=0.01, **options):
        self.model = network(dtype, target.device)
        self.optimizer = target.optimizer(cls, self.model.parameters(), lr=lr, **options)
        self.scaler = scaler

    def backward(self, step):
        self.optimizer.zero_grad()
        loss = loss_of(self.model, step)
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self):
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def momenta(self):
        return torch.cat([s[MOMENTUM[type(self.optimizer)]].flatten() for s in self.optimizer.state.values()])

    def gradients(self):
        return [p.grad for p in self.model.parameters()]


def scaler_for(target, scale=2.0**10, **options):
    return torch.amp.GradScaler(target.device, init_scale=scale, **{"growth_interval": 1000, **options})


# The unscaling folded into the step


@pytest.mark.parametrize("max_grad_norm", [None, 0.05], ids=["unclipped", "clipped"])
@each_class
def test_a_scaled_run_equals_an_unscaled_one(fast_target, cls, max_grad_norm):
    """A power of two scales float32 gradients without rounding, so even the bits agree."""
    options = {"max_grad_norm": max_grad_norm, "weight_decay": 0.1}
    scaled = Run(fast_target, cls, scaler_for(fast_target), **options)
    plain = Run(fast_target, cls, **options)
    for step in range(5):
        for run in (scaled, plain):
            run.backward(step)
        for a, b in zip(scaled.gradients(), plain.gradients(), strict=True):
            assert torch.equal(a, b * 2**10)
        for run in (scaled, plain):
            run.step()
        assert torch.equal(scaled.optimizer.grad_norm(), plain.optimizer.grad_norm())
        assert same_bits(snapshot(scaled.optimizer), snapshot(plain.optimizer))
    assert int(scaled.optimizer.skipped_steps()) == 0


@each_dtype(*LOW)
@each_class
def test_low_precision_parameters(fast_target, cls, dtype):
    """float32 state sees what the scaled gradients hold; the parameters take the same steps."""
    scaled = Run(fast_target, cls, scaler_for(fast_target, 16.0), dtype)
    plain = Run(fast_target, cls, dtype=dtype)
    for step in range(4):
        for run in (scaled, plain):
            run.backward(step)
        # Rounding in the backward pass may differ with the scale; the step must not add to that.
        for p, q in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
            p.grad = q.grad / 16
        for run in (scaled, plain):
            run.step()
        assert same_bits(snapshot(scaled.optimizer), snapshot(plain.optimizer))


def test_scale_that_is_no_power_of_two(fast_target):
    scaled, plain = Run(fast_target, torsion.AdaTAM, scaler_for(fast_target, 1000.0)), Run(fast_target, torsion.AdaTAM)
    for step in range(3):
        for run in (scaled, plain):
            run.backward(step)
            run.step()
    close(scaled.momenta(), plain.momenta(), STATE[torch.float32])
    close(scaled.optimizer.grad_norm(), plain.optimizer.grad_norm(), NORM)


def test_autocast_and_scaler_train(fast_target):
    torch.manual_seed(0)
    run = Run(fast_target, torsion.AdaTAMW, scaler_for(fast_target), bias_correction=True)
    losses = []
    for _ in range(60):
        run.optimizer.zero_grad()
        with torch.autocast(fast_target.device, dtype=torch.bfloat16):
            loss = loss_of(run.model, 0)
        run.scaler.scale(loss).backward()
        run.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_float16_gradients_that_would_vanish_unscaled(fast_target):
    """The reason to scale: 1e-8 is 0 in float16, and 2^16 times that is not."""
    p = nn.Parameter(torch.ones(4, dtype=torch.float16, device=fast_target.device))
    optimizer = fast_target.optimizer(torsion.TAM, [p])
    scaler = scaler_for(fast_target, 2.0**16)
    scaler.scale(torch.zeros((), device=fast_target.device))  # it makes its scale at the first loss
    p.grad = torch.full_like(p, 1e-8 * 2**16)
    scaler.step(optimizer)
    close(optimizer.state[p]["momentum_buffer"], 0.5 * p.grad.double().cpu() / 2**16, STATE[torch.float32])


# Overflow


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@each_class
def test_overflow_skips_lowers_the_scale_and_is_counted(fast_target, cls, value):
    run = Run(fast_target, cls, scaler_for(fast_target, backoff_factor=0.5))
    run.backward(0)
    run.step()
    before, reports = snapshot(run.optimizer), (run.optimizer.cosine(), run.optimizer.damping())
    run.backward(1)
    run.gradients()[2][0, 1] = value
    run.step()
    assert same_bits(snapshot(run.optimizer), before)
    assert (run.optimizer.cosine(), run.optimizer.damping()) == reports
    assert run.scaler.get_scale() == 2.0**9
    assert int(run.optimizer.skipped_steps()) == 1
    assert not run.optimizer.grad_norm().isfinite()
    run.backward(2)
    run.step()
    assert not same_bits(snapshot(run.optimizer), before)
    assert int(run.optimizer.skipped_steps()) == 1


@pytest.mark.parametrize("cls", CLASSES, ids=ids)
def test_the_scale_finds_its_level_as_with_torchs_optimizer(fast_target, cls):
    """Growth and backoff: the same scales as a torch optimizer of which every other gradient overflows."""
    ours = Run(fast_target, cls, scaler_for(fast_target, growth_interval=2))
    theirs = Run(fast_target, torsion.TAM, scaler_for(fast_target, growth_interval=2))
    theirs.optimizer = torch.optim.SGD(theirs.model.parameters(), lr=0.01)
    for step in range(8):
        for run in (ours, theirs):
            run.backward(step)
            if step in (2, 5):
                run.gradients()[0].fill_(float("inf"))
            run.step()
        assert ours.scaler.get_scale() == theirs.scaler.get_scale()
    assert int(ours.optimizer.skipped_steps()) == 2


def test_overflow_of_the_very_first_step(fast_target):
    run = Run(fast_target, torsion.TAM, scaler_for(fast_target), init="clone")
    plain = Run(fast_target, torsion.TAM, init="clone")
    run.backward(0)
    run.gradients()[0].fill_(float("inf"))
    run.step()
    assert all(float(s["step"]) == 0 for s in run.optimizer.state.values())
    for step in (1, 2):
        for r in (run, plain):
            r.backward(step)
            r.step()
    assert same_bits(snapshot(run.optimizer), snapshot(plain.optimizer)), "the clone is taken from the first step taken"


def test_a_scheduler_step_after_a_skip_gives_no_warning(fast_target, recwarn):
    run = Run(fast_target, torsion.TAM, scaler_for(fast_target))
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1)
    run.backward(0)
    run.gradients()[0].fill_(float("inf"))
    run.step()
    scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


# unscale_ first


@each_class
def test_unscale_and_clip_grad_norm_before_the_step(fast_target, cls):
    scaled, plain = Run(fast_target, cls, scaler_for(fast_target)), Run(fast_target, cls)
    for step in range(4):
        for run in (scaled, plain):
            run.backward(step)
            if run.scaler:
                run.scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.05)
            run.step()
        assert same_bits(snapshot(scaled.optimizer), snapshot(plain.optimizer))


def test_overflow_found_by_unscale(fast_target):
    run = Run(fast_target, torsion.TAM, scaler_for(fast_target))
    run.backward(0)
    run.step()
    before = snapshot(run.optimizer)
    run.backward(1)
    run.gradients()[0][0, 0] = float("inf")
    run.scaler.unscale_(run.optimizer)
    # A user who repairs what unscale_ found still gets a skip, as from torch's fused optimizers.
    run.gradients()[0].nan_to_num_(posinf=0.0)
    run.step()
    assert same_bits(snapshot(run.optimizer), before)
    assert int(run.optimizer.skipped_steps()) == 1
    assert run.scaler.get_scale() == 2.0**9


def test_accumulation_over_two_batches(fast_target):
    scaled, plain = Run(fast_target, torsion.TAM, scaler_for(fast_target)), Run(fast_target, torsion.TAM)
    for run in (scaled, plain):
        run.optimizer.zero_grad()
        for step in range(2):
            loss = loss_of(run.model, step) / 2
            (run.scaler.scale(loss) if run.scaler else loss).backward()
        run.step()
    assert same_bits(snapshot(scaled.optimizer), snapshot(plain.optimizer))


# grad_scale and found_inf by hand


@pytest.mark.parametrize("kind", ["tensor", "tensor-of-one", "float64", "number"])
def test_a_scale_set_by_hand_divides(fast_target, kind):
    scaled, plain = Run(fast_target, torsion.TAM), Run(fast_target, torsion.TAM)
    scale = {
        "tensor": torch.tensor(8.0),
        "tensor-of-one": torch.tensor([8.0]),
        "float64": torch.tensor(8.0, dtype=torch.float64),
        "number": 8,
    }[kind]
    scaled.optimizer.grad_scale = scale.to(fast_target.device) if isinstance(scale, torch.Tensor) else scale
    for step in range(3):
        plain.backward(step)
        for p, q in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
            p.grad = 8 * q.grad
        for run in (scaled, plain):
            run.step()
    assert same_bits(snapshot(scaled.optimizer), snapshot(plain.optimizer))


def test_a_scale_set_by_hand_multiplies_with_the_scalers(fast_target):
    """As torch does: ``optimizer.grad_scale`` set before ``scaler.step`` joins the scaler's own, once."""
    scaled, plain = Run(fast_target, torsion.TAM, scaler_for(fast_target, 16.0)), Run(fast_target, torsion.TAM)
    plain.backward(0)
    scaled.backward(0)
    for p in scaled.gradients():
        p.mul_(4)
    scaled.optimizer.grad_scale = 4.0
    for run in (scaled, plain):
        run.step()
    assert same_bits(snapshot(scaled.optimizer), snapshot(plain.optimizer))
    assert not hasattr(scaled.optimizer, "grad_scale"), "the scaler takes back what it handed over"


def test_found_inf_alone_skips(fast_target):
    run = Run(fast_target, torsion.TAM)
    run.backward(0)
    run.step()
    before = snapshot(run.optimizer)
    run.optimizer.found_inf = torch.ones((), device=fast_target.device)
    run.step()
    assert same_bits(snapshot(run.optimizer), before)
    run.optimizer.found_inf = torch.zeros((), device=fast_target.device)
    run.step()
    assert not same_bits(snapshot(run.optimizer), before)
    assert int(run.optimizer.skipped_steps()) == 1


# Clipping inside the step


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@each_class
def test_max_grad_norm_is_clip_grad_norm_before_the_step(fast_target, cls, scope):
    """Over scaled gradients and several groups, whatever the scope; the gradients stay as they were."""

    def groups(model):
        return [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "weight_decay": 0.1}]

    inside, before = Run(fast_target, cls, scaler_for(fast_target)), Run(fast_target, cls)
    inside.optimizer = fast_target.optimizer(cls, groups(inside.model), lr=0.01, scope=scope, max_grad_norm=0.05)
    before.optimizer = fast_target.optimizer(cls, groups(before.model), lr=0.01, scope=scope)
    for step in range(4):
        for run in (inside, before):
            run.backward(step)
        gradients = [g.clone() for g in inside.gradients()]
        # torch sums squares in float32, and AdaTAM, whose step this rate is too large for, makes much of little.
        norm = torch.cat([g.flatten() for g in gradients]).double().norm() / 2**10
        assert nn.utils.clip_grad_norm_(before.model.parameters(), 0.05) > 0.05
        for run in (inside, before):
            run.step()
        assert same_bits(inside.gradients(), gradients)
        close(inside.optimizer.grad_norm(), norm, Row(1e-12, why="the order of summation is free"))
        for p, q in zip(inside.model.parameters(), before.model.parameters(), strict=True):
            close(p, q, STATE[torch.float32])
