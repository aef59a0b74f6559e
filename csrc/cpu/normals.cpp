// Normals and rounding bits in bulk. The words are made by hand-written vectors: gcc turns the 32 x 32 -> 64 bit product
// of a plain loop into two or three times as many instructions. What follows are plain loops.
//
// Blocks lie in 64-bit lanes, whose upper halves hold rubbish between the rounds: the multiplication reads lower ones.
#include "normals.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/isa.h"
#include "rules/philox_normal.h"

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
TORSION_INLINE void words_base(NoiseKey key, Source source, int64_t from, int n, Words& out) {
  for (int j = 0; j < n; ++j) {
    const Philox block = philox(key.seed, source[from + j], key.step, key.tensor_id);
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
TORSION_V3 TORSION_INLINE void words_v3(NoiseKey key, Source source, int64_t from, int n, Words& out) {
  const __m256i a = _mm256_set1_epi64x(0xD2511F53), b = _mm256_set1_epi64x(0xCD9E8D57);
  const __m256i step = _mm256_set1_epi64x(key.step), tensor = _mm256_set1_epi64x(key.tensor_id);
  for (int j = 0; j < n; j += 4) {
    __m256i c0 = counters_v3(source, from + j), c1 = _mm256_srli_epi64(c0, 32), c2 = step, c3 = tensor;
    uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m256i x = _mm256_mul_epu32(c0, a), y = _mm256_mul_epu32(c2, b);
      c0 = _mm256_xor_si256(_mm256_srli_epi64(y, 32), _mm256_xor_si256(c1, _mm256_set1_epi64x(k0)));
      c2 = _mm256_xor_si256(_mm256_srli_epi64(x, 32), _mm256_xor_si256(c3, _mm256_set1_epi64x(k1)));
      c1 = y;
      c3 = x;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    auto store = [](uint32_t* to, __m256i even, __m256i odd) __attribute__((target("arch=x86-64-v3"), always_inline)) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
    };
    store(out.first + 2 * j, c0, c2);
    store(out.second + 2 * j, c1, c3);
  }
}

TORSION_V4 TORSION_INLINE __m512i counters_v4(Range source, int64_t j) {
  return _mm512_add_epi64(_mm512_set1_epi64(int64_t(source[j])), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
TORSION_V4 TORSION_INLINE __m512i counters_v4(Listed source, int64_t j) {
  return _mm512_add_epi64(_mm512_set1_epi64(int64_t(source.offset)), _mm512_loadu_si512(source.block + j));
}

template <class Source>
TORSION_V4 TORSION_INLINE void words_v4(NoiseKey key, Source source, int64_t from, int n, Words& out) {
  const __m512i a = _mm512_set1_epi64(0xD2511F53), b = _mm512_set1_epi64(0xCD9E8D57);
  const __m512i step = _mm512_set1_epi64(key.step), tensor = _mm512_set1_epi64(key.tensor_id);
  constexpr int kXor = 0x96;  // of three
  for (int j = 0; j < n; j += 8) {
    __m512i c0 = counters_v4(source, from + j), c1 = _mm512_srli_epi64(c0, 32), c2 = step, c3 = tensor;
    uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m512i x = _mm512_mul_epu32(c0, a), y = _mm512_mul_epu32(c2, b);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(y, 32), c1, _mm512_set1_epi64(k0), kXor);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(x, 32), c3, _mm512_set1_epi64(k1), kXor);
      c1 = y;
      c3 = x;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    _mm512_store_si512(out.first + 2 * j, _mm512_mask_blend_epi32(0xaaaa, c0, _mm512_slli_epi64(c2, 32)));
    _mm512_store_si512(out.second + 2 * j, _mm512_mask_blend_epi32(0xaaaa, c1, _mm512_slli_epi64(c3, 32)));
  }
}
#endif

template <class R, int kPairs>
TORSION_INLINE void box_muller(const uint32_t* first, const uint32_t* second, R* out) {
  alignas(64) R z[2][kPairs];
#pragma GCC ivdep
  for (int p = 0; p < kPairs; ++p) normal_pair(first[p], second[p], z[0][p], z[1][p]);
  for (int p = 0; p < kPairs; ++p) {
    out[2 * p] = z[0][p];
    out[2 * p + 1] = z[1][p];
  }
}

template <class R>
TORSION_INLINE void spend(const Words& words, int n, R* out) {
  if (n == kBlocks) {
    box_muller<R, 2 * kBlocks>(words.first, words.second, out);
    return;
  }
  // Whole vectors, and the last of them through a buffer: a loop that ends anywhere would finish number by number.
  alignas(64) R buffer[4 * kListed];
  for (int j = 0; j < n; j += kListed) {
    const int m = std::min(n - j, int(kListed));
    box_muller<R, 2 * kListed>(words.first + 2 * j, words.second + 2 * j, m == kListed ? out + 4 * j : buffer);
    if (m < kListed) memcpy(out + 4 * j, buffer, size_t(4 * m) * sizeof(R));
  }
}

TORSION_INLINE void spend(const Words& words, int n, uint16_t* out) {
  for (int j = 0; j < n; ++j)
    for (int lane = 0; lane < 8; ++lane) {
      const uint32_t* word = lane & 2 ? words.second : words.first;
      out[8 * j + lane] = uint16_t(word[2 * j + (lane >> 2)] >> (16 * (lane & 1)));
    }
}

// Numbers per block: four normals, or eight times 16 bits.
template <class Out>
constexpr int kPerBlock = sizeof(Out) == 2 ? 8 : 4;

#define TORSION_FILL(level, attribute)                                                                      \
  template <class Source, class Out>                                                                        \
  attribute __attribute__((noinline)) void fill_##level(NoiseKey key, Source source, int64_t n, Out* out) { \
    Words words;                                                                                            \
    for (int64_t j = 0; j < n; j += kBlocks) {                                                              \
      const int m = int(std::min<int64_t>(n - j, kBlocks));                                                 \
      words_##level(key, source, j, (m + int(kListed) - 1) / int(kListed) * int(kListed), words);           \
      spend(words, m, out + kPerBlock<Out> * j);                                                            \
    }                                                                                                       \
  }
