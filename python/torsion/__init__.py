"""Fused torque-aware optimizers for PyTorch: TAM, AdaTAM, AdaTAMW (arXiv 2412.18790).

    import torsion
    optimizer = torsion.TAM(model.parameters(), lr=0.1, momentum=0.9)

Each is a ``torch.optim.Optimizer``; ``torsion.backends()`` says what runs underneath, and ``torsion doctor`` why.
"""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

try:
    __version__ = _version("torsion")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.1.0"

from torsion import ops, optim, reference
from torsion.ops import backends, build_info
from torsion.optim import TAM, AdaTAM, AdaTAMW

__all__ = ["TAM", "AdaTAM", "AdaTAMW", "__version__", "backends", "build_info", "ops", "optim", "reference"]
