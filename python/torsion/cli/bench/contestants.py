"""Who is timed: how each builds its step, what it must agree with, and the bytes it cannot do without."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import torsion
from torsion.cli.bench.eager_cycles import Cycle, eager_lookbehind, eager_sam, judged_cycle, lean_lookbehind
from torsion.cli.bench.plain import compiled_tam, compiler_obstacle, eager_tam
from torsion.ops import Step as OpStep
from torsion.ops._rules import ADATAM, TAM, Rule
from torsion.reference.adatam import adatam_
from torsion.reference.tam import tam_

__all__ = ["CONTESTANTS", "COPY", "MAX_NORM", "Builder", "Contestant", "copied_bytes", "copy_of"]

MAX_NORM = 1.0
"""Far below the norm of the gradients here, so that clipping really clips."""

_MOMENTUM, _DECAY, _EPS_DAMPING, _BETAS, _EPS, _WEIGHT_DECAY = 0.9, 0.9, 1e-8, (0.9, 0.999), 1e-8, 1e-2

Builder = Callable[[list[Tensor], float], Callable[[], object]]
"""(parameters with gradients, learning rate) -> a step; for a cycle one that yields where it needs new gradients."""


@dataclass(frozen=True, eq=False)
class Contestant:
    """One way of taking a step, or a cycle of Lookbehind.

    Attributes:
        name: as tables show it.
        build: makes the step.
        judge: makes the same step on float64 parameters by other means; None where no such agreement exists.
        bytes_per_element: float32 bytes that the method must move, reading memory anew in each pass; of an eager cycle
            those that its operations move.
        new_gradients: the gradients lie in other tensors each time, as after ``zero_grad(set_to_none=True)``.
        module: an optional package it needs.
        unable: device -> why it cannot run there, or an empty string; asked last, it may take seconds.
        skipped: list -> why it is not run there.
        seconds: time after which no further round begins, for the slow ones.
        note: what must be known to read its figures.
        relative: how far it may be off at the gate, in units of a tensor's largest movement: float32 arithmetic, and
            float32 sums of up to 5e7 terms.
    """

    name: str
    build: Builder
    judge: Builder | None
    bytes_per_element: int | None = None
    new_gradients: bool = False
    module: str | None = None
    unable: Callable[[str], str] | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = float("inf")
    note: str = ""
    relative: float = 2e-5

    def obstacle(self, tensors: str, device: str) -> str:
        """Why it cannot or should not run on a list, or an empty string."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        if tensors in self.skipped:
            return self.skipped[tensors]
        return "" if self.unable is None else self.unable(device)


def _judge(
    rule: Rule, run: Callable[[OpStep], None], scope: str, clip: float | None, own: tuple[float, ...]
) -> Builder:
    """The executable specification itself, without the optimizer around it."""

    def build(params: list[Tensor], lr: float) -> Callable[[], object]:
        n = len(params)
        common = (lr, _WEIGHT_DECAY if rule is ADATAM else 0.0, float(rule is ADATAM), 0.0, 0.0, 0.0)
        double: dict[str, Any] = dict(dtype=torch.float64, device=params[0].device)
        step = OpStep(
            params=[p.detach() for p in params],
            grads=[],
            states=[[torch.zeros_like(p) for p in params] for _ in rule.states],
            shared=torch.zeros(n if scope == "tensor" else 1, 3, **double),
            steps=torch.zeros(n, device=params[0].device),
            status=torch.zeros(4, dtype=torch.int64, device=params[0].device),
            hyper=torch.tensor([(*common, *own)], dtype=torch.float64),
            lrs=[],
            scopes=list(range(n)) if scope == "tensor" else [0] * n,
            groups=[0] * n,
            slots=list(range(n)),
            max_grad_norm=clip,
        )

        @torch.no_grad()
        def advance() -> None:
            step.grads = [p.grad for p in params if p.grad is not None]
            run(step)

        return advance

    return build


def _judge_tam(scope: str = "global", clip: float | None = None) -> Builder:
    return _judge(TAM, tam_, scope, clip, (_MOMENTUM, _DECAY, _EPS_DAMPING, 0.0))


