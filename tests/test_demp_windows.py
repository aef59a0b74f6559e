"""What a window may conclude: nothing from nothing, live wherever anything was, and no trace of one that failed."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from demp_runs import INPUTS, adamw, advance, demp_of, everything, inputs, kill, mlp, same, windows
from torch import Tensor, nn

import torsion
from torsion.prune import compact, live_units

# Windows that hold nothing, or nothing for some layer

EMPTY = torch.empty(0, INPUTS, dtype=torch.float64)


def test_batches_without_examples_are_an_empty_window() -> None:
    """Edge case 3: over no example no unit acts, and all would be called dead."""
    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer)
    kill(model, 0, 4)
    advance(model, optimizer, range(4))
    before, saved = everything(model, optimizer), demp.state_dict()
    with pytest.warns(UserWarning, match=r"gave no example.*nothing is cut"):
        report = demp.step([EMPTY, EMPTY])
    assert same(everything(model, optimizer), before)
    assert report is not None
    assert report.parameters_after == report.parameters_before
    assert same(demp.state_dict(), {**saved, "window_at": 4})
    with pytest.warns(UserWarning, match="without examples"):
        assert live_units(model, [EMPTY]) == {}


def test_a_batch_without_examples_among_others_takes_no_part() -> None:
    model = mlp()
    demp = demp_of(model, adamw(model))
    kill(model, 0, 4)
    alone, mixed = live_units(model, [inputs()]), live_units(model, [EMPTY, inputs(), EMPTY])
    assert same(alone, mixed)
    assert demp.finish([EMPTY, inputs()]).layers["0"].cut == 1


class Experts(nn.Module):
    """Two hidden layers, each for the examples of one sign of the first input; ``lazy`` ones without any do not run."""

    def __init__(self, lazy: bool = False) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(INPUTS, 5), nn.Linear(INPUTS, 4)])
        self.down = nn.ModuleList([nn.Linear(5, 2), nn.Linear(4, 2)])
        self.lazy = lazy

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 2)
        for mine, up, down in zip((x[:, 0] > 0, x[:, 0] <= 0), self.up, self.down, strict=True):
            if mine.any() or not self.lazy:
                out[mine] = down(torch.relu(up(x[mine])))
        return out


def experts(lazy: bool = False) -> Experts:
    """The first unit of each is dead, all others are live."""
    torch.manual_seed(0)
    model = Experts(lazy).double()
    with torch.no_grad():
        for up in model.up:
            up.bias.fill_(20.0)
            up.weight[0], up.bias[0] = 0.0, -1.0
    return model


@pytest.mark.parametrize("lazy", [False, True], ids=["runs on nothing", "does not run"])
def test_a_layer_that_no_example_reached_is_live(lazy: bool) -> None:
    model = experts(lazy)
    both = inputs(n=32)
    positive = both[both[:, 0] > 0]
    if not lazy:
        assert {n: m.tolist() for n, m in live_units(model, [positive]).items()} == {
            "up.0": [False, True, True, True, True],
            "up.1": [True] * 4,
        }
    demp = demp_of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    report = demp.finish([positive])
    assert [report.layers[f"up.{i}"].cut for i in (0, 1)] == [1, 0]
    report = demp.finish([both])
    assert [report.layers[f"up.{i}"].cut for i in (0, 1)] == [0, 1]


# Live wherever anything was


class Recurrent(nn.Module):
    """One layer, used ``times``; its second unit acts at the fourth use and not before."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.first, self.again, self.last, self.times = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1), times
        with torch.no_grad():
            self.first.bias.zero_()
            self.again.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
            self.again.bias.copy_(torch.tensor([1.0, -2.5]))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for _ in range(self.times):
            x = torch.relu(self.again(x))
        return self.last(x)


@pytest.mark.parametrize(("times", "live"), [(3, [True, False]), (4, [True, True])])
def test_a_layer_used_again_and_again_is_live_where_any_use_is(times: int, live: list[bool]) -> None:
    """Edge case 6. Its units are its inputs too, so that a cut goes along both axes of its weight."""
    model, x = Recurrent(times).double(), torch.zeros(5, 3).double()
    found = live_units(model, [x])
    assert found["again"].tolist() == found["first"].tolist() == live
    compact(model, found, x)
    assert model.again.weight.shape == (sum(live), sum(live))


