"""The golden vectors of Lookbehind: outer steps by the authors' code, or derived from it, in full precision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from cycles import OwnSGD, each_reuse, order_of
from helpers import Target, ids
from published import Published, TorchBase
from tolerances import close
from torch import Tensor

import torsion

_FILE = json.loads((Path(__file__).parent / "golden" / "lookbehind.json").read_text())
CASES = {case["id"]: case for case in _FILE["cases"]}
SETTINGS = ("k", "rho", "alpha", "alpha_scope", "asam")
each_case = pytest.mark.parametrize("name", CASES)


def _float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _settings(case: dict[str, Any]) -> dict[str, Any]:
    settings = {key: case["settings"][key] for key in SETTINGS}
    return settings if case["settings"]["eta"] is None else {**settings, "eta": case["settings"]["eta"]}


def _options(case: dict[str, Any]) -> dict[str, float]:
    return {key: case["settings"][key] for key in ("lr", "momentum", "weight_decay")}


class Golden:
    """A case as an optimizer over named tensors, and the closure that counts evaluations."""

    def __init__(
        self, name: str, target: Target, dtype: torch.dtype, reuse: bool = True, cls: Any = torch.optim.SGD
    ) -> None:
        self.case, self.row = CASES[name], tolerances.GOLDEN[dtype]
        start = _float64(self.case["start"])
        self.places = [t["indices"] for t in self.case["tensors"]]
        self.params = [target.parameter(start[place], dtype) for place in self.places]
        self.coefficients = [_float64(self.case["coef"])[place].to(target.device, dtype) for place in self.places]
        named = [(t["name"], p) for t, p in zip(self.case["tensors"], self.params, strict=True)]
        base = cls(named, **_options(self.case))
        self.optimizer = target.optimizer(torsion.Lookbehind, base, reuse_gradients=reuse, **_settings(self.case))
        self.reuse, self.evaluations = reuse, 0

    def closure(self) -> Tensor:
        self.evaluations += 1
        self.optimizer.zero_grad()
        loss = sum(0.5 * (c * p * p).sum() for c, p in zip(self.coefficients, self.params, strict=True))
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    def check(self, tensors: Sequence[Tensor], expected: list[float], where: str) -> None:
        joined = torch.cat([t.detach().cpu().double() for t in tensors])
        close(joined, _float64(expected), self.row, f"{self.case['id']}, {where}")

    def check_end(self) -> None:
        expected = self.case["expected"]
        self.check(self.params, expected["slow"], "slow weights")
        assert self.evaluations == expected["evaluations_reuse" if self.reuse else "evaluations_full"]
        if expected["base_momentum"] is not None:
            state = self.optimizer.base_optimizer.state
            self.check([state[p]["momentum_buffer"] for p in self.params], expected["base_momentum"], "momentum")


def _play(golden: Golden) -> None:
    for outer in golden.case["trace"]:
        golden.optimizer.step(golden.closure)
        golden.check(golden.params, outer["slow"], "slow weights on the way")
    golden.check_end()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=ids)
@each_reuse
@each_case
def test_case(name, reuse, dtype, fast_target):
    _play(Golden(name, fast_target, dtype, reuse))


@pytest.mark.parametrize("name", ["L2", "L7", "L9"])  # momentum, alpha per tensor, ASAM
def test_case_in_triton(name, triton_target):
    _play(Golden(name, triton_target, torch.float64))


@each_reuse
@each_case
def test_case_through_a_class_of_ones_own(name, reuse, fast_target):
    golden = Golden(name, fast_target, torch.float64, reuse, OwnSGD)
    assert not golden.optimizer.fused
    _play(golden)


@each_reuse
@each_case
def test_inner_steps(name, reuse, fast_target):
    """After each phase the parameters hold the perturbed weights of the trace, after the last the slow ones."""
    golden = Golden(name, fast_target, torch.float64, reuse)
    order = order_of(golden.case["settings"]["k"], reuse)
    for outer in golden.case["trace"]:
        for j, phase in enumerate(order):
            golden.closure()
            getattr(golden.optimizer, phase)()
            if j < len(order) - 1:
                inner = outer["inner"][j if reuse else j // 2]
                golden.check(golden.params, inner["perturbed"], f"after phase {j}")
        golden.check(golden.params, outer["slow"], "slow weights on the way")
    golden.check_end()


@each_case
def test_the_judge_of_this_suite_agrees(name):
    """The judge is what everything else is measured with, so it is measured first."""
    case, row = CASES[name], tolerances.GOLDEN[torch.float64]
    start, coefficients = _float64(case["start"]), _float64(case["coef"])
    places = [t["indices"] for t in case["tensors"]]
    group = {"params": [start[place] for place in places], "param_names": [t["name"] for t in case["tensors"]]}
    judge = Published([group], TorchBase(torch.optim.SGD, [group], _options(case)), **_settings(case))
    evaluations = 0

    def gradient(j: int, q: Sequence[Tensor]) -> list[Tensor]:
        nonlocal evaluations
        evaluations += 1
        return [coefficients[place] * x for place, x in zip(places, q, strict=True)]

    for outer in case["trace"]:
        judge.cycle(gradient)
        for inner, q, f in zip(outer["inner"], judge.trace, judge.fast, strict=True):
            close(torch.cat(q), _float64(inner["perturbed"]), row, "perturbed")
            # A rate of 1/20 times a slope of 10 cancels 1/2, exactly only without a fused multiply-add.
            close(torch.cat(f), _float64(inner["fast"]), tolerances.STATE[torch.float64], "fast")
        close(_float64(judge.alphas), _float64(outer["alpha"]), row, "alpha")
        close(torch.cat(judge.slow), _float64(outer["slow"]), row, "slow")
    assert evaluations == case["expected"]["evaluations_full"]
