"""What is shipped, and what the build says when it cannot go on. Nothing here needs a network."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("csrc", "triton_kernels", "tests", "benchmarks", "scripts", "python")
LITTER = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "*.pyc", "shared", "results", "demo-out"
)


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    # The variables of a make that runs this suite would steer the makes and builds below.
    ours = ("TORSION_", "MAKE", "MFLAGS", "FORCE_CUDA", "PYTHONPATH", "TORCH_CUDA_ARCH_LIST")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=clean | env, capture_output=True, text=True)


def backend(hook: str, tree: Path, out: Path, mode: str, **env: str) -> Path:
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    done = run(sys.executable, "-c", code, cwd=tree, TORSION_BUILD=mode, MAX_JOBS="2", **env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=LITTER)
    return backend("build_sdist", folder / "tree", folder / "out", "none")


@pytest.fixture(scope="module")
def unpacked(sdist: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def pure_wheel(unpacked: Path) -> Path:
    return backend("build_wheel", unpacked, unpacked.parent / "pure", "none")


def test_sdist_holds_all_sources(unpacked: Path) -> None:
    def sources(root: Path) -> set[str]:
        found = (p for top in SHIPPED for p in (root / top).rglob("*"))
        return {
            str(p.relative_to(root))
            for p in found
            if p.suffix in {".py", ".h", ".cpp", ".cu", ".cuh", ".json", ".typed"} and "results" not in p.parts
        }

    assert sources(ROOT) - sources(unpacked) == set()
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "setup.py"):
        assert (unpacked / name).is_file(), name
    assert list((unpacked / "csrc/cuda").glob("*.cu")), "a CUDA machine could not build from this sdist"
    assert not list(unpacked.rglob("*.so"))


def test_wheel_holds_python_triton_and_typing(pure_wheel: Path) -> None:
    names = set(zipfile.ZipFile(pure_wheel).namelist())
    package = [p for p in (ROOT / "python/torsion").rglob("*") if p.suffix in {".py", ".json", ".typed"}]
    expected = {str(p.relative_to(ROOT / "python")) for p in package}
    expected |= {f"torsion/triton_kernels/{p.name}" for p in (ROOT / "triton_kernels").glob("*.py")}
    assert {"torsion/py.typed", "torsion/triton_kernels/__init__.py"} <= expected
    assert expected - names == set()
    assert not [n for n in names if n.startswith(("csrc", "tests", "benchmarks")) or n.endswith((".so", ".pyc"))]


def test_wheel_metadata(pure_wheel: Path) -> None:
    archive = zipfile.ZipFile(pure_wheel)
    info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA")).rsplit("/", 1)[0]
    metadata = archive.read(f"{info}/METADATA").decode()
    assert re.search(r"^Requires-Dist: torch>=2\.11$", metadata, re.M)
    assert re.search(r"^Requires-Python: >=3\.10$", metadata, re.M)
    assert re.search(r"^License: Apache-2\.0$", metadata, re.M)
    assert "torsion = torsion.cli.__main__:main" in archive.read(f"{info}/entry_points.txt").decode()


def imported_from(wheel: Path, folder: Path, code: str) -> list[str]:
    zipfile.ZipFile(wheel).extractall(folder)
    # -S with the packages on PYTHONPATH: an editable install of this tree would otherwise lend its modules.
    packages = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    path = os.pathsep.join([str(folder), *packages])
    done = run(
        sys.executable, "-S", "-W", "ignore", "-c", f"import sys, torsion; {code}", cwd=Path("/"), PYTHONPATH=path
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


STEP = (
    "import torch; p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3);"
    "torsion.TAM([p], lr=0.5).step(); print(float(p[0]) < 1, torsion.__file__);"
)


def test_pure_wheel_runs_from_any_directory(pure_wheel: Path, tmp_path: Path) -> None:
    printed = imported_from(pure_wheel, tmp_path, STEP + "print('torsion._C' in sys.modules)")
    assert printed == ["True", f"{tmp_path}/torsion/__init__.py", "False"]


@pytest.mark.slow
def test_compiled_wheel_from_sdist_runs_from_any_directory(unpacked: Path, tmp_path: Path) -> None:
    if why_no_build():
        pytest.skip(why_no_build())
    # All sources, but not the two minutes that optimising them takes.
    wheel = backend("build_wheel", unpacked, unpacked.parent / "compiled", "cpu", CXXFLAGS="-O0")
    names = zipfile.ZipFile(wheel).namelist()
    assert "torsion/_C.abi3.so" in names
    assert f"torsion/_plan{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    modules = "print(*(sys.modules[f'torsion.{m}'].__file__ for m in ('_C', '_plan')))"
    assert imported_from(wheel, tmp_path, STEP + modules) == [
        "True",
        f"{tmp_path}/torsion/__init__.py",
        f"{tmp_path}/torsion/_C.abi3.so",
        f"{tmp_path}/torsion/_plan{sysconfig.get_config_var('EXT_SUFFIX')}",
    ]


def why_no_build() -> str:
    if not any(shutil.which(c) for c in ("c++", "g++")):
        return "no C++ compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python.h"
    return ""


def refused(*options: str, **env: str) -> str:
    done = run(sys.executable, *options, "setup.py", "--version", cwd=ROOT, **env)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


def test_missing_torch_prints_the_two_lines() -> None:
    message = refused("-I", "-S")  # no site-packages
    assert "\n  pip install torch==2.13.0 setuptools ninja pybind11\n  pip install --no-build-isolation .\n" in message


def test_unknown_mode_is_refused_in_one_line() -> None:
    message = refused(TORSION_BUILD="nonsense")
    assert "'nonsense'" in message
    assert "auto, cpu, cuda, none" in message
    assert "\n" not in message


def test_missing_compiler_offers_none() -> None:
    message = refused(TORSION_BUILD="cpu", CXX="/nowhere/g++")
    assert "/nowhere/g++" in message
    assert "TORSION_BUILD=none" in message
    assert "\n" not in message


def test_old_compiler_is_named(tmp_path: Path) -> None:
    if "Python.h" in why_no_build():
        pytest.skip(why_no_build())
    old = tmp_path / "g++"
    old.write_text("#!/bin/sh\necho '#define __GNUC__ 9'\necho '#define __VERSION__ \"9.4.0\"'\n")
    old.chmod(0o755)
    message = refused(TORSION_BUILD="cpu", CXX=str(old))
    assert "gcc 9.4.0" in message
    assert "gcc >= 11" in message
    assert "TORSION_BUILD=none" in message


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA torch may well build the CUDA module")
@pytest.mark.skipif(bool(why_no_build()), reason=why_no_build())
@pytest.mark.parametrize("env", [{"TORSION_BUILD": "cuda"}, {"FORCE_CUDA": "1"}], ids=lambda e: next(iter(e)))
def test_cuda_without_cuda_torch_says_why(env: dict[str, str]) -> None:
    assert refused(**env) == f"torsion: TORSION_BUILD=cuda cannot be done: torch {torch.__version__} is a CPU build"


def test_version_has_one_source() -> None:
    import torsion

    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert declared is not None
    assert torsion.__version__ == declared[1]
    assert importlib.metadata.version("torsion") == declared[1]
    fallback = re.findall(r'__version__ = "(.+)"', (ROOT / "python/torsion/__init__.py").read_text())
    assert fallback in ([], [declared[1]])


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
@pytest.mark.parametrize("target", ["demo", "test", "bench", "build", "lint", "audit", "gpu", "clean"])
def test_make_help_lists_and_make_knows(target: str) -> None:
    assert re.search(rf"^make {target}\b", run("make", cwd=ROOT).stdout, re.M)
    # -n still runs nothing: a target without a rule is the only way to fail.
    assert run("make", "-n", target, cwd=ROOT).returncode == 0


@needs_make
def test_make_names_a_missing_interpreter(tmp_path: Path) -> None:
    done = run("make", "build", "PYTHON=python-that-is-not", f"VENV={tmp_path}/venv", cwd=ROOT)
    assert done.returncode != 0
    assert "no python-that-is-not" in done.stderr
    assert "PYTHON=" in done.stderr


@pytest.fixture(scope="module")
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "scripts/setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_make_group_is_an_extra(setup_env: ModuleType) -> None:
    used = set(re.findall(r"env-(\w+)", (ROOT / "Makefile").read_text()))
    for group in used | {"dev"}:
        assert setup_env.groups([group]), group
        assert not [r for r in setup_env.groups([group]) if r.startswith("torsion")]


def test_setup_fetches_only_what_is_missing(setup_env: ModuleType) -> None:
    wanted = ["pytest>=1", "pytest<1", "no-such-package>=1", "no-such-package; python_version < '3'", "torch>=2.11"]
    assert setup_env.missing(wanted) == ["pytest<1", "no-such-package>=1"]
