"""Lookbehind-SAM (arXiv 2307.16704): the passes of an outer step, each a reduction and an update over all tensors.

    ascent        q += rho T^2 a / (|T a| + 1e-16)         T = 1; ASAM: |q| + eta on scaled tensors
    descent       f  = base(f, b)                          base: sgd.py, adam.py, tam.py, adatam.py
    interpolation s  = s + alpha (f - s)                   alpha fixed, or (1 + cos(f_1 - s, f_k - s)) / 2

One kernel serves all passes: PASS is the part of ``Phase.rule`` before the first slash, BASE the name of the base.

    opening_ascent    q from a, and s = q before it        descent_ascent    descent i and ascent i + 1, one gradient
    ascent            q from a                             descent           a descent alone
    descent_blend     the last descent, then alpha fixed   blend             the interpolation alone

A gradient that is not finite skips the pass: the update kernel then gives the parameters the slow weights instead, and
the passes that follow do nothing. Nothing waits for the device, and the launches are the same whatever happens.

float32 bytes per element with base SGD + momentum: opening_ascent 4 + 16, ascent 4 + 12 (ASAM: reduce 8),
descent_ascent 4 + 28, descent_blend 4 + 20, descent 4 + 20, blend 12 + 12. The twin of ``csrc/rules/lookbehind.h``,
operation by operation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import adam, adatam, engine, sgd, tam
from .engine import ALWAYS, NEVER, Rule, advance, cosine, decide, open_piece
from .philox import noise_of_blocks, noise_of_elements
from .storage import nearest, stochastic
from .table import (
    GRAD,
    PARAM,
    ROW_GROUP,
    ROW_KEY,
    ROW_SCALED,
    ROW_SCOPE,
    ROW_SLOT,
    ROW_WIDTH,
    SECOND_STATE,
    SEED,
    STATE,
    Prepared,
    Stream,
    prepare,
    refuse,
)

if TYPE_CHECKING:
    from torsion.ops._frame import Phase

# Columns of `hyper` behind the base's: H - 3, H - 2 and H - 1.
RHO = tl.constexpr(3)
ETA = tl.constexpr(2)
ALPHA = tl.constexpr(1)


@triton.jit
def _move_alpha(
    sums, scope_group, numbers, shared, n_scopes, ADAPTIVE: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Alpha of each scope that has a tensor in the pass."""
    for at in range(0, n_scopes, TILE):
        scope = (at + tl.arange(0, TILE)).to(tl.int64)
        k = scope < n_scopes
        group = tl.load(scope_group + scope, mask=k, other=-1)
        k = k & (group >= 0)
        if ADAPTIVE:
            own = sums + 3 * scope
            product = tl.load(own, mask=k, other=0)
            first2 = tl.load(own + 1, mask=k, other=0)
            last2 = tl.load(own + 2, mask=k, other=0)
            alpha = (1 + cosine(product, first2, last2)) / 2
        else:
            alpha = tl.load(numbers + group * H + H - ALPHA, mask=k, other=0)
        tl.store(shared + scope, alpha.to(shared.dtype.element_ty), mask=k)


