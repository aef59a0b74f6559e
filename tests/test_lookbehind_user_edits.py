"""What users do between outer steps and between phases: the base steps alone, tensors are replaced, groups change."""

from __future__ import annotations

import pytest
import tolerances
import torch
from cycles import (
    ADAMW,
    BASE,
    MOMENTUM,
    Base,
    OwnAdamW,
    Run,
    ahead,
    base_state,
    each_base,
    each_kind,
    evaluations,
    everything,
    give,
    order_of,
    parameters_of,
    phases,
    values_of,
)
from helpers import lay, same_bits
from tolerances import close
from torch import nn

import torsion

SHAPES = [(4, 3), (5,), ()]
PAIRS = [("sgd-momentum", "own-sgd"), ("adamw", "own-adamw"), ("tam", "own-tam")]


def build(target, base=MOMENTUM, dtype=torch.float32, shapes=SHAPES, **settings):
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(s, device=target.device).to(dtype)) for s in shapes]
    return ahead(target, base, params, **{"k": 2, "rho": 0.2, **settings})


def assert_close(a, b):
    for x, y in zip(everything(a), everything(b), strict=True):
        close(x, y, tolerances.REORDERED)


@pytest.mark.parametrize(("fused", "general"), PAIRS, ids=[p[0] for p in PAIRS])
def test_the_base_may_step_by_itself_between_outer_steps(fused, general, fast_target):
    """Its state is one, whoever steps: the fused path and the base's own step take turns on it."""
    options = BASE[fused].options
    pair = [build(fast_target, Base(n, BASE[n].cls, options), torch.float64) for n in (fused, general)]
    assert pair[0].fused
    assert not pair[1].fused
    for _ in range(3):
        grads, alone = evaluations(pair[0], 3), evaluations(pair[0], 1)[0]
        for optimizer in pair:
            phases(optimizer, grads, 2)
            give(optimizer, alone)
            optimizer.base_optimizer.step()
        assert_close(*pair)


class Staying(torch.optim.SGD):
    """No more than the equation."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(p - group["lr"] * p.grad)


class Rehoming(torch.optim.SGD):
    """Leaves its result in new memory and takes the gradients away, as some optimizers of users do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - group["lr"] * p.grad
                p.grad = None


