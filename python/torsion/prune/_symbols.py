"""Channel symbols: which channels of a model are the same unit, and which parameter rows and columns they own.

A unit (a neuron of a Linear layer, an output channel of a convolution) is an integer, its symbol. Channels that can
only be cut together, because they meet at an addition or are the two halves of a gated unit, are united (union-find).
A tensor carries its symbols as a code: an int64 tensor of as many dimensions as the tensor, of size 1 in every
dimension that the unit does not depend on, that holds ``4 * symbol + state``, or -1 where nothing can be cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


class ChangedError(Exception):
    """A model no longer has the sizes that its structure says."""


RAW, ZERO, SHIFTED = 0, 1, 2
"""What is known of the value of a dead unit: nothing yet, that it is 0, that something made it differ from 0."""


def encode(symbols: Tensor, state: int) -> Tensor:
    """Code of ``symbols`` (int64, -1: none), all in one state."""
    return torch.where(symbols < 0, symbols, symbols * 4 + state)


def symbols_of(code: Tensor) -> Tensor:
    """Symbols in a code, -1 where there is none."""
    return code >> 2


def states_of(code: Tensor) -> Tensor:
    """States in a code; 3 where there is no symbol."""
    return code & 3


def with_state(code: Tensor, state: int | Tensor) -> Tensor:
    """``code`` in another state."""
    return torch.where(code < 0, code, (code & ~3) | state)


@dataclass
class Block:
    """The units that one weight makes.

    Attributes:
        weight: name of the weight.
        layer: qualified name of the Linear or convolution; the weight's own name when it is called otherwise.
        ids: int64 [units], the symbols of the units that the weight has now.
    """

    weight: str
    layer: str
    ids: Tensor


@dataclass
class Use:
    """One axis of a parameter or buffer that lies along channels.

    Attributes:
        name: parameter or buffer.
        axis: 0 or 1.
        symbols: int64 [size of the axis], or [groups, size of the axis] for axis 1 of a grouped convolution's weight,
            whose meaning changes with the group that the row (axis 0) belongs to.
        row: the axis holds the units themselves (outgoing rows, bias, norm), not what a layer reads.
    """

    name: str
    axis: int
    symbols: Tensor
    row: bool


@dataclass
class Resize:
    """A module that remembers its number of channels.

    Attributes:
        module: qualified name.
        kind: "features" (num_features), "group_norm", "rms_norm" or "prelu".
        symbols: int64 [channels], or [groups, channels per group].
    """

    module: str
    kind: str
    symbols: Tensor


@dataclass
class Symbols:
    """All units of a model, the ties among them, and what stands against cutting them.

    Attributes:
        parent: union-find forest over symbols: what is cut together.
        sums: union-find forest over symbols: what meets at additions, so that an activation of one is one of all.
        blocks: weight name -> its units, in forward order.
        uses: (name, axis) -> use.
        resizes: module -> what it remembers.
        activated: symbol -> whether every activation of it that reached a layer is a ReLU.
        protected: symbol -> why it is never cut, and no layer's unit to be reported.
        refused: symbol -> why a cut would change the function.
        even: sections of a tensor that must keep equal counts, int64 [sections, width] each, with a description.
        whole: channels that only go together, int64 [groups, width] each, with a description.
        depthwise: weights whose groups follow their channels.
        parameters: names of the model's parameters, to tell them from buffers.
        touched: parameter -> operation that read it in a way that is not followed.
    """

    parent: list[int] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    blocks: dict[str, Block] = field(default_factory=dict)
    uses: dict[tuple[str, int], Use] = field(default_factory=dict)
    resizes: dict[str, Resize] = field(default_factory=dict)
    activated: dict[int, bool] = field(default_factory=dict)
    protected: dict[int, str] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    even: dict[tuple[int, ...], tuple[Tensor, str]] = field(default_factory=dict)
    whole: dict[tuple[int, ...], tuple[Tensor, str]] = field(default_factory=dict)
    depthwise: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    touched: dict[str, str] = field(default_factory=dict)

    def block(self, weight: str, layer: str, units: int) -> Tensor:
        """Symbols [units] of what ``weight`` makes: new ones at its first use, the same at every later one."""
        known = self.blocks.get(weight)
        if known is None:
            first = len(self.parent)
            self.parent.extend(range(first, first + units))
            self.sums.extend(range(first, first + units))
            known = self.blocks[weight] = Block(weight, layer, torch.arange(first, first + units, device="cpu"))
        if len(known.ids) != units:
            raise ChangedError(
                f"{layer}: has {units} units, but had {len(known.ids)} when it was traced; trace it anew"
            )
        return known.ids

    def find(self, symbol: int) -> int:
        """Representative of the class of ``symbol``, of what is cut with it."""
        return _find(self.parent, symbol)

    def summed(self, symbol: int) -> int:
        """Representative of what meets ``symbol`` at additions."""
        return _find(self.sums, symbol)

    def roots(self, symbols: Tensor | None = None) -> Tensor:
        """Representative of each of ``symbols`` (-1 for -1), by default of all: int64 of the same shape."""
        if symbols is None:
            symbols = torch.arange(len(self.parent), device="cpu")
        found = [self.find(s) if s >= 0 else -1 for s in symbols.flatten().tolist()]
        return torch.tensor(found, dtype=torch.int64, device="cpu").reshape(symbols.shape)

    def unite(self, a: Tensor, b: Tensor, why: str, *, summed: bool = False) -> None:
        """Tie two symbol tensors of one shape position by position; a symbol tied to no symbol is protected."""
        for s, t in set(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)):
            if s >= 0 and t >= 0:
                _join(self.parent, s, t)
                if summed:
                    _join(self.sums, s, t)
            elif s >= 0 or t >= 0:
                self.protected.setdefault(max(s, t), why)

    def protect(self, symbols: Tensor | Iterable[int], why: str) -> None:
        """Never cut these."""
        _note(self.protected, symbols, why)

    def refuse(self, symbols: Tensor | Iterable[int], why: str) -> None:
        """A cut of these would change the function."""
        _note(self.refused, symbols, why)

    def activate(self, symbols: Iterable[int], relu: bool) -> None:
        """These went through an activation and on to a layer."""
        for s in symbols:
            if s >= 0:
                self.activated[s] = self.activated.get(s, True) and relu

    def use(self, name: str, axis: int, symbols: Tensor, *, row: bool) -> None:
        """Axis ``axis`` of ``name`` lies along ``symbols``; a second use ties its symbols to those of the first."""
        known = self.uses.setdefault((name, axis), Use(name, axis, symbols, row))
        self._tie(known.symbols, symbols, name)

    def _tie(self, a: Tensor, b: Tensor, name: str) -> None:
        if a is b:
            return
        why = f"{name!r} is shared between channels that cannot be cut together"
        if a.shape == b.shape:
            self.unite(a, b, why)
        else:
            self.protect(a, why)
            self.protect(b, why)

    def resize(self, module: str, kind: str, symbols: Tensor) -> None:
        """``module`` remembers how many ``symbols`` there are; a second use ties its symbols to those of the first."""
        known = self.resizes.setdefault(module, Resize(module, kind, symbols))
        self._tie(known.symbols, symbols, module)

    def sections(self, symbols: Tensor, why: str, *, whole: bool = False) -> None:
        """Rows of ``symbols`` keep equal counts, or are kept or cut as a whole."""
        (self.whole if whole else self.even).setdefault(sections_key(symbols), (symbols, why))

    def close(self) -> None:
        """Protect what reads parameters in ways that are not followed (tied embeddings, weights in a loss)."""
        for use in self.uses.values():
            if use.name in self.touched:
                self.protect(use.symbols, f"{use.name!r} is also read by {self.touched[use.name]}")


def sections_key(symbols: Tensor) -> tuple[int, ...]:
    """What tells sections [sections, width] from others."""
    return (symbols.size(0), *symbols.flatten().tolist())


def _find(parent: list[int], symbol: int) -> int:
    root = symbol
    while parent[root] != root:
        root = parent[root]
    while parent[symbol] != root:
        parent[symbol], symbol = root, parent[symbol]
    return root


def _join(parent: list[int], s: int, t: int) -> None:
    s, t = _find(parent, s), _find(parent, t)
    parent[max(s, t)] = min(s, t)


def _note(notes: dict[int, str], symbols: Tensor | Iterable[int], why: str) -> None:
    for s in symbols.unique().tolist() if isinstance(symbols, Tensor) else symbols:
        if s >= 0:
            notes.setdefault(s, why)
