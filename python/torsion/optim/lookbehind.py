"""Lookbehind-SAM and SAM around any base optimizer: turn taking, closures, checkpoints. The phases run in a Cycle."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.profiler import record_function
from torch.optim import Optimizer
from torch.optim import optimizer as _torch

from torsion.ops import _backends
from torsion.optim import _checkpoint, _lookbehind_checks, batchnorm
from torsion.optim._cycle import Cycle, Settings, parameters
from torsion.optim._fused import FusedCycle
from torsion.optim._general import GeneralCycle

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Lookbehind(Optimizer):
    r"""Lookbehind-SAM (arXiv 2307.16704): k ascents, k descents of a base optimizer, one step of the slow weights.

    All evaluations of an outer step are of one minibatch. With s the slow, f the fast and q the perturbed weights, a
    and b gradients at q, |.| over all parameters::

        q = f = s
        k times:  q = q + rho a / (|a| + 1e-16)          perturbations accumulate
                  f = base step from f with gradient b   b is also the next a
        s = s + alpha (f - s)

    Hence k + 1 gradients, not the 2k of the published code, and the same trajectory. The base's state (momentum) is
    neither interpolated nor reset. The learning rate per minibatch is about alpha k lr, and so is the weight decay:
    divide the base's rate by alpha k to start from what suits the base alone.

    Args:
        base_optimizer: an instance, such as ``torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)``. Groups and
            state stay its own: ``param_groups`` and ``state`` are the base's, schedulers may hold either.
        k: ascents and descents of an outer step, >= 1.
        rho: length of one ascent over all parameters together, >= 0.
        alpha: slow step in [0, 1], or "adaptive": (1 + cos(f_1 - s, f_k - s)) / 2, without waiting for the device.
        asam: the adaptive radius of ASAM, q = q + rho T^2 a / (|T a| + 1e-16) with T = |q| + eta on scaled tensors:
            those with "weight" in their name, of unnamed ones those of two or more dimensions, and what a parameter
            group says with ``asam_scaled=True`` or ``False``.
        eta: offset of T, >= 0; only used with ``asam``.
        alpha_scope: tensors that share one adaptive alpha, "tensor" or "global". One of a single element has alpha 0,
            1/2 or 1 with "tensor".
        reuse_gradients: the gradient of a descent is that of the next ascent; False evaluates 2k times, for models
            with dropout as in the published code, and for m-sharpness.
        backend: "cuda", "triton", "cpu" or "reference" where the outer step is fused; the best when None.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument of the wrong kind, or a base that cannot be one.

    Fused kernels run for bases of exact type SGD, Adam, AdamW (torch) and TAM, AdaTAM, AdaTAMW; any other steps the
    fast weights by its own ``step()``, at one host sync per descent (``fused``; ``repr`` says why).

    A gradient that is not finite, in any evaluation, abandons the outer step: the parameters are the slow weights
    again, ``skipped_steps()`` grows by one, the remaining phases do nothing. The base keeps the descents made before.
    ``maximize=True`` in a group of the base turns its ascent round.
    """

    # So that the stock GradScaler calls step(), which says what to do, also after an overflow.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        k: int = 2,
        rho: float = 0.05,
        alpha: float | str = 0.5,
        asam: bool = False,
        eta: float = 0.01,
        alpha_scope: str = "tensor",
        reuse_gradients: bool = True,
        backend: str | None = None,
        **untaken: object,
    ) -> None:
        """See the class."""
        cls = type(self).__name__
        _lookbehind_checks.base(cls, base_optimizer, Lookbehind)
        _lookbehind_checks.reject_untaken(cls, base_optimizer, untaken)
        settings = Settings(k, rho, alpha, asam, eta, alpha_scope, reuse_gradients, backend)
        _lookbehind_checks.settings(settings)
        for g, group in enumerate(base_optimizer.param_groups):
            _lookbehind_checks.group(f"group {g}: ", group)
        if backend is not None:
            for device in {p.device.type for *_, p in parameters(base_optimizer)}:
                _backends.choose(device, backend)
        self._assemble(base_optimizer, settings)

    def _assemble(self, base: Optimizer, settings: Settings) -> None:
        """Everything ``Optimizer.__init__`` would make, but the groups and the state, which are the base's."""
        self._base = base
        self._settings = settings
        self._cycle: Cycle = self._choose()
        self._skipped_before = torch.zeros((), dtype=torch.int64)  # by a cycle that another one replaced
        self._phases_done = 0
        self._inside = ""  # what of this optimizer is running: no phase may be called from there
        for name in _HOOKS:
            setattr(self, name, OrderedDict())
        self._warned_capturable_if_run_uncaptured = True
        self._patch_step_function()

    def _choose(self) -> Cycle:
        why = FusedCycle.obstacle(self._base, self._settings)
        if not why:
            return FusedCycle(self._base, self._settings)
        cycle = GeneralCycle(self._base, self._settings)
        cycle.why = why
        return cycle

    def _choose_anew(self) -> None:
        """After a change of the groups: on the same path the buffers and the counter stay."""
        why = FusedCycle.obstacle(self._base, self._settings)
        if self._cycle.fused == bool(why):
            self._skipped_before = self.skipped_steps()
            self._cycle = self._choose()
        elif why:
            self._cycle.why = why

    # Groups and state are the base's

    @property
    def base_optimizer(self) -> Optimizer:
        """The optimizer that makes the descents; distributed checkpoints take this one."""
        return self._base

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base's own list."""
        return self._base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base's own state."""
        return self._base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's own defaults."""
        return self._base.defaults

    @property
    def fused(self) -> bool:
        """Whether fused kernels run the outer step; ``repr`` says why or why not."""
        return self._cycle.fused

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base does: before every backward."""
        self._base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base, between outer steps.

        Raises:
            RuntimeError: an outer step is open.
            TypeError, ValueError: as the base; or ``asam_scaled`` is neither True nor False.
        """
        self._refuse_open("add_param_group()")
        if isinstance(param_group, dict):
            _lookbehind_checks.group("the new group: ", param_group)
        self._base.add_param_group(param_group)
        self._choose_anew()

    # Turn taking

    def _expected(self) -> str:
        if self._settings.reuse_gradients:
            return "ascent_step" if self._phases_done == 0 else "descent_step"
        return "ascent_step" if self._phases_done % 2 == 0 else "descent_step"

    def _refuse_open(self, what: str) -> None:
        if self._phases_done:
            raise RuntimeError(
                f"{what}: an outer step is open, {self._expected()}() is expected; "
                "finish it, or give it up with abandon()"
            )

    def _refuse_inside(self, what: str) -> None:
        if self._inside:
            raise RuntimeError(f"{what} was called within {self._inside}; call it after that has ended")

    def _take_turn(self, phase: str) -> None:
        self._refuse_inside(f"{phase}()")
        expected = self._expected()
        if phase != expected:
            total = self._settings.k + 1 if self._settings.reuse_gradients else 2 * self._settings.k
            raise RuntimeError(
                f"{phase}() is out of turn: {expected}() is expected, phase {self._phases_done + 1} of {total} "
                "of an outer step; abandon() gives up an open one"
            )

    def _phase(self, found_inf: Tensor | None = None) -> None:
        """Run the phase whose turn it is; an error in it gives up the outer step."""
        reuse, k, n = self._settings.reuse_gradients, self._settings.k, self._phases_done
        try:
            if self._expected() == "ascent_step":
                self._cycle.ascend(opens=n == 0, found_inf=found_inf)
            else:
                i = n if reuse else (n + 1) // 2
                self._cycle.descend(i, ascends=reuse and i < k, last=i == k, found_inf=found_inf)
        except BaseException:
            self._give_up()
            raise
        self._phases_done = (n + 1) % (k + 1 if reuse else 2 * k)
        if self._phases_done == 1:
            batchnorm.first_evaluation_over(self)
        elif self._phases_done == 0:
            self._close()

    def _close(self) -> None:
        self._phases_done = 0
        batchnorm.outer_step_over(self)
        # What a scheduler asks before it warns of having been called first; it may hold either of the two.
        self._opt_called = self._base._opt_called = True  # type: ignore[attr-defined]

    def _give_up(self) -> None:
        if self._phases_done:
            self._phases_done = 0
            batchnorm.outer_step_over(self)
            self._cycle.abandon()

    # Public phases

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One outer step.

        Args:
            closure: does ``zero_grad()``, forward and backward on one fixed minibatch and returns the loss. Called
                k + 1 times (2k with ``reuse_gradients=False``), with gradients enabled.

        Returns:
            What the first call returned: the loss at the slow weights.

        Raises:
            RuntimeError: no closure, an outer step is open, or parameters gain or lose gradients between evaluations.
            TypeError: the closure returned None.
            ValueError: a gradient's shape or device differs from its parameter's, or parameters share memory.

        After an exception, the closure's own too, the parameters are what they were; the base keeps the descents made.
        """
        # A scaler sets both just before its call, and would remove them after it.
        by_scaler = "found_inf" in self.__dict__
        for name in ("grad_scale", "found_inf"):
            self.__dict__.pop(name, None)
        if by_scaler:
            raise RuntimeError(_lookbehind_checks.scaler_recipe(type(self).__name__, self._settings))
        self._refuse_inside("step()")
        self._refuse_open("step()")
        if closure is None:
            raise RuntimeError(_lookbehind_checks.no_closure(type(self).__name__, self._settings))
        with record_function(f"Optimizer.step#{type(self).__name__}.step"):
            args, kwargs = self._before((self, closure), {})
            loss = self._outer_step(*args[1:], **kwargs)
            self._after(args, kwargs)
        return loss

    # torch would wrap step() to call the hooks, which the explicit phases need as well.
    step.hooked = True  # type: ignore[attr-defined]

    @_disable_dynamo
    @torch.no_grad()
    def ascent_step(self, found_inf: Tensor | None = None) -> None:
        """Ascend with the gradients in ``p.grad``; at first in an outer step, the parameters are the slow weights.

        Args:
            found_inf: a tensor of one element on the parameters' device; not 0 abandons the outer step, as a gradient
                that is not finite does. For data-parallel training with gradients of one's own, where all processes
                must agree.

        Raises:
            RuntimeError: another phase is expected, or parameters gained or lost gradients in the outer step.
            ValueError, TypeError: a gradient that does not fit its parameter.

        Out of turn, nothing changes. After another error the outer step is given up: the parameters are the slow
        weights.
        """
        self._explicit("ascent_step", found_inf)

    @_disable_dynamo
    @torch.no_grad()
    def descent_step(self, found_inf: Tensor | None = None) -> None:
        """Descend with the gradients in ``p.grad``; unless it is the last, also make the next ascent with them.

        The last one moves the slow weights and leaves them in the parameters. With ``reuse_gradients=False`` it does
        not ascend. Arguments and errors as in :meth:`ascent_step`; after an error the base keeps the descents made.
        """
        self._explicit("descent_step", found_inf)

    def _explicit(self, phase: str, found_inf: Tensor | None) -> None:
        self._take_turn(phase)
        _lookbehind_checks.found_inf(found_inf)
        with record_function(f"Optimizer.step#{type(self).__name__}.{phase}"):
            if self._phases_done == 0:
                self._before((self,), {})
            self._phase(found_inf)
            if self._phases_done == 0:
                self._after((self,), {})

    @_disable_dynamo
    @torch.no_grad()
    def abandon(self) -> None:
        """Give up the open outer step, if there is one: the parameters are the slow weights, nothing is counted."""
        self._refuse_inside("abandon()")
        self._give_up()

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Have the slow weights in the parameters, to evaluate or save within an outer step.

        On exit, also by an exception, the perturbed weights are back, bit for bit. Between outer steps the parameters
        are the slow weights, and nothing happens. BatchNorm statistics are not exchanged.
        """
        if not self._phases_done or self._inside == "slow_weights()":
            yield
            return
        outside, self._inside = self._inside, "slow_weights()"
        with torch.no_grad():
            self._cycle.show_slow()
        try:
            yield
        finally:
            with torch.no_grad():
                self._cycle.hide_slow()
            self._inside = outside

    def skipped_steps(self) -> Tensor:
        """Outer steps abandoned so far for a gradient that was not finite: 0-dim int64 on the device."""
        skipped = self._cycle.skipped()
        return skipped + self._skipped_before.to(skipped.device)

    # The closure and the hooks

    def _outer_step(self, closure: Callable[[], Any]) -> Any:
        try:
            loss = self._evaluate(closure)
            self._phase()
            while self._phases_done:
                self._evaluate(closure)
                self._phase()
        except BaseException:
            self._give_up()
            raise
        return loss

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        self._inside = "the closure"
        try:
            with torch.enable_grad():
                loss = closure()
        finally:
            self._inside = ""
        if loss is None:
            raise TypeError(f"the closure of {type(self).__name__}.step() returned None; it must return the loss")
        return loss

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Step hooks before the outer step, by torch's protocol; they may change the arguments."""
        for hook in chain(_torch._global_optimizer_pre_hooks.values(), self._optimizer_step_pre_hooks.values()):
            changed: Any = hook(self, args, kwargs)
            if changed is not None:
                if not (isinstance(changed, tuple) and len(changed) == 2):
                    raise RuntimeError(f"a step pre-hook must return None or (args, kwargs), got {changed!r}")
                args, kwargs = changed
        return args, kwargs

    def _after(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._optimizer_step_code()
        for hook in chain(self._optimizer_step_post_hooks.values(), _torch._global_optimizer_post_hooks.values()):
            hook(self, args, kwargs)

    # Checkpoints

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The base's own, which a bare base loads, and the constructor's values under "lookbehind", for the record.

        Raises:
            RuntimeError: an outer step is open; its weights are in no checkpoint.
        """
        self._refuse_open("state_dict()")
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        result: dict[str, Any] = {**self._base.state_dict(), "lookbehind": self._record()}
        if isinstance(result.get("state"), dict):  # a hook of the base's may have made anything of it
            result["state"] = _checkpoint.unshared(result["state"])
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, result)
            result = result if changed is None else changed
        return result

    def _record(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self._settings).items() if name != "backend"}

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or of a bare base. The constructor's values hold; a difference warns.

        Raises:
            RuntimeError: an outer step is open.
            TypeError, ValueError: no checkpoint, or one that the base refuses.
        """
        self._refuse_open("load_state_dict()")
        cls = type(self).__name__
        state_dict = _checkpoint.copied(state_dict, cls)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        state_dict = dict(state_dict)
        saved, own = state_dict.pop("lookbehind", {}), self._record()
        if not isinstance(saved, dict):
            raise ValueError(f"{cls}: the checkpoint's 'lookbehind' is no dictionary but {saved!r}; delete that key")
        self._base.load_state_dict(state_dict)
        differing = [f"{n}={saved[n]!r} (here {own[n]!r})" for n in own if n in saved and saved[n] != own[n]]
        if differing:
            warnings.warn(
                f"{cls}: the checkpoint was made with {', '.join(differing)}; the values given here hold",
                stacklevel=4,  # past the two frames of _disable_dynamo
            )
        self._choose_anew()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle take; like torch's optimizers without hooks."""
        self._refuse_open("a copy or pickle")
        return {"base_optimizer": self._base, "settings": asdict(self._settings)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over base and settings; buffers are made anew."""
        self._assemble(state["base_optimizer"], Settings(**state["settings"]))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in asdict(self._settings).items())
        path = f"fused={self.fused} ({self._cycle.why})"
        base = repr(self._base).replace("\n", "\n    ")
        return f"{type(self).__name__} (\n    {values}\n    {path}\n    base_optimizer: {base}\n)"


class SAM(Lookbehind):
    r"""Sharpness-aware minimization: one ascent of length rho, one descent of the base with the gradient found there.

    Lookbehind with ``k=1, alpha=1``; two gradients a step. Arguments, phases, checkpoints and errors as there::

        q = s + rho a / (|a| + 1e-16),  s = base step from s with the gradient at q

    Args:
        base_optimizer: an instance, such as ``torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)``.
        rho: length of the ascent over all parameters together, >= 0.
        asam: scale it by T = |q| + eta (ASAM), see :class:`Lookbehind`.
        eta: offset of T, >= 0.
        backend: as in :class:`Lookbehind`.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        rho: float = 0.05,
        asam: bool = False,
        eta: float = 0.01,
        backend: str | None = None,
        **untaken: object,
    ) -> None:
        """See the class."""
        _lookbehind_checks.base("SAM", base_optimizer, Lookbehind)
        _lookbehind_checks.reject_untaken("SAM", base_optimizer, untaken)
        super().__init__(base_optimizer, k=1, rho=rho, alpha=1.0, asam=asam, eta=eta, backend=backend)
