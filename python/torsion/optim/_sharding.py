"""DTensor parameters (FSDP2, tensor parallelism): local parts, and sums that count each logical element once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_dtensor(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor; does not import ``torch.distributed.tensor`` to find out."""
    if type(t) is Tensor or type(t) is torch.nn.Parameter:
        return False
    return hasattr(t, "_local_tensor") and hasattr(t, "placements")


def local(t: Tensor) -> Tensor:
    """The part of ``t`` that this process holds."""
    return t._local_tensor if is_dtensor(t) else t  # type: ignore[attr-defined]


def matching(param: Any, t: Any) -> Tensor:
    """``t`` sharded as ``param`` is; pending sums are carried out."""
    if is_dtensor(param) and (t.placements != param.placements or t.device_mesh != param.device_mesh):
        t = t.redistribute(param.device_mesh, param.placements)
    return t  # type: ignore[no-any-return]


class Mesh:
    """The ranks over which a step's sums are added: the largest mesh that a parameter lies on."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        """Find the mesh.

        Raises:
            ValueError: parameters lie on meshes none of which holds all the ranks of the others.
        """
        meshes = {id(p.device_mesh): p.device_mesh for p in params if is_dtensor(p)}  # type: ignore[attr-defined]
        self.mesh = max(meshes.values(), key=lambda mesh: mesh.size())
        ranks = set(self.mesh.mesh.flatten().tolist())
        for mesh in meshes.values():
            if not ranks.issuperset(mesh.mesh.flatten().tolist()):
                raise ValueError(
                    f"parameters lie on device meshes over different ranks ({self.mesh} and {mesh}); "
                    "give each its own optimizer, or shard them over one mesh"
                )

    def weight(self, param: Any) -> float:
        """Part of this process in the sums of ``param``: 1 / (number of ranks that hold the same elements)."""
        distinct = 1
        if is_dtensor(param):
            mesh = param.device_mesh
            distinct = math.prod(mesh.size(d) for d, place in enumerate(param.placements) if place.is_shard())
        return float(distinct / self.mesh.size())

    @staticmethod
    def first_element(param: Any) -> int:
        """Number of the local part's first element in the whole tensor, rows counted in order; 0 if not by rows."""
        if not is_dtensor(param) or any(place.is_shard() and not place.is_shard(0) for place in param.placements):
            return 0
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        return int(offset[0]) * math.prod(param.shape[1:]) if offset else 0

    def all_reduce_(self, sums: Tensor) -> None:
        """Add ``sums`` over the ranks, in place; the result is the same on all of them."""
        for dim in range(self.mesh.ndim):
            dist.all_reduce(sums, group=self.mesh.get_group(dim))
