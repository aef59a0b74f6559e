"""What a model's units are, and what a cut of them would do: found by running the model once."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Importing the modules of operations registers them.
from torsion.prune import _elementwise, _layers, _moves  # noqa: F401
from torsion.prune._follow import Follower, Watch, fused_attention_off
from torsion.prune._symbols import Symbols, sections_key

CRITERIA = ("auto", "ever_active", "abs_max", "sum_le", "dormant", "saturation")


@dataclass
class Layer:
    """One layer whose output goes through an activation.

    Attributes:
        units: how many it has now.
        criterion: what "auto" stands for: "ever_active" behind ReLUs, "abs_max" behind anything else.
        refused: why a cut would change the function, naming operation and module; "" when it would not.
        rows: parameter -> dimension along which its rows are this layer's units (weight, bias, norm scale and shift).
        group: layers of one number meet at additions or gates and are cut together.
        protected: bool [units], on the CPU: units that are never cut.
    """

    units: int
    criterion: str
    refused: str
    rows: dict[str, int]
    group: int
    protected: Tensor


@dataclass
class Structure:
    """The units of a model as :func:`trace` found them; :func:`torsion.prune._cut.cut` keeps it up to date.

    Attributes:
        symbols: units, ties and uses.
        layers: layers that can be observed, by qualified name, in forward order; logits and protected ones are absent.
        protected: layers that are absent though they make units, and why.
    """

    symbols: Symbols
    layers: dict[str, Layer] = field(default_factory=dict)
    protected: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Work out the layers anew from the symbols; those that were listed stay so, protected if need be."""
        symbols = self.symbols
        protected = {symbols.find(s): why for s, why in symbols.protected.items()}
        refused = {symbols.find(s): why for s, why in symbols.refused.items()}
        activated: dict[int, bool] = {}
        for s, relu in symbols.activated.items():
            root = symbols.summed(s)
            activated[root] = activated.get(root, True) and relu
        groups = self._groups()
        listed = set(self.layers)
        self.layers, self.protected = {}, {}
        for block in symbols.blocks.values():
            roots = [symbols.find(s) for s in block.ids.tolist()]
            sums = [symbols.summed(s) for s in block.ids.tolist()]
            fixed = torch.tensor([r in protected for r in roots], device="cpu")
            if bool(fixed.all()) and block.layer not in listed:
                self.protected[block.layer] = protected[roots[0]] if roots else "it has no units"
            elif any(s in activated for s in sums) or block.layer in listed:
                relu = all(activated.get(s, True) for s in sums)
                self.layers[block.layer] = Layer(
                    units=len(roots),
                    criterion="ever_active" if relu else "abs_max",
                    refused=next((refused[r] for r in roots if r in refused and r not in protected), ""),
                    rows=self._rows(block.ids),
                    group=groups[block.weight],
                    protected=fixed,
                )
            else:
                self.protected[block.layer] = "no activation follows it"

    def _groups(self) -> dict[str, int]:
        """Weight -> number of the set of blocks that share classes with it."""
        seen: dict[int, str] = {}
        parent = {name: name for name in self.symbols.blocks}

        def top(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        for name, block in self.symbols.blocks.items():
            for root in {self.symbols.find(s) for s in block.ids.tolist()}:
                a, b = top(seen.setdefault(root, name)), top(name)
                parent[b] = a
        numbers: dict[str, int] = {}
        return {name: numbers.setdefault(top(name), len(numbers)) for name in parent}

    def _rows(self, ids: Tensor) -> dict[str, int]:
        return {
            use.name: use.axis
            for use in self.symbols.uses.values()
            if use.row
            and use.name in self.symbols.parameters
            and use.symbols.numel() == ids.numel()
            and torch.equal(use.symbols.flatten(), ids)
        }

    def row_masks(self, live: Mapping[str, Tensor]) -> dict[str, tuple[int, Tensor]]:
        """Where the rows of live units lie in every parameter that makes or normalizes them.

        Args:
            live: layer -> bool mask over its units.

        Returns:
            Parameter -> dimension, bool mask along it, on the CPU: True where the row belongs to a live unit of a layer
            in ``live``. Also of norms over several layers, which stand in no layer's ``rows``. For a grouped transposed
            convolution the mask is [groups, size of dimension 1], within the group that the row (dimension 0) is in.
            Parameters without such a row are absent.
        """
        alive = torch.zeros(len(self.symbols.parent), dtype=torch.bool, device="cpu")
        for block in self.symbols.blocks.values():
            if block.layer in live:
                alive[block.ids] = live[block.layer].cpu()
        masks = {
            use.name: (use.axis, (use.symbols >= 0) & alive[use.symbols.clamp(min=0)])
            for use in self.symbols.uses.values()
            if use.row and use.name in self.symbols.parameters
        }
        return {name: (axis, mask) for name, (axis, mask) in masks.items() if bool(mask.any())}

    def shrink(self, kept: Tensor) -> None:
        """Forget cut units; ``kept`` is bool over symbols."""

        def left(symbols: Tensor) -> Tensor:
            mask = (symbols < 0) | kept[symbols.clamp(min=0)]
            # Rows in which nothing is left are whole groups that went.
            return symbols[mask] if symbols.dim() == 1 else symbols[mask].reshape(int(mask.any(1).sum()), -1)

        s = self.symbols
        for block in s.blocks.values():
            block.ids = left(block.ids)
        for use in s.uses.values():
            use.symbols = left(use.symbols)
        for resize in s.resizes.values():
            resize.symbols = left(resize.symbols)
        for held in (s.even, s.whole):
            pairs = [(left(rows), why) for rows, why in held.values()]
            held.clear()
            held.update({sections_key(rows): (rows, why) for rows, why in pairs})
        self.refresh()


def trace(model: nn.Module, example_inputs: Any, *, rehearse: bool = True) -> Structure:
    """Run ``model`` once on ``example_inputs`` in evaluation mode, following its channels.

    Args:
        model: any module that runs eagerly; compiled ones are run without their graphs.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        rehearse: also cut a few units of every layer, run again and undo, to find what depends on fixed sizes.

    Returns:
        The model's units. Layers that no cut may touch are absent or carry a reason in ``refused``.

    Raises:
        ValueError: a sharded, scripted or uninitialized model.
        TypeError: ``model`` is no module.
        RuntimeError: the model does not run on ``example_inputs``.

    Afterwards model and random state are what they were, bit for bit.
    """
    check_model(model)
    symbols = Symbols()
    with frozen(model):
        try:
            log = follow(model, symbols, example_inputs).log
        except Exception as error:
            raise RuntimeError(
                f"example_inputs ({describe(example_inputs)}): {type(model).__name__} does not run on them in "
                f"evaluation mode: {type(error).__name__}: {error}"
            ) from error
        structure = Structure(symbols)
        if rehearse:
            from torsion.prune import _rehearse  # which cuts, and so needs this module

            _rehearse.rehearse(model, structure, log, example_inputs)
    return structure


def follow(
    model: nn.Module, symbols: Symbols, inputs: Any, watch: Watch | None = None, *, slopes: bool = False
) -> Follower:
    """Run ``model``, within :func:`frozen`, and collect its symbols; ``slopes`` keeps what activations apply to."""
    follower = Follower(model, symbols, watch)
    follower.slopes = slopes
    with follower:
        outputs = call(model, inputs)
    follower.finish(outputs)
    return follower


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on a tensor, positional arguments or keyword arguments: on copies, for it may write to them."""
    inputs = _copied(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _copied(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.clone()
    if type(inputs) in (tuple, list):
        return type(inputs)(_copied(x) for x in inputs)
    return {k: _copied(v) for k, v in inputs.items()} if type(inputs) is dict else inputs


def describe(inputs: Any) -> str:
    """Shapes and kinds of inputs, for messages."""
    if isinstance(inputs, Tensor):
        return f"{str(inputs.dtype).removeprefix('torch.')} {tuple(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return ", ".join(f"{k}={describe(v)}" for k, v in inputs.items())
    return ", ".join(map(describe, inputs)) if isinstance(inputs, (tuple, list)) else type(inputs).__name__


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes, buffers and random states are restored on the way out."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b._version, b.clone()) for b in model.buffers() if not b.is_inference()]
    held = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    tensors = [*model.parameters(), *model.buffers()]
    cuda = sorted({t.device.index for t in tensors if t.device.type == "cuda" and t.device.index is not None})
    state = random.getstate()
    numpy: Any = sys.modules.get("numpy")  # torch does without, and so do we
    state_of_numpy = numpy.random.get_state() if numpy is not None else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(fused_attention_off())
        if any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, b in held:
                now = module._buffers.get(name)
                # One of another size is a cache that grew, and what the module knows of its size stays too.
                if now is not None and now is not b and now.shape == b.shape:
                    module._buffers[name] = b
            for buffer, version, copy in buffers:
                if buffer._version != version:
                    buffer.copy_(copy)
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(state_of_numpy)


def check_model(model: Any) -> None:
    """Raise unless ``model`` is a module whose parameters can be replaced by smaller ones."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}: must be a torch.nn.Module")
    for name, module in model.named_modules():
        if "FullyShardedDataParallel" in type(module).__name__ or "FSDPModule" in {
            c.__name__ for c in type(module).__mro__
        }:
            raise ValueError(
                f"{name or type(module).__name__}: is sharded by FSDP, whose parameters cannot be cut one by one; cut "
                "the model before it is sharded, or train it with DistributedDataParallel"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{name or 'the model'}: is a TorchScript module; pass the eager one that it was made from"
            )
    for name, p in model.named_parameters():
        if hasattr(p, "placements") or type(p).__name__ in ("FlatParameter", "DTensor"):
            raise ValueError(
                f"{name}: is a sharded parameter ({type(p).__name__}, FSDP or tensor parallel), which cannot be cut; "
                "cut the model before it is sharded, or train it with DistributedDataParallel"
            )
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name}: is not initialized; run the model once before it is traced")
