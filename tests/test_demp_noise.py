"""DemP's noise: which weights get it, how much, the same ones before and after a cut."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from demp_runs import INPUTS, adamw, advance, demp_of, everything, kill, mlp, same, windows
from tolerances import GOLDEN, close
from torch import nn

import torsion
from torsion.prune import schedule

_FILE = json.loads((Path(__file__).parent / "golden" / "demp.json").read_text())
CASES = {case["id"]: case for case in _FILE["cases"]}
ROW = GOLDEN[torch.float64]


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def noise_of(model, optimizer, demp, step):
    """The noise of one step, read from parameters at 0: the optimizer's own update is none without gradients."""
    saved = demp.state_dict()
    saved["step"] = step
    demp.load_state_dict(saved)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_n3_noise_before_and_after_a_cut():
    """The golden tensor has number 3 and shape [3, 4]: the second Linear of a network without biases."""
    given, expected = CASES["N3"]["inputs"], CASES["N3"]["expected"]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(),
        nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2),
    ).double()  # fmt: skip
    assert [n for n, _ in model.named_parameters()].index("3.weight") == given["tensor_id"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(8, 2).double()
    demp = torsion.DemP(
        model, optimizer, x, total_steps=10, schedule="constant", noise_std=1.0, seed=given["seed"], lasso=0.0
    )
    full = noise_of(model, optimizer, demp, given["step"])
    close(full["3.weight"], float64(expected["full"]), ROW)
    with torch.no_grad():
        for norm, high in ((model[1], 1e2), (model[4], 1e4)):  # above what weights of deviation 1 make of the inputs
            norm.weight.fill_(1.0)
            norm.bias.fill_(high)
        for name, norm in (("rows", model[4]), ("cols", model[1])):
            dead = [i for i in range(norm.num_features) if i not in given[name]]
            norm.weight[dead], norm.bias[dead] = 0.0, -1.0
    report = demp.finish([x])
    assert (report.layers["0"].live, report.layers["3"].live) == (3, 2)
    compact = noise_of(model, optimizer, demp, given["step"])
    close(compact["3.weight"], float64(expected["compact"]), ROW)
    rows, cols = torch.tensor(given["rows"]), torch.tensor(given["cols"])
    assert torch.equal(compact["3.weight"], full["3.weight"][rows][:, cols])
    assert torch.equal(compact["0.weight"], full["0.weight"][cols])
    for name in ("1.weight", "1.bias"):
        assert torch.equal(compact[name], full[name][cols])
    for name in ("4.weight", "4.bias"):
        assert torch.equal(compact[name], full[name][rows])


def noised(model, demp, optimizer, **masks):
    """Which elements a step without gradients moves, by parameter."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for name, mask in masks.items():
        dict(model.named_parameters())[name.replace("_", ".")].grad = mask
    optimizer.step()
    return {n: p.detach() != before[n] for n, p in model.named_parameters()}


def test_rows_of_live_units_only():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = demp_of(model, optimizer, align=8)  # keeps the dead of the first layer as padding
    kill(model, 0, 1, 5)
    demp.observe(windows())
    live = demp.live()
    assert live.keys() == {"0", "3"}
    assert live["0"].dtype == torch.bool
    assert live["0"].tolist() == [u not in (1, 5) for u in range(8)]
    moved = noised(model, demp, optimizer)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        rows = moved[name] if moved[name].dim() == 1 else moved[name].all(1)
        assert torch.equal(rows, live["0"]), name
        if moved[name].dim() == 2:
            assert torch.equal(moved[name].any(1), live["0"])
    assert moved["3.weight"].all(), "whole rows, columns that read dead units included"
    assert not moved["6.weight"].any(), "the logits"
    assert not moved["6.bias"].any()


def test_before_the_first_window_all_units_are_live():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = demp_of(model, optimizer)
    kill(model, 0, 1, 5)
    assert all(mask.all() for mask in demp.live().values())
    moved = noised(model, demp, optimizer)
    assert moved["0.weight"].all()
    assert moved["1.bias"].all()


def test_live_gives_copies():
    model = mlp()
    demp = demp_of(model, adamw(model))
    demp.live()["0"][:] = False
    assert demp.live()["0"].all()


def test_the_mask_of_gradients_holds_the_lasso():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = demp_of(model, optimizer, noise_mask="grad", schedule="constant", lasso=1e-2)
    with torch.no_grad():
        model[1].weight[3] = 0.0
    grad = torch.zeros(8, INPUTS, dtype=torch.float64)
    grad[2, 1], grad[4, 0], grad[5, 5] = 1.0, 1e-8, 0.99e-8
    moved = noised(model, demp, optimizer, **{"0_weight": grad, "1_weight": torch.zeros(8, dtype=torch.float64)})
    assert moved["0.weight"].nonzero().tolist() == [[2, 1], [4, 0]]
    assert moved["1.weight"].tolist() == [u != 3 for u in range(8)], "the lasso is a gradient, but for a scale of 0"
    assert not any(moved[n].any() for n in moved if n not in ("0.weight", "1.weight")), "no gradient at all"


def test_the_mask_of_gradients_with_torsions_optimizer():
    model = mlp()
    optimizer = torsion.TAM(model.parameters(), lr=0.0)
    demp = demp_of(model, optimizer, noise_mask="grad", schedule="constant", lasso=1e-2)
    moved = noised(model, demp, optimizer, **{"1_weight": torch.zeros(8, dtype=torch.float64)})
    assert moved["1.weight"].all()
    assert not moved["0.weight"].any()


def test_the_mask_none_is_every_parameter_that_trains():
    model = mlp()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    demp = demp_of(model, optimizer, noise_mask="none")
    kill(model, 0, 1)
    demp.observe(windows())
    moved = noised(model, demp, optimizer)
    assert not moved.pop("0.bias").any(), "frozen"
    assert all(m.all() for m in moved.values())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torsion.TAM], ids=["after the step", "in the step"])
def test_a_layer_frozen_and_thawed_in_between_gets_noise_while_it_trains(kind):
    model = mlp()
    optimizer = kind(model.parameters(), lr=0.0)
    demp = demp_of(model, optimizer, noise_std=0.1, schedule="constant", prune_every=1000)
    for step, trains in enumerate((True, False, True)):
        model[0].requires_grad_(trains)
        for p in model[0].parameters():
            p.grad = None
        before = [p.detach().clone() for p in model[0].parameters()]
        advance(model, optimizer, range(step, step + 1), demp)
        moved = [not torch.equal(p, b) for p, b in zip(model[0].parameters(), before, strict=True)]
        assert moved == [trains] * len(before)


def test_noise_has_the_schedules_deviation_and_never_enters_the_state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    demp = torsion.DemP(model, optimizer, torch.randn(2, 200), total_steps=100, noise_std=1e-3, seed=5)
    s, drawn = schedule("one_cycle", 100), []
    for t in range(4):
        before = model[0].weight.detach().double()
        optimizer.step()
        drawn.append((model[0].weight.detach().double() - before) / (1e-3 * s(t)))
        assert drawn[-1].mean().item() == pytest.approx(0.0, abs=0.02)
        assert drawn[-1].std().item() == pytest.approx(1.0, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([d.flatten() for d in drawn])).triu(1)).max() < 0.02, "a new draw each step"
    assert not optimizer.state
    assert demp.steps_taken == 4


def test_seed_and_parameter_make_other_noise():
    drawn = []
    for seed in (0, 1, 2**40, 2**64 - 1):
        model = mlp(widths=(8, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        demp = demp_of(model, optimizer, seed=seed)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        optimizer.step()
        assert demp.steps_taken == 1
        drawn += [model[k].bias.detach().clone() for k in (0, 1, 3, 4)]
    for a, b in itertools.combinations(drawn, 2):
        assert not torch.isin(a, b).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_noise_below_the_last_bit_is_not_lost(dtype):
    """5e-5 is a hundredth of the last bit of 1 in bfloat16: rounded to nearest it would never move a weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = torsion.DemP(model, optimizer, torch.randn(2, 64).to(dtype), total_steps=10, schedule="constant")
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    for _ in range(4):
        optimizer.step()
    off = model[0].weight.detach().double() - 1.0
    assert (off != 0).any()
    assert (off == 0).any()
    standard_error = off.std().item() / off.numel() ** 0.5
    assert abs(off.mean().item()) < 4 * standard_error
    assert demp.steps_taken == 4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_convolutions_and_their_layouts(layout):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
        ).double()  # fmt: skip

    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    results = []
    for form in (torch.contiguous_format, getattr(torch, layout + ("_format" if layout == "contiguous" else ""))):
        model = build().to(memory_format=form)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        demp = torsion.DemP(model, optimizer, x, total_steps=5, noise_std=0.1)
        optimizer.step()
        with torch.no_grad():
            for norm, units in ((model[1], [0, 5]), (model[4], [2])):
                norm.weight[units], norm.bias[units] = 0.0, -1.0
        report = demp.finish([x])
        assert [report.layers[n].cut for n in ("0", "3")] == [2, 1]
        optimizer.step()
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert same(*results)


