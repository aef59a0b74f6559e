// AdaTAM and AdaTAMW: TAM's damped momentum as the first moment of Adam (arXiv 2412.18790).
//
//   s, s^ as in tam.h, from m and the raw gradient
//   m = beta1 m + (eps_damping + (1 + s^) / 2) (g + weight_decay theta)      heavy ball: no (1 - beta1)
//   v = beta2 v + (1 - beta2) g^2                                            raw, undamped
//   theta -= lr m / (sqrt(v / (1 - beta2^t)) + eps)                          the correction only with bias_correction
//   AdaTAMW: theta *= 1 - lr weight_decay first, and m takes g alone
//
// fp32 bytes per element: reduce reads g, m (8); update reads theta, g, m, v and writes theta, m, v (28).
#pragma once
#include "tam.h"

namespace torsion {

struct AdaTam : Defaults {
  static constexpr const char* kName = "adatam";
  template <class R>
  struct Element {
    R param, grad, exp_avg, exp_avg_sq;
  };
  template <class E, class F>
  TORSION_HD constexpr static void streams(E& e, F&& f) {
    f(kParam, e.param);
    f(kGrad.in_reduce(), e.grad);
    f(kState.in_reduce(), e.exp_avg);
    f(kState, e.exp_avg_sq);
  }

  enum Sums { n_sums = Torque::n_sums };
  static constexpr int kGradNorm2 = Torque::kGradNorm2;
  struct Hyper : Common {
    double beta1, beta2, eps, decay, eps_damping, bias_correction;
  };
  using Shared = Torque::Shared;
  template <class R>
  struct Coefficients {
    R beta1, damping, clip, coupled, beta2, one_minus_beta2, rsqrt_correction, eps, lr, shrink;
  };

  template <class E, class N, class S>
  TORSION_HD static void reduce(const E& e, const N&, S s) {
    Torque::reduce(e.exp_avg, e.grad, s);
  }
  TORSION_HD static void advance(Shared& shared, Totals totals, const Hyper& h) {
    Torque::advance(shared, totals.scope, h.decay);
  }

  template <class R>
  TORSION_HD static Coefficients<R> coefficients(const Shared& shared, const Hyper& h, const Site& site) {
    const double correction = h.bias_correction != 0 ? 1 / std::sqrt(1 - std::pow(h.beta2, site.step)) : 1.;
    const double coupled = h.decoupled != 0 ? 0. : h.weight_decay;
    const double shrink = h.decoupled != 0 ? 1 - h.lr * h.weight_decay : 1.;
    return {R(h.beta1),    R(h.eps_damping + shared.damping),
            R(site.clip),  R(coupled),
            R(h.beta2),    R(1 - h.beta2),
            R(correction), R(h.eps),
            R(h.lr),       R(shrink)};
  }

  template <class E, class C>
  TORSION_HD static void update(E& e, const C& c) {
    const auto grad = c.clip * e.grad;
    e.exp_avg = c.beta1 * e.exp_avg + c.damping * (grad + c.coupled * e.param);
    e.exp_avg_sq = c.beta2 * e.exp_avg_sq + c.one_minus_beta2 * grad * grad;
    e.param = c.shrink * e.param - c.lr * (e.exp_avg / (std::sqrt(e.exp_avg_sq) * c.rsqrt_correction + c.eps));
  }
};

}  // namespace torsion