_JUDGE_TAM, _JUDGE_CLIPPED_TAM = _judge_tam(), _judge_tam(clip=MAX_NORM)
_JUDGE_ADATAMW = _judge(ADATAM, adatam_, "global", None, (*_BETAS, _EPS, _DECAY, _EPS_DAMPING, 0.0))


def _tam(**options: Any) -> Builder:
    return lambda params, lr: torsion.TAM(params, lr, _MOMENTUM, **options).step


def _adatamw(params: list[Tensor], lr: float) -> Callable[[], object]:
    return torsion.AdaTAMW(params, lr, _BETAS, _EPS, _WEIGHT_DECAY).step


def _sgd(**options: bool) -> Builder:
    return lambda params, lr: torch.optim.SGD(params, lr, _MOMENTUM, **options).step


def _adamw(**options: bool) -> Builder:
    def build(params: list[Tensor], lr: float) -> Callable[[], object]:
        on_gpu = params[0].device.type == "cuda"  # there it is captured in a graph
        return torch.optim.AdamW(params, lr, _BETAS, _EPS, _WEIGHT_DECAY, capturable=on_gpu, **options).step

    return build


def _clipped(inner: Builder) -> Builder:
    def build(params: list[Tensor], lr: float) -> Callable[[], object]:
        step = inner(params, lr)

        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            step()

        return clip_and_step

    return build


