"""What DemP knows of each layer's units, and how a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torsion.prune._coordinates import Coordinates

VERSION = 1
_REMEDY = "load the checkpoint of the same model, and build that full-size before it"


@dataclass(frozen=True)
class Units:
    """The units that a layer has now; every tensor is on the CPU and has one element for each of them.

    ``original`` counts the units of the uncut layer, ``kept`` (int64) says which of them these are, ``live`` (bool)
    what the last window said, ``dead_windows`` (int64) how many windows in a row found the unit dead, ``mean``
    (float64) its mean absolute activation there.
    """

    original: int
    kept: Tensor
    live: Tensor
    dead_windows: Tensor
    mean: Tensor

    @classmethod
    def fresh(cls, units: int) -> Units:
        """All live, as before the first window."""
        return cls(
            units,
            torch.arange(units, device="cpu"),
            torch.ones(units, dtype=torch.bool, device="cpu"),
            torch.zeros(units, dtype=torch.int64, device="cpu"),
            torch.zeros(units, dtype=torch.float64, device="cpu"),
        )

    def observed(self, live: Tensor, mean: Tensor, min_live: int) -> Units:
        """After a window; the ``min_live`` units of largest mean (of equal ones the first) live whatever it says."""
        live = live.clone()
        live[torch.argsort(mean, descending=True, stable=True)[:min_live]] = True
        dead_windows = torch.where(live, 0, self.dead_windows + 1)
        return Units(self.original, self.kept, live, dead_windows, mean.double().clone())

    def unobserved(self) -> Units:
        """After a window that could not say anything of the layer."""
        return self.observed(torch.ones_like(self.live), torch.zeros_like(self.mean), 0)

    def after(self, keep: Tensor) -> Units:
        """After a cut that kept the units of this bool mask."""
        return Units(self.original, *(t[keep] for t in (self.kept, self.live, self.dead_windows, self.mean)))


def saved(units: Mapping[str, Units], places: Mapping[str, Coordinates]) -> dict[str, Any]:
    """Both as plain numbers, strings and tensors of their own."""
    return {
        "layers": {
            name: {
                "units": u.original,
                "kept": u.kept.clone(),
                "live": u.live.clone(),
                "dead_windows": u.dead_windows.clone(),
                "mean": u.mean.clone(),
            }
            for name, u in units.items()
        },
        # In the order of their tensor ids. Which elements are left follows from the units.
        "parameters": {name: list(place.shape) for name, place in places.items()},
    }


def restored_units(given: Any, present: Mapping[str, Units]) -> dict[str, Units]:
    """The units of a checkpoint; ``present`` are those of the model that is to take them.

    Raises:
        ValueError: another model's, or one that was cut further than the checkpoint.
    """
    given = _dictionary("'layers'", given)
    _same_names("layer", given, present)
    result = {}
    for name, entry in given.items():
        entry = _dictionary(f"layer {name!r}", entry)
        now = present[name]
        if entry.get("units") != now.original:
            raise ValueError(
                f"{name}: {entry.get('units')} units in the checkpoint before any cut, {now.original} here; {_REMEDY}"
            )
        found = {
            "kept": _tensor(name, entry, "kept", torch.int64),
            "live": _tensor(name, entry, "live", torch.bool),
            "dead_windows": _tensor(name, entry, "dead_windows", torch.int64),
            "mean": _tensor(name, entry, "mean", torch.float64),
        }
        sizes = {t.numel() for t in found.values()}
        kept = found["kept"]
        if len(sizes) != 1 or not kept.numel() or not _ascending(kept, now.original):
            raise ValueError(f"{name}: the checkpoint's unit lists {_sizes(found)} do not fit together; {_REMEDY}")
        gone = kept[~torch.isin(kept, now.kept)]
        if gone.numel():
            raise ValueError(
                f"{name}: the checkpoint has unit {int(gone[0])}, which was cut out of this model; build the model "
                "full-size, the optimizer and DemP, then load"
            )
        result[name] = Units(now.original, **found)
    return result


def same_parameters(given: Any, present: Mapping[str, Coordinates]) -> None:
    """Raise ValueError unless the checkpoint's parameters were, before any cut, those of this model, in its order."""
    given = _dictionary("'parameters'", given)
    _same_names("parameter", given, present)
    for (name, shape), (own, place) in zip(given.items(), present.items(), strict=True):
        if name != own:
            raise ValueError(f"{name}: stands where this model has {own}, and noise goes by their order; {_REMEDY}")
        if not isinstance(shape, (list, tuple)) or tuple(shape) != place.shape:
            raise ValueError(f"{name}: shape {shape} in the checkpoint before any cut, {place.shape} here; {_REMEDY}")


def _dictionary(what: str, given: Any) -> Mapping[Any, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(
            f"the checkpoint's {what} is {type(given).__name__}, no dictionary; pass what demp.state_dict() returned"
        )
    return given


def _same_names(kind: str, given: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    for name in given:
        if name not in present:
            raise ValueError(f"{name}: a {kind} of the checkpoint that this model does not have; {_REMEDY}")
    for name in present:
        if name not in given:
            raise ValueError(f"{name}: a {kind} of this model that the checkpoint does not have; {_REMEDY}")


def _tensor(name: str, entry: Mapping[str, Any], key: str, dtype: torch.dtype) -> Tensor:
    value = entry.get(key)
    if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != 1:
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: {key!r} is {found} in the checkpoint, must be a list of {dtype}; {_REMEDY}")
    return value.detach().cpu().clone()


def _ascending(kept: Tensor, units: int) -> bool:
    return bool((kept[1:] > kept[:-1]).all()) and int(kept[0]) >= 0 and int(kept[-1]) < units


def _sizes(found: Mapping[str, Tensor]) -> dict[str, int]:
    return {key: t.numel() for key, t in found.items()}