class Siamese(nn.Module):
    """Two layers that share their weight, with biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.left(x)) + torch.relu(self.right(x)))


def test_a_shared_weight_is_cut_once_and_where_all_its_units_are_dead() -> None:
    torch.manual_seed(0)
    model, x = Siamese().double(), torch.randn(8, 3).double()
    with torch.no_grad():
        model.left.bias.copy_(torch.tensor([9.0, -9.0, -9.0, 9.0]))
        model.right.bias.copy_(torch.tensor([9.0, 9.0, -9.0, -9.0]))
    expected = model(x)
    demp = torsion.DemP(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), x, total_steps=5)
    report = demp.finish([x])
    assert {r.cut for r in report.layers.values()} == {1}
    assert model.left.weight is model.right.weight
    assert (model.left.out_features, model.right.out_features, model.out.in_features) == (3, 3, 3)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_a_constant_unit_is_live() -> None:
    """A scale of 0 leaves relu(shift): dead if and only if the shift is not positive."""
    model = mlp(widths=(3,))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    assert live_units(model, [inputs()])["0"].tolist() == [False, False, True]


def test_signed_sums_miss_units_of_gelu_that_act() -> None:
    """With z of mean -1 the sum over 1536 examples is negative, and the largest output above 1: not to be cut."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
    z = torch.randn(1536, 8).double() - 1
    assert not live_units(model, [z], "sum_le")["0"].any()
    assert live_units(model, [z])["0"].all()


def normalized(shortcut: bool) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Linear(INPUTS, 8), nn.BatchNorm1d(8)
            self.inner, self.inner_norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.stem(x)))
            y = self.inner_norm(self.inner(x))
            return self.out(torch.relu(x + y if shortcut else y))

    torch.manual_seed(0)
    model = Net().double()
    nn.init.ones_(model.norm.bias)
    nn.init.zeros_(model.inner_norm.weight)
    return model


def test_zero_initialised_scales_of_a_shortcut_cost_no_unit_and_get_no_lasso_at_zero() -> None:
    """sign(0) = 0: the first step is that of a training without lasso, on these scales alone."""
    results = []
    for lasso in (0.5, 0.0):
        model = normalized(shortcut=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        demp = demp_of(model, optimizer, lasso=lasso, noise_std=0.0, schedule="constant")
        advance(model, optimizer, range(1))
        results.append((model.inner_norm.weight.detach().clone(), model.norm.weight.detach().clone()))
        assert all(r.cut == 0 for r in demp.finish(windows()).layers.values())
    (inner, stem), (inner_alone, stem_alone) = results
    assert inner.abs().min() > 0, "the loss moves them"
    assert torch.equal(inner, inner_alone)
    assert not torch.equal(stem, stem_alone)


def test_zero_initialised_scales_without_a_shortcut_are_a_dead_layer() -> None:
    model = normalized(shortcut=False)
    demp = demp_of(model, torch.optim.SGD(model.parameters(), lr=0.1), min_live=3)
    assert demp.finish(windows()).layers["inner"].live == 3
    assert demp._units["inner"].kept.tolist() == [0, 1, 2], "no mean to go by: the first"


def test_a_layer_that_is_dead_as_a_whole_keeps_one_unit() -> None:
    model, x = mlp(), inputs()
    kill(model, 0, *range(8))
    live = live_units(model, [x])
    assert not live["0"].any()
    report = compact(model, live, x)
    assert (report.layers["0"].live, report.layers["3"].live) == (1, 6)
    assert model[3].in_features == 1


class Sampling(nn.Module):
    """Draws in its forward, in evaluation mode too, as a variational model does; the smaller one draws as much."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y + torch.randn_like(y)


def test_outputs_that_are_drawn_are_compared_on_the_same_draws() -> None:
    model = Sampling()
    demp = demp_of(model, adamw(model), window=3)
    kill(model.body, 0, 1)
    report = demp.finish(windows())
    assert report.layers["body.0"].cut == 1
    assert report.max_difference < 1e-12


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_cut_within_any_mode_of_autograd_leaves_parameters_that_train(mode: Any) -> None:
    """A window often stands beside an evaluation, and tensors made in inference mode cannot be trained."""
    runs = []
    for within in (contextlib.nullcontext, mode):
        model = mlp()
        optimizer, ema = adamw(model), copy.deepcopy(model)
        demp = demp_of(model, optimizer, also=ema)
        advance(model, optimizer, range(4))
        kill(model, 0, 1)
        with within():
            report = demp.step(windows())
            kill(model, 3, 2)
        assert report is not None
        assert report.layers["0"].cut == 1
        advance(model, optimizer, range(4, 9), demp)
        assert demp.generation == 2
        assert not any(t.is_inference() for t in [*model.parameters(), *model.buffers(), *ema.parameters()])
        runs.append(everything(model)["model"])
    assert same(*runs)


# Windows that fail


def gelu() -> nn.Sequential:
    """Unit 2 puts out about -0.16 on every input: never active, yet a cut takes that away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3)).double()
    nn.init.ones_(model[1].bias)
    with torch.no_grad():
        model[1].weight[2], model[1].bias[2] = 1e-3, -1.0
        model[3].weight.abs_().add_(0.1)
    return model


