"""Launch tables: where the tensors of a step lie and how they are cut into chunks, in device memory.

As in ``csrc/engine/plan.h``, a chunk is 16384 elements on every machine, because the sums are per chunk first. A table
serves every step over the same tensors: its structure is built once, the addresses are sent again when one of them
changes (gradients move), the hyper-parameters when one of their values does. Per row 128 bytes, per chunk 48.

    rows       int64 [R, 16]    one tensor: addresses, elements, key, weight, slot, scope, group, vector; scope by scope
    pieces     int32 [P, 4]     one chunk: row, number in the row, place in ``partial``; kind by kind
    partial    float64 [4, P]   a chunk's three sums and whether they count in its scope's cosine; scope by scope
    numbers    float64 [G H + 1]    hyper-parameters, then max_grad_norm
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torsion.ops._frame import Step
    from torsion.triton_kernels.engine import Rule

CHUNK = tl.constexpr(16384)

# Columns of `rows`. Streams come first: parameter, gradient, then the rule's states.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
STATE = tl.constexpr(2)
SECOND_STATE = tl.constexpr(3)
ROW_N = tl.constexpr(6)
ROW_KEY = tl.constexpr(7)
ROW_WEIGHT = tl.constexpr(8)
ROW_SLOT = tl.constexpr(9)
ROW_SCOPE = tl.constexpr(10)
ROW_GROUP = tl.constexpr(11)
ROW_VECTOR = tl.constexpr(12)  # 1: 128-bit accesses are possible, and the first element begins a random block
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


def _refuse(rule: Rule, message: str) -> None:
    raise RuntimeError(f"{rule.name}: {message}")


class Table:
    """One list of tensors on its device, with the workspace of its steps."""

    def __init__(self, rule: Rule, step: Step, structure: list[object], stochastic: Sequence[float]) -> None:
        self.rule = rule
        self.structure = structure
        self.device = step.shared.device
        self.captured = False
        self.keep: list[Tensor] = []
        self.pointers: list[list[int]] | None = None
        self.wanted: list[float | None] | None = None
        self.n_rows = len(step.params)
        self.n_scopes = step.shared.numel() // 3
        self.n_groups = step.hyper.numel() // rule.hyper
        self._check_structure(step)
        # Scope by scope, in the given order inside a scope: the order of the sums.
        self.order = sorted(range(self.n_rows), key=lambda i: step.scopes[i])
        self.kinds = [Kind(_WORDS[p.dtype], False) for p in step.params]
        for i, (kind, group) in enumerate(zip(self.kinds, step.groups, strict=True)):
            if kind.word in _HALVES and stochastic[group] != 0:
                self.kinds[i] = kind._replace(stochastic=True)
        self._lay_rows(step)
        self._lay_pieces(step)
        device, empty = self.device, torch.empty
        self.partial = empty(4 * self.n_pieces, dtype=torch.float64, device=device)
        self.sums = empty(self.n_scopes + 1, 3, dtype=torch.float64, device=device)
        self.coefficients = empty(self.n_rows, rule.coefficients, dtype=torch.float64, device=device)
        self.numbers = empty(step.hyper.numel() + 1, dtype=torch.float64, device=device)
        self.one = torch.ones(1, device=device)
        self.zero = torch.zeros(1, device=device)

    def _check_structure(self, step: Step) -> None:
        rule, n = self.rule, self.n_rows
        expected = {"steps": (torch.float32,), "status": (torch.int64,), "shared": (torch.float32, torch.float64)}
        for name, dtypes in expected.items():
            t = getattr(step, name)
            if t.dtype not in dtypes or not t.is_contiguous() or t.device != self.device:
                _refuse(rule, f"{name} must be contiguous {dtypes} on {self.device}, is {t.dtype} on {t.device}")
        if step.status.numel() < 4:
            _refuse(rule, f"status must have 4 elements, has {step.status.numel()}")
        if step.hyper.dtype != torch.float64 or step.hyper.device.type != "cpu" or step.hyper.shape[-1] != rule.hyper:
            _refuse(
                rule, f"hyper must be a float64 CPU tensor of {rule.hyper} columns; rates on the device go into lrs"
            )
        lists = [step.grads, *step.states, step.scopes, step.groups, step.slots]
        lists += [x for x in (step.weights, step.keys) if len(x)]
        if len(step.states) != rule.states:
            _refuse(rule, f"takes {rule.states} lists of state, has {len(step.states)}")
        if any(len(x) != n for x in lists):
            _refuse(rule, f"lists differ in length: {n} params, then {[len(x) for x in lists]}")
        for i, p in enumerate(step.params):
            if p.dtype not in _WORDS:
                _refuse(rule, f"params[{i}] must be float32, float64, bfloat16 or float16, is {p.dtype}")
            if not _is_dense(p):
                _refuse(rule, f"params[{i}] has holes or overlaps in memory; pass a contiguous copy")
        limits = {"scopes": self.n_scopes, "groups": self.n_groups, "slots": step.steps.numel()}
        for name, limit in limits.items():
            for i, x in enumerate(getattr(step, name)):
                if not 0 <= x < limit:
                    _refuse(rule, f"{name}[{i}] = {x} is outside 0 ... {limit - 1}")

    def _check_stream(self, step: Step, k: int, stream: Sequence[Tensor]) -> None:
        """Stream k is laid out as the parameters."""
        for i, (t, p) in enumerate(zip(stream, step.params, strict=True)):
            dtype = p.dtype if k < STATE.value or p.dtype == torch.float64 else torch.float32
            if t.dtype != dtype:
                _refuse(self.rule, f"list {k}, tensor {i} must be {dtype}, is {t.dtype}")
            if t.device != self.device:
                _refuse(self.rule, f"list {k}, tensor {i} is on {t.device}, shared on {self.device}")
            if not _same_layout(t, p):
                _refuse(self.rule, f"list {k}, tensor {i} differs from its parameter in sizes or strides")

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
        }
        for column, values in columns.items():
            rows[:, column.value] = torch.tensor([values[i] for i in self.order], dtype=torch.int64)
        self.host_rows = rows
        # A random block serves the eight elements from a multiple of 8; a vector path then starts at its first.
        self.vector_keys = torch.tensor(
            [not self.kinds[i].stochastic or not len(step.keys) or step.keys[i] % 8 == 0 for i in self.order],
            dtype=torch.bool,
        )

    def _lay_pieces(self, step: Step) -> None:
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

    def point(self, step: Step, pointers: list[list[int]]) -> None:
        """Sends the addresses of this step's tensors; checks the lists in which one has moved before it changes any."""
        streams = (step.params, step.grads, *step.states)
        moved = [k for k in range(len(streams)) if self.pointers is None or pointers[k] != self.pointers[k]]
        for k in moved:
            self._check_stream(step, k, streams[k])
        rows = self.host_rows
        for k in moved:
            rows[:, k] = torch.tensor([pointers[k][i] for i in self.order], dtype=torch.int64)
        aligned = ((rows[:, : len(pointers)] & 15) == 0).all(1)
        rows[:, ROW_VECTOR.value] = (aligned & self.vector_keys).to(torch.int64)
        self.rows = _send(rows, self.device, self.keep)
        self.pointers = pointers

    def set_numbers(self, step: Step, values: list[float]) -> None:
        """Sends the hyper-parameters if one of them changed; take_rates adds those that the device holds."""
        width = self.rule.hyper
        open_rates = [at for at in range(LR.value, len(values), width) if values[at] != values[at]]
        if len(open_rates) > len(step.lrs):
            _refuse(self.rule, f"hyper asks for {len(open_rates)} learning rates, lrs holds {len(step.lrs)}")
        wanted: list[float | None] = [*values, math.inf if step.max_grad_norm is None else step.max_grad_norm]
        on_host: list[tuple[int, Tensor]] = []
        self.rates: list[tuple[int, Tensor]] = []
        for at, rate in zip(open_rates, step.lrs, strict=False):
            if rate.numel() != 1 or not rate.is_floating_point():
                _refuse(self.rule, f"a learning rate must be one float, is {rate.dtype} {list(rate.shape)}")
            wanted[at] = None  # a NaN would never equal that of the step before
            (self.rates if rate.device == self.device else on_host).append((at, rate.detach().reshape(())))
        if wanted == self.wanted and not on_host:
            return
        host = torch.tensor([0.0 if x is None else x for x in wanted], dtype=torch.float64)
        for at, rate in on_host:
            host[at].copy_(rate)
        self.numbers.copy_(_send(host, self.device, self.keep))
        self.wanted = wanted

    def take_rates(self) -> None:
        """Copies learning rates that lie on the device to their places there."""
        for at, rate in self.rates:
            self.numbers[at].copy_(rate)


