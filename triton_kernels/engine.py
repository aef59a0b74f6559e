"""How a rule runs over a list of tensors: what ``csrc/engine/frame.h`` and the runners do, in four kinds of launch.

    reduce     a program per chunk: the rule's sums in float64               bytes: see the rule
    add up     a program per scope and one for all: sums of chunks           reads 8 bytes per chunk and sum, twice
    finalize   one program: skip and clip, state of each scope, coefficients of each tensor
    update     a program per chunk: the rule's new values                    bytes: see the rule

Reduce and update are launched once per storage kind in the list (once for most models). Sums are taken in an order
that depends on the list alone: no atomics, two runs are bitwise equal. They differ from the compiled back ends' in the
last bits of a float64, for a chunk is added in BLOCK lanes here; the element maths is the same, operation by operation.
Addresses are 64-bit; offsets inside a chunk are 32-bit. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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
    ROW_SCALED,
    ROW_SLOT,
    ROW_VECTOR,
    ROW_WEIGHT,
    ROW_WIDTH,
    STATE,
    WEIGHT_DECAY,
    Kind,
    Prepared,
    Stream,
    prepare,
    refuse,
)

if TYPE_CHECKING:
    from torsion.ops._frame import Step


# Whether a tensor's first step stays out of its scope's sums, where no column of `hyper` says it.
NEVER = tl.constexpr(-1)
ALWAYS = tl.constexpr(-2)

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
def _add_span(
    record, begin, first, end, pre, slope, offset, point, slow, left, right, sums,
    SUMS: tl.constexpr, CLIMBS: tl.constexpr, WORD: tl.constexpr, POINT: tl.constexpr, MATHS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the elements ``first`` to ``end`` of a chunk to the four sums, as far as there are so many.

    ALIGN 16: whole blocks on 16-byte addresses; 1: any. The products of two float32 are exact in float64.
    """
    a, b, c, d = sums
    lane = tl.arange(0, BLOCK)
    if SUMS == "displacements":
        slows = tl.multiple_of(tl.load(record + slow).to(tl.pointer_type(MATHS)), ALIGN) + begin
        lefts = tl.multiple_of(tl.load(record + left).to(tl.pointer_type(MATHS)), ALIGN) + begin
        rights = tl.multiple_of(tl.load(record + right).to(tl.pointer_type(MATHS)), ALIGN) + begin
    else:
        grads = tl.multiple_of(tl.load(record + GRAD).to(tl.pointer_type(WORD)), ALIGN) + begin
    if SUMS == "torque":
        states = tl.multiple_of(tl.load(record + STATE).to(tl.pointer_type(MATHS)), ALIGN) + begin
    if CLIMBS:
        points = tl.multiple_of(tl.load(record + point).to(tl.pointer_type(POINT)), ALIGN) + begin
    for at in range(first, end, BLOCK):
        i = at + lane
        if ALIGN == 1:
            k = i < end
            other = 0
        else:
            k = None
            other = None
        if SUMS == "displacements":
            s = tl.load(slows + i, mask=k, other=other).to(tl.float64)
            x = tl.load(lefts + i, mask=k, other=other).to(tl.float64) - s
            y = tl.load(rights + i, mask=k, other=other).to(tl.float64) - s
            a += x * y
            b += x * x
            c += y * y
        else:
            g = (tl.load(grads + i, mask=k, other=other).to(MATHS) * pre).to(tl.float64)
            if SUMS == "torque":
                m = tl.load(states + i, mask=k, other=other).to(tl.float64)
                a += m * g
                b += g * g
                c += m * m
            elif SUMS == "square":
                a += g * g
            if CLIMBS:
                q = tl.load(points + i, mask=k, other=other).to(tl.float64)
                x = (slope * tl.abs(q) + offset) * g
                d += x * x
    return a, b, c, d


