"""Checks of what a user gives to DemP. Each message names what, its value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torsion.optim import Lookbehind, _checks
from torsion.prune._schedule import Schedule, integer

CRITERIA = ("auto", "ever_active", "abs_max", "sum_le", "dormant")
NOISE_MASKS = ("row", "grad", "none")


@dataclass(frozen=True)
class Settings:
    """The numbers and words of a DemP."""

    total_steps: int
    lasso: float
    noise_std: float
    schedule: str
    noise_mask: str
    prune_every: int
    prune_after: int
    window: int
    criterion: str
    tau: float
    min_live: int
    align: int
    patience: int

    def __post_init__(self) -> None:
        """Raise unless every value is of its kind and in its range."""
        Schedule(self.schedule, self.total_steps)
        for name in ("lasso", "noise_std", "tau"):
            _checks.at_least_zero("", name, getattr(self, name))
        _checks.word("", "noise_mask", self.noise_mask, NOISE_MASKS)
        if self.criterion == "saturation":
            raise ValueError(
                "criterion='saturation': a saturated unit is constant, not zero, and a cut would change the network; "
                "live_units() reports such units, DemP takes one of " + ", ".join(map(repr, CRITERIA))
            )
        _checks.word("", "criterion", self.criterion, CRITERIA)
        integer("prune_every", self.prune_every, 1)
        integer("prune_after", self.prune_after, 0)
        integer("window", self.window, 1, None, "the number of batches")
        integer("min_live", self.min_live, 1)
        integer("align", self.align, 1)
        integer("patience", self.patience, 1, None, "the number of windows in a row")
        for name in ("lasso", "noise_std", "tau"):  # so that a checkpoint holds plain floats, not numpy's
            object.__setattr__(self, name, float(getattr(self, name)))


def seed(value: object) -> None:
    """Raise unless ``value`` is a 64-bit integer >= 0."""
    integer("seed", value, 0, 2**64 - 1)


def model(given: object) -> None:
    """Raise TypeError unless ``given`` is a module."""
    if not isinstance(given, nn.Module):
        raise TypeError(f"model is {type(given).__name__}: must be a torch.nn.Module")


def whole(module: nn.Module) -> None:
    """Raise ValueError, naming it, if a parameter is sharded or does not exist yet."""
    for name, child in module.named_modules():
        kinds = {cls.__name__ for cls in type(child).__mro__}
        if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            raise ValueError(
                f"{name or 'the model'} is sharded by FSDP ({type(child).__name__}): no process holds whole rows to "
                "cut; train with DistributedDataParallel, or cut before sharding"
            )
    for name, p in module.named_parameters():
        if hasattr(p, "_local_tensor") and hasattr(p, "placements"):
            raise ValueError(
                f"{name} is a DTensor, sharded by FSDP or tensor parallelism: no process holds whole rows to cut; "
                "train with DistributedDataParallel, or cut before sharding"
            )
        if nn.parameter.is_lazy(p):
            raise ValueError(f"{name} has no shape yet (a lazy module); call the model once before DemP")


def optimizer(given: object, module: nn.Module) -> None:
    """Raise unless ``given`` is an optimizer that holds every trainable parameter of ``module`` and can be cut."""
    if not isinstance(given, Optimizer):
        raise TypeError(
            f"optimizer is {type(given).__name__}, no torch.optim.Optimizer; pass the instance that trains the model"
        )
    kind = type(given).__name__
    if isinstance(given, Lookbehind):
        raise TypeError(
            f"optimizer is {kind}: the lasso would have to enter every phase of its outer step; "
            "give DemP a plain optimizer such as SGD, AdamW or torsion.TAM"
        )
    if hasattr(given, "first_step") and hasattr(given, "second_step"):
        raise TypeError(
            f"optimizer is {kind}, a sharpness-aware one with several gradients a step: the lasso would have to enter "
            "each of them; give DemP a plain optimizer such as SGD, AdamW or torsion.TAM"
        )
    unsharded(given)
    held = {id(p) for group in given.param_groups for p in group["params"]}
    missing = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{missing[0]}{more}: not in the optimizer ({kind}), so its state could not follow a cut; build the "
            "optimizer from model.parameters() of this very model, and freeze what is not trained with "
            "requires_grad_(False)"
        )


def unsharded(given: Optimizer) -> None:
    """Raise TypeError for an optimizer whose state this process holds only in part."""
    if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(given).__mro__):
        raise TypeError(
            f"optimizer is {type(given).__name__}, which shards its state over the ranks, so that it cannot follow a "
            "cut; use a plain optimizer such as SGD or AdamW"
        )


def near(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the names that look like it, else some that exist."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"there are {', '.join(map(repr, known[:8]))}{', ...' if len(known) > 8 else ''}"


def excluded(given: Any, module: nn.Module, layers: Mapping[str, Any]) -> set[str]:
    """The layers that the names in ``exclude`` stand for, and those cut together with them.

    The name of a module covers everything in it.

    Raises:
        TypeError: a single string, or no names.
        ValueError: no module has such a name.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"exclude={given!r}: must be a sequence of module names, such as exclude=('head',)")
    modules = [name for name, _ in module.named_modules() if name]
    found: set[str] = set()
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"exclude: {name!r} is no module name; pass strings, such as exclude=('head',)")
        if name not in modules:
            candidates = [*layers, *(m for m in modules if m not in layers)]
            raise ValueError(f"exclude: the model has no module {name!r}; {near(name, candidates)}")
        found |= {layer for layer in layers if layer == name or layer.startswith(name + ".")}
    groups = {layers[layer].group for layer in found}
    return {name for name, layer in layers.items() if layer.group in groups}


