"""What TAM and AdaTAM share: the sums, the smoothed cosine and the decision to skip."""

from __future__ import annotations

import torch
from torch import Tensor

from torsion.ops._frame import Step
from torsion.ops._rules import Rule
from torsion.reference.philox import rounding_bits, stochastic_round


class Scalars:
    """The scalars of one step of ``rule``, as tensors on the device: nothing here waits for it."""

    def __init__(self, rule: Rule, step: Step) -> None:
        """Resolve learning rates held in tensors and the loss scale."""
        self.step = step
        rates = iter(step.lrs)
        self.device = step.shared.device
        # unbind keeps Python numbers out of it, so that torch.compile sees no data-dependent value.
        table = step.hyper.to(self.device, non_blocking=True)
        self.hyper: list[dict[str, Tensor]] = []
        for g in range(step.hyper.shape[0]):
            row = dict(zip(rule.hyper, table[g].unbind(), strict=True))
            if g in self._tensor_rates(step):
                row["lr"] = next(rates).to(self.device, torch.float64, non_blocking=True).reshape(())
            self.hyper.append(row)
        one = torch.ones((), dtype=torch.float64, device=self.device)
        self.inverse_scale = one if step.grad_scale is None else 1 / step.grad_scale.reshape(()).double()

    @staticmethod
    def _tensor_rates(step: Step) -> list[int]:
        if not step.lrs:
            return []
        return [g for g, rate in enumerate(step.hyper[:, 0].tolist()) if rate != rate]

    def grad(self, i: int) -> Tensor:
        """The gradient of tensor i, unscaled and, under ``maximize``, turned round; in the dtype of the maths."""
        step, hyper = self.step, self.hyper[self.step.groups[i]]
        dtype = step.states[0][i].dtype
        pre = torch.where(hyper["maximize"] != 0, -self.inverse_scale, self.inverse_scale)
        return step.grads[i].to(dtype) * pre.to(dtype)

    def first(self, i: int) -> Tensor:
        """Whether tensor i only seeds its momentum in this step (``init="clone"``)."""
        hyper = self.hyper[self.step.groups[i]]
        clone = hyper.get("clone", torch.zeros_like(hyper["lr"]))
        return (clone != 0) & (self.step.steps[self.step.slots[i]] == 0)


def reduce(rule: Rule, step: Step) -> Tensor:
    """Sums (<m, g>, |g|^2, |m|^2) per scope, and over every tensor in the last row: float64 ``[S + 1, 3]``."""
    scalars = Scalars(rule, step)
    zero = torch.zeros(3, dtype=torch.float64, device=scalars.device)
    rows = [zero] * (step.shared.shape[0] + 1)
    for i, momentum in enumerate(step.states[0]):
        m, g = momentum.double(), scalars.grad(i).double()
        total = torch.stack([(m * g).sum(), (g * g).sum(), (m * m).sum()])
        if step.weights:
            total = total * step.weights[i]
        rows[-1] = rows[-1] + total
        scope = step.scopes[i]
        rows[scope] = rows[scope] + torch.where(scalars.first(i), zero, total)
    return torch.stack(rows)


def advance(scalars: Scalars, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Move the scopes and the counters; return whether the step is skipped and the clipping factor, 0-dim each.

    s = <m, g> / (|m| |g|), 0 if either norm is 0; s^ = decay s^ + (1 - decay) s. A total that is not finite skips.
    """
    step = scalars.step
    mg, gg, mm = sums.unbind(1)
    skip = ~torch.isfinite(sums[-1]).all()
    if step.found_inf is not None:
        skip = skip | (step.found_inf.reshape(()) != 0)
    norm = gg[-1].sqrt()
    norm = torch.where(skip & torch.isfinite(norm), torch.full_like(norm, torch.inf), norm)
    clip = torch.ones_like(norm)
    if step.max_grad_norm is not None:
        clip = (step.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    numbers = torch.stack([norm, clip]).view(torch.int64)
    step.status.copy_(torch.stack([step.status[0] + skip, numbers[0], skip.to(torch.int64), numbers[1]]))

    old = step.shared.double()
    new = list(old.unbind(0))
    for scope in dict.fromkeys(step.scopes):
        i = list(step.scopes).index(scope)  # the first tensor's group speaks for its scope
        decay = scalars.hyper[step.groups[i]]["decay"]
        norms = gg[scope].sqrt() * mm[scope].sqrt()
        cosine = torch.where(norms == 0, torch.zeros_like(norms), mg[scope] / norms).clamp(-1.0, 1.0)
        smoothed = decay * old[scope, 0] + (1 - decay) * cosine
        new[scope] = torch.stack([smoothed, cosine, (1 + smoothed) / 2])
    step.shared.copy_(torch.where(skip, old, torch.stack(new)))
    return skip, clip


def count(step: Step, skip: Tensor) -> None:
    """Add the step to the counters of its tensors, unless it is skipped."""
    if step.slots:
        slots = torch.tensor(list(step.slots)).to(step.steps.device, non_blocking=True)
        step.steps.index_add_(0, slots, (~skip).to(step.steps.dtype).expand(len(step.slots)))


def write(scalars: Scalars, i: int, old: Tensor, new: Tensor, skip: Tensor) -> None:
    """Store a new parameter or state value, rounded to the dtype of ``old``; keep ``old`` bit for bit when skipping."""
    step = scalars.step
    hyper = step.hyper[step.groups[i]]
    if old is step.params[i] and old.dtype != new.dtype and hyper[4].item() != 0:
        slot = step.slots[i]
        key = step.keys[i] if step.keys else 0
        # Random numbers go by place in memory, as the kernels see it.
        flat = torch.as_strided(new, (new.numel(),), (1,), new.storage_offset())
        noise = rounding_bits(flat.numel(), int(hyper[5]), key, step.steps[slot].long(), slot, new.device)
        rounded = stochastic_round(flat, old.dtype, noise)
        new = torch.as_strided(rounded, new.shape, new.stride())
    old.copy_(torch.where(skip, old, new.to(old.dtype)))
