"""The pytest-benchmark view of ``torsion bench``: the same tensors, contestants, gate and limits on nothing.

python -m pytest benchmarks                          # everything; minutes
python -m pytest benchmarks -k "resnet18 and TAM"    # what is being worked on
"""

from __future__ import annotations

import functools
import os
import re
import time

import pytest
import torch

from torsion.cli.bench.comparisons import COMPARISONS, METHODS
from torsion.cli.bench.contestants import CONTESTANTS, Contestant, copied_bytes, copy_of
from torsion.cli.bench.gate import check
from torsion.cli.bench.lists import LISTS, TensorList
from torsion.cli.bench.problem import Gradients, attach, initial
from torsion.cli.bench.suite import LR
from torsion.cli.bench.timing import Turn

__all__ = ["Bench", "names_of"]

ROUNDS = 20

_watched: list[Turn] = []  # whose gradients are off the clock


def working_time() -> float:
    """Seconds, without the time that the contestant of the moment waited for gradients."""
    return _watched[0].clock() if _watched else time.perf_counter()


def names_of(method: str) -> list[str]:
    """Everyone who takes part in a method's comparisons on the CPU, once."""
    assert method in METHODS
    found = [c for c in COMPARISONS if c.method == method and c.device in ("", "cpu")]
    return list(dict.fromkeys(name for c in found for name in (*c.baselines, *c.contestants)))


@functools.lru_cache(maxsize=1)  # the largest list's are 1.5 GB
def _gradients(tensors: TensorList) -> Gradients:
    return Gradients(tensors, torch.device("cpu"))


class Bench:
    """Runs one contestant on one list under pytest-benchmark."""

    def __init__(self, benchmark: object) -> None:
        self._benchmark = benchmark

    def __call__(self, tensors: TensorList, contestant: Contestant) -> None:
        """Pass the gate, then time steps; nothing is asserted on the time."""
        obstacle = contestant.obstacle(tensors.name, "cpu")
        if obstacle:
            pytest.skip(obstacle)
        gradients = _gradients(tensors)
        check([contestant], tensors, gradients, torch.device("cpu"))
        gradients.refresh(0)
        params = initial(tensors, torch.device("cpu"))
        attach(params, gradients.live)
        sets = (gradients.spare, gradients.live) if contestant.new_gradients else (gradients.live,)
        turn = Turn(contestant.build(params, LR), gradients.backward(params, *sets))
        turns = 0

        def setup() -> None:
            nonlocal turns
            turns += 1
            gradients.refresh(turns)
            attach(params, sets[turns % len(sets)])

        self.pedantic(turn, tensors, contestant.bytes_per_element, setup)

    def copy(self, tensors: TensorList) -> None:
        """The yardstick."""
        self.pedantic(copy_of(tensors.numel, torch.device("cpu")), tensors, copied_bytes(torch.device("cpu")), None)

    def pedantic(self, step, tensors, bytes_per_element, setup):  # type: ignore[no-untyped-def]
        """Time ``step`` and note the conditions beside it."""
        benchmark = self._benchmark
        benchmark.group = str(tensors)
        benchmark.extra_info.update(dtype="float32", device="cpu", threads=torch.get_num_threads())
        benchmark.extra_info["bytes per element"] = bytes_per_element
        _watched.clear()
        if isinstance(step, Turn):
            _watched.append(step)
        benchmark.pedantic(step, setup=setup, rounds=ROUNDS, warmup_rounds=3)
        benchmark.extra_info["gradients per cycle"] = getattr(step, "evaluations", 0) or None


@pytest.fixture
def bench(benchmark) -> Bench:
    """What a benchmark calls with a list and a contestant."""
    if "OMP_WAIT_POLICY" in os.environ:
        pytest.fail("OMP_WAIT_POLICY makes torch's own kernels up to thirty times slower; unset it")
    return Bench(benchmark)


def _words(name: str) -> str:
    """A name that -k can take."""
    return re.sub(r"\W+", "-", name).strip("-")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One clock for all, which stands still while a cycle's gradients are made."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=working_time))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every list, and every contestant of the module's method."""
    if "tensors" in metafunc.fixturenames:
        metafunc.parametrize("tensors", LISTS.values(), ids=LISTS.keys())
    if "contestant" in metafunc.fixturenames:
        names = names_of(metafunc.module.METHOD)
        metafunc.parametrize("contestant", [CONTESTANTS[n] for n in names], ids=[_words(n) for n in names])
