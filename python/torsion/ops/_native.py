"""Loads the compiled modules and knows why one is missing; registers schemas and fakes of every op."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType
from typing import Any

import torch

_SCHEMAS = {
    "tam_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!) shared, Tensor(d!) steps, "
        "Tensor(e!) status, Tensor hyper, Tensor[] lrs, int[] scopes, int[] groups, int[] slots, Tensor? grad_scale, "
        "Tensor? found_inf, float? max_grad_norm) -> ()"
    ),
    "adatam_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(f!)[] exp_avg_sqs, Tensor(c!) shared, "
        "Tensor(d!) steps, Tensor(e!) status, Tensor hyper, Tensor[] lrs, int[] scopes, int[] groups, int[] slots, "
        "Tensor? grad_scale, Tensor? found_inf, float? max_grad_norm) -> ()"
    ),
    "philox_normal_": "(Tensor(a!) out, int seed, int step, int tensor_id) -> ()",
    "demp_update_": (
        "(Tensor(a!)[] params, Tensor?[] row_live, Tensor?[] col_live, Tensor?[] rows, Tensor?[] cols, "
        "int[] orig_cols, float sigma, int seed, int step, int[] tensor_ids, Tensor? numbers=None) -> ()"
    ),
    "active_flags_": (
        '(Tensor y, Tensor(a!) flags, Tensor(b!) count, int channel_dim=1, str criterion="ever_active", '
        "float tau=0.0) -> ()"
    ),
}
"""The ops that work in place, again for a build without ``_C``; a test holds them equal to ``csrc/ops.cpp``."""

_PLANNED = ("tam_planned_", "adatam_planned_", "lookbehind_planned_")

missing: dict[str, str] = {}
"""Compiled module -> why it cannot be used."""


def _load(name: str) -> ModuleType | None:
    full = f"torsion.{name}"
    if importlib.util.find_spec(full) is None:
        missing[name] = f"torsion.{name} was not built (TORSION_BUILD=none, or no compiler at install)"
        return None
    try:
        return importlib.import_module(full)
    except ImportError as error:
        missing[name] = f"torsion.{name} was built but does not load: {error}"
        warnings.warn(f"{missing[name]}; a slower back end is used. Rebuild with `make build`.", stacklevel=3)
        return None


def _load_cuda() -> ModuleType | None:
    if torch.version.cuda is None:
        missing["_C_cuda"] = f"torch {torch.__version__} is a CPU build"
        return None
    if C is None:
        missing["_C_cuda"] = missing["_C"]
        return None
    return _load("_C_cuda")


plan: Any = _load("_plan")
C = _load("_C")
C_cuda = _load_cuda()

if C is None:
    _library = torch.library.Library("torsion", "DEF")
    for _name, _schema in _SCHEMAS.items():
        _library.define(_name + _schema)


def _fake(*_args: Any) -> None:
    """Every op works in place and returns nothing."""


for _name in (*_SCHEMAS, *(_PLANNED if C is not None else ())):
    torch.library.register_fake(f"torsion::{_name}", _fake)
