"""`torsion demo`: what it writes, that a seed fixes every number, that Ctrl-C keeps what there is."""

import dataclasses
import itertools
import json
import math
import signal

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from torsion.cli import main
from torsion.cli.demo import comparison, grid, progress, rates, text
from torsion.cli.demo.registry import METHODS
from torsion.cli.demo.tasks import find_task, task_names
from torsion.cli.demo.training import Plan, Run, rate_factor

STEPS = 3


def _demo(out, *more):
    code = main(["demo", "--steps", str(STEPS), "--threads", "1", "--device", "cpu", "--out", str(out), *more])
    return code, json.loads((out / "results.json").read_text())


def _numbers(record):
    """Everything but times, which no seed fixes."""
    return [{key: value for key, value in run.items() if key != "timing"} for run in record["runs"]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    code, record = _demo(out)
    assert code == 0
    return out, record


def test_digits_writes_results_and_figure(digits):
    out, record = digits
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert record["interrupted"] is False
    assert {"torch", "torsion", "python", "device", "threads", "back ends"} <= record["environment"].keys()
    assert record["settings"]["seeds"] == [0, 1, 2, 3, 4]
    assert len(record["runs"]) == 10
    for run in record["runs"]:
        assert run["finished"]
        assert len(run["loss"]) == STEPS
        assert run["rate"] == record["settings"]["rates"][run["optimizer"]]
        assert run["evaluations"][-1]["step"] == STEPS
        assert 0 <= run["evaluations"][-1]["accuracy"] <= 100
        assert run["timing"]["optimizer_ms_median"] < run["timing"]["training_ms_median"]
    tam = [run for run in record["runs"] if run["optimizer"] == "TAM"]
    assert all(len(run["damping"]) == len(run["cosine"]) == STEPS for run in tam)
    assert all(0 <= value <= 1 for run in tam for value in run["damping"])
    assert all(run["skipped_steps"] == 0 for run in tam)


def test_arms_start_alike_and_see_the_same_data(digits):
    _, record = digits
    for seed in record["settings"]["seeds"]:
        first = [run["loss"][0] for run in record["runs"] if run["seed"] == seed]
        assert len(first) == 2
        assert first[0] == first[1]


def test_same_seed_same_numbers_and_results_on_standard_output(digits, tmp_path, capsys):
    _, record = digits
    code, again = _demo(tmp_path)
    out, err = capsys.readouterr()
    assert code == 0
    assert _numbers(again) == _numbers(record)
    assert "test accuracy" in out.replace("\n", " ")
    assert "TAM - SGD" in out
    assert "results.json" in out
    assert f"{STEPS}/{STEPS}" in err  # the progress bars, and nowhere else
    assert f"{STEPS}/{STEPS}" not in out


def test_another_seed_gives_other_numbers_and_all_means_every_method(digits, tmp_path):
    _, record = digits
    _, other = _demo(tmp_path, "--seed", "7", "--method", "all")
    assert other["settings"]["seeds"] == [7, 8, 9, 10, 11]
    assert other["runs"][0]["loss"] != record["runs"][0]["loss"]


def test_ctrl_c_keeps_what_there_is(tmp_path, monkeypatch, capsys):
    advance = progress.Bars.advance

    def interrupted(bars, index, made, loss, rate):
        advance(bars, index, made, loss, rate)
        if (index, made) == (1, 10):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.Bars, "advance", interrupted)
    before = signal.getsignal(signal.SIGINT)
    code, record = _demo(tmp_path, "--steps", "15")
    assert code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert record["interrupted"] is True
    assert [(run["optimizer"], run["finished"], run["steps"]) for run in record["runs"]] == [
        ("SGD", True, 15),
        ("TAM", False, 11),  # asked for after step 10: the step that follows is finished first
    ]
    assert record["runs"][1]["evaluations"][-1]["step"] == 11
    assert (tmp_path / "digits.png").exists()
    assert "Interrupted" in capsys.readouterr().out


def test_ctrl_c_before_the_first_step_still_leaves_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(progress.Bars, "__enter__", lambda bars: (signal.raise_signal(signal.SIGINT), bars)[1])
    code, record = _demo(tmp_path)
    assert code == 130
    assert record["interrupted"] is True
    assert record["runs"] == []
    assert (tmp_path / "digits.png").exists()