# torch's own kernels stand in for the loss scaler: the same launches, without the host's part of GradScaler. The scale
# is 1, because unscaling works in place and the same gradients are unscaled again in every replay of a graph.
def _unscaled_sgd(params: list[Tensor], lr: float) -> Callable[[], object]:
    optimizer = torch.optim.SGD(params, lr, _MOMENTUM, fused=True)
    found, scale = torch.zeros(1, device=params[0].device), torch.ones(1, device=params[0].device)
    optimizer.found_inf = found.reshape(())  # type: ignore[attr-defined]

    def step() -> None:
        grads = [p.grad for p in params if p.grad is not None]
        found.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, scale)
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def _scaled_tam(params: list[Tensor], lr: float) -> Callable[[], object]:
    optimizer = torsion.TAM(params, lr, _MOMENTUM, max_grad_norm=MAX_NORM)
    optimizer.grad_scale = torch.ones((), device=params[0].device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.zeros((), device=params[0].device)  # type: ignore[attr-defined]
    return optimizer.step


def _published(params: list[Tensor], lr: float) -> Callable[[], object]:
    module = importlib.import_module("pytorch_optimizer")
    step: Callable[[], object] = module.TAM(params, lr, _MOMENTUM).step
    return step


def _not_in_a_graph(device: str) -> str:
    return "it cannot be replayed as a graph, as steps on a GPU are timed here" if device == "cuda" else ""


# Cycles. Their weight decay is the authors'; Adam's eps is large, because at 1e-8 the first step of an element is the
# sign of its gradient, and that of one in 1e7 hangs on how float32 rounded the place it was evaluated at.
_SLOW_STEP, _CYCLE_DECAY, _CYCLE_EPS = 0.5, 5e-4, 1e-2


def _rho(params: list[Tensor], asam: bool = False) -> float:
    """A radius that moves elements by about 1, which changes the gradients of the gate as much as another batch would.

    ASAM's moves grow with the weights: a few ascents of that size and the largest of 1e7 elements leaves float32.
    """
    return (3e-3 if asam else 1.0) * math.sqrt(sum(p.numel() for p in params))


def _cycle_sgd(params: list[Tensor], lr: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr, _MOMENTUM, weight_decay=_CYCLE_DECAY, **options)


def _cycle_adamw(params: list[Tensor], lr: float, **options: Any) -> torch.optim.Optimizer:
    on_gpu = params[0].device.type == "cuda"
    return torch.optim.AdamW(params, lr, _BETAS, _CYCLE_EPS, _WEIGHT_DECAY, capturable=on_gpu, **options)


def _cycle_tam(params: list[Tensor], lr: float) -> torch.optim.Optimizer:
    return torsion.TAM(params, lr, _MOMENTUM)


def _base(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Builder:
    return lambda params, lr: make(params, lr, **options).step


def _one_step(inner: Builder) -> Builder:
    """A step of the base alone, its gradients evaluated just before it like those of the cycles held against it."""

    def build(params: list[Tensor], lr: float) -> Cycle:
        step = inner(params, lr)

        def cycle() -> Iterator[None]:
            yield
            step()

        return cycle

    return build


def _lookbehind(base: Callable[..., torch.optim.Optimizer], k: int, **options: Any) -> Builder:
    def build(params: list[Tensor], lr: float) -> Cycle:
        optimizer = base(params, lr)
        # Without names, tensors of one dimension would be left out, and some lists have no others.
        optimizer.param_groups[0]["asam_scaled"] = True
        rho = _rho(params, options.get("asam", False))
        return _phases(torsion.Lookbehind(optimizer, k=k, rho=rho, **options), k)

    return build


def _sam(params: list[Tensor], lr: float) -> Cycle:
    return _phases(torsion.SAM(_cycle_sgd(params, lr), rho=_rho(params)), 1)


def _phases(optimizer: torsion.Lookbehind, k: int) -> Cycle:
    def cycle() -> Iterator[None]:
        yield
        optimizer.ascent_step()
        for _ in range(k):
            yield
            optimizer.descent_step()

    return cycle


def _eager(form: Callable[..., Cycle], fused: bool | None = None, **options: Any) -> Builder:
    return lambda params, lr: form(_cycle_sgd(params, lr, fused=fused), rho=_rho(params), **options)


def _judge_cycle(base: Builder, k: int, alpha: float | None = _SLOW_STEP, asam: bool = False) -> Builder:
    def build(params: list[Tensor], lr: float) -> Cycle:
        fast = [p.detach().clone().requires_grad_() for p in params]
        return judged_cycle(fast, base(fast, lr), params, k=k, rho=_rho(params, asam), alpha=alpha, asam=asam)

    return build


_LONG_COMPILE = {
    "gpt2": "compiling 148 tensors takes five minutes",
    "tiny": "compiling 1000 tensors takes longer still",
}
_JUDGE_SGD, _JUDGE_ADAMW = _sgd(foreach=False), _adamw(foreach=False)
_JUDGE_CLIPPED_SGD = _clipped(_JUDGE_SGD)
_BASE_SGD, _BASE_ADAMW = _base(_cycle_sgd, foreach=False), _base(_cycle_adamw, foreach=False)
_JUDGE_CYCLE, _JUDGE_ADAPTIVE_CYCLE = _judge_cycle(_BASE_SGD, 5), _judge_cycle(_BASE_SGD, 5, alpha=None)
_JUDGE_SAM = _judge_cycle(_BASE_SGD, 1, alpha=1.0)


def _waits(device: str) -> str:
    return "it waits for the device at every tensor, which a graph cannot" if device == "cuda" else ""


COPY = "copy"
"""The yardstick in every round: one tensor as large as the list, copied."""


def copy_of(numel: int, device: torch.device) -> Callable[[], object]:
    """A step that reads and writes ``numel`` float32 elements and does nothing else."""
    source = torch.ones(numel, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copied_bytes(device: torch.device) -> int:
    """Bytes per element that :func:`copy_of` moves: a processor also reads the lines that it is about to write."""
    return 8 if device.type == "cuda" else 12


# clip_grad_norm_ sums squares in float32. On the CPU the norm of 5e7 elements comes out 0.4 % short, of 1.2e8 1.3 %.
_TORCH_NORM = 1e-2
_TORCH_NORMS = 5e-2  # five ascents by such a norm

CONTESTANTS = {
    made.name: made
    for made in (
        Contestant("SGD fused", _sgd(fused=True), _JUDGE_SGD, 20),
        Contestant("SGD foreach", _sgd(foreach=True), _JUDGE_SGD),
        Contestant("TAM", _tam(), _JUDGE_TAM, 28),
        Contestant("TAM, scope tensor", _tam(scope="tensor"), _judge_tam("tensor"), 20),
        Contestant("TAM, new gradients", _tam(), _JUDGE_TAM, 28, new_gradients=True, unable=_not_in_a_graph),
        Contestant("clip + SGD fused", _clipped(_sgd(fused=True)), _JUDGE_CLIPPED_SGD, 32, relative=_TORCH_NORM),
        Contestant("clip + SGD foreach", _clipped(_sgd(foreach=True)), _JUDGE_CLIPPED_SGD, relative=_TORCH_NORM),
        Contestant("TAM, max_grad_norm", _tam(max_grad_norm=MAX_NORM), _JUDGE_CLIPPED_TAM, 28),
        Contestant("eager foreach TAM", eager_tam, _JUDGE_TAM),
        Contestant("compiled TAM", compiled_tam, _JUDGE_TAM, skipped=_LONG_COMPILE, unable=compiler_obstacle),
        Contestant(
            "pytorch_optimizer TAM",
            _published,
            None,
            module="pytorch_optimizer",
            unable=_not_in_a_graph,
            seconds=240,
            note="not checked: its update is an element-wise product, not the cosine of the method",
        ),
        Contestant("unscale + clip + SGD fused", _unscaled_sgd, _JUDGE_CLIPPED_SGD, 40, relative=_TORCH_NORM),
        Contestant("TAM, max_grad_norm, scaled", _scaled_tam, _JUDGE_CLIPPED_TAM, 28),
        Contestant("AdamW fused", _adamw(fused=True), _JUDGE_ADAMW, 28),
        Contestant("AdamW foreach", _adamw(foreach=True), _JUDGE_ADAMW),
        Contestant("AdaTAMW", _adatamw, _JUDGE_ADATAMW, 36),
        Contestant("one SGD step", _one_step(_base(_cycle_sgd, fused=True)), _one_step(_BASE_SGD), 20),
        Contestant("one AdamW step", _one_step(_base(_cycle_adamw, fused=True)), _one_step(_BASE_ADAMW), 28),
        Contestant("one TAM step", _one_step(_tam()), _one_step(_JUDGE_TAM), 28),
        Contestant("Lookbehind(SGD), k=5", _lookbehind(_cycle_sgd, 5), _JUDGE_CYCLE, 32 * 5 + 16),
        Contestant(
            "Lookbehind(SGD), k=5, new gradients",
            _lookbehind(_cycle_sgd, 5),
            _JUDGE_CYCLE,
            32 * 5 + 16,
            new_gradients=True,
            unable=_not_in_a_graph,
        ),
        Contestant("Lookbehind(SGD), k=2", _lookbehind(_cycle_sgd, 2), _judge_cycle(_BASE_SGD, 2), 32 * 2 + 16),
        Contestant(
            "Lookbehind(SGD), k=5, adaptive",
            _lookbehind(_cycle_sgd, 5, alpha="adaptive"),
            _JUDGE_ADAPTIVE_CYCLE,
            32 * 5 + 32,
        ),
        Contestant(
            "Lookbehind(SGD), k=5, ASAM",
            _lookbehind(_cycle_sgd, 5, asam=True),
            _judge_cycle(_BASE_SGD, 5, asam=True),
            36 * 5 + 16,
        ),
        # Adam's second moment is read and written once more a descent; TAM reads its momentum beside each norm.
        Contestant("Lookbehind(AdamW), k=5", _lookbehind(_cycle_adamw, 5), _judge_cycle(_BASE_ADAMW, 5), 40 * 5 + 16),
        Contestant("Lookbehind(TAM), k=5", _lookbehind(_cycle_tam, 5), _judge_cycle(_JUDGE_TAM, 5), 36 * 5 + 16),
        Contestant("SAM(SGD)", _sam, _JUDGE_SAM, 44),
        Contestant(
            "published Lookbehind, k=5",
            _eager(eager_lookbehind, k=5, alpha=_SLOW_STEP),
            _JUDGE_CYCLE,
            112 * 5 + 44,
            relative=_TORCH_NORMS,
        ),
        Contestant(
            "published Lookbehind, k=5, adaptive",
            _eager(eager_lookbehind, k=5, alpha=None),
            _JUDGE_ADAPTIVE_CYCLE,
            112 * 5 + 120,
            unable=_waits,
            relative=_TORCH_NORMS,
        ),
        Contestant(
            "lean eager Lookbehind, k=5",
            _eager(lean_lookbehind, fused=True, k=5, alpha=_SLOW_STEP),
            _JUDGE_CYCLE,
            68 * 5 + 4,
            relative=_TORCH_NORMS,
        ),
        Contestant("eager SAM", _eager(eager_sam), _JUDGE_SAM, 84, relative=_TORCH_NORMS),
    )
}
"""Name -> contestant."""
