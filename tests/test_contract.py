"""What torch.optim.Optimizer promises its users, kept: groups, hooks, schedulers, None and late gradients, state in the
user's hands, memory that goes when its owner goes; and what the reports say when.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from helpers import CLASSES, each_class, ids, same_bits, snapshot, take_steps
from torch import nn
from torch.optim import lr_scheduler

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


# State in the user's hands


@each_class
def test_state_is_tensors_under_torchs_names(cls):
    optimizer = cls(parameters(), lr=0.01)
    take_steps(optimizer, gradients(2))
    keys = ["step", "momentum_buffer"] if cls is torsion.TAM else ["step", "exp_avg", "exp_avg_sq"]
    for p, state in optimizer.state.items():
        assert list(state) == [*keys, "correlation"]
        assert state["step"].shape == state["correlation"].shape == ()
        assert state["step"].dtype == state["correlation"].dtype == torch.float32
        assert float(state["step"]) == 2
        assert all(state[k].shape == p.shape for k in keys[1:])


@pytest.mark.parametrize("how", ["in-place", "replaced", "number"])
@each_class
def test_state_edited_between_steps_counts(cls, how):
    optimizer, other = pair(cls, scope="tensor")
    grads = gradients(4)
    take_steps(optimizer, grads[:2])
    take_steps(other, grads[:2])
    for o in (optimizer, other):
        p = o.param_groups[0]["params"][0]
        state = o.state[p]
        if o is other:  # known to work: a checkpoint
            checkpoint = copy.deepcopy(o.state_dict())
            checkpoint["state"][0].update(step=torch.tensor(7.0), correlation=torch.tensor(0.5))
            checkpoint["state"][0][MOMENTUM[cls]].fill_(0.25)
            o.load_state_dict(checkpoint)
        elif how == "in-place":
            state["step"].fill_(7)
            state["correlation"].fill_(0.5)
            state[MOMENTUM[cls]].fill_(0.25)
        else:
            tensor = how == "replaced"
            state["step"] = torch.tensor(7.0) if tensor else 7
            state["correlation"] = torch.tensor(0.5) if tensor else 0.5
            state[MOMENTUM[cls]] = torch.full_like(p, 0.25)
    take_steps(optimizer, grads[2:])
    take_steps(other, grads[2:])
    assert float(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]) == 9
    assert same_bits(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("scope", ["global", "tensor"])
@each_class
def test_state_cleared_is_a_new_start(cls, scope):
    optimizer = cls(parameters(), lr=0.01, scope=scope)
    grads = gradients(4)
    take_steps(optimizer, grads[:3])
    optimizer.state.clear()
    assert optimizer.cosine() == {}
    fresh = cls([nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]], lr=0.01, scope=scope)
    for o in (optimizer, fresh):
        take_steps(o, grads[1:])
    assert same_bits(snapshot(optimizer), snapshot(fresh))


def test_state_of_one_parameter_deleted_starts_that_one_anew():
    optimizer = torsion.AdaTAM(parameters(), bias_correction=True)
    take_steps(optimizer, gradients(3))
    p, q, _ = optimizer.param_groups[0]["params"]
    scope = float(optimizer.state[q]["correlation"])
    del optimizer.state[p]
    spoil([p])
    optimizer.step()  # skipped, but the state is made
    assert float(optimizer.state[p]["step"]) == 0
    assert not optimizer.state[p]["exp_avg"].any()
    assert float(optimizer.state[p]["correlation"]) == scope
    assert float(optimizer.state[q]["step"]) == 3


def test_a_parameter_removed_by_hand():
    optimizer, other = pair(torsion.TAM, scope="tensor")
    grads = gradients(3)
    for o in (optimizer, other):
        take_steps(o, grads[:1])
    second = optimizer.cosine()["0.1"]
    gone = optimizer.param_groups[0]["params"].pop(0)
    del optimizer.state[gone]
    assert torch.equal(optimizer.cosine()["0.0"], second), "the second is the first now"
    take_steps(optimizer, [g[1:] for g in grads[1:]])
    take_steps(other, grads[1:])
    for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"][1:], strict=True):
        assert torch.equal(p, q)
        assert same_bits(list(optimizer.state[p].values()), list(other.state[q].values()))
    assert len(optimizer.cosine()) == 2


@each_class
def test_data_swapped_for_other_memory(cls):
    optimizer, other = pair(cls)
    grads = gradients(4)
    keep = []
    for step in grads:
        for p in optimizer.param_groups[0]["params"]:
            keep.append(p.data)
            p.data = p.data.clone()
        for o in (optimizer, other):
            take_steps(o, [step])
    assert same_bits(snapshot(optimizer), snapshot(other))


def test_data_transposed_in_place():
    """The same address, the same sizes, the same gradient memory: only the strides tell."""
    p, q = nn.Parameter(torch.arange(9.0).reshape(3, 3)), nn.Parameter(torch.arange(9.0).reshape(3, 3).t().contiguous())
    optimizer, other = torsion.TAM([p], lr=0.1), torsion.TAM([q], lr=0.1)
    p.grad, q.grad = torch.randn(3, 3), torch.zeros(3, 3)
    optimizer.step()
    p.data = p.data.t()
    before = p.detach().clone()
    q.data = before.clone()
    other.state[q].update(
        step=torch.tensor(1.0),
        momentum_buffer=optimizer.state[p]["momentum_buffer"].clone(),
        correlation=torch.tensor(0.0),
    )
    q.grad = p.grad.clone()
    for o in (optimizer, other):
        o.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float64], ids=ids)
@each_class
def test_a_model_converted_after_construction(cls, to):
    model = nn.Linear(3, 2)
    optimizer = cls(model.parameters(), lr=0.01)
    x = torch.randn(4, 3)
    for dtype in (torch.float32, to, torch.float32):
        model.to(dtype)
        model.zero_grad()
        model(x.to(dtype)).square().sum().backward()
        optimizer.step()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for p in model.parameters():
            assert p.dtype == dtype
            assert optimizer.state[p][MOMENTUM[cls]].dtype == wide
            assert optimizer.state[p]["correlation"].dtype == wide
            assert p.isfinite().all()
    assert float(optimizer.state[model.weight]["step"]) == 3
    assert float(optimizer.damping()["global"]) > 0.5, "the cosine was kept"


def test_deepcopy_and_pickle_go_on_alike():
    optimizer = torsion.AdaTAMW(parameters(), lr=0.01, backend="reference", scope="tensor")
    grads = gradients(4)
    take_steps(optimizer, grads[:2])
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    take_steps(optimizer, grads[2:])
    for other in copies:
        assert other._backend == "reference"
        take_steps(other, grads[2:])
        assert same_bits(snapshot(other), snapshot(optimizer))


def test_a_pickle_of_an_older_version_gets_the_options_it_lacks():
    optimizer = torsion.TAM(parameters(), lr=0.01)
    take_steps(optimizer, gradients(1))
    state = optimizer.__getstate__()
    for key in ("max_grad_norm", "sr_seed"):
        del state["param_groups"][0][key]
    del state["_backend"]
    other = torsion.TAM.__new__(torsion.TAM)
    other.__setstate__(state)
    take_steps(other, gradients(1))


def test_two_optimizers_with_disjoint_parameters_do_not_mix():
    a, b = pair(torsion.TAM)
    alone = torsion.TAM(parameters(), lr=0.01)
    for step in gradients(3):
        take_steps(a, [step])
        take_steps(b, [[-g for g in step]])
        take_steps(alone, [step])
    assert same_bits(snapshot(a), snapshot(alone))


# Memory


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_keeps_a_finished_run_alive(backend):
    def run():
        model = nn.Linear(3, 2)
        optimizer = torsion.TAM(model.parameters(), backend=backend)
        optimizer.register_step_post_hook(lambda o, *_: optimizer.param_groups)  # a cycle through the optimizer
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        state = optimizer.state[model.weight]["momentum_buffer"]
        return [weakref.ref(o) for o in (optimizer, model.weight, model.weight.grad, state)]

    references = run()
    gc.collect()
    assert [r() for r in references] == [None] * 4


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "with-holes"])
def test_gradients_go_with_zero_grad(backend, layout):
    data = torch.randn(4, 6)
    p = nn.Parameter(data if layout == "contiguous" else data[:, ::2])
    optimizer = torsion.TAM([p], backend=backend)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        reference = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert reference() is None


def test_a_removed_parameter_is_let_go_at_the_next_step():
    optimizer = torsion.TAM(parameters())
    take_steps(optimizer, gradients(2))
    gone = optimizer.param_groups[0]["params"].pop()
    reference = weakref.ref(gone)
    del optimizer.state[gone], gone
    take_steps(optimizer, [gradients(1)[0][:2]])
    gc.collect()
    assert reference() is None


# Reports


def test_reports_before_and_after_steps_and_skips():
    optimizer = torsion.TAM(parameters())
    assert optimizer.cosine() == optimizer.damping() == {}
    assert float(optimizer.grad_norm()) == 0
    assert int(optimizer.skipped_steps()) == 0
    spoil(optimizer.param_groups[0]["params"])
    optimizer.step()
    assert float(optimizer.cosine()["global"]) == 0, "a skipped first step leaves the start values"
    assert float(optimizer.damping()["global"]) == 0.5
    assert not optimizer.grad_norm().isfinite()
    take_steps(optimizer, gradients(3))
    cosine, damping = optimizer.cosine()["global"], optimizer.damping()["global"]
    expected = torch.cat([g.flatten() for g in gradients(3)[-1]]).double().norm()
    assert float(optimizer.grad_norm()) == pytest.approx(float(expected), rel=1e-12)
    spoil(optimizer.param_groups[0]["params"])
    optimizer.step()
    assert torch.equal(optimizer.cosine()["global"], cosine)
    assert torch.equal(optimizer.damping()["global"], damping)
    assert int(optimizer.skipped_steps()) == 2
    for report in (cosine, damping, optimizer.grad_norm(), optimizer.skipped_steps()):
        assert report.shape == ()


def test_the_smoothed_cosine_in_the_state_is_what_damping_reports():
    optimizer = torsion.TAM(parameters(torch.float64), scope="tensor")
    take_steps(optimizer, gradients(4))
    for p, damping in zip(optimizer.param_groups[0]["params"], optimizer.damping().values(), strict=True):
        assert float(damping) == (1 + float(optimizer.state[p]["correlation"])) / 2


def test_the_norm_is_over_all_groups_and_before_clipping():
    params = parameters()
    optimizer = torsion.TAM([{"params": params[:1]}, {"params": params[1:]}], max_grad_norm=1e-3, scope="group")
    grads = gradients(1)
    take_steps(optimizer, grads)
    expected = torch.cat([g.flatten() for g in grads[0]]).double().norm()
    assert float(optimizer.grad_norm()) == pytest.approx(float(expected), rel=1e-12)


def test_a_load_keeps_the_count_of_skips_and_forgets_the_last_cosine():
    optimizer = torsion.TAM(parameters())
    take_steps(optimizer, gradients(2))
    spoil(optimizer.param_groups[0]["params"])
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.cosine() == {}
    assert int(optimizer.skipped_steps()) == 1


@each_class
def test_repr_shows_class_and_options(cls):
    text = repr(cls(parameters(), lr=0.25))
    assert text.startswith(f"{cls.__name__} (")
    assert "lr: 0.25" in text
    assert "scope: global" in text
