// Two layouts, each read in the order of memory: planes (NCHW: the values of a channel lie side by side) and rows ([M, C],
// channels_last: the channels do). Comparisons say !(y <= tau), which NaN answers with yes.
//
// Traffic: the dead channels in full, of the others what comes before their first hit and some kilobytes behind it; in rows
// by lines of 64 bytes.
#include "flags.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "engine/isa.h"
#include "engine/plan.h"
#include "engine/types.h"

namespace torsion::cpu {
namespace {

constexpr int kLine = 64;         // bytes
constexpr int64_t kStretch = 64;  // elements of a plane between two requests to memory
constexpr int64_t kLook = 2048;   // elements of a plane between two looks at what was found
constexpr int64_t kRows = 64;     // rows between two looks, at most
constexpr int kSums = 32;         // running sums of a plane; part of the numerics

template <class T>
constexpr int kPerLine = kLine / int(sizeof(T));

template <bool Abs, class T>
TORSION_INLINE Maths<T> value(T y) {
  const Maths<T> x = widen(y);
  return Abs ? std::abs(x) : x;
}

template <class T>
TORSION_INLINE const T* plane(const Activation& y, int64_t o, int64_t c) {
  return static_cast<const T*>(y.data) + o * y.outer_stride + c * y.channel_stride;
}

// Asks memory for the planes to come: the hardware does not find the next of those that are left, and not fast enough
// what follows (51 MB on a core that reads 52 GB/s: all dead 0.95 against 1.7 times one read, half of them 0.6 against 1.5).
template <class T>
class Ahead {
 public:
  Ahead(const Activation& y, const std::vector<int64_t>& channels) : y_(y), channels_(channels) {}

  // From image o on, now that the channels are others.
  void restart(int64_t o) {
    o_ = o;
    k_ = 0;
    i_ = 0;
    ask(kAhead / int64_t(sizeof(T)));
  }

  // What is left of the plane of the k-th channel of image o need not be read.
  void leave(int64_t o, size_t k) {
    if (o_ != o || k_ != k) return;
    const int64_t asked = i_;
    next_plane();
    ask(std::min(asked, kAhead / int64_t(sizeof(T))));
  }

  TORSION_INLINE void ask(int64_t n) {
    while (n > 0 && o_ < y_.outer) {
      const int64_t m = std::min(n, y_.inner - i_);
      const T* p = plane<T>(y_, o_, channels_[k_]) + i_;
      for (int64_t j = 0; j < m; j += kPerLine<T>) __builtin_prefetch(p + j);
      n -= m;
      i_ += m;
      if (i_ < y_.inner) return;
      next_plane();
    }
  }

 private:
  static constexpr int64_t kAhead = 16384;  // bytes

  void next_plane() {
    i_ = 0;
    if (++k_ < channels_.size()) return;
    k_ = 0;
    ++o_;
  }

