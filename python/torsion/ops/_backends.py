"""Which implementation an op runs on, and why."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TypedDict

import torch

from torsion.ops import _native
from torsion.ops._rules import PASSES, RULES

NAMES = ("cuda", "triton", "cpu", "reference")

KERNELS: dict[str, tuple[str, ...]] = {
    "philox_normal": ("cuda", "triton", "cpu", "reference"),
    "demp_update_": ("cuda", "triton", "cpu", "reference"),
    "active_flags_": ("cuda", "triton", "cpu", "reference"),
    "masked_linear": ("cpu", "torch", "triton", "reference"),
    "masked_conv2d": ("cpu", "torch", "reference"),
}
"""Ops that are not written for every back end -> those they are written for, the best first; "torch": put together from
torch's own ops, on any device."""

NOTES = {
    "masked_linear": (
        "products by torch: on views where live units come first, else on gathered columns; of the full sizes, with "
        "zeros in the weight, where gathers would spare fewer multiplications per number moved than the root of the "
        "width; Triton's kernel when TORSION_BACKEND asks for it"
    ),
    "masked_conv2d": (
        "convolutions by torch: on gathered channels; on a CPU of the full size, with zeros in the weight, by the same "
        "rule"
    ),
}
"""Op -> what :func:`backends` says beside its back end."""


class Choice(TypedDict):
    """What :func:`backends` says of one op."""

    chosen: str
    available: list[str]
    why: str


def _triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(name: str, device: str) -> str:
    """Return what keeps back end ``name`` from tensors on ``device``, or an empty string."""
    if name in ("reference", "torch"):
        return ""

    def missing(module: str) -> str:
        # _plan is bound to one Python version, the others are not: either may be missing alone.
        return _native.missing.get(module) or _native.missing.get("_plan", "")

    if name == "cpu":
        return missing("_C") if device == "cpu" else f"it runs on CPU tensors, these are on {device}"
    if name == "cuda":
        if device != "cuda":
            return f"it runs on CUDA tensors, these are on {device}"
        return missing("_C_cuda")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install torsion[triton]"
    if device == "cuda" or (device == "cpu" and _triton_interpreted()):
        return ""
    return f"it runs on CUDA tensors, these are on {device} (TRITON_INTERPRET=1 runs it on CPU tensors, for tests)"


def choose(device: str, requested: str | None = None, kernels: Sequence[str] = NAMES) -> tuple[str, str]:
    """Return the back end for tensors on ``device`` and why: ``requested`` before TORSION_BACKEND before the best.

    Args:
        device: its type.
        requested: a back end by name.
        kernels: back ends the op is written for, the reference among them. TORSION_BACKEND speaks of all ops, so one
            that is not written for it runs on its own best.

    Raises:
        ValueError: an unknown name, or one that cannot run on this device; the message says what is missing.
    """
    forced, by = requested, "backend"
    if requested is None:
        forced, by = os.environ.get("TORSION_BACKEND"), "TORSION_BACKEND"
        if forced in NAMES and forced not in kernels:
            forced = None
    if forced or requested is not None:
        if forced not in NAMES:
            raise ValueError(f"{by}={forced!r} is not a back end; use one of {', '.join(NAMES)}, or none for the best")
        reason = obstacle(forced, device) if forced in kernels else f"the op runs on {', '.join(kernels)}"
        if reason:
            raise ValueError(f"{by}={forced!r} cannot be used: {reason}")
        return forced, f"{by}={forced}"
    passed: list[str] = []
    for name in kernels:
        if name == "triton" and device == "cpu":
            continue  # the interpreter is for tests: only when asked for
        reason = obstacle(name, device)
        if not reason:
            why = f"fastest for {device} tensors" if not passed else f"{device} tensors; " + "; ".join(passed)
            return name, why
        if "these are on" not in reason:
            passed.append(f"{name}: {reason}")
    raise AssertionError("the reference runs everywhere")


def backends() -> dict[str, Choice]:
    """Return for each op the back end it would use on this machine, those it could use, and why.

    Returns:
        ``{op: {"chosen": name, "available": names, "why": reason}}`` for tensors on the GPU where there is one, else on
        the CPU. ``TORSION_BACKEND`` is taken into account; an impossible value raises as it would in an optimizer.

    Raises:
        ValueError: ``TORSION_BACKEND`` names no back end, or one that cannot run here.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    devices = ("cuda", "cpu") if device == "cuda" else ("cpu",)
    runnable = [name for name in NAMES if any(not obstacle(name, d) for d in devices)]
    found: dict[str, Choice] = {}
    for op, kernels in {**dict.fromkeys((*RULES, *PASSES), NAMES), **KERNELS}.items():
        chosen, why = choose(device, kernels=kernels)
        available = [name for name in kernels if name in runnable or name == "torch"]
        found[op] = Choice(chosen=chosen, available=available, why="; ".join(filter(None, (why, NOTES.get(op)))))
    return found


def build_info() -> dict[str, object]:
    """Return how the compiled modules were built, and for those that are missing why.

    Returns:
        ``version``, ``torch`` and ``cuda`` in use; ``modules``: name -> "loaded" or the reason it is missing;
        ``build``: compiler, flags, torch, CUDA architectures and commit at build time (empty without ``_plan``).
    """
    from torsion import __version__

    modules = {name: _native.missing.get(name, "loaded") for name in ("_C", "_plan", "_C_cuda")}
    build = dict(_native.plan.build_facts()) if _native.plan is not None else {}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "modules": modules,
        "build": build,
    }
