// What a source file that holds rules of a Lookbehind cycle includes: the definition behind lookbehind.cuh.
#pragma once
#include "lookbehind.cuh"

namespace torsion::cuda {

template <class Rule>
void run_pass(const CyclePass& pass) {
  run<Rule>(pass.table, pass.in, pass.phase, pass.sums, pass.workspace, read_slots<Rule>(pass.streams));
}

}  // namespace torsion::cuda
