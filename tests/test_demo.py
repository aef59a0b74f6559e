"""`torsion demo`: what it writes, that a seed fixes every number, that Ctrl-C keeps what there is."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import signal

import pytest
import torch

from torsion.cli import main
from torsion.cli.demo import comparison, digits, grid, progress, rates, shrinking, text
from torsion.cli.demo.arms import Choice, Strength
from torsion.cli.demo.registry import METHODS, arms_on, select
from torsion.cli.demo.tasks import UNDER_WEIGHT_NOISE, Metric, find_task, task_names
from torsion.cli.demo.training import Plan, Run, rate_factor
from torsion.cli.demo.weight_noise import DRAWS, under_weight_noise

STEPS = 3


def _demo(out, *more):
    code = main(["demo", "--steps", str(STEPS), "--threads", "1", "--device", "cpu", "--out", str(out), *more])
    return code, json.loads((out / "results.json").read_text())


def _numbers(record):
    """Everything but times, which no seed fixes."""
    runs = [run for part in record.get("networks", [record]) for run in part["runs"]]
    return [{key: value for key, value in run.items() if key != "timing"} for run in runs]


@pytest.fixture(scope="module")
def tam_on_digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    code, record = _demo(out)
    assert code == 0
    return out, record


def test_digits_writes_results_and_figure(tam_on_digits):
    out, record = tam_on_digits
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


def test_arms_start_alike_and_see_the_same_data(tam_on_digits):
    _, record = tam_on_digits
    for seed in record["settings"]["seeds"]:
        first = [run["loss"][0] for run in record["runs"] if run["seed"] == seed]
        assert len(first) == 2
        assert first[0] == first[1]


def test_same_seed_same_numbers_and_results_on_standard_output(tam_on_digits, tmp_path, capsys):
    _, record = tam_on_digits
    code, again = _demo(tmp_path)
    out, err = capsys.readouterr()
    assert code == 0
    assert _numbers(again) == _numbers(record)
    assert "test accuracy" in out.replace("\n", " ")
    assert "TAM - SGD" in out
    assert "results.json" in out
    assert f"{STEPS}/{STEPS}" in err  # the progress bars, and nowhere else
    assert f"{STEPS}/{STEPS}" not in out


def test_another_seed_gives_other_numbers(tam_on_digits, tmp_path):
    _, record = tam_on_digits
    _, other = _demo(tmp_path, "--seed", "7")
    assert other["settings"]["seeds"] == [7, 8, 9, 10, 11]
    assert other["runs"][0]["loss"] != record["runs"][0]["loss"]


def _smaller(monkeypatch, seeds):
    monkeypatch.setattr(digits, "DIGITS", dataclasses.replace(digits.DIGITS, seeds=seeds, evaluations=1))
    small = dataclasses.replace(digits.WRONG_LABELS, seeds=seeds, evaluations=1, weight_noise=(0.0, 0.3))
    monkeypatch.setattr(digits, "WRONG_LABELS", small)
    for name, build in (("CONVOLUTIONAL", shrinking.convolutional), ("PERCEPTRON", shrinking.perceptron)):
        task = dataclasses.replace(
            getattr(shrinking, name), build=functools.partial(build, 8), seeds=seeds, evaluations=1
        )
        monkeypatch.setattr(shrinking, name, task)


def test_all_runs_every_method_into_a_directory_of_its_own(tmp_path, monkeypatch):
    _smaller(monkeypatch, seeds=1)
    words = ["--steps", "1", "--threads", "1", "--device", "cpu", "--out", str(tmp_path), "--method", "all"]
    assert main(["demo", *words]) == 0
    for method, optimizers in (("tam", 2), ("lookbehind", 5)):
        record = json.loads((tmp_path / method / "results.json").read_text())
        assert record["settings"]["method"] == method
        assert len(record["runs"]) == optimizers
        assert (tmp_path / method / "digits.png").exists()
    record = json.loads((tmp_path / "demp" / "results.json").read_text())
    assert [len(network["runs"]) for network in record["networks"]] == [2, 2]
    assert (tmp_path / "demp" / "digits.png").exists()


@pytest.fixture(scope="module")
def lookbehind_on_digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("lookbehind")
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(io.StringIO()) as printed:
        _smaller(monkeypatch, seeds=2)
        code, record = _demo(out, "--method", "lookbehind")
    assert code == 0
    return out, record, printed.getvalue()


def test_lookbehind_sam_and_sgd_are_compared_over_equal_epochs_and_gradients(lookbehind_on_digits):
    out, record, printed = lookbehind_on_digits
    for name in ("digits.png", "digits-weight-noise.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert name in printed.replace("\n", "")
    first, second = record["comparisons"]
    assert (first["equal"], first["optimizers"]) == ("epochs", ["SGD", "SAM", "Lookbehind"])
    assert (second["equal"], second["optimizers"]) == ("gradient evaluations", ["SGD 3x", "SAM 1.5x", "Lookbehind"])
    assert "equal epochs" in printed
    assert "equal gradient evaluations" in printed
    spent = {run["optimizer"]: (run["steps"], run["gradients"]) for run in record["runs"]}
    assert spent == {"SGD": (3, 3), "SAM": (3, 6), "Lookbehind": (3, 9), "SGD 3x": (9, 9), "SAM 1.5x": (4, 8)}
    assert len(record["runs"]) == 10  # Lookbehind is in both comparisons and trained once
    pairs = [(item["of"], item["metric"]) for block in record["comparisons"] for item in block["differences"]]
    assert len(pairs) == len(set(pairs)) == 2 * 3 * 4
    assert ("Lookbehind - SAM", "accuracy") in pairs
    assert ("Lookbehind - SGD 3x", UNDER_WEIGHT_NOISE) in pairs
    for seed in record["settings"]["seeds"]:
        assert len({run["loss"][0] for run in record["runs"] if run["seed"] == seed}) == 1


def test_weight_noise_is_in_the_record_with_every_draw(lookbehind_on_digits):
    _, record, _ = lookbehind_on_digits
    for run in record["runs"]:
        last, noise = run["evaluations"][-1], run["weight_noise"]
        assert list(noise) == ["0.0", "0.3"]
        assert noise["0.0"] == [last["accuracy"]] * DRAWS  # measured after the noise of earlier levels: it left nothing
        assert last[UNDER_WEIGHT_NOISE] == pytest.approx(sum(noise["0.0"] + noise["0.3"]) / (2 * DRAWS))


def test_ctrl_c_in_a_comparison_of_two_blocks(tmp_path, monkeypatch, capsys):
    _smaller(monkeypatch, seeds=1)
    advance = progress.Bars.advance

    def interrupted(bars, index, made, loss, rate):
        advance(bars, index, made, loss, rate)
        if (index, made) == (1, 10):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.Bars, "advance", interrupted)
    code, record = _demo(tmp_path, "--method", "lookbehind", "--steps", "15")
    assert code == 130
    assert [(run["optimizer"], run["finished"], bool(run["weight_noise"])) for run in record["runs"]] == [
        ("SGD", True, True),
        ("SAM", False, False),
    ]
    assert [item["verdict"] for item in record["comparisons"][0]["differences"]] == ["not finished"] * 4
    assert (tmp_path / "digits-weight-noise.png").exists()
    assert "Interrupted" in capsys.readouterr().out


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


def test_lookbehind_on_text_says_what_one_seed_is_worth(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text, "_HELD_OUT_WINDOWS", 16)
    code, record = _demo(tmp_path, "--task", "text", "--method", "lookbehind", "--steps", "2")
    assert code == 0
    spent = {run["optimizer"]: (run["steps"], run["gradients"]) for run in record["runs"]}
    assert spent == {"AdamW": (2, 2), "Lookbehind(AdamW)": (2, 6), "AdamW 3x": (6, 6)}
    assert (tmp_path / "text.png").exists()
    assert not (tmp_path / "text-weight-noise.png").exists()
    assert "One seed. validation bits per byte: Seeds alone differ by about" in capsys.readouterr().out


def test_a_fifth_of_the_training_labels_is_wrong_and_none_of_the_others():
    plain, wrong = (find_task(name).load(torch.device("cpu")) for name in ("digits", "digits-wrong-labels"))

    def first_epoch(data, seed):
        batches = list(itertools.islice(data.batches(seed), data.facts["training examples"] // data.facts["batch"]))
        return tuple(map(torch.cat, zip(*batches, strict=True)))

    images, right = first_epoch(plain, 3)
    same_images, given = first_epoch(wrong, 3)
    assert torch.equal(images, same_images)
    assert (given != right).double().mean().item() == pytest.approx(0.2, abs=2 / len(right))  # two images are dropped
    assert ((given - right)[given != right] % 10).unique().tolist() == list(range(1, 10))  # every other class occurs
    assert torch.equal(given, first_epoch(wrong, 3)[1])
    assert not torch.equal(given != right, first_epoch(wrong, 4)[1] != first_epoch(plain, 4)[1])
    perfect = torch.nn.Module()  # knows the right answers, so it has learned no wrong one
    perfect.forward = lambda x: torch.eye(10)[[known[key.numpy().tobytes()] for key in x]]
    known = {image.numpy().tobytes(): label for image, label in zip(plain._images, plain._labels.tolist(), strict=True)}
    assert wrong.evaluate(perfect, 3)["accuracy"] == 100
    assert wrong.evaluate(perfect, 3)["wrong labels learned"] == 0


def test_weight_noise_is_relative_to_each_tensor_and_leaves_the_weights_as_they_were():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300))
    with torch.no_grad():
        model[0].weight.mul_(7.0)
    before = [value.clone() for value in model.state_dict().values()]
    weight = model[0].weight.detach().clone()
    seen = []

    def measure():
        seen.append((model[0].weight.detach() - weight) / weight.square().mean().sqrt())
        return float(len(seen))

    values = under_weight_noise(model, (0.1, 0.2), 5, measure)
    assert list(values) == [0.1, 0.2]
    assert sorted(values[0.1] + values[0.2]) == [float(index + 1) for index in range(2 * DRAWS)]
    for index, moved in enumerate(seen):
        assert moved.std().item() == pytest.approx((0.1, 0.2)[index % 2], rel=0.02)
        assert abs(moved.mean().item()) < 0.002
    torch.testing.assert_close(seen[1], 2 * seen[0], rtol=1e-4, atol=1e-5)  # the same draw at both levels
    assert not torch.allclose(seen[2], seen[0], atol=0.1)
    again = list(seen)
    seen.clear()
    under_weight_noise(model, (0.1, 0.2), 5, measure)
    assert all(torch.equal(first, second) for first, second in zip(again, seen, strict=True))

    def broken():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        under_weight_noise(model, (0.1,), 5, broken)
    assert all(torch.equal(first, second) for first, second in zip(before, model.state_dict().values(), strict=True))


def test_text_files_are_taken_in_an_order_that_depends_on_names_alone(tmp_path):
    for name in ("b.py", "a.py", "package/c.py", "test/left_out.py", "package/notes.txt", "site-packages/other.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    names = [path.relative_to(tmp_path).as_posix() for path in text.standard_library_files(tmp_path)]
    assert sorted(names) == ["a.py", "b.py", "package/c.py"]
    assert names == [path.relative_to(tmp_path).as_posix() for path in text.standard_library_files(tmp_path)]


@pytest.mark.parametrize("task", task_names(variants=True))
def test_every_arm_has_a_recorded_best_point_inside_its_grid(task):
    metric = find_task(task).chosen_by
    for arm in arms_on(task):
        entry = rates.load_record()[task][arm.name]
        assert entry["settings"] == arm.settings, "settings changed: record the grid anew"
        assert entry["steps"] == arm.steps(find_task(task).steps)
        assert entry.get("strength") == (arm.strength.name if arm.strength else None)
        best = rates.best_choice(task, arm.name)
        assert rates.choice_of(grid._best(entry["grid"], metric, entry.get("limit"))) == best
        assert ("limit" in entry) == (arm.shrinking is not None)
        points = [rates.choice_of(point) for point in entry["grid"]]
        assert min(point.rate for point in points) < best.rate < max(point.rate for point in points)
        if arm.strength:
            assert min(point.strength for point in points) < best.strength < max(point.strength for point in points)


def test_the_grid_grows_along_both_settings_until_the_best_is_inside(monkeypatch):
    monkeypatch.setattr(
        grid,
        "_measure",
        lambda plan, folds: {
            "rate": plan.choice.rate,
            "strength": plan.choice.strength,
            "accuracy": [90 - abs(math.log2(plan.choice.rate / 0.8)) - abs(math.log2(plan.choice.strength / 0.05))],
        },
    )
    arm = next(arm for arm in arms_on("digits-wrong-labels") if arm.name == "SAM")
    # The best point, 0.8 and 0.05, lies outside.
    arm = dataclasses.replace(arm, rates=(0.05, 0.1, 0.2, 0.4), strength=Strength("rho", (0.1, 0.2, 0.4)))
    plan = Plan(find_task("digits-wrong-labels"), arm, Choice(0.1), 0, 1, torch.device("cpu"))
    points = grid._search(plan, [])
    assert rates.choice_of(grid._best(points, plan.task.chosen_by)) == Choice(0.8, 0.05)
    assert {point["rate"] for point in points} == {0.05, 0.1, 0.2, 0.4, 0.8, 1.6}
    assert {point["strength"] for point in points} == {0.025, 0.05, 0.1, 0.2, 0.4}
    assert len(points) == 6 * 5


def test_a_diverged_point_cannot_win():
    accuracy = Metric("accuracy", "accuracy", "%", higher_is_better=True, digits=1)
    points = [{"rate": 1.0, "accuracy": [99.0, None]}, {"rate": 2.0, "accuracy": [50.0, 51.0]}]
    assert grid._best(points, accuracy)["rate"] == 2.0


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
    arm = next(arm for arm in select("tam", "digits")["tam"][0].arms if arm.name == name)
    plan = Plan(find_task("digits"), arm, Choice(0.1), 0, 1, torch.device("cpu"))
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
    difference = comparison.Difference(_runs("SGD", [99.0, 98.95, 99.05]), _runs("TAM", tam), metric)
    assert verdict in difference.sentence()
    assert difference.verdict in difference.sentence()


def test_a_diverged_run_is_shown_and_breaks_nothing():
    assert comparison.summarize([math.nan, 1.0]).show(2) == "nan"
    assert comparison.summarize([1.0, 3.0]).show(1) == "2.0 ± 1.4"
    assert comparison.summarize([]).show(2) == "-"


def test_smoothing_has_no_lag_and_keeps_the_length():
    assert comparison.smoothed([1.0, 2.0, 3.0, 4.0, 5.0], 3) == pytest.approx([1.5, 2.0, 3.0, 4.0, 4.5])
    assert comparison.smoothed([0.0, 3.0, 0.0], 1) == pytest.approx([0.0, 3.0, 0.0])
    assert comparison.smoothed([], 3) == []


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("method", "task"), [(name, task) for name, entry in METHODS.items() for task in entry.comparisons]
)
def test_same_seed_same_numbers_on_a_gpu(tmp_path, monkeypatch, method, task):
    _smaller(monkeypatch, seeds=1)
    words = ("--method", method, "--task", task, "--device", "cuda")
    first, second = (_demo(tmp_path / name, *words)[1] for name in "ab")
    assert first["environment"]["device"].startswith("cuda")
    assert _numbers(first) == _numbers(second)
