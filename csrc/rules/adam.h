// Adam and AdamW as torch.optim takes them (no amsgrad): the base of a Lookbehind cycle.
//
//   h = g + weight_decay theta            AdamW: h = g, and theta *= 1 - lr weight_decay first
//   m = beta1 m + (1 - beta1) h
//   v = beta2 v + (1 - beta2) h^2
//   theta -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
#pragma once
#include "contract.h"

namespace torsion {

struct Adam : Defaults {
  static constexpr const char* kName = "adam";
  template <class R>
  struct Element {
    R param, grad, exp_avg, exp_avg_sq;
  };
  template <class E, class F>
  TORSION_HD constexpr static void streams(E& e, F&& f) {
    f(kParam, e.param);
    f(kGrad.in_reduce(), e.grad);
    f(kState, e.exp_avg);
    f(kState, e.exp_avg_sq);
  }

  enum Sums { gg, n_sums };
  static constexpr int kGradNorm2 = gg;
  struct Hyper : Common {
    double beta1, beta2, eps;
  };
  struct Shared {};
  template <class R>
  struct Coefficients {
    R beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_correction, eps, coupled, shrink;
  };

  template <class E, class N, class S>
  TORSION_HD static void reduce(const E& e, const N&, S s) {
    const double g = e.grad;
    s[gg] += g * g;
  }
  TORSION_HD static void advance(Shared&, Totals, const Hyper&) {}

  template <class R>
  TORSION_HD static Coefficients<R> coefficients(const Shared&, const Hyper& h, const Site& site) {
    const bool decoupled = h.decoupled != 0;
    return {R(h.beta1),
            R(1 - h.beta1),
            R(h.beta2),
            R(1 - h.beta2),
            R(h.lr / (1 - std::pow(h.beta1, site.step))),
            R(1 / std::sqrt(1 - std::pow(h.beta2, site.step))),
            R(h.eps),
            R(decoupled ? 0. : h.weight_decay),
            R(decoupled ? 1 - h.lr * h.weight_decay : 1.)};
  }

  template <class E, class C>
  TORSION_HD static void update(E& e, const C& c) {
    const auto h = e.grad + c.coupled * e.param;
    e.exp_avg = c.beta1 * e.exp_avg + c.one_minus_beta1 * h;
    e.exp_avg_sq = c.beta2 * e.exp_avg_sq + c.one_minus_beta2 * h * h;
    e.param = c.shrink * e.param - c.step_size * (e.exp_avg / (std::sqrt(e.exp_avg_sq) * c.rsqrt_correction + c.eps));
  }
};

}  // namespace torsion
