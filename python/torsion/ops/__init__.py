"""torsion's torch ops, as functions: documented arguments, choice of back end, version counters kept."""

from torsion.ops._backends import backends, build_info
from torsion.ops._frame import Step
from torsion.ops.adatam import adatam_
from torsion.ops.tam import tam_

__all__ = ["Step", "adatam_", "backends", "build_info", "tam_"]
