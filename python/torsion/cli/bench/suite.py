"""Runs the comparisons on a list and turns rounds into figures."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from torsion.cli.bench import cuda
from torsion.cli.bench.comparisons import COMPARISONS, COPY_SHARE, Comparison
from torsion.cli.bench.contestants import CONTESTANTS, COPY, Contestant, copied_bytes, copy_of
from torsion.cli.bench.figures import Figure, Place
from torsion.cli.bench.gate import check
from torsion.cli.bench.lists import TensorList
from torsion.cli.bench.problem import Gradients, attach, initial
from torsion.cli.bench.timing import Rounds, Sampler, Turn, clock_of, interleave, stopwatch

__all__ = ["LR", "prepare", "run_list"]

LR = 1e-7
"""So small that parameters stay where they are over any number of rounds."""

Progress = Callable[[str], AbstractContextManager[None]]


def prepare(contestant: Contestant, tensors: TensorList, gradients: Gradients, place: Place) -> tuple[Turn, Sampler]:
    """Build a contestant on CPU tensors of its own; return its step, and its sampler, warm."""
    params = initial(tensors, place.device)
    attach(params, gradients.live)
    sets = (gradients.spare, gradients.live) if contestant.new_gradients else (gradients.live,)
    clock = clock_of(place.threads)[1]
    turn = Turn(contestant.build(params, LR), gradients.backward(params, *sets), clock)
    places = itertools.cycle(sets)
    move = (lambda: attach(params, next(places))) if contestant.new_gradients else None
    return turn, stopwatch(turn, turn.clock, move)


def run_list(tensors: TensorList, methods: Sequence[str], place: Place, progress: Progress) -> Iterator[Figure]:
    """Every comparison asked for, on one list.

    Raises:
        GateError: a contestant computes something else than it should.
    """
    kind = place.device.type
    asked = [c for c in COMPARISONS if c.method in methods and c.device in ("", kind)]
    able = {c: [name for name in c.contestants if not CONTESTANTS[name].obstacle(tensors.name, kind)] for c in asked}
    gradients = Gradients(tensors, place.device)
    with progress(f"{tensors.name}: checking every contestant against float64"):
        names = (name for c in asked if able[c] for name in (*c.baselines, *able[c]))
        check((CONTESTANTS[name] for name in names), tensors, gradients, place.device)
    for comparison in asked:
        for name in comparison.contestants:
            if name not in able[comparison]:
                yield _absent(name, comparison, tensors, place)
        if able[comparison]:
            yield from _compare(comparison, able[comparison], tensors, gradients, place, progress)
        gc.collect()


def _absent(name: str, comparison: Comparison, tensors: TensorList, place: Place) -> Figure:
    why = CONTESTANTS[name].obstacle(tensors.name, place.device.type)
    limit = comparison.limit(name, tensors.name, place.threads, place.device.type)
    return Figure.at(place, name, tensors.name, "x", limit, against=comparison.baselines[0], note=f"not run: {why}")


def _compare(
    comparison: Comparison,
    able: Sequence[str],
    tensors: TensorList,
    gradients: Gradients,
    place: Place,
    progress: Progress,
) -> Iterator[Figure]:
    members = [CONTESTANTS[name] for name in (*comparison.baselines, *able)]
    with progress(f"{tensors.name}: timing {'; '.join(member.name for member in members)}"):
        if place.device.type == "cuda":
            rounds, turns = cuda.measure(members, comparison.baselines, tensors, place, LR)
        else:
            prepared = {member.name: prepare(member, tensors, gradients, place) for member in members}
            turns = {name: turn for name, (turn, _) in prepared.items()}
            samplers = {name: sampler for name, (_, sampler) in prepared.items()}
            samplers[COPY] = stopwatch(copy_of(tensors.numel, place.device), clock_of(place.threads)[1])
            budget = min(member.seconds for member in members)
            rounds = interleave(samplers, comparison.baselines, place.rounds, gradients.refresh, budget)
    shown = [] if any(rounds.baseline in other.contestants for other in COMPARISONS) else [rounds.baseline]
    for name in (*shown, *able):
        figure = _ratio(rounds, name, turns[name].evaluations, comparison, tensors, place)
        yield figure
        if place.device.type == "cuda" and name in COPY_SHARE:
            share, limit = figure.copy_percent, COPY_SHARE[name]
            yield Figure.at(place, f"{name}: bandwidth against copy", tensors.name, "%", limit, value=share)


def _ratio(
    rounds: Rounds, name: str, evaluations: int, comparison: Comparison, tensors: TensorList, place: Place
) -> Figure:
    ratio, took = rounds.ratio(name), rounds.of(name).p50
    per_element = CONTESTANTS[name].bytes_per_element
    rate = None if per_element is None else per_element * tensors.numel / took
    copy_rate = copied_bytes(place.device) * tensors.numel / rounds.of(COPY).p50
    return Figure.at(
        place,
        name,
        tensors.name,
        "x",
        comparison.limit(name, tensors.name, place.threads, place.device.type),
        value=ratio.p50,
        against=rounds.baseline,
        clock="CUDA events" if place.device.type == "cuda" else clock_of(place.threads)[0],
        p20=ratio.p20,
        p80=ratio.p80,
        seconds=took,
        baseline_seconds=rounds.of(rounds.baseline).p50,
        bytes_per_element=per_element,
        evaluations=evaluations or None,
        gigabytes_per_second=None if rate is None else rate / 1e9,
        copy_percent=None if rate is None else 100 * rate / copy_rate,
        rounds=rounds.kept,
        dropped=rounds.dropped,
        note=CONTESTANTS[name].note,
    )
