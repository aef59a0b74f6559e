// The noise of DemP on a CPU, over one parameter. No torch.
#pragma once
#include <cstdint>

#include "normals.h"

namespace torsion::cpu {

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

// Adds the noise to the rows [begin, end).
void add_noise(const NoiseRows& to, double sigma, int64_t begin, int64_t end);

}  // namespace torsion::cpu
