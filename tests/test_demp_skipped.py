"""Steps that an optimizer skips: no noise, no count, and nobody waits for the device to say so."""

from __future__ import annotations

import pytest
import torch
from demp_runs import adamw, advance, backward, demp_of, everything, inputs, kill, mlp, same, windows
from test_no_sync import Sync, no_sync
from torch import nn

import torsion


def scaled_steps(model, optimizer, steps, bad, scaler):
    for step in steps:
        optimizer.zero_grad()
        x = inputs(step, dtype=torch.float32)
        loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
        scaler.scale(loss).backward()
        if step in bad:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.0),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=5e-3, weight_decay=0.0, fused=True),
    "tam": lambda ps: torsion.TAM(ps, lr=0.05),
}


@pytest.mark.parametrize("mask", ["row", "grad"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_skipped_step_adds_nothing_and_does_not_count(kind, mask):
    """An overflow: parameters keep their bits, and the next step is the one that would have been."""
    runs = []
    for bad in (set(), {2, 3}):
        model = mlp(dtype=torch.float32)
        optimizer = OPTIMIZERS[kind](model.parameters())
        demp = demp_of(model, optimizer, noise_std=0.05, noise_mask=mask, prune_every=100)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
        scaled_steps(model, optimizer, range(2), bad, scaler)
        if bad:
            before = [p.detach().clone() for p in model.parameters()]
            scaled_steps(model, optimizer, (2, 3), bad, scaler)
            assert same(before, [p.detach() for p in model.parameters()])
            assert demp.steps_taken == 2
        # The running statistics saw the batches of the skipped steps; they do not act on training.
        scaled_steps(model, optimizer, range(4, 9), bad, scaler)
        assert demp.steps_taken == 7
        runs.append([p.detach().clone() for p in model.parameters()])
    assert same(*runs), "the scale is halved, which changes no bit"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_scaled_gradients_get_the_lasso_times_their_scale(kind):
    """The same training with and without a scaler; with one, the gradients are 256 times as large."""
    runs = []
    for scale in (1.0, 2.0**8):
        model = mlp(dtype=torch.float32)
        optimizer = OPTIMIZERS[kind](model.parameters())
        demp = demp_of(model, optimizer, prune_every=100, lasso=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0, growth_interval=1000)
        scaled_steps(model, optimizer, range(5), set(), scaler)
        assert demp.steps_taken == 5
        runs.append([p.detach().clone() for p in model.parameters()])
    assert same(*runs), "a power of two changes no bit"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_scaler_goes_on_through_a_cut(kind):
    """It knows of optimizers, not of parameters: what it counted before a cut holds, and steps are as without it."""
    runs = []
    for scale in (1.0, 2.0**8):
        model = mlp(dtype=torch.float32)
        optimizer = OPTIMIZERS[kind](model.parameters())
        demp = demp_of(model, optimizer, noise_std=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0, growth_interval=6)
        kill(model, 0, 1, 5)
        for step in range(9):
            if scale == 1.0 and step == 2:
                model(inputs(2, dtype=torch.float32))  # the running statistics see the batch of a skipped step
                continue
            scaled_steps(model, optimizer, (step,), {2}, scaler)
            demp.step(windows(torch.float32))
        assert demp.generation == 1
        assert demp.steps_taken == 8
        runs.append(everything(model)["model"])
    assert scaler.get_scale() == 2.0**8, "halved at the overflow, doubled six steps later"
    assert runs[0]["0.weight"].shape[0] == 6
    assert same(*runs)


def test_torsions_optimizers_skip_without_a_scaler():
    model = mlp()
    optimizer = torsion.AdaTAMW(model.parameters(), lr=0.01)
    demp = demp_of(model, optimizer)
    advance(model, optimizer, range(2), demp)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 2)
    model[3].weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert same(before, [p.detach() for p in model.parameters()])
    assert demp.steps_taken == 2
    assert not demp.due
    advance(model, optimizer, range(3, 4))
    assert demp.steps_taken == 3
    assert not demp.due, "four calls of step(), three steps"
    advance(model, optimizer, range(4, 5))
    assert demp.due


def hooks_of(optimizer):
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


@pytest.mark.parametrize("mask", ["row", "grad", "none"])
@pytest.mark.parametrize("kind", ["tam", "fused", "adamw"])
def test_no_step_waits_for_the_device(kind, mask):
    """Nor does asking ``due`` far from a window, or ``demp.step`` there."""
    model = mlp(dtype=torch.float32)
    fused = {"fused": True} if kind == "fused" else {"foreach": True, "capturable": False}
    optimizer = torsion.TAM(model.parameters(), lr=0.1) if kind == "tam" else adamw(model, **fused)
    demp = demp_of(model, optimizer, prune_every=100, noise_mask=mask)
    advance(model, optimizer, range(2), demp)
    backward(model, 2, torch.float32)
    if kind == "fused":
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        optimizer.step()
        backward(model, 3, torch.float32)
    if kind == "adamw":  # its own step reads its counters; DemP's part is what is looked at
        optimizer.step()
        with no_sync(), torch.no_grad():
            for hook in hooks_of(optimizer):
                hook(optimizer, (optimizer,), {})
    else:
        with no_sync(optimizer if kind == "tam" else None):
            if kind == "tam":
                optimizer.step()
            else:
                for hook in hooks_of(optimizer):
                    hook(optimizer, (optimizer,), {})
            assert not demp.due
            assert demp.step(windows) is None
    if kind == "tam":
        with pytest.raises(Sync), no_sync():
            _ = demp.steps_taken


class Still(torch.optim.Optimizer):
    """Takes a scaler's findings and does nothing."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self): ...


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_noise_that_only_the_device_knows_is_the_same(dtype):
    """Size and step of the noise as tensors, a skipped step among them, against numbers of the host's."""
    runs = []
    for flags in ((None, None, None), (0.0, 1.0, 0.0, 0.0)):
        model = mlp().to(dtype)
        optimizer = Still(model.parameters())
        demp = demp_of(model, optimizer, noise_std=0.1)
        kill(model, 0, 1)
        kill(model, 3, 1, 4)
        demp.finish(windows(dtype))
        demp.observe(windows(dtype))
        optimizer.grad_scale, optimizer.found_inf = None, None
        for flag in flags:
            if flag is not None:
                optimizer.found_inf = torch.tensor(flag)
            optimizer.step()
        assert demp.steps_taken == 3
        runs.append([p.detach().double() for p in model.parameters()])
    unit = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 1e-6)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * unit, atol=1e-6 if unit > 1e-6 else 1e-7)
        if unit > 1e-6:
            assert (a == b).double().mean() > 0.95, "rounded by the same bits"
