// One pass of a Lookbehind cycle on a CPU. The rules are spread over source files, so that they compile side by side: what
// is declared here each of them defines for its own rules.
#pragma once
#include "rules/cycle.h"
#include "step.h"

namespace torsion::cpu {

struct CyclePass {
  Table& table;
  const StepTensors& in;
  const std::vector<int64_t>& streams;
  Phase phase;
  const MaybeTensor& sums;
};

template <class Rule>
void run_pass(const CyclePass& pass);

// The last descent of a cycle and the blend that follows, over the table of `next`.
template <class Rule>
void run_closing(const CyclePass& last, const CyclePass& next);

}  // namespace torsion::cpu
