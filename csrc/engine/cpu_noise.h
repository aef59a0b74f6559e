// DemP's noise of a span of elements, made before the loop that adds it: the memory that this loop waits for is on its way
// while the numbers are computed.
#pragma once
#include <algorithm>
#include <cstring>

#include "cpu/normals.h"
#include "engine/frame.h"

namespace torsion::cpu {

struct NoNoise {
  NoNoise() = default;
  template <class F>
  NoNoise(const Row&, const F&) {}
  void fill(int64_t, int64_t) {}
  template <class E>
  void give(E&, int64_t) const {}
};

template <class R, int64_t Span>
class SpanNoise {
 public:
  template <class F>
  SpanNoise(const Row& row, const F& f)
      : map_(row.noise ? f.noise + (row.noise - 1) : nullptr),
        key_{f.noise_seed, uint32_t(f.perturbation[2]), map_ ? uint32_t(map_->tensor_id) : 0} {
    if (!map_) std::fill(normal_, normal_ + Span, R(0));
  }

  // Noise for the elements [first, end), where first is a multiple of 4.
  void fill(int64_t first, int64_t end) {
    if (!map_) return;
    if (!map_->live && !map_->row_of)
      normals(key_, uint64_t(first) >> 2, (end - first + 3) >> 2, normal_);
    else
      by_rows(first, end);
  }

  template <class E>
  __attribute__((always_inline)) void give(E& e, int64_t j) const {
    e.noise = normal_[j];
  }

 private:
  int64_t original(int64_t row) const { return map_->row_of ? map_->row_of[row] : row; }
  bool live(int64_t row) const { return !map_->live || map_->live[row]; }

  // Rows that are live and follow one another in the uncut tensor are one run of its elements.
  void by_rows(int64_t first, int64_t end) {
    const int64_t columns = map_->columns;
    for (int64_t i = first; i < end;) {
      int64_t row = i / columns, stop = std::min(end, (row + 1) * columns);
      R* const out = normal_ + (i - first);
      if (!live(row)) {
        std::fill(out, out + (stop - i), R(0));
      } else {
        const int64_t e = original(row) * columns + (i - row * columns);
        for (; stop < end && live(row + 1) && original(row + 1) == original(row) + 1; ++row)
          stop = std::min(end, (row + 2) * columns);
        normals(key_, uint64_t(e) >> 2, ((e + stop - i - 1) >> 2) - (e >> 2) + 1, run_);
        memcpy(out, run_ + (e & 3), size_t(stop - i) * sizeof(R));
      }
      i = stop;
    }
  }

  const NoiseMap* map_;
  NoiseKey key_;
  alignas(64) R normal_[Span + 8];
  alignas(64) R run_[Span + 8];
};

}  // namespace torsion::cpu
