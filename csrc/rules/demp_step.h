// DemP (arXiv 2403.07688) inside an optimizer's step: the lasso on normalization scales joins the gradient, noise on live
// units the new parameter.
//
//   g += lambda sign(p)           on scaled rows, the normalization scales; sign(0) = 0
//   p, state = base(p, g, state)
//   p += sigma xi(e)              xi: philox_normal.h; 0 where a unit is dead
//
// lambda and sigma lie on the device, for only it knows how many steps were skipped. Bytes per element: the base's, and 4
// more in the reduce of a scaled row.
#pragma once
#include "adatam.h"
#include "demp.h"
#include "tam.h"

namespace torsion {

template <class Base>
struct DempStep : Base {
  static constexpr bool kDemp = true;

  template <class R>
  struct Element : Base::template Element<R> {
    R noise;
  };
  template <class F>
  struct WithParam {
    F& f;
    template <unsigned Loads, unsigned Stores, bool Shadow, class X>
    TORSION_HD constexpr void operator()(Stream<Role::param, Loads, Stores, Shadow>, X& x) const {
      f(Stream<Role::param, Loads | kReduceScaled, Stores, Shadow>{}, x);
    }
    template <Role R, unsigned Loads, unsigned Stores, bool Shadow, class X>
    TORSION_HD constexpr void operator()(Stream<R, Loads, Stores, Shadow>, X& x) const {
      constexpr unsigned scaled = Loads & kReduce ? kReduceScaled : 0u;
      f(Stream<R, Loads | scaled, Stores, Shadow>{}, x);
    }
  };
  template <class E, class F>
  TORSION_HD constexpr static void streams(E& e, F&& f) {
    Base::streams(e, WithParam<F>{f});
  }

  template <class R>
  struct Known {
    R lasso;
  };
  template <class R>
  struct Coefficients {
    typename Base::template Coefficients<R> base;
    R lasso, sigma;
  };

  template <class R>
  TORSION_HD static Known<R> known_lasso(double lasso) {
    return {R(lasso)};
  }
  template <class R>
  TORSION_HD static R with_lasso(R grad, R lasso, R param) {
    return grad + lasso * R(int(param > 0) - int(param < 0));
  }

  template <class E, class N, class S>
  TORSION_HD static void reduce(const E& e, const N& known, S s) {
    E seen = e;
    seen.grad = with_lasso(e.grad, known.lasso, e.param);
    Base::reduce(seen, known, s);
  }
  template <class R>
  TORSION_HD static Coefficients<R> coefficients(const typename Base::Shared& shared, const typename Base::Hyper& h,
                                                 const Site& site) {
    return {Base::template coefficients<R>(shared, h, site), R(site.lasso), R(site.sigma)};
  }
  template <class E, class C>
  TORSION_HD static void update(E& e, const C& c) {
    // Most rows have none, and a loop over them need not carry it.
    if (c.lasso != 0) e.grad = with_lasso(e.grad, c.lasso, e.param);
    Base::update(e, c.base);
    e.param = demp_noise(e.param, c.sigma, e.noise);
  }
};

}  // namespace torsion
