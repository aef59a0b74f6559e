// Three ways to the noise of a row, the same numbers by each:
//   runs     columns as they were: neighbouring live rows are one stretch of elements, whose blocks follow one another
//   columns  columns were cut: which blocks a row needs depends on its first element modulo 4 (8) alone, so they are
//            listed once for each remainder
//   strips   rows too short for either: lists over several rows
// Blocks are listed where the next element is in another one: columns in any order are right, ascending ones are fast.
#include "demp.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "engine/isa.h"
#include "engine/plan.h"
#include "engine/types.h"
#include "normals.h"
#include "rules/demp.h"

namespace torsion::cpu {
namespace {

constexpr int64_t kStrip = 512;      // elements whose noise is made at once
constexpr int64_t kLongEnough = 64;  // elements of a run, or columns of a row, that are worth a call of their own

template <class T>
constexpr bool kRounded = sizeof(T) == 2;

// Blocks of 1 << Shift numbers, and where among all their numbers each element finds its own.
template <int Shift>
struct Draws {
  std::vector<int64_t> block;
  std::vector<int32_t> at;
  int64_t n = 0;
  int64_t last = -1;

  void clear() {
    block.clear();
    at.clear();
    n = 0;
    last = -1;
  }
  void add(int64_t e) {
    if (e >> Shift != last) {
      last = e >> Shift;
      block.push_back(last);
      ++n;
    }
    at.push_back(int32_t(((n - 1) << Shift) + (e & ((1 << Shift) - 1))));
  }
  void skip() { at.push_back(0); }
  void finish() { block.resize(size_t((n + kListed - 1) / kListed * kListed), 0); }
};

// The elements of a strip; Rounded: they need rounding bits too.
template <bool Rounded>
struct Strip {
  Draws<2> normals;
  Draws<3> rounding;
  std::vector<uint8_t> live;

  void clear() {
    normals.clear();
    rounding.clear();
    live.clear();
  }
  void add(int64_t e, bool is_live) {
    live.push_back(is_live);
    if (is_live)
      normals.add(e);
    else
      normals.skip();
    if (!Rounded) return;
    if (is_live)
      rounding.add(e);
    else
      rounding.skip();
  }
  void finish() {
    normals.finish();
    rounding.finish();
  }
};

template <class T, class R>
TORSION_INLINE T noisy(T p, R sigma, R normal, uint32_t bits) {
  const R x = demp_noise(widen(p), sigma, normal);
  if constexpr (kRounded<T>)
    return Narrow<T>::stochastic(x, bits);
  else
    return x;
}

template <class T, class R>
TORSION_INLINE void add_run(T* p, const R* normal, const uint16_t* bits, R sigma, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) p[i] = noisy(p[i], sigma, normal[i], kRounded<T> ? bits[i] : 0);
}

template <class T, class R>
TORSION_INLINE void add_strip(T* p, const R* normal, const uint16_t* bits, R sigma, const Strip<kRounded<T>>& strip) {
  const int32_t *at = strip.normals.at.data(), *bits_at = strip.rounding.at.data();
  const uint8_t* live = strip.live.data();
  const int64_t n = int64_t(strip.live.size());
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const T noised = noisy(p[i], sigma, normal[at[i]], kRounded<T> ? bits[bits_at[i]] : 0);
    p[i] = live[i] ? noised : p[i];
  }
}

template <class T, class R>
struct Add {
  void (*run)(T*, const R*, const uint16_t*, R, int64_t);
  void (*strip)(T*, const R*, const uint16_t*, R, const Strip<kRounded<T>>&);
};

#define TORSION_ADD(level, attribute)                                                                         \
  template <class T, class R>                                                                                 \
  attribute __attribute__((noinline)) void run_##level(T* p, const R* x, const uint16_t* b, R s, int64_t n) { \
    add_run(p, x, b, s, n);                                                                                   \
  }                                                                                                           \
  template <class T, class R>                                                                                 \
  attribute __attribute__((noinline)) void strip_##level(T* p, const R* x, const uint16_t* b, R s,            \
                                                         const Strip<kRounded<T>>& strip) {                   \
    add_strip(p, x, b, s, strip);                                                                             \
  }
TORSION_ADD(base, )
#ifdef TORSION_X86_LEVELS
TORSION_ADD(v3, TORSION_V3)
TORSION_ADD(v4, TORSION_V4)
#endif
#undef TORSION_ADD

template <class T, class R>
Add<T, R> add_of_level() {
#ifdef TORSION_X86_LEVELS
  if (isa_level() == 2) return {run_v4<T, R>, strip_v4<T, R>};
  if (isa_level() == 1) return {run_v3<T, R>, strip_v3<T, R>};
#endif
  return {run_base<T, R>, strip_base<T, R>};
}

template <class T>
class Noise {
  using R = Maths<T>;
  using Strip = cpu::Strip<kRounded<T>>;

 public:
  Noise(const NoiseRows& to, double sigma) : to_(to), keys_(to.key), sigma_(R(sigma)) {}

  void add(int64_t begin, int64_t end) {
    const bool whole_columns = !to_.column_of && !to_.column_live && to_.columns == to_.original_columns;
    if (whole_columns && long_runs(begin, end))
      by_runs(begin, end);
    else if (to_.columns >= kLongEnough)
      by_columns(begin, end);
    else
      by_strips(begin, end);
  }

