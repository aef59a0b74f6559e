"""The demo's tables: what each optimizer reached at what cost, and how the optimizers differ."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from torsion.cli.demo.arms import Arm
from torsion.cli.demo.comparison import summarize
from torsion.cli.demo.outcome import Outcome, backends_used, count
from torsion.cli.demo.registry import Block
from torsion.cli.demo.tasks import Metric
from torsion.cli.demo.training import Run
from torsion.cli.demo.weight_noise import DRAWS

__all__ = ["difference_table", "result_table"]


def difference_table(outcome: Outcome) -> Table:
    """How every arm did against every other of its block."""
    table = Table(
        title="differences over paired seeds, ± half of the 95 % interval of their mean (noise: it contains zero)",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("", no_wrap=True)
    for metric in outcome.task.results:
        table.add_column(_heading(metric, "points" if metric.unit == "%" else metric.unit), justify="right")
    for block in outcome.comparison.blocks:
        table.add_row(f"equal {block.equal}", style="bold")
        for names, group in itertools.groupby(outcome.differences(block), key=lambda difference: difference.names):
            table.add_row(f"  {names}", *(difference.cell() for difference in group))
        table.add_section()
    return table


def _heading(metric: Metric, unit: str) -> str:
    # The unit stays with the last word.
    return textwrap.fill(f"{metric.label},\N{NO-BREAK SPACE}{unit}", 13, break_long_words=False).replace(
        "\N{NO-BREAK SPACE}", " "
    )


def result_table(outcome: Outcome, block: Block) -> Table:
    """One row per arm of the block."""
    columns = _columns(outcome)
    table = Table(title=_title(outcome, block), caption=_caption(outcome, block), box=box.SIMPLE_HEAD)
    table.collapse_padding = outcome.several  # more columns than fit otherwise
    table.add_column("optimizer", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right")
    for arm in block.arms:
        table.add_row(arm.name, *(cell(arm, outcome.of(arm)) for cell in columns.values()))
    return table


def _title(outcome: Outcome, block: Block) -> str:
    environment, settings = outcome.environment, outcome.settings
    blocks = outcome.comparison.blocks
    if block is not blocks[0]:
        return f"equal {block.equal}"
    title = (
        f"{outcome.task.name}: {outcome.task.summary}\n{settings['steps']} steps, {_seeds(settings['seeds'])}, "
        f"{environment['device']}, {count(environment['threads'], 'thread')}, torch {environment['torch']}, "
        f"{backends_used(environment)}"
    )
    return title if not outcome.several else f"{title}\n\nequal {block.equal}"


def _caption(outcome: Outcome, block: Block) -> str | None:
    if block is not outcome.comparison.blocks[-1]:
        return None
    lines = ["mean ± standard deviation over seeds; milliseconds are medians"]
    if outcome.several:
        lines.append("opt. step is the optimizer alone, seconds per run are those of all training steps")
    else:
        lines[0] += "; training loss and damping are means"
        lines.append(f"over the last {outcome.window} steps; opt. step is the optimizer alone, train step includes it")
    strengths: dict[str, list[str]] = {}
    for arm in outcome.comparison.blocks[0].arms:
        if arm.strength:
            strengths.setdefault(arm.strength.name, []).append(arm.name)
    if strengths:
        told = ", ".join(f"{name} of {' and '.join(arms)}" for name, arms in strengths.items())
        lines.append(f"strength: {told}; rate and strength from the recorded grid")
    if outcome.task.weight_noise:
        levels = ", ".join(f"{level:g}" for level in outcome.task.weight_noise)
        lines.append(f"weight noise: mean over the levels {levels} and {DRAWS} draws at each")
    return "\n".join(lines)


_Cell = Callable[[Arm, list[Run]], str]


def _columns(outcome: Outcome) -> dict[str, _Cell]:
    """Heading -> what stands in an arm's row."""
    rates, strengths = outcome.settings["rates"], outcome.settings["strengths"]
    columns: dict[str, _Cell] = {"best\nrate": lambda arm, runs: f"{rates[arm.name]:g}"}
    if strengths:
        columns["best\nstrength"] = lambda arm, runs: f"{strengths[arm.name]:g}" if arm.name in strengths else "-"
    if outcome.several:
        columns["steps x\ngradients"] = _gradients
    for metric in outcome.task.results:
        columns[_heading(metric, metric.unit)] = _finals(metric)
    if not outcome.several:
        columns["training\nloss"] = lambda arm, runs: _shown([_tail(run.loss, outcome.window) for run in runs], 4)
    columns["ms/opt.\nstep"] = lambda arm, runs: _mean([run.median_ms("optimizer_ms") for run in runs])
    if outcome.several:
        columns["seconds\nper run"] = lambda arm, runs: _mean([run.seconds for run in runs], 1)
    else:
        columns["ms/train\nstep"] = lambda arm, runs: _mean([run.median_ms("training_ms") for run in runs])
    if any("damping" in run.observed for run in outcome.runs):
        columns["damping"] = lambda arm, runs: _mean(
            [_tail(run.observed["damping"], outcome.window) for run in runs if "damping" in run.observed]
        )
    return columns


def _gradients(arm: Arm, runs: list[Run]) -> str:
    return f"{len(runs[0].loss)} x {arm.evaluations} = {runs[0].gradients}" if runs else "-"


def _finals(metric: Metric) -> _Cell:
    return lambda arm, runs: _shown([run.final(metric.key) for run in runs], metric.digits)


def _shown(values: Sequence[float], digits: int) -> str:
    return summarize(values).show(digits)


def _mean(values: Sequence[float], digits: int = 2) -> str:
    return f"{summarize(values).mean:.{digits}f}" if values else "-"


def _tail(values: Sequence[float], window: int) -> float:
    return statistics.fmean(values[-window:])


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
