"""What torch.optim.Optimizer promises its users, kept: groups, hooks, schedulers, None and late gradients, names."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import CLASSES, each_class, same_bits, snapshot, take_steps
from small import SHAPES, TORCH, gradients, pair, parameters, spoil
from torch import nn
from torch.optim import lr_scheduler

import torsion

# Groups and defaults


@each_class
def test_is_an_optimizer_with_the_keys_of_torchs_own_class(cls):
    optimizer = cls(parameters(), lr=0.01)
    assert isinstance(optimizer, torch.optim.Optimizer)
    theirs = TORCH[cls](parameters(), lr=0.01)
    missing = theirs.param_groups[0].keys() - optimizer.param_groups[0].keys()
    assert not missing
    assert optimizer.defaults["lr"] == 0.01
    assert optimizer.defaults.keys() | {"params"} == optimizer.param_groups[0].keys()


def test_signatures_are_those_of_the_interface():
    params = parameters()
    assert (
        torsion.TAM(params, 0.1, 0.8, 0.3).param_groups[0].items()
        >= {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.3}.items()
    )
    given = (params, 0.1, (0.8, 0.9), 1e-6, 0.3)
    for cls in (torsion.AdaTAM, torsion.AdaTAMW):
        group = cls(*given).param_groups[0]
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == given[1:]
    assert torsion.TAM(params).defaults["lr"] == 1e-3
    assert torsion.AdaTAM(params).defaults["weight_decay"] == 0
    assert torsion.AdaTAMW(params).defaults["weight_decay"] == 1e-2
    for cls in CLASSES:
        with pytest.raises(TypeError):
            cls(params, *range(20))


@each_class
def test_options_per_group(cls):
    a, b, c = parameters()
    optimizer = cls([{"params": [a], "lr": 0.5}, {"params": [b, c], "weight_decay": 0.25, "maximize": True}], lr=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1]
    assert [g["maximize"] for g in optimizer.param_groups] == [False, True]
    take_steps(optimizer, gradients(2))


@each_class
def test_a_mixture_of_tensor_and_float_rates_is_each_groups_own(cls):
    def build(*rates):
        params = parameters()
        return cls([{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)])

    plain = build(0.1, 0.01, 0.2)
    mixed = build(torch.tensor(0.1, dtype=torch.float64), 0.01, torch.tensor([0.2], dtype=torch.float64))
    for optimizer in (plain, mixed):
        take_steps(optimizer, gradients(3))
    assert same_bits(snapshot(mixed), snapshot(plain))


@each_class
def test_adding_a_group_between_steps(cls):
    optimizer, whole = pair(cls)
    grads = gradients(4)
    late = nn.Parameter(torch.ones(6))
    twin = nn.Parameter(torch.ones(6))
    take_steps(optimizer, grads[:2])
    whole.add_param_group({"params": [twin], "lr": 0.5})
    take_steps(whole, [[*g, None] for g in grads[:2]])
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    for g in grads[2:]:
        for o in (optimizer, whole):
            take_steps(o, [[*g, torch.arange(6.0)]])
    assert same_bits(snapshot(optimizer), snapshot(whole))
    assert float(optimizer.state[late]["step"]) == 2


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_adding_a_group_keeps_what_the_scopes_remember(scope):
    optimizer = torsion.TAM(parameters(), lr=0.01, scope=scope)
    take_steps(optimizer, gradients(3))
    cosine, damping = optimizer.cosine(), optimizer.damping()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    params = [p for g in optimizer.param_groups for p in g["params"]]
    spoil(params)
    optimizer.step()
    for key in cosine:
        assert torch.equal(optimizer.cosine()[key], cosine[key])
        assert torch.equal(optimizer.damping()[key], damping[key])
    assert int(optimizer.skipped_steps()) == 1


def test_a_refused_group_leaves_no_trace():
    optimizer = torsion.TAM(parameters())
    take_steps(optimizer, gradients(1))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"momentum=1\.5"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "momentum": 1.5})
    assert len(optimizer.param_groups) == 1
    assert same_bits(snapshot(optimizer), before)
    take_steps(optimizer, gradients(1))


def test_a_frozen_parameter_costs_nothing_and_may_thaw():
    params = parameters()
    params[1].requires_grad_(False)
    optimizer = torsion.TAM(params)
    take_steps(optimizer, [[g[0], None, g[2]] for g in gradients(2)])
    assert params[1] not in optimizer.state or not optimizer.state[params[1]]
    params[1].requires_grad_(True)
    take_steps(optimizer, gradients(1))
    assert float(optimizer.state[params[1]]["step"]) == 1


# Gradients that are missing, late or fresh


@each_class
def test_a_parameter_without_gradient_is_left_alone(cls):
    optimizer, shorter = cls(parameters(), lr=0.01), cls(parameters()[:2], lr=0.01)
    grads = gradients(3)
    start = optimizer.param_groups[0]["params"][2].detach().clone()
    take_steps(optimizer, [[*g[:2], None] for g in grads])
    take_steps(shorter, [g[:2] for g in grads])
    last = optimizer.param_groups[0]["params"][2]
    assert torch.equal(last, start)
    assert not optimizer.state.get(last)
    assert same_bits(snapshot(optimizer)[:-1], snapshot(shorter))


@each_class
def test_a_pause_freezes_momentum_and_step(cls):
    optimizer = cls(parameters(), lr=0.01)
    grads = gradients(2)
    take_steps(optimizer, grads[:1])
    p = optimizer.param_groups[0]["params"][1]
    before = [t.clone() for k, t in optimizer.state[p].items() if k != "correlation"]
    take_steps(optimizer, [[grads[1][0], None, grads[1][2]]])
    after = [t for k, t in optimizer.state[p].items() if k != "correlation"]
    assert same_bits(after, before)


def test_no_gradient_at_all_is_no_step():
    optimizer = torsion.TAM(parameters())
    assert optimizer.step() is None
    assert optimizer.cosine() == {}
    assert not optimizer.state


def test_a_late_parameter_adopts_the_cosine_of_its_scope():
    optimizer = torsion.TAM(parameters(), decay=0.5)
    grads = gradients(1)[0]
    take_steps(optimizer, [[grads[0], grads[1], None]] * 4)
    joined = float(optimizer.damping()["global"])
    assert joined > 0.9, "four equal gradients"
    late = optimizer.param_groups[0]["params"][2]
    take_steps(optimizer, [[None, None, grads[2]]])
    # No momentum yet: cosine 0, so s^ halves.
    assert float(optimizer.state[late]["correlation"]) == pytest.approx((2 * joined - 1) / 2, rel=1e-6)


def test_a_scope_without_gradients_keeps_its_cosine():
    a, b, c = parameters()
    optimizer = torsion.TAM([{"params": [a]}, {"params": [b, c]}], scope="group")
    grads = gradients(3)
    take_steps(optimizer, grads)
    before = optimizer.cosine()[1], optimizer.damping()[1]
    take_steps(optimizer, [[grads[0][0], None, None]])
    assert torch.equal(optimizer.cosine()[1], before[0])
    assert torch.equal(optimizer.damping()[1], before[1])


@each_class
def test_fresh_gradient_memory_at_every_step_is_followed_without_planning_anew(cls, monkeypatch):
    optimizer, other = pair(cls)
    grads = gradients(6)
    kept = [[g.clone() for g in step] for step in grads]  # all alive at once: no address comes back
    take_steps(optimizer, kept[:1])
    planned = []
    monkeypatch.setattr(type(optimizer), "_plan", lambda self: planned.append(1))
    take_steps(optimizer, kept[1:])
    monkeypatch.undo()
    assert not planned
    for step in grads:  # the same memory every time
        for p, g in zip(other.param_groups[0]["params"], step, strict=True):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad.copy_(g)
        other.step()
    assert same_bits(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    optimizer = torsion.TAM(parameters())
    take_steps(optimizer, gradients(1))
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in optimizer.param_groups[0]["params"]:
        assert p.grad is None if set_to_none else not p.grad.any()
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.step()
    for p, m in zip(optimizer.param_groups[0]["params"], momentum, strict=True):
        after = optimizer.state[p]["momentum_buffer"]
        assert torch.equal(after, m if set_to_none else 0.9 * m), "no gradient leaves momentum, a zero one decays it"


def test_gradients_are_read_only():
    optimizer = torsion.AdaTAMW(parameters(), max_grad_norm=0.1, maximize=True, weight_decay=0.5)
    grads = gradients(1)[0]
    take_steps(optimizer, [grads])
    for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        assert torch.equal(p.grad, g)


def test_autograd_notices_that_parameters_changed():
    p = nn.Parameter(torch.ones(3))
    optimizer = torsion.TAM([p])
    for _ in range(2):  # planned, then from the plan
        loss = (p * p).sum()
        p.grad = torch.ones(3)
        version = p._version
        optimizer.step()
        assert p._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# Hooks and closures


@each_class
def test_step_hooks_run_in_order_around_every_step(cls):
    optimizer = cls(parameters())
    seen = []
    optimizer.register_step_pre_hook(
        lambda o, args, kwargs: seen.append(("pre", o, o.param_groups[0]["params"][2].item()))
    )
    handle = optimizer.register_step_post_hook(
        lambda o, args, kwargs: seen.append(("post", o, o.param_groups[0]["params"][2].item()))
    )
    take_steps(optimizer, gradients(2))
    assert [s[0] for s in seen] == ["pre", "post"] * 2
    assert all(s[1] is optimizer for s in seen)
    assert seen[0][2] != seen[1][2]
    assert seen[1][2] == seen[2][2]
    handle.remove()
    take_steps(optimizer, gradients(1))
    assert len(seen) == 5


def test_a_pre_hook_may_write_gradients():
    optimizer, other = pair(torsion.TAM)
    grads = gradients(2)

    def double(o, args, kwargs):
        for p in o.param_groups[0]["params"]:
            p.grad = 2 * p.grad

    optimizer.register_step_pre_hook(double)
    take_steps(optimizer, grads)
    take_steps(other, [[2 * g for g in step] for step in grads])
    assert same_bits(snapshot(optimizer), snapshot(other))


def test_a_closure_that_raises_leaves_everything_as_it_was():
    optimizer = torsion.TAM(parameters())
    take_steps(optimizer, gradients(2))
    before = snapshot(optimizer)

    def closure():
        raise KeyError("no batch left")

    with pytest.raises(KeyError, match="no batch left"):
        optimizer.step(closure)
    assert same_bits(snapshot(optimizer), before)


@each_class
def test_a_closure_that_evaluates_the_model(cls):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    optimizer, plain = cls(model.parameters(), lr=0.01), cls(other.parameters(), lr=0.01)
    x = torch.randn(4, 3)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        loss = optimizer.step(closure)
        plain.zero_grad()
        expected = other(x).square().mean()
        expected.backward()
        plain.step()
        assert torch.equal(loss, expected)
    assert same_bits(snapshot(optimizer), snapshot(plain))


# Schedulers

SCHEDULES = {
    "step": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=8),
    "chained": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.5)], milestones=[2]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@each_class
def test_schedulers_drive_rates_and_momenta_as_in_torch(cls, schedule):
    optimizer, by_hand = pair(cls)
    theirs = TORCH[cls](parameters(), lr=0.01, **({"momentum": 0.9} if cls is torsion.TAM else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when a scheduler steps before its optimizer
        warnings.filterwarnings("ignore", message="To get the last learning rate")
        warnings.filterwarnings("ignore", message="The epoch parameter")
        ours, reference = schedule(optimizer), schedule(theirs)
        for grads in gradients(6):
            group, expected = optimizer.param_groups[0], theirs.param_groups[0]
            for key in ("lr", "momentum", "betas"):
                assert group.get(key) == expected.get(key)
                if key in group:
                    by_hand.param_groups[0][key] = group[key]
            for o in (optimizer, theirs, by_hand):
                take_steps(o, [grads])
            ours.step()
            reference.step()
    assert same_bits(snapshot(optimizer), snapshot(by_hand))


@each_class
def test_a_schedule_on_a_tensor_rate_writes_into_it(cls):
    rate = torch.tensor(0.01)
    optimizer, plain = cls(parameters(), lr=rate), cls(parameters(), lr=0.01)
    schedulers = [lr_scheduler.ExponentialLR(o, gamma=0.5) for o in (optimizer, plain)]
    for grads in gradients(4):
        assert optimizer.param_groups[0]["lr"] is rate
        plain.param_groups[0]["lr"] = float(rate)  # the tensor holds float32
        for o in (optimizer, plain):
            take_steps(o, [grads])
        for s in schedulers:
            s.step()
    assert float(rate) == pytest.approx(0.01 / 16)
    assert same_bits(snapshot(optimizer), snapshot(plain))


def test_plateau_schedule():
    optimizer = torsion.TAM(parameters(), lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    for loss in (1.0, 1.0, 1.0):
        take_steps(optimizer, gradients(1))
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_group_value_changed_to_nonsense_is_refused_at_the_step():
    optimizer = torsion.TAM([{"params": [p]} for p in parameters()])
    take_steps(optimizer, gradients(2))
    before = snapshot(optimizer)
    for key, value in {
        "lr": float("nan"),
        "momentum": 1.0,
        "max_grad_norm": 3.0,
        "scope": "group",
        "decay": 0.5,
    }.items():
        old = optimizer.param_groups[1][key]
        optimizer.param_groups[1][key] = value
        for _ in range(2):  # not only the first time
            with pytest.raises(ValueError, match=f"group 1: {key}={value!r}"):
                optimizer.step()
        assert same_bits(snapshot(optimizer), before)
        optimizer.param_groups[1][key] = old
    optimizer.step()


def test_the_scope_may_change_between_steps():
    optimizer = torsion.TAM(parameters())
    take_steps(optimizer, gradients(2))
    whole = optimizer.cosine()["global"]
    optimizer.param_groups[0]["scope"] = "tensor"
    assert all(torch.equal(c, whole) for c in optimizer.cosine().values()), "each tensor's last step had that cosine"
    take_steps(optimizer, gradients(1))
    assert len({float(c) for c in optimizer.cosine().values()}) == len(SHAPES)
    assert set(optimizer.cosine()) == {"0.0", "0.1", "0.2"}


# Names


def test_errors_and_reports_speak_of_parameters_by_name():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = torsion.TAM(model.named_parameters(), scope="tensor")
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert list(optimizer.cosine()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    model[1].weight.data = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"^1\.weight: grad has shape \(1, 2\), the parameter \(2, 2\)"):
        optimizer.step()


def test_groups_of_named_parameters():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    named = list(model.named_parameters())
    optimizer = torsion.AdaTAM([{"params": named[:2]}, {"params": named[2:], "lr": 0.1}], scope="tensor")
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert list(optimizer.damping()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
