"""Make the virtual environment of the Makefile and put requirement groups of pyproject.toml into it.

    PYTHON scripts/setup_env.py VENV
    VENV/bin/python scripts/setup_env.py --fill GROUP...

A torch that PYTHON already imports is used and never replaced, unless TORCH_SPEC says what to install; nothing is
downloaded for what is already there, so a machine without network that has the packages needs none.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_TORCH = "torch==2.13.0"
LEAST_TORCH = (2, 11)


def stop(message: str) -> None:
    raise SystemExit(f"torsion: {message}")


def check_interpreter() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036  (this runs in whatever PYTHON is)
        stop(f"{sys.executable} is Python {sys.version.split()[0]}; torsion needs >= 3.10: make PYTHON=python3.11 ...")
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        stop(f"{sys.executable} has no venv module; install it (Debian, Ubuntu: python3-venv; Fedora: python3-pip)")
    if os.environ.get("TORSION_BUILD", "").lower() == "none":
        return
    # setup.py finds the same and more, but only after torch has been downloaded.
    without = "TORSION_BUILD=none make ... does without compiled modules"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        stop(f"Python.h is missing; install the headers (Debian: python3-dev; Fedora: python3-devel), or: {without}")
    if not any(shutil.which(c.split()[0]) for c in (os.environ.get("CXX") or "", "c++", "g++") if c):
        stop(f"no C++ compiler; install gcc >= 11 (Debian: g++; Fedora: gcc-c++), or: {without}")


def version(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", text)[:2])


def make_venv(venv: Path, spec: str) -> None:
    """Create the environment, anew when the interpreter or the choice of torch has changed."""
    found = None if spec else installed("torch")
    if found and version(found) < LEAST_TORCH:
        stop(f"{sys.executable} has torch {found}, torsion needs >= 2.11: make TORCH_SPEC={DEFAULT_TORCH} installs one")
    record = venv / "torsion.json"
    wanted = {"python": f"{sys.prefix} {sys.version.split()[0]}", "system_torch": found or "", "torch_spec": spec}
    if record.exists() and json.loads(record.read_text()) == wanted and (venv / "bin/python").exists():
        return
    if venv.exists() and not (venv / "pyvenv.cfg").exists():
        stop(f"{venv} exists and is not a virtual environment; remove it or choose another with VENV=")
    print(f"torsion: creating {venv} " + (f"around torch {found}" if found else "with " + (spec or DEFAULT_TORCH)))
    options = ["--clear"]
    if found:
        options.append("--system-site-packages")
        if importlib.util.find_spec("pip"):
            # Else the setuptools that Python bundles, often an old one, would hide the one PYTHON has.
            options.append("--without-pip")
    if subprocess.run([sys.executable, "-m", "venv", *options, str(venv)]).returncode:
        stop("python -m venv failed (above); Debian and Ubuntu need the package python3-venv")
    if found and in_venv():
        # A virtual environment sees the base interpreter's packages only, not those of one it was made from.
        paths = [p for p in sys.path if p.endswith("site-packages")]
        purelib = subprocess.check_output(
            [venv / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        Path(purelib.strip(), "torsion_outer.pth").write_text("\n".join(paths) + "\n")
    record.write_text(json.dumps(wanted))


def in_venv() -> bool:
    return sys.prefix != sys.base_prefix


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def groups(names: list[str]) -> list[str]:
    """Return the requirements of the named extras, extras that name other extras spelled out."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    result: list[str] = []
    for name in names:
        for requirement in extras[name]:
            nested = re.fullmatch(r"torsion\[(.*)\]", requirement)
            result += groups(nested[1].split(",")) if nested else [requirement]
    return list(dict.fromkeys(result))


def missing(requirements: list[str]) -> list[str]:
    from pip._vendor.packaging.requirements import Requirement

    result = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        found = installed(requirement.name)
        if found is None:
            if not provided_otherwise(requirement.name):
                result.append(text)
        elif not requirement.specifier.contains(found, prereleases=True):
            result.append(text)
    return result


def provided_otherwise(name: str) -> bool:
    """Say whether the build finds this package in another place, as setup.py does."""
    if name == "ninja":
        return shutil.which("ninja") is not None
    if name == "pybind11":
        torch = importlib.util.find_spec("torch")
        return torch is not None and Path(str(torch.origin)).with_name("include").joinpath("pybind11").exists()
    return False


def install(requirements: list[str], what: str) -> None:
    wanted = missing(requirements)
    if not wanted:
        return
    print(f"torsion: installing {' '.join(text.split(';')[0] for text in wanted)}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-qq", *wanted]
    command += [f"{kept}=={installed(kept)}" for kept in ("torch", "triton") if installed(kept)]
    if subprocess.run(command).returncode == 0:
        return
    importlib.invalidate_caches()
    names = {text: re.split(r"[^\w.-]", text)[0] for text in wanted}
    absent = [text for text, name in names.items() if installed(name) is None]
    if "setuptools" in names.values() and installed("wheel") is None:
        absent.append("a setuptools that brings bdist_wheel (>= 70.1)")
    if absent:
        stop(f"{what} needs {' '.join(absent)}, which pip could not install (above); without network, install by hand")
    print(f"torsion: going on with versions outside {' '.join(wanted)}", file=sys.stderr)


def main() -> None:
    """Run twice: in PYTHON to make the environment, then in the environment to fill it."""
    if len(sys.argv) < 2:
        stop("usage: setup_env.py VENV | setup_env.py --fill GROUP...")
    spec = os.environ.get("TORCH_SPEC", "")
    if sys.argv[1] != "--fill":
        check_interpreter()
        make_venv(Path(sys.argv[1]), spec)
        sys.exit(subprocess.run([Path(sys.argv[1], "bin/python"), __file__, "--fill"]).returncode)
    if installed("torch") is None:
        install([spec or DEFAULT_TORCH], "torsion")
    if len(sys.argv) > 2:
        install(groups(sys.argv[2:]), "this target")


if __name__ == "__main__":
    main()
