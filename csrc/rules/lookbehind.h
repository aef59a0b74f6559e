// Lookbehind-SAM (arXiv 2307.16704): k ascents on one minibatch, each followed by a descent of the base optimizer on
// fast weights f; then the slow weights s move towards f. The descent gradient of inner step i is the ascent gradient
// of step i + 1, so k + 1 gradients do what the published code does with 2k.
//
//   ascent        q += rho T^2 a / (|T a| + 1e-16)         T = 1; ASAM: |q| + eta on scaled tensors
//   descent       f  = base(f, b)                          base is any rule on (param, grad, states)
//   interpolation s  = s + alpha (f - s)                   alpha fixed, or (1 + cos(f_1 - s, f_k - s)) / 2
//
// One pass is one composed rule, so each base is written once:
//
//   Ascent           q from a; the first of a cycle keeps s
//   DescentAscent    descent i and ascent i + 1 with one gradient
//   Descent          a descent alone
//   DescentBlend     the last descent and the interpolation with a fixed alpha
//   LastDescent      the last descent; its update sums what the angle between the displacements needs
//   Blend            the interpolation alone, alpha from these sums or fixed
//
// q lives in the parameter, for half precision in float32 beside it (the parameter is then its rounded shadow). A
// gradient that is not finite skips the pass and gives the parameters the slow weights: restore().
//
// fp32 bytes per element with base SGD + momentum: Ascent 4 + 12 (16 keeping s), DescentAscent 4 + 28, DescentBlend
// 4 + 24, Descent 4 + 20, LastDescent 4 + 28, Blend 12, and 12 more where it sums by itself.
#pragma once
#include <string>

#include "contract.h"

namespace torsion {

template <class Base>
struct CycleHyper : Base {
  double rho, eta, alpha;
};

// The ascent's part of a composed rule.
template <bool Asam>
struct Climb {
  template <class R>
  struct Known {
    R slope, offset;  // T = slope |q| + offset, exactly 1 on tensors that are not scaled
  };
  template <class R, class H>
  TORSION_HD static Known<R> known(const H& h, bool scaled) {
    return {R(Asam && scaled ? 1. : 0.), R(Asam && scaled ? h.eta : 1.)};
  }

  // |T a|^2, of all tensors together whatever the base's scopes are.
  template <class N>
  TORSION_HD static double norm2(double perturbed, double grad, const N& known) {
    const double x = (known.slope * std::fabs(perturbed) + known.offset) * grad;
    return x * x;
  }
  TORSION_HD static double scale(double rho, double norm2) { return rho / (std::sqrt(norm2) + 1e-16); }

  template <class R, class C>
  TORSION_HD static R step(R perturbed, R grad, const C& c) {
    if constexpr (Asam) {
      const R t = c.slope * std::fabs(perturbed) + c.offset;
      return perturbed + c.scale * (t * t) * grad;
    } else {
      return perturbed + c.scale * grad;
    }
  }
};

// Where the perturbed weights are written: in full, and rounded to the parameter.
template <unsigned Loads, unsigned Stores>
inline constexpr Stream<Role::state, Loads, Stores> kPerturbed{};
template <unsigned Stores>
inline constexpr Stream<Role::param, 0, Stores, true> kShadow{};
inline constexpr Stream<Role::state, kRestore, 0> kKept{};

// Streams: [param | perturbed], grad, perturbed, shadow, slow. `Opens`: the first of a cycle.
template <bool Asam, bool Opens>
struct Ascent : Defaults, Climb<Asam> {
  static constexpr const char* kName = "ascent";
  static std::string label() { return std::string(Opens ? "opening_ascent" : "ascent") + (Asam ? "/asam" : ""); }
  static constexpr bool kRestores = true, kCounts = false, kRounds = false;
  using Summed = std::conditional_t<Asam, Ascent, Ascent<false, true>>;
  template <class R>
  struct Element {
    R from, grad, perturbed, slow;
  };
  template <class E, class F>
  TORSION_HD constexpr static void streams(E& e, F&& f) {
    constexpr unsigned loads = kUpdate | (Asam ? kReduce : 0u);
    if constexpr (Opens)
      f(Stream<Role::param, loads | kRestore, 0>{}, e.from);
    else
      f(Stream<Role::state, loads, 0>{}, e.from);
    f(kGrad.in_reduce(), e.grad);
    f(kPerturbed<0, kUpdate | kRestore>, e.perturbed);
    f(kShadow<kUpdate | kRestore>, e.perturbed);
    if constexpr (Opens)
      f(Stream<Role::state, 0, kUpdate | kRestore>{}, e.slow);
    else
      f(kKept, e.slow);
  }

