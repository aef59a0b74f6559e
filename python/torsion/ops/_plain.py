"""Ops that work in place on tensors of one device and have one signature on every back end."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torsion.ops import _backends, _native

_library = torch.library.Library("torsion", "IMPL")
_references: dict[str, Callable[..., None]] = {}
_written: dict[str, tuple[int, ...]] = {}


def register(name: str, reference: Callable[..., None], written: tuple[int, ...]) -> None:
    """Give the dispatcher what no compiled module registered: Triton or the reference, and counts of versions.

    Args:
        name: of an op in ``_native``'s schemas.
        reference: takes the op's arguments, all of them by position.
        written: positions of the arguments, tensors or lists, that are written.
    """
    _references[name], _written[name] = reference, written
    op = getattr(torch.ops.torsion, name).default
    defaults = [a.default_value for a in op._schema.arguments]

    def kernel(device: str) -> Callable[..., None]:
        def run(*args: Any) -> None:
            with torch.no_grad():
                _function(name, _behind_op(name, device))(*args, *defaults[len(args) :])

        return run

    if _native.C is None:
        _library.impl(name, kernel("cpu"), "CPU")
    if _native.C_cuda is None:
        _library.impl(name, kernel("cuda"), "CUDA")

    def counting(keyset: Any, *args: Any) -> None:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        torch.autograd.graph.increment_version(_tensors(args, written))

    _library.impl(name, counting, "ADInplaceOrView", with_keyset=True)


def run_(name: str, device: str, backend: str | None, *args: Any) -> None:
    """The op on the back end asked for, TORSION_BACKEND's, or the best for the device.

    Raises:
        ValueError: the back end is unknown, has no kernel for the op or cannot run here.
    """
    chosen = _backends.choose(device, backend, _kernels(name))[0]
    with torch.no_grad():
        if chosen not in ("triton", "reference"):
            getattr(torch.ops.torsion, name)(*args)
            return
        _function(name, chosen)(*args)
        torch.autograd.graph.increment_version(_tensors(args, _written[name]))


def _kernels(name: str) -> tuple[str, ...]:
    return _backends.KERNELS.get(name) or _backends.KERNELS[name.rstrip("_")]


def _behind_op(name: str, device: str) -> str:
    """The back end written in Python that ``torch.ops.torsion`` runs on; TORSION_BACKEND is for functions."""
    triton = device == "cuda" and "triton" in _kernels(name) and not _backends.obstacle("triton", device)
    return "triton" if triton else "reference"


def _function(name: str, backend: str) -> Callable[..., None]:
    if backend == "triton":
        return getattr(importlib.import_module("torsion.triton_kernels.demp"), name)  # type: ignore[no-any-return]
    return _references[name]


def _tensors(args: tuple[Any, ...], positions: Iterable[int]) -> list[Tensor]:
    found: list[Tensor] = []
    for k in positions:
        found += [args[k]] if isinstance(args[k], Tensor) else list(args[k])
    return found


_WORD = 2**32


def random_key(op: str, seed: int, step: int, tensor_ids: Iterable[int]) -> int:
    """Check the numbers a random stream is keyed by; return ``seed`` as the int64 that the dispatcher carries.

    Raises:
        TypeError: one that is no integer.
        ValueError: one out of range.
    """
    for name, x, end, shown in (
        ("seed", seed, 2**64, "2^64"),
        ("step", step, _WORD, "2^32"),
        *(("tensor_id", t, _WORD, "2^32") for t in tensor_ids),
    ):
        if isinstance(x, bool) or not isinstance(x, int):
            raise TypeError(f"{op}: {name} must be an int, is {type(x).__name__}")
        if not 0 <= x < end:
            raise ValueError(f"{op}: {name}={x} lies outside [0, {shown})")
    return seed - 2**64 if seed >= 2**63 else seed
