"""Fixtures of the suite: back ends, poisoned memory, seeds. ``helpers`` and ``judge`` hold what test modules import."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator

import pytest
import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from helpers import TARGETS, Target
from hypothesis import HealthCheck, settings
from ranks import Workers

from torsion.ops import _backends, _policy

# A test that fails by chance is a bug, so hypothesis draws the same examples each time and keeps no database.
# Fixtures here are stateless, so that examples may share them.
settings.register_profile(
    "torsion",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("torsion")


def _params(targets: list[Target]) -> list[object]:
    return [pytest.param(t, id=t.id, marks=[pytest.mark.backend(t.backend), *_axis_marks(t)]) for t in targets]


def _axis_marks(target: Target) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.cuda] if target.device == "cuda" else []
    return [*marks, pytest.mark.triton] if target.backend == "triton" else marks


@pytest.fixture(params=_params(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    """Every back end. Interpreted Triton takes 0.1 s a step: small tensors, few cases."""
    return request.param


@pytest.fixture(params=_params([t for t in TARGETS if not t.interpreted]))
def fast_target(request: pytest.FixtureRequest) -> Target:
    """Every back end that runs at speed: all but interpreted Triton."""
    return request.param


@pytest.fixture(params=[0.0, math.inf], ids=["gathers", "dense"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked layers leave out what is dead, or compute it with zeros in the weight, whatever is cheaper."""
    monkeypatch.setattr(_policy, "_per_move", lambda *_: request.param)


@pytest.fixture(params=_params([t for t in TARGETS if t.backend in ("cpu", "cuda")]))
def compiled_target(request: pytest.FixtureRequest) -> Target:
    """The compiled back ends."""
    return request.param


@pytest.fixture(params=_params([t for t in TARGETS if t.backend == "triton"]))
def triton_target(request: pytest.FixtureRequest) -> Target:
    """Triton in the interpreter, or on the GPU where there is one."""
    return request.param


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine lacks, by name. A module that was built and does not load is no reason."""
    device = "cuda" if item.get_closest_marker("cuda") else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for marker in item.iter_markers("backend"):
        obstacle = _backends.obstacle(marker.args[0], device)
        if "was not built" in obstacle or "is not installed" in obstacle:
            pytest.skip(obstacle)


@pytest.fixture(autouse=True)
def _clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same seeds, threads and memory for every test, and no choice of back end left over in the environment."""
    for name in ("TORSION_BACKEND", "TORSION_ISA"):
        monkeypatch.delenv(name, raising=False)
    random.seed(0)
    torch.manual_seed(0)
    # A second thread only waits at the barriers of small lists; test_bitwise.py compares thread counts.
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    # torch then fills fresh memory with NaN and the largest integers, below Python too.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """One pair of processes serves a whole module: starting Python and torch costs seconds."""
    workers = Workers(tmp_path_factory.mktemp("workers"))
    yield workers
    workers.stop()