  const Activation& y_;
  const std::vector<int64_t>& channels_;
  int64_t o_ = 0, i_ = 0;
  size_t k_ = 0;
};

template <bool Abs, class T>
TORSION_INLINE bool any_above(const T* y, int64_t n, Maths<T> tau, Ahead<T>& ahead) {
  int found = 0;
  int64_t i = 0;
  for (; i + kStretch <= n; i += kStretch) {
    ahead.ask(kStretch);
#pragma GCC ivdep
    for (int64_t k = i; k < i + kStretch; ++k) found |= !(value<Abs>(y[k]) <= tau);
  }
  ahead.ask(n - i);
#pragma GCC ivdep
  for (int64_t k = i; k < n; ++k) found |= !(value<Abs>(y[k]) <= tau);
  return found;
}

// A live channel mostly shows within the first values it has, so the first look at it is a short one.
template <class T, bool Abs>
TORSION_INLINE void scan_planes(const Activation& y, Maths<T> tau, int64_t begin, int64_t end, uint8_t* flags) {
  std::vector<int64_t> open;
  for (int64_t c = begin; c < end; ++c)
    if (!flags[c]) open.push_back(c);
  Ahead<T> ahead(y, open);
  if (!open.empty()) ahead.restart(0);
  for (int64_t o = 0; o < y.outer && !open.empty(); ++o) {
    bool fewer = false;
    for (size_t k = 0; k < open.size(); ++k) {
      const int64_t c = open[k];
      const T* p = plane<T>(y, o, c);
      int64_t i = std::min<int64_t>(y.inner, o == 0 ? kStretch : kLook);
      bool found = any_above<Abs>(p, i, tau, ahead);
      for (; !found && i < y.inner; i += kLook) found = any_above<Abs>(p + i, std::min(kLook, y.inner - i), tau, ahead);
      if (!found) continue;
      flags[c] = 1;
      fewer = true;
      ahead.leave(o, k);
    }
    if (!fewer) continue;
    std::erase_if(open, [&](int64_t c) { return flags[c] != 0; });
    if (!open.empty()) ahead.restart(o + 1);
  }
}

// Where row r of [outer, inner] begins.
template <class T>
struct RowStep {
  const Activation& y;
  int64_t o, i;
  RowStep(const Activation& y, int64_t r) : y(y), o(r / y.inner), i(r % y.inner) {}
  const T* next() {
    const T* row = static_cast<const T*>(y.data) + o * y.outer_stride + i * y.inner_stride;
    if (++i == y.inner) {
      i = 0;
      ++o;
    }
    return row;
  }
};

struct Run {
  int64_t begin, end;
};

// Flags what was found, and lists anew the lines of channels of which one at least is not flagged.
template <class Found>
TORSION_INLINE void look(const std::vector<Found>& found, int lanes, int64_t channels, uint8_t* flags,
                         std::vector<Run>& open) {
  std::vector<Run> next;
  for (const Run& run : open)
    for (int64_t c = run.begin; c < run.end; c += lanes) {
      const int64_t end = std::min(channels, c + lanes);
      bool all = true;
      for (int64_t i = c; i < end; ++i) {
        flags[i] = uint8_t(flags[i] != 0 || found[size_t(i)]);
        all = all && flags[i];
      }
      if (all) continue;
      if (!next.empty() && next.back().end == c)
        next.back().end = end;
      else
        next.push_back({c, end});
    }
  open.swap(next);
}

// Rows are those of [outer, inner], read in the order of memory, lines without an unflagged channel left out. A live
// channel mostly shows at once, so the first looks come early.
template <class T, bool Abs>
TORSION_INLINE void scan_rows(const Activation& y, Maths<T> tau, int64_t begin, int64_t end, uint8_t* flags) {
  using Found = std::conditional_t<sizeof(T) == 8, int64_t, std::conditional_t<sizeof(T) == 2, int16_t, int32_t>>;
  std::vector<Run> open = {{0, y.channels}};
  std::vector<Found> found(size_t(y.channels));
  RowStep<T> step(y, begin);
  look(found, kPerLine<T>, y.channels, flags, open);
  int64_t rows = 4;
  for (int64_t r = begin; r < end && !open.empty(); r += rows, rows = std::min(2 * rows, kRows)) {
    for (int64_t k = r; k < std::min(end, r + rows); ++k) {
      const T* row = step.next();
      for (const Run& run : open) {
        Found* f = found.data();
#pragma GCC ivdep
        for (int64_t c = run.begin; c < run.end; ++c) f[c] |= Found(!(value<Abs>(row[c]) <= tau));
      }
    }
    look(found, kPerLine<T>, y.channels, flags, open);
  }
}

template <class T, bool Abs>
TORSION_INLINE double plane_sum(const T* p, int64_t n) {
  double s[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
#pragma GCC ivdep
    for (int l = 0; l < kSums; ++l) s[l] += double(value<Abs>(p[i + l]));
  for (int l = 0; i < n; ++i, ++l) s[l] += double(value<Abs>(p[i]));
  for (int width = kSums / 2; width; width /= 2)
    for (int l = 0; l < width; ++l) s[l] += s[l + width];
  return s[0];
}

// Sums of the channels [begin, end); of those with a flag in `skip` none.
template <class T, bool Abs>
TORSION_INLINE void sum_channels(const Activation& y, int64_t begin, int64_t end, const uint8_t* skip, double* sums) {
  std::fill(sums + begin, sums + end, 0.);
  if (y.inner_stride == 1) {
    for (int64_t o = 0; o < y.outer; ++o)
      for (int64_t c = begin; c < end; ++c)
        if (!skip || !skip[c]) sums[c] += plane_sum<T, Abs>(plane<T>(y, o, c), y.inner);
    return;
  }
  if (skip && std::all_of(skip + begin, skip + end, [](uint8_t f) { return f != 0; })) return;
  for (int64_t o = 0; o < y.outer; ++o)
    for (int64_t i = 0; i < y.inner; ++i) {
      const T* p = static_cast<const T*>(y.data) + o * y.outer_stride + i * y.inner_stride;
#pragma GCC ivdep
      for (int64_t c = begin; c < end; ++c) sums[c] += double(value<Abs>(p[c]));
    }
}

template <class T>
struct Scan {
  void (*planes)(const Activation&, Maths<T>, int64_t, int64_t, uint8_t*);
  void (*rows)(const Activation&, Maths<T>, int64_t, int64_t, uint8_t*);
  void (*sums)(const Activation&, int64_t, int64_t, const uint8_t*, double*);
};

#define TORSION_SCAN(level, attribute)                                                                             \
  template <class T, bool Abs>                                                                                     \
  attribute __attribute__((noinline)) void planes_##level(const Activation& y, Maths<T> tau, int64_t a, int64_t z, \
                                                          uint8_t* flags) {                                        \
    scan_planes<T, Abs>(y, tau, a, z, flags);                                                                      \
  }                                                                                                                \
  template <class T, bool Abs>                                                                                     \
  attribute __attribute__((noinline)) void rows_##level(const Activation& y, Maths<T> tau, int64_t a, int64_t z,   \
                                                        uint8_t* flags) {                                          \
    scan_rows<T, Abs>(y, tau, a, z, flags);                                                                        \
  }                                                                                                                \
  template <class T, bool Abs>                                                                                     \
  attribute __attribute__((noinline)) void sums_##level(const Activation& y, int64_t a, int64_t z,                 \
                                                        const uint8_t* skip, double* sums) {                       \
    sum_channels<T, Abs>(y, a, z, skip, sums);                                                                     \
  }