def test_text_trains_a_gpt_on_the_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_HELD_OUT_WINDOWS", 16)
    code, record = _demo(tmp_path, "--task", "text")
    assert code == 0
    assert [run["optimizer"] for run in record["runs"]] == ["AdamW", "AdaTAMW"]
    assert all(1_000_000 <= run["parameters"] <= 3_000_000 for run in record["runs"])
    assert all(6 < run["evaluations"][-1]["bits per byte"] < 9 for run in record["runs"])  # untrained is 8
    assert (tmp_path / "text.png").exists()


def test_text_files_are_taken_in_an_order_that_depends_on_names_alone(tmp_path):
    for name in ("b.py", "a.py", "package/c.py", "test/left_out.py", "package/notes.txt", "site-packages/other.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    names = [path.relative_to(tmp_path).as_posix() for path in text.standard_library_files(tmp_path)]
    assert sorted(names) == ["a.py", "b.py", "package/c.py"]
    assert names == [path.relative_to(tmp_path).as_posix() for path in text.standard_library_files(tmp_path)]


@pytest.mark.parametrize("task", task_names())
def test_every_arm_has_a_recorded_best_rate_inside_its_grid(task):
    for method in METHODS.values():
        for arm in method.arms.get(task, ()):
            entry = rates.load_record()[task][arm.name]
            assert entry["settings"] == arm.settings, "settings changed: record the grid anew"
            assert entry["steps"] == find_task(task).steps
            points = dict(rates.grid_points(task, arm.name))
            best = rates.best_rate(task, arm.name)
            assert points[best] == min(points.values())
            assert min(points) < best < max(points)


def test_the_grid_is_recorded_per_arm_and_keeps_the_others(tmp_path, capsys):
    record = tmp_path / "rates.json"
    record.write_text(json.dumps({"text": {"AdamW": {"best": 1.0, "grid": []}}}))
    words = ["--task", "digits", "--arm", "TAM", "--seeds", "1", "--steps", "1", "--out", str(record)]
    assert grid.main(words) == 0
    written = json.loads(record.read_text())
    assert written["text"]["AdamW"]["best"] == 1.0
    entry = written["digits"]["TAM"]
    assert entry["best"] in [point["rate"] for point in entry["grid"]]
    assert all(len(point["loss"]) == 1 for point in entry["grid"])
    assert "best rate" in capsys.readouterr().out


def test_schedule_warms_up_and_ends_at_zero():
    factors = [rate_factor(step, 100, warmup=10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert all(later <= sooner for sooner, later in itertools.pairwise(factors[10:]))
    assert factors[100] == pytest.approx(0.0, abs=1e-12)
    assert rate_factor(0, 1, warmup=10) == 1.0  # a run too short to warm up trains all the same


def _runs(name, values):
    arm = next(arm for arm in METHODS["tam"].arms["digits"] if arm.name == name)
    plan = Plan(find_task("digits"), arm, 0.1, 0, 1, torch.device("cpu"))
    return [
        Run(dataclasses.replace(plan, seed=seed), loss=[1.0], evaluations=[{"step": 1, "accuracy": value}])
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("tam", "verdict"),
    [
        ([99.1, 98.9, 99.0], "within noise"),
        ([99.5, 99.4, 99.6], "better by more than the noise"),
        ([98.5, 98.4, 98.6], "worse by more than the noise"),
        ([math.nan, 99.0, 99.0], "diverged"),
        ([99.5], "one seed"),
    ],
)
def test_the_verdict_says_when_a_difference_is_noise(tam, verdict):
    metric = find_task("digits").metrics[0]
    assert verdict in comparison.compare(_runs("SGD", [99.0, 98.95, 99.05]), _runs("TAM", tam), metric)


def test_a_diverged_run_is_shown_and_breaks_nothing():
    assert comparison.summarize([math.nan, 1.0]).show(2) == "nan"
    assert comparison.summarize([1.0, 3.0]).show(1) == "2.0 ± 1.4"
    assert comparison.summarize([]).show(2) == "-"


def test_smoothing_has_no_lag_and_keeps_the_length():
    assert comparison.smoothed([1.0, 2.0, 3.0, 4.0, 5.0], 3) == pytest.approx([1.5, 2.0, 3.0, 4.0, 4.5])
    assert comparison.smoothed([0.0, 3.0, 0.0], 1) == pytest.approx([0.0, 3.0, 0.0])
    assert comparison.smoothed([], 3) == []


@pytest.mark.cuda
@pytest.mark.parametrize("task", task_names())
def test_same_seed_same_numbers_on_a_gpu(tmp_path, task):
    first, second = (_demo(tmp_path / name, "--task", task, "--device", "cuda")[1] for name in "ab")
    assert first["environment"]["device"].startswith("cuda")
    assert _numbers(first) == _numbers(second)
