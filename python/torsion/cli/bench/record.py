"""The environment that figures come from, and the file both are written to."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import torsion
from torsion.cli.bench.figures import Figure, Place
from torsion.cli.bench.timing import DISTURBED

__all__ = ["SCHEMA", "device_name", "environment", "write_json"]

SCHEMA = 1
"""Grows when a field changes its meaning."""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The model of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _output(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str | None:
    """Of the source tree that runs; of the build where the package is installed elsewhere."""
    root = Path(torsion.__file__).parents[2]
    if (root / "csrc").is_dir() and (root / "setup.py").is_file():
        commit = _output("git", "rev-parse", "--short=12", "HEAD", cwd=root)
        if commit is not None:
            changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", "csrc", "python", cwd=root)
            return f"{commit} with changes" if changed else commit
    found = torsion.build_info()["build"]
    return str(found.get("commit")) if isinstance(found, dict) and found.get("commit") else None


def environment(place: Place) -> dict[str, Any]:
    """Everything about this machine and this build that the figures may depend on."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "torsion": torsion.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "pytorch_optimizer": _version("pytorch_optimizer"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "processor instructions": torch.backends.cpu.get_cpu_capability(),
        "processors usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": place.threads,
        "device": device_name(place.device),
        "load average at start": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("TORSION_", "OMP_", "KMP_"))},
        "build": torsion.build_info()["build"],
    }
    if place.device.type == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["driver"] = (_output(*query) or "").split("\n")[0] or None
        facts["cuda"] = torch.version.cuda
        found = torch.cuda.get_device_properties(place.device)
        facts["compute capability"] = f"sm_{found.major}{found.minor}"
        facts["L2 bytes"] = found.L2_cache_size
    return facts


def write_json(path: Path, facts: dict[str, Any], place: Place, figures: Sequence[Figure]) -> None:
    """Write one record: what was asked for, where it ran, and every figure."""
    record = {
        "schema": SCHEMA,
        "environment": facts,
        "settings": {
            "device": place.device.type,
            "threads": place.threads,
            "rounds": place.rounds,
            "rule for dropped rounds": f"baseline above {DISTURBED} times its own median",
        },
        "figures": [figure.as_dict() for figure in figures],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
