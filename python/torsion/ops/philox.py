"""Normals that belong to elements; maths in ``csrc/rules/philox_normal.h``, specified in :mod:`torsion.reference`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torsion.ops import _plain
from torsion.reference import demp

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _fill_(out: Tensor, seed: int, step: int, tensor_id: int) -> None:
    out.copy_(demp.philox_normal(out.shape, seed, step, tensor_id, out.dtype, out.device))


_plain.register("philox_normal_", _fill_, (0,))

_library = torch.library.Library("torsion", "FRAGMENT")
_library.define(
    "philox_normal(SymInt[] shape, int seed, int step, int tensor_id, ScalarType dtype=float32, "
    'Device device="cpu") -> Tensor'
)


def _composite(
    shape: Sequence[int],
    seed: int,
    step: int,
    tensor_id: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=device)
    torch.ops.torsion.philox_normal_(out, seed, step, tensor_id)
    return out


_library.impl("philox_normal", _composite, "CompositeImplicitAutograd")


def philox_normal(
    shape: Sequence[int],
    seed: int,
    step: int,
    tensor_id: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    backend: str | None = None,
) -> Tensor:
    """Standard normal numbers that depend on nothing but their key and their place: no state, no order of drawing.

    Element e of the tensor, counted row by row, is number ``e & 3`` of the Philox4x32-10 block with the counter
    ``(e >> 2, step, tensor_id)`` and the key ``seed``, by Box and Muller. A part of the tensor can so be computed
    alone, and torch's generator is not touched.

    Args:
        shape: of the result; any, also empty.
        seed: in [0, 2^64).
        step: in [0, 2^32).
        tensor_id: in [0, 2^32).
        dtype: float64 takes 32 bits of a word, float32 23, so their numbers differ from the eighth digit on;
            bfloat16 and float16 are the float32 ones, rounded to nearest.
        device: where the result lies.
        backend: "cuda", "triton", "cpu" or "reference"; TORSION_BACKEND or the best for the device when None.

    Returns:
        Contiguous tensor of ``shape``. On the CPU the same bits for every instruction set and number of threads; the
        reference differs by at most 2^-21 of a number in float32, 6e-15 in float64.

    Raises:
        ValueError: seed, step or tensor_id out of range, a negative size, a back end that cannot run here.
        TypeError: one of them is no int, or a dtype that is no such type.
    """
    if dtype not in DTYPES:
        raise TypeError(f"philox_normal: dtype={dtype} must be float32, float64, bfloat16 or float16")
    if any(size < 0 for size in shape):
        raise ValueError(f"philox_normal: shape={tuple(shape)} has a negative size")
    key = _plain.random_key("philox_normal", seed, step, [tensor_id])
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    _plain.run_("philox_normal_", out.device.type, backend, out, key, step, tensor_id)
    return out
