"""The schedule of lasso and noise: the golden table, what it is between its points, on the device, bad arguments."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tolerances import GOLDEN, close

from torsion.prune import schedule
from torsion.prune._schedule import Schedule

_FILE = json.loads((Path(__file__).parent / "golden" / "demp.json").read_text())
CASES = [case for case in _FILE["cases"] if case["op"] == "one_cycle"]
ROW = GOLDEN[torch.float64]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_golden(case):
    s = schedule("one_cycle", case["inputs"]["span"])
    for t, expected in case["expected"].items():
        close(torch.tensor(s(int(t)), dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), ROW, t)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_golden_on_the_device(case):
    s = Schedule("one_cycle", case["inputs"]["span"])
    for t, expected in case["expected"].items():
        found = s.on_device(torch.tensor(int(t)))
        assert found.dtype == torch.float64
        assert found.shape == ()
        # The last steps of the fall are differences of numbers near 1/2, which an ulp of the cosine moves.
        assert found.item() == pytest.approx(expected, rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("span", [1, 2, 3, 4, 7, 10, 11, 100, 977])
def test_every_step_is_the_same_on_the_device(span):
    s = Schedule("one_cycle", span)
    for t in range(span + 3):
        assert s.on_device(torch.tensor(t)).item() == pytest.approx(s.at(t), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("span", [1, 2, 3, 4, 7, 10, 1000])
def test_rises_to_one_and_falls(span):
    s = schedule("one_cycle", span)
    values = [s(t) for t in range(span)]
    peak = 3 * span // 10
    assert values[peak] == 1.0
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert all(isinstance(v, float) for v in values)


def test_the_last_value_is_held():
    s = schedule("one_cycle", 50)
    assert s(50) == s(51) == s(10**9) == pytest.approx(4e-6, rel=1e-12)
    assert s(49) > s(50) > 0


def test_the_sum_of_squares_that_sets_the_random_walk():
    s = schedule("one_cycle", 85_000)
    total = math.fsum(s(t) ** 2 for t in range(85_000))
    assert total / 85_000 == pytest.approx(0.378, abs=5e-4)
    assert 5e-5 * math.sqrt(total) == pytest.approx(9.0e-3, rel=5e-3)


def test_constant_ignores_the_span():
    s = schedule("constant", 10)
    assert [s(t) for t in (0, 5, 10, 1000)] == [1.0] * 4
    assert Schedule("constant", 10).on_device(torch.tensor(3)).item() == 1.0


@pytest.mark.parametrize("t", [-1, -0.5, math.nan])
def test_negative_steps_are_refused(t):
    for name in ("one_cycle", "constant"):
        with pytest.raises(ValueError, match=r"t=.*>= 0"):
            schedule(name, 10)(t)


@pytest.mark.parametrize(
    ("name", "steps", "error", "says"),
    [
        ("cosine", 10, ValueError, "'one_cycle', 'constant'"),
        ("One_Cycle", 10, ValueError, "'one_cycle'"),
        (None, 10, TypeError, "'one_cycle'"),
        ("one_cycle", 0, ValueError, "total_steps=0"),
        ("constant", 0, ValueError, "total_steps=0"),
        ("one_cycle", -5, ValueError, "total_steps=-5"),
        ("one_cycle", 2**32, ValueError, "total_steps="),
        ("one_cycle", 10.0, TypeError, "total_steps=10.0"),
        ("one_cycle", True, TypeError, "total_steps=True"),
        ("one_cycle", None, TypeError, "total_steps=None"),
    ],
)
def test_bad_arguments(name, steps, error, says):
    with pytest.raises(error, match=says):
        schedule(name, steps)
