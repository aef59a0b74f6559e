// Standard normals from Philox words by Box and Muller (1958): pairs (x0, x1) and (x2, x3) of a block give
// r cos(2 pi u2), r sin(2 pi u2) with r = sqrt(-2 ln u1). Element e of a tensor has number e & 3 of block e >> 2, and e
// counts in the tensor as it was before any cut, so that what is left of it goes on getting the noise it would have got.
//
// float: u = (x >> 9 + 1/2) 2^-23, double: u = (x + 1/2) 2^-32; both are exact and never 0 or 1. Polynomials, not a
// libm, whose last bits and vector forms differ between machines: the float normals are within 2^-21 of the exact ones of
// the same u (5 2^-24 seen in 6e7 pairs), the double ones 2e-16 (1 + r). fma by name: the contraction that is the same
// everywhere.
#pragma once
#include "bits.h"
#include "philox.h"

namespace torsion {

TORSION_HD float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
TORSION_HD double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

template <class R>
struct Normal;

template <>
struct Normal<float> {
  // 2^24 u, odd: the uniform number without its rounding.
  TORSION_HD static int32_t uniform(uint32_t word) { return int32_t((word >> 8) | 1u); }

  // u = 2^e (1 + f) with 1 + f in [3/4, 3/2), as AVX-512 takes a number apart in one instruction.
  TORSION_HD static float minus_two_log(int32_t u) {
    const uint32_t bits = to_bits(float(u)) + (0x3f800000u - 0x3f400000u);
    const float e = float(int32_t(bits >> 23) - (127 + 24));
    const float f = from_bits((bits & 0x7fffffu) + 0x3f400000u) - 1.f;
    float p = fused(kLog9, f, kLog8);
    p = fused(p, f, kLog7);
    p = fused(p, f, kLog6);
    p = fused(p, f, kLog5);
    p = fused(p, f, kLog4);
    p = fused(p, f, kLog3);
    p = fused(p, f, kLog2);
    p = fused(p, f, -2.f);
    return fused(p, f, e * kMinusTwoLog2);
  }

  // cos and sin of 2 pi u. In 32 bits to the turn, the number of quarter turns, rounded, is two bits of a sum, and what is
  // left of the angle the number shifted by two, sign and all.
  TORSION_HD static void turn(int32_t u, float& cosine, float& sine) {
    const uint32_t angle = uint32_t(u) << 8, quarters = angle + (1u << 29);
    const float x = float(int32_t(angle << 2)) * kQuarter, z = x * x;
    const float s = fused(fused(fused(kSin7, z, kSin5), z, kSin3), z * x, x);
    const float c = fused(fused(fused(kCos6, z, kCos4), z, kCos2), z, 1.f);
    const bool odd = quarters & (1u << 30);
    cosine = from_bits(to_bits(odd ? s : c) ^ ((quarters + (1u << 30)) & (1u << 31)));
    sine = from_bits(to_bits(odd ? c : s) ^ (quarters & (1u << 31)));
  }

  // Minimax polynomials of our own fit, on f in [-1/4, 1/2] and |x| <= pi / 4: errors relative to -2 ln(1 + f) 3.6e-8, to
  // sin x 6.1e-9, to cos x 4.5e-8.
  static constexpr float kLog9 = -1.08265057e-1f, kLog8 = 2.41347428e-1f, kLog7 = -2.99678308e-1f;
  static constexpr float kLog6 = 3.36456219e-1f, kLog5 = -3.99541546e-1f, kLog4 = 4.99868846e-1f;
  static constexpr float kLog3 = -6.66670971e-1f, kLog2 = 1.00000121f;
  static constexpr float kSin7 = -1.95172987e-4f, kSin5 = 8.33217814e-3f, kSin3 = -1.66666549e-1f;
  static constexpr float kCos6 = -1.35918525e-3f, kCos4 = 4.16557769e-2f, kCos2 = -4.99998847e-1f;
  static constexpr float kMinusTwoLog2 = -1.38629436f, kQuarter = 1.57079633f / 4294967296.f;
};

template <>
struct Normal<double> {
  TORSION_HD static int64_t uniform(uint32_t word) { return int64_t(word) * 2 + 1; }  // 2^33 u