class Convolutions(nn.Module):
    """Plain, grouped, depthwise, transposed and grouped transposed convolutions, flattened into a Linear."""

    def __init__(self):
        super().__init__()
        self.plain, self.plain_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.grouped_norm = nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.BatchNorm2d(12)
        self.depthwise, self.depthwise_norm = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.transposed, self.transposed_norm = nn.ConvTranspose2d(12, 8, 2), nn.BatchNorm2d(8)
        self.both, self.both_norm = nn.ConvTranspose2d(8, 6, 2, groups=2), nn.BatchNorm2d(6)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden, self.hidden_norm, self.last = nn.Linear(24, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x):
        for name in ("plain", "grouped", "depthwise", "transposed", "both"):
            x = torch.relu(getattr(self, name + "_norm")(getattr(self, name)(x)))
        x = self.pool(x).flatten(1)
        return self.last(torch.relu(self.hidden_norm(self.hidden(x))))


def keep(demp, **units):
    """Cut by a checkpoint that says which units are left."""
    saved = demp.state_dict()
    for name, kept in units.items():
        entry = saved["layers"][name]
        where = torch.isin(entry["kept"], torch.tensor(kept))
        assert where.sum() == len(kept)
        for key in ("kept", "live", "dead_windows", "mean"):
            entry[key] = entry[key][where]
    demp.load_state_dict(saved)


