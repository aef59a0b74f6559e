"""The passes of a Lookbehind outer step over lists of tensors (arXiv 2307.16704), as ``csrc/rules/lookbehind.h``.

With gradient reuse an outer step is ``ascent_(opens=True)``, k - 1 times ``descent_ascent_``, then ``descent_blend_``;
for an adaptive alpha ``descent_`` into ``perturbed``, then ``blend_``. Each takes new gradients, but for the blend.
:class:`torsion.Lookbehind` makes these calls and keeps the buffers.

Common to all: lists of n tensors of one device. ``params`` are float32, float64, bfloat16 or float16 and dense;
``grads`` have their parameter's dtype, sizes and strides; every other list is laid out as ``params`` in float32
(float64 for float64 parameters). ``perturbed`` are the perturbed weights in full, needed where a parameter is bfloat16
or float16 and then holds their rounded copy; elsewhere the parameter itself, which None stands for. ``status`` is int64
``[4]`` as in :func:`torsion.ops.tam_`. A gradient that is not finite, or a ``found_inf`` that is not 0, gives the
parameters the slow weights, counts once, and turns the passes that follow into no-ops until one opens an outer step
again. ``backend`` is "cuda", "triton", "cpu" or "reference"; TORSION_BACKEND or the best for the device when None.
Nothing waits for the device.

All raise ValueError for a back end that cannot run here, and RuntimeError, which names list and position, for tensors
that do not fit.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torsion.ops import _backends, _dispatch, _native
from torsion.ops._cycle import RULES, SLOT, STATES, stream_names
from torsion.ops._frame import COMMON_HYPER, Phase
from torsion.ops._rules import BASES

Tensors = Sequence[Tensor]

_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_STOCHASTIC = {torch.bfloat16: 4, torch.float16: 5}


def ascent_(
    params: Tensors,
    grads: Tensors,
    slows: Tensors,
    status: Tensor,
    *,
    rho: float,
    eta: float = 0.0,
    scaled: Sequence[bool] | None = None,
    maximize: bool = False,
    opens: bool = True,
    perturbed: Tensors | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Ascend: q = q + rho T^2 g / (|T g| + 1e-16), the norm over all n tensors.

    20 bytes per float32 element, 16 when not opening; 4 more with ``scaled``.

    Args:
        params: the perturbed weights q; updated.
        grads: gradients at q.
        slows: receive q as it was if ``opens``; else read, if the pass is skipped.
        status: updated.
        rho: length of the ascent, in units of the parameters.
        eta: T = |q| + eta on tensors that are ``scaled`` (ASAM), else 1.
        scaled: n booleans; None for plain SAM.
        maximize: ascend against the gradient.
        opens: the first pass of an outer step.
        perturbed: see the module.
        found_inf: one number on the device; not 0 skips.
        backend: see the module.
    """
    n, device = len(params), status.device
    rule = ("opening_ascent" if opens else "ascent") + ("" if scaled is None else "/asam")
    hyper = [0.0] * len(COMMON_HYPER) + [rho, eta, 0.0]
    hyper[COMMON_HYPER.index("maximize")] = float(maximize)
    phase = Phase(
        list(params), list(grads), [], torch.zeros(1, 0, device=device), torch.zeros(n, device=device), status,
        torch.tensor([hyper], dtype=torch.float64), [], [0] * n, [0] * n, list(range(n)), found_inf=found_inf,
        rule=rule, slow=list(slows), perturbed=_full(params, perturbed), scaled=_flags(scaled, n), opens=opens,
    )  # fmt: skip
    run_(phase, backend)


