"""What is held against what, and what is asked of the result."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["COMPARISONS", "COPY_SHARE", "METHODS", "Comparison", "Limit"]

_BIG = ("resnet18", "gpt2", "one")


@dataclass(frozen=True)
class Limit:
    """A bound on a contestant's ratio to its baseline.

    Attributes:
        value: the bound.
        lists: where it holds.
        threads: CPU thread counts it holds at; empty for all.
        at_least: a lower bound, for contestants that are expected to be slower.
    """

    value: float
    lists: tuple[str, ...]
    threads: tuple[int, ...] = ()
    at_least: bool = False


@dataclass(frozen=True, eq=False)
class Comparison:
    """Contestants that take turns in the same rounds.

    Attributes:
        method: the word on the command line that asks for it.
        baselines: of these the fastest is taken.
        contestants: those whose ratio is reported.
        limits: contestant -> what is asked of it.
        device: "cpu" or "cuda" where it is run on that alone.
    """

    method: str
    baselines: tuple[str, ...]
    contestants: tuple[str, ...]
    limits: dict[str, tuple[Limit, ...]] = field(default_factory=dict)
    device: str = ""

    def limit(self, contestant: str, tensors: str, threads: int, device: str) -> Limit | None:
        """What is asked of a contestant here; the CPU's limits say nothing about a GPU."""
        if device != (self.device or "cpu"):
            return None
        for limit in self.limits.get(contestant, ()):
            if tensors in limit.lists and (not limit.threads or threads in limit.threads):
                return limit
        return None


_ALL = (*_BIG, "tiny")

COMPARISONS = (
    Comparison(
        "tam",
        ("SGD fused", "SGD foreach"),
        ("TAM", "TAM, scope tensor", "TAM, new gradients"),
        {
            "TAM": (
                Limit(1.5, ("resnet18", "gpt2")),
                Limit(1.6, ("one",)),
                Limit(0.65, ("tiny",), (1,)),
                Limit(0.45, ("tiny",), (2,)),
            ),
            # A single tensor has nothing to overlap its own reduction with, so "one" is not held to this.
            "TAM, scope tensor": (Limit(1.3, ("resnet18", "gpt2")),),
        },
    ),
    Comparison(
        "tam",
        ("clip + SGD fused", "clip + SGD foreach"),
        ("TAM, max_grad_norm",),
        {"TAM, max_grad_norm": (Limit(1.0, _ALL),)},
    ),
    Comparison(
        "tam",
        ("unscale + clip + SGD fused",),
        ("TAM, max_grad_norm, scaled",),
        {"TAM, max_grad_norm, scaled": (Limit(0.85, _ALL),)},
        device="cuda",
    ),
    Comparison(
        "tam",
        ("TAM",),
        ("eager foreach TAM", "compiled TAM"),
        {
            "eager foreach TAM": (Limit(1.7, _ALL, at_least=True),),
            "compiled TAM": (Limit(1.1, _ALL, at_least=True),),
        },
    ),
    # On its own: it is slow, and would leave the others a cold cache and few rounds.
    Comparison(
        "tam",
        ("TAM",),
        ("pytorch_optimizer TAM",),
        {"pytorch_optimizer TAM": (Limit(10, _ALL, at_least=True),)},
    ),
    Comparison(
        "adatam",
        ("AdamW fused", "AdamW foreach"),
        ("AdaTAMW",),
        {"AdaTAMW": (Limit(1.45, _BIG), Limit(0.5, ("tiny",)))},
    ),
    Comparison(
        "lookbehind",
        ("one SGD step",),
        ("Lookbehind(SGD), k=5", "Lookbehind(SGD), k=5, new gradients", "Lookbehind(SGD), k=2", "SAM(SGD)"),
        {
            "Lookbehind(SGD), k=5": (Limit(10, ("resnet18",)), Limit(11, ("gpt2",))),
            "SAM(SGD)": (Limit(2.5, ("resnet18",)), Limit(2.7, ("gpt2",))),
        },
    ),
    # Two comparisons, because eight sets of a large model's buffers at a time would be too many.
    Comparison("lookbehind", ("one SGD step",), ("Lookbehind(SGD), k=5, adaptive", "Lookbehind(SGD), k=5, ASAM")),
    Comparison("lookbehind", ("one AdamW step",), ("Lookbehind(AdamW), k=5",)),
    Comparison("lookbehind", ("one TAM step",), ("Lookbehind(TAM), k=5",)),
    Comparison(
        "lookbehind",
        ("Lookbehind(SGD), k=5",),
        ("published Lookbehind, k=5", "lean eager Lookbehind, k=5"),
        {"published Lookbehind, k=5": (Limit(2.5, _ALL, at_least=True),)},
    ),
    Comparison("lookbehind", ("Lookbehind(SGD), k=5, adaptive",), ("published Lookbehind, k=5, adaptive",)),
    Comparison("lookbehind", ("SAM(SGD)",), ("eager SAM",)),
)

COPY_SHARE = {"TAM": Limit(85.0, _BIG, at_least=True)}
"""On a GPU: percent of the copy's bandwidth in the same rounds."""

METHODS = (*dict.fromkeys(comparison.method for comparison in COMPARISONS), "masked", "demp")
"""Words that the command line takes."""
