"""DemP in a training loop: windows, cuts, and the life of its hooks."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
import weakref

import pytest
import torch
from demp_runs import INPUTS, adamw, advance, backward, demp_of, everything, inputs, kill, mlp, revive, same, windows
from tolerances import GOLDEN, close
from torch import nn

import torsion

ROW = GOLDEN[torch.float64]


# Windows


def counted(n=None):
    """Batches that are counted as they are drawn; ``n`` of them, or endless."""
    drawn = []

    def batches():
        for i in itertools.count() if n is None else range(n):
            drawn.append(i)
            yield inputs(7000 + i, 32)

    return batches, drawn


def test_due_at_multiples_until_a_window_was_looked_at():
    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer, prune_every=3)
    due = []
    assert not demp.due, "no step was taken"
    for step in range(14):
        advance(model, optimizer, range(step, step + 1))
        due.append(demp.due)
        if step + 1 != 6:  # this one is not looked at in time
            demp.step(windows())
        assert demp.due == (step + 1 == 6)
    assert [i + 1 for i, d in enumerate(due) if d] == [3, 6, 7, 9, 12]


@pytest.mark.parametrize(("after", "first"), [(0, 3), (1, 3), (3, 3), (4, 6), (6, 6), (7, 9)])
def test_prune_after(after, first):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = demp_of(model, optimizer, prune_every=3, prune_after=after)
    due = []
    for step in range(12):
        optimizer.step()
        due += [step + 1] * (demp.step(windows()) is not None)
    assert due == list(range(first, 13, 3))


def test_exactly_the_window_is_drawn_and_nothing_when_none_is_due():
    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer, window=3)
    batches, drawn = counted()
    for step in range(4):
        assert drawn == []
        advance(model, optimizer, range(step, step + 1))
        report = demp.step(batches())
        assert (report is None) == (step < 3)
    assert drawn == [0, 1, 2]
    demp.observe(batches)  # a function that returns an iterable
    assert drawn == [0, 1, 2, 0, 1, 2]
    iterator = batches()
    demp.finish(iterator)
    assert drawn[6:] == [0, 1, 2]
    assert torch.equal(next(iterator), inputs(7003, 32)), "no batch was lost"


def test_a_shorter_window_uses_what_it_gets():
    model = mlp()
    demp = demp_of(model, adamw(model), window=5)
    kill(model, 0, 4)
    batches, drawn = counted(2)
    report = demp.finish(batches())
    assert drawn == [0, 1]
    assert report.layers["0"].cut == 1


@pytest.mark.parametrize("batches", [[], (), iter([]), list], ids=["list", "tuple", "iterator", "function"])
def test_an_empty_window_cuts_nothing_and_warns(batches):
    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer)
    kill(model, 0, 4)
    advance(model, optimizer, range(4))
    before = everything(model, optimizer)
    with pytest.warns(UserWarning, match=r"window is empty.*nothing is cut.*pass an iterable"):
        report = demp.step(batches)
    assert same(everything(model, optimizer), before)
    assert report.parameters_after == report.parameters_before == sum(p.numel() for p in model.parameters())
    assert report.layers["0"].cut == 0
    assert demp.live()["0"].all()
    assert not demp.due


def test_batches_of_several_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm, self.out = nn.Linear(3, 5), nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

        def forward(self, x, y):
            return self.out(torch.relu(self.norm(self.a(x)) + self.b(y)))

    torch.manual_seed(0)
    model = Two()
    example = (torch.randn(4, 3), torch.randn(4, 2))
    demp = torsion.DemP(model, adamw(model), example, total_steps=5)
    with torch.no_grad():
        model.norm.bias.fill_(3.0)
        model.norm.weight[2] = 0.0
        model.norm.bias[2] = -1.0
        model.b.weight[2], model.b.bias[2] = 0.0, -0.1
    report = demp.finish([example, list(example)])
    assert report.layers["a"].cut == report.layers["b"].cut == 1
    assert model.norm.num_features == 4


def test_patience_asks_for_windows_in_a_row():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = demp_of(model, optimizer, patience=3, noise_std=0.0)
    kill(model, 0, 1, 6)

    def window():
        for _ in range(4):
            optimizer.step()
        return demp.step(windows()).layers["0"].cut

    assert window() == 0
    assert demp.live()["0"].tolist() == [u not in (1, 6) for u in range(8)], "noise follows the window at once"
    revive(model, 0, 6)
    assert window() == 0
    assert demp.live()["0"][6]
    kill(model, 0, 6)
    assert window() == 1, "unit 1, dead three times in a row"
    assert window() == 0
    assert window() == 1
    assert model[0].out_features == 6


def test_min_live_and_align():
    model = mlp(widths=(8, 6))
    demp = demp_of(model, adamw(model), min_live=2, align=4)
    kill(model, 0, *range(8))
    kill(model, 3, 0)
    report = demp.finish(windows())
    assert report.layers["0"].live == 4, "two that stay alive, rounded up"
    assert report.layers["3"].live == 6, "five rounded up to eight: there are six"
    assert demp.live()["0"].sum() == 2
    assert demp.live()["3"].sum() == 5


def test_excluded_modules_are_whole_and_without_noise():
    model = nn.Sequential()
    model.add_module("body", mlp())
    model.add_module("head", nn.Sequential(nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = demp_of(model, optimizer, exclude=("body.0", "head"))
    assert demp.live().keys() == {"body.3", "body.6"}
    kill(model.body, 0, 1)
    kill(model.body, 3, 1)
    before = model.body[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.body[0].weight, before)
    report = demp.finish(windows())
    assert model.body[0].out_features == 8
    assert model.body[3].out_features == 5
    assert report.layers["body.3"].cut == 1


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Linear(INPUTS, 8), nn.BatchNorm1d(8)
        self.inner, self.inner_norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.out(torch.relu(x + self.inner_norm(self.inner(x))))


def test_what_is_added_to_an_excluded_layer_is_excluded_with_it():
    torch.manual_seed(0)
    model = Residual().double()
    assert demp_of(model, adamw(model)).live().keys() == {"stem", "inner"}
    assert demp_of(model, adamw(model), exclude=("inner",)).live().keys() == set()


# Cuts


def test_a_cut_changes_no_output_and_takes_the_optimizer_along():
    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer, noise_std=0.0)
    advance(model, optimizer, range(3))
    kill(model, 0, 0, 7)
    kill(model, 3, 2)
    moments = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    model.eval()
    outputs = model(inputs(9999))
    model.train()
    before = sum(p.numel() for p in model.parameters())
    report = demp.finish(windows())
    assert (report.layers["0"].before, report.layers["0"].live, report.layers["0"].cut) == (8, 6, 2)
    assert (report.parameters_before, report.parameters_after) == (before, sum(p.numel() for p in model.parameters()))
    assert report.max_difference <= 1e-10
    assert "3" in str(report)
    assert model.training
    model.eval()
    close(model(inputs(9999)), outputs, ROW)
    model.train()
    kept = list(range(1, 7))
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[model[0].weight][key], moments["0.weight"][key][kept])
        found = optimizer.state[model[3].weight][key]
        assert torch.equal(found, moments["3.weight"][key][[0, 1, 3, 4, 5]][:, kept])
    assert float(optimizer.state[model[0].weight]["step"]) == 3
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]
    assert demp.generation == 1
    assert all(mask.all() for mask in demp.live().values())
    advance(model, optimizer, range(3, 7), demp)
    assert float(optimizer.state[model[0].weight]["step"]) == 7


def test_the_lasso_follows_a_cut():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    demp = demp_of(model, optimizer, noise_std=0.0, schedule="constant")
    kill(model, 0, 0, 7)
    demp.finish(windows())
    backward(model, 0)
    plain, value = model[1].weight.grad.clone(), model[1].weight.detach().clone()
    optimizer.step()
    close(model[1].weight.grad, plain + 1e-2 * value.sign(), ROW)


def test_several_cuts_in_a_row_and_a_report_each():
    model = mlp(widths=(12, 10))
    optimizer = adamw(model)
    demp = demp_of(model, optimizer, noise_std=1e-3)
    reports = []
    for round_ in range(3):
        kill(model, 0, 0, 3)
        kill(model, 3, round_)
        reports += advance(model, optimizer, range(4 * round_, 4 * round_ + 4), demp)
    assert [r.layers["0"].before for r in reports] == [12, 10, 8]
    assert [r.layers["0"].live for r in reports] == [10, 8, 6]
    assert [r.layers["3"].live for r in reports] == [9, 8, 7]
    assert demp.generation == 3
    assert reports[0].parameters_after == reports[1].parameters_before


def test_cut_without_a_window_cuts_nothing():
    model = mlp()
    demp = demp_of(model, adamw(model))
    kill(model, 0, 0)
    parameters = list(model.parameters())
    report = demp.cut()
    assert report.layers["0"].cut == 0
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert demp.generation == 0


@pytest.mark.parametrize("criterion", ["auto", "ever_active", "abs_max"])
def test_a_cut_that_would_change_the_outputs_is_taken_back(criterion):
    """The unit came alive between the window and the cut: the comparison on the window sees it."""
    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer, criterion=criterion)
    advance(model, optimizer, range(2))
    kill(model, 0, 2)
    demp.observe(windows())
    revive(model, 0, 2)
    before, live = everything(model, optimizer), demp.live()
    with pytest.raises(RuntimeError, match=r"cut changes an output"):
        demp.cut()
    assert same(everything(model, optimizer), before)
    assert same(demp.live(), live)
    assert demp.generation == 0
    advance(model, optimizer, range(2, 4), demp)
    assert model[0].out_features == 8


def test_ema_copies_are_cut_alike():
    model = mlp()
    optimizer = adamw(model)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    other = copy.deepcopy(model)
    demp = demp_of(model, optimizer, also=(ema, other))
    kill(model, 0, 1)
    held = ema.module[3].weight.detach().clone()
    demp.finish(windows())
    assert ema.module[0].out_features == other[0].out_features == 7
    assert torch.equal(ema.module[3].weight, held[:, [0, 2, 3, 4, 5, 6, 7]])
    ema.update_parameters(model)
    ema(inputs())


def test_a_schedulers_rates_go_on():
    model = mlp()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    demp = demp_of(model, optimizer)
    kill(model, 0, 1)
    rates = []
    for step in range(8):
        advance(model, optimizer, range(step, step + 1), demp)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert demp.generation >= 1
    assert rates == sorted(rates, reverse=True)


# The life of the hooks


def test_the_optimizer_does_not_keep_the_model_alive():
    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer)
    advance(model, optimizer, range(5), demp)
    gone = weakref.ref(model), weakref.ref(demp)
    del model, demp
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_close_takes_the_hooks_off():
    model, twin = mlp(), mlp()
    optimizer, alone = adamw(model), adamw(twin)
    demp = demp_of(model, optimizer)
    demp.close()
    demp.close()
    advance(model, optimizer, range(5))
    advance(twin, alone, range(5))
    assert same(everything(model)["model"], everything(twin)["model"])
    assert demp.steps_taken == 0
    kill(model, 0, 1)
    assert demp.finish(windows()).layers["0"].cut == 1


def test_two_controllers_of_one_optimizer_are_refused():
    model = mlp()
    optimizer = adamw(model)
    first = demp_of(model, optimizer)
    with pytest.raises(ValueError, match=r"AdamW.*has a DemP already.*close\(\)"):
        demp_of(model, optimizer)
    first.close()
    second = demp_of(model, optimizer)
    advance(model, optimizer, range(1))
    assert (first.steps_taken, second.steps_taken) == (0, 1)


def test_deepcopy_of_model_and_optimizer_has_no_demp():
    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer)
    both = copy.deepcopy((model, optimizer))
    backward(both[0], 0)
    both[1].step()
    assert demp.steps_taken == 0


def test_compiled_models_are_cut_in_place():
    model = mlp(dtype=torch.float32)
    compiled = torch.compile(model, backend="eager")
    optimizer = adamw(compiled)
    demp = demp_of(compiled, optimizer)
    kill(model, 0, 1)
    reports = advance(compiled, optimizer, range(5), demp)
    assert reports[0].layers["0"].cut == 1
    assert compiled(inputs(0, dtype=torch.float32)).shape == (16, 3)


def test_repr_says_what_is_left():
    model = mlp()
    demp = demp_of(model, adamw(model), noise_std=1e-4)
    kill(model, 0, 1)
    demp.finish(windows())
    assert "13 of 14 units in 2 layers" in repr(demp)
    assert "noise_std=0.0001" in repr(demp)