def test_a_step_whose_cut_is_taken_back_leaves_no_trace() -> None:
    """Nor in the count of dead windows: it is as if the window had not been."""
    model = gelu()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    demp = demp_of(model, optimizer, criterion="ever_active", patience=2, lasso=0.0)
    kill(model, 0, 5)
    with torch.no_grad():
        model[1].bias[5] = -60.0  # where GELU is 0, not small
    demp.observe(windows())
    twin = copy.deepcopy(model)
    saved, live = demp.state_dict(), demp.live()
    assert saved["layers"]["0"]["dead_windows"].tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
    advance(model, optimizer, range(4))
    noised = copy.deepcopy(model.state_dict())
    before = everything(model, optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the cut changes an output.*Nothing was cut"):
            demp.step(windows())
        assert same(everything(model, optimizer), before)
        assert same(demp.state_dict(), {**saved, "step": 4})
        assert same(demp.live(), live)
        assert demp.due
        assert demp.generation == 0
    # The noise goes on by the old masks.
    advance(model, optimizer, range(4, 5))
    moved = model[0].weight.detach() != noised["0.weight"]
    assert moved.any(1).tolist() == live["0"].tolist()
    model.load_state_dict(twin.state_dict())
    with torch.no_grad():
        model[1].bias[2] = 1.0
    assert demp.step(windows()).layers["0"].cut == 1
    assert not demp.due


@pytest.mark.parametrize("at", [0, 1])
def test_outputs_are_compared_on_every_batch_of_the_window(at: int) -> None:
    """Unit 2 passes feature 0, which is positive in one batch alone: after the window it comes alive there."""
    model = mlp()
    demp = demp_of(model, adamw(model))
    batches = [inputs(step) for step in range(2)]
    for i, x in enumerate(batches):
        x[:, 0] = x[:, 0].abs() * (1 if i == at else -1)
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = torch.eye(INPUTS, dtype=torch.float64)[0], 0.0
        model[1].bias[2] = -100.0
    assert not demp.observe(batches)["0"][2]
    with torch.no_grad():
        model[1].bias[2] = 0.0
    assert [bool(live_units(model, [x])["0"][2]) for x in batches] == [i == at for i in range(2)]
    with pytest.raises(RuntimeError, match="the cut changes an output"):
        demp.cut()
    assert model[0].out_features == 8


def test_a_first_window_that_fails_leaves_all_rows_in_noise() -> None:
    model = gelu()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = demp_of(model, optimizer, criterion="ever_active")
    with pytest.raises(RuntimeError, match="the cut changes an output"):
        demp.finish(windows())
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert (model[0].weight.detach() != before).all()


@pytest.mark.parametrize(
    "rule",
    [
        {"criterion": "sum_le"},
        {"criterion": "dormant", "tau": 0.5},
        {"criterion": "abs_max", "tau": 0.5},
        {"criterion": "ever_active", "tau": 0.1},
        {"tau": 0.5},
    ],
    ids=str,
)
def test_rules_that_may_cut_what_acts_report_the_difference(rule: dict[str, Any]) -> None:
    model = gelu()
    demp = demp_of(model, adamw(model), **rule)
    model.eval()
    x = next(windows())
    before = model(x)
    report = demp.finish([x])
    assert report.layers["0"].cut == 1
    difference = float((model(x) - before).detach().abs().max())
    assert report.max_difference == pytest.approx(difference, rel=1e-12)
    assert difference > 0.01


@pytest.mark.parametrize("rule", ["auto", "abs_max"])
def test_rules_that_are_exact_keep_it(rule: str) -> None:
    model = gelu()
    demp = demp_of(model, adamw(model), criterion=rule)
    assert demp.finish(windows()).layers["0"].cut == 0
