// Normals and rounding bits in bulk. Words come from philox_words.h, and plain loops spend them; but for float32 with
// AVX-512, where words and normals are made in registers.
#include "normals.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "philox_words.h"
#include "rules/philox_normal.h"

namespace torsion::cpu {
namespace {

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

#define TORSION_FILL(level, attribute)                                                                               \
  template <class Source, class Out>                                                                                 \
  attribute __attribute__((noinline)) void fill_##level(const RoundKeys& keys, Source source, int64_t n, Out* out) { \
    Words words;                                                                                                     \
    for (int64_t j = 0; j < n; j += kBlocks) {                                                                       \
      const int m = int(std::min<int64_t>(n - j, kBlocks));                                                          \
      words_##level(keys, source, j, (m + int(kListed) - 1) / int(kListed) * int(kListed), words);                   \
      spend(words, m, out + kPerBlock<Out> * j);                                                                     \
    }                                                                                                                \
  }
TORSION_FILL(base, )
#ifdef TORSION_X86_LEVELS
TORSION_FILL(v3, TORSION_V3)
TORSION_FILL(v4, TORSION_V4)
#endif
#undef TORSION_FILL

#ifdef TORSION_X86_LEVELS
TORSION_V4 TORSION_INLINE __m512 with_sign(__m512 x, __m512i of) {
  constexpr int kXorAnd = 0x78;  // a ^ (b & c)
  const __m512i sign = _mm512_set1_epi32(int32_t(1u << 31));
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(x), of, sign, kXorAnd));
}

#define TORSION_EACH for (int k = 0; k < Abreast; ++k)

// Normal<float> for 32 numbers from each pair of vectors, step by step for all of them, as gcc does not interleave loops.
template <int Abreast>
TORSION_V4 TORSION_INLINE void box_muller_v4(const Words8 (&words)[Abreast], float* out) {
  using N = Normal<float>;
  constexpr int kAndOr = 0xea;  // (a & b) | c
  const __m512i kept = _mm512_set1_epi32(~0x1ff), half = _mm512_set1_epi32(0x100);
  __m512i angle[Abreast], quarters[Abreast];
  __m512 f[Abreast], r[Abreast], x[Abreast], z[Abreast], s[Abreast], c[Abreast];
  TORSION_EACH {
    const __m512 u = _mm512_cvtepu32_ps(_mm512_ternarylogic_epi32(words[k].first, kept, half, kAndOr));  // 2^32 u
    f[k] = _mm512_sub_ps(_mm512_getmant_ps(u, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero), _mm512_set1_ps(1.f));
    const __m512 e = _mm512_getexp_ps(_mm512_mul_ps(u, _mm512_set1_ps(4 / 3.f / 4294967296.f)));
    r[k] = _mm512_mul_ps(e, _mm512_set1_ps(N::kMinusTwoLog2));
    angle[k] = _mm512_ternarylogic_epi32(words[k].second, kept, half, kAndOr);
    quarters[k] = _mm512_add_epi32(angle[k], _mm512_set1_epi32(1 << 29));
    x[k] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_slli_epi32(angle[k], 2)), _mm512_set1_ps(N::kQuarter));
    z[k] = _mm512_mul_ps(x[k], x[k]);
  }
  __m512 p[Abreast];
  TORSION_EACH p[k] = _mm512_fmadd_ps(_mm512_set1_ps(N::kLog9), f[k], _mm512_set1_ps(N::kLog8));
  TORSION_EACH p[k] = _mm512_fmadd_ps(p[k], f[k], _mm512_set1_ps(N::kLog7));
  TORSION_EACH p[k] = _mm512_fmadd_ps(p[k], f[k], _mm512_set1_ps(N::kLog6));
  TORSION_EACH p[k] = _mm512_fmadd_ps(p[k], f[k], _mm512_set1_ps(N::kLog5));
  TORSION_EACH p[k] = _mm512_fmadd_ps(p[k], f[k], _mm512_set1_ps(N::kLog4));
  TORSION_EACH p[k] = _mm512_fmadd_ps(p[k], f[k], _mm512_set1_ps(N::kLog3));
  TORSION_EACH p[k] = _mm512_fmadd_ps(p[k], f[k], _mm512_set1_ps(N::kLog2));
  TORSION_EACH p[k] = _mm512_fmadd_ps(p[k], f[k], _mm512_set1_ps(-2.f));
  TORSION_EACH r[k] = _mm512_sqrt_ps(_mm512_fmadd_ps(p[k], f[k], r[k]));
  TORSION_EACH s[k] = _mm512_fmadd_ps(_mm512_set1_ps(N::kSin7), z[k], _mm512_set1_ps(N::kSin5));
  TORSION_EACH c[k] = _mm512_fmadd_ps(_mm512_set1_ps(N::kCos6), z[k], _mm512_set1_ps(N::kCos4));
  TORSION_EACH s[k] = _mm512_fmadd_ps(s[k], z[k], _mm512_set1_ps(N::kSin3));
  TORSION_EACH c[k] = _mm512_fmadd_ps(c[k], z[k], _mm512_set1_ps(N::kCos2));
  TORSION_EACH s[k] = _mm512_fmadd_ps(s[k], _mm512_mul_ps(z[k], x[k]), x[k]);
  TORSION_EACH c[k] = _mm512_fmadd_ps(c[k], z[k], _mm512_set1_ps(1.f));
  TORSION_EACH {
    const __mmask16 odd = _mm512_test_epi32_mask(quarters[k], _mm512_set1_epi32(1 << 30));
    const __m512i next = _mm512_add_epi32(quarters[k], _mm512_set1_epi32(1 << 30));
    const __m512 cosine = _mm512_mul_ps(r[k], with_sign(_mm512_mask_blend_ps(odd, c[k], s[k]), next));
    const __m512 sine = _mm512_mul_ps(r[k], with_sign(_mm512_mask_blend_ps(odd, s[k], c[k]), quarters[k]));
    _mm512_storeu_ps(out + 32 * k, _mm512_unpacklo_ps(cosine, sine));
    _mm512_storeu_ps(out + 32 * k + 16, _mm512_unpackhi_ps(cosine, sine));
  }
}
#undef TORSION_EACH

