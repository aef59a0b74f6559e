"""An outer step in fused passes: k + 2 of them with gradient reuse, each a reduction and an update over all tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torsion.ops import _backends
from torsion.optim import _bases
from torsion.optim._cycle import Settings
from torsion.optim._passes import PassCycle
from torsion.optim._torque import TorqueOptimizer


class FusedCycle(PassCycle):
    """The base descends within the passes. Nothing waits for the device; nothing is allocated after one cycle."""

    fused = True

    def __init__(self, base: Optimizer, settings: Settings) -> None:
        """Check the back end; everything else waits for the first phase.

        Raises:
            ValueError: the back end is unknown or cannot run on the parameters' device.
        """
        super().__init__(base, settings)
        self._base: Any = _bases.base_of(base)
        # A base of ours counts the steps that it skips itself in the same place.
        self._skipped_alone = base.skipped_steps() if isinstance(base, TorqueOptimizer) else None
        chosen = {_backends.choose(p.device.type, settings.backend) for *_, p in self._base._all()}
        self.why = "; ".join(sorted(f"{name} kernels: {why}" for name, why in chosen))

    @staticmethod
    def obstacle(base: Optimizer, settings: Settings) -> str:
        """What keeps ``base`` from this path, or an empty string."""
        return _bases.obstacle(base)

    @property
    def _adaptive(self) -> bool:
        return self.settings.alpha == "adaptive" and self.settings.k > 1

    @property
    def _blends(self) -> bool:
        return self._adaptive

    def ascend(self, *, opens: bool, found_inf: Tensor | None) -> None:
        """See :class:`Cycle`."""
        parts = self._ready(opens=opens, with_states=False)
        rule = ("opening_ascent" if opens else "ascent") + self._suffix()
        self._run(parts, self._call(rule, {}, found_inf, opens))

    def descend(self, i: int, *, ascends: bool, last: bool, found_inf: Tensor | None) -> None:
        """See :class:`Cycle`."""
        parts = self._ready(opens=False, with_states=True)
        if isinstance(self._base, TorqueOptimizer):
            self._base._stepped = True
        first = "first" if self.settings.keeps_first else "fast"  # where the first descent leaves its result
        source = "slow" if i == 1 else first if i == 2 else "fast"
        base = self._base._rule.name
        if last and not self._adaptive:
            self._run(parts, self._call(f"descent_blend/{base}", {"source": source}, found_inf))
        elif last:
            # The perturbed weights have had their last gradient: their place takes the last fast ones.
            route = {"source": source, "target": "perturbed", "first": first}
            blend = self._call("blend/adaptive", {"source": "perturbed", "first": first}, None)
            if len(parts) == 1 and self._base._mesh is None and parts[0].closes:
                parts[0].close(self._call(f"last_descent/{base}", route, found_inf), blend)
                return
            self._run(parts, self._call(f"descent/{base}", route, found_inf))
            self._run(parts, blend)
        else:
            rule = f"descent_ascent/{base}{self._suffix()}" if ascends else f"descent/{base}"
            route = {"source": source, "target": first if i == 1 else "fast"}
            self._run(parts, self._call(rule, route, found_inf))

    def skipped(self) -> Tensor:
        """See :class:`Cycle`."""
        count = super().skipped()
        return count if self._skipped_alone is None or not self._base._flats else count - self._skipped_alone
