"""How channels pass elementwise functions, activations, arithmetic, pooling and reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torsion.prune._follow import Call, Follower, Info, Pending, handles, words
from torsion.prune._symbols import RAW, SHIFTED, ZERO, states_of, symbols_of, with_state


def first(call: Call) -> tuple[Any, Info] | None:
    """First argument and what is known of it; None unless it is the only tensor that is known."""
    info = call.info(call.arg(0, "input"))
    return (call.arg(0, "input"), info) if info is not None and len(call.infos) == 1 else None


def drop_zeros(code: Tensor) -> Tensor:
    """``code`` after something that maps 0 to another value: dead units no longer hold zeros."""
    states = states_of(code)
    return with_state(code, torch.where(states == ZERO, SHIFTED, states))


@handles(
    *words(
        "abs neg negative positive square sqrt pow sign sgn round floor trunc fix frac nan_to_num expm1 log1p erf sinh "
        "tan dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout native_dropout "
        "contiguous clone detach alias to float double half bfloat16 type type_as cuda cpu"
    ),
    "get data",
    "get real",
)
def keeps_zero(follower: Follower, call: Call) -> bool:
    """f(0) = 0, channel by channel."""
    found = first(call)
    if isinstance(call.out, str):  # Tensor.type() without an argument
        return True
    if found is None or isinstance(call.arg(1, "exponent"), Tensor):
        return False
    if call.name == "pow" and not (isinstance(call.args[1], (int, float)) and call.args[1] > 0):
        return False
    info = found[1]
    return follower.put(call.out, info.code, info.pending, info.why)


@handles("exp", "cos", "cosh", "rsqrt", "reciprocal", "log", "log2", "log10", "exp2", "erfc", "bernoulli")
def moves_zero(follower: Follower, call: Call) -> bool:
    """f(0) != 0, channel by channel."""
    found = first(call)
    return found is not None and follower.put(
        call.out, drop_zeros(found[1].code), found[1].pending, found[1].why or call.where
    )


_RELU = ("relu", "relu6")


@handles(
    *_RELU,
    *words(
        "leaky_relu rrelu elu celu selu gelu silu mish hardswish hardtanh hardshrink softshrink tanhshrink threshold "
        "tanh sigmoid hardsigmoid softplus logsigmoid log_sigmoid softsign sin atan asinh arctan arcsinh"
    ),
)
def activation(follower: Follower, call: Call) -> bool:
    """An elementwise nonlinearity of one argument: its output is what tells a dead unit."""
    found = first(call)
    if found is None:
        return False
    relu = call.name in _RELU or (call.name == "hardtanh" and call.arg(1, "min_val", -1.0) >= 0)
    return follower.activate(call, call.out, found[1].code, relu=relu)


@handles("clamp", "clip", "clamp_min", "clamp_max")
def clamp(follower: Follower, call: Call) -> bool:
    """ReLU when it cuts at 0 from below, else a function that keeps 0 where 0 lies within its bounds."""
    found = first(call)
    low = call.arg(1, "max" if call.name == "clamp_max" else "min")
    high = low if call.name == "clamp_max" else call.arg(2, "max")
    low = None if call.name == "clamp_max" else low
    if found is None or isinstance(low, Tensor) or isinstance(high, Tensor):
        return False
    info = found[1]
    if low is not None and low == 0:
        return follower.activate(call, call.out, info.code, relu=True)
    inside = (low is None or low <= 0) and (high is None or high >= 0)
    code = info.code if inside else drop_zeros(info.code)
    return follower.put(call.out, code, info.pending, info.why or call.where)


@handles("prelu")
def prelu(follower: Follower, call: Call) -> bool:
    """PReLU; a weight per channel lies along dimension 1."""
    found = first(call)
    if found is None:
        return False
    x, info = found
    weight = call.arg(1, "weight")
    if weight.numel() > 1:
        name = follower.name_of(weight)
        if name is None or x.dim() < 2:
            return False
        symbols = follower.along(info, 1, x.size(1), call.where)
        follower.symbols.use(name, 0, symbols, row=True)
        module_name, module = follower.module()
        if isinstance(module, torch.nn.PReLU):
            follower.symbols.resize(module_name, "prelu", symbols)
    return follower.activate(call, call.out, info.code, relu=False)


@handles("add", "sub", "subtract", "radd", "rsub")
def addition(follower: Follower, call: Call) -> bool:
    """Channels that meet at an addition are tied."""
    return _binary(follower, call, product=False)


@handles("mul", "multiply", "rmul", "div", "divide", "truediv", "true_divide")
def product(follower: Follower, call: Call) -> bool:
    """Channels that meet at a product are tied; the product with an activation is what tells a dead unit."""
    divisor = call.arg(1, "other")
    if call.name in ("div", "divide", "truediv", "true_divide") and call.info(divisor) is not None:
        return False
    return _binary(follower, call, product=True)


def _binary(follower: Follower, call: Call, *, product: bool) -> bool:
    a, b = call.arg(0, "input"), call.arg(1, "other")
    known_a, known_b = call.info(a), call.info(b)
    if known_a is not None and known_b is not None:
        return _both(follower, call, known_a, known_b, product=product)
    info, other = (known_a, b) if known_a is not None else (known_b, a)
    if info is None:
        return False
    code = _broadcast(info.code, call.out.dim())
    pending, why = info.pending, info.why
    if isinstance(other, Tensor):
        code = _against_fixed(follower, call, code, other)
    if not product and (isinstance(other, Tensor) or other != 0):
        code, why = drop_zeros(code), why or call.where
    return follower.put(call.out, code, pending, why)


def _against_fixed(follower: Follower, call: Call, code: Tensor, other: Tensor) -> Tensor:
    """The code after ``other``, which carries no units, was added to or multiplied with it."""
    shape = (1,) * (code.dim() - other.dim()) + tuple(other.shape)
    name = follower.name_of(other)
    for dim in range(code.dim()):
        if code.size(dim) == 1 or shape[dim] == 1:
            continue
        axis = dim - (code.dim() - other.dim())
        if name is not None and sum(n > 1 for n in code.shape) == 1:
            follower.symbols.use(name, axis, symbols_of(code).flatten(), row=True)
        else:
            follower.symbols.protect(
                symbols_of(code), f"{call.where} joins it with a tensor whose channels cannot be cut"
            )
    return code


def _both(follower: Follower, call: Call, a: Info, b: Info, *, product: bool) -> bool:
    dims = call.out.dim()
    x, y = _broadcast(a.code, dims), _broadcast(b.code, dims)
    shapes = [_shape(call.arg(0, "input"), dims), _shape(call.arg(1, "other"), dims)]
    if tuple(x.shape) != tuple(y.shape):
        keep, lost = (x, y) if x.numel() >= y.numel() else (y, x)
        keep_info = a if keep is x else b
        why = f"{call.where} joins it with channels along another dimension"
        follower.symbols.protect(symbols_of(lost), why)
        lost_shape = shapes[1] if keep is x else shapes[0]
        if any(n > 1 and m > 1 for n, m in zip(keep.shape, lost_shape, strict=True)):
            follower.symbols.protect(symbols_of(keep), why)
        pending = a.pending + b.pending if not product else keep_info.pending
        code = keep if product else with_state(keep, RAW)
        return follower.put(call.out, code, pending)
    why = f"{call.where} joins it with channels that cannot be cut"
    follower.symbols.unite(symbols_of(x), symbols_of(y), why, summed=not product)
    code = torch.where(x >= 0, x, y)
    if product and (a.pending or b.pending):
        lead = [i for i in (a, b) if i.pending]
        owners = [_broadcast(i.code, dims) for i in lead]
        return follower.activate(call, call.out, owners[0].where(owners[0] >= 0, code), relu=False, owners=owners)
    p, q = states_of(x), states_of(y)
    if product:
        state = torch.where((p == ZERO) | (q == ZERO), ZERO, RAW)
    else:
        state = torch.where((p == RAW) | (q == RAW), RAW, torch.where((p == ZERO) & (q == ZERO), ZERO, SHIFTED))
    return follower.put(call.out, with_state(code, state), _merge(a.pending, b.pending), a.why or b.why)


def _merge(a: tuple[Pending, ...], b: tuple[Pending, ...]) -> tuple[Pending, ...]:
    return a + tuple(p for p in b if p not in a)


def _broadcast(code: Tensor, dims: int) -> Tensor:
    return code.reshape((1,) * (dims - code.dim()) + tuple(code.shape))


def _shape(value: Any, dims: int) -> tuple[int, ...]:
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    return (1,) * (dims - len(shape)) + shape


@handles("glu")
def glu(follower: Follower, call: Call) -> bool:
    """The halves of a * sigmoid(b) are cut together, and are live where the product is."""
    found = first(call)
    if found is None:
        return False
    info = found[1]
    dim = call.arg(1, "dim", -1)
    if info.code.size(dim) == 1:
        return False
    a, b = info.code.chunk(2, dim)
    follower.symbols.unite(symbols_of(a), symbols_of(b), f"{call.where} joins it with channels that cannot be cut")
    return follower.activate(call, call.out, a, relu=False, owners=[a, b])


_POOLS = [f"{kind}_pool{n}d" for n in (1, 2, 3) for kind in ("max", "avg", "adaptive_avg", "adaptive_max")]


@handles(*_POOLS, "interpolate", "upsample", "upsample_nearest", "upsample_bilinear")
def pool(follower: Follower, call: Call) -> bool:
    """Spatial dimensions change size, channels stay, zeros stay zeros."""
    found = first(call)
    if found is None:
        return False
    x, info = found
    spatial = int(call.name[-2]) if call.name in _POOLS else x.dim() - 2
    if any(info.code.size(d) > 1 for d in range(x.dim() - spatial, x.dim())):
        return False
    out = call.out[0] if isinstance(call.out, tuple) else call.out
    return follower.put(out, info.code, info.pending, info.why)


@handles("pad")
def pad(follower: Follower, call: Call) -> bool:
    """Padding of spatial dimensions; with another number than 0 dead units no longer hold zeros."""
    found = first(call)
    if found is None:
        return False
    info = found[1]
    widths = list(call.arg(1, "pad"))
    mode, value = call.arg(2, "mode", "constant"), call.arg(3, "value") or 0.0
    code = info.code
    for i in range(len(widths) // 2):
        if code.size(-1 - i) > 1 and (widths[2 * i] or widths[2 * i + 1]):
            if mode != "constant":
                return False
            edge = [0, 0] * i + widths[2 * i : 2 * i + 2]
            code = torch.nn.functional.pad(code, edge, value=-1)
    if mode == "constant" and value != 0:
        return follower.put(call.out, drop_zeros(code), info.pending, info.why or call.where)
    return follower.put(call.out, code, info.pending, info.why)


@handles("mean", "sum", "amax", "amin")
def reduction(follower: Follower, call: Call) -> bool:
    """Over other dimensions than the channels' zeros stay zeros; a sum over channels does not need the dead ones."""
    found = first(call)
    if found is None:
        return False
    x, info = found
    dims = call.arg(1, "dim", call.kwargs.get("axis"))
    dims = list(range(x.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = [d % x.dim() for d in dims]
    code = info.code
    over = [d for d in dims if code.size(d) > 1]
    if over:
        if call.name != "sum" or len(over) != sum(n > 1 for n in code.shape):
            return False
        for d in over:
            follower.consume(info, d, code.size(d), call.where)
        return True
    if call.out.dim() < x.dim():
        code = code.reshape([n for d, n in enumerate(code.shape) if d not in dims])
    return follower.put(call.out, code, info.pending, info.why)


@handles("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
def like(follower: Follower, call: Call) -> bool:
    """A tensor of as many channels, whose values have nothing to do with the units."""
    found = first(call)
    return found is not None and follower.put(
        call.out, with_state(found[1].code, ZERO if call.name == "zeros_like" else RAW), found[1].pending
    )
