#include "blocks.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "columns.h"
#include "engine/around.h"
#include "engine/isa.h"
#include "engine/plan.h"
#include "engine/types.h"

namespace torsion::cpu {
namespace {

constexpr int64_t kLongRun = 64;  // columns; runs shorter than this are not worth a copy of their own
constexpr int64_t kRowsAhead = 2;
constexpr int64_t kAskedAhead = 2048;          // numbers of such a row, at most
constexpr int64_t kAround = int64_t(1) << 20;  // bytes of a result that is zeroed around the cache

// Columns that follow one another on both sides.
struct Run {
  int64_t from, to, n;
};

// In the order of `to`; from == -1: zeros. Empty where runs are too short to be worth it.
std::vector<Run> runs_of(const int32_t* source, int64_t n) {
  std::vector<Run> runs;
  if (!source) {
    runs.push_back({0, 0, n});
    return runs;
  }
  for (int64_t c = 0; c < n; ++c) {
    const int64_t s = source[c];
    if (!runs.empty() &&
        (s < 0 ? runs.back().from < 0 : runs.back().from >= 0 && s == runs.back().from + runs.back().n))
      ++runs.back().n;
    else
      runs.push_back({s, c, 1});
  }
  return runs;
}

// Rows of `to` from rows of `from`: columns by `source`, whole rows by `row_of`, -1: zeros.
template <class U, class RowOf>
void move(const Blocks& from, const Blocks& to, const int32_t* source, RowOf row_of, int64_t begin, int64_t end) {
  const std::vector<Run> runs = runs_of(source, to.columns);
  std::optional<Columns<U>> columns;
  if (source && from.inner == 1 && int64_t(runs.size()) * kLongRun > to.columns)
    columns.emplace(source, from.columns, to.columns);
  const int64_t inner = from.inner;
  for (int64_t r = begin; r < end; ++r) {
    U* const out = static_cast<U*>(to.data) + r * to.row_stride;
    const int64_t s = row_of(r);
    if (s < 0) {
      std::fill_n(out, to.columns * inner, U(0));
      continue;
    }
    const U* const in = static_cast<const U*>(from.data) + s * from.row_stride;
    if (columns) {
      (*columns)(in, out);
      continue;
    }
    for (const Run& run : runs) {
      if (run.from < 0)
        std::fill_n(out + run.to * inner, run.n * inner, U(0));
      else
        memcpy(out + run.to * inner, in + run.from * inner, size_t(run.n * inner) * sizeof(U));
    }
  }
}

// Prefetches what is read of a row and what is written: a core alone leaves memory idle (4 MB: 0.49 against 0.61 ms).
template <class U>
void ask_for(const U* in, const U* out, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(U);
  for (int64_t c = 0; c < n; c += kLine) {
    __builtin_prefetch(in + c);
    __builtin_prefetch(out + c, 1);
  }
}

template <class Visit>
void by_size(int size, Visit visit) {
  if (size == 2)
    visit(uint16_t{});
  else if (size == 4)
    visit(uint32_t{});
  else
    visit(uint64_t{});
}

template <class T>
TORSION_INLINE void relu_and_bits(T* z, uint8_t* bits, int64_t begin, int64_t end) {
  const T zero{};
  int64_t i = begin;
  constexpr int kBatch = 64;
  for (; i + kBatch <= end; i += kBatch) {
    alignas(64) uint8_t on[kBatch];
#pragma GCC ivdep
    for (int l = 0; l < kBatch; ++l) {
      const T x = z[i + l];
      const bool positive = !(widen(x) <= 0);
      on[l] = positive;
      z[i + l] = positive ? x : zero;
    }
    for (int b = 0; b < kBatch / 8; ++b) {
      // The product moves the low bit of byte l to bit 56 + l.
      uint64_t eight;
      memcpy(&eight, on + 8 * b, 8);
      bits[i / 8 + b] = uint8_t((eight * 0x0102040810204080u) >> 56);
    }
  }
  for (; i < end; ++i) {
    const bool positive = !(widen(z[i]) <= 0);
    if (i % 8 == 0) bits[i / 8] = 0;
    bits[i / 8] |= uint8_t(positive << (i % 8));
    if (!positive) z[i] = zero;
  }
}

template <class U>
TORSION_INLINE void keep(const U* from, U* to, const uint8_t* bits, int64_t begin, int64_t end) {
  int64_t i = begin;
  constexpr int kBatch = 64;
  for (; i + kBatch <= end; i += kBatch) {
    alignas(64) uint8_t on[kBatch];
    for (int b = 0; b < kBatch / 8; ++b) {
      // Bit l of the byte to byte l, where it stands for any number but 0.
      const uint64_t eight = (bits[i / 8 + b] * 0x0101010101010101u) & 0x8040201008040201u;
      memcpy(on + 8 * b, &eight, 8);
    }
#pragma GCC ivdep
    for (int l = 0; l < kBatch; ++l) to[i + l] = on[l] ? from[i + l] : U(0);
  }
  for (; i < end; ++i) to[i] = (bits[i / 8] >> (i % 8)) & 1 ? from[i] : U(0);
}

// The exponent is all ones in what is not finite.
template <class U>
TORSION_INLINE bool finite(const U* x, int64_t n, U exponent) {
  U bad = 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) bad |= U((x[i] & exponent) == exponent);
  return !bad;
}

#define TORSION_BITS(level, attribute)                                                                               \
  template <class T>                                                                                                 \
  attribute __attribute__((noinline)) void relu_##level(T* z, uint8_t* bits, int64_t a, int64_t e) {                 \
    relu_and_bits(z, bits, a, e);                                                                                    \
  }                                                                                                                  \
  template <class U>                                                                                                 \
  attribute __attribute__((noinline)) void keep_##level(const U* x, U* to, const uint8_t* b, int64_t a, int64_t e) { \
    keep(x, to, b, a, e);                                                                                            \
  }                                                                                                                  \
  template <class U>                                                                                                 \
  attribute __attribute__((noinline)) bool finite_##level(const U* x, int64_t n, U exponent) {                       \
    return finite(x, n, exponent);                                                                                   \
  }
