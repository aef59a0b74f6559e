// Which channels of an activation fire (rules of DemP, arXiv 2403.07688), on a CPU. No torch.
#pragma once
#include <cstdint>

namespace torsion::cpu {

enum class Criterion { ever_active, abs_max, sum_le, dormant };

// An activation seen as [outer, channels, inner], strides in elements. Either inner or channels lie side by side.
struct Activation {
  const void* data;
  int32_t kind;  // of engine/plan.h: F32, F64, BF16, F16
  int64_t outer, channels, inner;
  int64_t outer_stride, channel_stride, inner_stride;
};

// Sets the flags of channels that are live by the criterion or hold a NaN, and clears none. A channel that is flagged is
// not read any more, from the next look on: reading all but dead channels ends after a few rows.
void flag_active(const Activation& y, Criterion criterion, double tau, int threads, uint8_t* flags);

}  // namespace torsion::cpu
