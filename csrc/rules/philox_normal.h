// Standard normals from Philox words by Box and Muller (1958): pairs (x0, x1) and (x2, x3) of a block give
// r cos(2 pi u2), r sin(2 pi u2) with r = sqrt(-2 ln u1). Element e of a tensor has number e & 3 of block e >> 2, and e
// counts in the tensor as it was before any cut, so that what is left of it goes on getting the noise it would have got.
//
// float: u = (x >> 9 + 1/2) 2^-23, double: u = (x + 1/2) 2^-32; both are exact and never 0 or 1. Polynomials, not a
// libm, whose last bits and vector forms differ between machines: the float normals are at most 4 units in the last place
// off the exact ones of the same u, the double ones 2e-16 (1 + r). fma by name: the contraction that is the same everywhere.
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

  // -2 ln u with the polynomial of Cephes' logf, times -2.
  TORSION_HD static float minus_two_log(int32_t u) {
    const uint32_t bits = to_bits(float(u)) + (0x3f800000u - 0x3f3504f3u);  // to [sqrt(1/2), sqrt(2))
    const float e = float(int32_t(bits >> 23) - (127 + 24));
    const float f = from_bits((bits & 0x7fffffu) + 0x3f3504f3u) - 1.f;
    float p = -2 * 7.0376836292e-2f;
    p = fused(p, f, 2 * 1.1514610310e-1f);
    p = fused(p, f, -2 * 1.1676998740e-1f);
    p = fused(p, f, 2 * 1.2420140846e-1f);
    p = fused(p, f, -2 * 1.4249322787e-1f);
    p = fused(p, f, 2 * 1.6668057665e-1f);
    p = fused(p, f, -2 * 2.0000714765e-1f);
    p = fused(p, f, 2 * 2.4999993993e-1f);
    p = fused(p, f, -2 * 3.3333331174e-1f);
    p = fused(p, f, 1.f);
    p = fused(p, f, -2.f);
    return fused(p, f, e * -1.38629436f);
  }

  // cos and sin of 2 pi u: the nearest quarter turn by integers, what is left of the angle exact up to one product.
  TORSION_HD static void turn(int32_t u, float& cosine, float& sine) {
    const int32_t quarters = (u + (1 << 21)) >> 22;
    const float x = float(u - quarters * (1 << 22)) * (1.57079633f / (1 << 22)), z = x * x;
    float s = fused(-1.9515295891e-4f, z, 8.3321608736e-3f);
    s = fused(fused(s, z, -1.6666654611e-1f), z * x, x);
    float c = fused(2.443315711809948e-5f, z, -1.388731625493765e-3f);
    c = fused(fused(c, z, 4.166664568298827e-2f), z * z, fused(-.5f, z, 1.f));
    const uint32_t q = uint32_t(quarters);
    cosine = from_bits(to_bits(q & 1u ? s : c) ^ (((q + 1u) & 2u) << 30));
    sine = from_bits(to_bits(q & 1u ? c : s) ^ ((q & 2u) << 30));
  }
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
