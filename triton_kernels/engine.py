"""How a rule runs over a list of tensors: what ``csrc/engine/frame.h`` and the runners do, in four kinds of launch.

    reduce     a program per chunk: <m, g>, |g|^2, |m|^2 in float64          reads g, m: 8 bytes per float32 element
    add up     a program per scope and one for all: sums of chunks           reads 32 bytes per chunk
    finalize   one program: skip and clip, cosine and damping of each scope, coefficients of each tensor
    update     a program per chunk: the rule's new values                     bytes: see the rule

Reduce and update are launched once per storage kind in the list (once for most models). Sums are taken in an order
that depends on the list alone: no atomics, two runs are bitwise equal. They differ from the compiled back ends' in the
last bits of a float64, for a chunk is added in BLOCK lanes here; the element maths is the same, operation by operation.
Addresses are 64-bit; offsets inside a chunk are 32-bit. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .table import (
    CHUNK,
    DECOUPLED,
    GRAD,
    KINDS,
    LR,
    MAXIMIZE,
    ROW_GROUP,
    ROW_N,
    ROW_SLOT,
    ROW_VECTOR,
    ROW_WEIGHT,
    ROW_WIDTH,
    STATE,
    WEIGHT_DECAY,
    Table,
    table_of,
)

if TYPE_CHECKING:
    from torsion.ops._frame import Step


# The interpreter takes a millisecond for each call of a @triton.jit function: hence few small helpers, and addresses
# taken from a record in place. tl.multiple_of stands after the cast to a pointer: before it, Triton forgets it.
# Counts are never specialized: a count of 1 would be a Python int in the kernel, and compile anew.


@triton.jit
def open_piece(rows, pieces, numbers, grad_scale, H: tl.constexpr, BLOCK: tl.constexpr):
    """The chunk of this program.

    Returns its row, the row's record and hyper-parameters; the chunk's first element; where, counted from there, the
    part for 128-bit accesses and the chunk end; the factor of a gradient at its load: 1 / grad_scale, or minus that.
    """
    piece = pieces + tl.program_id(0).to(tl.int64) * 4
    row = tl.load(piece).to(tl.int64)
    begin = tl.load(piece + 1).to(tl.int64) * CHUNK
    record = rows + row * ROW_WIDTH
    end = tl.minimum(tl.load(record + ROW_N) - begin, CHUNK).to(tl.int32)
    whole = tl.where(tl.load(record + ROW_VECTOR) != 0, end - end % BLOCK, 0)
    hyper = numbers + tl.load(record + ROW_GROUP) * H
    inverse = 1.0 / tl.load(grad_scale).to(tl.float64)
    return row, record, hyper, begin, whole, end, tl.where(tl.load(hyper + MAXIMIZE) != 0, -inverse, inverse)


@triton.jit
def _products(grad, state, pre, MATHS: tl.constexpr):
    # Products of two float32 are exact in float64.
    g = (grad.to(MATHS) * pre).to(tl.float64)
    m = state.to(tl.float64)
    return m * g, g * g, m * m


@triton.jit(do_not_specialize=["n_pieces"])
def reduce_kernel(
    rows, pieces, partial, n_pieces, numbers, steps, grad_scale,
    WORD: tl.constexpr, MATHS: tl.constexpr, H: tl.constexpr, CLONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _row, record, hyper, begin, whole, end, pre = open_piece(rows, pieces, numbers, grad_scale, H, BLOCK)
    pre = pre.to(MATHS)
    lane = tl.arange(0, BLOCK)
    mg = tl.zeros([BLOCK], tl.float64)
    gg = tl.zeros([BLOCK], tl.float64)
    mm = tl.zeros([BLOCK], tl.float64)
    grads = tl.multiple_of(tl.load(record + GRAD).to(tl.pointer_type(WORD)), 16) + begin
    states = tl.multiple_of(tl.load(record + STATE).to(tl.pointer_type(MATHS)), 16) + begin
    for at in range(0, whole, BLOCK):
        a, b, c = _products(tl.load(grads + at + lane), tl.load(states + at + lane), pre, MATHS)
        mg += a
        gg += b
        mm += c
    grads = tl.load(record + GRAD).to(tl.pointer_type(WORD)) + begin
    states = tl.load(record + STATE).to(tl.pointer_type(MATHS)) + begin
    for at in range(whole, end, BLOCK):
        k = at + lane < end
        grad = tl.load(grads + at + lane, mask=k, other=0)
        a, b, c = _products(grad, tl.load(states + at + lane, mask=k, other=0), pre, MATHS)
        mg += a
        gg += b
        mm += c
    counts = 1.0
    if CLONE >= 0:
        # A tensor that only seeds its momentum stays out of its scope's cosine, not out of the norm.
        first = tl.load(steps + tl.load(record + ROW_SLOT)) == 0
        clones = tl.load(hyper + CLONE) != 0
        counts = tl.where(first & clones, 0.0, 1.0)
    weight = tl.load(record + ROW_WEIGHT).to(tl.float64, bitcast=True)
    place = partial + tl.load(pieces + tl.program_id(0).to(tl.int64) * 4 + 2)
    n = n_pieces.to(tl.int64)
    tl.store(place, tl.sum(mg, 0) * weight)
    tl.store(place + n, tl.sum(gg, 0) * weight)
    tl.store(place + 2 * n, tl.sum(mm, 0) * weight)
    tl.store(place + 3 * n, counts)


@triton.jit(do_not_specialize=["n_pieces"])
def add_up_kernel(partial, piece_first, n_pieces, sums, BLOCK: tl.constexpr):
    """Program s adds up the chunks of scope s that count there; the last one those of every tensor."""
    scope = tl.program_id(0)
    is_all = scope == tl.num_programs(0) - 1
    whatever = tl.where(is_all, 1.0, 0.0)
    end = tl.load(piece_first + tl.minimum(scope + 1, tl.num_programs(0) - 1))
    begin = tl.where(is_all, 0, tl.load(piece_first + scope))
    n = n_pieces.to(tl.int64)
    lane = tl.arange(0, BLOCK)
    mg = tl.zeros([BLOCK], tl.float64)
    gg = tl.zeros([BLOCK], tl.float64)
    mm = tl.zeros([BLOCK], tl.float64)
    for at in range(begin, end, BLOCK):
        p = partial + at + lane
        k = at + lane < end
        k = k & (tl.load(p + 3 * n, mask=k, other=0) + whatever > 0)
        mg += tl.load(p, mask=k, other=0)
        gg += tl.load(p + n, mask=k, other=0)
        mm += tl.load(p + 2 * n, mask=k, other=0)
    out = sums + scope.to(tl.int64) * 3
    tl.store(out, tl.sum(mg, 0))
    tl.store(out + 1, tl.sum(gg, 0))
    tl.store(out + 2, tl.sum(mm, 0))


@triton.jit
def decide(all_sums, max_norm, found_inf, status):
    """Writes ``status``; returns whether the step is skipped, and the factor that clips the gradient."""
    mg = tl.load(all_sums)
    gg = tl.load(all_sums + 1)
    mm = tl.load(all_sums + 2)
    limit = float("inf")
    finite = (tl.abs(mg) < limit) & (tl.abs(gg) < limit) & (tl.abs(mm) < limit)
    skip = (finite == 0) | (tl.load(found_inf) != 0)
    norm = tl.sqrt(gg)
    norm = tl.where(skip & (tl.abs(norm) < limit), limit, norm)
    clip = tl.load(max_norm) / (norm + 1e-6)
    clip = tl.where(clip < 1, clip, 1.0)
    tl.store(status, tl.load(status) + skip.to(tl.int64))
    tl.store(status + 1, norm.to(tl.int64, bitcast=True))
    tl.store(status + 2, skip.to(tl.int64))
    tl.store(status + 3, clip.to(tl.int64, bitcast=True))
    return skip, clip


@triton.jit
def advance(
    sums, scope_group, numbers, shared, n_scopes, H: tl.constexpr, DECAY: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Cosine s, its smoothed value s^ and (1 + s^) / 2 of each scope that has a tensor in the step."""
    for at in range(0, n_scopes, TILE):
        scope = (at + tl.arange(0, TILE)).to(tl.int64)
        k = scope < n_scopes
        group = tl.load(scope_group + scope, mask=k, other=-1)
        k = k & (group >= 0)
        mg = tl.load(sums + 3 * scope, mask=k, other=0)
        gg = tl.load(sums + 3 * scope + 1, mask=k, other=0)
        mm = tl.load(sums + 3 * scope + 2, mask=k, other=0)
        norms = tl.sqrt(gg) * tl.sqrt(mm)
        cosine = tl.where(norms == 0, 0.0, mg / tl.where(norms == 0, 1.0, norms))
        cosine = tl.where(cosine > 1, 1.0, tl.where(cosine < -1, -1.0, cosine))
        decay = tl.load(numbers + group * H + DECAY, mask=k, other=0)
        mine = shared + 3 * scope
        correlation = decay * tl.load(mine, mask=k, other=0).to(tl.float64) + (1 - decay) * cosine
        number = shared.dtype.element_ty
        tl.store(mine, correlation.to(number), mask=k)
        tl.store(mine + 1, cosine.to(number), mask=k)
        tl.store(mine + 2, ((1 + correlation) / 2).to(number), mask=k)