_MOST_TABLES = 64
_tables: dict[tuple[object, ...], Table] = {}
_captured: list[Table] = []
"""Tables that a CUDA graph reads: they stay as they are for as long as the process lives."""


def table_of(rule: Rule, step: Step) -> Table:
    """The table of this step, from the cache where nothing but addresses or numbers has changed."""
    params, device = step.params, step.shared.device
    pointers = [list(map(Tensor.data_ptr, stream)) for stream in (params, step.grads, *step.states)]
    values: list[float] = step.hyper.flatten().tolist()  # on the CPU: no wait
    stochastic = values[STOCHASTIC.value :: rule.hyper]
    structure = [
        list(map(Tensor.numel, params)), [p.dtype for p in params], *map(list, (step.scopes, step.groups, step.slots)),
        list(step.weights), list(step.keys), step.shared.numel(), step.steps.numel(), stochastic,
    ]  # fmt: skip
    key = (rule.name, device, *pointers[0])
    table = _tables.get(key)
    if table is not None and (table.structure != structure or (table.captured and table.pointers != pointers)):
        _forget(key)
        table = None
    if table is None:
        while len(_tables) >= _MOST_TABLES:
            _forget(next(iter(_tables)))
        table = _tables[key] = Table(rule, step, structure, stochastic)
    if table.pointers != pointers:
        table.point(step, pointers)
    table.captured |= device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table.set_numbers(step, values)
    return table


def _forget(key: tuple[object, ...]) -> None:
    table = _tables.pop(key)
    if table.captured:
        _captured.append(table)