def descent_ascent_(
    base: str,
    params: Tensors,
    grads: Tensors,
    states: Sequence[Tensors],
    sources: Tensors,
    targets: Tensors,
    slows: Tensors,
    shared: Tensor | None,
    steps: Tensor,
    status: Tensor,
    hyper: Tensor,
    *,
    scopes: Sequence[int],
    groups: Sequence[int],
    scaled: Sequence[bool] | None = None,
    perturbed: Tensors | None = None,
    lrs: Tensors = (),
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    backend: str | None = None,
) -> None:
    """A step of the base from ``sources`` to ``targets`` and the next ascent of ``params``, both with ``grads``.

    Args:
        base: "sgd", "sgd_momentum", "adam" (AdamW too), "tam" or "adatam".
        params: the perturbed weights; updated.
        grads: gradients there.
        states: the base's state, one list per name: ``momentum_buffer``, or ``exp_avg`` and ``exp_avg_sq``; updated.
        sources: fast weights before the step; the slow ones for the first descent.
        targets: fast weights after it; may be those of ``sources``.
        slows: slow weights, read if the pass is skipped.
        shared: ``[S, 3]`` cosines of "tam" and "adatam", updated; None for the others.
        steps: ``[n]`` float32, steps of the base taken by each tensor; updated.
        status: updated.
        hyper: ``[G, H]`` float64 on the CPU: the base's columns, then rho, eta and alpha
            (``torsion.ops.columns("descent_ascent/<base>")`` names them).
        scopes: row of ``shared`` for each tensor, 0 without.
        groups: row of ``hyper`` for each tensor.
        scaled: n booleans for ASAM; None for plain SAM.
        perturbed: see the module.
        lrs: rates in tensors for groups whose lr is NaN in ``hyper``.
        found_inf: one number on the device; not 0 skips.
        max_grad_norm: clip the base's gradient ("tam", "adatam").
        backend: see the module.
    """
    rule = f"descent_ascent/{base}" + ("" if scaled is None else "/asam")
    common = (params, grads, states, slows, shared, steps, status, hyper, scopes, groups, lrs, found_inf, max_grad_norm)
    phase = _descent(rule, *common)
    phase.source, phase.target = list(sources), list(targets)
    phase.perturbed, phase.scaled = _full(params, perturbed), _flags(scaled, len(params))
    run_(phase, backend)


def descent_(
    base: str,
    params: Tensors,
    grads: Tensors,
    states: Sequence[Tensors],
    sources: Tensors,
    targets: Tensors,
    slows: Tensors,
    shared: Tensor | None,
    steps: Tensor,
    status: Tensor,
    hyper: Tensor,
    *,
    scopes: Sequence[int],
    groups: Sequence[int],
    perturbed: Tensors | None = None,
    lrs: Tensors = (),
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    backend: str | None = None,
) -> None:
    """A step of the base from ``sources`` to ``targets``; ``params`` stay, unless they are the targets.

    Arguments as in :func:`descent_ascent_`.
    """
    common = (params, grads, states, slows, shared, steps, status, hyper, scopes, groups, lrs, found_inf, max_grad_norm)
    phase = _descent(f"descent/{base}", *common)
    phase.source, phase.target, phase.perturbed = list(sources), list(targets), _full(params, perturbed)
    run_(phase, backend)


def descent_blend_(
    base: str,
    params: Tensors,
    grads: Tensors,
    states: Sequence[Tensors],
    sources: Tensors,
    slows: Tensors,
    shared: Tensor | None,
    steps: Tensor,
    status: Tensor,
    hyper: Tensor,
    *,
    scopes: Sequence[int],
    groups: Sequence[int],
    lrs: Tensors = (),
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    backend: str | None = None,
) -> None:
    """The last step f of the base from ``sources``; then ``params`` = s + alpha (f - s) with alpha of ``hyper``.

    Arguments as in :func:`descent_ascent_`; ``params`` are written only.
    """
    common = (params, grads, states, slows, shared, steps, status, hyper, scopes, groups, lrs, found_inf, max_grad_norm)
    phase = _descent(f"descent_blend/{base}", *common)
    phase.source = list(sources)
    run_(phase, backend)


def blend_(
    params: Tensors,
    fasts: Tensors,
    slows: Tensors,
    firsts: Tensors,
    alphas: Tensor,
    status: Tensor,
    *,
    scopes: Sequence[int],
    backend: str | None = None,
) -> None:
    """``params`` = s + alpha (f - s) with alpha = (1 + cos(f_1 - s, f - s)) / 2 over each scope; 24 bytes per element.

    Args:
        params: receive the new slow weights.
        fasts: f, fast weights after the last descent; may be ``params``.
        slows: s.
        firsts: f_1, fast weights after the first.
        alphas: ``[S, 1]`` float64, receives alpha of each scope: 1/2 where a displacement is 0.
        status: updated.
        scopes: row of ``alphas`` for each tensor.
        backend: see the module.
    """
    n = len(params)
    phase = Phase(
        list(params), [], [], alphas, torch.zeros(n, device=status.device), status,
        torch.zeros(1, len(COMMON_HYPER) + 3, dtype=torch.float64), [], list(scopes), [0] * n, list(range(n)),
        rule="blend/adaptive", source=list(fasts), slow=list(slows), first=list(firsts), opens=False,
    )  # fmt: skip
    run_(phase, backend)


