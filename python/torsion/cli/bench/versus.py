"""Steps against steps where there is no list of tensors: the same rounds, clocks and figures as for optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from torsion.cli.bench.comparisons import Limit
from torsion.cli.bench.figures import Figure, Place
from torsion.cli.bench.gate import GateError
from torsion.cli.bench.timing import clock_of, interleave, stopwatch

__all__ = ["BFLOAT16_RELATIVE", "agree", "versus"]

Step = Callable[[], object]

BFLOAT16_RELATIVE = 2.0**-7
"""Of the largest number, for one product or two in a row, summed in float32. Rounding the result to 8 bits moves it by
at most 2^-8. As much again is for what is rounded before it is summed, hidden units or the parts of a product that a
GPU splits: each moves by at most 2^-8 of itself, up or down, and over thousands of terms most of that cancels."""


def versus(
    place: Place,
    where: str,
    baselines: Mapping[str, Step],
    members: Mapping[str, Step],
    limits: Mapping[str, Limit] | None = None,
    *,
    ideal: Mapping[str, float] | None = None,
    notes: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Figure]:
    """Ratios of ``members`` to the fastest of ``baselines``, which come first.

    Args:
        place: where, and how many rounds.
        where: what is worked on; the column that names the list of tensors elsewhere.
        baselines: what a user would otherwise run.
        members: whose ratios are wanted.
        limits: member -> what is asked of it.
        ideal: member -> share of the baseline's work that it has to do; the ratio is then to that share of its time.
        notes: member -> a line below the table.
        dtype: of what is worked on.
    """
    # The host does not wait for a GPU by itself, and processor time does not show it.
    on_gpu = place.device.type == "cuda"
    clock_name, clock = clock_of(0 if on_gpu else place.threads)

    def waited(step: Step) -> Step:
        def whole() -> None:
            step()
            torch.cuda.synchronize(place.device)

        return whole if on_gpu else step

    samplers = {name: stopwatch(waited(step), clock) for name, step in {**baselines, **members}.items()}
    rounds = interleave(samplers, list(baselines), place.rounds, lambda _: None)
    for name in (rounds.baseline, *members):
        share = (ideal or {}).get(name, 1.0)
        ratio = rounds.ratio(name)
        limit = (limits or {}).get(name) if not on_gpu else None
        yield Figure.at(
            place, name, where, "x", limit, value=ratio.p50 / share,
            against=rounds.baseline if share == 1 else f"{share:.4g} of {rounds.baseline}", clock=clock_name,
            p20=ratio.p20 / share, p80=ratio.p80 / share, seconds=rounds.of(name).p50,
            baseline_seconds=rounds.of(rounds.baseline).p50, rounds=rounds.kept, dropped=rounds.dropped,
            note=(notes or {}).get(name, ""), dtype=str(dtype).removeprefix("torch."),
        )  # fmt: skip


def agree(what: str, found: Sequence[Tensor | None], right: Sequence[Tensor | None], relative: float) -> None:
    """Raise GateError unless tensors differ by at most ``relative`` of the largest number in the right one."""
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        if a is None or b is None:
            if a is not b:
                raise GateError(f"{what}: result {i} is missing; nothing is reported")
            continue
        error, allowed = (a.double() - b.double()).abs().max().item(), relative * b.double().abs().max().item()
        if not error <= allowed:  # written so that NaN fails
            raise GateError(
                f"{what}: result {i} is {error:.2g} away from the float64 reference, rounding explains "
                f"{allowed:.2g}; nothing is reported"
            )
