// The noise of DemP on a CPU, over one parameter. No torch.
#pragma once
#include "engine/demp.h"

namespace torsion::cpu {

// Adds the noise to the rows [begin, end).
void add_noise(const NoiseRows& to, double sigma, int64_t begin, int64_t end);

}  // namespace torsion::cpu
