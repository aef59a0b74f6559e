"""The CUDA engine's kernels and launches on a CPU: g++ compiles the text nvcc compiles, tests/shim imitates CUDA.

Every check compares with the CPU runner bit for bit, guard regions included. Some do not: with sums that round
(`rounding_of_sums`, `skipped_cycle`, `captured_cycle`) the order of addition moves the last bits of a coefficient,
which float64 elements show.

TORSION_SHIM_FLAGS adds compiler flags; `make audit` runs this file with AddressSanitizer and UBSan, and with
-DTORSION_EVERY_BASE, which takes the cycles of every base instead of two.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {name: ROOT / f"tests/shim/{name}.cpp" for name in ("engine_test", "cycle_test", "demp_test")}
CHECKS = [
    (name, check)
    for name, source in SOURCES.items()
    for check in re.findall(r'^ +\{"(\w+)", \w+\},', source.read_text(), re.MULTILINE)
]
FLAGS = [
    *("-std=c++20", "-O1", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers"),
    "-DTORSION_ONE_LEVEL",  # the instruction sets agree bit for bit, which test_bitwise.py sees to
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    cxx = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if cxx is None:
        pytest.skip("no C++ compiler; install g++ or set CXX")
    folder = tmp_path_factory.mktemp("shim")
    extra = shlex.split(os.environ.get("TORSION_SHIM_FLAGS", ""))
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/shim'}"]

    @functools.cache
    def build(name: str) -> Path:
        command = [*shlex.split(cxx), *FLAGS, *extra, *include, str(SOURCES[name]), "-o", str(folder / name)]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr[-4000:]
        return folder / name

    return build


@pytest.mark.parametrize("name", SOURCES)
def test_every_check_is_found(name: str) -> None:
    mine = [check for program, check in CHECKS if program == name]
    assert len(mine) > 10
    for check in re.findall(r"^void (\w+)\(\) \{", SOURCES[name].read_text(), re.MULTILINE):
        assert check in mine


@pytest.mark.parametrize(("name", "check"), CHECKS)
def test_engine(engine: Callable[[str], Path], name: str, check: str) -> None:
    # A sanitized test process preloads its runtime; the program carries its own.
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    ran = subprocess.run([str(engine(name)), check], capture_output=True, text=True, env=env, timeout=300)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
