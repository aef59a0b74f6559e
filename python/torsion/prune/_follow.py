"""Running a model while following its channels from function call to function call.

Why not Torch-Pruning's dependency graph: it follows ``grad_fn``, so that it does not see which activation follows which
layer, takes any operation it does not know for elementwise, and truncates grouped convolutions. torch.fx and
torch.export give graphs, but refuse many models that run. A ``TorchFunctionMode`` sees every call of a running model
at the level of ``F.linear``, ``F.relu``, ``torch.cat``, ``Tensor.view``, from modules and functions alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from torsion.prune._symbols import RAW, SHIFTED, ZERO, Symbols, states_of, symbols_of, with_state


@dataclass(eq=False)
class Pending:
    """An activation's output, on its way to a layer that reads it.

    Attributes:
        symbols: int64 [channels] of the output's channels.
        owners: symbols, same shape each, of the layers that the activation belongs to.
        relu: whether it is a ReLU.
        stats: what was measured on each channel, by a window.
        read: bool [channels], channels that reached a layer.
    """

    symbols: Tensor
    owners: list[Tensor]
    relu: bool
    stats: Any
    read: Tensor


@dataclass(eq=False)
class Info:
    """What is known of a tensor: its code, the activations it comes from, and what shifted its zeros."""

    code: Tensor
    pending: tuple[Pending, ...] = ()
    why: str = ""
    version: int = -1
    op: str = ""
    read: bool = False


@dataclass
class Call:
    """One function call: what was called, with what, what is known of its tensors, what came out."""

    func: Callable[..., Any]
    name: str
    where: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    infos: dict[int, Info]
    out: Any = None
    before: Tensor | None = None
    """Copy of the first argument of an activation, made where a window asks for derivatives."""

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def info(self, value: Any) -> Info | None:
        """What is known of an argument."""
        return self.infos.get(id(value)) if isinstance(value, Tensor) else None


Handler = Callable[["Follower", Call], bool]
"""Sets what is known of ``call.out``; False when this call cannot be followed."""

Watch = Callable[[Tensor, tuple[int, ...], Call, bool], Any]
"""Measures the output of an activation, a ReLU or not, over all dimensions but those given."""


@dataclass
class Step:
    """One call as it went into the log: enough to compare two runs."""

    op: str
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class Follower(TorchFunctionMode):
    """Follows the channels of ``model`` through the calls made while it is entered.

    Attributes:
        symbols: where units, ties and uses are collected.
        watch: called with the output of every activation, or None.
        pendings: every activation seen, in order.
        log: every call that touched channels, in order.
    """

    slopes = False
    """Whether to keep what activations were applied to; in-place ones overwrite it."""
    strict = False
    """Whether a handler's own exceptions pass through, for the tests of this module."""

    def __init__(self, model: nn.Module, symbols: Symbols, watch: Watch | None = None) -> None:
        super().__init__()
        self.model = model
        self.symbols = symbols
        self.watch = watch
        self.pendings: list[Pending] = []
        self.log: list[Step] = []
        self._infos = WeakIdKeyDictionary()
        self._all: list[Info] = []
        self._stack: list[str] = []
        self._names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self._hooks: list[Any] = []
        symbols.parameters.update(name for name, _ in model.named_parameters())

    def __enter__(self) -> Follower:
        for name, module in self.model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._stack.append(name)))
            self._hooks.append(module.register_forward_hook(lambda *_: self._pop(), always_call=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _pop(self) -> None:
        self._stack.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = op_name(func)
        if name in METADATA:
            return func(*args, **kwargs)
        infos: dict[int, Info] = {}
        params: list[str] = []
        for t in tensors_in([args, kwargs]):
            info = self.known(t)
            if info is not None:
                infos[id(t)] = info
            elif id(t) in self._names:
                params.append(self._names[id(t)])
        if not infos and not params:
            return func(*args, **kwargs)
        call = Call(func, name, f"{name} in {self.where()}", args, kwargs, infos)
        self.log.append(Step(call.where, [i.code for i in infos.values()]))
        if self.slopes and isinstance(args[0] if args else None, Tensor) and id(args[0]) in infos:
            call.before = args[0].clone()
        call.out = func(*args, **kwargs)
        for info in infos.values():
            info.read = True
        handler = HANDLERS.get(name)
        if handler is None or kwargs.get("out") is not None or not self._handled(handler, call):
            self.lose(call, params)
        self.log[-1].outputs = [i.code for i in map(self._peek, tensors_in(call.out)) if i is not None]
        return call.out

    def _handled(self, handler: Handler, call: Call) -> bool:
        # Arguments come in more forms than a handler foresees: what it stumbles over is refused like what it rejects.
        try:
            return handler(self, call)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError):
            if self.strict:
                raise
            return False

    def where(self) -> str:
        """The module whose forward runs, for messages."""
        return repr(self._stack[-1]) if self._stack and self._stack[-1] else "the model's own forward"

    def module(self) -> tuple[str, nn.Module]:
        """The module whose forward runs."""
        name = self._stack[-1] if self._stack else ""
        return name, self.model.get_submodule(name)

    def name_of(self, tensor: Any) -> str | None:
        """Name of a parameter or buffer of the model, else None."""
        return self._names.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def _peek(self, tensor: Tensor) -> Info | None:
        info: Info | None = self._infos.get(tensor)
        return info

    def known(self, tensor: Tensor) -> Info | None:
        """What is known of ``tensor``; after it was changed through another view of its memory, that it is lost."""
        info = self._peek(tensor)
        if info is not None and info.version != _version(tensor):
            why = f"a tensor was changed in place through a view of it, seen in {self.where()}"
            self.drop(info, why)
            info.read = True
            del self._infos[tensor]
            return None
        return info

    def put(self, tensor: Any, code: Tensor, pending: tuple[Pending, ...] = (), why: str = "", op: str = "") -> bool:
        """Remember the code of ``tensor``; False, with nothing remembered, when it does not fit the tensor's shape."""
        if not isinstance(tensor, Tensor) or code.dim() != tensor.dim():
            return False
        if any(n not in (1, size) for n, size in zip(code.shape, tensor.shape, strict=True)):
            return False
        if not bool((code >= 0).any()):
            self._infos.pop(tensor, None)
            return True
        info = Info(code, pending, why, _version(tensor), op or self.where())
        self._infos[tensor] = info
        self._all.append(info)
        return True

    def drop(self, info: Info, why: str) -> None:
        """What reads ``info`` is not followed: raw units are protected, activated ones refused."""
        symbols, states = symbols_of(info.code), states_of(info.code)
        self.symbols.protect(symbols[states == RAW], why)
        self.symbols.refuse(symbols[states != RAW], why)
        self.commit(info, symbols)

    def lose(self, call: Call, params: list[str]) -> None:
        """An operation that is not known: nothing it reads can be cut."""
        for info in call.infos.values():
            self.drop(info, f"{call.where} cannot be followed")
        for name in params:
            self.symbols.touched.setdefault(name, call.where)
        for t in tensors_in([call.out, call.kwargs.get("out")]):
            self._infos.pop(t, None)

    def protect(self, info: Info, why: str) -> None:
        """Never cut the units of ``info``."""
        self.symbols.protect(symbols_of(info.code), why)

    def commit(self, info: Info, symbols: Tensor) -> None:
        """The activations that ``info`` comes from reached a layer, in the channels of ``symbols``."""
        if not info.pending:
            return
        classes = self.symbols.roots(symbols.unique())
        for pending in info.pending:
            reached = torch.isin(self.symbols.roots(pending.symbols), classes) & (pending.symbols >= 0) & ~pending.read
            if bool(reached.any()):
                pending.read |= reached
                for owner in pending.owners:
                    self.symbols.activate(owner[reached].tolist(), pending.relu)

    def along(self, info: Info, dim: int, size: int, why: str) -> Tensor:
        """Symbols [size] along ``dim``; those that share a position are tied, those of other dimensions protected."""
        symbols = symbols_of(info.code)
        dim %= symbols.dim()
        if symbols.numel() == 1:  # all of the tensor belongs to one unit
            symbols = symbols.expand(*symbols.shape[:dim], size, *symbols.shape[dim + 1 :])
        if symbols.size(dim) != size:
            self.symbols.protect(symbols, why)
            return torch.full((size,), -1, device="cpu")
        rows = symbols.movedim(dim, -1).reshape(-1, size)
        for row in rows[1:]:
            self.symbols.unite(rows[0], row, why, summed=True)
        return rows[0]

    def consume(self, info: Info | None, dim: int, size: int, reader: str) -> Tensor:
        """Symbols [size] along ``dim`` of what a layer reads, where a dead unit must hold zeros to be cut."""
        if info is None:
            return torch.full((size,), -1, device="cpu")
        symbols, states = symbols_of(info.code), states_of(info.code)
        self.symbols.protect(symbols[states == RAW], f"{reader} reads it without an activation in between")
        self.symbols.refuse(
            symbols[states == SHIFTED],
            f"{info.why} maps the zeros of a dead unit to something else, which {reader} reads",
        )
        self.commit(info, symbols)
        return self.along(info, dim, size, f"{reader} reads it along a dimension that is not the units'")

    def activate(
        self, call: Call, tensor: Any, code: Tensor, *, relu: bool, owners: list[Tensor] | None = None
    ) -> bool:
        """``tensor`` is what came out of an activation: from here on a dead unit holds zeros.

        Args:
            call: the activation.
            tensor: its output.
            code: the code that the output has but for its state.
            relu: whether it is a ReLU.
            owners: codes, of the shape of ``code``, of the layers it belongs to. Default: ``code``.

        Returns:
            False when the output has another shape than the code says.
        """
        dims = tuple(d for d in range(code.dim()) if code.size(d) > 1)
        symbols = symbols_of(code).flatten()
        stats = self.watch(tensor, dims, call, relu) if self.watch is not None else None
        pending = Pending(
            symbols,
            [symbols_of(o).flatten() for o in owners or [code]],
            relu,
            stats,
            torch.zeros(symbols.shape, dtype=torch.bool, device="cpu"),
        )
        self.pendings.append(pending)
        return self.put(tensor, with_state(code, ZERO), (pending,))

    def finish(self, outputs: Any) -> None:
        """Protect what the model returns, and refuse what went where it could not be followed."""
        for tensor in reachable(outputs):
            info = self.known(tensor)
            if info is not None:
                info.read = True
                self.protect(info, "it reaches the model's output without a further Linear or convolution")
        for info in self._all:
            if not info.read:
                self.drop(info, f"what {info.op} made of it goes to no operation that can be followed")
        self.symbols.close()


def op_name(func: Any) -> str:
    """Name of a function as torch's documentation has it, without the marks of in-place and operator forms."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":
        return f"get {getattr(func.__self__, '__name__', '')}"
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        return name[1:] if name in ("iadd", "isub", "imul", "itruediv", "idiv", "ipow") else name
    return name.rstrip("_") if not name.startswith("_") else name


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors_in(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors_in(v)


def reachable(value: Any) -> list[Tensor]:
    """Tensors in whatever a model returned: containers, dataclasses, objects with attributes."""
    found: list[Tensor] = []
    seen: set[int] = set()
    todo = [value]
    while todo:
        v = todo.pop()
        if id(v) in seen or isinstance(v, (str, bytes, int, float, type, nn.Module)):
            continue
        seen.add(id(v))
        if isinstance(v, Tensor):
            found.append(v)
        elif isinstance(v, Mapping):
            todo.extend(v.values())
        elif isinstance(v, (list, tuple, set, frozenset)):
            todo.extend(v)
        else:
            todo.extend(getattr(v, "__dict__", {}).values())
    return found


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def words(text: str) -> list[str]:
    """The words of ``text``."""
    return text.split()


METADATA = frozenset(
    words(
        "size dim ndimension stride numel nelement is_contiguous is_floating_point is_complex element_size len hash "
        "storage_offset get_device is_pinned is_same_size requires_grad is_set_to has_names is_inference result_type "
        "can_cast promote_types is_signed is_neg is_conj is_tensor is_storage _is_view _set_grad_enabled "
        "is_grad_enabled is_autocast_enabled register_hook untyped_storage data_ptr format repr"
    )
) | frozenset(
    f"get {name}"
    for name in words(
        "shape device dtype layout ndim requires_grad grad grad_fn is_leaf is_cuda is_cpu is_sparse is_quantized "
        "is_nested is_mps is_meta is_xpu is_mkldnn is_sparse_csr itemsize nbytes names retains_grad _version _base"
    )
)

HANDLERS: dict[str, Handler] = {}
"""Function name -> how its result follows from what is known of its arguments. Filled by the modules of operations."""


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler under ``names``."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


@contextlib.contextmanager
def fused_attention_off() -> Iterator[None]:
    """Transformer layers take no fused path in evaluation mode that would hide their activation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
