"""`torsion doctor`: what is installed, how it was built, which back end each op would use, and why.

Plain text without any optional library, because this is the command for a machine on which something is missing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from typing import Any

import torch

import torsion
from torsion.cli.usage import usable_processors

__all__ = ["add_arguments", "collect", "run"]

_OPTIONAL = {"triton": "triton kernels", "rich": "demo", "matplotlib": "demo", "scikit-learn": "demo"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `torsion doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the report")


def run(args: argparse.Namespace) -> int:
    """Print the report and return 0: a missing back end is a finding, not a failure of the doctor."""
    facts = collect()
    print(json.dumps(facts, indent=2, default=str) if args.json else render(facts))
    return 0


def collect() -> dict[str, Any]:
    """Gather everything the report says, as plain numbers, strings, lists and dictionaries."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "build": _guarded(torsion.build_info),
        "backends": _guarded(torsion.backends),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _matters(name)},
    }


def _guarded(ask: Any) -> Any:
    # An impossible TORSION_BACKEND makes these raise; the doctor is where a user comes to read why.
    try:
        return ask()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _matters(name: str) -> bool:
    return name.startswith("TORSION_") or name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET")


def _versions() -> dict[str, str]:
    found = {"torsion": torsion.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found["CUDA of torch"] = torch.version.cuda or "none (CPU build)"
    for name, purpose in _OPTIONAL.items():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = f"not installed (optional: {purpose})"
    return found


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor instructions": torch.backends.cpu.get_cpu_capability(),
        "processors usable": usable_processors(),
        "torch threads": torch.get_num_threads(),
        "GPU": _gpus(),
        "nvcc": shutil.which("nvcc") or "not on PATH (needed only to build CUDA kernels)",
        "C++ compiler": shutil.which(os.environ.get("CXX", "c++")) or "not on PATH (needed only to build)",
        "interpreter": sys.executable,
    }


def _gpus() -> list[str] | str:
    if torch.version.cuda is None:
        return "none usable: this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "none usable: torch has CUDA but sees no GPU or no driver"
    names = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        names.append(f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB")
    return names


def render(facts: dict[str, Any]) -> str:
    """Lay the facts out for a reader: one aligned block per subject, one paragraph per op."""
    lines: list[str] = []
    for title in ("versions", "machine", "build"):
        lines += ["", title, *_block(facts[title], indent=2)]
    lines += ["", "back ends", *_backend_lines(facts["backends"])]
    if facts["environment"]:
        lines += ["", "environment variables", *_block(facts["environment"], indent=2)]
    return "\n".join(lines[1:])


def _block(facts: dict[str, Any], indent: int) -> list[str]:
    lines, pad = [], " " * indent
    width = max((len(str(name)) for name, value in facts.items() if not isinstance(value, dict)), default=0)
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{pad}{name}", *_block(value, indent + 2)]
            continue
        lines.append(f"{pad}{name!s:<{width}}  {_shown(value)}")
    return lines


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None or value == "" else str(value)


def _backend_lines(backends: dict[str, Any]) -> list[str]:
    if "error" in backends:
        return [f"  cannot be chosen: {backends['error']}"]
    width = max((len(op) for op in backends), default=0)
    lines = []
    for op, choice in backends.items():
        others = [name for name in choice["available"] if name != choice["chosen"]]
        also = f" (also available: {', '.join(others)})" if others else ""
        lines += [f"  {op:<{width}}  {choice['chosen']}{also}", f"  {'':<{width}}  {choice['why']}"]
    return lines
