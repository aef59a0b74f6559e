"""What every step of the reference shares: its numbers, the decision to skip it, and stores that heed the decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torsion.ops._frame import Step
from torsion.ops._rules import Rule
from torsion.reference.philox import rounding_bits, stochastic_round

Numbers = dict[str, Tensor]
"""Hyper-parameters of a group by name, 0-dim float64."""


@dataclass(frozen=True)
class Site:
    """What a rule knows of a tensor besides its elements; 0-dim, float64 unless said.

    Attributes:
        numbers: hyper-parameters of its group.
        shared: state of its scope, ``[K]``.
        step: its own steps, this one included.
        first: bool, its first step of a rule that clones.
        clip: factor of the gradient, min(1, max_norm / (norm + 1e-6)).
        dtype: of the element maths.
    """

    numbers: Numbers
    shared: Tensor
    step: Tensor
    first: Tensor
    clip: Tensor
    dtype: torch.dtype

    def decay(self) -> tuple[Tensor, Tensor]:
        """The weight decay that joins the gradient, and the factor by which a decoupled one shrinks the parameter."""
        h, decoupled = self.numbers, self.numbers["decoupled"] != 0
        return torch.where(decoupled, 0.0, h["weight_decay"]), torch.where(
            decoupled, 1 - h["lr"] * h["weight_decay"], 1.0
        )

    def cast(self, *coefficients: Tensor) -> tuple[Tensor, ...]:
        """Coefficients as the element maths takes them."""
        return tuple(c.to(self.dtype) for c in coefficients)


@dataclass(frozen=True)
class Base:
    """A rule as the reference runs it: as an optimizer's step, or as the descent of a Lookbehind cycle.

    Attributes:
        rule: names of its state and hyper-parameters.
        n_sums: how many numbers a tensor is reduced to.
        grad_norm2: which of them is |gradient|^2.
        reduce: (gradient in float64, *states) -> the tensor's sums, 0-dim float64 each.
        descend: (site, parameter, gradient, *states) -> the new (parameter, *states), all in the dtype of the maths.
        advance: moves the state of the scopes, given the pass and the sums. None: they have none.
        clones: numbers of a group -> whether a tensor's first step stays out of its scope's sums, 0-dim bool. None: no.
    """

    rule: Rule
    n_sums: int
    grad_norm2: int
    reduce: Callable[..., Sequence[Tensor]]
    descend: Callable[..., tuple[Tensor, ...]]
    advance: Callable[[Pass, Tensor], None] | None = None
    clones: Callable[[Numbers], Tensor] | None = None


class Pass:
    """One pass over the tensors of a step. Its scalars are tensors on the device: nothing here waits for it."""

    skip: Tensor
    """After :meth:`decide` as in ``status``: 0 go, 1 skip, 2 skipped by an earlier pass of the same outer step."""
    clip: Tensor

    def __init__(self, step: Step, columns: Sequence[str], base: Base | None) -> None:
        """Resolve learning rates held in tensors and the loss scale. ``columns``: names of those of ``hyper``."""
        self.step, self.base = step, base
        self.device = step.shared.device
        rates = iter(step.lrs)
        # unbind keeps Python numbers out of it, so that torch.compile sees no data-dependent value.
        table = step.hyper.to(self.device, non_blocking=True)
        self.groups: list[Numbers] = []
        for g in range(step.hyper.shape[0]):
            row = dict(zip(columns, table[g].unbind(), strict=True))
            if g in self._tensor_rates(step):
                row["lr"] = next(rates).to(self.device, torch.float64, non_blocking=True).reshape(())
            self.groups.append(row)
        self.one = torch.ones((), dtype=torch.float64, device=self.device)
        self.no = torch.zeros((), dtype=torch.bool, device=self.device)
        self.inverse_scale = self.one if step.grad_scale is None else 1 / step.grad_scale.reshape(()).double()
        # Taken before the counters move.
        self.first = [self._first(base, i) for i in range(len(step.params))]

    @staticmethod
    def _tensor_rates(step: Step) -> list[int]:
        if not step.lrs:
            return []
        return [g for g, rate in enumerate(step.hyper[:, 0].tolist()) if rate != rate]

    def _first(self, base: Base | None, i: int) -> Tensor:
        steps = self.step.steps[self.step.slots[i]]
        return self.no if base is None or base.clones is None else base.clones(self.numbers(i)) & (steps == 0)

    def numbers(self, i: int) -> Numbers:
        """Hyper-parameters of tensor i."""
        return self.groups[self.step.groups[i]]

    def dtype(self, i: int) -> torch.dtype:
        """Of the element maths and the state of tensor i."""
        return torch.float64 if self.step.params[i].dtype == torch.float64 else torch.float32

    def grad(self, i: int) -> Tensor:
        """The gradient of tensor i, unscaled and, under ``maximize``, turned round; in the dtype of the maths."""
        pre = torch.where(self.numbers(i)["maximize"] != 0, -self.inverse_scale, self.inverse_scale)
        dtype = self.dtype(i)
        return self.step.grads[i].to(dtype) * pre.to(dtype)

    def base_sums(self, i: int) -> Sequence[Tensor]:
        """What tensor i adds to the sums of the base."""
        assert self.base is not None
        return self.base.reduce(self.grad(i).double(), *(s[i] for s in self.step.states))

    def add_up(self, terms: Callable[[int], Sequence[Tensor]], n: int) -> Tensor:
        """``terms(i)``, n numbers a tensor, by scope, and over every tensor in the last row: float64 ``[S + 1, n]``."""
        step = self.step
        zero = torch.zeros(n, dtype=torch.float64, device=self.device)
        rows = [zero] * (step.shared.shape[0] + 1)
        for i, scope in enumerate(step.scopes):
            total = torch.stack(list(terms(i)))
            if step.weights:
                total = total * step.weights[i]
            rows[-1] = rows[-1] + total
            rows[scope] = rows[scope] + torch.where(self.first[i], zero, total)
        return torch.stack(rows)

    def decide(self, sums: Tensor, grad_norm2: int | None, *, opens: bool = True) -> None:
        """Set ``skip`` and ``clip`` and write ``status``. A total that is not finite skips, as does ``found_inf``."""
        step = self.step
        skipped, norm_bits, before, clip_bits = step.status.unbind()
        bad = ~torch.isfinite(sums[-1]).all()
        if step.found_inf is not None:
            bad = bad | (step.found_inf.reshape(()) != 0)
        over = self.no if opens else before != 0
        self.skip = torch.where(over, 2, bad.to(torch.int64))
        self.clip = self.one
        if grad_norm2 is not None:
            norm = sums[-1, grad_norm2].sqrt()
            norm = torch.where(bad & torch.isfinite(norm), torch.inf, norm)
            if step.max_grad_norm is not None:
                clip = step.max_grad_norm / (norm + 1e-6)
                self.clip = torch.where(clip < 1, clip, 1.0)
            norm_bits = torch.where(over, norm_bits, norm.view(torch.int64))
            clip_bits = torch.where(over, clip_bits, self.clip.view(torch.int64))
        step.status.copy_(torch.stack([skipped + (self.skip == 1), norm_bits, self.skip, clip_bits]))

    def advance(self, sums: Tensor) -> None:
        """Move the scopes and the counters of the base, unless the pass is skipped."""
        step = self.step
        if self.base is not None and self.base.advance is not None:
            self.base.advance(self, sums)
        if step.slots:
            slots = torch.tensor(list(step.slots)).to(self.device, non_blocking=True)
            step.steps.index_add_(0, slots, (self.skip == 0).to(step.steps.dtype).expand(len(step.slots)))

    def set_shared(self, rows: dict[int, Tensor]) -> None:
        """Store the new state of these scopes, unless the pass is skipped."""
        shared = self.step.shared
        old = list(shared.double().unbind(0))
        new = [rows.get(scope, kept) for scope, kept in enumerate(old)]
        shared.copy_(torch.where(self.skip == 0, torch.stack(new), torch.stack(old)))

    def scopes(self) -> dict[int, Numbers]:
        """The scopes that have a tensor, each with the numbers of its first."""
        found: dict[int, Numbers] = {}
        for i, scope in enumerate(self.step.scopes):
            found.setdefault(scope, self.numbers(i))
        return found

    def descend(self, i: int, theta: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """The base's new (parameter, *states) of tensor i from ``theta``, whichever array that is."""
        assert self.base is not None
        step, dtype = self.step, self.dtype(i)
        site = Site(
            numbers=self.numbers(i),
            shared=step.shared[step.scopes[i]].double(),
            step=step.steps[step.slots[i]].double(),
            first=self.first[i],
            clip=self.clip,
            dtype=dtype,
        )
        return self.base.descend(site, theta.to(dtype), grad, *(s[i] for s in step.states))

    def rounded(self, i: int, theta: Tensor) -> Tensor:
        """New values of parameter i in its dtype: to nearest, or at random where its group says so."""
        step, dtype = self.step, self.step.params[i].dtype
        hyper = step.hyper[step.groups[i]]
        if dtype == theta.dtype or hyper[4].item() == 0:
            return theta.to(dtype)
        slot = step.slots[i]
        key = step.keys[i] if step.keys else 0
        # Random numbers go by place in memory, as the kernels see it.
        flat = torch.as_strided(theta, (theta.numel(),), (1,), theta.storage_offset())
        noise = rounding_bits(flat.numel(), int(hyper[5]), key, step.steps[slot].long(), slot, theta.device)
        return torch.as_strided(stochastic_round(flat, dtype, noise), theta.shape, theta.stride())

    def write(self, old: Tensor, new: Tensor, restored: Tensor | None = None) -> None:
        """Store ``new``; when skipping keep ``old`` bit for bit, or take ``restored`` in the pass that finds out."""
        kept = old if restored is None else torch.where(self.skip == 1, restored.to(old.dtype), old)
        old.copy_(torch.where(self.skip == 0, new.to(old.dtype), kept))
