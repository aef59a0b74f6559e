// What a rule is: the mathematics of one optimizer, with no torch and no CUDA API in it.
//
// A step is: reduce over a list of tensors, turn the sums into a few coefficients, update element by element.
// A rule is a struct that says what each of the three is (see tam.h for the smallest complete one):
//
//   Element<R>            the values of one element, in the type R the maths runs in
//   streams(e, f)         calls f(stream, value) once per array the rule touches; the only list of reads and writes
//   Sums                  names of the sums, last one n_sums; kGradNorm2 says which of them is |gradient|^2, -1: none
//   Hyper                 a group's numbers: doubles only, starts with Common
//   Shared                a scope's state: doubles only
//   Coefficients<R>       what update() needs, one set per tensor: R only
//   reduce(e, known, s)   an element's contribution, s[k] += ...
//   advance(shared, totals, hyper)      moves a scope's state; once per scope and step
//   coefficients(shared, hyper, site)   pure; once per tensor and step
//   update(e, c)          the new values
//
// What a rule need not say is in Defaults. After may name a rule that follows: after(e, s) then adds an element's contribution
// to its sums in update, and that rule's own reduce falls away. Summed may name a rule with the same Sums, Known and reduce(), whose kernels a
// runner then takes.
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

// A step runs reduce, then update; a rule with kRestores runs restore instead of the update of a step that is skipped.
// kReduceScaled is the reduce of rows with the flag, in a rule that reads more of them.
enum Pass : unsigned { kReduce = 1, kUpdate = 2, kRestore = 4, kReduceScaled = 8 };

// In which passes an array is read and written. Two streams may be one array: what an element loads, it loads before it
// stores. A shadow is the parameter rounded from a state that holds it in full: where both are of one type, the state is
// the parameter and the shadow is left out.
template <Role R, unsigned Loads, unsigned Stores, bool Shadow = false>
struct Stream {
  static constexpr Role role = R;
  static constexpr bool shadow = Shadow;
  TORSION_HD static constexpr bool loads(Pass p) { return Loads & p; }
  TORSION_HD static constexpr bool stores(Pass p) { return Stores & p; }
  TORSION_HD constexpr Stream<R, Loads | kReduce, Stores, Shadow> in_reduce() const { return {}; }
};

inline constexpr Stream<Role::param, kUpdate, kUpdate> kParam{};
inline constexpr Stream<Role::grad, kUpdate, 0> kGrad{};
inline constexpr Stream<Role::state, kUpdate, kUpdate> kState{};

// Every group has these; rules append their own. Booleans are 0 or 1. A NaN lr stands for a rate held in a tensor.
struct Common {
  double lr, weight_decay, decoupled, maximize, stochastic, seed;
};

// What a coefficient may depend on besides hyper-parameters and scope.
struct Site {
  double step;                  // the tensor's own steps, this one included
  double clip;                  // factor of the raw gradient, min(1, max_norm / (norm + 1e-6))
  bool first;                   // the tensor's first step, of a rule that clones
  bool scaled;                  // the row's flag
  const double* all;            // sums over every tensor of the step
  double lasso = 0, sigma = 0;  // of DemP: weight of the row's sign, standard deviation of its noise
};

// Sums over the tensor's scope and over every tensor of the step.
struct Totals {
  const double* scope;
  const double* all;
};

struct Defaults {
  static constexpr bool kRestores = false;  // restore(e) undoes what earlier steps did, in a step that is skipped
  static constexpr bool kCounts = true;     // a step of the rule is a step of the optimizer
  static constexpr bool kRounds = true;     // takes part in stochastic rounding
  static constexpr bool kDemp = false;      // takes lasso and noise (demp_step.h)

  // What reduce() needs to know of a tensor: R only.
  template <class R>
  struct Known {};
  template <class R, class H>
  TORSION_HD static Known<R> known(const H&, bool /*scaled*/) {
    return {};
  }

  // Whether a tensor's first step stays out of its scope's sums.
  template <class H>
  TORSION_HD static bool clones(const H&) {
    return false;
  }
};

}  // namespace torsion
