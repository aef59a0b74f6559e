"""How channels pass operations that move data: the same operation moves their code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torsion.prune._elementwise import first
from torsion.prune._follow import Call, Follower, Info, Pending, handles, tensors_in, words
from torsion.prune._symbols import ZERO, encode, symbols_of


def squash(code: Tensor) -> Tensor:
    """``code`` with size 1 in the dimensions that it does not depend on."""
    for d in range(code.dim()):
        if code.size(d) > 1 and (code.stride(d) == 0 or bool((code == code.narrow(d, 0, 1)).all())):
            code = code.narrow(d, 0, 1)
    return code


def _full(info: Info, shape: torch.Size) -> Tensor:
    return info.code.expand(shape)


@handles(
    *words(
        "permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze expand narrow select unbind t "
        "getitem flip"
    ),
    *["get T", "get mT", "get H", "get mH"],
)
def view(follower: Follower, call: Call) -> bool:
    """Views: applied to the code as they are."""
    found = first(call)
    if found is None:
        return False
    x, info = found
    args = [a.cpu() if isinstance(a, Tensor) else a for a in call.args[1:]]
    if call.name == "getitem" and isinstance(args[0], tuple):
        args = [tuple(a.cpu() if isinstance(a, Tensor) else a for a in args[0])]
    code = call.func(_full(info, x.shape), *args, **{k: v for k, v in call.kwargs.items() if k != "input"})
    return _put_all(follower, call.out, code, info)


def _put_all(follower: Follower, out: Any, code: Any, info: Info) -> bool:
    if isinstance(out, Tensor):
        return isinstance(code, Tensor) and follower.put(out, squash(code), info.pending, info.why)
    pairs = zip(out, code, strict=True)
    return all(follower.put(o, squash(c), info.pending, info.why) for o, c in pairs)


@handles("expand_as")
def expand_as(follower: Follower, call: Call) -> bool:
    """Like expand; the other tensor gives its shape alone."""
    info = call.info(call.args[0])
    return info is not None and follower.put(
        call.out, info.code.reshape(_pad(info.code, call.out)), info.pending, info.why
    )


def _pad(code: Tensor, out: Tensor) -> list[int]:
    return [1] * (out.dim() - code.dim()) + list(code.shape)


@handles("chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "hsplit", "vsplit")
def split(follower: Follower, call: Call) -> bool:
    """Pieces along a dimension; pieces of one size stay of one size after a cut."""
    found = first(call)
    if found is None:
        return False
    x, info = found
    code = call.func(_full(info, x.shape), *call.args[1:], **{k: v for k, v in call.kwargs.items() if k != "input"})
    pieces = [squash(c) for c in code]
    if len(pieces) > 1 and len({p.shape for p in pieces}) == 1 and pieces[0].numel() > 1:
        follower.symbols.sections(torch.stack([symbols_of(p).flatten() for p in pieces]), call.where)
    return _put_all(follower, call.out, code, info)


@handles("view", "reshape", "flatten", "unflatten", "ravel", "view_as", "reshape_as")
def reshape(follower: Follower, call: Call) -> bool:
    """Dimensions merged and split. A view to a fixed size shows when the model is rehearsed with fewer units."""
    x = call.arg(0, "input")
    info = call.info(x)
    if info is None or isinstance(call.arg(1, "dtype"), torch.dtype):
        return False
    code = regroup(info.code, tuple(x.shape), tuple(call.out.shape))
    if code is None:
        return False
    return follower.put(call.out, _ordered(follower, info.code, code, call), info.pending, info.why)


def regroup(code: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor | None:
    """Code of a tensor of shape ``old`` viewed as ``new``, dimension group by dimension group.

    Only groups of dimensions of equal products that the code depends on are spread out, so that the batch never is.
    """
    pieces: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = [i] if i < len(old) else [], [j] if j < len(new) else []
        m, n = (old[i] if a else 1), (new[j] if b else 1)
        i, j = i + len(a), j + len(b)
        while m != n:
            if m < n and i < len(old):
                m, i = m * old[i], i + 1
                a.append(i - 1)
            elif n < m and j < len(new):
                n, j = n * new[j], j + 1
                b.append(j - 1)
            else:
                return None
        pieces.append((a, b))
    middle, target = [], []
    for a, b in pieces:
        spread = any(code.size(d) > 1 for d in a)
        middle += [old[d] if spread else 1 for d in a]
        target += [new[d] if spread else 1 for d in b]
    return squash(code.expand(middle).reshape(target))


def _ordered(follower: Follower, before: Tensor, after: Tensor, call: Call) -> Tensor:
    """Tie units where merged dimensions leave their order, as in a channel shuffle: each outer index keeps the same."""
    dims = [d for d in range(before.dim()) if before.size(d) > 1]
    if len(dims) < 2 or after.numel() != before.numel() or sum(n > 1 for n in after.shape) >= len(dims):
        return after
    symbols = symbols_of(before)
    flat = symbols.flatten()
    if bool((flat[1:] > flat[:-1]).all()):
        return after
    steps = {d: abs(int(symbols.select(d, 1).flatten()[0] - symbols.flatten()[0])) for d in dims}
    outer = max(dims, key=lambda d: steps[d])
    rows = symbols.movedim(outer, 0).reshape(symbols.size(outer), -1)
    for row in rows[1:]:
        follower.symbols.unite(rows[0], row, f"{call.where} mixes it with channels that cannot be cut", summed=True)
    return after


@handles("cat", "concat", "concatenate")
def cat(follower: Follower, call: Call) -> bool:
    """Channels side by side."""
    tensors, dim = call.arg(0, "tensors"), call.arg(1, "dim", call.kwargs.get("axis", 0))
    if not isinstance(tensors, (list, tuple)):
        return False
    dim %= call.out.dim()
    codes, pending, why = [], [], ""
    tensors = [t for t in tensors if t.dim() == call.out.dim()]
    for t in tensors:
        info = call.info(t)
        code = info.code if info is not None else encode(torch.full((1,) * t.dim(), -1, device="cpu"), ZERO)
        shape = list(code.shape)
        shape[dim] = t.size(dim)
        codes.append(code.expand(shape))
        pending += list(info.pending) if info is not None else []
        why = why or (info.why if info is not None else "")
    sizes = [max(c.size(d) for c in codes) for d in range(call.out.dim())]
    codes = [c.expand([c.size(d) if d == dim else n for d, n in enumerate(sizes)]) for c in codes]
    return follower.put(call.out, squash(torch.cat(codes, dim)), _unique(pending), why)


@handles("stack")
def stack(follower: Follower, call: Call) -> bool:
    """A new dimension; the units of all tensors stay as they are."""
    tensors, dim = call.arg(0, "tensors"), call.arg(1, "dim", 0)
    infos = [call.info(t) for t in tensors_in(tensors)]
    known = [i for i in infos if i is not None]
    if len(known) != len(infos):
        return False
    sizes = [max(i.code.size(d) for i in known) for d in range(known[0].code.dim())]
    code = torch.stack([i.code.expand(sizes) for i in known], dim)
    pending = _unique([p for i in known for p in i.pending])
    return follower.put(call.out, squash(code), pending, next((i.why for i in known if i.why), ""))


def _unique(pending: list[Pending]) -> tuple[Pending, ...]:
    return tuple(dict.fromkeys(pending))


@handles("pixel_shuffle", "channel_shuffle")
def pixel_shuffle(follower: Follower, call: Call) -> bool:
    """Channels become pixels: the r^2 channels of one output channel go together."""
    found = first(call)
    if found is None or call.name != "pixel_shuffle":
        return False
    x, info = found
    factor = int(call.arg(1, "upscale_factor"))
    if any(n > 1 for d, n in enumerate(info.code.shape) if d != x.dim() - 3):
        return False
    groups = info.code.flatten().reshape(-1, factor * factor)
    for column in groups.T[1:]:
        follower.symbols.unite(symbols_of(groups[:, 0]), symbols_of(column), call.where, summed=True)
    shape = [1] * x.dim()
    shape[-3] = groups.size(0)
    states = {int(s) & 3 for s in groups.flatten().tolist() if s >= 0}
    if len(states) > 1:
        return False
    return follower.put(call.out, groups[:, 0].reshape(shape), info.pending, info.why)
