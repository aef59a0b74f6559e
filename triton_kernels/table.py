"""Launch tables: where the tensors of a step lie and how they are cut into chunks, in device memory.

As in ``csrc/engine/plan.h``, a chunk is 16384 elements on every machine, because the sums are per chunk first. A table
serves every step over the same tensors: its structure is built once, the addresses are sent again when one of them
changes (gradients move), the hyper-parameters when one of their values does. The passes of a Lookbehind cycle share a
table; numbers and results of each are its own. Per row 128 bytes, per chunk 16, and 8 per sum and chunk of each rule.

    rows       int64 [R, 16]    one tensor: addresses, elements, key, weight, slot, scope, group, flags; scope by scope
    pieces     int32 [P, 4]     one chunk: row, number in the row, place in ``partial``; kind by kind
    partial    float64 [N + 1, P]    a chunk's sums and whether they count in its scope; scope by scope
    numbers    float64 [G H + 1]     hyper-parameters, then max_grad_norm
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from torsion.ops._frame import Step
    from torsion.triton_kernels.engine import Rule

CHUNK = tl.constexpr(16384)

# Columns of `rows`. Addresses come first: parameter, gradient, the rule's states, then buffers of a cycle in any order.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
STATE = tl.constexpr(2)
SECOND_STATE = tl.constexpr(3)
BUFFERS = (4, 5, 6, 7)
ROW_N = tl.constexpr(8)
ROW_KEY = tl.constexpr(9)
ROW_WEIGHT = tl.constexpr(10)
ROW_SLOT = tl.constexpr(11)
ROW_SCOPE = tl.constexpr(12)
ROW_GROUP = tl.constexpr(13)
ROW_VECTOR = tl.constexpr(14)  # 1: 128-bit accesses are possible, and the first element begins a random block
ROW_SCALED = tl.constexpr(15)  # 1: ASAM scales the tensor
ROW_WIDTH = tl.constexpr(16)

# Columns of `hyper` that every rule has, as in torsion.ops._frame.COMMON_HYPER.
LR = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
DECOUPLED = tl.constexpr(2)
MAXIMIZE = tl.constexpr(3)
STOCHASTIC = tl.constexpr(4)
SEED = tl.constexpr(5)


class Kind(NamedTuple):
    """Storage of parameter and gradient, and whether the parameter is rounded at random."""

    word: tl.dtype
    stochastic: bool

    @property
    def maths(self) -> tl.dtype:
        """Type of the element maths and of the state."""
        return tl.float64 if self.word == tl.float64 else tl.float32


_WORDS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_HALVES = (tl.bfloat16, tl.float16)
KINDS = tuple(Kind(word, noisy) for word in _WORDS.values() for noisy in (False, True) if word in _HALVES or not noisy)


@dataclass
class Launch:
    """The pieces of one kind."""

    kind: Kind
    pieces: Tensor
    count: int


class Stream(NamedTuple):
    """A list of tensors of a step; ``column``: where their addresses stand in a row, None: in any of BUFFERS."""

    name: str
    column: int | None
    tensors: Sequence[Tensor]


Pointers = dict[int, list[int]]
"""Column of ``rows`` -> address of each tensor, in the order of the lists."""


def _send(host: Tensor, device: torch.device, keep: list[Tensor]) -> Tensor:
    """``host`` on ``device`` without waiting. Under graph capture the copy is replayed, so its source must stay."""
    if device.type != "cuda":
        return host
    host = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        keep.append(host)
    return host.to(device, non_blocking=True)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.stride() == b.stride() or all(size < 2 or x == y for size, x, y in strides)


def _is_dense(t: Tensor) -> bool:
    """Element i of every stream lies at offset i only if the tensor has neither holes nor overlaps."""
    if t.is_contiguous() or t.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def refuse(rule: Rule, message: str) -> None:
    raise RuntimeError(f"{rule.name}: {message}")


class Table:
    """One list of tensors on its device, cut into chunks."""

    def __init__(self, rule: Rule, step: Step, structure: list[object]) -> None:
        self.name = rule.name
        self.structure = structure
        self.device = step.shared.device
        self.captured = False
        self.keep: list[Tensor] = []
        self.pointers: Pointers = {}
        self.spaces: dict[str, Workspace] = {}
        self.n_rows = len(step.params)
        self.n_scopes = step.shared.shape[0]
        self.n_groups = step.hyper.shape[0]
        self._check_structure(rule, step)
        # Scope by scope, in the given order inside a scope: the order of the sums.
        self.order = sorted(range(self.n_rows), key=lambda i: step.scopes[i])
        self.kinds = [Kind(_WORDS[p.dtype], False) for p in step.params]
        stochastic = step.hyper[:, STOCHASTIC.value].tolist()
        for i, (kind, group) in enumerate(zip(self.kinds, step.groups, strict=True)):
            if kind.word in _HALVES and stochastic[group] != 0:
                self.kinds[i] = kind._replace(stochastic=True)
        self._lay_rows(step)
        self._lay_pieces()
        self.one = torch.ones(1, device=self.device)
        self.zero = torch.zeros(1, device=self.device)

    def _check_structure(self, rule: Rule, step: Step) -> None:
        n = self.n_rows
        expected = {"steps": (torch.float32,), "status": (torch.int64,), "shared": (torch.float32, torch.float64)}
        for name, dtypes in expected.items():
            t = getattr(step, name)
            if t.dtype not in dtypes or not t.is_contiguous() or t.device != self.device:
                refuse(rule, f"{name} must be contiguous {dtypes} on {self.device}, is {t.dtype} on {t.device}")
        if step.status.numel() < 4:
            refuse(rule, f"status must have 4 elements, has {step.status.numel()}")
        lists = [step.scopes, step.groups, step.slots, *(x for x in (step.weights, step.keys, _scaled(step)) if len(x))]
        if any(len(x) != n for x in lists):
            refuse(rule, f"lists differ in length: {n} params, then {[len(x) for x in lists]}")
        for i, p in enumerate(step.params):
            if p.dtype not in _WORDS:
                refuse(rule, f"params[{i}] must be float32, float64, bfloat16 or float16, is {p.dtype}")
            if not _is_dense(p):
                refuse(rule, f"params[{i}] has holes or overlaps in memory; pass a contiguous copy")
        limits = {"scopes": self.n_scopes, "groups": self.n_groups, "slots": step.steps.numel()}
        for name, limit in limits.items():
            for i, x in enumerate(getattr(step, name)):
                if not 0 <= x < limit:
                    refuse(rule, f"{name}[{i}] = {x} is outside 0 ... {limit - 1}")

    def _lay_rows(self, step: Step) -> None:
        """The columns that do not depend on addresses."""
        rows = torch.zeros(self.n_rows, ROW_WIDTH.value, dtype=torch.int64)
        one = torch.ones(self.n_rows, dtype=torch.float64)
        weights = torch.tensor(step.weights, dtype=torch.float64) if len(step.weights) else one
        columns: dict[tl.constexpr, Sequence[int]] = {
            ROW_N: [p.numel() for p in step.params],
            ROW_KEY: step.keys if len(step.keys) else [0] * self.n_rows,
            ROW_WEIGHT: weights.view(torch.int64).tolist(),
            ROW_SLOT: step.slots,
            ROW_SCOPE: step.scopes,
            ROW_GROUP: step.groups,
            ROW_SCALED: [int(x) for x in _scaled(step)] or [0] * self.n_rows,
        }
        for column, values in columns.items():
            rows[:, column.value] = torch.tensor([values[i] for i in self.order], dtype=torch.int64)
        self.host_rows = rows
        # A random block serves the eight elements from a multiple of 8; a vector path then starts at its first.
        self.vector_keys = torch.tensor(
            [not self.kinds[i].stochastic or not len(step.keys) or step.keys[i] % 8 == 0 for i in self.order],
            dtype=torch.bool,
        )

    def _lay_pieces(self) -> None:
        n = self.host_rows[:, ROW_N.value]
        counts = (n + (CHUNK.value - 1)) // CHUNK.value
        first = counts.cumsum(0) - counts
        row = torch.repeat_interleave(torch.arange(self.n_rows), counts)
        place = torch.arange(len(row))
        self.n_pieces = len(row)
        if self.n_pieces >= 2**31:
            raise OverflowError("torsion: more than 2^31 chunks in one launch table")
        pieces = torch.stack((row, place - first[row], place, torch.zeros_like(place)), 1).to(torch.int32)
        kinds = torch.tensor([KINDS.index(self.kinds[i]) for i in self.order], dtype=torch.int64)[row]
        pieces = _send(pieces[torch.argsort(kinds, stable=True)].contiguous(), self.device, self.keep)
        self.launches: list[Launch] = []
        at = 0
        for kind, count in zip(KINDS, torch.bincount(kinds, minlength=len(KINDS)).tolist(), strict=True):
            if count:
                self.launches.append(Launch(kind, pieces[at : at + count], count))
            at += count
        scopes = self.host_rows[:, ROW_SCOPE.value].contiguous()
        edges = torch.arange(self.n_scopes + 1)
        first_row = torch.searchsorted(scopes, edges)
        piece_first = torch.cat((first, torch.tensor([self.n_pieces])))[first_row]
        self.piece_first = _send(piece_first.contiguous(), self.device, self.keep)
        # The group that says how a scope moves is that of its first tensor; -1 where no tensor is in the step.
        groups = torch.cat((self.host_rows[:, ROW_GROUP.value], torch.tensor([-1])))
        self.scope_group = _send(
            torch.where(first_row[:-1] < first_row[1:], groups[first_row[:-1]], -1), self.device, self.keep
        )

    # Addresses

    def places(self, streams: Sequence[Stream]) -> tuple[dict[str, int], Pointers]:
        """The column of each stream, and the columns whose addresses are not those of the step before."""
        pointers = [list(map(Tensor.data_ptr, s.tensors)) for s in streams]
        # A parameter in half precision is no place for anything else: it has another type.
        anywhere = BUFFERS if any(kind.word in _HALVES for kind in self.kinds) else (PARAM.value, *BUFFERS)
        columns = {s.name: s.column for s in streams if s.column is not None}
        moved: Pointers = {}
        for stream, own in zip(streams, pointers, strict=True):
            if stream.column is not None and self.pointers.get(stream.column) != own:
                moved[stream.column] = own
        now = self.pointers | moved
        buffers = [(stream.name, own) for stream, own in zip(streams, pointers, strict=True) if stream.column is None]
        for name, own in buffers:
            at = next((c for c in anywhere if now.get(c) == own), None)
            if at is not None:
                columns[name] = at
        for name, own in buffers:
            if name in columns:
                continue
            same = next((c for c in moved if c in BUFFERS and moved[c] == own), None)  # two lists may be one buffer
            free = [c for c in BUFFERS if c not in columns.values()]
            at = min(free, key=lambda c: c in self.pointers) if same is None else same
            columns[name], moved[at] = at, own
        return columns, moved

    def point(
        self, rule: Rule, step: Step, streams: Sequence[Stream], columns: dict[str, int], moved: Pointers
    ) -> None:
        """Sends new addresses; checks the lists in which one has moved before it changes any."""
        for stream in streams:
            if columns[stream.name] in moved:
                self._check_stream(rule, step, stream)
        rows = self.host_rows
        for column, own in moved.items():
            rows[:, column] = torch.tensor([own[i] for i in self.order], dtype=torch.int64)
        aligned = ((rows[:, : ROW_N.value] & 15) == 0).all(1)
        rows[:, ROW_VECTOR.value] = (aligned & self.vector_keys).to(torch.int64)
        self.rows = _send(rows, self.device, self.keep)
        self.pointers |= moved

    def _check_stream(self, rule: Rule, step: Step, stream: Stream) -> None:
        """The tensors are laid out as the parameters."""
        of_word = stream.column in (PARAM.value, GRAD.value)
        for i, (t, p) in enumerate(zip(stream.tensors, step.params, strict=True)):
            dtype = p.dtype if of_word or p.dtype == torch.float64 else torch.float32
            if t.dtype != dtype:
                refuse(rule, f"{stream.name}, tensor {i} must be {dtype}, is {t.dtype}")
            if t.device != self.device:
                refuse(rule, f"{stream.name}, tensor {i} is on {t.device}, shared on {self.device}")
            if not _same_layout(t, p):
                refuse(rule, f"{stream.name}, tensor {i} differs from its parameter in sizes or strides")


class Workspace:
    """What a table holds for one rule: its numbers, sums and coefficients."""

    def __init__(self, rule: Rule, table: Table) -> None:
        self.rule, self.table = rule, table
        self.wanted: list[float | None] | None = None
        self.rates: list[tuple[int, Tensor]] = []

        def empty(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=torch.float64, device=table.device)

        self.partial = empty(rule.sums + 1, table.n_pieces)
        self.sums = empty(table.n_scopes + 1, rule.sums)
        self.coefficients = empty(table.n_rows, rule.coefficients)
        self.numbers = empty(table.n_groups * rule.hyper + 1)

    def set_numbers(self, step: Step) -> None:
        """Sends the hyper-parameters if one of them changed; take_rates adds those that the device holds."""
        values: list[float] = step.hyper.flatten().tolist()  # on the CPU: no wait
        rule, device = self.rule, self.table.device
        open_rates = [at for at in range(LR.value, len(values), rule.hyper) if values[at] != values[at]]
        if len(open_rates) > len(step.lrs):
            refuse(rule, f"hyper asks for {len(open_rates)} learning rates, lrs holds {len(step.lrs)}")
        wanted: list[float | None] = [*values, math.inf if step.max_grad_norm is None else step.max_grad_norm]
        on_host: list[tuple[int, Tensor]] = []
        self.rates = []
        for at, rate in zip(open_rates, step.lrs, strict=False):
            if rate.numel() != 1 or not rate.is_floating_point():
                refuse(rule, f"a learning rate must be one float, is {rate.dtype} {list(rate.shape)}")
            wanted[at] = None  # a NaN would never equal that of the step before
            (self.rates if rate.device == device else on_host).append((at, rate.detach().reshape(())))
        if wanted == self.wanted and not on_host:
            return
        host = torch.tensor([0.0 if x is None else x for x in wanted], dtype=torch.float64)
        for at, rate in on_host:
            host[at].copy_(rate)
        self.numbers.copy_(_send(host, device, self.table.keep))
        self.wanted = wanted

    def take_rates(self) -> None:
        """Copies learning rates that lie on the device to their places there."""
        for at, rate in self.rates:
            self.numbers[at].copy_(rate)


@dataclass
class Prepared:
    """A step ready to be launched: ``columns`` says where in a row the addresses of each stream are."""

    table: Table
    space: Workspace
    columns: dict[str, int] = field(default_factory=dict)


_MOST_TABLES = 64
_tables: dict[tuple[object, ...], Table] = {}
_captured: list[Table] = []
"""Tables that a CUDA graph reads: they stay as they are for as long as the process lives."""


def prepare(rule: Rule, step: Step, streams: Sequence[Stream]) -> Prepared:
    """The table of this step, from the cache where nothing but addresses or numbers has changed.

    ``streams``: parameters first, and no other list of tensors is looked at.
    """
    n, hyper, device = len(step.params), step.hyper, step.shared.device
    if hyper.dtype != torch.float64 or hyper.device.type != "cpu" or hyper.shape[-1] != rule.hyper:
        refuse(rule, f"hyper must be a float64 CPU tensor of {rule.hyper} columns; rates on the device go into lrs")
    if step.shared.dim() != 2 or (rule.shared and step.shared.shape[1] != rule.shared):
        refuse(rule, f"shared must have {rule.shared} columns, is {list(step.shared.shape)}")
    if any(len(s.tensors) != n for s in streams):
        refuse(rule, f"lists differ in length: {n} params, " + ", ".join(f"{len(s.tensors)} {s.name}" for s in streams))
    structure = [
        list(map(Tensor.numel, step.params)), [p.dtype for p in step.params],
        *map(list, (step.scopes, step.groups, step.slots, step.weights, step.keys, _scaled(step))),
        step.shared.shape[0], step.steps.numel(), step.hyper[:, STOCHASTIC.value].tolist(),
    ]  # fmt: skip
    key = (rule.family, device, *map(Tensor.data_ptr, step.params))
    table = _tables.get(key)
    if table is not None and table.structure != structure:
        _forget(key)
        table = None
    if table is not None:
        columns, moved = table.places(streams)
        if moved and table.captured:
            _forget(key)
            table = None
    if table is None:
        while len(_tables) >= _MOST_TABLES:
            _forget(next(iter(_tables)))
        table = _tables[key] = Table(rule, step, structure)
        columns, moved = table.places(streams)
    if moved:
        table.point(rule, step, streams, columns, moved)
    table.captured |= device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    space = table.spaces.get(rule.name)
    if space is None:
        space = table.spaces[rule.name] = Workspace(rule, table)
    space.set_numbers(step)
    return Prepared(table, space, columns)


def _scaled(step: Step) -> Sequence[bool]:
    return getattr(step, "scaled", ())


def _forget(key: tuple[object, ...]) -> None:
    table = _tables.pop(key)
    if table.captured:
        _captured.append(table)