@triton.jit
def rates(hyper, k):
    """Learning rate, coupled decay and the factor of decoupled decay of the tensors whose numbers are at ``hyper``."""
    lr = tl.load(hyper + LR, mask=k, other=0)
    decay = tl.load(hyper + WEIGHT_DECAY, mask=k, other=0)
    decoupled = tl.load(hyper + DECOUPLED, mask=k, other=0) != 0
    return lr, tl.where(decoupled, 0.0, decay), tl.where(decoupled, 1 - lr * decay, 1.0)


# Reduce and update take BLOCK elements a loop turn: with 256 threads four each, one 128-bit access in float32. The
# interpreter pays per operation, not per element; tests may set another power of two. The other kernels take TILE
# chunks, rows or scopes a turn. Neither may fall below the number of threads: Triton may repeat the load of a smaller
# tensor, and where the result is stored in place the second load could come too late.
INTERPRETED = not isinstance(reduce_kernel, triton.runtime.JITFunction)
WARPS = 8
BLOCK = 4096 if INTERPRETED else 1024
TILE = 1024


@dataclass(frozen=True)
class Rule:
    """A rule as this package runs it; ``update`` and ``finalize`` are its kernels.

    Attributes:
        states: lists of state.
        hyper, clone, decay: columns of the hyper-parameters: how many; which says that a first step seeds the momentum
            (-1: none does); which smooths the cosine.
        coefficients: columns of the coefficients.
    """

    name: str
    states: int
    hyper: int
    clone: int
    decay: int
    coefficients: int
    finalize: Any
    update: Any


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check_device(step: Step, rule: Rule) -> None:
    kind = step.shared.device.type
    if INTERPRETED and kind != "cpu":
        raise RuntimeError(f"{rule.name}: TRITON_INTERPRET=1 runs Triton on CPU tensors, these are on {kind}; unset it")
    if not INTERPRETED and kind != "cuda":
        raise RuntimeError(
            f"{rule.name}: Triton runs on CUDA tensors, these are on {kind}; set TRITON_INTERPRET=1 before the first "
            "import to interpret it on CPU tensors (slow, for tests), or use another back end"
        )


