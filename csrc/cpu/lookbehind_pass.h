// What a source file that holds rules of a Lookbehind cycle includes: the definition behind lookbehind.h.
#pragma once
#include "lookbehind.h"

namespace torsion::cpu {

template <class Rule>
void run_pass(const CyclePass& pass) {
  run<Rule>(pass.table, pass.in, pass.phase, pass.sums, read_slots<Rule>(pass.streams));
}

template <class Rule>
void run_closing(const CyclePass& last, const CyclePass& next) {
  using After = typename Rule::After;
  Frame<After> f{};
  Runner<After>::bind(f, next.table);
  STD_TORCH_CHECK(last.table.pieces.size() == next.table.pieces.size(), Rule::kName, ": the tables differ in pieces");
  run<Rule>(last.table, last.in, Phase::whole, last.sums, read_slots<Rule>(last.streams), f.partial);
  run<After>(next.table, next.in, Phase::closing, next.sums, read_slots<After>(next.streams));
}

}  // namespace torsion::cpu
