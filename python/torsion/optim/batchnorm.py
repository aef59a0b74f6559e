"""BatchNorm under Lookbehind and SAM: running statistics from the slow weights only, once per outer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

# Optimizers whose outer step is past its first evaluation, and the models that want to know. Both are seldom more than
# one, so that every change looks at all of them.
_perturbing: WeakSet[Optimizer] = WeakSet()
_watched: list[_Model] = []
_frozen: dict[_BatchNorm, bool] = {}


class _Model:
    def __init__(self, model: nn.Module) -> None:
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self.params = {id(p) for p in model.parameters()}

    def perturbed_by(self, optimizer: Optimizer) -> bool:
        return any(id(p) in self.params for group in optimizer.param_groups for p in group["params"])


def first_evaluation_over(optimizer: Optimizer) -> None:
    """Freeze the statistics of the watched models that hold a parameter of ``optimizer``."""
    _perturbing.add(optimizer)
    _update()


def outer_step_over(optimizer: Optimizer) -> None:
    """Let them update again."""
    _perturbing.discard(optimizer)
    _update()


def _update() -> None:
    if not _watched and not _frozen:
        return
    wanted = {m for model in _watched if any(map(model.perturbed_by, _perturbing)) for m in model.norms}
    for m in _frozen.keys() - wanted:
        m.track_running_stats = _frozen.pop(m)
    for m in wanted - _frozen.keys():
        _frozen[m] = m.track_running_stats
        # In training mode forward() then neither reads nor writes the statistics; in eval mode it still reads them.
        m.track_running_stats = False


@contextmanager
def bn_first_pass_only(model: nn.Module) -> Iterator[None]:
    """Update BatchNorm statistics only in the first evaluation of each outer step, at the slow weights.

    Lookbehind evaluates k + 1 times a step, all but the first at perturbed weights, and BatchNorm layers would average
    over all of them. Inside this context every ``BatchNorm`` and ``SyncBatchNorm`` layer of ``model`` updates its
    running statistics only until the first ascent of an outer step of any :class:`Lookbehind` or :class:`SAM` that
    holds a parameter of the model: with accumulation, in all micro-batches of the first evaluation. The output in
    training mode does not change, nor does eval mode. Around one outer step or a whole training loop::

        with bn_first_pass_only(model):
            for batch in loader:
                optimizer.step(closure)

    Args:
        model: the module whose layers to freeze; the optimizer may hold all of its parameters or some of them.

    Contexts may be nested and may begin within an outer step. On exit, also by an exception, each layer is as it was.
    The layers' ``track_running_stats`` is what changes, so code compiled by ``torch.compile`` exists in two versions.
    """
    watched = _Model(model)
    _watched.append(watched)
    try:
        _update()
        yield
    finally:
        _watched.remove(watched)
        _update()
