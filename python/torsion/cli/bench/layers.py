"""Masked layers against dense ones, forward and backward: `torsion bench masked`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import torsion
from torsion.cli.bench.comparisons import Limit
from torsion.cli.bench.figures import Figure, Place
from torsion.cli.bench.versus import BFLOAT16_RELATIVE, agree, versus

__all__ = ["masked_figures"]

_ROWS, _MANY_ROWS = 1024, 4096
_WIDTHS = (1024, 2048)
_RELATIVE = {torch.float32: 1e-4, torch.bfloat16: BFLOAT16_RELATIVE}
"""float32: sums of up to 4096 terms, in whatever order a library takes them (seen: 3e-6)."""
_DENSE = "dense"


@dataclass(frozen=True)
class _Case:
    """A layer of width n with a share of live units on both sides; ``sorted``: live units come first."""

    n: int
    live: float
    sorted: bool
    rows: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        rows = "" if self.rows == _ROWS else f", {self.rows} rows"
        dtype = "" if self.dtype == torch.float32 else f", {self.dtype}".replace("torch.", "")
        return f"{self.n} x {self.n}, {self.live:.0%} live{rows}{dtype}"

    def indices(self) -> Tensor | None:
        count = round(self.n * self.live)
        if count == self.n:
            return None
        if self.sorted:
            return torch.arange(count, dtype=torch.int32)
        return torch.randperm(self.n)[:count].sort()[0].to(torch.int32)


Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
_Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def _made(
    shape: tuple[int, ...], weight: tuple[int, ...], place: Place, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, b = torch.randn(shape), torch.randn(weight) / weight[1] ** 0.5, torch.randn(weight[0])
    x, w, b = (t.to(place.device, dtype).requires_grad_() for t in (x, w, b))
    return x, w, b, torch.randn(*shape[:1], weight[0], *shape[2:], device=place.device, dtype=dtype)


def _both_ways(layer: Layer, x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        y = layer(x, w, b)
        return (y.detach(), *torch.autograd.grad(y, (x, w, b), dy))

    return step


def _dead_zeroed(t: Tensor, live: Tensor | None, dim: int) -> Tensor:
    if live is None:
        return t
    kept = torch.zeros_like(t)
    index = live.long().to(t.device)
    return kept.index_copy(dim, index, t.index_select(dim, index))


def _figures(
    place: Place,
    where: str,
    name: str,
    masked: Layer,
    dense: Layer,
    shapes: _Shapes,
    live: Tensor | None,
    limit: Limit | None,
    share: float = 1.0,
    *,
    compact: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Figure]:
    torch.manual_seed(0)
    x, w, b, dy = _made(*shapes, place, dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]

    def zeroed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        x, w = _dead_zeroed(x, live, 1), _dead_zeroed(_dead_zeroed(w, live, 0), live, 1)
        return _dead_zeroed(dense(x, w, _dead_zeroed(b, live, 0)), live, 1)

    right = list(_both_ways(zeroed, wide[0], wide[1], wide[2], dy.double())())
    given, back = x, dy
    if compact and live is not None:
        index = live.long().to(place.device)
        given, back = (t.detach().index_select(1, index).requires_grad_() for t in (x, dy))
        right[:2] = [t.index_select(1, index) for t in right[:2]]
    step = _both_ways(masked, given, w, b, back)
    agree(f"{name}, {where}", step(), right, _RELATIVE[dtype])
    dense_step = _both_ways(dense, x, w, b, dy)
    limits = {} if limit is None else {name: limit}
    yield from versus(place, where, {_DENSE: dense_step}, {name: step}, limits, ideal={name: share}, dtype=dtype)


def _linear(
    place: Place,
    case: _Case,
    name: str,
    limit: Limit | None,
    share: float = 1.0,
    *,
    compact: bool = False,
) -> Iterator[Figure]:
    live = case.indices()
    index = None if live is None else live.to(place.device)

    def masked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torsion.ops.masked_linear(x, w, b, index, index, x_compact=compact, y_compact=compact)

    shapes = ((case.rows, case.n), (case.n, case.n))
    yield from _figures(
        place, str(case), name, masked, F.linear, shapes, live, limit, share, compact=compact, dtype=case.dtype
    )


def _mask_multiply(place: Place, case: _Case) -> Iterator[Figure]:
    """What is done without masked layers: masks of 0 and 1, multiplied to all that a dense one takes and gives."""
    live = case.indices()
    mask = _dead_zeroed(torch.ones(case.n), live, 0).to(place.device, case.dtype)
    weight_mask = mask.unsqueeze(1) * mask

    def masked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(x * mask, w * weight_mask, b) * mask

    shapes = ((case.rows, case.n), (case.n, case.n))
    yield from _figures(place, str(case), "mask-multiply", masked, F.linear, shapes, live, None, dtype=case.dtype)


def _large(place: Place, n: int = 4096, rows: int = 4096, dtype: torch.dtype = torch.bfloat16) -> Iterator[Figure]:
    """Sizes at which a GPU computes longer than its host needs to ask for it."""
    for live in (0.5, 0.25):
        case = _Case(n, live, True, rows, dtype)
        yield from _linear(place, case, "masked linear, cached order", None, live * live, compact=True)
        case = _Case(n, live, False, rows, dtype)
        yield from _linear(place, case, "masked linear, any order", None)
        yield from _mask_multiply(place, case)


def _small(place: Place, case: _Case) -> Iterator[Figure]:
    """A dense layer of the live size: what a masked one could be at best."""
    torch.manual_seed(0)
    widths = (case.n, round(case.n * case.live))
    (x, w, b, dy), (xs, ws, bs, dys) = (_made((case.rows, n), (n, n), place) for n in widths)
    steps, name = {_DENSE: _both_ways(F.linear, x, w, b, dy)}, "dense layer of the live size"
    yield from versus(
        place, str(case), steps, {name: _both_ways(F.linear, xs, ws, bs, dys)}, ideal={name: case.live**2}
    )


def _conv(place: Place, share: float, most: float) -> Iterator[Figure]:
    live = _Case(128, share, sorted=False, rows=_ROWS).indices()
    index = None if live is None else live.to(place.device)

    def masked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torsion.ops.masked_conv2d(x, w, b, index, index, padding=1)

    def dense(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, padding=1)

    shapes = ((16, 128, 28, 28), (128, 128, 3, 3))
    where = f"conv 3x3, 128 channels, {share:.0%} live"
    yield from _figures(place, where, "masked conv", masked, dense, shapes, live, Limit(most, ()))


def masked_figures(place: Place) -> Iterator[Figure]:
    """Figures of masked layers.

    Raises:
        GateError: a masked layer computes something else than the dense one with zeros.
    """
    torch.manual_seed(0)
    sizes = (*((n, _ROWS) for n in _WIDTHS), (_WIDTHS[0], _MANY_ROWS))
    for n, rows in sizes:
        for live in (0.25, 0.5):
            case = _Case(n, live, True, rows)
            yield from _linear(place, case, "masked linear, cached order", Limit(1.4, ()), live * live, compact=True)
            yield from _linear(place, case, "the same, all of x and y", None, live * live)
            yield from _small(place, case)
    for n, limit in ((512, 1 / 2.2), *((n, 1 / 2.5) for n in _WIDTHS)):
        yield from _linear(place, _Case(n, 0.5, False, _ROWS), "masked linear, any order", Limit(limit, ()))
    yield from _mask_multiply(place, _Case(_WIDTHS[0], 0.5, False, _ROWS))
    for n in (512, _WIDTHS[-1]):
        yield from _linear(place, _Case(n, 1.0, True, _ROWS), "masked linear, all live", Limit(1.03, ()))
    for n, rows in sizes:
        yield from _linear(place, _Case(n, 0.95, False, rows), "masked linear, nearly all live", Limit(1.03, ()))
    for share, most in ((0.5, 0.40), (0.95, 1.03)):
        yield from _conv(place, share, most)
    if place.device.type == "cuda":
        yield from _large(place)
