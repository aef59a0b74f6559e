"""torsion's torch ops, as functions: documented arguments, choice of back end, version counters kept."""

from torsion.ops._backends import backends, build_info
from torsion.ops._frame import Phase, Step
from torsion.ops._rules import columns
from torsion.ops.adatam import adatam_
from torsion.ops.flags import active_flags_
from torsion.ops.lookbehind import ascent_, blend_, descent_, descent_ascent_, descent_blend_
from torsion.ops.noise import demp_update_
from torsion.ops.philox import philox_normal
from torsion.ops.tam import tam_

__all__ = [
    "Phase",
    "Step",
    "active_flags_",
    "adatam_",
    "ascent_",
    "backends",
    "blend_",
    "build_info",
    "columns",
    "demp_update_",
    "descent_",
    "descent_ascent_",
    "descent_blend_",
    "philox_normal",
    "tam_",
]