  enum Sums { gg, n_sums };
  static constexpr int kGradNorm2 = gg;
  using Hyper = CycleHyper<Common>;
  struct Shared {};
  template <class R>
  using Known = typename Climb<Asam>::template Known<R>;
  using Climb<Asam>::known;
  template <class R>
  struct Coefficients {
    R slope, offset, scale;
  };

  template <class E, class N, class S>
  TORSION_HD static void reduce(const E& e, const N& known, S s) {
    s[gg] += Climb<Asam>::norm2(Asam ? double(e.from) : 0., e.grad, known);
  }
  TORSION_HD static void advance(Shared&, Totals, const Hyper&) {}
  template <class R>
  TORSION_HD static Coefficients<R> coefficients(const Shared&, const Hyper& h, const Site& site) {
    const auto t = Climb<Asam>::template known<R>(h, site.scaled);
    return {t.slope, t.offset, R(Climb<Asam>::scale(h.rho, site.all[gg]))};
  }
  template <class E, class C>
  TORSION_HD static void update(E& e, const C& c) {
    if constexpr (Opens) e.slow = e.from;
    e.perturbed = Climb<Asam>::step(e.from, e.grad, c);
  }
  template <class E>
  TORSION_HD static void restore(E& e) {
    if constexpr (Opens) e.slow = e.from;
    e.perturbed = e.slow;
  }
};

// A base's parameter becomes the fast weights: read from one array, written to another or the same, or not at all.
template <unsigned Stores, class F>
struct OnFast {
  F& f;
  template <class Of, class X>
  TORSION_HD constexpr void operator()(Of of, X& x) const {
    if constexpr (Of::role == Role::param) {
      f(Stream<Role::state, kUpdate, 0>{}, x);
      if constexpr (Stores != 0) f(Stream<Role::state, 0, Stores>{}, x);
    } else {
      f(of, x);
    }
  }
};

// What the passes of one base have in common: sums, scalars and coefficients, whichever of them a pass needs. Their
// reduce is one text then, and Summed names the rule that a runner may take it from.
template <class Base, bool Asam = false>
struct OfBase : Defaults {
  static constexpr const char* kName = Base::kName;
  static constexpr bool kRestores = true;
  // Without ASAM the ascent's norm is the gradient's, which the base has summed already.
  static constexpr int kGradNorm2 = Base::kGradNorm2, kClimb = Asam ? Base::n_sums : kGradNorm2,
                       n_sums = Base::n_sums + Asam;
  using Hyper = CycleHyper<typename Base::Hyper>;
  using Shared = typename Base::Shared;
  template <class R>
  using Known = typename Climb<Asam>::template Known<R>;
  template <class R>
  struct Coefficients {
    typename Base::template Coefficients<R> base;
    R slope, offset, scale, alpha;
  };

