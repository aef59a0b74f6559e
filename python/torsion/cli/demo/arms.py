"""The optimizers that the demo compares: how each is built, and by what it is tuned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import torsion

__all__ = ["Arm", "Choice", "Shrinking", "Strength"]


@dataclass(frozen=True)
class Choice:
    """What is tuned: the learning rate and, for arms that have one, the strength; the others ignore it."""

    rate: float
    strength: float = 0.0


@dataclass(frozen=True)
class Strength:
    """A second tuned setting, that which regularizes an arm, and the values that the recorded grid starts from."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Shrinking:
    """How DemP is set, all but the lasso's peak, which is an arm's strength.

    Attributes:
        noise_std: of the noise at its peak.
        span: the part of the run over which lasso and noise act.
        windows: how many there are in a run, evenly spread.
        batches: of the training, joined into the one that a window looks at: a window costs some ten milliseconds of
            Python per batch, whatever its size.
    """

    noise_std: float
    span: Fraction
    windows: int
    batches: int = 2

    @property
    def words(self) -> str:
        """As in the settings of an arm."""
        return (
            f"torsion.DemP(noise_std={self.noise_std:g}, total_steps={float(self.span):g} steps, "
            f"prune_every=steps/{self.windows}, window=1) on {self.batches} batches joined"
        )


def _nothing(optimizer: Optimizer) -> dict[str, Tensor]:
    return {}


def _damping_and_cosine(optimizer: Optimizer) -> dict[str, Tensor]:
    assert isinstance(optimizer, (torsion.TAM, torsion.AdaTAMW))
    return {"damping": optimizer.damping()["global"], "cosine": optimizer.cosine()["global"]}


@dataclass(frozen=True)
class Arm:
    """One optimizer of a comparison.

    Attributes:
        name: as shown in tables, plots and rates.json.
        settings: everything that is not tuned, in words, for the record.
        rates: learning rates that the recorded grid starts from.
        build: (model, what was chosen) -> optimizer.
        strength: what is tuned beside the rate, if anything.
        evaluations: gradients that one step takes.
        length: how long it trains, in multiples of `--steps`.
        observe: 0-dim tensors to record after a step; read at the end of the run, so that no step waits for the device.
        op: the torsion op it runs on, None for torch's own optimizers.
        after_backward: what its user would do between backward and step; counted as the optimizer's time.
        around: a context around the whole training loop.
        shrinking: prunes while it trains, its lasso's peak being the strength; None: dense.
    """

    name: str
    settings: str
    rates: tuple[float, ...]
    build: Callable[[nn.Module, Choice], Optimizer]
    strength: Strength | None = None
    evaluations: int = 1
    length: Fraction = Fraction(1)
    observe: Callable[[Optimizer], dict[str, Tensor]] = _nothing
    op: str | None = None
    after_backward: Callable[[nn.Module], object] | None = None
    around: Callable[[nn.Module], AbstractContextManager[None]] = lambda model: nullcontext()
    shrinking: Shrinking | None = None

    def steps(self, steps: int) -> int:
        """Steps of this arm where `--steps` says `steps`."""
        return max(1, int(steps * self.length))

    def spending(self, evaluations: int) -> Arm:
        """This arm with as many gradients as an optimizer that takes `evaluations` a step; itself if it is one."""
        length = Fraction(evaluations, self.evaluations)
        return self if length == 1 else dataclasses.replace(self, name=f"{self.name} {float(length):g}x", length=length)


def _octaves(lowest: float, count: int) -> tuple[float, ...]:
    return tuple(lowest * 2**power for power in range(count))


def _clip(model: nn.Module) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), 1.0)


# fused=True is the fastest of torch's own implementations at these sizes, on the CPU as on a GPU.
def _sgd(model: nn.Module, rate: float, weight_decay: float = 5e-4) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=weight_decay, fused=True)


# beta2 = 0.99 rather than 0.999: a run of a few hundred steps must be able to warm up for 1/(1 - beta2) steps,
# which AdaTAM needs because its second moment starts small and uncorrected (specs/tam.md, start-up burst).
def _adamw(model: nn.Module, rate: float) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.1, fused=True)


_RHO = Strength("rho", _octaves(0.1, 3))

