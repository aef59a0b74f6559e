r"""Lookbehind-SAM (arXiv 2307.16704) in plain PyTorch, one function per pass of an outer step: the specification.

With s the slow, f the fast and q the perturbed weights, all evaluations of one outer step on one minibatch::

    q = s,  f = s
    ascent         q = q + rho T^2 a / (|T a| + 1e-16)      a the gradient at q; T = 1, ASAM: |q| + eta where scaled
    descent        f = base(f, b)                           b the gradient at the new q; q stays
    ... k times; the gradient b of one descent is the gradient a of the next ascent
    interpolation  s = s + alpha (f - s)                    alpha given, or (1 + cos(f_1 - s, f_k - s)) / 2

=====================  ==============================================================================
``ascent_``            an ascent alone; the first of an outer step keeps the parameters as s
``descent_ascent_``    descent i and ascent i + 1 with one gradient
``descent_``           a descent alone
``descent_blend_``     the last descent and the interpolation with a given alpha
``blend_``             the interpolation alone
=====================  ==============================================================================

An outer step with gradient reuse is an ascent, k - 1 times ``descent_ascent_`` and one ``descent_blend_``. The norm
|T a| runs over all tensors. A gradient that is not finite gives the parameters s again and ends the outer step: what is
left of it does nothing. bfloat16 and float16 parameters are rounded copies of a q in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torsion.ops._frame import Phase
from torsion.ops._rules import columns
from torsion.reference import adam, adatam, sgd, tam
from torsion.reference._step import Pass

BASES = {base.rule.name: base for base in (sgd.BASE, sgd.MOMENTUM_BASE, adam.BASE, tam.BASE, adatam.BASE)}
"""Bases of a descent, by name."""


class _Pass(Pass):
    """The parts that the passes are made of."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        parts = phase.rule.split("/")
        self.asam, self.adaptive = parts[-1] == "asam", parts[-1] == "adaptive"
        self.ascends = "ascent" in parts[0].split("_")
        super().__init__(phase, columns(phase.rule), BASES[parts[1]] if "descent" in parts[0] else None)

    def point(self, i: int) -> Tensor:
        """Where q of tensor i is, in the dtype of the maths; when an outer step begins, at the parameter."""
        return self.phase.params[i].to(self.dtype(i)) if self.opening else self.phase.perturbed[i]

    @property
    def opening(self) -> bool:
        return self.phase.pass_name == "opening_ascent"

    def radius(self, i: int, q: Tensor) -> Tensor:
        """T of tensor i."""
        if not (self.asam and self.phase.scaled[i]):
            return torch.ones_like(q)
        return q.abs() + self.numbers(i)["eta"].to(self.dtype(i))

    # Sums

    @property
    def climb(self) -> int | None:
        """Which sum is |T a|^2."""
        return self.base.n_sums if self.base is not None and self._climbs_apart else self.grad_norm2

    @property
    def _climbs_apart(self) -> bool:
        """Whether |T a|^2 is a sum of its own, behind the base's; where T = 1 the base has it."""
        return self.ascends and (self.base is None or self.asam)

    @property
    def grad_norm2(self) -> int | None:
        """Which sum is reported as the squared norm of the gradient."""
        if self.base is not None:
            return self.base.grad_norm2
        return 0 if self.ascends else None

    def sums(self) -> Tensor:
        """See :func:`phase_sums`."""
        if self.base is None and not self.ascends:
            return self.add_up(self._displacement_sums, 3)
        of_base = 0 if self.base is None else self.base.n_sums
        return self.add_up(self._gradient_sums, of_base + self._climbs_apart)

    def _gradient_sums(self, i: int) -> Sequence[Tensor]:
        found = [] if self.base is None else list(self.base_sums(i))
        if self._climbs_apart:
            found.append((self.radius(i, self.point(i).double()) * self.grad(i).double()).square().sum())
        return found

    def _displacement_sums(self, i: int) -> Sequence[Tensor]:
        if not self.adaptive:
            return [torch.zeros((), dtype=torch.float64, device=self.device)] * 3
        s = self.phase.slow[i].double()
        first, last = self.phase.first[i].double() - s, self.phase.source[i].double() - s
        return [(first * last).sum(), (first * first).sum(), (last * last).sum()]

    def begin(self, sums: Tensor | None) -> Tensor:
        """Decide about the pass; return its sums."""
        sums = self.sums() if sums is None else sums
        self.decide(sums, self.grad_norm2, opens=self.phase.opens)
        if self.base is not None:
            self.advance(sums)
        return sums

    # Equations

    def ascended(self, i: int, grad: Tensor, sums: Tensor) -> Tensor:
        """New q of tensor i, q + rho T^2 a / (|T a| + 1e-16)."""
        assert self.climb is not None
        q = self.point(i)
        t = self.radius(i, q)
        length = self.numbers(i)["rho"] / (sums[-1, self.climb].sqrt() + 1e-16)
        return q + length.to(q.dtype) * (t * t) * grad

    def interpolated(self, i: int, fast: Tensor, alpha: Tensor) -> Tensor:
        """New s of tensor i, s + alpha (f - s): exactly f for alpha = 1, exactly s where nothing moved."""
        s, alpha = self.phase.slow[i], alpha.to(fast.dtype)
        d = fast - s
        return torch.where(alpha < 0.5, s + alpha * d, fast - (1 - alpha) * d)

    # Stores

    def write_descent(self, i: int, fast: Tensor | None, states: Sequence[Tensor]) -> None:
        """Store the fast weights, if given, and the base's state."""
        if fast is not None:
            self.write(self.phase.target[i], fast)
        for old, new in zip((s[i] for s in self.phase.states), states, strict=True):
            self.write(old, new)

    def write_perturbed(self, i: int, moved: Tensor | None = None) -> None:
        """Store q, None: as it is; and its rounded copy where the parameter is one."""
        q, param, slow = self.phase.perturbed[i], self.phase.params[i], self.phase.slow[i]
        self.write(q, q if moved is None else moved, restored=slow)
        if param.dtype != q.dtype:
            self.write(param, param if moved is None else moved, restored=slow)

    def write_slow(self, i: int, slow: Tensor) -> None:
        """Store the new slow weights, which are the parameter's."""
        self.write(self.phase.params[i], self.rounded(i, slow), restored=self.phase.slow[i])