  template <class R, class H>
  TORSION_HD static Known<R> known(const H& h, bool scaled) {
    return Climb<Asam>::template known<R>(h, scaled);
  }
  template <class H>
  TORSION_HD static bool clones(const H& h) {
    return Base::clones(h);
  }
  template <class E, class N, class S>
  TORSION_HD static void reduce(const E& e, const N& known, S s) {
    Base::reduce(e, known, s);
    if constexpr (Asam) s[kClimb] += Climb<Asam>::norm2(e.perturbed, e.grad, known);
  }
  TORSION_HD static void advance(Shared& shared, Totals totals, const Hyper& h) { Base::advance(shared, totals, h); }
  template <class R>
  TORSION_HD static Coefficients<R> coefficients(const Shared& shared, const Hyper& h, const Site& site) {
    const auto t = known<R>(h, site.scaled);
    return {Base::template coefficients<R>(shared, h, site), t.slope, t.offset,
            R(Climb<Asam>::scale(h.rho, site.all[kClimb])), R(h.alpha)};
  }
};

template <class Base>
struct Descent;

// Streams: source, target, grad, the base's states, perturbed, shadow, slow.
template <class Base, bool Asam>
struct DescentAscent : OfBase<Base, Asam> {
  static std::string label() { return std::string("descent_ascent/") + Base::kName + (Asam ? "/asam" : ""); }
  static constexpr bool kRounds = false;
  using Summed = std::conditional_t<Asam, DescentAscent, Descent<Base>>;
  template <class R>
  struct Element : Base::template Element<R> {
    R perturbed, slow;
  };
  template <class E, class F>
  TORSION_HD constexpr static void streams(E& e, F&& f) {
    Base::streams(e, OnFast<kUpdate, F>{f});
    f(kPerturbed<kUpdate | (Asam ? kReduce : 0u), kUpdate | kRestore>, e.perturbed);
    f(kShadow<kUpdate | kRestore>, e.perturbed);
    f(kKept, e.slow);
  }
  template <class E, class C>
  TORSION_HD static void update(E& e, const C& c) {
    const auto raw = e.grad;  // a base may change its gradient
    Base::update(e, c.base);
    e.perturbed = Climb<Asam>::step(e.perturbed, raw, c);
  }
  template <class E>
  TORSION_HD static void restore(E& e) {
    e.perturbed = e.slow;
  }
};

// Streams: source, target, grad, the base's states, perturbed, shadow, slow.
template <class Base>
struct Descent : OfBase<Base> {
  static std::string label() { return std::string("descent/") + Base::kName; }
  static constexpr bool kRounds = false;
  template <class R>
  struct Element : Base::template Element<R> {
    R perturbed, slow;
  };
  template <class E, class F>
  TORSION_HD constexpr static void streams(E& e, F&& f) {
    Base::streams(e, OnFast<kUpdate, F>{f});
    f(kPerturbed<0, kRestore>, e.perturbed);
    f(kShadow<kRestore>, e.perturbed);
    f(kKept, e.slow);
  }
  template <class E, class C>
  TORSION_HD static void update(E& e, const C& c) {
    Base::update(e, c.base);
  }
  template <class E>
  TORSION_HD static void restore(E& e) {
    e.perturbed = e.slow;
  }
};

// As torch.lerp: alpha = 1 gives f and no displacement gives s, bit for bit.
template <class R>
TORSION_HD R interpolate(R slow, R fast, R alpha) {
  const R d = fast - slow;
  const R low = slow + alpha * d, high = fast - (1 - alpha) * d;
  return alpha < R(.5) ? low : high;
}

// Streams: source, grad, the base's states, slow, param.
template <class Base>
struct DescentBlend : OfBase<Base> {
  static std::string label() { return std::string("descent_blend/") + Base::kName; }
  using Summed = Descent<Base>;
  template <class R>
  struct Element : Base::template Element<R> {
    R slow;
  };
  template <class E, class F>
  TORSION_HD constexpr static void streams(E& e, F&& f) {
    Base::streams(e, OnFast<0, F>{f});
    f(Stream<Role::state, kUpdate | kRestore, 0>{}, e.slow);
    f(Stream<Role::param, 0, kUpdate | kRestore>{}, e.slow);
  }
  template <class E, class C>
  TORSION_HD static void update(E& e, const C& c) {
    Base::update(e, c.base);
    e.slow = interpolate(e.slow, e.param, c.alpha);
  }
  template <class E>
  TORSION_HD static void restore(E&) {}
};

// Streams: fast (f_k), slow, first (f_1), param. `Adaptive`: alpha from the angle between the displacements, else fixed.
template <bool Adaptive>
struct Blend : Defaults {
  static constexpr const char* kName = "blend";
  static std::string label() { return Adaptive ? "blend/adaptive" : "blend"; }
  static constexpr bool kRestores = true, kCounts = false;
  template <class R>
  struct Element {
    R fast, slow, first;
  };
  template <class E, class F>
  TORSION_HD constexpr static void streams(E& e, F&& f) {
    constexpr unsigned reduce = Adaptive ? kReduce : 0u;
    f(Stream<Role::state, kUpdate | reduce, 0>{}, e.fast);
    f(Stream<Role::state, kUpdate | kRestore | reduce, 0>{}, e.slow);
    f(Stream<Role::state, reduce, 0>{}, e.first);
    f(Stream<Role::param, 0, kUpdate | kRestore>{}, e.slow);
  }

