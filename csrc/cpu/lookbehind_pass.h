// What a source file that holds rules of a Lookbehind cycle includes: the definition behind lookbehind.h.
#pragma once
#include "lookbehind.h"

namespace torsion::cpu {

template <class Rule>
void run_pass(const CyclePass& pass) {
  run<Rule>(pass.table, pass.in, pass.phase, pass.sums, read_slots<Rule>(pass.streams));
}

}  // namespace torsion::cpu
