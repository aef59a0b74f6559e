// Which channels of an activation fire (rules of DemP, arXiv 2403.07688), on a CPU. No torch.
#pragma once
#include "engine/demp.h"

namespace torsion::cpu {

// Sets the flags of channels that are live by the criterion or hold a NaN, and clears none. A channel that is flagged is
// not read any more, from the next look on: reading all but dead channels ends after a few rows.
void flag_active(const Activation& y, Criterion criterion, double tau, int threads, uint8_t* flags);

}  // namespace torsion::cpu