  enum Sums { product, first2, fast2, n_sums };
  static constexpr int kGradNorm2 = -1;
  using Hyper = CycleHyper<Common>;
  struct Shared {
    double alpha;
  };
  template <class R>
  struct Coefficients {
    R alpha;
  };

  template <class E, class N, class S>
  TORSION_HD static void reduce(const E& e, const N&, S s) {
    if constexpr (Adaptive) add(e.first, e.fast, e.slow, s);
  }
  template <class S>
  TORSION_HD static void add(double first, double fast, double slow, S s) {
    const double a = first - slow, b = fast - slow;
    s[product] += a * b;
    s[first2] += a * a;
    s[fast2] += b * b;
  }
  TORSION_HD static void advance(Shared& shared, Totals totals, const Hyper& h) {
    const double norms = std::sqrt(totals.scope[first2]) * std::sqrt(totals.scope[fast2]);
    double cosine = norms == 0 ? 0. : totals.scope[product] / norms;
    cosine = cosine > 1 ? 1. : cosine < -1 ? -1. : cosine;
    shared.alpha = Adaptive ? (1 + cosine) / 2 : h.alpha;
  }
  template <class R>
  TORSION_HD static Coefficients<R> coefficients(const Shared& shared, const Hyper&, const Site&) {
    return {R(shared.alpha)};
  }
  template <class E, class C>
  TORSION_HD static void update(E& e, const C& c) {
    e.slow = interpolate(e.slow, e.fast, c.alpha);
  }
  template <class E>
  TORSION_HD static void restore(E&) {}
};

// Streams: source, target, grad, the base's states, param, slow, first (f_1). The target are the perturbed weights, which
// have had their last gradient.
template <class Base>
struct LastDescent : OfBase<Base> {
  static std::string label() { return std::string("last_descent/") + Base::kName; }
  static constexpr bool kRounds = false;
  using Summed = Descent<Base>;
  using After = Blend<true>;
  template <class R>
  struct Element : Base::template Element<R> {
    R slow, first;
  };
  template <class E, class F>
  TORSION_HD constexpr static void streams(E& e, F&& f) {
    Base::streams(e, OnFast<kUpdate | kRestore, F>{f});
    f(kShadow<kRestore>, e.param);
    f(Stream<Role::state, kUpdate | kRestore, 0>{}, e.slow);
    f(Stream<Role::state, kUpdate, 0>{}, e.first);
  }
  template <class E, class C>
  TORSION_HD static void update(E& e, const C& c) {
    Base::update(e, c.base);
  }
  template <class E, class S>
  TORSION_HD static void after(const E& e, S s) {
    After::add(e.first, e.param, e.slow, s);
  }
  template <class E>
  TORSION_HD static void restore(E& e) {
    e.param = e.slow;
  }
};

}  // namespace torsion
