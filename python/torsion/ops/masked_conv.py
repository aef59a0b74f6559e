"""Convolutions that compute their live channels only; specification in :mod:`torsion.reference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torsion.ops import _activations, _entry, _groups
from torsion.ops._blocks import Axis, axis, check_kind, gather, met_finite, scatter_, silence_, silenced
from torsion.ops._policy import conv_is_dense
from torsion.ops.masked import all_live
from torsion.reference import masked as reference

OP = "masked_conv2d"
Pair = int | Sequence[int]


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_idx: Tensor | None = None,
    out_idx: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    act: str = "none",
    *,
    x_compact: bool = False,
    y_compact: bool = False,
) -> Tensor:
    """A convolution on live channels only, with autograd; see :func:`masked_linear` for what that means.

    Nothing that is dead in x, in the incoming gradient or in the weight has an effect. Live channels are packed, a
    convolution of the live sizes is computed, and the result spread; x may be contiguous or channels_last. With groups,
    each is padded with channels of zeros to the most that one group has alive; groups without a live output are left
    out. On a CPU, where nearly all live, the convolution has the full sizes and the dead are silenced by zeros.

    Args:
        x: ``[B, K, H, W]`` or ``[K, H, W]``; with ``x_compact`` its live channels only.
        weight: ``[N, K / groups, kh, kw]``, of the same dtype.
        bias: ``[N]``, or None.
        in_idx: int32 ``[K']``: live input channels, ascending and unique; None: all. May be empty.
        out_idx: int32 ``[N']``: live output channels, likewise.
        stride: one number or two, as for ``F.conv2d``.
        padding: one number, two, "valid" or "same".
        dilation: one number or two.
        groups: of the convolution.
        act: "none", "relu", "gelu" (the erf form) or "silu".
        x_compact: x holds the live channels only; not with groups.
        y_compact: return the live channels only; not with groups.

    Returns:
        ``[B, N, Ho, Wo]``, in the memory format of ``F.conv2d``. Not twice differentiable.

    Raises:
        ValueError: shapes or lists that do not fit, an unknown activation; names the argument.
        TypeError: dtypes that differ, a list that is not int32.
    """
    if act not in _activations.ACTIVATIONS:
        raise ValueError(f"{OP}: act={act!r} is unknown; use one of {', '.join(_activations.ACTIVATIONS)}")
    if weight.dim() != 4 or x.dim() not in (3, 4):
        raise ValueError(
            f"{OP}: weight must be [N, K / groups, kh, kw] and x [B, K, H, W], are {list(weight.shape)} and "
            f"{list(x.shape)}"
        )
    _check(x, weight, bias, in_idx, out_idx, groups, x_compact, y_compact)
    x, weight, bias = _entry.cast_for_autocast(x, weight, bias)
    _entry.check_dtypes(OP, x, weight, bias)
    if all_live(in_idx, weight.shape[1] * groups) and all_live(out_idx, weight.shape[0]):
        _entry.look_into(OP, weight, in_idx, out_idx)
        return _activations.plain(F.conv2d(x, weight, bias, stride, padding, dilation, groups), act)
    if not x_compact and not y_compact and _entry.asks_for_reference():
        _axes(weight, in_idx, out_idx, groups)
        return reference.masked_conv2d(x, weight, bias, in_idx, out_idx, stride, padding, dilation, groups, act)
    x, pads = _padded(x, weight, stride, padding, dilation)
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    arguments = (
        batch, weight, bias, in_idx, out_idx, _pair("stride", stride), pads, _pair("dilation", dilation), groups, act,
        x_compact, y_compact, _entry.needs_grad(x, weight, bias),
    )  # fmt: skip
    if _entry.is_eager(x, weight):
        y = _Eager.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        y = torch.ops.torsion.masked_conv2d_forward(*arguments)[0]
    return y if x.dim() == 4 else y.squeeze(0)  # type: ignore[no-any-return]


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_idx: Tensor | None, out_idx: Tensor | None, groups: int,
    x_compact: bool, y_compact: bool,
) -> None:  # fmt: skip
    n, k = weight.shape[0], weight.shape[1] * groups
    if groups < 1 or n % groups:
        raise ValueError(f"{OP}: groups={groups} does not divide the {n} output channels")
    if groups > 1 and (x_compact or y_compact):
        raise ValueError(f"{OP}: groups={groups} takes all channels and gives all; leave x_compact and y_compact")
    check_kind(OP, "in_idx", in_idx, k, weight.device)
    check_kind(OP, "out_idx", out_idx, n, weight.device)
    width = in_idx.shape[0] if x_compact and in_idx is not None else k
    if x.shape[-3] != width:
        raise ValueError(f"{OP}: x has {x.shape[-3]} channels, the weight takes {width}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{OP}: bias must have shape [{n}], has {list(bias.shape)}")


def _pair(name: str, value: Pair) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) == 1:
        pair = pair * 2
    least = 0 if name == "padding" else 1
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{OP}: {name}={value} must be one number or two, each at least {least}")
    return pair


def _padded(x: Tensor, weight: Tensor, stride: Pair, padding: Pair | str, dilation: Pair) -> tuple[Tensor, list[int]]:
    """X and the padding as two numbers; "same" may need one row or column more at the end, which x then gets."""
    if not isinstance(padding, str):
        return x, _pair("padding", padding)
    if padding == "valid":
        return x, [0, 0]
    if padding != "same":
        raise ValueError(f"{OP}: padding={padding!r} must be numbers, 'valid' or 'same'")
    if _pair("stride", stride) != [1, 1]:
        raise ValueError(f"{OP}: padding='same' needs stride 1, is {stride}")
    total = [d * (k - 1) for d, k in zip(_pair("dilation", dilation), weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        x = F.pad(x, [0, total[1] % 2, 0, total[0] % 2])
    return x, [t // 2 for t in total]


# Memory formats: channels as planes, or as the columns of a matrix


def _is_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _format(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def _flat(t: Tensor, last: bool) -> Tensor:
    """``[B, C, H, W]`` as ``[B, C, H W]``, or ``[B H W, C]`` of channels_last; a view of a tensor of that format."""
    b, c, h, w = t.shape
    return t.permute(0, 2, 3, 1).reshape(b * h * w, c) if last else t.reshape(b, c, h * w)


def _shaped(t: Tensor, like: Sequence[int], channels: int, last: bool) -> Tensor:
    b, _, h, w = like
    return t.view(b, h, w, channels).permute(0, 3, 1, 2) if last else t.view(b, channels, h, w)


def _channels(t: Tensor, index: Tensor | None, last: bool) -> Tensor:
    """The listed channels, new, in the given format; -1 stands for zeros."""
    t = t.contiguous(memory_format=_format(last))
    if index is None:
        return t
    return _shaped(gather(_flat(t, last), None, index), t.shape, index.numel(), last)


def _spread(t: Tensor, index: Tensor | None, channels: int, last: bool) -> Tensor:
    """The listed channels among ``channels``, zeros elsewhere."""
    if index is None:
        return t
    b, _, h, w = t.shape
    full = torch.empty((b, channels, h, w), dtype=t.dtype, device=t.device, memory_format=_format(last))
    scatter_(_flat(full, last), _flat(t.contiguous(memory_format=_format(last)), last), None, index)
    return full


def _kernel(weight: Tensor, out: Axis, inp: Axis) -> Tensor:
    """Live block of the weight; channels_last where the whole is."""
    n, k, kh, kw = weight.shape
    if out.index is None and inp.index is None:
        return weight
    flat = weight.reshape(n, k, kh * kw)
    return gather(flat, out.index, inp.index).view(out.live, inp.live, kh, kw)


def _packed(weight: Tensor, groups: _groups.Groups) -> Tensor:
    n, k, kh, kw = weight.shape
    packed = _groups.pack(weight.reshape(n, k, kh * kw), groups)
    return packed.view(*packed.shape[:2], kh, kw)


def _size(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    if min(size) <= 0:
        raise ValueError(f"{OP}: x of {list(x.shape[2:])} is smaller than the kernel of {list(weight.shape[2:])}")
    return size


def _axes(weight: Tensor, in_idx: Tensor | None, out_idx: Tensor | None, groups: int) -> tuple[Axis, Axis]:
    inp = axis(OP, "in_idx", in_idx, weight.shape[1] * groups, weight.device)
    return inp, axis(OP, "out_idx", out_idx, weight.shape[0], weight.device)


class _Call:
    """What forward and backward have in common."""

    def __init__(
        self, x: Tensor, weight: Tensor, in_idx: Tensor | None, out_idx: Tensor | None, stride: list[int],
        padding: list[int], dilation: list[int], groups: int, x_compact: bool, y_compact: bool,
    ) -> None:  # fmt: skip
        self.inp, self.out = _axes(weight, in_idx, out_idx, groups)
        self.size = _size(x, weight, stride, padding, dilation)
        self.last = _is_last(x) or _is_last(weight)
        self.dense = conv_is_dense(x, self.size, weight, in_idx, out_idx, groups, x_compact or y_compact)
        self.packed = None
        if groups > 1 and not self.dense:
            self.packed = _groups.plan(self.inp, self.out, groups, weight.device)
        self.groups = 1 if self.packed is None else self.packed.count
        self.in_list = self.inp.index if self.packed is None else self.packed.inputs
        self.x_compact = x_compact
        # torch has no convolution over no channel, or into none.
        self.empty = self.out.live == 0 or (self.packed is None and self.inp.live == 0)

    def x(self, x: Tensor) -> Tensor:
        return _channels(x, None if self.x_compact else self.in_list, self.last)

    def weight(self, weight: Tensor) -> Tensor:
        w = _kernel(weight, self.out, self.inp) if self.packed is None else _packed(weight, self.packed)
        return w.contiguous(memory_format=_format(self.last))


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_idx: Tensor | None, out_idx: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, act: str, x_compact: bool, y_compact: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = _Call(x, weight, in_idx, out_idx, stride, padding, dilation, groups, x_compact, y_compact)
    packed = call.packed
    if call.dense:
        z = _dense_forward(call, x, weight, bias, stride, padding, dilation, groups)
        return _activations.apply(z, act) if save or act == "relu" else (_activations.plain(z, act), x.new_empty(0))
    live = None if bias is None else bias if call.out.index is None else bias.index_select(0, call.out.index)
    if call.empty:
        shape = (x.shape[0], call.out.live, *call.size)
        z = torch.zeros(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=_format(call.last))
        z = z if live is None else z.add_(live.view(1, -1, 1, 1))
    elif packed is None or packed.places is None:
        z = F.conv2d(call.x(x), call.weight(weight), live, stride, padding, dilation, call.groups)
    else:
        z = F.conv2d(call.x(x), call.weight(weight), None, stride, padding, dilation, call.groups)
        z = _channels(z, packed.places, call.last)
        z = z if live is None else z.add_(live.view(1, -1, 1, 1))
    z = z.contiguous(memory_format=_format(call.last))
    y, saved = _activations.apply(z, act) if save or act == "relu" else (_activations.plain(z, act), x.new_empty(0))
    return y if y_compact else _spread(y, call.out.index, call.out.size, call.last), saved


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor, in_idx: Tensor | None, out_idx: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, act: str, x_compact: bool,
    y_compact: bool, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _Call(x, weight, in_idx, out_idx, stride, padding, dilation, groups, x_compact, y_compact)
    if call.dense:
        dz = _activations.backward(dy.contiguous(memory_format=_format(call.last)), saved, act, False)
        return _dense_backward(call, dz, x, weight, stride, padding, dilation, groups, wanted)
    none = dy.new_empty(0)
    chosen = None if y_compact else call.out.index
    live = _channels(dy, chosen, call.last)
    dz = _activations.backward(live, saved, act, live is not dy and chosen is not None)
    db = none
    if wanted[2]:
        db = dz.sum((0, 2, 3))
        db = db if call.out.index is None else db.new_zeros(call.out.size).index_copy_(0, call.out.index.long(), db)
    if call.empty:
        return _zeros(x, wanted[0]), _zeros(weight, wanted[1]), db
    if call.packed is not None and call.packed.places is not None:
        dz = _spread(dz, call.packed.places, call.packed.outputs.numel(), call.last)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dz, call.x(x), call.weight(weight), None, stride, padding, dilation, False, [0, 0], call.groups,
        [wanted[0], wanted[1], False],
    )  # fmt: skip
    return _whole_dx(dx, x, call) if wanted[0] else none, _whole_dw(dw, weight, call) if wanted[1] else none, db


def _dense_forward(
    call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    kept = _silenced_weight(call, weight, groups)
    bias = None if bias is None else silenced(bias.view(1, -1), None, call.out).view(-1)
    z = F.conv2d(x, kept, bias, stride, padding, dilation, groups)
    # What is dead meets zeros in the weight and is silent as long as it is finite; what is not shows in every channel
    # of its group, for 0 times Inf and 0 times NaN are NaN.
    if not met_finite(z, groups):
        z = F.conv2d(_silenced(x, call.inp, call.last), kept, bias, stride, padding, dilation, groups)
        z = _silenced(z, call.out, call.last)
    return z.contiguous(memory_format=_format(call.last))


def _dense_backward(
    call: _Call, dz: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int],
    groups: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kept = _silenced_weight(call, weight, groups)

    def gradients(dz: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
            dz, x, kept, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, wanted
        )

    none = dz.new_empty(0)
    dx, dw, db = gradients(dz, wanted)
    if wanted[0] and not met_finite(dx, groups):
        dx = _silenced(gradients(_silenced(dz, call.out, call.last), [True, False, False])[0], call.inp, call.last)
    dx = dx.contiguous(memory_format=_format(call.last)) if wanted[0] else none
    # In the gradients of weight and bias what is dead meets itself alone.
    dw = _silenced_weight(call, dw, groups, own=True) if wanted[1] else none
    return dx, dw, silence_(db.view(1, -1), None, call.out).view(-1) if wanted[2] else none


def _flags(ax: Axis) -> Tensor:
    if ax.index is None:
        return torch.ones(ax.size, dtype=torch.bool)
    return torch.zeros(ax.size, dtype=torch.bool).index_fill_(0, ax.index.long(), True)


def _silenced_weight(call: _Call, weight: Tensor, groups: int, *, own: bool = False) -> Tensor:
    """With zeros in what is dead on either side; a copy, or the tensor itself where that is the caller's ``own``."""
    n, k, kh, kw = weight.shape
    if groups == 1 and weight.is_contiguous():
        silent = silence_ if own else silenced
        return silent(weight.view(n, k, kh * kw), call.out, call.inp).view(weight.shape)
    out, inp = _flags(call.out).view(groups, -1, 1), _flags(call.inp).view(groups, 1, -1)
    return weight.where((out & inp).view(n, -1, 1, 1), 0)


def _silenced(t: Tensor, ax: Axis, last: bool) -> Tensor:
    """A copy with zeros in dead channels."""
    t = t.contiguous(memory_format=_format(last))
    return _shaped(silenced(_flat(t, last), None, ax), t.shape, t.shape[1], last)


def _zeros(t: Tensor, wanted: bool) -> Tensor:
    return torch.zeros_like(t) if wanted else t.new_empty(0)


def _whole_dx(dx: Tensor, x: Tensor, call: _Call) -> Tensor:
    return dx if call.x_compact else _spread(dx, call.in_list, x.shape[1], call.last)


def _whole_dw(dw: Tensor, weight: Tensor, call: _Call) -> Tensor:
    if call.packed is None and call.out.index is None and call.inp.index is None:
        return dw
    n, k, kh, kw = weight.shape
    flat = dw.contiguous().view(*dw.shape[:2], kh * kw)
    if call.packed is None:
        full = scatter_(flat.new_empty(n, k, kh * kw), flat, call.out.index, call.inp.index)
    else:
        full = _groups.unpack(flat, [n, k, kh * kw], call.packed)
    return full.view(n, k, kh, kw)


class _Eager(torch.autograd.Function):
    """The ops below without the dispatcher, see :mod:`torsion.ops.masked`."""

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


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_idx: Tensor | None, out_idx: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, act: str, x_compact: bool, y_compact: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    live = weight.shape[0] if out_idx is None else out_idx.shape[0]
    size = _size(x, weight, stride, padding, dilation)
    form = _format(_is_last(x) or _is_last(weight))
    y = torch.empty(
        (x.shape[0], live if y_compact else weight.shape[0], *size), dtype=x.dtype, device=x.device, memory_format=form
    )
    dense = conv_is_dense(x, size, weight, in_idx, out_idx, groups, x_compact or y_compact)
    kept = weight.shape[0] if dense else live
    shape, bits = _activations.saved_shape(act if save or act == "relu" else "none", (x.shape[0], kept, *size))
    if bits or len(shape) == 1:
        return y, x.new_empty(shape, dtype=torch.uint8 if bits else x.dtype)
    return y, torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, saved: Tensor, in_idx: Tensor | None, out_idx: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, act: str, x_compact: bool,
    y_compact: bool, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    form = _format(_is_last(x) or _is_last(weight))
    none = dy.new_empty(0)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=form) if wanted[0] else none
    dw = torch.empty(weight.shape, dtype=x.dtype, device=x.device) if wanted[1] else none
    return dx, dw, dy.new_empty(weight.shape[0]) if wanted[2] else none


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, in_idx, out_idx, *options, _ = inputs
    ctx.save_for_backward(x, weight, output[1], in_idx, out_idx)
    ctx.options = options
    ctx.wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, backward: Callable[..., tuple[Tensor, ...]]) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 13
    x, weight, saved, in_idx, out_idx = ctx.saved_tensors
    grads = backward(dy, x, weight, saved, in_idx, out_idx, *ctx.options, ctx.wanted)
    return (*(g if w else None for g, w in zip(grads, ctx.wanted, strict=True)), *(None,) * 10)


def _autograd(ctx: Any, dy: Tensor | None, _dsaved: Tensor | None) -> tuple[Any, ...]:
    return _gradients(ctx, dy, torch.ops.torsion.masked_conv2d_backward)


_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str act, bool x_compact, "
_entry.define(
    "masked_conv2d_forward",
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor? in_idx, Tensor? out_idx, {_GEOMETRY}bool y_compact, bool save) "
    "-> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_entry.define(
    "masked_conv2d_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor saved, Tensor? in_idx, Tensor? out_idx, "
    f"{_GEOMETRY}bool y_compact, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_entry.differentiate("masked_conv2d_forward", _setup, _autograd)
_entry.refuse_second_backward("masked_conv2d_backward", OP)
_entry.define_composite(
    OP,
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? in_idx=None, Tensor? out_idx=None, SymInt[2] stride=1, "
    "SymInt[2] padding=0, SymInt[2] dilation=1, SymInt groups=1, str act='none') -> Tensor",
    masked_conv2d,
)