TORSION_SCAN(base, )
#ifdef TORSION_X86_LEVELS
TORSION_SCAN(v3, TORSION_V3)
TORSION_SCAN(v4, TORSION_V4)
#endif
#undef TORSION_SCAN

template <class T, bool Abs>
Scan<T> scan_of_level() {
#ifdef TORSION_X86_LEVELS
  if (isa_level() == 2) return {planes_v4<T, Abs>, rows_v4<T, Abs>, sums_v4<T, Abs>};
  if (isa_level() == 1) return {planes_v3<T, Abs>, rows_v3<T, Abs>, sums_v3<T, Abs>};
#endif
  return {planes_base<T, Abs>, rows_base<T, Abs>, sums_base<T, Abs>};
}

// Calls part(begin, end) on parts of [0, n) of at least `least`, one a thread, each a multiple of `step` but the last.
template <class Part>
void in_parts(int64_t n, int64_t least, int64_t step, int threads, Part part) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n / std::max<int64_t>(1, least)));
  const int64_t each = ((n + parts - 1) / parts + step - 1) / step * step;
#pragma omp parallel for num_threads(int(parts)) schedule(static) if (parts > 1)
  for (int64_t k = 0; k < parts; ++k)
    if (k * each < n) part(k * each, std::min(n, (k + 1) * each));
}

template <class T, bool Abs>
void flag_above(const Activation& y, double tau, int threads, uint8_t* flags) {
  const Scan<T> scan = scan_of_level<T, Abs>();
  const int64_t per_channel = y.outer * y.inner;
  constexpr int64_t kWorth = 1 << 15;  // elements that are worth a thread
  if (y.inner_stride == 1) {
    // Flags of two threads in one line of the cache would be passed to and fro, hence steps of 64.
    in_parts(y.channels, kWorth / std::max<int64_t>(1, per_channel) + 1, kLine, threads,
             [&](int64_t a, int64_t z) { scan.planes(y, Maths<T>(tau), a, z, flags); });
    return;
  }
  in_parts(per_channel, kWorth / std::max<int64_t>(1, y.channels) + 1, kRows, threads, [&](int64_t a, int64_t z) {
    std::vector<uint8_t> own(flags, flags + y.channels);
    scan.rows(y, Maths<T>(tau), a, z, own.data());
#pragma omp critical(torsion_flags)
    for (int64_t c = 0; c < y.channels; ++c)
      if (own[size_t(c)]) flags[c] = 1;
  });
}

template <class T, bool Abs>
std::vector<double> sums_of(const Activation& y, int threads, const uint8_t* skip) {
  const Scan<T> scan = scan_of_level<T, Abs>();
  std::vector<double> sums(size_t(y.channels));
  in_parts(y.channels, 1, kLine, threads, [&](int64_t a, int64_t z) { scan.sums(y, a, z, skip, sums.data()); });
  return sums;
}

// Mean |y| of the channel against the mean of that over the channels; those that are not finite are live and left out.
template <class T>
void flag_dormant(const Activation& y, double tau, int threads, uint8_t* flags) {
  if (std::all_of(flags, flags + y.channels, [](uint8_t f) { return f != 0; })) return;
  const std::vector<double> sums = sums_of<T, true>(y, threads, nullptr);
  double total = 0;
  int64_t finite = 0;
  for (double s : sums)
    if (std::isfinite(s)) {
      total += s;
      ++finite;
    }
  for (int64_t c = 0; c < y.channels; ++c)
    if (!std::isfinite(sums[size_t(c)]) || sums[size_t(c)] * double(finite) > tau * total) flags[c] = 1;
}

template <class T>
void flag(const Activation& y, Criterion criterion, double tau, int threads, uint8_t* flags) {
  switch (criterion) {
    case Criterion::ever_active:
      return flag_above<T, false>(y, tau, threads, flags);
    case Criterion::abs_max:
      return flag_above<T, true>(y, tau, threads, flags);
    case Criterion::dormant:
      return flag_dormant<T>(y, tau, threads, flags);
    case Criterion::sum_le: {
      const std::vector<double> sums = sums_of<T, false>(y, threads, flags);
      for (int64_t c = 0; c < y.channels; ++c)
        if (!(sums[size_t(c)] <= tau)) flags[c] |= 1;
    }
  }
}

}  // namespace

void flag_active(const Activation& y, Criterion criterion, double tau, int threads, uint8_t* flags) {
  if (!y.outer || !y.inner || !y.channels) return;
  switch (y.kind) {
    case kF32:
      return flag<float>(y, criterion, tau, threads, flags);
    case kF64:
      return flag<double>(y, criterion, tau, threads, flags);
    case kBF16:
      return flag<bf16>(y, criterion, tau, threads, flags);
    default:
      return flag<f16>(y, criterion, tau, threads, flags);
  }
}

}  // namespace torsion::cpu
