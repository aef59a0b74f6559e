"""Optimizers, each a ``torch.optim.Optimizer``."""

from torsion.optim.adatam import AdaTAM, AdaTAMW
from torsion.optim.tam import TAM

__all__ = ["TAM", "AdaTAM", "AdaTAMW"]
