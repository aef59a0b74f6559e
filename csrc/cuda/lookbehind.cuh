// One pass of a Lookbehind cycle on CUDA. The rules are spread over source files, a base each, so that they compile side
// by side: what is declared here each of them defines for its own rules.
#pragma once
#include "rules/cycle.h"
#include "step.cuh"

namespace torsion::cuda {

struct CyclePass {
  Table& table;
  const StepTensors& in;
  const std::vector<int64_t>& streams;
  Phase phase;
  const MaybeTensor &sums, &workspace;
};

template <class Rule>
void run_pass(const CyclePass& pass);

// The last descent of a cycle and the blend that follows, over the table of `next`.
template <class Rule>
void run_closing(const CyclePass& last, const CyclePass& next);

}  // namespace torsion::cuda