def ascent_(phase: Phase, sums: Tensor | None = None) -> None:
    r"""An ascent alone, in place; as "opening_ascent" it takes the parameters as s and begins there.

    ::

        q = q + rho T^2 a / (|T a| + 1e-16)

    Args:
        phase: the tensors; see :class:`torsion.ops.Phase`. The rule is "opening_ascent" or "ascent", with "/asam" for
            T = |q| + eta on the tensors that are scaled.
        sums: float64 ``[S + 1, 1]`` where they come from elsewhere (an all-reduce): |T a|^2; computed when None.
    """
    tensors = _Pass(phase)
    sums = tensors.begin(sums)
    for i, slow in enumerate(phase.slow):
        moved = tensors.ascended(i, tensors.grad(i), sums)
        if tensors.opening:
            # Also when this pass is skipped: s are the parameters as they stand when an outer step begins.
            slow.copy_(torch.where(tensors.skip == 2, slow, tensors.point(i)))
        tensors.write_perturbed(i, moved)


def descent_ascent_(phase: Phase, sums: Tensor | None = None) -> None:
    r"""Descent i and ascent i + 1 with one gradient b, in place.

    ::

        f = base(f, b)                              from ``source`` into ``target``
        q = q + rho T^2 b / (|T b| + 1e-16)

    The base takes its own view of b (clipped, with weight decay), the ascent the raw one.

    Args:
        phase: the tensors; see :class:`torsion.ops.Phase`. The rule is "descent_ascent/<base>", with "/asam" behind.
        sums: float64 ``[S + 1, N]``: the base's sums, with "/asam" then |T b|^2; computed when None.
    """
    tensors = _Pass(phase)
    sums = tensors.begin(sums)
    for i, source in enumerate(phase.source):
        grad = tensors.grad(i)
        fast, *states = tensors.descend(i, source, grad)
        moved = tensors.ascended(i, grad, sums)
        tensors.write_descent(i, fast, states)
        tensors.write_perturbed(i, moved)


