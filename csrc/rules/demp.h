// DemP's noise (arXiv 2403.07688): p += sigma xi(e) where the unit is live, e the element's number in the uncut tensor.
// 8 bytes per float32 element by itself, none inside an update that has p at hand.
#pragma once
#include "philox_normal.h"

namespace torsion {

// Two roundings, not a fused one: p + (sigma xi) is what plain PyTorch computes.
template <class R>
TORSION_HD R demp_noise(R p, R sigma, R normal) {
  return p + sigma * normal;
}

}  // namespace torsion
