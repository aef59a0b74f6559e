"""Checkpoints: torsion's own and those of torch's SGD, Adam and AdamW, all checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from torsion.optim import _layout, _sharding

_REFUSED = {"nesterov": False, "dampening": 0, "amsgrad": False}
_FAMILIES = {"momentum": "SGD or TAM", "betas": "Adam, AdamW, AdaTAM or AdaTAMW"}


def copied(state_dict: Any, cls: str) -> dict[str, Any]:
    """A shallow copy, which hooks may change; raise TypeError unless it is a dictionary."""
    if not isinstance(state_dict, Mapping):
        found = type(state_dict).__name__
        raise TypeError(
            f"{cls}: a checkpoint is a dictionary, got {found}; pass what an optimizer's state_dict() returned"
        )
    return dict(state_dict)


def halves(state_dict: Mapping[str, Any], cls: str) -> tuple[dict[Any, Any], Any]:
    """State and groups of a checkpoint; raise ValueError if one is missing."""
    if "state" not in state_dict or "param_groups" not in state_dict:
        keys = sorted(map(str, state_dict))
        raise ValueError(f"{cls}: a checkpoint needs 'state' and 'param_groups', found {keys}; pass a state_dict()")
    if not isinstance(state_dict["state"], Mapping):
        found = type(state_dict["state"]).__name__
        raise ValueError(f"{cls}: the checkpoint's 'state' is no dictionary but {found}; pass a state_dict()")
    return dict(state_dict["state"]), state_dict["param_groups"]


def merged_groups(saved: Any, current: list[dict[str, Any]], own: tuple[str, ...], cls: str) -> list[dict[str, Any]]:
    """The groups after a load: copies of saved values over current ones, except ``own`` keys and the parameters.

    Raises:
        ValueError: groups do not fit, or hold a setting the method does not have.
    """
    remedy = "pass what an optimizer's state_dict() returned"
    if not isinstance(saved, list) or not all(
        isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in saved
    ):
        raise ValueError(f"{cls}: the checkpoint's param_groups is no list of groups with params; {remedy}")
    if len(saved) != len(current):
        raise ValueError(
            f"{cls}: the checkpoint has {len(saved)} parameter groups, this optimizer {len(current)}; "
            "build it with the same groups"
        )
    ids = [pid for group in saved for pid in group["params"]]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{cls}: the checkpoint's groups list a parameter twice ({ids}); {remedy}")
    groups = []
    for i, (old, new) in enumerate(zip(current, saved, strict=True)):
        if len(old["params"]) != len(new["params"]):
            raise ValueError(
                f"{cls}: group {i} has {len(new['params'])} parameters in the checkpoint, {len(old['params'])} here; "
                "build the optimizer for the same model"
            )
        stranger = next((k for k in _FAMILIES if k in new and k not in old), None)
        if stranger:
            raise ValueError(
                f"{cls}: group {i} of the checkpoint has {stranger!r}, it is from {_FAMILIES[stranger]}; "
                "load a checkpoint of the same family of optimizers"
            )
        if len(new.get("param_names", new["params"])) != len(new["params"]):
            raise ValueError(
                f"{cls}: group {i} of the checkpoint has {len(new['param_names'])} param_names for "
                f"{len(new['params'])} parameters; {remedy}"
            )
        for name, plain in _REFUSED.items():
            if new.get(name, plain) not in (plain, None):
                raise ValueError(
                    f"{cls}: group {i} of the checkpoint has {name}={new[name]!r}, which {cls} cannot continue; "
                    f"load it into the torch optimizer it came from, or set {name}={plain!r} in the checkpoint"
                )
        kept = {k: deepcopy(v) for k, v in new.items() if k not in own and k != "params"}
        groups.append({**old, **kept})
    return groups


def converted_state(
    name: str,
    param: Tensor,
    saved: Any,
    states: tuple[str, ...],
    cls: str,
) -> dict[str, Any]:
    """One parameter's state from a checkpoint, in this optimizer's dtypes and the parameter's layout.

    State is float32 for low-precision parameters whatever torch would cast it to. A missing ``step`` counts as one step
    taken, so that ``init="clone"`` does not seed again; a missing ``correlation`` is 0. Other keys are kept.

    Raises:
        ValueError: keys are missing or a shape is wrong.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"{name}: the checkpoint holds {type(saved).__name__} as its state, {cls} needs a dictionary")
    missing = [key for key in states if key not in saved]
    if all(saved.get(key) is None for key in states) and (not missing or not saved):
        return {}  # torch.optim.SGD before its first step, or without momentum
    if missing or any(not isinstance(saved[key], Tensor) for key in states):
        raise ValueError(
            f"{name}: the checkpoint's state has {sorted(map(str, saved))}, {cls} needs tensors {list(states)}; "
            "load a checkpoint of the same family of optimizers"
        )
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    result: dict[str, Any] = {"step": _scalar(name, "step", saved.get("step"), 1.0, cls)}
    for key, value in saved.items():
        if key in states:
            result[key] = _like(name, key, param, value, dtype, cls)
        elif key not in ("step", "correlation"):
            result[key] = value.to(param.device) if isinstance(value, Tensor) else value
    result["correlation"] = _scalar(name, "correlation", saved.get("correlation"), 0.0, cls)
    return result


def _scalar(name: str, key: str, value: Any, default: float, cls: str) -> Tensor:
    if value is None:
        return torch.tensor(default, dtype=torch.float64)
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(()).clone()
    if isinstance(value, (int, float)):
        return torch.tensor(float(value), dtype=torch.float64)
    raise ValueError(f"{name}: the checkpoint's {key} is not one number; {cls} cannot continue from it")


def _like(name: str, key: str, param: Tensor, value: Tensor, dtype: torch.dtype, cls: str) -> Tensor:
    if value.shape != param.shape:
        raise ValueError(
            f"{name}: {key} has shape {tuple(value.shape)} in the checkpoint, the parameter {tuple(param.shape)}; "
            f"{cls} needs the checkpoint of the same model"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name}: {key} is {value.dtype} in the checkpoint, {cls} needs real floating point numbers")
    if _sharding.is_dtensor(param) != _sharding.is_dtensor(value):
        raise ValueError(
            f"{name}: of {key} in the checkpoint and the parameter, one is sharded and the other is not; "
            "load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    with torch.no_grad():
        value = _sharding.matching(param, value.detach()).to(device=param.device, dtype=dtype, copy=True)
        if _sharding.is_dtensor(value):
            return value
        return _layout.laid_out_as(value, param) if _layout.is_dense(param) else value.contiguous()


def unshared(state: dict[Any, Any]) -> dict[Any, Any]:
    """``state`` with scalars of their own: torch's optimizers count a ``step`` once per parameter."""
    return {
        pid: {k: v.clone() if k in ("step", "correlation") and isinstance(v, Tensor) else v for k, v in entry.items()}
        if isinstance(entry, dict)
        else entry
        for pid, entry in state.items()
    }
