// Lookbehind's passes on CUDA: registers the op. No kernel is in this file.
#include "lookbehind.cuh"

namespace torsion::cuda {
namespace {

void lookbehind_planned(int64_t table, int64_t rule, std::vector<int64_t> streams, bool opens, Tensor shared,
                        Tensor steps, Tensor status, Tensor hyper, TensorList lrs, MaybeTensor found_inf,
                        std::optional<double> max_grad_norm, int64_t phase, MaybeTensor sums, MaybeTensor workspace) {
  const MaybeTensor no_scale;
  const StepTensors in{shared, steps, status, hyper, lrs, no_scale, found_inf, max_grad_norm, opens};
  const CyclePass pass{*reinterpret_cast<Table*>(table), in, streams, Phase(phase), sums, workspace};
  const bool known = CycleRules::visit(rule, [&]<class Rule>() { run_pass<Rule>(pass); });
  STD_TORCH_CHECK(known, "lookbehind: there is no rule ", rule);
}

void lookbehind_closing_planned(int64_t table, int64_t rule, std::vector<int64_t> streams, Tensor shared, Tensor steps,
                                Tensor status, Tensor hyper, TensorList lrs, MaybeTensor found_inf,
                                std::optional<double> max_grad_norm, MaybeTensor workspace, int64_t next,
                                std::vector<int64_t> next_streams, Tensor alphas, Tensor next_hyper,
                                MaybeTensor next_workspace) {
  const MaybeTensor none;
  const TensorList no_rates;
  const StepTensors in{shared, steps, status, hyper, lrs, none, found_inf, max_grad_norm, false};
  const StepTensors after{alphas, steps, status, next_hyper, no_rates, none, none, std::nullopt, false};
  const CyclePass last{*reinterpret_cast<Table*>(table), in, streams, Phase::whole, none, workspace};
  const CyclePass blend{*reinterpret_cast<Table*>(next), after, next_streams, Phase::closing, none, next_workspace};
  const bool known = ClosingRules::visit(rule, [&]<class Rule>() { run_closing<Rule>(last, blend); });
  STD_TORCH_CHECK(known, "lookbehind: there is no last descent ", rule);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torsion, CUDA, m) {
  m.impl("lookbehind_planned_", TORCH_BOX(&lookbehind_planned));
  m.impl("lookbehind_closing_planned_", TORCH_BOX(&lookbehind_closing_planned));
}

}  // namespace torsion::cuda