def _descent(
    rule: str, params: Tensors, grads: Tensors, states: Sequence[Tensors], slows: Tensors, shared: Tensor | None,
    steps: Tensor, status: Tensor, hyper: Tensor, scopes: Sequence[int], groups: Sequence[int], lrs: Tensors,
    found_inf: Tensor | None, max_grad_norm: float | None,
) -> Phase:  # fmt: skip
    name = rule.split("/")[1]
    if name not in BASES:
        raise ValueError(f"base={name!r} has no fused descent; use one of {', '.join(BASES)}")
    shared = torch.zeros(1, 0, device=status.device) if shared is None else shared
    return Phase(
        list(params), list(grads), [list(s) for s in states], shared, steps, status, hyper, list(lrs), list(scopes),
        list(groups), list(range(len(params))), found_inf=found_inf, max_grad_norm=max_grad_norm, rule=rule,
        slow=list(slows), opens=False,
    )  # fmt: skip


def _full(params: Tensors, perturbed: Tensors | None) -> list[Tensor]:
    return list(params if perturbed is None else perturbed)


def _flags(scaled: Sequence[bool] | None, n: int) -> list[bool]:
    return [False] * n if scaled is None else list(scaled)


def run_(phase: Phase, backend: str | None) -> None:
    """A pass on the back end asked for, TORSION_BACKEND's, or the best for the device."""
    chosen = _backends.choose(phase.status.device.type, backend)[0]
    streams = streams_of(phase)
    if "target" in streams:
        streams.pop("first", None)  # a descent has none; below, the target takes its place
    _dispatch.refuse_misfits(phase.rule, phase, streams)
    if chosen in ("triton", "reference"):
        _dispatch.run_phase_(phase, None, chosen)
        torch.autograd.graph.increment_version([t for name in streams if name != "grad" for t in streams[name]])
        return
    names = stream_names(phase.rule, BASES.get(phase.rule.split("/")[1]) if "descent" in phase.rule else None)
    places = {"source": "fast", "target": "first"}  # of the table made here
    table = _table(phase, {places.get(name, name): tensors for name, tensors in streams.items()})
    workspace = None
    if chosen == "cuda":
        size = table.workspace_bytes("lookbehind")
        workspace = torch.empty(size, dtype=torch.uint8, device=phase.status.device)
    torch.ops.torsion.lookbehind_planned_(
        table.address, RULES[phase.rule]["number"], [SLOT[places.get(name, name)] for name in names], phase.opens,
        phase.shared, phase.steps, phase.status, phase.hyper, phase.lrs, phase.found_inf, phase.max_grad_norm, 0, None,
        workspace,
    )  # fmt: skip
    torch.autograd.graph.increment_version([t for name in streams if name != "grad" for t in streams[name]])


def streams_of(phase: Phase) -> dict[str, Sequence[Tensor]]:
    """The lists of a pass by name; those it does not have are left out."""
    streams: dict[str, Sequence[Tensor]] = {
        "param": phase.params,
        "grad": phase.grads,
        **dict(zip(STATES, phase.states, strict=False)),
        "slow": phase.slow,
        "source": phase.source,
        "target": phase.target,
        "first": phase.first,
        "perturbed": phase.perturbed,
    }
    return {name: tensors for name, tensors in streams.items() if len(tensors)}


def _table(phase: Phase, streams: dict[str, Sequence[Tensor]]) -> Any:
    n = len(phase.params)
    stochastic = phase.hyper[:, COMMON_HYPER.index("stochastic")].tolist()
    nowhere = array("Q", bytes(8 * n))
    table = _native.plan.Table()
    table.build(
        pointers=[array("Q", map(Tensor.data_ptr, streams[s])) if s in streams else nowhere for s in SLOT],
        numel=array("q", map(Tensor.numel, phase.params)),
        kinds=[
            (_KINDS | _STOCHASTIC if stochastic[g] else _KINDS)[p.dtype]
            for p, g in zip(phase.params, phase.groups, strict=True)
        ],
        scopes=list(phase.scopes),
        groups=list(phase.groups),
        slots=list(phase.slots),
        weights=list(phase.weights),
        keys=list(phase.keys),
        scaled=[int(x) for x in phase.scaled],
        n_scopes=phase.shared.shape[0],
        n_groups=phase.hyper.shape[0],
    )
    return table
