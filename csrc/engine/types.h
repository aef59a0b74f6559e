// Storage types and their conversions, the same bits on host and device.
#pragma once
#include <type_traits>

#include "rules/bits.h"

namespace torsion {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

TORSION_HD float widen(float x) { return x; }
TORSION_HD double widen(double x) { return x; }
TORSION_HD float widen(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
TORSION_HD float widen(f16 x) {
  // Moving the exponent by a multiplication with 2^112 also normalises subnormals; Inf and NaN need their exponent.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t scaled = to_bits(from_bits(magnitude) * from_bits(0x77800000u));
  const uint32_t special = magnitude | 0x7f800000u;
  return from_bits((magnitude >= 0x0f800000u ? special : scaled) | uint32_t(x.bits & 0x8000u) << 16);
}

// What a storage type is computed in.
template <class T>
using Maths = decltype(widen(T{}));

template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  TORSION_HD static float nearest(float x) { return x; }
};
template <>
struct Narrow<double> {
  TORSION_HD static double nearest(double x) { return x; }
};

template <>
struct Narrow<bf16> {
  TORSION_HD static bf16 nearest(float x) {
    const uint32_t u = to_bits(x), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  }
  // Adds 16 random bits below the last place kept, then truncates; Inf and NaN must not carry into the exponent.
  TORSION_HD static bf16 stochastic(float x, uint32_t noise) {
    const uint32_t u = to_bits(x), truncated = (u + noise) >> 16;
    const bf16 special = nearest(x);
    return {uint16_t((u & 0x7f800000u) == 0x7f800000u ? special.bits : truncated)};
  }
};

template <>
struct Narrow<f16> {
  TORSION_HD static f16 nearest(float x) {
    const uint32_t u = to_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    // Below 2^-14 the half is subnormal: adding 0.5 leaves its multiple of 2^-24 in the low bits, rounded to even.
    const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return {uint16_t(sign | half)};
  }
  TORSION_HD static f16 stochastic(float x, uint32_t noise) {
    const uint32_t u = to_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    // Subnormal halves are multiples of 2^-24; 13 random bits below that place are all a normal half has to spare.
    const float steps = from_bits(magnitude) * 16777216.f + float(noise & 0x1fffu) * (1.f / 8192);
    const uint32_t subnormal = uint32_t(magnitude < 0x38800000u ? steps : 0.f);
    const uint32_t normal = (magnitude - 0x38000000u + (noise & 0x1fffu)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u || half > 0x7c00u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return {uint16_t(sign | half)};
  }
};

// Storage of the three roles and the type the maths runs in.
template <class Param, class Grad, class State, class M>
struct Types {
  using Math = M;
  template <Role R>
  using Of = std::conditional_t<R == Role::param, Param, std::conditional_t<R == Role::grad, Grad, State>>;
};
using F32 = Types<float, float, float, float>;
using F64 = Types<double, double, double, double>;
using BF16 = Types<bf16, bf16, float, float>;
using F16 = Types<f16, f16, float, float>;

// Whether a stream is there at all for these storage types.
template <class Stream, class T>
inline constexpr bool is_stored =
    !Stream::shadow || !std::is_same_v<typename T::template Of<Role::param>, typename T::template Of<Role::state>>;

template <class Rule>
constexpr int stream_count() {
  typename Rule::template Element<float> e{};
  int n = 0;
  auto count = [&](auto, float&) { ++n; };
  Rule::streams(e, count);
  return n;
}
template <class Rule>
inline constexpr int n_streams = stream_count<Rule>();

// The rule whose sums an update adds up, or void.
template <class Rule>
struct AfterOf {
  using type = void;
};
template <class Rule>
  requires requires { typename Rule::After; }
struct AfterOf<Rule> {
  using type = typename Rule::After;
};
template <class Rule>
inline constexpr bool sums_in_update = !std::is_void_v<typename AfterOf<Rule>::type>;
template <class Rule>
constexpr int count_of_update_sums() {
  if constexpr (sums_in_update<Rule>)
    return Rule::After::n_sums;
  else
    return 0;
}
template <class Rule>
inline constexpr int n_update_sums = count_of_update_sums<Rule>();

// Hyper, Shared and Coefficients hold numbers of one type only, so that Python and both runners see plain arrays.
template <class T, class R = double>
inline constexpr int n_numbers = int(sizeof(T) / sizeof(R));

template <class To, class From, class R>
TORSION_HD To cast_numbers(const From& from) {
  constexpr int n = n_numbers<From>;
  static_assert(sizeof(To) == n * sizeof(R));
  double in[n];
  R out[n];
  memcpy(in, &from, sizeof in);
  for (int k = 0; k < n; ++k) out[k] = R(in[k]);
  To to;
  memcpy(&to, out, sizeof out);
  return to;
}

}  // namespace torsion
