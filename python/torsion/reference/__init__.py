"""The executable specification: each method in plain PyTorch, any float dtype, one function named as its op.

Tests and benchmarks compare the kernels with these; they also are the back end of last resort. Slow, and meant to be
read beside the paper. A Lookbehind cycle is made of several passes, see :mod:`torsion.reference.lookbehind`.
"""

from torsion.reference.adatam import adatam_, adatam_sums
from torsion.reference.demp import active_flags_, demp_update_, philox_normal
from torsion.reference.lookbehind import (
    ascent_,
    blend_,
    descent_,
    descent_ascent_,
    descent_blend_,
    phase_,
    phase_sums,
)
from torsion.reference.masked import group_norm_live, layer_norm_live, masked_conv2d, masked_linear, rms_norm_live
from torsion.reference.philox import philox, rounding_bits, stochastic_round
from torsion.reference.tam import tam_, tam_sums

__all__ = [
    "active_flags_",
    "adatam_",
    "adatam_sums",
    "ascent_",
    "blend_",
    "demp_update_",
    "descent_",
    "descent_ascent_",
    "descent_blend_",
    "group_norm_live",
    "layer_norm_live",
    "masked_conv2d",
    "masked_linear",
    "phase_",
    "phase_sums",
    "philox",
    "philox_normal",
    "rms_norm_live",
    "rounding_bits",
    "stochastic_round",
    "tam_",
    "tam_sums",
]