template <int Abreast, class Source>
TORSION_V4 __attribute__((noinline)) void normals_v4(const RoundKeys& keys, Source source, int64_t j, float* out) {
  Words8 words[Abreast];
  philox_v4(keys, source, j, order_v4(), words);
  box_muller_v4(words, out);
}

// The float normals of fill_v4: 0.28 ns a number on a core of 4.2 GHz, four vectors abreast, 0.49 one by one.
template <class Source>
TORSION_V4 __attribute__((noinline)) void fill_abreast_v4(const RoundKeys& keys, Source source, int64_t n, float* out) {
  constexpr int kAbreast = 4;
  int64_t j = 0;
  for (; j + 8 * kAbreast <= n; j += 8 * kAbreast) normals_v4<kAbreast>(keys, source, j, out + 4 * j);
  for (; j + 8 <= n; j += 8) normals_v4<1>(keys, source, j, out + 4 * j);
  if (j == n) return;
  alignas(64) float buffer[4 * 8];
  normals_v4<1>(keys, source, j, buffer);
  memcpy(out + 4 * j, buffer, size_t(4 * (n - j)) * sizeof(float));
}
#endif

template <class Source, class Out>
void fill(const RoundKeys& keys, Source source, int64_t n, Out* out) {
#ifdef TORSION_X86_LEVELS
  if (isa_level() == 2) {
    if constexpr (std::is_same_v<Out, float>)
      return fill_abreast_v4(keys, source, n, out);
    else
      return fill_v4(keys, source, n, out);
  }
  if (isa_level() == 1) return fill_v3(keys, source, n, out);
#endif
  fill_base(keys, source, n, out);
}

}  // namespace

void normals(const RoundKeys& keys, uint64_t first, int64_t n, float* out) { fill(keys, Range{first}, n, out); }
void normals(const RoundKeys& keys, uint64_t first, int64_t n, double* out) { fill(keys, Range{first}, n, out); }
void normals_at(const RoundKeys& keys, const int64_t* block, uint64_t offset, int64_t n, float* out) {
  fill(keys, Listed{block, offset}, n, out);
}
void normals_at(const RoundKeys& keys, const int64_t* block, uint64_t offset, int64_t n, double* out) {
  fill(keys, Listed{block, offset}, n, out);
}
void noise_rounding(const RoundKeys& keys, uint64_t first, int64_t n, uint16_t* out) {
  fill(keys, Range{kNoiseRounding | first}, n, out);
}
void noise_rounding_at(const RoundKeys& keys, const int64_t* block, uint64_t offset, int64_t n, uint16_t* out) {
  fill(keys, Listed{block, kNoiseRounding | offset}, n, out);
}

}  // namespace torsion::cpu
