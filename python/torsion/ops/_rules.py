"""The update rules as Python sees them: names of their state and of their columns in ``hyper``."""

from __future__ import annotations

from dataclasses import dataclass

from torsion.ops._frame import COMMON_HYPER


@dataclass(frozen=True)
class Rule:
    """One update rule; ``csrc/rules/<name>.h`` holds its mathematics.

    Attributes:
        name: the ops are ``<name>_`` (lists) and ``<name>_planned_`` (launch table).
        states: state keys, in the order of the rule's streams after parameter and gradient.
        hyper: columns of the ``hyper`` tensor.
    """

    name: str
    states: tuple[str, ...]
    hyper: tuple[str, ...]

    @property
    def op(self) -> str:
        """Name of the list op."""
        return f"{self.name}_"


TAM = Rule("tam", ("momentum_buffer",), (*COMMON_HYPER, "momentum", "decay", "eps_damping", "clone"))
ADATAM = Rule(
    "adatam",
    ("exp_avg", "exp_avg_sq"),
    (*COMMON_HYPER, "beta1", "beta2", "eps", "decay", "eps_damping", "bias_correction"),
)
RULES = {rule.op: rule for rule in (TAM, ADATAM)}

CYCLE_HYPER = ("rho", "eta", "alpha")
"""Columns of ``hyper`` behind the base's (behind the common ones for a pass without a base) in a Lookbehind cycle."""

SGD = Rule("sgd", (), (*COMMON_HYPER, "momentum", "dampening", "nesterov"))
SGD_MOMENTUM = Rule("sgd_momentum", ("momentum_buffer",), SGD.hyper)
ADAM = Rule("adam", ("exp_avg", "exp_avg_sq"), (*COMMON_HYPER, "beta1", "beta2", "eps"))
BASES = {rule.name: rule for rule in (SGD, SGD_MOMENTUM, ADAM, TAM, ADATAM)}
"""Rules that a cycle can descend with."""

PASSES = ("ascent_", "descent_ascent_", "descent_", "descent_blend_", "blend_")
"""Ops of a Lookbehind cycle."""


def columns(phase_rule: str) -> tuple[str, ...]:
    """Names of the columns of ``hyper`` that a pass of a cycle takes."""
    base = BASES.get(phase_rule.split("/")[1]) if phase_rule.count("/") else None
    return (*(base.hyper if base else COMMON_HYPER), *CYCLE_HYPER)
