// The optimizer ops on a CPU: arguments in, Runner<Rule>::run.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "engine/arguments.h"
#include "engine/cpu.h"

namespace torsion::cpu {

// `after`: where the update leaves sums for the rule that follows.
template <class Rule>
void run(Table& table, const StepTensors& in, Phase phase, const MaybeTensor& sums, const Slots& slots = {},
         double* after = nullptr) {
  using F = Frame<Rule>;
  F f{};
  fill_frame(f, table, in, Rule::kName);
  f.slots = slots;
  f.after = after;
  const auto hyper = read_hyper<Rule>(table, in, Rule::kName, [](size_t, const Tensor&) {
    STD_TORCH_CHECK(false, Rule::kName, ": parameters are on the CPU, so the learning rate tensor must be too");
  });
  f.hyper = hyper.data();
  cpu::Runner<Rule>::bind(f, table);
  if (phase == Phase::reduce || phase == Phase::update) {
    STD_TORCH_CHECK(sums.has_value(), Rule::kName, ": a split step needs sums");
    check_vector(*sums, ScalarType::Double, (int64_t(table.n_scopes) + 1) * F::N, Rule::kName, "sums");
    f.sums = static_cast<double*>(sums->mutable_data_ptr());
  }
  cpu::Runner<Rule>::run(f, int64_t(table.pieces.size()), int(torch::stable::get_num_threads()), phase);
}

}  // namespace torsion::cpu
