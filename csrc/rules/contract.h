// What a rule is: the mathematics of one optimizer, with no torch and no CUDA API in it.
//
// A step is: reduce over a list of tensors, turn the sums into a few coefficients, update element by element.
// A rule is a struct that says what each of the three is (see tam.h for the smallest complete one):
//
//   Element<R>            the values of one element, in the type R the maths runs in
//   streams(e, f)         calls f(stream, value) once per array the rule touches; the only list of reads and writes
//   Sums                  names of the sums, last one n_sums; kGradNorm2 says which of them is |gradient|^2
//   Hyper                 a group's numbers: doubles only, starts with Common
//   Shared                a scope's state: doubles only
//   Coefficients<R>       what update() needs, one set per tensor: R only
//   reduce(e, s)          an element's contribution, s[k] += ...
//   advance(shared, totals, hyper)      moves a scope's state; once per scope and step
//   coefficients(shared, hyper, site)   pure; once per tensor and step
//   update(e, c)          the new values
//
// g++ and nvcc compile the same text, so what the tests run on a CPU is what a GPU computes.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define TORSION_HD __host__ __device__ __forceinline__
#else
#define TORSION_HD inline __attribute__((always_inline))
#endif

namespace torsion {

enum class Role { param, grad, state };  // decides the storage type
enum class Io { read, write, update };   // update reads and writes

// Reduced: reduce() reads this stream, so the reduce pass loads exactly these.
template <Role R, Io I, bool Reduced = false>
struct Stream {
  static constexpr Role role = R;
  static constexpr Io io = I;
  static constexpr bool reduced = Reduced;
  TORSION_HD constexpr Stream<R, I, true> in_reduce() const { return {}; }
};

inline constexpr Stream<Role::param, Io::update> kParam{};
inline constexpr Stream<Role::grad, Io::read> kGrad{};
inline constexpr Stream<Role::state, Io::update> kState{};

// Every group has these; rules append their own. Booleans are 0 or 1. A NaN lr stands for a rate held in a tensor.
struct Common {
  double lr, weight_decay, decoupled, maximize, stochastic, seed;
};

// What a coefficient may depend on besides hyper-parameters and scope.
struct Site {
  double step;  // the tensor's own steps, this one included
  double clip;  // factor of the raw gradient, min(1, max_norm / (norm + 1e-6))
  bool first;   // the tensor's first step under init="clone"
};

// Sums over the tensor's scope and over every tensor of the step.
struct Totals {
  const double* scope;
  const double* all;
};

}  // namespace torsion
