// With AVX-512, ascending columns are compressed or expanded in registers, sixteen at a time, at about the speed of a
// copy; a gather of single numbers takes four times as long. Elsewhere, and for columns in any order, number by number.
#include "columns.h"

#include <algorithm>

#include "engine/isa.h"

#ifdef TORSION_X86_LEVELS
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc bug 105593, as in normals.cpp
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace torsion::cpu {
namespace {

template <class U>
void by_number(const Columns<U>& by, const U* from, U* to) {
  for (int64_t c = 0; c < by.to_columns; ++c) {
    const int32_t s = by.source[c];
    to[c] = s < 0 ? U(0) : from[s];
  }
}

#ifdef TORSION_X86_LEVELS

// A register of numbers, and their movements; n of a masked access counts from the first.
template <class U>
struct Lanes;

template <>
struct Lanes<uint32_t> {
  static constexpr int kCount = 16;
  using V = __m512i;
  TORSION_V4 TORSION_INLINE static V load(const uint32_t* p, int n) {
    return _mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), p);
  }
  TORSION_V4 TORSION_INLINE static void store(uint32_t* p, V v, int n) {
    _mm512_mask_storeu_epi32(p, __mmask16((1u << n) - 1), v);
  }
  TORSION_V4 TORSION_INLINE static V compress(V v, uint32_t m) { return _mm512_maskz_compress_epi32(__mmask16(m), v); }
  TORSION_V4 TORSION_INLINE static V expand(V v, uint32_t m) { return _mm512_maskz_expand_epi32(__mmask16(m), v); }
};

template <>
struct Lanes<uint16_t> : Lanes<uint32_t> {
  TORSION_V4 TORSION_INLINE static V load(const uint16_t* p, int n) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
  }
  TORSION_V4 TORSION_INLINE static void store(uint16_t* p, V v, int n) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), _mm512_cvtepi32_epi16(v));
  }
};

template <>
struct Lanes<uint64_t> {
  static constexpr int kCount = 8;
  using V = __m512i;
  TORSION_V4 TORSION_INLINE static V load(const uint64_t* p, int n) {
    return _mm512_maskz_loadu_epi64(__mmask8((1u << n) - 1), p);
  }
  TORSION_V4 TORSION_INLINE static void store(uint64_t* p, V v, int n) {
    _mm512_mask_storeu_epi64(p, __mmask8((1u << n) - 1), v);
  }
  TORSION_V4 TORSION_INLINE static V compress(V v, uint32_t m) { return _mm512_maskz_compress_epi64(__mmask8(m), v); }
  TORSION_V4 TORSION_INLINE static V expand(V v, uint32_t m) { return _mm512_maskz_expand_epi64(__mmask8(m), v); }
};

template <class U>
TORSION_V4 void compress(const Columns<U>& by, const U* from, U* to) {
  using L = Lanes<U>;
  int64_t c = 0;
  for (const auto& group : by.groups) {
    const int n = int(std::min<int64_t>(L::kCount, by.from_columns - c));
    L::store(to + group.before, L::compress(L::load(from + c, n), group.mask), __builtin_popcount(group.mask));
    c += L::kCount;
  }
}

template <class U>
TORSION_V4 void expand(const Columns<U>& by, const U* from, U* to) {
  using L = Lanes<U>;
  int64_t c = 0;
  for (const auto& group : by.groups) {
    const int n = int(std::min<int64_t>(L::kCount, by.to_columns - c));
    L::store(to + c, L::expand(L::load(from + group.before, __builtin_popcount(group.mask)), group.mask), n);
    c += L::kCount;
  }
}

// The groups of `width` columns, of which `is_in` says which have a partner.
template <class U, class IsIn>
void make_groups(Columns<U>& by, int64_t width, IsIn is_in) {
  uint32_t before = 0;
  for (int64_t c = 0; c < width; c += Lanes<U>::kCount) {
    uint32_t mask = 0;
    for (int64_t l = 0; l < std::min<int64_t>(Lanes<U>::kCount, width - c); ++l) mask |= uint32_t(is_in(c + l)) << l;
    by.groups.push_back({mask, before});
    before += uint32_t(__builtin_popcount(mask));
  }
}

#endif

}  // namespace

// Whether the list is of columns one after another, none of them zeros.
template <class U>
bool Columns<U>::ascends() const {
  int64_t last = -1;
  for (int64_t c = 0; c < to_columns; ++c) {
    if (source[c] <= last) return false;
    last = source[c];
  }
  return true;
}

// Whether it takes every column of `from` in order, with zeros in between.
template <class U>
bool Columns<U>::counts() const {
  int64_t next = 0;
  for (int64_t c = 0; c < to_columns; ++c)
    if (source[c] >= 0 && source[c] != next++) return false;
  return next == from_columns;
}

template <class U>
Columns<U>::Columns(const int32_t* source, int64_t from_columns, int64_t to_columns)
    : source(source), from_columns(from_columns), to_columns(to_columns), move_(by_number<U>) {
#ifdef TORSION_X86_LEVELS
  if (isa_level() < 2) return;
  if (ascends()) {
    std::vector<uint8_t> in(size_t(from_columns), 0);
    for (int64_t c = 0; c < to_columns; ++c) in[size_t(source[c])] = 1;
    make_groups(*this, from_columns, [&](int64_t c) { return in[size_t(c)]; });
    move_ = compress<U>;
  } else if (counts()) {
    make_groups(*this, to_columns, [&](int64_t c) { return source[c] >= 0; });
    move_ = expand<U>;
  }
#endif
}

template class Columns<uint16_t>;
template class Columns<uint32_t>;
template class Columns<uint64_t>;

}  // namespace torsion::cpu