TORSION_BITS(base, )
#ifdef TORSION_X86_LEVELS
TORSION_BITS(v3, TORSION_V3)
TORSION_BITS(v4, TORSION_V4)
#define TORSION_PICK(name, ...)                      \
  return isa_level() == 2   ? name##_v4(__VA_ARGS__) \
         : isa_level() == 1 ? name##_v3(__VA_ARGS__) \
                            : name##_base(__VA_ARGS__)
#else
#define TORSION_PICK(name, ...) return name##_base(__VA_ARGS__)
#endif
#undef TORSION_BITS

template <class T>
void relu_at_level(T* z, uint8_t* bits, int64_t begin, int64_t end) {
  TORSION_PICK(relu, z, bits, begin, end);
}
template <class U>
void keep_at_level(const U* from, U* to, const uint8_t* bits, int64_t begin, int64_t end) {
  TORSION_PICK(keep, from, to, bits, begin, end);
}
template <class U>
bool finite_at_level(const U* x, int64_t n, U exponent) {
  TORSION_PICK(finite, x, n, exponent);
}
#undef TORSION_PICK

}  // namespace

void gather(const Blocks& from, const Blocks& to, Choice choice, int size, int64_t begin, int64_t end) {
  auto row_of = [&](int64_t r) { return choice.rows ? int64_t(choice.rows[r]) : r; };
  by_size(size, [&](auto u) { move<decltype(u)>(from, to, choice.columns, row_of, begin, end); });
}

void scatter(const Blocks& from, const Blocks& to, const int32_t* place, const int32_t* column_place, int size,
             int64_t begin, int64_t end) {
  auto row_of = [&](int64_t r) { return place ? int64_t(place[r]) : r; };
  by_size(size, [&](auto u) { move<decltype(u)>(from, to, column_place, row_of, begin, end); });
}

