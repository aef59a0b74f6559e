"""DemP's step: the golden one, and the lasso in gradients, closures, torsion's kernels and after errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from demp_runs import backward, demp_of, everything, given_noise, mlp, same
from tolerances import GOLDEN, REORDERED, close
from torch import nn

import torsion
from torsion.prune import schedule

_FILE = json.loads((Path(__file__).parent / "golden" / "demp.json").read_text())
CASES = {case["id"]: case for case in _FILE["cases"]}
ROW = GOLDEN[torch.float64]


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def small(shape):
    """Linear ``shape`` without bias, BatchNorm, ReLU, logits; the middle of U1 and N3."""
    rows, columns = shape
    return nn.Sequential(nn.Linear(columns, rows, bias=False), nn.BatchNorm1d(rows), nn.ReLU(), nn.Linear(rows, 2)).to(
        torch.float64
    )


@pytest.mark.parametrize("foreach", [False, True], ids=["for", "foreach"])
@pytest.mark.parametrize("mask", ["row", "grad", "none"])
def test_u1_one_adamw_step(mask, foreach, monkeypatch):
    given, expected = CASES["U1"]["inputs"], CASES["U1"]["expected"]
    model = small((4, 2))
    weight, gamma = model[0].weight, model[1].weight
    tensors = {"weight": weight, "gamma": gamma}
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=given["lr"],
        betas=given["betas"],
        eps=given["eps"],
        weight_decay=given["weight_decay"],
        foreach=foreach,
    )
    given_noise(monkeypatch, {i: torch.zeros(p.shape).double() for i, p in enumerate(model.parameters())})
    given_noise(
        monkeypatch,
        {i: torch.zeros(p.shape).double() for i, p in enumerate(model.parameters())}
        | {0: float64(given["weight"]["xi"]), 1: float64(given["gamma"]["xi"])},
    )
    demp = torsion.DemP(
        model,
        optimizer,
        torch.randn(5, 2).double(),
        total_steps=given["span"],
        lasso=given["lambda_peak"],
        noise_std=given["noise_std"],
        noise_mask=mask,
    )
    saved = demp.state_dict()
    saved["step"] = given["t"]
    saved["layers"]["0"]["live"] = torch.tensor(given["row_live"]).bool()
    demp.load_state_dict(saved)
    with torch.no_grad():
        for name, p in tensors.items():
            p.copy_(float64(given[name]["p"]))
            p.grad = float64(given[name]["grad_ce"])
            optimizer.state[p] = {
                "step": torch.tensor(float(given["completed_steps"])),
                "exp_avg": float64(given[name]["exp_avg"]),
                "exp_avg_sq": float64(given[name]["exp_avg_sq"]),
            }
    optimizer.step()
    close(gamma.grad, float64(expected["gamma"]["grad"]), ROW)
    for name, p in tensors.items():
        for key in ("exp_avg", "exp_avg_sq"):
            close(optimizer.state[p][key], float64(expected[name][key]), ROW, f"{name} {key}")
        found = expected[name].get({"row": "row", "grad": "grad_mask", "none": "no_mask"}[mask])
        if found is not None:
            close(p, float64(found), ROW, f"{name} with mask {mask}")
    assert demp.steps_taken == given["t"] + 1


TORQUE = [torsion.TAM, torsion.AdaTAM, torsion.AdaTAMW]


class Norms(nn.Module):
    """One of each normalization, and one by name only."""

    class OwnRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.weight * x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.batch = nn.BatchNorm1d(4)
        self.layer = nn.LayerNorm(4)
        self.group = nn.GroupNorm(2, 4)
        self.rms = nn.RMSNorm(4)
        self.own = self.OwnRMSNorm()
        self.instance = nn.InstanceNorm1d(4, affine=True)
        self.unused = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x):
        x = self.own(self.rms(self.group(self.layer(self.batch(self.first(x))))))
        x = self.instance(x.unsqueeze(-1).expand(-1, -1, 3)).mean(-1)
        return self.last(torch.relu(self.hidden(x)))


def test_lasso_is_added_to_every_scale_that_has_a_gradient():
    torch.manual_seed(1)
    model = Norms().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        model.rms.weight[1] = 0.0
        model.group.weight[2] = -0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    torsion.DemP(model, optimizer, torch.randn(3, 4).double(), total_steps=10)  # forgotten: its hooks go with it
    demp = torsion.DemP(model, optimizer, torch.randn(3, 4).double(), total_steps=100, lasso=0.5, noise_std=0.0)
    model(torch.randn(6, 4).double()).square().sum().backward()
    before = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    scales = {f"{n}.weight" for n in ("batch", "layer", "group", "rms", "own", "instance")}
    for name, p in model.named_parameters():
        if name in scales:
            close(p.grad, before[name] + 0.5 * schedule("one_cycle", 100)(0) * values[name].sign(), ROW, name)
        elif before[name] is None:
            assert p.grad is None, name
        else:
            assert torch.equal(p.grad, before[name]), name
    assert torch.equal(model.rms.weight.grad[1], before["rms.weight"][1]), "sign(0) = 0"
    assert demp.steps_taken == 1


@pytest.mark.parametrize(
    ("cls", "options"),
    [(torch.optim.SGD, {}), (torsion.TAM, {}), (torsion.TAM, {"backend": "reference"})],
    ids=["SGD", "TAM", "TAM without kernels"],
)
def test_a_scale_that_two_layers_share_gets_the_lasso_once(cls, options):
    """As much as a scale of one layer; torsion's optimizers leave the gradient the user's here too."""
    found = []
    for shared in (False, True):
        model = mlp(widths=(8, 8))
        if shared:
            model[4].weight = model[1].weight
        optimizer = cls(model.parameters(), lr=0.1, momentum=0.0, **options)
        demp = demp_of(model, optimizer, schedule="constant", noise_std=0.0)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        grad = model[1].weight.grad
        optimizer.step()
        assert model[1].weight.grad is grad
        assert cls is torch.optim.SGD or not grad.any()
        assert demp.steps_taken == 1
        found.append(model[1].weight.detach())
    assert (found[0] < 1).all()
    assert torch.equal(*found)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torsion.TAM], ids=lambda c: c.__name__)
def test_where_the_optimizer_maximizes_the_scales_shrink_too(cls):
    model = mlp()
    optimizer = cls(
        [
            {"params": [p for n, p in model.named_parameters() if not n.startswith("1.")]},
            {"params": list(model[1].parameters()), "maximize": True},
        ],
        lr=0.1,
        momentum=0.0,
    )
    demp = demp_of(model, optimizer, schedule="constant", noise_std=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = [model[k].weight.detach().clone() for k in (1, 4)]
    optimizer.step()
    down, also_down = (old - model[k].weight.detach() for k, old in zip((1, 4), before, strict=True))
    assert (down > 0).all()
    assert (also_down > 0).all()
    if cls is torch.optim.SGD:
        close(down, 0.1 * 1e-2 * before[0].sign(), REORDERED)
        close(also_down, 0.1 * 1e-2 * before[1].sign(), REORDERED)
    assert demp.steps_taken == 1


def test_a_closure_gets_the_lasso_after_its_backward():
    results = []
    for closed in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        demp = demp_of(model, optimizer)
        for step in range(5):
            if closed:
                loss = optimizer.step(lambda model=model, step=step: backward(model, step))
                assert loss.requires_grad
            else:
                backward(model, step)
                optimizer.step()
        assert demp.steps_taken == 5
        results.append(everything(model, optimizer))
    assert same(*[r["model"] for r in results])


@pytest.mark.parametrize("keyword", [False, True], ids=["argument", "keyword"])
def test_a_closure_called_several_times_gets_it_each_time(keyword):
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)
    demp = demp_of(model, optimizer, schedule="constant", noise_std=0.0)
    seen = []

    def closure():
        loss = backward(model, 0)
        seen.append((model[1].weight.detach().clone(), model[1].weight.grad.clone(), model[1].weight.grad))
        return loss

    if keyword:
        optimizer.step(closure=closure)
    else:
        optimizer.step(closure)
    assert len(seen) > 1
    value, plain, grad = seen[-1]
    close(grad, plain + 1e-2 * value.sign(), ROW)
    assert demp.steps_taken == 1


@pytest.mark.parametrize("cls", TORQUE, ids=lambda c: c.__name__)
def test_torsions_optimizers_keep_the_users_gradients(cls):
    """They step as if the lasso were in the gradient, and leave ``p.grad`` as it was."""
    model, twin = mlp(), mlp()
    optimizer, alone = cls(model.parameters(), lr=0.01), cls(twin.parameters(), lr=0.01)
    demp = demp_of(model, optimizer, noise_std=0.0)
    s = schedule("one_cycle", 20)
    for step in range(6):
        backward(model, step)
        backward(twin, step)
        kept = [(p.grad, p.grad.clone(), p.grad._version) for p in model.parameters()]
        with torch.no_grad():
            for k in (1, 4):
                twin[k].weight.grad += 1e-2 * s(step) * twin[k].weight.sign()
        optimizer.step()
        alone.step()
        for p, (grad, value, version) in zip(model.parameters(), kept, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, value)
            assert grad._version == version
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            close(p, q, GOLDEN[torch.float64], f"step {step} {name}")
    assert demp.steps_taken == 6


class Raises(torch.optim.SGD):
    """Raises in its step while ``broken``."""

    broken = False

    def step(self, closure=None):
        if self.broken:
            raise RuntimeError("a gradient is no good")
        return super().step(closure)


def test_a_step_that_raised_leaves_no_second_lasso():
    model, twin = mlp(), mlp()
    optimizer, alone = Raises(model.parameters(), lr=0.1), Raises(twin.parameters(), lr=0.1)
    demp, demp_alone = demp_of(model, optimizer), demp_of(twin, alone)
    backward(model, 0)
    backward(twin, 0)
    optimizer.broken = True
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no good"):
            optimizer.step()
    optimizer.broken = False
    optimizer.step()
    alone.step()
    assert same(everything(model), everything(twin) | {"parameters": [id(p) for p in model.parameters()]})
    assert demp.steps_taken == demp_alone.steps_taken == 1, "though step() calls the base's step(), which has hooks too"
    optimizer.broken = True
    backward(model, 1)
    with pytest.raises(RuntimeError, match="no good"):
        optimizer.step()
    optimizer.broken = False
    backward(model, 1)  # gradients anew: these have no lasso yet
    optimizer.step()
    backward(twin, 1)
    alone.step()
    assert same(list(model.parameters()), list(twin.parameters()))


def test_torsions_optimizer_gives_the_gradient_back_after_a_step_that_raised():
    model = mlp()
    optimizer = torsion.TAM(model.parameters(), lr=0.1)
    demp = demp_of(model, optimizer)
    backward(model, 0)
    users = [p.grad for p in model.parameters()]
    model[0].weight.grad = model[0].weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    for p, grad in zip(model.parameters(), users, strict=True):
        p.grad = grad
    optimizer.step()
    assert all(p.grad is grad for p, grad in zip(model.parameters(), users, strict=True))
    assert demp.steps_taken == 1