SGD = Arm(
    name="SGD",
    settings="torch.optim.SGD(momentum=0.9, weight_decay=5e-4, fused=True)",
    rates=_octaves(0.0125, 6),
    build=lambda model, choice: _sgd(model, choice.rate),
)
TAM = Arm(
    name="TAM",
    settings="torsion.TAM(momentum=0.9, weight_decay=5e-4)",
    rates=_octaves(0.025, 6),
    build=lambda model, choice: torsion.TAM(model.parameters(), lr=choice.rate, momentum=0.9, weight_decay=5e-4),
    observe=_damping_and_cosine,
    op="tam_",
)
ADAMW = Arm(
    name="AdamW",
    settings="torch.optim.AdamW(betas=(0.9, 0.99), weight_decay=0.1, fused=True) after clip_grad_norm_(1.0)",
    rates=_octaves(1e-3, 3),
    build=lambda model, choice: _adamw(model, choice.rate),
    after_backward=_clip,
)
ADATAMW = Arm(
    name="AdaTAMW",
    settings="torsion.AdaTAMW(betas=(0.9, 0.99), weight_decay=0.1, max_grad_norm=1.0)",
    rates=_octaves(2e-4, 3),
    build=lambda model, choice: torsion.AdaTAMW(
        model.parameters(), lr=choice.rate, betas=(0.9, 0.99), weight_decay=0.1, max_grad_norm=1.0
    ),
    observe=_damping_and_cosine,
    op="adatam_",
)

# Against wrong labels every arm may choose how strongly it regularizes, each by its own means and among equally many
# candidates: SGD with a fixed weight decay would be a baseline that nobody would use there.
DECAYED_SGD = Arm(
    name="SGD",
    settings="torch.optim.SGD(momentum=0.9, fused=True)",
    rates=_octaves(0.025, 4),
    strength=Strength("weight decay", _octaves(0.025, 3)),
    build=lambda model, choice: _sgd(model, choice.rate, choice.strength),
)
SAM = Arm(
    name="SAM",
    settings="torsion.SAM(torch.optim.SGD(momentum=0.9, weight_decay=5e-4, fused=True)) in bn_first_pass_only()",
    rates=_octaves(0.025, 4),
    strength=_RHO,
    build=lambda model, choice: torsion.SAM(_sgd(model, choice.rate), rho=choice.strength),
    evaluations=2,
    op="ascent_",
    around=torsion.optim.bn_first_pass_only,
)
LOOKBEHIND = Arm(
    name="Lookbehind",
    settings="torsion.Lookbehind(torch.optim.SGD(momentum=0.9, weight_decay=5e-4, fused=True), k=2, alpha=0.5) "
    "in bn_first_pass_only()",
    rates=_octaves(0.025, 4),
    strength=_RHO,
    build=lambda model, choice: torsion.Lookbehind(_sgd(model, choice.rate), k=2, rho=choice.strength, alpha=0.5),
    evaluations=3,
    op="ascent_",
    around=torsion.optim.bn_first_pass_only,
)
# The global norm is clipped by a factor, which leaves the direction of the ascent as it is.
LOOKBEHIND_ADAMW = Arm(
    name="Lookbehind(AdamW)",
    settings="torsion.Lookbehind(torch.optim.AdamW(betas=(0.9, 0.99), weight_decay=0.1, fused=True), k=2, rho=0.05, "
    "alpha=0.5), each gradient after clip_grad_norm_(1.0)",
    rates=_octaves(1e-3, 3),
    build=lambda model, choice: torsion.Lookbehind(_adamw(model, choice.rate), k=2, rho=0.05, alpha=0.5),
    evaluations=3,
    op="ascent_",
    after_backward=_clip,
)

# DemP against the same optimizer without it. The published peak of the noise, 5e-5, is for a hundred thousand steps;
# over a few hundred a walk of the same length takes 1e-3.
DENSE_SGD = dataclasses.replace(SGD, name="dense", rates=_octaves(0.025, 4))
DENSE_ADAMW = dataclasses.replace(ADAMW, name="dense")


def _shrunk(dense: Arm, shrinking: Shrinking, rates: tuple[float, ...], lasso: tuple[float, ...]) -> Arm:
    return dataclasses.replace(
        dense,
        name="DemP",
        settings=f"{dense.settings}, {shrinking.words}",
        rates=rates,
        strength=Strength("lasso", lasso),
        op="demp_update_",
        shrinking=shrinking,
    )


DEMP_CONVOLUTIONAL = _shrunk(
    DENSE_SGD, Shrinking(noise_std=1e-3, span=Fraction(1, 2), windows=20), _octaves(0.4, 3), _octaves(0.005, 3)
)
DEMP_PERCEPTRON = _shrunk(
    DENSE_SGD, Shrinking(noise_std=1e-3, span=Fraction(1, 2), windows=20), _octaves(0.4, 3), _octaves(0.00125, 3)
)
DEMP_TRANSFORMER = _shrunk(
    DENSE_ADAMW,
    Shrinking(noise_std=1e-3, span=Fraction(1, 2), windows=10, batches=1),
    _octaves(2e-3, 3),
    _octaves(0.002, 3),
)
