"""Optimizers, each a ``torch.optim.Optimizer``."""

from torsion.optim.adatam import AdaTAM, AdaTAMW
from torsion.optim.batchnorm import bn_first_pass_only
from torsion.optim.lookbehind import SAM, Lookbehind
from torsion.optim.tam import TAM

__all__ = ["SAM", "TAM", "AdaTAM", "AdaTAMW", "Lookbehind", "bn_first_pass_only"]