 private:
  T* row(int64_t r) const { return static_cast<T*>(to_.data) + r * to_.columns; }
  bool live(int64_t r) const { return !to_.row_live || to_.row_live[r]; }
  int64_t original_row(int64_t r) const { return to_.row_of ? to_.row_of[r] : r; }
  int64_t group(int64_t r) const { return r * to_.groups / to_.rows; }
  int64_t original_column(int64_t g, int64_t c) const { return to_.column_of ? to_.column_of[g * to_.columns + c] : c; }

  // The end of the run of live rows that follow one another in the uncut tensor too.
  int64_t end_of_run(int64_t r, int64_t end) const {
    int64_t z = r + 1;
    while (z < end && live(z) && original_row(z) == original_row(z - 1) + 1) ++z;
    return z;
  }

  bool long_runs(int64_t begin, int64_t end) const {
    if (to_.columns >= kLongEnough) return true;
    int64_t rows = 0, runs = 0;
    for (int64_t r = begin; r < end;) {
      if (!live(r)) {
        ++r;
        continue;
      }
      const int64_t z = end_of_run(r, end);
      rows += z - r;
      ++runs;
      r = z;
    }
    return rows * to_.columns >= runs * kLongEnough;
  }

  void by_runs(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end;) {
      if (!live(r)) {
        ++r;
        continue;
      }
      const int64_t z = end_of_run(r, end);
      add_stretch(row(r), original_row(r) * to_.original_columns, (z - r) * to_.columns);
      r = z;
    }
  }

  void add_stretch(T* p, int64_t e, int64_t n) {
    for (int64_t i = 0; i < n; i += kStrip) {
      const int64_t m = std::min(kStrip, n - i), first = e + i, last = first + m - 1;
      // What is noised next is fetched while the noise of this is made.
      for (int64_t line = 0; line < kStrip * int64_t(sizeof(T)); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(p + i + kStrip) + line, 1);
      normals(keys_, uint64_t(first) >> 2, (last >> 2) - (first >> 2) + 1, normal_);
      if constexpr (kRounded<T>) noise_rounding(keys_, uint64_t(first) >> 3, (last >> 3) - (first >> 3) + 1, bits_);
      add_.run(p + i, normal_ + (first & 3), bits_ + (first & 7), sigma_, m);
    }
  }

  void by_columns(int64_t begin, int64_t end) {
    // Strips by group, remainder and place in the row; made when a row needs them.
    const int64_t strips = (to_.columns + kStrip - 1) / kStrip;
    std::vector<std::unique_ptr<Strip>> made(size_t(8 * strips));
    int64_t made_for = -1;
    for (int64_t r = begin; r < end; ++r) {
      if (!live(r)) continue;
      const int64_t base = original_row(r) * to_.original_columns, remainder = base & 7;
      if (group(r) != made_for)
        for (auto& strip : made) strip.reset();
      made_for = group(r);
      for (int64_t s = 0; s < strips; ++s) {
        auto& strip = made[size_t(remainder * strips + s)];
        if (!strip) {
          strip = std::make_unique<Strip>();
          for (int64_t c = s * kStrip; c < std::min(to_.columns, (s + 1) * kStrip); ++c)
            strip->add(remainder + original_column(made_for, c), !to_.column_live || to_.column_live[c]);
          strip->finish();
        }
        add_strip(row(r) + s * kStrip, *strip, base - remainder);
      }
    }
  }

  void by_strips(int64_t begin, int64_t end) {
    const int64_t rows = std::max<int64_t>(1, kStrip / std::max<int64_t>(1, to_.columns));
    Strip strip;
    for (int64_t r = begin; r < end; r += rows) {
      strip.clear();
      for (int64_t i = r; i < std::min(end, r + rows); ++i) {
        const int64_t base = original_row(i) * to_.original_columns, g = group(i);
        for (int64_t c = 0; c < to_.columns; ++c)
          strip.add(base + original_column(g, c), live(i) && (!to_.column_live || to_.column_live[c]));
      }
      strip.finish();
      add_strip(row(r), strip, 0);
    }
  }

  // `base`, a multiple of 8, is the element that the strip's numbers count from.
  void add_strip(T* p, const Strip& strip, int64_t base) {
    if (!strip.normals.n) return;
    normals_at(keys_, strip.normals.block.data(), uint64_t(base) >> 2, strip.normals.n, normal_);
    if constexpr (kRounded<T>)
      noise_rounding_at(keys_, strip.rounding.block.data(), uint64_t(base) >> 3, strip.rounding.n, bits_);
    add_.strip(p, normal_, bits_, sigma_, strip);
  }

  const NoiseRows& to_;
  const RoundKeys keys_;
  const R sigma_;
  const Add<T, R> add_ = add_of_level<T, R>();
  // A strip may need one block for each element, a stretch one more than its share.
  alignas(64) R normal_[4 * kStrip + 4];
  alignas(64) uint16_t bits_[kRounded<T> ? 8 * kStrip + 8 : 8];
};

}  // namespace

void add_noise(const NoiseRows& to, double sigma, int64_t begin, int64_t end) {
  switch (to.kind) {
    case kF32:
      return Noise<float>(to, sigma).add(begin, end);
    case kF64:
      return Noise<double>(to, sigma).add(begin, end);
    case kBF16:
      return Noise<bf16>(to, sigma).add(begin, end);
    default:
      return Noise<f16>(to, sigma).add(begin, end);
  }
}

}  // namespace torsion::cpu