def cuttable(layers: Mapping[str, Any], excluded: set[str]) -> None:
    """Raise ValueError for the first layer, not excluded, whose cut would change the network."""
    for name, layer in layers.items():
        if layer.refused and name not in excluded:
            raise ValueError(f"{name}: {layer.refused}; keep it whole with exclude=({name!r},)")


def cut_together(keep: Mapping[str, Tensor], possible: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a checkpoint's ``keep`` is not what the model's ties and groups make ``possible``."""
    for name, mask in keep.items():
        if not mask.equal(possible[name]):
            raise ValueError(
                f"{name}: the checkpoint keeps {int(mask.sum())} units, but {int(possible[name].sum())} must stay for "
                "the layers they are cut together with here; load the checkpoint of the same model"
            )


def modules(given: Any) -> tuple[nn.Module, ...]:
    """``also`` as a tuple; raise TypeError unless it is modules."""
    if isinstance(given, nn.Module):
        return (given,)
    if not isinstance(given, Iterable) or isinstance(given, (str, Tensor)):
        raise TypeError(f"also={given!r}: must be modules that are cut alike, such as also=(ema,)")
    found = tuple(given)
    for i, other in enumerate(found):
        if not isinstance(other, nn.Module):
            raise TypeError(f"also[{i}] is {type(other).__name__}: must be a module with the model's parameters")
    return found


def cut_alike(others: Iterable[nn.Module], module: nn.Module) -> None:
    """Raise ValueError unless each of ``others`` has the parameters of ``module`` by name and shape, as its own."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    for i, other in enumerate(others):
        if other is module:
            raise ValueError(f"also[{i}] is the model itself, which is cut anyway; leave it out")
        theirs = {name: tuple(p.shape) for name, p in other.named_parameters()}
        for name in [*shapes, *theirs]:
            if shapes.get(name) != theirs.get(name):
                raise ValueError(
                    f"also[{i}]: {name} has shape {theirs.get(name, 'none')} there and {shapes.get(name, 'none')} in "
                    "the model; pass a copy of the model as it is now"
                )


def batches(given: Any) -> Iterable[Any]:
    """The iterable that ``batches`` is or returns."""
    remedy = "must be an iterable of model inputs, such as [inputs], or a function without arguments that returns one"
    found = given() if callable(given) and not isinstance(given, Iterable) else given
    if isinstance(found, (Tensor, str, Mapping)):
        raise TypeError(f"batches is {type(found).__name__}: {remedy}")
    if not isinstance(found, Iterable) and not hasattr(found, "__getitem__"):
        raise TypeError(f"batches={found!r}: {remedy}")
    return found  # type: ignore[no-any-return]
