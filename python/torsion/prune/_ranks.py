"""Data-parallel training: what the ranks must agree on before they cut, and DistributedDataParallel after it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_DDP_SETTINGS = (
    "device_ids",
    "output_device",
    "dim",
    "process_group",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "mixed_precision",
    "skip_all_reduce_unused_params",
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that the user wrote, without DataParallel, torch.compile or a running average around it."""
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel around ``model``, if there is one."""
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model


class Wrapped:
    """The DistributedDataParallel in use: refused once its buckets hold parameters that were cut, and made anew."""

    def __init__(self, ddp: DistributedDataParallel | None) -> None:
        """Remember it without keeping it alive."""
        self._ddp: Any = (lambda: None) if ddp is None else weakref.ref(ddp)
        self._processes = None if ddp is None else ddp.process_group
        self._stale = False

    def now(self) -> DistributedDataParallel | None:
        """The wrapper, while it lives."""
        return self._ddp()  # type: ignore[no-any-return]

    def group(self) -> Group | None:
        """The ranks that train the model: the wrapper's, else all; None without torch.distributed or with one."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        return Group(self._processes) if dist.get_world_size(self._processes) > 1 else None

    def retire(self) -> None:
        """After a cut: its buckets hold parameters that the module no longer has, so its gradients would be local."""
        ddp = self.now()
        if ddp is not None and not self._stale:
            self._stale = True
            ddp.register_forward_pre_hook(_refuse_forward)

    def renewed(self, ddp: DistributedDataParallel, changes: Mapping[str, Any]) -> DistributedDataParallel:
        """``ddp`` itself while it serves, else its module in a new one with the same settings but for ``changes``."""
        if ddp is self.now() and not self._stale and not changes:
            return ddp
        settings = {name: getattr(ddp, name) for name in _DDP_SETTINGS if hasattr(ddp, name)}
        if getattr(ddp, "bucket_bytes_cap_default", True) is False:
            settings["bucket_cap_mb"] = ddp.bucket_bytes_cap / 2**20
        # The newer name of broadcast_buffers; without it the buffers are each rank's own and must stay so.
        syncs = "forward_sync_buffers" if hasattr(ddp, "forward_sync_buffers") else "broadcast_buffers"
        settings[syncs] = getattr(ddp, syncs)
        settings["init_sync"] = settings[syncs]
        if "device_mesh" in changes:
            settings.pop("process_group", None)
        new = DistributedDataParallel(ddp.module, **{**settings, **changes})
        new.train(ddp.training)
        self._ddp, self._stale, self._processes = weakref.ref(new), False, new.process_group
        return new


def _refuse_forward(module: nn.Module, args: Any) -> None:
    raise RuntimeError(
        "this DistributedDataParallel was made before a cut and would no longer average the gradients; wrap the "
        "module anew: model = demp.rewrap(model)"
    )


@dataclass(frozen=True)
class Group:
    """The ranks that train one model together, two or more; every rank makes the same calls."""

    group: Any = None

    def reduced(self, values: Tensor, op: Any) -> Tensor:
        """``values`` reduced over the ranks, on the CPU."""
        backend = str(dist.get_backend(self.group))
        device = "cpu" if "gloo" in backend or "mpi" in backend else torch.accelerator.current_accelerator()
        here = values.to(device, copy=True)
        dist.all_reduce(here, op=op, group=self.group)
        return here.cpu()

    def agree(self, what: str, numbers: Sequence[int]) -> None:
        """Raise RuntimeError on every rank if ``numbers`` are not the same on all."""
        mine = torch.tensor(list(numbers), dtype=torch.int64, device="cpu")
        both = self.reduced(torch.cat([mine, -mine]), dist.ReduceOp.MAX)
        if not torch.equal(both[: len(mine)], -both[len(mine) :]):
            raise RuntimeError(
                f"the ranks differ in {what} (here {list(numbers)}); give every rank the same model and arguments, and "
                "call step() on all of them"
            )

    def failed(self, error: BaseException | None) -> bool:
        """Whether an error occurred on any rank; called by all, so that none waits for one that raised."""
        return bool(self.reduced(torch.tensor([int(error is not None)], device="cpu"), dist.ReduceOp.MAX).item())


def together(
    group: Group | None,
    live: Mapping[str, Tensor],
    mean: Mapping[str, Tensor],
    seen: Mapping[str, Tensor],
    batches: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Masks OR-ed, mean activations averaged and batches summed over the ranks.

    Args:
        group: the ranks, or None.
        live: bool masks by layer, the same layers on every rank.
        mean: mean absolute activations by layer, float64.
        seen: bool masks by layer of the units that this rank evaluated; a unit that no rank did is live.
        batches: batches with examples that this rank drew.
    """
    if group is None or not live:
        return dict(live), dict(mean), batches
    sizes = [live[name].numel() for name in live]
    unseen, dead = 0, 1  # 2: live, so that the largest of the ranks' verdicts holds
    flags = torch.cat([torch.where(seen[name], live[name] + dead, unseen).to(torch.uint8) for name in live])
    sums = [(mean[name] if batches else torch.zeros_like(mean[name])) * batches for name in live]
    flags = group.reduced(flags, dist.ReduceOp.MAX)
    totals = group.reduced(
        torch.cat([*sums, torch.tensor([batches], dtype=torch.float64, device="cpu")]), dist.ReduceOp.SUM
    )
    total = int(totals[-1])
    means = (totals[:-1] / max(total, 1)).split(sizes)
    return dict(zip(live, (flags != dead).split(sizes), strict=True)), dict(zip(live, means, strict=True)), total
