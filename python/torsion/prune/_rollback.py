"""The way back from a cut that this process made and another could not."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torsion.prune._structure import Structure


class Snapshot:
    """What a cut replaces, by reference: a cut makes new tensors and leaves the old ones as they are.

    Args:
        modules: the model and what is cut alike.
        optimizer: of the model.
        structure: the model's units.
    """

    def __init__(self, modules: Iterable[nn.Module], optimizer: Optimizer, structure: Structure) -> None:
        """Take it."""
        children = [child for module in modules for child in module.modules()]
        self._attributes = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in children]
        self._grads = [(p, p.grad) for m in children for p in m._parameters.values() if p is not None]
        self._groups = [(group, list(group["params"])) for group in optimizer.param_groups]
        self._state: list[tuple[Any, Any]] = list(optimizer.state.items())
        self._optimizer = optimizer
        self.structure = copy.deepcopy(structure)

    def restore(self) -> None:
        """Everything is the very object it was; ``structure`` is one equal to what it was."""
        for module, attributes, parameters, buffers in self._attributes:
            module.__dict__.update(attributes)
            for now, then in ((module._parameters, parameters), (module._buffers, buffers)):
                now.clear()
                now.update(then)  # type: ignore[arg-type]
        for p, grad in self._grads:
            p.grad = grad
        for group, params in self._groups:
            group["params"][:] = params
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
