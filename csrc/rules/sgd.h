// SGD as torch.optim.SGD takes it: the base of a Lookbehind cycle.
//
//   h = g + weight_decay theta
//   m = momentum m + (1 - dampening) h      first step: m = h
//   theta -= lr m                           nesterov: lr (h + momentum m); without momentum: lr h
#pragma once
#include "contract.h"

namespace torsion {

template <bool Momentum>
struct Sgd;

struct SgdCommon : Defaults {
  enum Sums { gg, n_sums };
  static constexpr int kGradNorm2 = gg;
  struct Hyper : Common {
    double momentum, dampening, nesterov;
  };
  struct Shared {};
  TORSION_HD static void advance(Shared&, Totals, const Hyper&) {}

  template <class E, class N, class S>
  TORSION_HD static void reduce(const E& e, const N&, S s) {
    const double g = e.grad;
    s[gg] += g * g;
  }
};

template <>
struct Sgd<false> : SgdCommon {
  static constexpr const char* kName = "sgd";
  template <class R>
  struct Element {
    R param, grad;
  };
  template <class E, class F>
  TORSION_HD constexpr static void streams(E& e, F&& f) {
    f(kParam, e.param);
    f(kGrad.in_reduce(), e.grad);
  }

  template <class R>
  struct Coefficients {
    R coupled, lr;
  };
  template <class R>
  TORSION_HD static Coefficients<R> coefficients(const Shared&, const Hyper& h, const Site&) {
    return {R(h.weight_decay), R(h.lr)};
  }

  template <class E, class C>
  TORSION_HD static void update(E& e, const C& c) {
    e.param = e.param - c.lr * (e.grad + c.coupled * e.param);
  }
};

template <>
struct Sgd<true> : SgdCommon {
  static constexpr const char* kName = "sgd_momentum";
  template <class R>
  struct Element {
    R param, grad, momentum;
  };
  template <class E, class F>
  TORSION_HD constexpr static void streams(E& e, F&& f) {
    f(kParam, e.param);
    f(kGrad.in_reduce(), e.grad);
    f(kState, e.momentum);
  }
  template <class H>
  TORSION_HD static bool clones(const H&) {
    return true;
  }

  template <class R>
  struct Coefficients {
    R momentum, fresh, coupled, raw, ahead, lr;
  };
  template <class R>
  TORSION_HD static Coefficients<R> coefficients(const Shared&, const Hyper& h, const Site& site) {
    const bool nesterov = h.nesterov != 0;
    return {R(site.first ? 0. : h.momentum), R(site.first ? 1. : 1 - h.dampening), R(h.weight_decay),
            R(nesterov ? 1. : 0.),           R(nesterov ? h.momentum : 1.),        R(h.lr)};
  }

  template <class E, class C>
  TORSION_HD static void update(E& e, const C& c) {
    const auto h = e.grad + c.coupled * e.param;
    e.momentum = c.momentum * e.momentum + c.fresh * h;
    e.param = e.param - c.lr * (c.raw * h + c.ahead * e.momentum);
  }
};

}  // namespace torsion
