"""The passes of a Lookbehind cycle as the compiled back ends know them: numbers, streams, places in a row."""

from __future__ import annotations

from typing import Any

from torsion.ops import _native
from torsion.ops._rules import Rule

RULES: dict[str, dict[str, Any]] = {} if _native.plan is None else _native.plan.cycle_rules()
"""Name of a pass -> its number, streams, sums, hyper and shared columns; empty without ``_plan``."""

CLOSING: dict[str, dict[str, Any]] = {} if _native.plan is None else _native.plan.closing_rules()
"""The same of the last descents that run together with the blend after them."""

SLOT = {"param": 0, "grad": 1, "state": 2, "second_state": 3, "slow": 4, "fast": 5, "first": 6, "perturbed": 7}
"""Addresses of a row, by name."""

STATES = ("state", "second_state")


def stream_names(rule: str, base: Rule | None) -> tuple[str, ...]:
    """What each stream of a pass is, in the order of ``csrc/rules/lookbehind.h``.

    "source", "target" and "first" stand for fast weights: which buffer it is, the caller decides.
    """
    states = STATES[: len(base.states)] if base else ()
    return {
        "opening_ascent": ("param", "grad", "perturbed", "param", "slow"),
        "ascent": ("perturbed", "grad", "perturbed", "param", "slow"),
        "descent_ascent": ("source", "target", "grad", *states, "perturbed", "param", "slow"),
        "descent": ("source", "target", "grad", *states, "perturbed", "param", "slow"),
        "descent_blend": ("source", "grad", *states, "slow", "param"),
        "last_descent": ("source", "target", "grad", *states, "param", "slow", "first"),
        "blend": ("source", "slow", "first", "param"),
    }[rule.partition("/")[0]]