TORSION_FILL(base, )
#ifdef TORSION_X86_LEVELS
TORSION_FILL(v3, TORSION_V3)
TORSION_FILL(v4, TORSION_V4)
#endif
#undef TORSION_FILL

template <class Source, class Out>
void fill(NoiseKey key, Source source, int64_t n, Out* out) {
#ifdef TORSION_X86_LEVELS
  if (isa_level() == 2) return fill_v4(key, source, n, out);
  if (isa_level() == 1) return fill_v3(key, source, n, out);
#endif
  fill_base(key, source, n, out);
}

}  // namespace

void normals(NoiseKey key, uint64_t first, int64_t n, float* out) { fill(key, Range{first}, n, out); }
void normals(NoiseKey key, uint64_t first, int64_t n, double* out) { fill(key, Range{first}, n, out); }
void normals_at(NoiseKey key, const int64_t* block, uint64_t offset, int64_t n, float* out) {
  fill(key, Listed{block, offset}, n, out);
}
void normals_at(NoiseKey key, const int64_t* block, uint64_t offset, int64_t n, double* out) {
  fill(key, Listed{block, offset}, n, out);
}
void noise_rounding(NoiseKey key, uint64_t first, int64_t n, uint16_t* out) {
  fill(key, Range{kNoiseRounding | first}, n, out);
}
void noise_rounding_at(NoiseKey key, const int64_t* block, uint64_t offset, int64_t n, uint16_t* out) {
  fill(key, Listed{block, kNoiseRounding | offset}, n, out);
}

}  // namespace torsion::cpu
