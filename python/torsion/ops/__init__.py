"""torsion's torch ops, as functions: documented arguments, choice of back end, version counters kept."""

from torsion.ops._backends import backends, build_info
from torsion.ops._frame import Phase, Step
from torsion.ops._rules import columns
from torsion.ops.adatam import adatam_
from torsion.ops.lookbehind import ascent_, blend_, descent_, descent_ascent_, descent_blend_
from torsion.ops.tam import tam_

__all__ = [
    "Phase",
    "Step",
    "adatam_",
    "ascent_",
    "backends",
    "blend_",
    "build_info",
    "columns",
    "descent_",
    "descent_ascent_",
    "descent_blend_",
    "tam_",
]
