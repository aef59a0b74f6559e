"""What the tests of DemP's ops share: golden cases, back ends, guarded memory, a process with settings of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    case["id"]: case for case in json.loads((Path(__file__).parent / "golden" / "demp.json").read_text())["cases"]
}

each_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in ("cpu", "reference")]
)

GUARD = 64


def guarded(t: Tensor) -> tuple[Tensor, Tensor]:
    """``t`` in the middle of a longer array, whose ends nothing may touch; the whole comes second."""
    whole = torch.full((t.numel() + 2 * GUARD,), 77.0).to(t.dtype)
    inner = whole[GUARD : GUARD + t.numel()].view(t.shape)
    inner.copy_(t)
    return inner, whole


def untouched(whole: Tensor) -> bool:
    return bool((whole[:GUARD] == 77).all() and (whole[-GUARD:] == 77).all())


def digest(*tensors: Tensor) -> str:
    """Of the bits."""
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def in_child(code: str, **environment: str) -> str:
    """What ``code`` prints in a process of its own, which can import the modules of the suite."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
