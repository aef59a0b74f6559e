"""Lookbehind over any base optimizer, through its own ``step()``: plain PyTorch, to be read beside the paper."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torsion.optim import _checks, _layout, _sharding
from torsion.optim._cycle import Cycle, Settings, asam_scaled, parameters


@dataclass(eq=False)
class _Weights:
    """One parameter and its copies; of a DTensor the local parts.

    ``slow`` and ``fast`` have the parameter's dtype, which holds them exactly: the parameter is where an outer step
    starts, and where the base leaves its result.
    """

    param: Tensor
    slow: Tensor
    fast: Tensor
    first: Tensor | None  # the fast weights after the first descent
    perturbed: Tensor | None  # float32 q of a bfloat16 or float16 parameter, which holds it rounded; else None
    name: str = ""
    sign: float = 1.0  # -1 where the base maximizes
    scaled: bool = False  # by T = |q| + eta
    share: float = 1.0  # of this process in sums over the ranks

    @property
    def here(self) -> Tensor:
        return _sharding.local(self.param)

    @property
    def q(self) -> Tensor:
        return self.here if self.perturbed is None else self.perturbed

    def fits(self) -> bool:
        here = self.here
        return (here.shape, here.dtype, here.device) == (self.slow.shape, self.slow.dtype, self.slow.device)

    def wide(self, t: Tensor) -> Tensor:
        """``t`` in the dtype of the arithmetic."""
        return t if t.dtype == torch.float64 else t.float()


def _weights(p: Tensor, settings: Settings) -> _Weights:
    here = _sharding.local(p).detach()
    low = here.dtype in (torch.bfloat16, torch.float16)
    return _Weights(
        p,
        torch.empty_like(here),
        torch.empty_like(here),
        torch.empty_like(here) if settings.keeps_first else None,
        torch.empty_like(here, dtype=torch.float32) if low else None,
    )


class GeneralCycle(Cycle):
    r"""The outer step with the base as a black box.

    With s the slow, f the fast and q the perturbed weights, and a the gradient at q::

        q = s,  f = s
        ascent     q = q + rho a / (|a| + 1e-16)           |.| over all parameters
          ASAM     q = q + rho T^2 a / (|T a| + 1e-16)     T = |q| + eta, 1 on tensors that are not scaled
        descent    f = base step from f with the gradient a, q untouched
        at last    s = s + alpha (f - s)

    The parameters hold q between the phases and f while the base steps. One host sync per descent decides whether the
    base steps; an ascent waits for nothing. Between outer steps only the buffers stay. bfloat16 and float16: q is kept
    in float32, and the interpolation rounds once, but f is what the base makes of a parameter of that dtype.
    """

    fused = False

    def __init__(self, base: Optimizer, settings: Settings) -> None:
        """Nothing is allocated before the first phase."""
        super().__init__(base, settings)
        self._buffers: dict[Tensor, _Weights] = {}
        self._active: dict[Tensor, _Weights] = {}  # those that had a gradient when the outer step began
        self._mesh: _sharding.Mesh | None = None
        self._skip = torch.zeros((), dtype=torch.bool)
        self._skipped = torch.zeros((), dtype=torch.int64)
        self._given_up = False  # the host knows of the skip

    # Phases

    def ascend(self, *, opens: bool, found_inf: Tensor | None) -> None:
        """See :class:`Cycle`."""
        if opens:
            self._open()
        grads = self._gradients()
        if opens:
            _copy([w.slow for w in self._weights], self._here())
        elif self._given_up:
            return
        points = [w.wide(w.slow if opens else w.q) for w in self._weights]
        norm = self._norm(grads, points, found_inf)
        self._note(norm)
        try:
            self._perturb(grads, points, norm)
        except BaseException:  # out of memory, an interrupt: half of q is written
            self.abandon()
            raise

    def descend(self, i: int, *, ascends: bool, last: bool, found_inf: Tensor | None) -> None:
        """See :class:`Cycle`."""
        grads = self._gradients()
        if self._given_up:
            return
        points = [w.wide(w.q) for w in self._weights]
        norm = self._norm(grads, points, found_inf)
        self._note(norm)
        if self._skip.item():
            self._given_up = True
            self.abandon()
            return
        if ascends:  # before the base, which may change p.grad in its step
            self._perturb(grads, points, norm)
        self._base_step(i, last)
        if last:
            self._interpolate()

    def abandon(self) -> None:
        """See :class:`Cycle`."""
        # A parameter that the user replaced by what cannot take them is what the error being handled is about.
        kept = [w for w in self._weights if w.here.shape == w.slow.shape and not _layout.may_overlap(w.here)]
        _copy([w.here for w in kept], [w.slow for w in kept])

    def show_slow(self) -> None:
        """See :class:`Cycle`."""
        for w in self._weights:
            if w.perturbed is None:
                _exchange(w.here, w.slow)
            else:
                w.here.copy_(w.slow)

    def hide_slow(self) -> None:
        """See :class:`Cycle`."""
        for w in self._weights:
            if w.perturbed is None:
                _exchange(w.here, w.slow)
            elif not self._given_up:
                w.here.copy_(w.perturbed)

    def skipped(self) -> Tensor:
        """See :class:`Cycle`."""
        return self._skipped.clone()

    # Checks, before anything is written

    @property
    def _weights(self) -> list[_Weights]:
        return list(self._active.values())

    def _here(self) -> list[Tensor]:
        return [w.here for w in self._weights]

    def _open(self) -> None:
        """Find the parameters that have a gradient, and their buffers."""
        active: dict[Tensor, _Weights] = {}
        names: list[str] = []
        for name, group, i, p in parameters(self.base):
            if p.grad is None:
                continue
            _checks.parameter(name, p)
            _checks.gradient(name, p, p.grad)
            w = self._buffers.get(p)
            if w is None or not w.fits():
                w = _weights(p, self.settings)
            w.name, w.sign = name, -1.0 if group.get("maximize") else 1.0
            w.scaled = self.settings.asam and asam_scaled(group, i, p)
            active[p] = w
            names.append(name)
        filled = [w for w in active.values() if w.here.numel()]
        _checks.distinct(
            array("Q", (w.here.data_ptr() for w in filled)),
            lambda j: filled[j].name,
            "shares memory; make both one Parameter",
        )
        sharded = any(_sharding.is_dtensor(p) for p in active)
        self._mesh = _sharding.Mesh(list(active)) if sharded else None
        for p, w in active.items():
            w.share = 1.0 if self._mesh is None else self._mesh.weight(p)
        device = next((w.slow.device for w in active.values()), self._skip.device)
        self._skip = torch.zeros((), dtype=torch.bool, device=device)
        self._skipped = self._skipped.to(device)
        self._given_up = False
        self._active = active
        held = {p for _, _, _, p in parameters(self.base)}
        self._buffers = {p: w for p, w in {**self._buffers, **active}.items() if p in held}

    def _gradients(self) -> list[Tensor]:
        """The gradients of the parameters that had one when the outer step began, in the dtype of the arithmetic."""
        found: list[Tensor] = []
        for name, _, _, p in parameters(self.base):
            w = self._active.get(p)
            if (w is None) != (p.grad is None):
                now, then = ("a", "none") if w is None else ("no", "one")
                raise RuntimeError(
                    f"{name}: has {now} gradient, but had {then} when the outer step began; "
                    "every evaluation of an outer step must backpropagate to the same parameters"
                )
            if w is None or p.grad is None:
                continue
            _checks.gradient(name, p, p.grad)
            if not w.fits():
                raise RuntimeError(
                    f"{name}: became {w.here.dtype} {tuple(w.here.shape)} on {w.here.device} within an outer step, was "
                    f"{w.slow.dtype} {tuple(w.slow.shape)} on {w.slow.device}; change it between outer steps"
                )
            found.append(p.grad)
        return [
            w.wide(_sharding.local(_sharding.matching(w.param, g))) for w, g in zip(self._weights, found, strict=True)
        ]

    # The equations

    def _scale(self, w: _Weights, q: Tensor) -> Any:
        return q.abs() + self.settings.eta if w.scaled else 1.0

    def _norm(self, grads: Sequence[Tensor], points: Sequence[Tensor], found_inf: Tensor | None) -> Tensor:
        """|T a| over all parameters and ranks, a 0-dim float64; NaN where ``found_inf`` says so."""
        square = torch.zeros((), dtype=torch.float64, device=self._skip.device)
        vectors = [
            self._scale(w, q) * a if w.scaled else a for w, q, a in zip(self._weights, points, grads, strict=True)
        ]
        if vectors:
            norms = torch._foreach_norm(vectors, 2, torch.float64)
            for w, norm in zip(self._weights, norms, strict=True):
                square += w.share * norm.square().to(square.device)
        if found_inf is not None:
            square = torch.where(found_inf.reshape(()).to(square.device) != 0, torch.nan, square)
        if self._mesh is not None:
            self._mesh.all_reduce_(square)
        return square.sqrt()

    def _note(self, norm: Tensor) -> None:
        """Count the outer step as skipped if ``norm`` is not finite, once."""
        bad = ~torch.isfinite(norm)
        self._skipped += bad & ~self._skip
        self._skip |= bad

    def _perturb(self, grads: Sequence[Tensor], points: Sequence[Tensor], norm: Tensor) -> None:
        """Move q from ``points`` along the gradients; to the slow weights once the outer step is abandoned."""
        length = self.settings.rho / (norm + 1e-16)
        for w, q, a in zip(self._weights, points, grads, strict=True):
            t = self._scale(w, q)
            step = w.sign * length.to(q.device)
            moved = q + step * (t * t * a if w.scaled else a)
            w.q.copy_(torch.where(self._skip.to(q.device), w.slow, moved))
        for w in self._weights:
            if w.perturbed is not None:
                w.here.copy_(w.perturbed)

    def _base_step(self, i: int, last: bool) -> None:
        """Have the base step from the fast weights; leave the result in ``fast``, after the last in the parameter."""
        for w in self._weights:
            if last or w.perturbed is not None:
                w.here.copy_(w.slow if i == 1 else w.fast)
            elif i == 1:
                w.fast.copy_(w.here)
                w.here.copy_(w.slow)
            else:
                _exchange(w.here, w.fast)
        self.base.step()
        if last:
            return
        for w in self._weights:
            if w.perturbed is None:
                _exchange(w.here, w.fast)
            else:
                w.fast.copy_(w.here)
                w.here.copy_(w.perturbed)
            if i == 1 and w.first is not None:
                w.first.copy_(w.fast)

    def _interpolate(self) -> None:
        """Set s + alpha (f - s) for alpha < 1/2, else f - (1 - alpha) (f - s): exact at alpha = 1 and where f = s."""
        alphas = self._alphas()
        for w, alpha in zip(self._weights, alphas, strict=True):
            slow, fast = w.wide(w.slow), w.wide(w.here)
            at = alpha.to(slow.device, slow.dtype) if isinstance(alpha, Tensor) else alpha
            w.here.copy_(torch.lerp(slow, fast, at))

    def _alphas(self) -> Sequence[Tensor | float]:
        """The slow step of each tensor: as given, or (1 + cos(f_1 - s, f_k - s)) / 2 in float64."""
        alpha = self.settings.alpha
        if not isinstance(alpha, str):
            return [float(alpha)] * len(self._active)
        if not self._active:
            return []
        dots = torch.stack([self._dots(w) for w in self._weights])
        if self._mesh is not None:
            self._mesh.all_reduce_(dots)
        if self.settings.alpha_scope == "global":
            dots = dots.sum(0, keepdim=True).expand_as(dots)
        both, first, last = dots.unbind(1)
        lengths = first.sqrt() * last.sqrt()
        cosine = torch.where(lengths == 0, 0.0, both / lengths).clamp(-1.0, 1.0)
        return ((1 + cosine) / 2).unbind()

    def _dots(self, w: _Weights) -> Tensor:
        """<d_1, d_k>, |d_1|^2 and |d_k|^2 of this process's part, for d_i = f_i - s."""
        f_1 = w.here if self.settings.k == 1 else w.fast if w.first is None else w.first
        slow = w.slow.double()
        d_1, d_k = f_1.double() - slow, w.here.double() - slow
        dots = torch.stack([(d_1 * d_k).sum(), (d_1 * d_1).sum(), (d_k * d_k).sum()])
        return (w.share * dots).to(self._skip.device)


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, source)


def _exchange(a: Tensor, b: Tensor) -> None:
    """Exchange the contents of two tensors of one dtype."""
    held = a.detach().clone()
    a.copy_(b)
    b.copy_(held)
