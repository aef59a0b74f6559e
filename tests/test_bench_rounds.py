"""The arithmetic of a benchmark's rounds: ratios, disturbed rounds, order, repeated steps. Nothing here is timed."""

import itertools

from torsion.cli.bench.timing import Percentiles, interleave, stopwatch


def test_percentiles_interpolate():
    assert Percentiles.of([4.0, 1.0, 3.0, 2.0, 5.0, 6.0]) == Percentiles(2.0, 3.5, 5.0)
    assert Percentiles.of([7.0]) == Percentiles(7.0, 7.0, 7.0)


def test_ratios_are_taken_round_by_round_against_the_fastest_baseline():
    series = {"slow": itertools.cycle([3.0]), "fast": iter([1.0, 2.0, 1.0, 1.0]), "ours": iter([2.0, 2.0, 4.0, 3.0])}
    rounds = interleave(
        {k: lambda k=k: next(series[k]) for k in series}, ["slow", "fast"], rounds=3, refresh=lambda _: None
    )
    assert (rounds.baseline, rounds.kept, rounds.dropped) == ("fast", 3, 1)  # 2.0 is twice the median: disturbed
    assert rounds.ratio("ours").p50 == 3.0


def test_disturbed_rounds_are_dropped_counted_and_replaced():
    baseline, seen = itertools.chain([1.0, 9.0, 1.0], itertools.repeat(1.0)), []
    rounds = interleave({"b": lambda: next(baseline), "c": lambda: 2.0}, ["b"], rounds=4, refresh=seen.append)
    assert (rounds.kept, rounds.dropped, seen) == (4, 1, [0, 1, 2, 3, 4])
    assert rounds.ratio("c") == Percentiles(2.0, 2.0, 2.0)


def test_the_order_changes_between_rounds():
    order = []
    members = {k: lambda k=k: order.append(k) or 1.0 for k in "abc"}
    interleave(members, ["a"], rounds=8, refresh=lambda _: None)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(r) == list("abc") for r in rounds)
    assert len(set(rounds)) > 2


def test_short_steps_are_repeated_unless_something_precedes_each():
    calls = []
    now = itertools.count()
    stopwatch(lambda: calls.append("step"), lambda: next(now) * 1e-3)()
    assert len(calls) == 3 + 5  # three to warm up, then five of 1 ms for 5 ms
    calls.clear()
    stopwatch(lambda: calls.append("step"), lambda: next(now) * 1e-3, prepare=lambda: calls.append("prepare"))()
    assert calls == ["prepare", "step"] * 4
