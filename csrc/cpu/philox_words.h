// Philox's words in bulk, by hand-written vectors: gcc turns the 32 x 32 -> 64 bit product of a plain loop into two or three
// times as many instructions.
//
// Blocks lie in 64-bit lanes, whose upper halves hold rubbish between the rounds: the multiplication reads lower ones.
#pragma once
#include "engine/isa.h"
#include "normals.h"
#include "rules/philox.h"

#ifdef TORSION_X86_LEVELS
#include <immintrin.h>
// gcc 12 takes the undefined lanes of its own intrinsics for a mistake (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace torsion::cpu {
namespace {

constexpr int kBlocks = 64;  // per round trip through the arrays below: 2 KB of words

// Words 0 and 2 of block j at first[2 j] and first[2 j + 1], words 1 and 3 likewise: pairs lie side by side.
struct alignas(64) Words {
  uint32_t first[2 * kBlocks], second[2 * kBlocks];
};

struct Range {
  uint64_t first;
  TORSION_INLINE uint64_t operator[](int64_t j) const { return first + uint64_t(j); }
};

struct Listed {
  const int64_t* block;
  uint64_t offset;
  TORSION_INLINE uint64_t operator[](int64_t j) const { return uint64_t(block[j]) + offset; }
};

template <class Source>
TORSION_INLINE void words_base(const RoundKeys& keys, Source source, int64_t from, int n, Words& out) {
  for (int j = 0; j < n; ++j) {
    const Philox block = philox(keys.seed(), source[from + j], uint32_t(keys.step), uint32_t(keys.tensor_id));
    out.first[2 * j] = block.word[0];
    out.first[2 * j + 1] = block.word[2];
    out.second[2 * j] = block.word[1];
    out.second[2 * j + 1] = block.word[3];
  }
}

#ifdef TORSION_X86_LEVELS
TORSION_V3 TORSION_INLINE __m256i counters_v3(Range source, int64_t j) {
  return _mm256_add_epi64(_mm256_set1_epi64x(int64_t(source[j])), _mm256_set_epi64x(3, 2, 1, 0));
}
TORSION_V3 TORSION_INLINE __m256i counters_v3(Listed source, int64_t j) {
  const __m256i block = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source.block + j));
  return _mm256_add_epi64(_mm256_set1_epi64x(int64_t(source.offset)), block);
}

template <class Source>
TORSION_V3 TORSION_INLINE void words_v3(const RoundKeys& keys, Source source, int64_t from, int n, Words& out) {
  const __m256i a = _mm256_set1_epi64x(0xD2511F53), b = _mm256_set1_epi64x(0xCD9E8D57);
  const __m256i step = _mm256_set1_epi64x(int64_t(keys.step)), tensor = _mm256_set1_epi64x(int64_t(keys.tensor_id));
  for (int j = 0; j < n; j += 4) {
    __m256i c0 = counters_v3(source, from + j), c1 = _mm256_srli_epi64(c0, 32), c2 = step, c3 = tensor;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m256i x = _mm256_mul_epu32(c0, a), y = _mm256_mul_epu32(c2, b);
      c0 = _mm256_xor_si256(_mm256_srli_epi64(y, 32),
                            _mm256_xor_si256(c1, _mm256_set1_epi64x(int64_t(keys.even[round]))));
      c2 = _mm256_xor_si256(_mm256_srli_epi64(x, 32),
                            _mm256_xor_si256(c3, _mm256_set1_epi64x(int64_t(keys.odd[round]))));
      c1 = y;
      c3 = x;
    }
    auto store = [](uint32_t* to, __m256i even, __m256i odd) __attribute__((target("arch=x86-64-v3"), always_inline)) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
    };
    store(out.first + 2 * j, c0, c2);
    store(out.second + 2 * j, c1, c3);
  }
}

// The block in each lane of eight, such that the normals come out of unpacklo and unpackhi in the order of their elements.
TORSION_V4 TORSION_INLINE __m512i order_v4() { return _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); }
TORSION_V4 TORSION_INLINE __m512i counters_v4(Range source, int64_t j, __m512i order) {
  return _mm512_add_epi64(_mm512_set1_epi64(int64_t(source[j])), order);
}
TORSION_V4 TORSION_INLINE __m512i counters_v4(Listed source, int64_t j, __m512i order) {
  const __m512i block = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(source.block + j));
  return _mm512_add_epi64(_mm512_set1_epi64(int64_t(source.offset)), block);
}

// Words 0 and 2 of each of 8 blocks, words 1 and 3.
struct Words8 {
  __m512i first, second;
};

// `Abreast` times eight blocks at once: the ten rounds of eight are one chain, which leaves most of a core idle.
template <int Abreast, class Source>
TORSION_V4 TORSION_INLINE void philox_v4(const RoundKeys& keys, Source source, int64_t from, __m512i order,
                                         Words8 (&out)[Abreast]) {
  const __m512i a = _mm512_set1_epi64(0xD2511F53), b = _mm512_set1_epi64(0xCD9E8D57);
  constexpr int kXor = 0x96;  // of three
  __m512i c0[Abreast], c1[Abreast], c2[Abreast], c3[Abreast];
  for (int k = 0; k < Abreast; ++k) {
    c0[k] = counters_v4(source, from + 8 * k, order);
    c1[k] = _mm512_srli_epi64(c0[k], 32);
    c2[k] = _mm512_set1_epi64(int64_t(keys.step));
    c3[k] = _mm512_set1_epi64(int64_t(keys.tensor_id));
  }
#pragma GCC unroll 9
  for (int round = 0; round < 9; ++round)
    for (int k = 0; k < Abreast; ++k) {
      const __m512i x = _mm512_mul_epu32(c0[k], a), y = _mm512_mul_epu32(c2[k], b);
      c0[k] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(y, 32), c1[k], _mm512_set1_epi64(int64_t(keys.even[round])),
                                        kXor);
      c2[k] =
          _mm512_ternarylogic_epi64(_mm512_srli_epi64(x, 32), c3[k], _mm512_set1_epi64(int64_t(keys.odd[round])), kXor);
      c1[k] = y;
      c3[k] = x;
    }
  // The last round moves upper and lower halves to where the results are wanted, instead of down and up again.
  const __m512i last = _mm512_set1_epi64(int64_t(keys.last));
  for (int k = 0; k < Abreast; ++k) {
    const __m512i x = _mm512_mul_epu32(c0[k], a), y = _mm512_mul_epu32(c2[k], b);
    const __m512i upper = _mm512_mask_shuffle_epi32(x, 0x5555, y, _MM_PERM_DDBB);
    const __m512i lower = _mm512_mask_shuffle_epi32(c1[k], 0xaaaa, c3[k], _MM_PERM_CCAA);
    out[k].first = _mm512_ternarylogic_epi32(upper, lower, last, kXor);
    out[k].second = _mm512_mask_shuffle_epi32(y, 0xaaaa, x, _MM_PERM_CCAA);
  }
}

template <class Source>
TORSION_V4 TORSION_INLINE void words_v4(const RoundKeys& keys, Source source, int64_t from, int n, Words& out) {
  for (int j = 0; j < n; j += 8) {
    Words8 eight[1];
    philox_v4(keys, source, from + j, _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), eight);
    _mm512_store_si512(out.first + 2 * j, eight[0].first);
    _mm512_store_si512(out.second + 2 * j, eight[0].second);
  }
}
#endif

}  // namespace
}  // namespace torsion::cpu
