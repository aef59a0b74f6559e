"""How units come from Linear layers and convolutions, and how normalizations and attention stand to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torsion.prune._elementwise import drop_zeros, first
from torsion.prune._follow import Call, Follower, Info, handles
from torsion.prune._symbols import RAW, ZERO, encode, states_of, symbols_of


def _layer(follower: Follower, name: str, weight: Tensor) -> str:
    """Name of the layer that uses the parameter ``name``: its module, the one that runs where several share it."""
    path, module = follower.module()
    return path if module._parameters.get("weight") is weight else name.removesuffix(".weight")


def _out(symbols: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """Code of a layer's output whose dimension ``dim`` holds ``symbols``."""
    shape = [1] * tensor.dim()
    shape[dim] = symbols.numel()
    return encode(symbols, RAW).reshape(shape)


def _bias(follower: Follower, call: Call, symbols: Tensor) -> bool:
    bias = call.arg(2, "bias")
    if bias is None:
        return True
    name = follower.name_of(bias)
    if name is None:
        follower.symbols.refuse(symbols, f"{call.where} adds a bias that is no parameter of the model")
    else:
        follower.symbols.use(name, 0, symbols, row=True)
    return True


def _computed(follower: Follower, call: Call, x: Info | None, units: int, dim: int) -> bool:
    """A layer whose weight is computed by other functions (weight_norm, parametrizations): seen, but never cut."""
    module = follower.module()[0] or call.name
    why = f"{call.where} has a weight that is computed, no parameter of the model; remove its parametrization"
    if x is not None:
        follower.drop(x, why)
    symbols = follower.symbols.block(f"{module}/{call.name}", module, units)
    follower.symbols.refuse(symbols, why)
    return follower.put(call.out, _out(symbols, call.out, dim))


@handles("linear")
def linear(follower: Follower, call: Call) -> bool:
    """For y = x W^T + b: reads the last dimension, makes a unit per row of W."""
    x, weight = call.arg(0, "input"), call.arg(1, "weight")
    name = follower.name_of(weight)
    if weight.dim() != 2 or call.info(weight) is not None:
        return False
    if name is None:
        return _computed(follower, call, call.info(x), weight.size(0), -1)
    layer = _layer(follower, name, weight)
    reads = follower.consume(call.info(x), -1, x.size(-1), repr(layer))
    makes = follower.symbols.block(name, layer, weight.size(0))
    follower.symbols.use(name, 0, makes, row=True)
    follower.symbols.use(name, 1, reads, row=False)
    return _bias(follower, call, makes) and follower.put(call.out, _out(makes, call.out, -1))


@handles(*[f"conv{t}{n}d" for n in (1, 2, 3) for t in ("", "_transpose")])
def convolution(follower: Follower, call: Call) -> bool:
    """Convolutions, transposed, grouped and depthwise: read the channel dimension, make a unit per output channel."""
    x, weight = call.arg(0, "input"), call.arg(1, "weight")
    name = follower.name_of(weight)
    dim = 1 - weight.dim()
    units, groups = call.out.size(dim), int(call.arg(6, "groups", 1))
    if call.info(weight) is not None:
        return False
    if name is None:
        return _computed(follower, call, call.info(x), units, dim)
    layer = _layer(follower, name, weight)
    makes = follower.symbols.block(name, layer, units)
    transposed = "transpose" in call.name
    # One that was depthwise stays so, though with one channel left it looks like any other.
    if groups == x.size(dim) and (groups > 1 or name in follower.symbols.depthwise):
        _depthwise(follower, call, name, layer, makes, transposed=transposed)
    else:
        reads = follower.consume(call.info(x), dim, x.size(dim), repr(layer))
        columns, rows = reads, makes
        if groups > 1:
            sections = reads.reshape(groups, -1), makes.reshape(groups, -1)
            for symbols in sections:
                follower.symbols.sections(symbols, f"the {groups} groups of {layer!r}")
            columns, rows = (reads, sections[1]) if transposed else (sections[0], makes)
        follower.symbols.use(name, int(transposed), rows, row=True)
        follower.symbols.use(name, int(not transposed), columns, row=False)
    return _bias(follower, call, makes) and follower.put(call.out, _out(makes, call.out, dim))