def test_every_kind_of_layer_knows_where_its_elements_lay():
    """Elements that hold their own numbers are cut three times; the noise's keys must be what is left of them."""
    torch.manual_seed(0)
    model = Convolutions().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = demp_of_images(model, optimizer)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(p.numel()).reshape(p.shape))
    for units in (
        {"plain": [0, 1, 3, 4, 6, 7], "hidden": [0, 2, 4]},
        {"grouped": [1, 2, 4, 5, 6, 8, 9, 11], "depthwise": [1, 2, 4, 5, 6, 8, 9, 11], "plain": [0, 3, 4, 7]},
        {"transposed": [0, 2, 3, 5, 6, 7], "both": [0, 2, 3, 4], "hidden": [2, 4], "plain": [3, 7]},
    ):
        keep(demp, **units)
        for entry in demp._hooks._noise.entries():
            p = entry.view()
            rows = torch.arange(p.shape[0]) if entry.rows is None else entry.rows
            width = p[0].numel()
            cols = torch.arange(width) if entry.cols is None else entry.cols.reshape(-1, width)
            cols = cols.reshape(-1, width).repeat_interleave(p.shape[0] // cols.reshape(-1, width).shape[0], 0)
            elements = rows[:, None] * entry.columns + cols
            assert torch.equal(elements, p.detach().reshape(p.shape[0], -1).long()), (entry.name, units)
    assert model.grouped.weight.shape == (8, 1, 3, 3)
    assert model.depthwise.groups == 8
    assert model.both.weight.shape == (6, 2, 2, 2)
    assert model.hidden.weight.shape == (2, 16)
    assert all(demp._places[name].shape == shape for name, shape in shapes.items())


def demp_of_images(model, optimizer):
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    return torsion.DemP(model, optimizer, x, total_steps=10, noise_std=0.1, lasso=0.0)


@pytest.mark.parametrize("dead", [(), (1,), (0, 4)], ids=str)
@pytest.mark.parametrize("layer", ["plain", "grouped", "transposed", "both"])
def test_masks_of_every_kind_of_layer(layer, dead):
    """The rows of a transposed convolution lie along its second dimension, of a grouped one in each group."""
    torch.manual_seed(0)
    model = Convolutions().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = demp_of_images(model, optimizer)
    saved = demp.state_dict()
    saved["layers"][layer]["live"][list(dead)] = False
    demp.load_state_dict(saved)
    module = getattr(model, layer)
    before = module.weight.detach().clone()
    optimizer.step()
    moved = module.weight.detach() != before
    if layer == "transposed":
        moved = moved.transpose(0, 1)
    elif layer == "both":  # [8, 3, 2, 2]: rows of the first half make units 0 to 2
        moved = torch.cat([moved[:4].transpose(0, 1), moved[4:].transpose(0, 1)])
    units = moved.flatten(1)
    assert torch.equal(units.all(1), units.any(1)), "a unit as a whole"
    assert (~units.all(1)).nonzero().flatten().tolist() == list(dead)


def test_noise_of_a_network_does_not_see_the_cut():
    """update(compact(p)) equals compact(update(p)) bit for bit: each survivor gets the noise it would have got."""
    runs = []
    for cuts in (False, True):
        model = mlp(dtype=torch.float32)
        kill(model, 0, 2, 3)
        kill(model, 3, 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        demp = demp_of(model, optimizer, noise_std=0.1)
        demp.observe(windows(torch.float32))
        if cuts:
            assert demp.cut().layers["0"].cut == 2
        for _ in range(3):
            optimizer.step()
        runs.append({n: p.detach().clone() for n, p in model.named_parameters()})
    dense, compact = runs
    kept0, kept3 = [u for u in range(8) if u not in (2, 3)], [1, 2, 3, 4, 5]
    assert torch.equal(compact["0.weight"], dense["0.weight"][kept0])
    assert torch.equal(compact["1.bias"], dense["1.bias"][kept0])
    assert torch.equal(compact["3.weight"], dense["3.weight"][kept3][:, kept0])
    assert torch.equal(compact["4.weight"], dense["4.weight"][kept3])


def test_without_lasso_and_noise_training_is_the_same_bit_for_bit():
    model, twin = mlp(), mlp()
    optimizer, alone = adamw(model), adamw(twin)
    demp = demp_of(model, optimizer, lasso=0.0, noise_std=0.0)
    reports = advance(model, optimizer, range(9), demp)
    advance(twin, alone, range(9))
    assert same(everything(model)["model"], everything(twin)["model"])
    assert [r.parameters_after == r.parameters_before for r in reports] == [True, True]
    assert demp.generation == 0


def test_torchs_generators_are_left_alone():
    model = mlp()
    optimizer = adamw(model)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    demp = demp_of(model, optimizer)
    kill(model, 0, 1)
    assert advance(model, optimizer, range(9), demp)
    demp.finish(windows())
    assert torch.equal(torch.get_rng_state(), state)
