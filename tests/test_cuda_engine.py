"""The CUDA engine's kernels and launches on a CPU: g++ compiles the text nvcc compiles, tests/shim imitates CUDA.

Every check compares with the CPU runner bit for bit, guard regions included. One does not: with sums that round
(`rounding_of_sums`) the order of addition moves the last bits of a coefficient, which float64 elements show.

TORSION_SHIM_FLAGS adds compiler flags; `make audit` runs this file with AddressSanitizer and UBSan.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests/shim/engine_test.cpp"
CHECKS = re.findall(r'^ +\{"(\w+)", \w+\},', SOURCE.read_text(), re.MULTILINE)
FLAGS = [
    *("-std=c++20", "-O1", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers"),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cxx = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if cxx is None:
        pytest.skip("no C++ compiler; install g++ or set CXX")
    program = tmp_path_factory.mktemp("shim") / "engine_test"
    extra = shlex.split(os.environ.get("TORSION_SHIM_FLAGS", ""))
    include = [f"-I{ROOT / 'csrc'}", f"-I{SOURCE.parent}"]
    command = [*shlex.split(cxx), *FLAGS, *extra, *include, str(SOURCE), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    return program


def test_every_check_is_found() -> None:
    assert len(CHECKS) > 15
    for check in re.findall(r"^void (\w+)\(\) \{", SOURCE.read_text(), re.MULTILINE):
        assert check in CHECKS


@pytest.mark.parametrize("check", CHECKS)
def test_engine(engine: Path, check: str) -> None:
    # A sanitized test process preloads its runtime; the program carries its own.
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    ran = subprocess.run([str(engine), check], capture_output=True, text=True, env=env, timeout=300)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
