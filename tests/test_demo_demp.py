"""`torsion demo --method demp`: networks shrink, the table and the picture show the runs, and losses are told too."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import re
import signal
import statistics

import pytest
import torch

from torsion import cli
from torsion.cli import demo
from torsion.cli.demo import grid, progress, shrinkage, shrinking, text
from torsion.cli.demo.arms import Choice
from torsion.cli.demo.outcome import Outcome
from torsion.cli.demo.registry import arms_on, select
from torsion.cli.demo.tasks import Metric, find_task
from torsion.cli.demo.training import Plan, Run, train
from torsion.prune import live_units

CPU = torch.device("cpu")
STEPS, SEEDS = 60, 2
DIGITS = ("digits-convolutional", "digits-mlp")
LASSO = {"digits-convolutional": 0.05, "digits-mlp": 0.03}


def _small(monkeypatch):
    """Small networks with a lasso that makes units die within a few steps."""
    for name, build, width in (
        ("CONVOLUTIONAL", shrinking.convolutional, 8),
        ("PERCEPTRON", shrinking.perceptron, 64),
    ):
        task = getattr(shrinking, name)
        smaller = functools.partial(build, width)
        monkeypatch.setattr(shrinking, name, dataclasses.replace(task, build=smaller, seeds=SEEDS, evaluations=3))
    chosen = demo.best_choice
    monkeypatch.setattr(
        demo,
        "best_choice",
        lambda task, arm: Choice(0.8, LASSO[task]) if (task in LASSO and arm == "DemP") else chosen(task, arm),
    )


def _demo(out, *more):
    words = ["--method", "demp", "--steps", str(STEPS), "--threads", "1", "--device", "cpu", "--out", str(out), *more]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = cli.main(["demo", *words])
    return code, json.loads((out / "results.json").read_text()), printed.getvalue()


@pytest.fixture(scope="module")
def on_digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("demp")
    with pytest.MonkeyPatch.context() as monkeypatch:
        _small(monkeypatch)
        code, record, printed = _demo(out)
    assert code == 0
    return out, record, printed


def _of(network, name):
    return [run for run in network["runs"] if run["optimizer"] == name]


def test_both_networks_train_dense_and_with_demp_into_one_picture(on_digits):
    out, record, printed = on_digits
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert [network["task"] for network in record["networks"]] == list(DIGITS)
    for network in record["networks"]:
        assert network["settings"]["method"] == "demp"
        assert network["settings"]["strengths"] == {"DemP": LASSO[network["task"]]}
        assert [run["optimizer"] for run in network["runs"]] == ["dense", "DemP"] * SEEDS
        assert all(run["finished"] and run["steps"] == STEPS for run in network["runs"])
        for seed in network["settings"]["seeds"]:
            dense, demp = (run for run in network["runs"] if run["seed"] == seed)
            assert dense["loss"][0] == demp["loss"][0]  # same initialization, same first batch
            assert dense["parameters"] == demp["parameters"]
    assert "digits.png" in printed.replace("\n", "")


def _parameters(task, units):
    """How many a network with these units has, counted by hand."""
    if task == "digits-mlp":
        a, b = units
        return 64 * a + 2 * a + a * b + 2 * b + 10 * b + 10
    a, b, c, d = units
    return 9 * (a + a * b + b * c + c * d) + 2 * (a + b + c + d) + 10 * d + 10


def test_recorded_sizes_are_those_of_the_network_and_only_fall(on_digits):
    _, record, _ = on_digits
    for network in record["networks"]:
        for run in _of(network, "DemP"):
            sizes = run["sizes"]
            assert sizes[0]["step"] == 0
            assert sizes[-1]["step"] == STEPS
            assert sizes[0]["parameters"] == run["parameters"]
            assert sizes[-1]["parameters"] == run["parameters_left"] < run["parameters"]
            assert all(before["parameters"] >= after["parameters"] for before, after in itertools.pairwise(sizes))
            for size in sizes:
                assert size["parameters"] == _parameters(network["task"], size["units"].values())
            assert run["units"] == sizes[-1]["units"]
            assert len(run["timing"]["window_ms"]) == len(sizes) - 1
        for run in _of(network, "dense"):
            assert run["parameters_left"] == run["parameters"] == _parameters(network["task"], run["units"].values())
            assert run["sizes"] == run["timing"]["window_ms"] == []
            assert all(run["live"][name] <= units for name, units in run["units"].items())


def test_time_to_finish_counts_windows_and_cuts(on_digits):
    _, record, _ = on_digits
    for network in record["networks"]:
        for run in network["runs"]:
            timing = run["timing"]
            spent = (sum(timing["training_ms"]) + sum(timing["window_ms"])) / 1e3
            assert timing["training_seconds"] == pytest.approx(spent)


def _rows(printed, task):
    """Row name -> words of the table of a network; wrapped cells are joined."""
    lines = printed[printed.index(f"{task}: ") :].splitlines()
    start = next(index for index, line in enumerate(lines) if set(line.strip()) == {"─"})
    table = itertools.takewhile(str.strip, lines[start + 1 :])
    rows, name = {}, ""
    for line in table:
        words = line.split()
        if words[0] in ("dense", "DemP"):
            name = words.pop(0)
        rows.setdefault(name, []).extend(words)
    return rows


@pytest.mark.parametrize("task", DIGITS)
def test_numbers_in_the_table_are_those_of_the_runs(on_digits, task):
    _, record, printed = on_digits
    network = next(network for network in record["networks"] if network["task"] == task)
    rows = _rows(printed, task)
    for name in ("dense", "DemP"):
        runs, words = _of(network, name), rows[name]
        assert f"{statistics.fmean(run['evaluations'][-1]['accuracy'] for run in runs):.2f}" in words
        assert f"{statistics.fmean(run['parameters_left'] for run in runs):,.0f}" in words
        units = [
            f"{statistics.fmean(layer):.0f}" for layer in zip(*(run["units"].values() for run in runs), strict=True)
        ]
        assert " ".join(units) in " ".join(words)
        timings = [run["timing"] for run in runs]
        for key, digits in (
            ("first_tenth_ms_median", 2),
            ("last_tenth_ms_median", 2),
            ("training_seconds", 1),
            ("inference_ms_median", 2),
        ):
            assert f"{statistics.fmean(timing[key] for timing in timings):.{digits}f}" in words
    assert f"{network['settings']['rates']['dense']:g}" in rows["dense"]
    assert f"{LASSO[task]:g}" in rows["DemP"]


def test_what_is_said_of_the_gain_follows_from_the_record(on_digits):
    _, record, printed = on_digits
    said = " ".join(printed.split())
    for network in record["networks"]:
        pairs = list(zip(_of(network, "dense"), _of(network, "DemP"), strict=True))
        left = statistics.fmean(demp["parameters_left"] / dense["parameters_left"] for dense, demp in pairs)
        assert f"DemP: {left:.1%} of the parameters left, {1 / left:.1f} times fewer" in said
        spent = statistics.fmean(
            demp["timing"]["training_seconds"] / dense["timing"]["training_seconds"] for dense, demp in pairs
        )
        assert f"whole training {spent:.2f} x" in said
        verdict = next(item for item in network["comparisons"][0]["differences"] if item["metric"] == "accuracy")
        assert verdict["of"] == "DemP - dense"
        assert f"DemP - dense: test accuracy {verdict['mean']:+.2f} points" in said


def test_same_seed_same_numbers(on_digits, tmp_path, monkeypatch):
    _, record, _ = on_digits
    _small(monkeypatch)
    _, again, _ = _demo(tmp_path)

    def numbers(record):
        runs = [run for network in record["networks"] for run in network["runs"]]
        return [{key: value for key, value in run.items() if key != "timing"} for run in runs]

    assert numbers(again) == numbers(record)


def test_progress_goes_to_standard_error(tmp_path, monkeypatch, capsys):
    _small(monkeypatch)
    assert cli.main(["demo", "--method", "demp", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "2/2" in err
    assert "MLP, DemP" in err
    assert "2/2" not in out


def test_ctrl_c_keeps_what_there_is(tmp_path, monkeypatch):
    _small(monkeypatch)
    advance = progress.Bars.advance

    def interrupted(bars, index, made, loss, rate):
        advance(bars, index, made, loss, rate)
        if (index, made) == (1, 10):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.Bars, "advance", interrupted)
    code, record, printed = _demo(tmp_path)
    assert code == 130
    (network,) = record["networks"]  # the second was not begun
    assert [(run["optimizer"], run["finished"]) for run in network["runs"]] == [("dense", True), ("DemP", False)]
    assert (tmp_path / "digits.png").exists()
    assert "no seed was finished by both" in printed
    assert "Interrupted" in printed


def test_ctrl_c_before_the_first_step_still_leaves_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(progress.Bars, "__enter__", lambda bars: (signal.raise_signal(signal.SIGINT), bars)[1])
    code, record, _ = _demo(tmp_path)
    assert code == 130
    assert record["networks"][0]["runs"] == []
    assert (tmp_path / "digits.png").exists()


def test_a_diverged_network_is_shown_and_breaks_nothing(tmp_path, monkeypatch):
    _small(monkeypatch)
    monkeypatch.setattr(demo, "best_choice", lambda task, arm: Choice(1e30 if arm == "DemP" else 0.1, 0.02))
    code, record, printed = _demo(tmp_path, "--steps", "12")
    assert code == 0
    assert "diverged" in printed
    for network in record["networks"]:
        assert all(run["evaluations"][-1]["loss"] is None for run in _of(network, "DemP"))


def test_text_shrinks_a_transformer_and_leaves_all_but_its_hidden_units(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_HELD_OUT_WINDOWS", 16)
    small = functools.partial(shrinking.transformer, 1, 16, 4)
    monkeypatch.setattr(
        shrinking, "TRANSFORMER", dataclasses.replace(shrinking.TRANSFORMER, build=small, evaluations=1)
    )
    # No rate brings these scales to zero in so few steps; a tenth of them is there.
    monkeypatch.setattr(shrinking.NormedReLU.__init__, "__defaults__", (0.02,))
    monkeypatch.setattr(demo, "best_choice", lambda task, arm: Choice(8e-3, 0.05))
    code, record, printed = _demo(tmp_path, "--task", "text")
    assert code == 0
    (network,) = record["networks"]
    dense, demp = network["runs"]
    assert dense["units"] == {"blocks.0.up": 64}
    assert demp["units"].keys() == {"blocks.0.up"}
    lost = 64 - demp["units"]["blocks.0.up"]
    assert lost > 0
    assert dense["parameters_left"] - demp["parameters_left"] == lost * (2 * 16 + 3)
    assert "One seed" in printed or "one seed" in printed
    assert (tmp_path / "text.png").exists()


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (functools.partial(shrinking.convolutional, 4), torch.randn(6, 1, 8, 8)),
        (functools.partial(shrinking.perceptron, 8), torch.randn(6, 1, 8, 8)),
        (functools.partial(shrinking.transformer, 1, 16), torch.randint(256, (2, 128))),
    ],
    ids=["convolutional", "perceptron", "transformer"],
)
def test_every_unit_that_may_die_has_a_normalization_scale(build, inputs):
    model = build()
    norms = [module for module in model.modules() if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d))]
    masks = live_units(model, [inputs])
    assert [len(mask) for mask in masks.values()] == [norm.num_features for norm in norms]


def test_windows_are_of_training_inputs_and_leave_the_training_order_alone():
    task = find_task("digits-convolutional")
    data = task.load(CPU)
    windows = data.inputs(0)
    batches = data.batches(0)
    first = next(batches)[0]
    assert not torch.equal(next(windows), first)
    assert torch.equal(next(data.batches(0))[0], first)
    train = {image.numpy().tobytes() for image in data._images[data._train]}
    assert all(image.numpy().tobytes() in train for image in next(windows))


def test_a_dense_arm_trains_as_if_demp_were_not_there():
    task = dataclasses.replace(
        find_task("digits-convolutional"), build=functools.partial(shrinking.convolutional, 4), evaluations=1
    )
    data, runs = task.load(CPU), []
    for arm in select("demp", "digits")["demp"][0].arms:
        plan = Plan(task, arm, Choice(0.1, 0.0), 0, 6, CPU)
        still = dataclasses.replace(arm, shrinking=arm.shrinking and dataclasses.replace(arm.shrinking, noise_std=0.0))
        runs.append(train(dataclasses.replace(plan, arm=still), data, lambda *shown: None, lambda: False))
    dense, demp = runs
    assert demp.sizes[-1]["parameters"] == demp.parameters  # nothing died
    assert dense.loss == demp.loss


def _outcome(dense, demp):
    """An outcome of made-up runs: (seconds of a step, parameters left) each."""
    comparison = select("demp", "digits")["demp"][0]
    task = find_task(comparison.task)
    runs = []
    for arm, (milliseconds, left, accuracy) in zip(comparison.arms, (dense, demp), strict=True):
        run = Run(Plan(task, arm, Choice(0.1), 0, 2, CPU), parameters=100, loss=[1.0, 1.0])
        run.training_ms = [milliseconds] * 2
        run.inference_ms = [milliseconds / 3]
        run.evaluations = [{"step": 2, "accuracy": accuracy, "loss": 0.1}]
        run.sizes = [{"step": 2, "parameters": left, "units": {"0": 3}}]
        run.units = run.live = {"0": 3}
        runs.append(run)
    return Outcome(task, comparison, runs, False, 1.0, {}, {}, {})


def test_what_is_not_gained_is_said():
    (said, _) = shrinkage.gains(_outcome((10.0, 100, 99.0), (4.0, 25, 98.0)))
    assert "25.0% of the parameters left, 4.0 times fewer" in said
    assert "no gain" not in said
    assert "whole training 0.40 x" in said
    (said, _) = shrinkage.gains(_outcome((10.0, 100, 99.0), (10.5, 90, 98.0)))
    assert "whole training 1.05 x (no gain)" in said


def test_units_of_the_dense_network_that_never_act_are_counted():
    outcome = _outcome((10.0, 100, 99.0), (4.0, 25, 98.0))
    outcome.runs[0].live = {"0": 1}
    assert "2 never act" in shrinkage.gains(outcome)[-1]


def test_first_and_last_tenth():
    run = Run(Plan(find_task(DIGITS[0]), arms_on(DIGITS[0])[0], Choice(0.1), 0, 20, CPU))
    assert all(map(math.isnan, shrinkage.first_and_last_ms(run)))
    run.training_ms = [float(index) for index in range(20)]
    assert shrinkage.first_and_last_ms(run) == (0.5, 18.5)


def test_the_smallest_network_within_the_tolerance_is_chosen():
    accuracy = Metric("accuracy", "accuracy", "%", higher_is_better=True, digits=1)
    bits = Metric("bits", "bits", "bits", higher_is_better=False, digits=1)
    points = [
        {"rate": 1.0, "accuracy": [99.0, 98.9], "bits": [3.0], "parameters left": [0.5]},
        {"rate": 2.0, "accuracy": [98.7, 98.8], "bits": [3.1], "parameters left": [0.2]},
        {"rate": 3.0, "accuracy": [97.0, 97.1], "bits": [3.3], "parameters left": [0.1]},
        {"rate": 4.0, "accuracy": [99.0, None], "bits": [None], "parameters left": [0.1]},
    ]
    assert grid._best(points, accuracy, 98.7)["rate"] == 2.0
    assert grid._best(points, accuracy, 99.5)["rate"] == 1.0  # none is good enough: the best
    assert grid._best(points, bits, 3.1)["rate"] == 2.0
    assert grid._best(points, accuracy)["rate"] == 1.0


def test_the_grid_measures_demp_by_the_dense_network(tmp_path, monkeypatch, capsys):
    _small(monkeypatch)
    record = tmp_path / "rates.json"
    words = ["--task", "digits-mlp", "--seeds", "1", "--steps", "2", "--out", str(record)]
    with pytest.raises(SystemExit) as stopped:
        grid.main([*words, "--arm", "DemP"])
    assert stopped.value.code == 2
    assert "record dense first" in capsys.readouterr().err
    assert grid.main(words) == 0
    written = json.loads(record.read_text())["digits-mlp"]
    best = max(statistics.fmean(point["accuracy"]) for point in written["dense"]["grid"])
    entry = written["DemP"]
    assert entry["limit"] == pytest.approx(best - find_task("digits-mlp").tolerance, abs=1e-4)
    assert all(len(point["parameters left"]) == 1 for point in entry["grid"])
    assert len({point["settings"] for point in entry["variations"]}) == len(entry["variations"]) == 6
    assert re.search(r"DemP: best rate .*, lasso ", capsys.readouterr().out)
