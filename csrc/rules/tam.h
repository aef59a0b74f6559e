// TAM: heavy-ball momentum whose gradient is damped by its angle to the momentum (arXiv 2412.18790).
//
//   s  = <m, g> / (|m| |g|)               over the scope, 0 if either norm is 0
//   s^ = decay s^ + (1 - decay) s
//   m  = momentum m + (eps_damping + (1 + s^) / 2) (g + weight_decay theta)
//   theta -= lr m                          decoupled: theta *= 1 - lr weight_decay first, and m takes g alone
//
// fp32 bytes per element: reduce reads g, m (8); update reads theta, g, m and writes theta, m (20).
#pragma once
#include "contract.h"

namespace torsion {

// The smoothed cosine of a scope, common to TAM and AdaTAM.
struct Torque {
  enum Sums { mg, gg, mm, n_sums };
  static constexpr int kGradNorm2 = gg;
  struct Shared {
    double correlation, cosine, damping;
  };

  template <class S>
  TORSION_HD static void reduce(double m, double g, S s) {
    s[mg] += m * g;
    s[gg] += g * g;
    s[mm] += m * m;
  }

  TORSION_HD static void advance(Shared& shared, const double* scope, double decay) {
    const double norms = std::sqrt(scope[gg]) * std::sqrt(scope[mm]);
    double cosine = norms == 0 ? 0. : scope[mg] / norms;
    cosine = cosine > 1 ? 1. : cosine < -1 ? -1. : cosine;
    shared.cosine = cosine;
    shared.correlation = decay * shared.correlation + (1 - decay) * cosine;
    shared.damping = (1 + shared.correlation) / 2;
  }
};

struct Tam : Defaults {
  static constexpr const char* kName = "tam";
  template <class R>
  struct Element {
    R param, grad, momentum;
  };
  template <class E, class F>
  TORSION_HD constexpr static void streams(E& e, F&& f) {
    f(kParam, e.param);
    f(kGrad.in_reduce(), e.grad);
    f(kState.in_reduce(), e.momentum);
  }

  enum Sums { n_sums = Torque::n_sums };
  static constexpr int kGradNorm2 = Torque::kGradNorm2;
  struct Hyper : Common {
    double momentum, decay, eps_damping, clone;
  };
  using Shared = Torque::Shared;
  template <class R>
  struct Coefficients {
    R momentum, damping, clip, coupled, lr, shrink;
  };

  template <class E, class N, class S>
  TORSION_HD static void reduce(const E& e, const N&, S s) {
    Torque::reduce(e.momentum, e.grad, s);
  }
  TORSION_HD static void advance(Shared& shared, Totals totals, const Hyper& h) {
    Torque::advance(shared, totals.scope, h.decay);
  }
  TORSION_HD static bool clones(const Hyper& h) { return h.clone != 0; }

  template <class R>
  TORSION_HD static Coefficients<R> coefficients(const Shared& shared, const Hyper& h, const Site& site) {
    const double momentum = site.first ? 0. : h.momentum;
    const double damping = site.first ? 1. : h.eps_damping + shared.damping;
    const double coupled = h.decoupled != 0 ? 0. : h.weight_decay;
    const double shrink = h.decoupled != 0 ? 1 - h.lr * h.weight_decay : 1.;
    return {R(momentum), R(damping), R(site.clip), R(coupled), R(h.lr), R(shrink)};
  }

  template <class E, class C>
  TORSION_HD static void update(E& e, const C& c) {
    e.momentum = c.momentum * e.momentum + c.damping * (c.clip * e.grad + c.coupled * e.param);
    e.param = c.shrink * e.param - c.lr * e.momentum;
  }
};

}  // namespace torsion