@pytest.mark.parametrize("settings", [{}, {"alpha": "adaptive"}, {"k": 3, "alpha": "adaptive"}, {"k": 1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_base_that_moves_parameters_to_new_memory(dtype, settings, fast_target):
    """The interpolation writes where the parameter is, not where it was."""
    bases = (Base("moves", Rehoming, {"lr": 0.05}), Base("stays", Staying, {"lr": 0.05}))
    moved, stayed = (build(fast_target, base, dtype, **settings) for base in bases)
    for _ in range(2):
        grads = evaluations(stayed, settings.get("k", 2) + 1)
        for optimizer in (moved, stayed):
            phases(optimizer, grads, settings.get("k", 2))
        assert same_bits(values_of(moved), values_of(stayed))


@each_kind
def test_parameters_in_new_memory_between_outer_steps(base, fast_target):
    """As ``model.to()`` and loading with ``assign=True`` leave them."""
    moved, stayed = build(fast_target, base), build(fast_target, base)
    for _ in range(3):
        for p in parameters_of(moved):
            p.data = p.data.clone()
        grads = evaluations(stayed, 3)
        for optimizer in (moved, stayed):
            phases(optimizer, grads, 2)
        assert same_bits(everything(moved), everything(stayed))


@each_base("sgd", "own-plain-sgd")
def test_a_model_cast_between_outer_steps(base, fast_target):
    """Buffers follow the parameters' dtype."""
    optimizer = build(fast_target, base)
    phases(optimizer, evaluations(optimizer, 3), 2)
    for p in parameters_of(optimizer):
        p.data, p.grad = p.data.double(), None
    fresh = ahead(fast_target, base, [nn.Parameter(v) for v in values_of(optimizer)], k=2, rho=0.2)
    grads = evaluations(optimizer, 3)
    for o in (optimizer, fresh):
        phases(o, grads, 2)
    assert same_bits(everything(optimizer), everything(fresh))


@each_kind
def test_state_thrown_away_between_outer_steps(base, fast_target):
    """The base begins anew."""
    optimizer = build(fast_target, base)
    phases(optimizer, evaluations(optimizer, 3), 2)
    optimizer.base_optimizer.state.clear()
    fresh = ahead(fast_target, base, [nn.Parameter(v) for v in values_of(optimizer)], k=2, rho=0.2)
    for _ in range(2):
        grads = evaluations(optimizer, 3)
        for o in (optimizer, fresh):
            phases(o, grads, 2)
        assert same_bits(everything(optimizer), everything(fresh))


@each_base("sgd-momentum", "tam", "own-sgd")
def test_a_momentum_buffer_edited_between_outer_steps(base, fast_target):
    edited, replaced = build(fast_target, base), build(fast_target, base)
    for optimizer in (edited, replaced):
        torch.manual_seed(3)
        phases(optimizer, evaluations(optimizer, 3), 2)
    for p, q in zip(parameters_of(edited), parameters_of(replaced), strict=True):
        edited.state[p]["momentum_buffer"].mul_(0.5)
        replaced.state[q]["momentum_buffer"] = replaced.state[q]["momentum_buffer"] * 0.5
    grads = evaluations(edited, 3)
    for optimizer in (edited, replaced):
        phases(optimizer, grads, 2)
    assert same_bits(everything(edited), everything(replaced))


@each_base("sgd-momentum", "adamw", "tam", "own-sgd")
def test_gradients_in_another_layout_at_every_phase(base, fast_target):
    shapes = [(4, 3, 2, 2), (6, 5)]
    mixed, plain = (build(fast_target, base, shapes=shapes) for _ in range(2))
    layouts = ["contiguous", "transposed", "every_second", "misaligned"]
    for outer in range(2):
        grads = evaluations(plain, 3)
        phases(plain, grads, 2)
        for j, (phase, each) in enumerate(zip(order_of(2), grads, strict=True)):
            for p, g in zip(parameters_of(mixed), each, strict=True):
                p.grad = lay(g, layouts[(outer + j) % 4])
            getattr(mixed, phase)()
        for a, b in zip(everything(mixed), everything(plain), strict=True):
            close(a, b, tolerances.STATE[torch.float32])


@each_base("sgd-momentum", "own-sgd")
def test_group_values_changed_between_phases_hold_from_there(base, fast_target):
    """A descent without a rate leaves the fast weights; the other one is as it was."""
    optimizer = build(fast_target, base, torch.float64, k=2, alpha=1.0, rho=0.0)
    start = values_of(optimizer)
    optimizer.param_groups[0].update(momentum=0.0, weight_decay=0.0, lr=0.5)
    grads = evaluations(optimizer, 3)
    phases(optimizer, grads[:2], 2)
    optimizer.param_groups[0]["lr"] = 0.0
    give(optimizer, grads[2])
    optimizer.descent_step()
    for p, s, g in zip(values_of(optimizer), start, grads[1], strict=True):
        close(p, s - 0.5 * g, tolerances.STATE[torch.float64])


def test_the_path_follows_the_groups(fast_target):
    """A group that no kernel takes turns the whole optimizer to the general path; the count of skipped steps stays."""
    optimizer, general = (build(fast_target, Base("adamw", cls, {"lr": 0.01})) for cls in (ADAMW, OwnAdamW))
    for o in (optimizer, general):
        torch.manual_seed(3)
        phases(o, evaluations(o, 3), 2)
        phases(o, [[torch.full_like(p, torch.nan) for p in parameters_of(o)]] * 3, 2)
        o.add_param_group({"params": [nn.Parameter(torch.ones(3, device=fast_target.device))], "amsgrad": True})
        assert not o.fused
        assert int(o.skipped_steps()) == 1
        phases(o, evaluations(o, 3), 2)
    for a, b in zip(everything(optimizer), everything(general), strict=True):
        close(a, b, tolerances.STATE[torch.float32])


def test_groups_and_checkpoints_wait_for_the_end_of_an_outer_step(fast_target):
    optimizer = build(fast_target)
    checkpoint = optimizer.state_dict()
    phases(optimizer, evaluations(optimizer, 1), 2)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match="descent_step"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(RuntimeError, match="descent_step"):
        optimizer.load_state_dict(checkpoint)
    assert len(optimizer.param_groups) == 1
    assert same_bits(everything(optimizer), before)


@each_kind
def test_outer_steps_of_one_run_do_not_depend_on_another(base, fast_target):
    """Two optimizers over two models, phase by phase in turn."""
    together = [Run(fast_target, base, {"k": 2}) for _ in range(2)]
    alone = Run(fast_target, base, {"k": 2})
    for step in range(2):
        closures = [run.closure(step) for run in together]
        for phase in order_of(2):
            for run, closure in zip(together, closures, strict=True):
                closure()
                getattr(run.optimizer, phase)()
        alone.step(step)
    for run in together:
        assert same_bits(run.everything(), alone.everything())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_random_rounding_of_the_base_rounds_the_slow_weights(dtype, target):
    """Once per outer step, to one of the two neighbours of what float32 holds, by the base's own seed."""
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        p = nn.Parameter(torch.ones(400, device=target.device, dtype=dtype))
        base = torsion.TAM([p], lr=torch.finfo(dtype).eps / 4, momentum=0.0, stochastic_rounding=True)
        optimizer = target.optimizer(torsion.Lookbehind, base, k=1, alpha=1.0)
        for phase in order_of(1):
            p.grad = -torch.ones_like(p)
            getattr(optimizer, phase)()
        results.append(p.detach().clone())
    assert same_bits(results[:1], results[1:])
    # Momentum's first damping is 1/2: each element rises by an eighth of the distance to its upper neighbour.
    found = results[0].float().unique(return_counts=True)
    assert found[0].tolist() == [1.0, 1.0 + torch.finfo(dtype).eps]
    assert 20 <= found[1][1] <= 85, "400 draws at 1/8: 50, plus or minus 5 times 6.6"
    assert base_state(optimizer)
