"""Linear layers that compute their live units only; specification in :mod:`torsion.reference`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torsion.ops import _activations, _entry, _native
from torsion.ops._blocks import Axis, axis, check_kind, gather, keep_bits_, relu_bits_, scatter_
from torsion.ops._policy import linear_is_dense
from torsion.reference import masked as reference

OP = "masked_linear"


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_idx: Tensor | None = None,
    out_idx: Tensor | None = None,
    act: str = "none",
    *,
    x_compact: bool = False,
    y_compact: bool = False,
) -> Tensor:
    """A linear layer on live units only, with autograd (DemP, arXiv 2403.07688).

    It computes ::

        y[..., out] = act(x[..., in] @ weight[out, in].T + bias[out]),   y elsewhere 0

    Dead columns of x, dead entries of the incoming gradient and dead rows and columns of the weight are never read:
    they may hold NaN. Gradients of dead entries are 0. With all live it is ``F.linear`` and torch's activation, bit for
    bit. Forward and backward are three matrix products of the live sizes. Live units that come first
    (:class:`LivePrefix`) are taken as views of x and weight, others are gathered at each call. Where nearly all live
    gathers would cost more than they spare: the products have the full sizes, and zeros silence the dead.

    Args:
        x: ``[..., K]``, float32, float64, bfloat16 or float16; ``[..., K']`` with ``x_compact``.
        weight: ``[N, K]``, of the same dtype.
        bias: ``[N]``, or None.
        in_idx: int32 ``[K']`` on the layer's device: live inputs, ascending and unique; None: all. May be empty.
        out_idx: int32 ``[N']``: live outputs, likewise.
        act: "none", "relu", "gelu" (the erf form) or "silu". Saved for the backward are 1 bit per live output for relu,
            the live pre-activations for gelu and silu (all outputs where nearly all live); x and weight by reference.
        x_compact: x holds the live inputs only.
        y_compact: return the live outputs only, ``[..., N']``.

    Returns:
        ``[..., N]``. Under autocast computed in its dtype, as ``F.linear``. Not twice differentiable.

    Raises:
        ValueError: shapes or lists that do not fit, an unknown activation; names the argument. Lists are looked into at
            every call on the CPU, elsewhere when they are new.
        TypeError: dtypes that differ, a list that is not int32.
    """
    _check(x, weight, bias, in_idx, out_idx, act, x_compact)
    in_idx, out_idx = (i if i is None or i.is_contiguous() else i.contiguous() for i in (in_idx, out_idx))
    x, weight, bias = _entry.cast_for_autocast(x, weight, bias)
    _entry.check_dtypes(OP, x, weight, bias)
    if all_live(in_idx, weight.shape[1]) and all_live(out_idx, weight.shape[0]):
        _entry.look_into(OP, weight, in_idx, out_idx)
        return _activations.plain(F.linear(x, weight, bias), act)
    if not x_compact and not y_compact and _entry.asks_for_reference():
        _axes(weight, in_idx, out_idx)
        return reference.masked_linear(x, weight, bias, in_idx, out_idx, act)
    arguments = (x, weight, bias, in_idx, out_idx, act, x_compact, y_compact, _entry.needs_grad(x, weight, bias))
    if _entry.is_eager(x, weight):
        return _Eager.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.torsion.masked_linear_forward(*arguments)[0]  # type: ignore[no-any-return]


def all_live(index: Tensor | None, size: int) -> bool:
    """Whether an ascending list of units without repetitions must be all of them."""
    return index is None or index.shape[0] == size


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_idx: Tensor | None, out_idx: Tensor | None, act: str,
    x_compact: bool,
) -> None:  # fmt: skip
    if act not in _activations.ACTIVATIONS:
        raise ValueError(f"{OP}: act={act!r} is unknown; use one of {', '.join(_activations.ACTIVATIONS)}")
    if weight.dim() != 2 or x.dim() < 1:
        raise ValueError(f"{OP}: weight must be [N, K] and x [..., K], are {list(weight.shape)} and {list(x.shape)}")
    n, k = weight.shape
    check_kind(OP, "in_idx", in_idx, k, weight.device)
    check_kind(OP, "out_idx", out_idx, n, weight.device)
    width = in_idx.shape[0] if x_compact and in_idx is not None else k
    if x.shape[-1] != width:
        raise ValueError(f"{OP}: x has {x.shape[-1]} columns, the weight takes {width}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{OP}: bias must have shape [{n}], has {list(bias.shape)}")


# Plain torch around the products: other devices, and a build without compiled code


def _columns(t: Tensor, ax: Axis) -> Tensor:
    """Live columns of ``[M, size]``: a view where they come first, else new."""
    return t if ax.whole else t[:, : ax.live] if ax.prefix else gather(t, None, ax.index)


def _block(weight: Tensor, out: Axis, inp: Axis) -> Tensor:
    if out.prefix and inp.prefix:
        return weight[: out.live, : inp.live]
    return gather(weight, out.index, inp.index)


def _spread(t: Tensor, rows: Axis | None, columns: Axis) -> Tensor:
    """``[live, live]`` as ``[size, size]`` with zeros."""
    if columns.whole and (rows is None or rows.whole):
        return t
    full = t.new_empty(t.shape[0] if rows is None else rows.size, columns.size)
    return scatter_(full, t, None if rows is None else rows.index, columns.index)


def _plain_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_idx: Tensor | None, out_idx: Tensor | None, relu: bool,
    x_compact: bool, y_compact: bool, dense: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inp, out = _axes(weight, in_idx, out_idx)
    w = _block(weight, out, inp).t()
    rows = x if x_compact else _columns(x, inp)
    z = torch.mm(rows, w) if bias is None else torch.addmm(_columns(bias.unsqueeze(0), out).squeeze(0), rows, w)
    if dense:
        z = _spread(z, None, out)
        return z, relu_bits_(z) if relu else x.new_empty(0)
    bits = relu_bits_(z) if relu else x.new_empty(0)
    return z if y_compact else _spread(z, None, out), bits


def _plain_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bits: Tensor, in_idx: Tensor | None, out_idx: Tensor | None, relu: bool,
    x_compact: bool, y_compact: bool, dense: bool, want_x: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inp, out = _axes(weight, in_idx, out_idx)
    if relu and dense:
        dz = _columns(keep_bits_(dy.contiguous().clone(), bits), out)
    else:
        dz = dy if y_compact else _columns(dy, out)
        dz = keep_bits_(dz.contiguous().clone(), bits) if relu else dz
    none = dy.new_empty(0)
    dx, dw, db = none, none, none
    if want_x:
        dx = torch.mm(dz, _block(weight, out, inp))
        dx = dx if x_compact else _spread(dx, None, inp)
    if want_weight:
        dw = _spread(torch.mm(dz.t(), x if x_compact else _columns(x, inp)), out, inp)
    if want_bias:
        db = _spread(dz.sum(0).unsqueeze(0), None, out).squeeze(0)
    return dx, dw, db


def _axes(weight: Tensor, in_idx: Tensor | None, out_idx: Tensor | None) -> tuple[Axis, Axis]:
    inp = axis(OP, "in_idx", in_idx, weight.shape[1], weight.device)
    return inp, axis(OP, "out_idx", out_idx, weight.shape[0], weight.device)


# The layer: activations other than ReLU are torch's, on compact tensors


def _compiled(x: Tensor) -> bool:
    return x.is_cpu and _native.C is not None


# Views cost microseconds that a matrix need not pay.


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    return rows if like.dim() == 2 else rows.view(*like.shape[:-1], rows.shape[1])


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_idx: Tensor | None, out_idx: Tensor | None, act: str,
    x_compact: bool, y_compact: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = _rows(x)
    dense = linear_is_dense(rows.shape[0], weight, in_idx, out_idx, x_compact or y_compact)
    if _entry.asks_for_triton(x) and not dense:
        _axes(weight, in_idx, out_idx)
        kernels = importlib.import_module("torsion.triton_kernels.masked")
        y, saved = kernels.masked_linear_forward(rows, weight, bias, in_idx, out_idx, act, x_compact, y_compact, save)
        return _shaped(y, x), saved
    linear = torch.ops.torsion.linear_forward if _compiled(x) else _plain_forward
    try:
        if act in ("none", "relu"):
            y, saved = linear(rows, weight, bias, in_idx, out_idx, act == "relu", x_compact, y_compact, dense)
        else:
            z, _ = linear(rows, weight, bias, in_idx, out_idx, False, x_compact, not dense, dense)
            y, saved = _activations.plain(z, act), z if save else x.new_empty(0)
            y = y if y_compact or dense else _spread(y, None, _axes(weight, in_idx, out_idx)[1])
    except RuntimeError:
        _axes(weight, in_idx, out_idx)  # raises if it was a list
        raise
    return _shaped(y, x), saved


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor, in_idx: Tensor | None, out_idx: Tensor | None, act: str,
    x_compact: bool, y_compact: bool, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = _rows(dy)
    linear = torch.ops.torsion.linear_backward if _compiled(x) else _plain_backward
    dense = linear_is_dense(rows.shape[0], weight, in_idx, out_idx, x_compact or y_compact)
    if act not in ("none", "relu"):
        live = rows if y_compact or dense else _columns(rows, _axes(weight, in_idx, out_idx)[1])
        rows, y_compact = _activations.backward(live, saved, act, False), not dense
    relu = act == "relu"
    dx, dw, db = linear(
        rows, _rows(x), weight, saved, in_idx, out_idx, relu, x_compact, y_compact, dense, *wanted
    )  # fmt: skip
    return _shaped(dx, x) if wanted[0] else dx, dw, db


class _Eager(torch.autograd.Function):
    """The ops below without the dispatcher, which takes 0.2 ms a step: as long as a layer of 200 units."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        output = _forward(*arguments)
        _setup(ctx, arguments, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        return _gradients(ctx, dy, _backward)


# Registration

_SCHEMA = "Tensor x, Tensor weight, Tensor? bias, Tensor? in_idx, Tensor? out_idx, str act, bool x_compact, "


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_idx: Tensor | None, out_idx: Tensor | None, act: str,
    x_compact: bool, y_compact: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    live = weight.shape[0] if out_idx is None else out_idx.shape[0]
    lead = x.shape[:-1]
    n = 1
    for size in lead:
        n = n * size
    kept = weight.shape[0] if linear_is_dense(n, weight, in_idx, out_idx, x_compact or y_compact) else live
    shape, bits = _activations.saved_shape(act if save or act == "relu" else "none", (n, kept))
    y = x.new_empty(*lead, live if y_compact else weight.shape[0])
    return y, x.new_empty(shape, dtype=torch.uint8 if bits else x.dtype)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor, in_idx: Tensor | None, out_idx: Tensor | None, act: str,
    x_compact: bool, y_compact: bool, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = (tuple(x.shape), tuple(weight.shape), (weight.shape[0],))
    dx, dw, db = (dy.new_empty(s if w else (0,)) for s, w in zip(shapes, wanted, strict=True))
    return dx, dw, db


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, in_idx, out_idx, act, x_compact, y_compact, _ = inputs
    ctx.save_for_backward(x, weight, output[1], in_idx, out_idx)
    ctx.options = act, x_compact, y_compact
    ctx.wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, backward: Callable[..., tuple[Tensor, ...]]) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 9
    x, weight, saved, in_idx, out_idx = ctx.saved_tensors
    grads = backward(dy, x, weight, saved, in_idx, out_idx, *ctx.options, ctx.wanted)
    return (*(g if w else None for g, w in zip(grads, ctx.wanted, strict=True)), *(None,) * 6)


def _autograd(ctx: Any, dy: Tensor | None, _dsaved: Tensor | None) -> tuple[Any, ...]:
    return _gradients(ctx, dy, torch.ops.torsion.masked_linear_backward)


_entry.define(
    "masked_linear_forward", f"({_SCHEMA}bool y_compact, bool save) -> (Tensor, Tensor)", _forward, _fake_forward
)
_entry.define(
    "masked_linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor saved, Tensor? in_idx, Tensor? out_idx, str act, bool x_compact, "
    "bool y_compact, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_entry.differentiate("masked_linear_forward", _setup, _autograd)
_entry.refuse_second_backward("masked_linear_backward", OP)
_entry.define_composite(
    OP,
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? in_idx=None, Tensor? out_idx=None, str act='none') -> Tensor",
    masked_linear,
)