  // fdlibm's logarithm, times -2.
  TORSION_HD static double minus_two_log(int64_t u) {
    const uint64_t bits = to_bits(double(u)) + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);
    const double e = double(int32_t(bits >> 52) - (1023 + 33));
    const double f = from_bits((bits & 0xfffffffffffffu) + 0x3fe6a09e667f3bcdu) - 1.;
    const double s = f / (2. + f), z = s * s, half = .5 * f * f;
    double p = 1.479819860511658591e-1;
    p = fused(p, z, 1.531383769920937332e-1);
    p = fused(p, z, 1.818357216161805012e-1);
    p = fused(p, z, 2.222219843214978396e-1);
    p = fused(p, z, 2.857142874366239149e-1);
    p = fused(p, z, 3.999999999940941908e-1);
    p = fused(p, z, 6.666666666666735130e-1);
    const double low = fused(s, fused(p, z, half), e * 1.90821492927058770002e-10);
    return -2. * fused(e, 6.93147180369123816490e-1, f - (half - low));
  }

  TORSION_HD static void turn(int64_t u, double& cosine, double& sine) {
    const int64_t quarters = (u + (int64_t(1) << 30)) >> 31;
    const double x = double(int32_t(u - quarters * (int64_t(1) << 31))) * (1.57079632679489661923 / (int64_t(1) << 31));
    const double z = x * x, half = .5 * z, w = 1. - half;
    double s = 1.58969099521155010221e-10;
    s = fused(s, z, -2.50507602534068634195e-8);
    s = fused(s, z, 2.75573137070700676789e-6);
    s = fused(s, z, -1.98412698298579493134e-4);
    s = fused(s, z, 8.33333333332248946124e-3);
    s = fused(fused(s, z, -1.66666666666666324348e-1), z * x, x);
    double c = -1.13596475577881948265e-11;
    c = fused(c, z, 2.08757232129817482790e-9);
    c = fused(c, z, -2.75573143513906633035e-7);
    c = fused(c, z, 2.48015872894767294178e-5);
    c = fused(c, z, -1.38888888888741095749e-3);
    c = fused(c, z, 4.16666666666666019037e-2);
    c = w + ((1. - w - half) + z * (z * c));
    const uint64_t q = uint64_t(quarters);
    cosine = from_bits(to_bits(q & 1u ? s : c) ^ (((q + 1u) & 2u) << 62));
    sine = from_bits(to_bits(q & 1u ? c : s) ^ ((q & 2u) << 62));
  }
};

// Two normals of two words.
template <class R>
TORSION_HD void normal_pair(uint32_t a, uint32_t b, R& first, R& second) {
  const R r = std::sqrt(Normal<R>::minus_two_log(Normal<R>::uniform(a)));
  R cosine, sine;
  Normal<R>::turn(Normal<R>::uniform(b), cosine, sine);
  first = r * cosine;
  second = r * sine;
}

// The four normals of block q; R is float or double.
template <class R>
TORSION_HD void normals_of_block(uint64_t seed, uint64_t q, uint32_t step, uint32_t tensor_id, R (&out)[4]) {
  const Philox block = philox(seed, q, step, tensor_id);
  normal_pair(block.word[0], block.word[1], out[0], out[1]);
  normal_pair(block.word[2], block.word[3], out[2], out[3]);
}

// 16 bits by which element e of a bfloat16 or float16 parameter is rounded once its noise is added; blocks of their own,
// for they must not depend on the noise. Elements 8k ... 8k + 7 share one, as in rounding_block.
constexpr uint64_t kNoiseRounding = uint64_t(1) << 63;
TORSION_HD Philox noise_rounding_block(uint64_t seed, uint64_t k, uint32_t step, uint32_t tensor_id) {
  return philox(seed, kNoiseRounding | k, step, tensor_id);
}

}  // namespace torsion