void zero_beyond(const Blocks& of, int64_t rows, int64_t columns, int size, int64_t begin, int64_t end) {
  const bool around = of.rows * of.columns * of.inner * size >= kAround;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t first = r < rows ? columns : 0;
    char* const to = static_cast<char*>(of.data) + (r * of.row_stride + first * of.inner) * size;
    const auto bytes = size_t((of.columns - first) * of.inner * size);
    if (around)
      zero_around(to, bytes);
    else
      memset(to, 0, bytes);
  }
  if (around) end_of_writes_around();
}

std::vector<int32_t> places(const int32_t* list, int64_t listed, int64_t n) {
  std::vector<int32_t> found(size_t(n), -1);
  for (int64_t k = 0; k < listed; ++k)
    if (list[k] >= 0) found[size_t(list[k])] = int32_t(k);
  return found;
}

int64_t check_index(const int32_t* index, int64_t n, int64_t end) {
  int64_t last = -1;
  for (int64_t k = 0; k < n; ++k) {
    if (index[k] <= last || index[k] >= end) return k;
    last = index[k];
  }
  return last == n - 1 ? -2 : -1;
}

void relu_bits(void* z, uint8_t* bits, int32_t kind, int64_t begin, int64_t end) {
  switch (kind) {
    case kF32:
      return relu_at_level(static_cast<float*>(z), bits, begin, end);
    case kF64:
      return relu_at_level(static_cast<double*>(z), bits, begin, end);
    case kBF16:
      return relu_at_level(static_cast<bf16*>(z), bits, begin, end);
    default:
      return relu_at_level(static_cast<f16*>(z), bits, begin, end);
  }
}

void keep_bits(const void* from, void* to, const uint8_t* bits, int size, int64_t begin, int64_t end) {
  by_size(size, [&]<class U>(U) { keep_at_level(static_cast<const U*>(from), static_cast<U*>(to), bits, begin, end); });
}

Dead::Dead(const int32_t* live, int64_t listed, int64_t size) : is(size_t(size), listed == size ? 0 : 1) {
  if (listed == size) return;
  for (int64_t k = 0; k < listed; ++k) is[size_t(live[k])] = 0;
  for (int64_t c = 0; c < size; ++c)
    if (is[size_t(c)]) list.push_back(c);
}

void silence(const Blocks& from, const Blocks& to, const Dead& rows, const Dead& columns, int size, int64_t begin,
             int64_t end) {
  const int64_t numbers = to.columns * to.inner;
  by_size(size, [&]<class U>(U) {
    for (int64_t r = begin; r < end; ++r) {
      const U* const in = static_cast<const U*>(from.data) + r * from.row_stride;
      U* const out = static_cast<U*>(to.data) + r * to.row_stride;
      if (rows.is[size_t(r)]) {
        std::fill_n(out, numbers, U(0));
        continue;
      }
      if (in != out) {
        if (r + kRowsAhead < from.rows)
          ask_for(in + kRowsAhead * from.row_stride, out + kRowsAhead * to.row_stride, std::min(numbers, kAskedAhead));
        memcpy(out, in, size_t(numbers) * sizeof(U));
      }
      for (const int64_t c : columns.list) std::fill_n(out + c * to.inner, to.inner, U(0));
    }
  });
}

bool all_finite(const Blocks& of, int64_t step, int32_t kind, int64_t begin, int64_t end) {
  auto look = [&]<class U>(U exponent) {
    U bad = 0;
    for (int64_t r = begin; r < end && !bad; ++r) {
      const U* const row = static_cast<const U*>(of.data) + r * of.row_stride;
      if (step == 1)
        bad |= !finite_at_level(row, of.columns * of.inner, exponent);
      else if (of.inner == 1)
        for (int64_t c = 0; c < of.columns; c += step) bad |= U((row[c] & exponent) == exponent);
      else
        for (int64_t c = 0; c < of.columns; c += step) bad |= !finite_at_level(row + c * of.inner, of.inner, exponent);
    }
    return !bad;
  };
  switch (kind) {
    case kF32:
      return look(uint32_t(0x7f800000));
    case kF64:
      return look(uint64_t(0x7ff0000000000000));
    case kBF16:
      return look(uint16_t(0x7f80));
    default:
      return look(uint16_t(0x7c00));
  }
}

}  // namespace torsion::cpu
