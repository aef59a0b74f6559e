// DemP's noise of a span of elements, made before the loop that adds it: the memory that this loop waits for is on its way
// while the numbers are computed.
#pragma once
#include <algorithm>
#include <cstring>

#include "cpu/normals.h"
#include "engine/frame.h"

namespace torsion::cpu {

// ask(first, n, meanwhile) asks memory for what is worked on after these elements; meanwhile: there is something to compute
// until it comes.
struct NoNoise {
  NoNoise() = default;
  template <class F>
  NoNoise(const Row&, const F&) {}
  template <class Ask>
  TORSION_INLINE void fill(int64_t first, int64_t end, Ask ask) {
    ask(first, end - first, false);
  }
  template <class E>
  void give(E&, int64_t) const {}
};

constexpr int64_t kNoiseSpan = 512;  // elements whose noise is made before it is added

template <class R, int64_t Span>
class SpanNoise {
 public:
  template <class F>
  SpanNoise(const Row& row, const F& f)
      : map_(row.noise ? f.noise + (row.noise - 1) : nullptr),
        keys_(NoiseKey{f.noise_seed, uint32_t(f.perturbation[2]), map_ ? uint32_t(map_->tensor_id) : 0}) {
    if (!map_) std::fill(normal_, normal_ + Span, R(0));
  }

  // Noise for the elements [first, end), where first is a multiple of 4. Memory is asked in parts: all at once would fill
  // what a core can have outstanding, and leave it idle afterwards.
  template <class Ask>
  TORSION_INLINE void fill(int64_t first, int64_t end, Ask ask) {
    for (int64_t i = first; i < end; i += kPart) {
      const int64_t stop = std::min(end, i + kPart);
      ask(i, stop - i, map_ != nullptr);
      if (map_) make(i, stop, normal_ + (i - first));
    }
  }

  template <class E>
  __attribute__((always_inline)) void give(E& e, int64_t j) const {
    e.noise = normal_[j];
  }

 private:
  static constexpr int64_t kPart = 128;

  int64_t original(int64_t row) const { return map_->row_of ? map_->row_of[row] : row; }
  bool live(int64_t row) const { return !map_->live || map_->live[row]; }

  void make(int64_t first, int64_t end, R* out) {
    if (!map_->live && !map_->row_of)
      normals(keys_, uint64_t(first) >> 2, (end - first + 3) >> 2, out);
    else
      by_rows(first, end, out);
  }

  // Rows that are live and follow one another in the uncut tensor are one run of its elements.
  void by_rows(int64_t first, int64_t end, R* out) {
    const int64_t columns = map_->columns;
    for (int64_t i = first; i < end;) {
      int64_t row = i / columns, stop = std::min(end, (row + 1) * columns);
      if (!live(row)) {
        std::fill(out, out + (stop - i), R(0));
      } else {
        const int64_t e = original(row) * columns + (i - row * columns);
        for (; stop < end && live(row + 1) && original(row + 1) == original(row) + 1; ++row)
          stop = std::min(end, (row + 2) * columns);
        normals(keys_, uint64_t(e) >> 2, ((e + stop - i - 1) >> 2) - (e >> 2) + 1, run_);
        memcpy(out, run_ + (e & 3), size_t(stop - i) * sizeof(R));
      }
      out += stop - i;
      i = stop;
    }
  }

  const NoiseMap* map_;
  RoundKeys keys_;
  alignas(64) R normal_[Span + 8];
  alignas(64) R run_[kPart + 8];
};

}  // namespace torsion::cpu
