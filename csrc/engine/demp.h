// What DemP's ops work on, as plain data for every runner. No torch.
#pragma once
#include <cstdint>

namespace torsion {

struct NoiseKey {
  uint64_t seed;
  uint32_t step, tensor_id;
};

// A parameter seen as [rows, columns], contiguous. Null: all are live, or the original coordinate is the own one.
struct NoiseRows {
  void* data;
  int32_t kind;  // of engine/plan.h: F32, F64, BF16, F16; the last two are rounded stochastically
  int64_t rows, columns, groups;
  const uint8_t* row_live;     // [rows]
  const uint8_t* column_live;  // [columns]
  const int64_t* row_of;       // [rows] in the uncut tensor
  const int64_t* column_of;    // [groups, columns]; rows / groups rows share a line
  int64_t original_columns;
  NoiseKey key;
};

enum class Criterion { ever_active, abs_max, sum_le, dormant };

// An activation seen as [outer, channels, inner], strides in elements. Either inner or channels lie side by side.
struct Activation {
  const void* data;
  int32_t kind;  // of engine/plan.h: F32, F64, BF16, F16
  int64_t outer, channels, inner;
  int64_t outer_stride, channel_stride, inner_stride;
};

}  // namespace torsion