def _depthwise(follower: Follower, call: Call, name: str, layer: str, makes: Tensor, *, transposed: bool) -> None:
    """Every input channel makes output channels of its own: they are cut together, live where any of them is."""
    x = call.arg(0, "input")
    info = call.info(x)
    dim = 1 - call.arg(1, "weight").dim()
    size = x.size(dim)
    if info is None:
        reads = torch.full((size,), -1, device="cpu")
    else:
        follower.commit(info, symbols_of(info.code))
        reads = follower.along(info, dim, size, f"{call.where} reads it along another dimension")
    follower.symbols.unite(
        reads.repeat_interleave(makes.numel() // size), makes, f"{layer!r} reads channels that cannot be cut"
    )
    follower.symbols.depthwise.add(name)
    follower.symbols.use(name, 0, makes.reshape(size, -1)[:, 0] if transposed else makes, row=True)


def _norm_uses(follower: Follower, tensors: list[Any], symbols: Tensor) -> bool:
    """Record the scale, shift and statistics of a norm along ``symbols``; False when one is no parameter or buffer."""
    names = [follower.name_of(t) for t in tensors if t is not None]
    for name in names:
        if name is None:
            return False
        follower.symbols.use(name, 0, symbols, row=True)
    return True


def _resize(follower: Follower, kind: str, symbols: Tensor, *types: type[nn.Module]) -> bool:
    name, module = follower.module()
    if not isinstance(module, types):
        return False
    follower.symbols.resize(name, kind, symbols)
    return True


@handles("batch_norm", "instance_norm")
def channel_norm(follower: Follower, call: Call) -> bool:
    """Statistics per channel: a cut commutes with it, but the zeros of dead units become its shift."""
    found = first(call)
    if found is None:
        return False
    x, info = found
    if any(n > 1 for d, n in enumerate(info.code.shape) if d != 1):
        return False
    tensors = [call.arg(i, n) for i, n in ((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias"))]
    symbols = follower.along(info, 1, x.size(1), call.where)
    if not _norm_uses(follower, tensors, symbols):
        return False
    _resize(follower, "features", symbols, nn.modules.batchnorm._NormBase)
    plain = call.name == "instance_norm" and all(t is None for t in tensors)
    code = info.code if plain else drop_zeros(info.code)
    return follower.put(call.out, code, info.pending, info.why or call.where)


@handles("group_norm")
def group_norm(follower: Follower, call: Call) -> bool:
    """Channels of one group share statistics: only whole groups can go."""
    found = first(call)
    if found is None:
        return False
    x, info = found
    groups = call.arg(1, "num_groups")
    if any(n > 1 for d, n in enumerate(info.code.shape) if d != 1):
        return False
    symbols = follower.along(info, 1, x.size(1), call.where)
    if groups == 1 and follower.module()[0] not in follower.symbols.resizes:
        follower.symbols.refuse(symbols, f"{call.where} takes its statistics over all channels, dead ones included")
    elif not _resize(follower, "group_norm", symbols.reshape(groups, -1), nn.GroupNorm):
        return False
    elif groups < x.size(1):
        follower.symbols.sections(symbols.reshape(groups, -1), call.where, whole=True)
    if not _norm_uses(follower, [call.arg(2, "weight"), call.arg(3, "bias")], symbols):
        return False
    return follower.put(call.out, drop_zeros(info.code), info.pending, info.why or call.where)


@handles("layer_norm", "rms_norm")
def layer_norm(follower: Follower, call: Call) -> bool:
    """Statistics over the last dimensions. Over units, only RMSNorm after the activation does without the dead ones."""
    found = first(call)
    if found is None:
        return False
    x, info = found
    dims = len(call.arg(1, "normalized_shape"))
    weight, bias = call.arg(2, "weight"), call.arg(3, "bias") if call.name == "layer_norm" else None
    code = info.code
    over = [d for d in range(x.dim() - dims, x.dim()) if code.size(d) > 1]
    if not over:
        code = code if bias is None else drop_zeros(code)
        return follower.put(call.out, code, info.pending, info.why or call.where)
    if len(over) > 1 or dims > 1 or sum(n > 1 for n in code.shape) > 1:
        return False
    symbols, states = symbols_of(code).flatten(), states_of(code).flatten()
    if not _norm_uses(follower, [weight, bias], symbols):
        return False
    why = f"{call.where} takes its statistics over all units, dead ones included"
    if call.name == "layer_norm":
        follower.symbols.refuse(symbols, why)
        return follower.put(call.out, drop_zeros(code), info.pending, info.why or call.where)
    follower.symbols.refuse(symbols[states != ZERO], why)
    if weight is None or not _resize(follower, "rms_norm", symbols, nn.RMSNorm):
        follower.symbols.refuse(
            symbols, f"{call.where} divides by the number of units and has no scale to make up for it"
        )
    return follower.put(call.out, code, info.pending, info.why)


@handles(
    "multi_head_attention_forward",
    "scaled_dot_product_attention",
    "embedding",
    "embedding_bag",
    "softmax",
    "log_softmax",
)
def attention(follower: Follower, call: Call) -> bool:
    """Attention and embeddings: what goes in stays as it is, and so does what comes out."""
    for info in call.infos.values():
        follower.protect(info, f"{call.where} reads it: attention is never cut")
    tensors = [t for t in [*call.args, *call.kwargs.values()] if follower.name_of(t) is not None]
    for t in tensors:
        follower.symbols.touched.setdefault(str(follower.name_of(t)), call.where)
    return True


@handles("matmul", "bmm", "baddbmm", "einsum", "mm", "rmatmul")
def matmul(follower: Follower, call: Call) -> bool:
    """Products of activations as in attention: protected. A product with a parameter is no known layer."""
    if any(follower.name_of(t) is not None for t in call.args):
        return False
    return attention(follower, call)
