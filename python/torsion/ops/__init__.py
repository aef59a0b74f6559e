"""torsion's torch ops, as functions: documented arguments, choice of back end, version counters kept."""

from torsion.ops._backends import backends, build_info
from torsion.ops._frame import Phase, Step
from torsion.ops._rules import columns
from torsion.ops.adatam import adatam_
from torsion.ops.flags import active_flags_
from torsion.ops.lookbehind import ascent_, blend_, descent_, descent_ascent_, descent_blend_
from torsion.ops.masked import masked_linear
from torsion.ops.masked_conv import masked_conv2d
from torsion.ops.masked_norm import masked_conv2d_bn_act, masked_linear_bn_act
from torsion.ops.noise import demp_update_
from torsion.ops.packing import pack_weight, residual_select_add_, unpack_grad_
from torsion.ops.philox import philox_normal
from torsion.ops.prefix import LivePrefix
from torsion.ops.tam import tam_

__all__ = [
    "LivePrefix",
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
    "masked_conv2d",
    "masked_conv2d_bn_act",
    "masked_linear",
    "masked_linear_bn_act",
    "pack_weight",
    "philox_normal",
    "residual_select_add_",
    "tam_",
    "unpack_grad_",
]
