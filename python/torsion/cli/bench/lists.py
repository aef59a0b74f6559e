"""The lists of tensors that are timed: two real models, and the two ends of what a list can be."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LISTS", "TensorList"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorList:
    """The shapes of a model's parameters, in the order of ``model.parameters()``."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def numel(self) -> int:
        """Elements of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def __str__(self) -> str:
        n = self.numel
        size = f"{n / 1e6:.3g} M" if n >= 1e6 else f"{n / 1e3:.3g} k"
        return f"{self.name} ({len(self.shapes)} tensor{'s' if len(self.shapes) > 1 else ''}, {size})"


def _resnet18() -> tuple[Shape, ...]:
    """ResNet-18 for ten classes: four stages of two blocks, each convolution followed by a norm's scale and shift."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for out in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(out, width if block == 0 else out, 3, 3), (out,), (out,)]
            shapes += [(out, out, 3, 3), (out,), (out,)]
            if block == 0 and out != width:
                shapes += [(out, width, 1, 1), (out,), (out,)]
        width = out
    return (*shapes, (10, 512), (10,))


def _gpt2() -> tuple[Shape, ...]:
    """GPT-2 small, its output tied to the embedding."""
    d = 768
    attention: list[Shape] = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,)]
    feed_forward: list[Shape] = [(d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return ((50257, d), (1024, d), *(attention + feed_forward) * 12, (d,), (d,))


LISTS = {
    made.name: made
    for made in (
        TensorList("resnet18", _resnet18()),
        TensorList("gpt2", _gpt2()),
        TensorList("tiny", ((1024,),) * 1000),
        TensorList("one", ((50_000_000,),)),
    )
}
"""Name -> list; what ``--list`` takes."""
