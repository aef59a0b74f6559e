"""DemP: noise and lasso let units die while a network trains, and windows of batches find the dead and cut them out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from torsion.prune import _demp_checks, _ranks, _units
from torsion.prune._coordinates import Coordinates
from torsion.prune._cut import cut
from torsion.prune._demp_checks import Settings
from torsion.prune._report import LayerReport, Report
from torsion.prune._rollback import Snapshot
from torsion.prune._schedule import MAX_STEPS, integer
from torsion.prune._steps import StepHooks
from torsion.prune._structure import trace
from torsion.prune._units import Units
from torsion.prune._window import align_and_keep, observe


class DemP:
    r"""Demon pruning (arXiv 2403.07688): the network shrinks while it trains, its optimizer's state with it.

    ::

        demp = torsion.DemP(model, optimizer, example_inputs, total_steps=len(loader) * epochs)
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss(model(inputs), labels).backward()
            optimizer.step()                      # lasso and noise act in here
            report = demp.step(held_out_inputs)   # cuts every prune_every steps
        demp.finish(held_out_inputs)

    With t steps taken before this one and s the schedule::

        g = g + lasso s(t) sign(gamma)       on every normalization scale that has a gradient
        w = w + optimizer's update
        w = w + noise_std s(t) mask xi       xi standard normal, a function of seed, t and the place of the weight

    A ReLU unit that is silent on all inputs gets neither gradient nor noise and stays so; cut out, nothing changes.
    The lasso drives units there: it is what sets how small the network gets, and it acts on normalization scales, so
    that layers without a normalization hardly shrink.

    Args:
        model: the module that trains, or its DistributedDataParallel.
        optimizer: holds all its trainable parameters; any ``torch.optim.Optimizer`` but sharpness-aware ones.
        example_inputs: a tensor or a tuple of positional arguments the model runs on; its units are found with them.
        total_steps: span of the schedule, >= 1: the steps of the training, or as many as lasso and noise should act.
        lasso: weight of sum |gamma| at the peak of the schedule, >= 0.
        noise_std: standard deviation of the noise at the peak, >= 0; not scaled by the learning rate.
        schedule: "one_cycle" or "constant", see :func:`torsion.prune.schedule`.
        noise_mask: "row", on weight row, bias, scale and shift of live units of the layers in :meth:`live`; "grad", on
            what has a gradient >= 1e-8, the lasso's included; "none", on every parameter that trains.
        also: modules cut alike, such as an EMA copy of the model.
        prune_every: steps from window to window, >= 1.
        prune_after: no window before as many steps, >= 0; past warm-up where running statistics matter.
        window: batches of a window, >= 1.
        criterion: "auto" ("ever_active" behind a ReLU, "abs_max" elsewhere), "ever_active", "abs_max", "sum_le",
            "dormant". The last two, and tau > 0, may cut units that still act; the report says how much it changed.
        tau: threshold of the criterion, >= 0.
        min_live: units that every layer keeps, >= 1.
        align: kept counts are rounded up to a multiple of it with dead units, >= 1.
        patience: windows in a row that must find a unit dead before it is cut, >= 1.
        exclude: names of modules whose units are not cut (with them those they are added to).
        seed: of the noise, in [0, 2^64); the same on all ranks. torch's generators are left alone.

    Attributes:
        generation: cuts so far that changed the model. A captured CUDA graph belongs to one generation: capture anew
            when this number has grown.

    Raises:
        ValueError: an argument out of range, an optimizer that does not hold the model's parameters, an unknown name in
            ``exclude``, a layer whose cut would change the network (exclude it), a sharded model.
        TypeError: an argument of the wrong kind, a Lookbehind or SAM optimizer.
        RuntimeError: example inputs on which the model does not run.

    Data-parallel training: all ranks call :meth:`step`; flags are OR-ed over them, and the noise is the same on all.
    After a cut, :meth:`rewrap` gives the new DistributedDataParallel; the old one refuses to run.

    A cut replaces the parameters that shrink by new ones, and what holds the old ones does not follow: hooks on
    parameters, lists of them made for clipping, captured CUDA graphs. A step after a cut that meets no gradient in any
    of the new ones warns. ``optimizer.step()`` itself cannot be captured, for lasso and noise change: it raises.

    torch.compile: a compiled model compiles once more after each cut; torch gives up after
    ``torch._dynamo.config.recompile_limit`` (8) of them, so raise that if more cuts are due. Windows compile nothing.
    The step of torch's optimizers may be compiled too; torsion's own, with lasso and noise in their kernels, refuse it.

    GradScaler and skipped steps: a step that did not happen adds no noise and does not count. In a group with
    ``maximize=True`` the lasso is subtracted, so that scales shrink there too. A closure gets the lasso at each call.

    Clipping: the lasso is part of the loss, so ``max_grad_norm`` of torsion's optimizers clips both together and
    ``grad_norm()`` shows both; torch's ``clip_grad_norm_`` before the step does not see it.

    Two controllers on one optimizer are refused; :meth:`close` ends one. The optimizer does not keep it alive.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_inputs: Any,
        *,
        total_steps: int,
        lasso: float = 1e-2,
        noise_std: float = 5e-5,
        schedule: str = "one_cycle",
        noise_mask: str = "row",
        also: Iterable[nn.Module] | nn.Module = (),
        prune_every: int = 1000,
        prune_after: int = 0,
        window: int = 4,
        criterion: str = "auto",
        tau: float = 0.0,
        min_live: int = 1,
        align: int = 1,
        patience: int = 1,
        exclude: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        """See the class."""
        self._settings = Settings(
            total_steps, lasso, noise_std, schedule, noise_mask, prune_every, prune_after, window, criterion, tau,
            min_live, align, patience,
        )  # fmt: skip
        _demp_checks.seed(seed)
        _demp_checks.model(model)
        self._module = _ranks.unwrapped(model)
        _demp_checks.whole(self._module)
        _demp_checks.optimizer(optimizer, self._module)
        self._optimizer = optimizer
        self._also = tuple(map(_ranks.unwrapped, _demp_checks.modules(also)))
        _demp_checks.cut_alike(self._also, self._module)
        self._wrapped = _ranks.Wrapped(_ranks.wrapper(model))
        self._structure = trace(self._module, example_inputs)
        self._excluded = _demp_checks.excluded(exclude, self._module, self._structure.layers)
        _demp_checks.cuttable(self._structure.layers, self._excluded)

        self._units = {
            name: Units.fresh(layer.units)
            for name, layer in self._structure.layers.items()
            if name not in self._excluded
        }
        self._places = {
            name: Coordinates(i, tuple(p.shape)) for i, (name, p) in enumerate(self._module.named_parameters())
        }
        self._window_at = 0  # steps taken when the last window that was due was looked at
        self._inputs: list[Any] = []  # of the last window, to compare outputs on
        self.generation = 0
        self._hooks = StepHooks(self._module, optimizer, self._settings, seed)
        self._renew_noise()
        self._remove_hooks: Callable[[], object] = self._hooks.install(optimizer)

    # What a user asks

    @property
    def due(self) -> bool:
        """Whether a window is due: every ``prune_every`` optimizer steps from ``prune_after`` on, until step() ran."""
        every = self._settings.prune_every
        first = -(-max(self._settings.prune_after, 1) // every) * every
        at = max(first, (self._window_at // every + 1) * every)
        counter = self._hooks.counter
        return counter.most >= at and counter.exact() >= at  # the first costs no wait for the device

    @property
    def steps_taken(self) -> int:
        """Optimizer steps since construction that were not skipped; waits for the device where that skips steps."""
        return self._hooks.counter.exact()

    def live(self) -> dict[str, Tensor]:
        """Bool masks on the CPU over the present units of each layer that is cut; all True before the first window.

        The last window's verdict: a unit that is kept though dead (``patience``, ``align``) is False.
        """
        return {name: units.live.clone() for name, units in self._units.items()}

    # Windows and cuts

    def step(self, batches: Any) -> Report | None:
        """After the optimizer's step: if a window is due, find dead units and cut them.

        Args:
            batches: an iterable of model inputs, endless perhaps, or a callable without arguments that returns one.
                An input is a tensor or a tuple or list of positional arguments, without labels. ``window`` are drawn,
                none where no window is due.

        Returns:
            None where none was due, else a report. After one that cut something wrap DistributedDataParallel anew
            (:meth:`rewrap`) and capture CUDA graphs anew.

        Raises:
            RuntimeError: an activation is not finite, or the cut would change the outputs on the window.
            TypeError: ``batches`` cannot be iterated over.

        After an exception model, optimizer and masks are what they were. A window without batches cuts nothing and
        warns.
        """
        return self._window(batches) if self.due else None

    def finish(self, batches: Any) -> Report:
        """The last window and cut, due or not; arguments, result and errors as in :meth:`step`."""
        return self._window(batches)

    def _window(self, batches: Any) -> Report:
        before = self._units, self._inputs
        try:
            report = self.cut() if self._observe(batches) else self._nothing_cut()
        except BaseException:
            self._units, self._inputs = before
            self._renew_noise()
            raise
        self._window_at = self._hooks.counter.exact()
        return report

    def observe(self, batches: Any) -> dict[str, Tensor]:
        """Look at a window without cutting: renews the masks and counts the dead windows of each unit.

        Arguments and errors as in :meth:`step`.

        Returns:
            What :meth:`live` says afterwards.
        """
        self._observe(batches)
        return self.live()

    def _observe(self, batches: Any) -> bool:
        """Whether there was anything to observe."""
        s, group = self._settings, self._wrapped.group()
        error: Exception | None = None
        found = None
        try:
            drawn = _demp_checks.batches(batches)
            found = observe(self._module, self._structure, drawn, s.window, s.criterion, s.tau)
        except Exception as e:
            error = e
        self._agree(group, error, "a window")
        assert found is not None
        live, mean, count = _ranks.together(group, found.live, found.mean, found.seen, found.batches)
        if not count:
            warnings.warn(
                "DemP: `batches` gave no example, so the window is empty and nothing is cut; pass an iterable of model "
                "inputs, or a function that returns one where an iterator runs only once",
                stacklevel=4,
            )
            return False
        # A layer that another batch showed to be protected is not in the window: all of it lives.
        self._units = {
            name: units.observed(live[name], mean[name], s.min_live) if name in live else units.unobserved()
            for name, units in self._units.items()
        }
        self._inputs = list(found.inputs)
        self._renew_noise()
        return True

    def _agree(self, group: _ranks.Group | None, error: Exception | None, during: str) -> None:
        """Raise ``error``, and on the other ranks that one of them failed; then check that all are in one state."""
        if group is not None and group.failed(error) and error is None:
            raise RuntimeError(f"another rank failed in {during} and says why; nothing was changed on any of them")
        if error is not None:
            raise error
        if group is not None:
            seed = self._hooks.seed
            numbers = [seed >> 32, seed & 0xFFFFFFFF, self._hooks.counter.exact(), self.generation]
            group.agree("seed, steps taken or cuts made", numbers)

    def cut(self) -> Report:
        """Cut the units that were dead in the last ``patience`` windows, without looking at another.

        Outputs before and after are compared on the inputs of the last window. A checkpoint does not hold them: where
        one was loaded since the window, nothing is compared.

        Raises:
            RuntimeError: they differ; model, optimizer and masks are what they were.
        """
        s = self._settings
        wanted = {name: units.dead_windows < s.patience for name, units in self._units.items()}
        means = {name: units.mean for name, units in self._units.items()}
        keep = align_and_keep(self._structure, self._with_excluded(wanted), means, s.min_live, s.align)
        return self._cut(keep, self._inputs)

    def _nothing_cut(self) -> Report:
        layers = {n: LayerReport(layer.units, layer.units, 0) for n, layer in self._structure.layers.items()}
        size = sum(p.numel() for p in self._module.parameters())
        return Report(layers, size, size)

    def _with_excluded(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of every layer of the structure: those of layers that are not ours are all True."""
        return {
            name: masks[name] if name in masks else torch.ones(layer.units, dtype=torch.bool, device="cpu")
            for name, layer in self._structure.layers.items()
        }

    def _cut(self, keep: Mapping[str, Tensor], inputs: list[Any]) -> Report:
        """Cut the units that ``keep`` leaves out, on every rank or on none, and compare outputs on ``inputs``."""
        if all(bool(mask.all()) for mask in keep.values()):
            return self._nothing_cut()
        s, group = self._settings, self._wrapped.group()
        exact = s.tau == 0 and s.criterion in ("auto", "ever_active", "abs_max")
        snapshot = Snapshot([self._module, *self._also], self._optimizer, self._structure) if group else None
        trained = {name for name, p in self._module.named_parameters() if p.grad is not None}
        error: Exception | None = None
        report = None
        try:
            report = cut(  # keeps the structure up to date
                self._module, self._structure, keep,
                optimizer=self._optimizer, also=self._also, inputs=inputs, check=exact,
            )  # fmt: skip
        except Exception as e:
            error = e
        try:
            self._agree(group, error, "the cut")
        except BaseException:
            if snapshot is not None and error is None:
                snapshot.restore()
                self._structure = snapshot.structure
            raise
        assert report is not None
        self._units = {name: u.after(keep[name]) if name in keep else u for name, u in self._units.items()}
        self._places = {name: place.after(report.kept.get(name, {})) for name, place in self._places.items()}
        self._inputs = []
        self.generation += 1
        self._wrapped.retire()
        self._renew_noise()
        trained &= report.kept.keys()
        self._hooks.expect_gradients({n: p for n, p in self._module.named_parameters() if n in trained})
        return report

    def _renew_noise(self) -> None:
        """Tell the hooks of new masks, parameters or coordinates."""
        live = {name: units.live for name, units in self._units.items()}
        self._hooks.renew(self._places, self._structure.row_masks(live))

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: units kept, masks, dead windows, seed and step, and the settings for the record.

        Plain numbers, strings, lists and tensors, which ``torch.load(..., weights_only=True)`` takes.
        """
        return {
            "version": _units.VERSION,
            "seed": self._hooks.seed,
            "step": self._hooks.counter.exact(),
            "window_at": self._window_at,
            "settings": asdict(self._settings),
            **_units.saved(self._units, self._places),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Cut the model, the optimizer and ``also`` to the shapes of a checkpoint, and go on from there.

        Build the full-size model, the optimizer and DemP, then load in this order: DemP, model, optimizer; wrap
        DistributedDataParallel around the model after that. The seed comes from the checkpoint; all other settings
        stay as constructed, and a difference warns.

        Raises:
            ValueError: another model's checkpoint, or one from before a cut that this model has behind it.
            TypeError: no dictionary.

        After an exception nothing has changed.
        """
        units, seed, step, window_at = self._restored(state_dict)
        keep = {name: torch.isin(self._units[name].kept, new.kept) for name, new in units.items()}
        keep = self._with_excluded(keep)
        _demp_checks.cut_together(keep, align_and_keep(self._structure, keep))
        # Before the cut: where warnings are errors nothing may have changed.
        for name, value in asdict(self._settings).items():
            saved = state_dict["settings"].get(name, value)
            if saved != value:
                warnings.warn(
                    f"DemP: {name}={value!r} here, {saved!r} in the checkpoint; the constructor's value holds",
                    stacklevel=2,
                )
        self._cut(keep, [])
        self._units, self._window_at, self._inputs = units, window_at, []
        self._hooks.seed = seed
        self._hooks.counter.set(step)
        self._renew_noise()

    def _restored(self, given: Any) -> tuple[dict[str, Units], int, int, int]:
        """Units, seed, step and step of the last window in a checkpoint, all checked."""
        if not isinstance(given, Mapping):
            raise TypeError(f"the checkpoint is {type(given).__name__}; pass what demp.state_dict() returned")
        missing = [
            k for k in ("version", "seed", "step", "window_at", "settings", "layers", "parameters") if k not in given
        ]
        problem = f"lacks {', '.join(missing)}" if missing else ""
        if not problem and given["version"] != _units.VERSION:
            problem = f"has version {given['version']!r}"
        if not problem and not isinstance(given["settings"], Mapping):
            problem = f"has settings that are {type(given['settings']).__name__}, no dictionary"
        if problem:
            raise ValueError(
                f"the checkpoint {problem}; pass what demp.state_dict() of version {_units.VERSION} returned"
            )
        _demp_checks.seed(given["seed"])
        for name in ("step", "window_at"):
            integer(f"the checkpoint's {name}", given[name], 0, MAX_STEPS)
        _units.same_parameters(given["parameters"], self._places)
        return _units.restored_units(given["layers"], self._units), given["seed"], given["step"], given["window_at"]

    # The rest of a user's program

    def rewrap(self, ddp: nn.Module, **changes: Any) -> DistributedDataParallel:
        """``ddp`` for use after a cut: itself if no cut was made since, else a new one around the same module.

        ::

            report = demp.step(batches)
            if report is not None:
                model = demp.rewrap(model)

        Args:
            ddp: the DistributedDataParallel in use until now, on every rank.
            changes: arguments of DistributedDataParallel that are to differ from those of ``ddp``.

        Raises:
            TypeError: ``ddp`` is no DistributedDataParallel.
            ValueError: it wraps another model.

        Communication hooks do not carry over: register them anew.
        """
        found = _ranks.wrapper(ddp)
        if found is None:
            raise TypeError(f"ddp is {type(ddp).__name__}: must be the model's DistributedDataParallel")
        if _ranks.unwrapped(found) is not self._module:
            raise ValueError("ddp wraps another model than this DemP cuts; pass the wrapper of that one")
        return self._wrapped.renewed(found, changes)

    def close(self) -> None:
        """Take the hooks off the optimizer: no lasso and no noise from now on. Windows and cuts still work."""
        self._remove_hooks()
        self._hooks.lasso.forget()

    def __repr__(self) -> str:
        left = sum(u.kept.numel() for u in self._units.values())
        total = sum(u.original for u in self._units.values())
        values = ", ".join(f"{k}={v!r}" for k, v in asdict(self._settings).items())
        return f"DemP({left} of {total} units in {len(self._units)} layers, {self.generation} cuts; {values})"