@triton.jit(do_not_specialize=["n_rows", "n_scopes", "n_groups"])
def finalize_kernel(
    sums, rows, scope_group, numbers, shared, steps, status, found_inf, coefficients, n_rows, n_scopes, n_groups,
    BASE: tl.constexpr, ASAM: tl.constexpr, BLENDS: tl.constexpr, ADAPTIVE: tl.constexpr, OPENS: tl.constexpr,
    N: tl.constexpr, GRAD_NORM2: tl.constexpr, CLIMB: tl.constexpr, OWN: tl.constexpr, WIDTH: tl.constexpr,
    DECAY: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """WIDTH coefficients of a tensor: the base's OWN, slope, offset and scale of an ascent, alpha; BLENDS: alpha alone.

    N sums, of which GRAD_NORM2 is |gradient|^2 and CLIMB |T a|^2; DECAY: column of a base with cosines.
    """
    all_sums = sums + n_scopes.to(tl.int64) * N
    skip, clip = decide(all_sums, numbers + n_groups * H, found_inf, status, N, GRAD_NORM2, OPENS)
    if skip:
        return
    if BASE == "tam" or BASE == "adatam":
        advance(sums, scope_group, numbers, shared, n_scopes, N, H, DECAY, TILE)
    if BLENDS:
        _move_alpha(sums, scope_group, numbers, shared, n_scopes, ADAPTIVE, H, TILE)
    tl.debug_barrier()  # coefficients come from `shared` as it is stored, so that a resumed run gives the same
    for at in range(0, n_rows, TILE):
        row = (at + tl.arange(0, TILE)).to(tl.int64)
        k = row < n_rows
        record = rows + row * ROW_WIDTH
        hyper = numbers + tl.load(record + ROW_GROUP, mask=k, other=0) * H
        out = coefficients + row * WIDTH
        scope = tl.load(record + ROW_SCOPE, mask=k, other=0)
        if BASE != "":
            step = steps + tl.load(record + ROW_SLOT, mask=k, other=0)
            taken = tl.load(step, mask=k, other=0)
            tl.store(step, taken + 1, mask=k)
        if BASE == "sgd":
            sgd.set_coefficients(out, hyper, k)
        elif BASE == "sgd_momentum":
            sgd.set_momentum_coefficients(out, hyper, k, taken)
        elif BASE == "adam":
            adam.set_coefficients(out, hyper, k, taken)
        elif BASE == "tam":
            tam.set_coefficients(out, hyper, k, taken, tl.load(shared + scope * 3 + 2, mask=k, other=0), clip)
        elif BASE == "adatam":
            adatam.set_coefficients(out, hyper, k, taken, tl.load(shared + scope * 3 + 2, mask=k, other=0), clip)
        if BLENDS:
            tl.store(out, tl.load(shared + scope, mask=k, other=0).to(tl.float64), mask=k)
        else:
            scaled = (tl.load(record + ROW_SCALED, mask=k, other=0) != 0) & ASAM
            rho = tl.load(hyper + H - RHO, mask=k, other=0)
            tl.store(out + OWN, tl.where(scaled, 1.0, 0.0), mask=k)
            tl.store(out + OWN + 1, tl.where(scaled, tl.load(hyper + H - ETA, mask=k, other=0), 1.0), mask=k)
            tl.store(out + OWN + 2, rho / (tl.sqrt(tl.load(all_sums + CLIMB)) + 1e-16), mask=k)
            tl.store(out + OWN + 3, tl.load(hyper + H - ALPHA, mask=k, other=0), mask=k)


@triton.jit
def _ascend(q, grad, c, ASAM: tl.constexpr):
    slope, offset, scale = c
    if ASAM:
        t = slope * tl.abs(q) + offset
        q = q + scale * (t * t) * grad
    else:
        q = q + scale * grad
    return q


@triton.jit
def _interpolate(slow, fast, alpha):
    """As torch.lerp: alpha = 1 gives f and no displacement gives s, bit for bit."""
    d = fast - slow
    return tl.where(alpha < 0.5, slow + alpha * d, fast - (1 - alpha) * d)


@triton.jit
def _restore_span(
    record, begin, first, end, slow, perturbed,
    PASS: tl.constexpr, WORD: tl.constexpr, MATHS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gives the parameters the slow weights; in an opening ascent these are the parameters."""
    params = tl.multiple_of(tl.load(record + PARAM).to(tl.pointer_type(WORD)), ALIGN) + begin
    slows = tl.multiple_of(tl.load(record + slow).to(tl.pointer_type(MATHS)), ALIGN) + begin
    if PASS != "blend" and PASS != "descent_blend":
        points = tl.multiple_of(tl.load(record + perturbed).to(tl.pointer_type(MATHS)), ALIGN) + begin
    for at in range(first, end, BLOCK):
        i = at + tl.arange(0, BLOCK)
        if ALIGN == 1:
            k = i < end
        else:
            k = None
        if PASS == "opening_ascent":
            s = tl.load(params + i, mask=k).to(MATHS)
            tl.store(slows + i, s, mask=k)
        else:
            s = tl.load(slows + i, mask=k)
        if PASS != "blend" and PASS != "descent_blend":
            tl.store(points + i, s, mask=k)
            if WORD != MATHS:
                tl.store(params + i, nearest(s, WORD).to(WORD, bitcast=True), mask=k)
        elif WORD == MATHS:
            tl.store(params + i, s, mask=k)
        else:
            tl.store(params + i, nearest(s, WORD).to(WORD, bitcast=True), mask=k)


@triton.jit
def _update_span(
    record, begin, first, end, pre, c, climb, alpha, noise, source, target, slow, perturbed,
    PASS: tl.constexpr, BASE: tl.constexpr, ASAM: tl.constexpr, WORD: tl.constexpr, MATHS: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The elements ``first`` to ``end`` of a chunk. ALIGN 16: whole blocks on 16-byte addresses; 1: any.

    What an element loads it loads before it stores: two of its addresses may be one.
    """
    lane = tl.arange(0, BLOCK)
    params = tl.multiple_of(tl.load(record + PARAM).to(tl.pointer_type(WORD)), ALIGN) + begin
    slows = tl.multiple_of(tl.load(record + slow).to(tl.pointer_type(MATHS)), ALIGN) + begin
    points = tl.multiple_of(tl.load(record + perturbed).to(tl.pointer_type(MATHS)), ALIGN) + begin
    sources = tl.multiple_of(tl.load(record + source).to(tl.pointer_type(MATHS)), ALIGN) + begin
    targets = tl.multiple_of(tl.load(record + target).to(tl.pointer_type(MATHS)), ALIGN) + begin
    grads = tl.multiple_of(tl.load(record + GRAD).to(tl.pointer_type(WORD)), ALIGN) + begin
    moments = tl.multiple_of(tl.load(record + STATE).to(tl.pointer_type(MATHS)), ALIGN) + begin
    squares = tl.multiple_of(tl.load(record + SECOND_STATE).to(tl.pointer_type(MATHS)), ALIGN) + begin
    for at in range(first, end, BLOCK):
        i = at + lane
        if ALIGN == 1:
            k = i < end
        else:
            k = None
        # Loads
        if PASS != "blend":
            grad = tl.load(grads + i, mask=k).to(MATHS) * pre
        if PASS == "opening_ascent":
            q = tl.load(params + i, mask=k).to(MATHS)
        elif PASS == "ascent" or PASS == "descent_ascent":
            q = tl.load(points + i, mask=k)
        if PASS == "blend" or BASE != "":
            fast = tl.load(sources + i, mask=k)
        if PASS == "blend" or PASS == "descent_blend":
            s = tl.load(slows + i, mask=k)
        # Descent
        if BASE == "sgd":
            fast = sgd.descend(fast, grad, c)
        elif BASE == "sgd_momentum":
            fast, m = sgd.descend_with_momentum(fast, grad, tl.load(moments + i, mask=k), c)
            tl.store(moments + i, m, mask=k)
        elif BASE == "tam":
            fast, m = tam.descend(fast, grad, tl.load(moments + i, mask=k), c)
            tl.store(moments + i, m, mask=k)
        elif BASE == "adam":
            fast, m, v = adam.descend(
                fast, grad, tl.load(moments + i, mask=k), tl.load(squares + i, mask=k), c, MATHS
            )  # fmt: skip
            tl.store(moments + i, m, mask=k)
            tl.store(squares + i, v, mask=k)
        elif BASE == "adatam":
            fast, m, v = adatam.descend(
                fast, grad, tl.load(moments + i, mask=k), tl.load(squares + i, mask=k), c, MATHS
            )  # fmt: skip
            tl.store(moments + i, m, mask=k)
            tl.store(squares + i, v, mask=k)
        # Stores
        if PASS == "opening_ascent":
            tl.store(slows + i, q, mask=k)
        if PASS == "descent" or PASS == "descent_ascent":
            tl.store(targets + i, fast, mask=k)
        if PASS == "blend" or PASS == "descent_blend":
            s = _interpolate(s, fast, alpha)
            if STOCHASTIC:
                seed, element, step, slot = noise
                if ALIGN == 1:
                    bits = noise_of_elements(seed, element + i, step, slot)
                else:
                    bits = noise_of_blocks(seed, element + at, step, slot, BLOCK)
                tl.store(params + i, stochastic(s, bits, WORD).to(WORD, bitcast=True), mask=k)
            elif WORD == MATHS:
                tl.store(params + i, s, mask=k)
            else:
                tl.store(params + i, nearest(s, WORD).to(WORD, bitcast=True), mask=k)
        elif PASS != "descent":
            q = _ascend(q, grad, climb, ASAM)
            tl.store(points + i, q, mask=k)
            if WORD != MATHS:
                tl.store(params + i, nearest(q, WORD).to(WORD, bitcast=True), mask=k)


@triton.jit(do_not_specialize=["source", "target", "slow", "perturbed"])
def update_kernel(
    rows, pieces, coefficients, numbers, steps, grad_scale, status, source, target, slow, perturbed,
    PASS: tl.constexpr, BASE: tl.constexpr, ASAM: tl.constexpr, OWN: tl.constexpr, WIDTH: tl.constexpr,
    WORD: tl.constexpr, MATHS: tl.constexpr, STOCHASTIC: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``source`` ... ``perturbed``: where in a row the addresses of these weights are; of those a pass has not, any."""
    skip = tl.load(status + 2)
    if skip == 2:
        return
    row, record, hyper, begin, whole, end, pre = open_piece(rows, pieces, numbers, grad_scale, H, BLOCK)
    if skip == 1:
        _restore_span(record, begin, 0, whole, slow, perturbed, PASS, WORD, MATHS, 16, BLOCK)
        _restore_span(record, begin, whole, end, slow, perturbed, PASS, WORD, MATHS, 1, BLOCK)
        return
    pre = pre.to(MATHS)
    own = coefficients + row * WIDTH
    c = (pre,)
    if BASE == "sgd":
        c = sgd.read_coefficients(own, MATHS)
    elif BASE == "sgd_momentum":
        c = sgd.read_momentum_coefficients(own, MATHS)
    elif BASE == "adam":
        c = adam.read_coefficients(own, MATHS)
    elif BASE == "tam":
        c = tam.read_coefficients(own, MATHS)
    elif BASE == "adatam":
        c = adatam.read_coefficients(own, MATHS)
    alpha = pre
    climb = (pre, pre, pre)
    if PASS == "blend" or PASS == "descent_blend":
        alpha = tl.load(own + WIDTH - 1).to(MATHS)
    elif PASS != "descent":
        climb = (tl.load(own + OWN).to(MATHS), tl.load(own + OWN + 1).to(MATHS), tl.load(own + OWN + 2).to(MATHS))
    noise = (begin, begin, begin, begin)
    if STOCHASTIC:
        slot = tl.load(record + ROW_SLOT)
        step = tl.load(steps + slot).to(tl.uint32)
        noise = (tl.load(hyper + SEED).to(tl.int64), tl.load(record + ROW_KEY) + begin, step, slot.to(tl.uint32))
    _update_span(
        record, begin, 0, whole, pre, c, climb, alpha, noise, source, target, slow, perturbed,
        PASS, BASE, ASAM, WORD, MATHS, STOCHASTIC, 16, BLOCK,
    )  # fmt: skip
    _update_span(
        record, begin, whole, end, pre, c, climb, alpha, noise, source, target, slow, perturbed,
        PASS, BASE, ASAM, WORD, MATHS, STOCHASTIC, 1, BLOCK,
    )  # fmt: skip


class _Base(NamedTuple):
    """A base: lists of state, columns of its hyper-parameters and coefficients, sums, and two columns it may have."""

    states: int
    hyper: int
    own: int
    reduction: str = "square"
    clone: int = NEVER.value
    decay: int = 0


_BASES = {
    "sgd": _Base(0, 9, sgd.COEFFICIENTS.value),
    "sgd_momentum": _Base(1, 9, sgd.MOMENTUM_COEFFICIENTS.value, clone=ALWAYS.value),
    "adam": _Base(2, 9, adam.COEFFICIENTS.value),
    "tam": _Base(1, 10, tam.COEFFICIENTS.value, "torque", tam.CLONE.value, tam.DECAY.value),
    "adatam": _Base(2, 12, adatam.COEFFICIENTS.value, "torque", decay=adatam.DECAY.value),
}
_NO_BASE = _Base(0, 6, 0)

# Weights that a pass has besides parameters, gradients and the base's state.
_WEIGHTS = {
    "opening_ascent": ("perturbed", "slow"),
    "ascent": ("perturbed", "slow"),
    "descent_ascent": ("source", "target", "perturbed", "slow"),
    "descent": ("source", "target", "perturbed", "slow"),
    "descent_blend": ("source", "slow"),
    "blend": ("source", "slow", "first"),
}


@functools.cache
def rule_of(name: str, opens: bool) -> Rule:
    """The rule of a :class:`torsion.ops._frame.Phase` by its name, which begins an outer step or does not."""
    parts = name.split("/")
    which, asam, adaptive = parts[0], parts[-1] == "asam", parts[-1] == "adaptive"
    with_base, blends = "descent" in which, which == "blend"
    base = _BASES[parts[1]] if with_base else _NO_BASE
    reduction: str | None = base.reduction
    if blends:
        reduction = "displacements" if adaptive else None
    elif asam and not with_base:
        reduction = "none"
    sums = 3 if blends or reduction == "torque" else int(reduction == "square")
    grad_norm2 = -1 if blends else 1 if reduction == "torque" else 0
    width = 1 if blends else base.own + 4
    constants = {"BASE": parts[1] if with_base else "", "ASAM": asam, "OWN": base.own, "WIDTH": width}
    return Rule(
        name=name,
        family="lookbehind/blend" if blends else "lookbehind",
        states=base.states,
        hyper=base.hyper + 3,
        shared=1 if blends else 3 if reduction == "torque" else 0,
        coefficients=width,
        sums=sums + asam,
        reduction=reduction,
        climbs=asam,
        opening=which == "opening_ascent",
        eta=base.hyper + 1,
        clone=base.clone,
        rounds="blend" in which,
        finalize=finalize_kernel,
        update=update_kernel,
        finalize_options={
            **constants, "BLENDS": blends, "ADAPTIVE": adaptive, "OPENS": opens, "N": sums + asam,
            "GRAD_NORM2": grad_norm2, "CLIMB": sums if asam else grad_norm2, "DECAY": base.decay,
        },
        update_options={**constants, "PASS": which},
    )  # fmt: skip


def _prepare(rule: Rule, phase: Phase) -> Prepared:
    engine.check_device(phase, rule)
    names = [n for n in _WEIGHTS[phase.pass_name] if n != "first" or rule.reduction is not None]
    streams = [Stream("params", PARAM.value, phase.params)]
    if phase.pass_name != "blend":
        streams.append(Stream("grads", GRAD.value, phase.grads))
    if rule.states:
        if len(phase.states) != rule.states:
            refuse(rule, f"takes {rule.states} lists of state, has {len(phase.states)}")
        streams += [Stream(f"states[{k}]", STATE.value + k, tensors) for k, tensors in enumerate(phase.states)]
    return prepare(rule, phase, [*streams, *(Stream(n, None, getattr(phase, n)) for n in names)])


def _reduce(rule: Rule, ready: Prepared, phase: Phase, sums: Tensor) -> None:
    at = ready.columns.get
    point = PARAM.value if rule.opening else at("perturbed", 0)
    places = {"point": point, "slow": at("slow", 0), "left": at("first", 0), "right": at("source", 0)}
    engine.launch_reduce(rule, ready, phase, sums, places)


def _apply(rule: Rule, ready: Prepared, phase: Phase, sums: Tensor) -> None:
    places = {name: ready.columns.get(name, 0) for name in ("source", "target", "slow", "perturbed")}
    engine.launch_update(rule, ready, phase, sums, places)


def reduce(phase: Phase) -> Tensor:
    """Sums of the pass, float64 ``[S + 1, N]`` by scope, then over all tensors: the base's, then |T a|^2 under ASAM.

    An ascent alone has |T a|^2, a blend <f_1 - s, f_k - s> and both squared norms. Processes that share an outer step
    add these up.
    """
    rule = rule_of(phase.rule, phase.opens)
    with torch.no_grad(), engine.on(phase.shared.device):
        ready = _prepare(rule, phase)
        sums = torch.empty_like(ready.space.sums)
        _reduce(rule, ready, phase, sums)
    return sums


def apply_(phase: Phase, sums: Tensor) -> None:
    """The rest of the pass from the sums over all processes."""
    rule = rule_of(phase.rule, phase.opens)
    with torch.no_grad(), engine.on(phase.shared.device):
        ready = _prepare(rule, phase)
        engine.check_sums(rule, ready, sums)
        _apply(rule, ready, phase, sums)


def step_(phase: Phase) -> None:
    """A whole pass, in place."""
    rule = rule_of(phase.rule, phase.opens)
    with torch.no_grad(), engine.on(phase.shared.device):
        ready = _prepare(rule, phase)
        _reduce(rule, ready, phase, ready.space.sums)
        _apply(rule, ready, phase, ready.space.sums)


def names() -> Iterator[str]:
    """Every pass, as ``Phase.rule`` has it."""
    for asam in ("", "/asam"):
        yield from (f"opening_ascent{asam}", f"ascent{asam}", *(f"descent_ascent/{base}{asam}" for base in _BASES))
    for base in _BASES:
        yield from (f"descent/{base}", f"descent_blend/{base}")
    yield from ("blend", "blend/adaptive")


def audit_cases() -> Iterator[dict[str, Any]]:
    """What to compile without a GPU, each kernel once; see :func:`torsion.triton_kernels.engine.audit_cases`.

    float16 differs from bfloat16 in its rounding alone, which one base is enough to show.
    """
    seen = []
    for name in names():
        for case in engine.audit_cases(rule_of(name, name.startswith("opening"))):
            constants = case["constexprs"]
            kernel = (case["kernel"], constants, case["signature"])
            halves = constants.get("WORD") == tl.float16 and "sgd_momentum" not in name
            if kernel not in seen and not halves:
                seen.append(kernel)
                yield case
