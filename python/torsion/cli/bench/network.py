"""Whole cycles of Lookbehind on a network, forward and backward passes on the clock: what a user waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torsion
from torsion.cli.bench.comparisons import Limit
from torsion.cli.bench.eager_cycles import Cycle, eager_lookbehind, judged_cycle
from torsion.cli.bench.figures import Figure, Place
from torsion.cli.bench.gate import GateError
from torsion.cli.bench.timing import Percentiles, clock_of, interleave, stopwatch
from torsion.cli.demo.digits import DIGITS

__all__ = ["network_figures"]

OURS, PUBLISHED = "whole cycle, k=5", "published whole cycle, k=5"

_K, _RHO, _ALPHA, _LR = 5, 0.05, 0.5, 0.05
_BATCH = 32
_RATIO = Limit(0.65, ())
_EVALUATIONS = Limit(_K + 1, ())

_NOTE = (
    "Lookbehind(SGD), forward and backward passes on the clock; the network of the digits demo on 32 images of noise"
)

_CYCLES = 2  # at the gate
_RELATIVE = 1e-4
"""Of the largest movement: float32 rounds in every layer of ten passes (seen: 2e-6; a radius 1 % off: 1.4e-2)."""


class _Backward:
    """``zero_grad``, forward and backward on one batch, counted."""

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        self._model, (self._images, self._labels) = model, batch
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        self._model.zero_grad()
        loss = F.cross_entropy(self._model(self._images), self._labels)
        loss.backward()
        return loss


Taker = Callable[[list[Tensor], _Backward], Callable[[], object]]
"""(parameters, gradients) -> a whole cycle."""


def _sgd(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, _LR, 0.9, weight_decay=5e-4, **options)


def _ours(params: list[Tensor], backward: _Backward) -> Callable[[], object]:
    optimizer = torsion.Lookbehind(_sgd(params), k=_K, rho=_RHO, alpha=_ALPHA)
    return lambda: optimizer.step(backward)


def _published(params: list[Tensor], backward: _Backward) -> Callable[[], object]:
    return _evaluated(eager_lookbehind(_sgd(params), _K, _RHO, _ALPHA), backward)


def _judge(params: list[Tensor], backward: _Backward) -> Callable[[], object]:
    fast = [p.detach().clone().requires_grad_() for p in params]
    step = _sgd(fast, foreach=False).step
    return _evaluated(judged_cycle(fast, step, params, k=_K, rho=_RHO, alpha=_ALPHA, asam=False), backward)


def _evaluated(cycle: Cycle, backward: _Backward) -> Callable[[], object]:
    def whole() -> None:
        for _ in cycle():
            backward()

    return whole


def _made(taker: Taker, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], _Backward, Callable[[], None]]:
    """The network of the digits demo, the same for everybody, on noise; its parameters, gradients and cycle."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DIGITS.model().to(device, dtype)
        images, labels = torch.randn(_BATCH, 1, 8, 8), torch.randint(10, (_BATCH,))
    backward = _Backward(model, (images.to(device, dtype), labels.to(device)))
    params: list[Tensor] = list(model.parameters())
    cycle = taker(params, backward)

    def whole() -> None:
        cycle()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return params, backward, whole


def _check(taker: Taker, name: str, device: torch.device) -> None:
    found, right = _trained(taker, device, torch.float32), _trained(_judge, device, torch.float64)
    start = _made(_judge, device, torch.float64)[0]
    moved = max((b - s).abs().max().item() for b, s in zip(right, start, strict=True))
    error = max((a.double() - b).abs().max().item() for a, b in zip(found, right, strict=True))
    if not error <= _RELATIVE * moved:  # written so that NaN fails
        raise GateError(
            f"{name} on the digits network: a parameter is {error:.2g} away from the float64 reference after "
            f"{_CYCLES} cycles, rounding explains {_RELATIVE * moved:.2g}; nothing is reported"
        )


def _trained(taker: Taker, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    params, _, whole = _made(taker, device, dtype)
    with torch.backends.cudnn.flags(allow_tf32=False):  # it rounds to ten bits
        for _ in range(_CYCLES):
            whole()
    return [p.detach() for p in params]


def network_figures(place: Place) -> Iterator[Figure]:
    """Time of a whole cycle against the published form's, and the gradients each evaluates.

    Raises:
        GateError: one of them computes something else than it should.
    """
    members: dict[str, Taker] = {PUBLISHED: _published, OURS: _ours}
    # The host waits for a GPU, which processor time does not show.
    clock_name, clock = clock_of(place.threads if place.device.type == "cpu" else 0)
    samplers, evaluations = {}, {}
    for name, taker in members.items():
        _check(taker, name, place.device)
        _, backward, whole = _made(taker, place.device, torch.float32)
        whole()
        evaluations[name] = backward.calls
        samplers[name] = stopwatch(whole, clock)
    rounds = interleave(samplers, [PUBLISHED], place.rounds, lambda _: None)
    for name in members:
        ratio: Percentiles = rounds.ratio(name)
        yield Figure.at(
            place, name, "digits", "x", _RATIO if name == OURS else None,
            value=ratio.p50, against=PUBLISHED, clock=clock_name, p20=ratio.p20, p80=ratio.p80,
            seconds=rounds.of(name).p50, baseline_seconds=rounds.of(PUBLISHED).p50, evaluations=evaluations[name],
            rounds=rounds.kept, dropped=rounds.dropped,
            note=_NOTE if name == OURS else "",
        )  # fmt: skip
    yield Figure.at(place, f"{OURS}: gradients", "digits", "gradients", _EVALUATIONS, value=evaluations[OURS])
