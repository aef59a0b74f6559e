"""Fused optimizers for PyTorch: TAM, AdaTAM, AdaTAMW (arXiv 2412.18790), Lookbehind-SAM (arXiv 2307.16704), SAM.

    import torsion
    optimizer = torsion.TAM(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = torsion.Lookbehind(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), k=5)

Each is a ``torch.optim.Optimizer``; ``torsion.backends()`` says what runs underneath, and ``torsion doctor`` why.
"""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

try:
    __version__ = _version("torsion")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.1.0"

from torsion import ops, optim, prune, reference
from torsion.ops import backends, build_info
from torsion.optim import SAM, TAM, AdaTAM, AdaTAMW, Lookbehind
from torsion.prune import DemP

__all__ = [
    "SAM",
    "TAM",
    "AdaTAM",
    "AdaTAMW",
    "DemP",
    "Lookbehind",
    "__version__",
    "backends",
    "build_info",
    "ops",
    "optim",
    "prune",
    "reference",
]
