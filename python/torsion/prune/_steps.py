"""What DemP does at each step of the optimizer: the lasso before it, the noise after it, and the count of steps."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from torsion.optim._perturbation import NoiseRows, Perturbation
from torsion.optim._torque import TorqueOptimizer
from torsion.prune._coordinates import Coordinates
from torsion.prune._counter import StepCounter
from torsion.prune._demp_checks import Settings
from torsion.prune._lasso import Lasso
from torsion.prune._noise import Entry, Noise
from torsion.prune._schedule import Schedule

_SILENT = 1e-8
"""A gradient below this is none to the mask "grad", as in the authors' code."""


class StepHooks:
    r"""The step hooks of an optimizer.

    With t steps taken before, and s the schedule::

        g = g + lasso s(t) sign(gamma)           before the step, on normalization scales
        w = w + noise_std s(t) mask xi(seed, t)  after it; nothing where it was skipped

    The optimizer refers to them weakly: they go when the object does.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, settings: Settings, seed: int) -> None:
        """Nothing acts before :meth:`install`."""
        self.seed = seed
        self.counter = StepCounter(Schedule(settings.schedule, settings.total_steps))
        self.lasso = Lasso(module, optimizer)
        self._module = module
        self._settings = settings
        self._noise: Noise | None = None
        self._fused: Perturbation | None = None  # what kernels of the optimizer's do themselves
        self._masks: dict[Tensor, Tensor] | None = None
        self._weight: float | Tensor = 0.0
        self._skips_before: Tensor | None = None
        self._running: FrameType | None = None  # the call of step() that lasso and noise belong to
        self._new: dict[str, Tensor] = {}  # parameters of the last cut that a gradient is to reach

    def install(self, optimizer: Optimizer) -> Callable[[], object]:
        """Register the hooks; returns what removes them again, which also happens when this object goes.

        Raises:
            ValueError: another DemP acts on this optimizer.
        """
        for hook in optimizer._optimizer_step_pre_hooks.values():
            if isinstance(hook, _Weakly) and hook.method() is not None:
                raise ValueError(
                    f"optimizer ({type(optimizer).__name__}) has a DemP already, and lasso and noise would act twice; "
                    "call close() on the other one first"
                )
        handles = [
            optimizer.register_step_pre_hook(_Weakly(self._before)),
            optimizer.register_step_post_hook(_Weakly(self._after)),
        ]
        removal = weakref.finalize(self, _remove, handles, optimizer)
        removal.atexit = False
        return removal

    def renew(self, coordinates: Mapping[str, Coordinates], live: Mapping[str, tuple[int, Tensor]]) -> None:
        """Take new masks and coordinates for the noise."""
        rows = live if self._settings.noise_mask == "row" else None
        self._noise = Noise(self._module, coordinates, rows)
        self._fused = None

    def expect_gradients(self, params: Mapping[str, Tensor]) -> None:
        """Warn at the next step if it meets no gradient in any of ``params``, which a cut made."""
        self._new = dict(params)

    @_disable_dynamo
    @torch.no_grad()
    def _before(
        self, call: FrameType, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._running is not None and _within(call, self._running):
            return None  # a subclass called its base's step(), which runs the hooks again
        self._running = call
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph captures optimizer.step(): lasso and noise differ at every step and would be frozen; "
                "capture forward and backward only, and step outside the graph"
            )
        found = getattr(optimizer, "found_inf", None)
        self._skips_before = optimizer.skipped_steps() if isinstance(optimizer, TorqueOptimizer) else None
        if self._skips_before is not None:
            self.counter.follow(self._skips_before.device)
        elif found is not None:
            self.counter.follow(found.device)
        self._weight = self.counter.scaled(self._settings.lasso)
        if isinstance(optimizer, TorqueOptimizer):
            self._fuse(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._gradients_are_there()
            return None

        def with_lasso() -> Any:
            loss = closure()
            with torch.no_grad():
                self._gradients_are_there()
            return loss

        if len(args) > 1:
            return (args[0], with_lasso, *args[2:]), kwargs
        return args, {**kwargs, "closure": with_lasso}

    def _fuse(self, optimizer: TorqueOptimizer) -> None:
        """Leave lasso and noise to the optimizer's kernels as far as they take them."""
        assert self._noise is not None
        if self._fused is None or not self._noise.holds():
            entries = self._noise.entries()
            self._fused = self._perturbation(optimizer, entries) if optimizer._takes_perturbation() else Perturbation()
            takes = bool(self._fused.scales or self._fused.noise)
            optimizer._perturb(self._fused if takes else None)
        self._fused.lasso, self._fused.step = self._weight, self.counter.now()
        self._fused.sigma = self.counter.scaled(self._settings.noise_std)
        self.lasso.in_kernel = self._weight if self._fused.scales else None

    def _perturbation(self, optimizer: TorqueOptimizer, entries: list[Entry]) -> Perturbation:
        s = self._settings
        noise = {
            e.param: NoiseRows(e.columns, e.row_live, e.rows, e.tensor_id)
            for e in entries
            if s.noise_std and s.noise_mask != "grad" and e.plain and optimizer._takes_noise(e.param)
        }
        return Perturbation(scales=set(self.lasso.parameters()) if s.lasso else (), noise=noise, seed=self.seed)

    def _gradients_are_there(self) -> None:
        new, self._new = self._new, {}
        if new and all(p.grad is None for p in new.values()):
            warnings.warn(
                f"DemP: no gradient reached {next(iter(new))} or any other parameter that the last cut made, so that "
                "they do not train; what computes with the old ones, such as a CUDA graph captured before the cut, "
                "must be made anew",
                stacklevel=2,
            )
        if self._settings.lasso and self.lasso.in_kernel is None:
            self.lasso.add(self._weight)
        if self._settings.noise_mask == "grad" and self._settings.noise_std:
            self._masks = self._loud()

    def _loud(self) -> dict[Tensor, Tensor]:
        """Which elements have a gradient, the lasso's included; before the step, which may change ``p.grad``."""
        masks: dict[Tensor, Tensor] = {}
        for p in self._module.parameters():
            total = self.lasso.total(p)
            if total is not None:
                masks[p] = total.abs() >= _SILENT * self.lasso.gradient_scale(p.device)
        return masks

    @_disable_dynamo
    @torch.no_grad()
    def _after(self, call: FrameType, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if call is not self._running:
            return
        self._running = None
        found, skipped = getattr(optimizer, "found_inf", None), None
        if self._skips_before is not None and isinstance(optimizer, TorqueOptimizer):
            skipped = optimizer.skipped_steps() > self._skips_before
        elif found is not None:
            skipped = found.reshape(()) != 0
        self.lasso.remove()
        masks, self._masks = self._masks, None
        if self._noise is not None and self._settings.noise_std:
            sigma = self.counter.scaled(self._settings.noise_std)
            if skipped is not None:
                sigma = torch.where(skipped, 0.0, torch.as_tensor(sigma, dtype=torch.float64))
            noised = () if self._fused is None else {p for p in self._fused.noise if p.grad is not None}
            self._noise.add_(sigma, self.seed, self.counter.now(), masks, noised)
        self.counter.count(skipped)


class _Weakly:
    """A hook that calls a method as long as its object lives."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = weakref.WeakMethod(method)

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        method = self.method()
        return None if method is None else method(sys._getframe(1), optimizer, args, kwargs)


def _within(call: FrameType, outer: FrameType) -> bool:
    """Whether ``outer`` still runs and called ``call``; it does not where it ended with an exception."""
    frame = call.f_back
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is outer


def _remove(handles: list[Any], optimizer: Optimizer) -> None:
    for handle in handles:
        handle.remove()
    if isinstance(optimizer, TorqueOptimizer):
        optimizer._perturb(None)
