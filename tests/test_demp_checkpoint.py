"""Checkpoints of DemP: resuming gives the same bits, a full-size model takes the cut shape, strangers are refused."""

from __future__ import annotations

import copy
import io
import re
import warnings

import pytest
import torch
from demp_runs import adamw, advance, demp_of, everything, kill, mlp, same, unchanged, windows
from torch import nn

import torsion

STEPS = 15


def to_disk(objects):
    """Through a file and back, with nothing but weights."""
    file = io.BytesIO()
    torch.save([o.state_dict() for o in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def load(saved, objects):
    for state, o in zip(saved, objects, strict=True):
        o.load_state_dict(state)


OPTIMIZERS = {
    "adamw": adamw,
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
    "tam": lambda m: torsion.TAM(m.parameters(), lr=0.05),
    "adatamw": lambda m: torsion.AdaTAMW(m.parameters(), lr=5e-3),
}


def start(kind, **settings):
    model = mlp(widths=(10, 8))
    optimizer = OPTIMIZERS[kind](model)
    return demp_of(model, optimizer, seed=11, patience=2, noise_std=1e-3, **settings), model, optimizer


def train(demp, model, optimizer, steps):
    """Units die on the way: those of the first layer before the first window, others later."""
    for step in steps:
        if step == 0:
            kill(model, 0, 1, 4)
        if step == 5:
            kill(model, 3, 0)
        advance(model, optimizer, range(step, step + 1), demp)


@pytest.mark.parametrize("stop", [0, 3, 4, 6, 8, 9, 12, 14])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resuming_gives_the_same_bits(kind, stop):
    """Windows at 4, 8 and 12; with two windows of patience the cuts come at 8 and 12."""
    demp, model, optimizer = start(kind)
    train(demp, model, optimizer, range(stop))
    saved = to_disk((demp, model, optimizer))
    train(demp, model, optimizer, range(stop, STEPS))
    assert model[0].out_features == 8
    assert model[3].out_features == 7

    resumed = start(kind)
    load(saved, resumed)
    again, other, theirs = resumed
    assert again.steps_taken == stop
    assert other[0].out_features == (8 if stop >= 8 else 10)
    train(again, other, theirs, range(stop, STEPS))
    assert same(everything(other)["model"], everything(model)["model"])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert same(dict(optimizer.state[p]), dict(theirs.state[q]))
    assert same(again.live(), demp.live())
    assert same(to_disk((again,)), to_disk((demp,)))


def test_a_window_survives_to_the_cut():
    """Observe, save, load, cut: the same as without a stop, mean activations of the window included."""
    demp, model, optimizer = start("sgd", align=4)
    kill(model, 0, 1, 4, 5)
    for _ in range(2):
        demp.observe(windows())
    saved = to_disk((demp, model, optimizer))
    report = demp.cut()
    resumed = start("sgd", align=4)
    load(saved, resumed)
    again = resumed[0].cut()
    assert (again.layers["0"].live, again.layers["3"].live) == (report.layers["0"].live, report.layers["3"].live)
    assert report.layers["0"].live == 8
    assert same(everything(resumed[1])["model"], everything(model)["model"])


def test_noise_goes_by_the_original_places_after_a_resume():
    demp, model, optimizer = start("sgd")
    train(demp, model, optimizer, range(9))
    saved = to_disk((demp, model, optimizer))
    resumed = start("sgd")
    load(saved, resumed)
    for opt in (optimizer, resumed[2]):
        opt.zero_grad()
        opt.step()
    assert same(everything(resumed[1])["model"], everything(model)["model"])


def test_ema_copies_take_the_shape_too():
    demp, model, optimizer = start("sgd")
    train(demp, model, optimizer, range(9))
    saved = to_disk((demp, model, optimizer))
    again = mlp(widths=(10, 8))
    ema = copy.deepcopy(again)
    other = demp_of(again, OPTIMIZERS["sgd"](again), also=(ema,), patience=2, noise_std=1e-3)
    other.load_state_dict(saved[0])
    assert ema[0].out_features == 8
    ema.load_state_dict(saved[1])


def test_only_plain_values_and_tensors():
    demp, model, optimizer = start("tam")
    train(demp, model, optimizer, range(9))

    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(k, (str, int)) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return type(value) in (int, float, str, bool) or type(value) is torch.Tensor

    saved = demp.state_dict()
    assert plain(saved)
    saved["layers"]["0"]["live"][:] = False
    saved["layers"]["0"]["kept"][:] = 0
    assert demp.live()["0"].all(), "the checkpoint's tensors are copies"


def test_into_the_same_objects_again():
    """A later cut cannot be undone, an unchanged shape can be loaded."""
    demp, model, optimizer = start("sgd")
    train(demp, model, optimizer, range(4))
    early = to_disk((demp, model, optimizer))
    train(demp, model, optimizer, range(4, 9))
    late = to_disk((demp, model, optimizer))
    train(demp, model, optimizer, range(9, 11))
    load(late, (demp, model, optimizer))
    assert demp.steps_taken == 9
    with pytest.raises(ValueError, match=r"^0: .*unit 1, which was cut.*full-size"):
        unchanged(model, optimizer, lambda: demp.load_state_dict(early[0]))
    assert demp.steps_taken == 9


def test_into_a_model_cut_less():
    """A model that is part of the way there is cut the rest of it."""
    demp, model, optimizer = start("sgd")
    other, again, theirs = start("sgd")
    for d, m in ((demp, model), (other, again)):
        kill(m, 0, 1)
        for _ in range(2):
            d.observe(windows())
        d.cut()
    kill(model, 0, 0, 5)
    kill(model, 3, 0)
    for _ in range(2):
        demp.observe(windows())
    demp.cut()
    load(to_disk((demp, model, optimizer)), (other, again, theirs))
    assert again[0].out_features == 7
    for opt in (optimizer, theirs):
        opt.step()
    assert same(everything(again)["model"], everything(model)["model"])


def test_other_settings_warn_and_stay():
    demp, model, optimizer = start("sgd")
    train(demp, model, optimizer, range(9))
    saved = demp.state_dict()
    other = start("sgd", lasso=0.5, total_steps=99)
    with (
        pytest.warns(UserWarning, match=r"lasso=0\.5 here, 0\.01 in the checkpoint"),
        pytest.warns(UserWarning, match=r"total_steps=99 here, 20 in the checkpoint"),
    ):
        other[0].load_state_dict(saved)
    assert "lasso=0.5" in repr(other[0])


def test_the_seed_comes_from_the_checkpoint():
    demp, model, optimizer = start("sgd")
    saved = to_disk((demp, model, optimizer))
    other = mlp(widths=(10, 8))
    theirs = OPTIMIZERS["sgd"](other)
    again = demp_of(other, theirs, seed=12, patience=2, noise_std=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(saved, (again, other, theirs))
    train(demp, model, optimizer, range(3))
    train(again, other, theirs, range(3))
    assert same(everything(other)["model"], everything(model)["model"])


# Checkpoints of something else


def broken(**changes):
    """A good checkpoint with some entries replaced, "a/b" in the dictionary at a."""
    demp, model, optimizer = start("sgd")
    train(demp, model, optimizer, range(9))
    saved = demp.state_dict()
    for path, value in changes.items():
        *way, last = path.split("/")
        inner = saved
        for key in way:
            inner = inner[key]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    return saved


def of(model, optimizer=None):
    demp = demp_of(model, optimizer or torch.optim.SGD(model.parameters(), lr=0.1))
    return demp.state_dict()


def half_linear():
    model = mlp(widths=(10, 8))
    model[5] = nn.Identity()
    return model


STRANGERS = {
    "wider": (lambda: of(mlp(widths=(12, 8))), ValueError, r"0\.weight: shape \[12, 6\].*\(10, 6\) here"),
    "deeper": (lambda: of(mlp(widths=(10, 8, 5))), ValueError, r"a parameter of the checkpoint that this model"),
    "shallower": (lambda: of(mlp(widths=(10,))), ValueError, r"a parameter of .*does not have|shape"),
    "no activation": (lambda: of(half_linear()), ValueError, r"3: a layer of this model that"),
    "units": (lambda: broken(**{"layers/0/units": 12}), ValueError, r"0: 12 units in the checkpoint.*10 here"),
    "kept": (lambda: broken(**{"layers/0/kept": torch.tensor([3, 1])}), ValueError, r"0: .*do not fit"),
    "kept too far": (lambda: broken(**{"layers/0/kept": torch.arange(4, 12)}), ValueError, r"0: .*do not fit"),
    "none kept": (lambda: broken(**{"layers/0/kept": torch.arange(0)}), ValueError, r"0: .*do not fit"),
    "live": (lambda: broken(**{"layers/3/live": torch.ones(3) > 0}), ValueError, r"3: .*do not fit"),
    "dtype": (lambda: broken(**{"layers/3/live": torch.ones(7)}), ValueError, r"3: 'live' is torch.float32"),
    "no mean": (lambda: broken(**{"layers/3/mean": None}), ValueError, r"3: 'mean' is NoneType"),
    "layer gone": (lambda: broken(**{"layers/3": None}), ValueError, r"3: a layer of this model"),
    "layers": (lambda: broken(layers=[1]), ValueError, r"'layers' is list"),
    "step": (lambda: broken(step=-1), ValueError, r"step=-1"),
    "seed": (lambda: broken(seed="0"), TypeError, r"seed='0'"),
    "settings": (lambda: broken(settings=3), ValueError, r"settings"),
    "version": (lambda: broken(version=99), ValueError, r"version 99"),
    "no seed": (lambda: broken(seed=None), ValueError, r"lacks seed"),
    "of a model": (lambda: dict(mlp().state_dict()), ValueError, r"lacks version, seed, step"),
    "a list": (lambda: [1, 2], TypeError, r"the checkpoint is list.*state_dict\(\)"),
    "None": (lambda: None, TypeError, r"the checkpoint is NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_are_refused_and_nothing_changes(stranger):
    saved, error, says = STRANGERS[stranger]
    saved = saved()
    demp, model, optimizer = start("sgd")
    train(demp, model, optimizer, range(3))
    before = to_disk((demp,))
    with pytest.raises(error, match=re.compile(says)):
        unchanged(model, optimizer, lambda: demp.load_state_dict(saved))
    assert same(to_disk((demp,)), before)
    train(demp, model, optimizer, range(3, 9))
    assert model[0].out_features == 8


def test_parameters_in_another_order():
    """Noise goes by their numbers, so the order is part of the model."""

    class Net(nn.Module):
        def __init__(self, names):
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(6, 6))
            self.out = nn.Linear(6, 2)

        def forward(self, x):
            return self.out(torch.relu(self.b(torch.relu(self.a(x)))))

    saved = of(Net("ab").double())
    model = Net("ba").double()
    demp = demp_of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"a\.weight: stands where this model has b\.weight"):
        demp.load_state_dict(saved)


class Wired(nn.Module):
    """Two layers behind each other; with ``shortcut`` what they make meets at an addition."""

    def __init__(self, shortcut):
        super().__init__()
        self.a, self.b, self.out, self.shortcut = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2), shortcut

    def forward(self, x):
        x = torch.relu(self.a(x))
        y = self.b(x)
        return self.out(torch.relu(x + y if self.shortcut else y))


def test_a_model_of_the_same_parameters_wired_otherwise():
    """Its ties would keep more units than the checkpoint says: refused before anything is cut."""
    saved = of(Wired(shortcut=False).double())
    for name, units in (("a", [0, 1, 2]), ("b", [2, 3, 4])):
        for key in ("kept", "live", "dead_windows", "mean"):
            saved["layers"][name][key] = saved["layers"][name][key][units]
    model = Wired(shortcut=True).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    demp = demp_of(model, optimizer)
    before = demp.state_dict()
    with pytest.raises(ValueError, match=r"^a: the checkpoint keeps 3 units, but 5 must stay.*cut together with"):
        unchanged(model, optimizer, lambda: demp.load_state_dict(saved))
    assert same(demp.state_dict(), before)
    saved["layers"]["b"] = saved["layers"]["a"]
    demp.load_state_dict(saved)
    assert (model.a.out_features, model.b.in_features, model.b.out_features) == (3, 3, 3)