def _reduce(rule: Rule, table: Table, step: Step, sums: Tensor) -> None:
    scale = table.one if step.grad_scale is None else step.grad_scale
    for launch in table.launches:
        kind = launch.kind
        reduce_kernel[(launch.count,)](
            table.rows, launch.pieces, table.partial, table.n_pieces, table.numbers, step.steps, scale,
            WORD=kind.word, MATHS=kind.maths, H=rule.hyper, CLONE=rule.clone, BLOCK=BLOCK,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    add_up_kernel[(table.n_scopes + 1,)](
        table.partial, table.piece_first, table.n_pieces, sums, BLOCK=TILE, num_warps=WARPS, enable_fp_fusion=False
    )


def _apply(rule: Rule, table: Table, step: Step, sums: Tensor) -> None:
    table.take_rates()
    scale = table.one if step.grad_scale is None else step.grad_scale
    found_inf = table.zero if step.found_inf is None else step.found_inf
    rule.finalize[(1,)](
        sums, table.rows, table.scope_group, table.numbers, step.shared, step.steps, step.status, found_inf,
        table.coefficients, table.n_rows, table.n_scopes, table.n_groups,
        H=rule.hyper, TILE=TILE, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    for launch in table.launches:
        kind = launch.kind
        rule.update[(launch.count,)](
            table.rows, launch.pieces, table.coefficients, table.numbers, step.steps, scale, step.status,
            WORD=kind.word, MATHS=kind.maths, STOCHASTIC=kind.stochastic, H=rule.hyper, BLOCK=BLOCK,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def reduce(rule: Rule, step: Step) -> Tensor:
    """The sums of this process: float64 [S + 1, 3], the last row over every tensor."""
    _check_device(step, rule)
    with torch.no_grad(), _on(step.shared.device):
        table = table_of(rule, step)
        sums = torch.empty_like(table.sums)
        _reduce(rule, table, step, sums)
    return sums


def apply_(rule: Rule, step: Step, sums: Tensor) -> None:
    """The rest of a step whose sums, over all processes, are ``sums``."""
    _check_device(step, rule)
    with torch.no_grad(), _on(step.shared.device):
        table = table_of(rule, step)
        if sums.shape != table.sums.shape or sums.dtype != torch.float64 or not sums.is_contiguous():
            raise RuntimeError(f"{rule.name}: sums must be contiguous float64 {list(table.sums.shape)}")
        _apply(rule, table, step, sums)


def step_(rule: Rule, step: Step) -> None:
    """A whole step."""
    _check_device(step, rule)
    with torch.no_grad(), _on(step.shared.device):
        table = table_of(rule, step)
        _reduce(rule, table, step, table.sums)
        _apply(rule, table, step, table.sums)


_ARGUMENTS = {
    "rows": "*i64", "pieces": "*i32", "partial": "*fp64", "n_pieces": "i32", "numbers": "*fp64", "steps": "*fp32",
    "grad_scale": "*fp32", "piece_first": "*i64", "sums": "*fp64", "scope_group": "*i64", "status": "*i64",
    "found_inf": "*fp32", "coefficients": "*fp64", "n_rows": "i32", "n_scopes": "i32", "n_groups": "i32",
}  # fmt: skip


def _case(rule: Rule, what: str, kernel: Any, name: str, constexprs: dict[str, Any], **types: str) -> dict[str, Any]:
    arguments = {a: (_ARGUMENTS | types)[a] for a in kernel.arg_names if a not in constexprs}
    return {
        "name": f"{rule.name} {what} {name}".rstrip(),
        "kernel": kernel,
        "signature": arguments | dict.fromkeys(constexprs, "constexpr"),
        "constexprs": constexprs,
        # What the allocator aligns; single numbers and views of the user's need not be.
        "aligned": [a for a, t in arguments.items() if t[0] == "*" and a not in ("grad_scale", "found_inf", "status")],
        "num_warps": WARPS,
        "enable_fp_fusion": False,
    }


def audit_cases(rule: Rule) -> Iterator[dict[str, Any]]:
    """Every kernel of a rule as it is launched on a GPU, to compile ahead of time (not under the interpreter).

    Yields:
        name, kernel, signature (argument -> type), constexprs, aligned (arguments known divisible by 16), num_warps,
        enable_fp_fusion.
    """
    for kind in KINDS:
        storage = {"WORD": kind.word, "MATHS": kind.maths, "H": rule.hyper, "BLOCK": BLOCK}
        if not kind.stochastic:
            yield _case(rule, "reduce", reduce_kernel, str(kind.word), {**storage, "CLONE": rule.clone})
        name = f"{kind.word} stochastic" if kind.stochastic else str(kind.word)
        yield _case(rule, "update", rule.update, name, {**storage, "STOCHASTIC": kind.stochastic})
    yield _case(rule, "add up", add_up_kernel, "", {"BLOCK": TILE})
    for shared in ("fp32", "fp64"):
        yield _case(rule, "finalize", rule.finalize, shared, {"H": rule.hyper, "TILE": TILE}, shared=f"*{shared}")