@triton.jit(do_not_specialize=["n_pieces", "point", "slow", "left", "right"])
def reduce_kernel(
    rows, pieces, partial, n_pieces, numbers, steps, grad_scale, point, slow, left, right,
    SUMS: tl.constexpr, CLIMBS: tl.constexpr, ETA: tl.constexpr, CLONE: tl.constexpr, POINT: tl.constexpr,
    WORD: tl.constexpr, MATHS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk's sums.

    SUMS: "torque" <m, g>, |g|^2, |m|^2; "square" |g|^2; "displacements" <x, y>, |x|^2, |y|^2 with x, y from ``slow`` to
    ``left`` and ``right``; "none". CLIMBS: behind them |(slope |q| + offset) g|^2 with q at ``point``, of type POINT,
    slope 1 and offset column ETA of the numbers, but 0 and 1 on tensors that are not scaled.
    """
    _row, record, hyper, begin, whole, end, pre = open_piece(rows, pieces, numbers, grad_scale, H, BLOCK)
    pre = pre.to(MATHS)
    slope = 0.0
    offset = 1.0
    if CLIMBS:
        scaled = tl.load(record + ROW_SCALED) != 0
        slope = tl.where(scaled, 1.0, 0.0).to(tl.float64)
        offset = tl.where(scaled, tl.load(hyper + ETA), 1.0).to(MATHS).to(tl.float64)
    zero = tl.zeros([BLOCK], tl.float64)
    a, b, c, d = _add_span(
        record, begin, 0, whole, pre, slope, offset, point, slow, left, right, (zero, zero, zero, zero),
        SUMS, CLIMBS, WORD, POINT, MATHS, 16, BLOCK,
    )  # fmt: skip
    a, b, c, d = _add_span(
        record, begin, whole, end, pre, slope, offset, point, slow, left, right, (a, b, c, d),
        SUMS, CLIMBS, WORD, POINT, MATHS, 1, BLOCK,
    )  # fmt: skip
    counts = 1.0
    if CLONE != NEVER:
        # A tensor that only seeds its momentum stays out of its scope's sums, not out of those over all tensors.
        seeds = tl.load(steps + tl.load(record + ROW_SLOT)) == 0
        if CLONE != ALWAYS:
            seeds = seeds & (tl.load(hyper + CLONE) != 0)
        counts = tl.where(seeds, 0.0, 1.0)
    weight = tl.load(record + ROW_WEIGHT).to(tl.float64, bitcast=True)
    place = partial + tl.load(pieces + tl.program_id(0).to(tl.int64) * 4 + 2)
    n = n_pieces.to(tl.int64)
    if SUMS != "none":
        tl.store(place, tl.sum(a, 0) * weight)
        place += n
    if SUMS == "torque" or SUMS == "displacements":
        tl.store(place, tl.sum(b, 0) * weight)
        tl.store(place + n, tl.sum(c, 0) * weight)
        place += 2 * n
    if CLIMBS:
        tl.store(place, tl.sum(d, 0) * weight)
        place += n
    tl.store(place, counts)


@triton.jit(do_not_specialize=["n_pieces"])
def add_up_kernel(partial, piece_first, n_pieces, sums, N: tl.constexpr, BLOCK: tl.constexpr):
    """Program s adds up the chunks of scope s that count there; the last one those of every tensor."""
    scope = tl.program_id(0)
    is_all = scope == tl.num_programs(0) - 1
    whatever = tl.where(is_all, 1.0, 0.0)
    end = tl.load(piece_first + tl.minimum(scope + 1, tl.num_programs(0) - 1))
    begin = tl.where(is_all, 0, tl.load(piece_first + scope))
    n = n_pieces.to(tl.int64)
    lane = tl.arange(0, BLOCK)
    out = sums + scope.to(tl.int64) * N
    for j in tl.static_range(N):
        total = tl.zeros([BLOCK], tl.float64)
        for at in range(begin, end, BLOCK):
            p = partial + at + lane
            k = at + lane < end
            k = k & (tl.load(p + N * n, mask=k, other=0) + whatever > 0)
            total += tl.load(p + j * n, mask=k, other=0)
        tl.store(out + j, tl.sum(total, 0))


@triton.jit
def decide(
    all_sums, max_norm, found_inf, status, N: tl.constexpr, GRAD_NORM2: tl.constexpr, OPENS: tl.constexpr
):  # fmt: skip
    """Writes ``status``; returns whether the step is skipped, and the factor that clips the gradient.

    GRAD_NORM2: which sum is |g|^2, -1: none. Without OPENS a step does nothing once the one before it was skipped.
    """
    limit = float("inf")
    finite = tl.load(found_inf) == 0
    for j in tl.static_range(N):
        finite = finite & (tl.abs(tl.load(all_sums + j)) < limit)
    skip = finite == 0
    over = (tl.load(status + 2) != 0) & (not OPENS)
    clip = tl.full((), 1.0, tl.float64)
    if GRAD_NORM2 >= 0:
        norm = tl.sqrt(tl.load(all_sums + GRAD_NORM2))
        norm = tl.where(skip & (tl.abs(norm) < limit), limit, norm)
        clip = tl.load(max_norm) / (norm + 1e-6)
        clip = tl.where(clip < 1, clip, 1.0)
        tl.store(status + 1, tl.where(over, tl.load(status + 1), norm.to(tl.int64, bitcast=True)))
        tl.store(status + 3, tl.where(over, tl.load(status + 3), clip.to(tl.int64, bitcast=True)))
    tl.store(status, tl.load(status) + tl.where(over, 0, skip.to(tl.int64)))
    tl.store(status + 2, tl.where(over, 2, skip.to(tl.int64)))
    return skip | over, clip


@triton.jit
def cosine(product, first2, second2):
    """Of a product and two squared norms: 0 if either norm is 0, clamped to [-1, 1]."""
    norms = tl.sqrt(first2) * tl.sqrt(second2)
    s = tl.where(norms == 0, 0.0, product / tl.where(norms == 0, 1.0, norms))
    return tl.where(s > 1, 1.0, tl.where(s < -1, -1.0, s))


@triton.jit
def advance(
    sums, scope_group, numbers, shared, n_scopes, N: tl.constexpr, H: tl.constexpr, DECAY: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Cosine s, its smoothed value s^ and (1 + s^) / 2 of each scope that has a tensor in the step."""
    for at in range(0, n_scopes, TILE):
        scope = (at + tl.arange(0, TILE)).to(tl.int64)
        k = scope < n_scopes
        group = tl.load(scope_group + scope, mask=k, other=-1)
        k = k & (group >= 0)
        own = sums + N * scope
        mg = tl.load(own, mask=k, other=0)
        gg = tl.load(own + 1, mask=k, other=0)
        mm = tl.load(own + 2, mask=k, other=0)
        s = cosine(mg, gg, mm)
        decay = tl.load(numbers + group * H + DECAY, mask=k, other=0)
        mine = shared + 3 * scope
        correlation = decay * tl.load(mine, mask=k, other=0).to(tl.float64) + (1 - decay) * s
        number = shared.dtype.element_ty
        tl.store(mine, correlation.to(number), mask=k)
        tl.store(mine + 1, s.to(number), mask=k)
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
        name: in messages, and of its workspace in a table.
        family: rules of one family share tables.
        states: lists of state.
        hyper, shared, coefficients, sums: columns.
        reduction: which sums, see SUMS of reduce_kernel. None: none are needed, they are 0.
        climbs, opening, eta: whether the sum of an ASAM ascent is behind them; whether it is taken at the parameters;
            the column of its offset.
        clone: whether a tensor's first step stays out of its scope's sums: NEVER, ALWAYS, or the column of ``hyper``
            that says so.
        rounds: whether parameters may be rounded at random.
        finalize, update: kernels.
        finalize_options, update_options: constants they are compiled with, besides sizes and storage types.
    """

    name: str
    family: str
    states: int
    hyper: int
    shared: int
    coefficients: int
    sums: int
    finalize: Any
    update: Any
    reduction: str | None = "torque"
    climbs: bool = False
    opening: bool = False
    eta: int = 0
    rounds: bool = True
    clone: int = NEVER.value
    finalize_options: Mapping[str, Any] = field(default_factory=dict)
    update_options: Mapping[str, Any] = field(default_factory=dict)

    def update_constants(self, kind: Kind) -> dict[str, Any]:
        """Constants of the update kernel for one storage kind."""
        return {
            **self.update_options, "WORD": kind.word, "MATHS": kind.maths,
            "STOCHASTIC": kind.stochastic and self.rounds, "H": self.hyper, "BLOCK": BLOCK,
        }  # fmt: skip

    def reduce_constants(self, kind: Kind) -> dict[str, Any]:
        """Constants of reduce_kernel for one storage kind."""
        point = kind.word if self.opening else kind.maths
        return {
            "SUMS": self.reduction, "CLIMBS": self.climbs, "ETA": self.eta, "CLONE": self.clone, "POINT": point,
            "WORD": kind.word, "MATHS": kind.maths, "H": self.hyper, "BLOCK": BLOCK,
        }  # fmt: skip


def on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_device(step: Step, rule: Rule) -> None:
    kind = step.shared.device.type
    if INTERPRETED and kind != "cpu":
        raise RuntimeError(f"{rule.name}: TRITON_INTERPRET=1 runs Triton on CPU tensors, these are on {kind}; unset it")
    if not INTERPRETED and kind != "cuda":
        raise RuntimeError(
            f"{rule.name}: Triton runs on CUDA tensors, these are on {kind}; set TRITON_INTERPRET=1 before the first "
            "import to interpret it on CPU tensors (slow, for tests), or use another back end"
        )


def _prepare(rule: Rule, step: Step) -> Prepared:
    check_device(step, rule)
    if len(step.states) != rule.states:
        refuse(rule, f"takes {rule.states} lists of state, has {len(step.states)}")
    lists = [step.params, step.grads, *step.states]
    return prepare(rule, step, [Stream(f"list {k}", k, tensors) for k, tensors in enumerate(lists)])


# Streams of a step whose place in a row its kernels know by themselves.
_NO_COLUMNS = {"point": 0, "slow": 0, "left": 0, "right": 0}


def launch_reduce(rule: Rule, ready: Prepared, step: Step, sums: Tensor, columns: Mapping[str, int]) -> None:
    """Writes ``sums``. ``columns``: places in a row that reduce_kernel is told."""
    if rule.reduction is None:
        sums.zero_()
        return
    table, space = ready.table, ready.space
    scale = table.one if step.grad_scale is None else step.grad_scale
    for launch in table.launches:
        reduce_kernel[(launch.count,)](
            table.rows, launch.pieces, space.partial, table.n_pieces, space.numbers, step.steps, scale,
            **columns, **rule.reduce_constants(launch.kind), num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    add_up_kernel[(table.n_scopes + 1,)](
        space.partial, table.piece_first, table.n_pieces, sums, N=rule.sums, BLOCK=TILE,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def launch_update(rule: Rule, ready: Prepared, step: Step, sums: Tensor, columns: Mapping[str, int]) -> None:
    """Decides, moves the scopes, writes the new values. ``columns``: places in a row that the update kernel is told."""
    table, space = ready.table, ready.space
    space.take_rates()
    scale = table.one if step.grad_scale is None else step.grad_scale
    found_inf = table.zero if step.found_inf is None else step.found_inf
    rule.finalize[(1,)](
        sums, table.rows, table.scope_group, space.numbers, step.shared, step.steps, step.status, found_inf,
        space.coefficients, table.n_rows, table.n_scopes, table.n_groups,
        **rule.finalize_options, H=rule.hyper, TILE=TILE, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    for launch in table.launches:
        rule.update[(launch.count,)](
            table.rows, launch.pieces, space.coefficients, space.numbers, step.steps, scale, step.status,
            **columns, **rule.update_constants(launch.kind), num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def check_sums(rule: Rule, ready: Prepared, sums: Tensor) -> None:
    """Refuses sums that do not fit."""
    own = ready.space.sums
    if sums.shape != own.shape or sums.dtype != torch.float64 or not sums.is_contiguous():
        refuse(rule, f"sums must be contiguous float64 {list(own.shape)}")


def reduce(rule: Rule, step: Step) -> Tensor:
    """The sums of this process: float64 [S + 1, N], the last row over every tensor."""
    with torch.no_grad(), on(step.shared.device):
        ready = _prepare(rule, step)
        sums = torch.empty_like(ready.space.sums)
        launch_reduce(rule, ready, step, sums, _NO_COLUMNS)
    return sums


def apply_(rule: Rule, step: Step, sums: Tensor) -> None:
    """The rest of a step whose sums, over all processes, are ``sums``."""
    with torch.no_grad(), on(step.shared.device):
        ready = _prepare(rule, step)
        check_sums(rule, ready, sums)
        launch_update(rule, ready, step, sums, {})


def step_(rule: Rule, step: Step) -> None:
    """A whole step."""
    with torch.no_grad(), on(step.shared.device):
        ready = _prepare(rule, step)
        launch_reduce(rule, ready, step, ready.space.sums, _NO_COLUMNS)
        launch_update(rule, ready, step, ready.space.sums, {})


_ARGUMENTS = {
    "rows": "*i64", "pieces": "*i32", "partial": "*fp64", "n_pieces": "i32", "numbers": "*fp64", "steps": "*fp32",
    "grad_scale": "*fp32", "piece_first": "*i64", "sums": "*fp64", "scope_group": "*i64", "status": "*i64",
    "found_inf": "*fp32", "coefficients": "*fp64", "shared": "*fp64",
}  # fmt: skip


def _case(name: str, kernel: Any, constexprs: dict[str, Any], **types: str) -> dict[str, Any]:
    known = _ARGUMENTS | types
    arguments = {a: known.get(a, "i32") for a in kernel.arg_names if a not in constexprs}
    return {
        "name": name,
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
        if not kind.stochastic and rule.reduction is not None:
            yield _case(f"{rule.name} reduce {kind.word}", reduce_kernel, rule.reduce_constants(kind))
        if not kind.stochastic or rule.rounds:
            name = f"{kind.word} stochastic" if kind.stochastic else str(kind.word)
            yield _case(f"{rule.name} update {name}", rule.update, rule.update_constants(kind))
    if rule.reduction is not None:
        yield _case(f"{rule.name} add up", add_up_kernel, {"N": rule.sums, "BLOCK": TILE})
    for shared in ("fp32", "fp64") if rule.shared else ("fp32",):
        constants = {**rule.finalize_options, "H": rule.hyper, "TILE": TILE}
        yield _case(f"{rule.name} finalize {shared}", rule.finalize, constants, shared=f"*{shared}")
