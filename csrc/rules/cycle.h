// Every rule that a Lookbehind cycle is made of, in the order of the numbers by which ops name them.
#pragma once
#include "adam.h"
#include "adatam.h"
#include "lookbehind.h"
#include "sgd.h"
#include "tam.h"

namespace torsion {

template <class... Rules>
struct RuleList {
  static constexpr int size = sizeof...(Rules);
  // Calls f.template operator()<Rule>() for the rule of this number; false if there is none.
  template <class F>
  static bool visit(int64_t number, F&& f) {
    int64_t i = 0;
    return ((i++ == number && (f.template operator()<Rules>(), true)) || ...);
  }
  template <class F>
  static void each(F&& f) {
    (f.template operator()<Rules>(), ...);
  }
};

template <class A, class B>
struct JoinLists;
template <class... A, class... B>
struct JoinLists<RuleList<A...>, RuleList<B...>> {
  using type = RuleList<A..., B...>;
};
template <class A, class B>
using Join = typename JoinLists<A, B>::type;

using AscentRules = RuleList<Ascent<false, true>, Ascent<true, true>, Ascent<false, false>, Ascent<true, false>,
                             Blend<false>, Blend<true>>;
template <class Base>
using RulesOf = RuleList<DescentAscent<Base, false>, DescentAscent<Base, true>, Descent<Base>, DescentBlend<Base>>;

using CycleRules =
    Join<AscentRules,
         Join<Join<RulesOf<Sgd<false>>, RulesOf<Sgd<true>>>, Join<RulesOf<Adam>, Join<RulesOf<Tam>, RulesOf<AdaTam>>>>>;

// Rules whose update sums for the rule after them, by base; they have an op of their own.
using ClosingRules =
    RuleList<LastDescent<Sgd<false>>, LastDescent<Sgd<true>>, LastDescent<Adam>, LastDescent<Tam>, LastDescent<AdaTam>>;

}  // namespace torsion
