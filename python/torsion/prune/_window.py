"""Which units live: the output of every activation, over a window of batches."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torsion.ops.flags import active_flags_
from torsion.ops.philox import DTYPES
from torsion.prune._follow import Call, Follower
from torsion.prune._keep import align_and_keep
from torsion.prune._ranks import unwrapped
from torsion.prune._structure import CRITERIA, Structure, check_model, describe, follow, frozen
from torsion.prune._symbols import Symbols

__all__ = ["Window", "align_and_keep", "live_units", "mark_active_", "observe"]


@dataclass
class Window:
    """What a window of batches showed.

    Attributes:
        live: layer -> bool mask over its units, on the CPU; True where nothing is known.
        mean: layer -> float64 mean absolute activation of its units.
        seen: layer -> bool mask, where a unit was evaluated at all: a layer may not run, or run on no example.
        batches: how many held examples; with 0 nothing is known.
        inputs: the batches that were drawn.
    """

    live: dict[str, Tensor] = field(default_factory=dict)
    mean: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0
    inputs: list[Any] = field(default_factory=list)


def observe(
    model: nn.Module,
    structure: Structure,
    batches: Iterable[Any],
    window: int,
    criterion: str = "auto",
    tau: float = 0.0,
) -> Window:
    """Run ``window`` of ``batches`` through ``model`` in evaluation mode and tell live units from dead ones.

    Args:
        model: the model that ``structure`` was traced from.
        structure: its units.
        batches: inputs, each as :func:`torsion.prune._structure.trace` takes them; no more than ``window`` are drawn.
        window: how many to draw, >= 0; fewer are used where there are no more.
        criterion: one of ``CRITERIA``, over all batches of the window.
        tau: threshold, >= 0.

    Raises:
        ValueError: an unknown criterion.
        RuntimeError: an activation is not finite, or the model does not run on a batch; nothing has changed.
    """
    tally = Tally(criterion, tau)
    inputs = []
    with frozen(model):
        for batch in itertools.islice(batches, window):
            inputs.append(batch)
            _run(model, structure.symbols, batch, tally)
    structure.refresh()
    return Window(*tally.result(structure), tally.batches, inputs)


def live_units(
    model: nn.Module, batches: Iterable[Any] | Callable[[], Iterable[Any]], criterion: str = "auto", tau: float = 0.0
) -> dict[str, Tensor]:
    """Which units of ``model`` are live on ``batches``: the dead-unit monitor on its own.

    Args:
        model: any module that runs eagerly; nothing of it changes. Names are those of the module inside
            DistributedDataParallel or torch.compile.
        batches: model inputs, or a function that returns them; all are run. Each is a tensor, a tuple or list of
            positional arguments, or a dict of keyword arguments.
        criterion: "ever_active": some output of the activation is > tau. "abs_max": some is > tau in absolute value.
            "sum_le": in some batch the outputs add up to more than tau. "dormant": the mean absolute output is more
            than tau times the mean over the layer's units. "saturation": somewhere the activation's derivative is
            > tau in absolute value. "auto": "ever_active" for ReLU, "abs_max" for everything else.
        tau: threshold, >= 0.

    Returns:
        Qualified name of each Linear or convolution that an activation follows, in forward order -> bool mask over its
        units, on the CPU. Convolutions that meet at an addition share one mask; a gated unit is named after the layer
        whose output is activated. Layers that reach the model's output are absent. No examples: an empty dict and a
        warning. Units that none of the batches evaluates (experts without a token) count as live.

    Raises:
        ValueError: an unknown criterion, a negative tau, a sharded or scripted model.
        TypeError: ``model`` is no module, ``batches`` is a single tensor or cannot be iterated over.
        RuntimeError: an activation is not finite, named after its layer, or the model does not run on a batch.
    """
    check_model(model)
    model = unwrapped(model)
    if callable(batches):
        batches = batches()
    if isinstance(batches, (Tensor, str, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches={type(batches).__name__}: must be an iterable of inputs, such as [x] for one batch x")
    tally = Tally(criterion, tau)
    symbols = Symbols()
    with frozen(model):
        for batch in batches:
            _run(model, symbols, batch, tally)
    if not tally.batches:
        warnings.warn("live_units: `batches` is empty or without examples: nothing is known of any unit", stacklevel=2)
        return {}
    return tally.result(Structure(symbols))[0]


def _run(model: nn.Module, symbols: Symbols, batch: Any, tally: Tally) -> None:
    try:
        follower = follow(model, symbols, batch, tally.watch, slopes=tally.criterion == "saturation")
    except Exception as error:
        raise RuntimeError(
            f"batch {tally.drawn} of the window ({describe(batch)}): the model does not run on it in evaluation mode: "
            f"{type(error).__name__}: {error}"
        ) from error
    tally.add(follower, symbols)


@dataclass
class Seen:
    """One activation of one batch.

    Attributes:
        flags: uint8 [channels], 1 where live by the criterion.
        total: float64 [channels], sum of absolute values.
        count: values per channel.
    """

    flags: Tensor
    total: Tensor
    count: int


class Tally:
    """Adds up what the activations of all batches showed, by symbol."""

    def __init__(self, criterion: str, tau: float) -> None:
        if criterion not in CRITERIA:
            raise ValueError(f"criterion={criterion!r}: must be one of {', '.join(map(repr, CRITERIA))}")
        if isinstance(tau, bool) or not isinstance(tau, (int, float)):
            raise TypeError(f"tau={tau!r}: must be a number")
        if not 0 <= tau < float("inf"):
            raise ValueError(f"tau={tau!r}: must be finite and >= 0")
        self.criterion = criterion
        self.tau = tau
        self.drawn = 0
        self.batches = 0  # with examples
        self.live = torch.zeros(0, dtype=torch.bool, device="cpu")
        self.total = torch.zeros(0, dtype=torch.float64, device="cpu")
        self.count = torch.zeros(0, dtype=torch.float64, device="cpu")

    def watch(self, y: Tensor, dims: tuple[int, ...], call: Call, relu: bool) -> Seen:
        """Measure the output ``y`` of an activation, a ReLU or not, over all dimensions but ``dims``."""
        total = _reduce_total(y, dims)
        flags = torch.zeros(total.numel(), dtype=torch.uint8, device=y.device)
        criterion = self.criterion
        if criterion == "auto":
            criterion = "ever_active" if relu else "abs_max"
        if criterion == "saturation":
            criterion, y = "abs_max", derivative(call, y)
        if criterion != "dormant" and y.numel():
            channels = y.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims)) if len(dims) > 1 else y
            dim = dims[0] if len(dims) == 1 else -1
            mark_active_(channels if dims else y.reshape(-1, 1), flags, dim, criterion, self.tau)
        return Seen(flags, total, y.numel() // max(1, total.numel()))

    def add(self, follower: Follower, symbols: Symbols) -> None:
        """Take over what one batch showed.

        Raises:
            RuntimeError: an activation is not finite.
        """
        more = len(symbols.parent) - len(self.live)
        for name in ("live", "total", "count"):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, torch.zeros(more, dtype=old.dtype, device="cpu")]))
        for pending in follower.pendings:
            seen: Seen = pending.stats
            total = seen.total.cpu()
            if not bool(total.isfinite().all()):
                raise RuntimeError(self._not_finite(pending.symbols[~total.isfinite()], symbols))
            ids = pending.symbols[pending.read]
            self.live.index_put_((ids[seen.flags.cpu()[pending.read] > 0],), torch.tensor(True, device="cpu"))
            self.total.index_add_(0, ids, total[pending.read])
            self.count.index_add_(0, ids, torch.full((len(ids),), float(seen.count), dtype=torch.float64, device="cpu"))
        self.drawn += 1
        self.batches += not follower.pendings or any(pending.stats.count for pending in follower.pendings)

    def _not_finite(self, where: Tensor, symbols: Symbols) -> str:
        for block in symbols.blocks.values():
            units = torch.isin(block.ids, where).nonzero().flatten().tolist()
            if units:
                return (
                    f"{block.layer}: the activation of unit {units[0]} is not finite in batch {self.drawn} of the "
                    "window, so nothing is measured or cut; look for NaN or Inf in the inputs and weights"
                )
        return f"an activation is not finite in batch {self.drawn} of the window"

    def result(self, structure: Structure) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Masks, means, and which units were seen at all, of every layer; unseen ones live."""
        symbols = structure.symbols
        roots = symbols.roots()
        more = len(roots) - len(self.live)
        live, total, count = (torch.cat([t, t.new_zeros(more)]) for t in (self.live, self.total, self.count))
        by_class = torch.zeros(len(roots), dtype=torch.float64, device="cpu")
        counts = by_class.index_add(0, roots, count)
        mean = by_class.index_add(0, roots, total) / counts.clamp(min=1)
        alive = by_class.index_add(0, roots, live.double()) > 0
        masks, means, seen = {}, {}, {}
        for block in symbols.blocks.values():
            if block.layer not in structure.layers:
                continue
            own = roots[block.ids]
            means[block.layer] = mean[own]
            seen[block.layer] = counts[own] > 0
            mask = alive[own]
            if self.criterion == "dormant":
                mask = mean[own] > self.tau * mean[own].mean()
            masks[block.layer] = mask | structure.layers[block.layer].protected | ~seen[block.layer]
        return masks, means, seen


def mark_active_(y: Tensor, flags: Tensor, channel_dim: int, criterion: str, tau: float) -> None:
    """Set ``flags`` (uint8 [channels]) to 1 where ``y`` is live by "ever_active", "abs_max" or "sum_le", in place."""
    y = y.detach() if y.dtype in DTYPES else y.detach().float()
    active_flags_(y, flags, torch.zeros(1, dtype=torch.int64, device=y.device), channel_dim, criterion, tau)


def _reduce_total(y: Tensor, dims: tuple[int, ...]) -> Tensor:
    others = [d for d in range(y.dim()) if d not in dims]
    y = y.detach()
    total = torch.linalg.vector_norm(y, 1, dim=others, dtype=torch.float64) if others else y.abs().double()
    return total.flatten()


def derivative(call: Call, y: Tensor) -> Tensor:
    """The activation's derivative where it was evaluated; a product, no function of one argument, stays itself."""
    z = call.before
    if z is None:
        return y
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        kwargs = {k: v for k, v in call.kwargs.items() if k not in ("inplace", "input")}
        out = call.func(z * 1, *call.args[1:], **kwargs)
        (slope,) = torch.autograd.grad(out.sum(), z)
    return slope