def descent_(phase: Phase, sums: Tensor | None = None) -> None:
    r"""A descent alone, in place; q stays unless the pass is skipped.

    ::

        f = base(f, b)                              from ``source`` into ``target``

    Args:
        phase: the tensors; see :class:`torsion.ops.Phase`. The rule is "descent/<base>".
        sums: float64 ``[S + 1, N]``: the base's sums; computed when None.
    """
    tensors = _Pass(phase)
    tensors.begin(sums)
    for i, source in enumerate(phase.source):
        fast, *states = tensors.descend(i, source, tensors.grad(i))
        tensors.write_descent(i, fast, states)
        tensors.write_perturbed(i)


def descent_blend_(phase: Phase, sums: Tensor | None = None) -> None:
    r"""The last descent and the interpolation with a given alpha, in place.

    ::

        f     = base(f, b)                          from ``source``, not stored
        theta = s + alpha (f - s)

    Args:
        phase: the tensors; see :class:`torsion.ops.Phase`. The rule is "descent_blend/<base>".
        sums: float64 ``[S + 1, N]``: the base's sums; computed when None.
    """
    tensors = _Pass(phase)
    tensors.begin(sums)
    for i, source in enumerate(phase.source):
        fast, *states = tensors.descend(i, source, tensors.grad(i))
        tensors.write_descent(i, None, states)
        tensors.write_slow(i, tensors.interpolated(i, fast, tensors.numbers(i)["alpha"]))


def blend_(phase: Phase, sums: Tensor | None = None) -> None:
    r"""The interpolation alone, in place; ``shared`` ``[S, 1]`` receives the alpha of each scope.

    ::

        alpha = (1 + cos(f_1 - s, f_k - s)) / 2     over the scope; 1/2 if either displacement is 0
        theta = s + alpha (f_k - s)

    Args:
        phase: the tensors; see :class:`torsion.ops.Phase`, f_k is ``source``, f_1 is ``first``. The rule is
            "blend/adaptive", or "blend" for the alpha in ``hyper``.
        sums: float64 ``[S + 1, 3]``: <f_1 - s, f_k - s> and both squared norms, 0 for "blend"; computed when None.
    """
    tensors = _Pass(phase)
    product, first2, last2 = tensors.begin(sums).unbind(1)
    alphas = {}
    for scope, numbers in tensors.scopes().items():
        norms = first2[scope].sqrt() * last2[scope].sqrt()
        cosine = torch.where(norms == 0, 0.0, product[scope] / norms).clamp(-1.0, 1.0)
        alphas[scope] = ((1 + cosine) / 2 if tensors.adaptive else numbers["alpha"]).reshape(1)
    tensors.set_shared(alphas)
    for i, fast in enumerate(phase.source):
        alpha = phase.shared[phase.scopes[i], 0].double()  # as it is stored
        tensors.write_slow(i, tensors.interpolated(i, fast, alpha))


_PASSES: dict[str, Callable[[Phase, Tensor | None], None]] = {
    "opening_ascent": ascent_,
    "ascent": ascent_,
    "descent_ascent": descent_ascent_,
    "descent": descent_,
    "descent_blend": descent_blend_,
    "blend": blend_,
}


def phase_(phase: Phase, sums: Tensor | None = None) -> None:
    """The pass that ``phase.rule`` names."""
    _PASSES[phase.pass_name](phase, sums)


def phase_sums(phase: Phase) -> Tensor:
    """The sums that a pass starts from: float64 ``[S + 1, N]``, the last row over every tensor."""
    return _Pass(phase).sums()
