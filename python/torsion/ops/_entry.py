"""How ops that are made of torch's own products enter the dispatcher."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from torsion.ops import _backends
from torsion.ops._blocks import PLAIN, axis

_library = torch.library.Library("torsion", "FRAGMENT")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def cast_for_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of a layer as autocast would hand them to ``F.linear``."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        # Autocast leaves float64 as it is.
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), cast(weight), None if bias is None else cast(bias)


def check_dtypes(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse operands of different or other dtypes and devices.

    Raises:
        TypeError: dtypes.
        ValueError: devices.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x is {x.dtype}, must be float32, float64, bfloat16 or float16")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.dtype != x.dtype:
            raise TypeError(f"{op}: {name} is {t.dtype}, x is {x.dtype}; cast one of them, or use autocast")
        if t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, x on {x.device}")


def look_into(op: str, weight: Tensor, in_idx: Tensor | None, out_idx: Tensor | None) -> None:
    """Check the lists of a layer of which all is live; those without values, in a compiler's trace, are left out."""
    if torch.compiler.is_compiling():
        return
    for name, index in (("in_idx", in_idx), ("out_idx", out_idx)):
        if index is not None and type(index) in PLAIN:
            axis(op, name, index, index.shape[0], weight.device)


def asks_for_triton(x: Tensor) -> bool:
    """Whether TORSION_BACKEND says that Triton is to compute, and it can; it has no float64."""
    asked = os.environ.get("TORSION_BACKEND") == "triton" and x.dtype != torch.float64
    return asked and not _backends.obstacle("triton", x.device.type)


def asks_for_reference() -> bool:
    """Whether TORSION_BACKEND says that the reference is to compute."""
    return os.environ.get("TORSION_BACKEND") == "reference"


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may come."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_eager(*tensors: Tensor) -> bool:
    """Whether these are plain tensors that nothing traces or transforms."""
    return not torch.compiler.is_compiling() and all(type(t) in PLAIN for t in tensors)


def define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An op with one kernel for every device, whose errors pass as they are."""
    _library.define(name + schema)
    _library.impl(name, kernel, "CPU")
    _library.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"torsion::{name}", fake, lib=_library)


def differentiate(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """The gradient of such an op."""
    torch.library.register_autograd(f"torsion::{name}", backward, setup_context=setup, lib=_library)


def refuse_second_backward(name: str, op: str) -> None:
    """A backward op whose own gradient raises."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del ctx, inputs, output

    def backward(ctx: Any, *grads: Any) -> None:
        del ctx, grads
        raise RuntimeError(f"{op} is not twice differentiable; use torsion.reference.{op}, which is")

    differentiate(name, setup, backward)


def define_composite(name: str, schema: str, function: Callable[..., Any]) -> None:
    """The op that users call through ``torch.ops.torsion``: the function, its errors as RuntimeError."""
    _library.define(name + schema)

    def composite(*args: Any, **keywords: Any) -> Any:
        try:
            return function(*args, **keywords)
        except (ValueError, TypeError) as error:
            raise RuntimeError(str(error)) from error

    _library.impl(name, composite, "CompositeImplicitAutograd")
