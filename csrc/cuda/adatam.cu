// AdaTAM and AdaTAMW on CUDA: registers the ops of rules/adatam.h.
#include "rules/adatam.h"

#include "step.cuh"

namespace torsion::cuda {
namespace {

void adatam(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, Tensor shared,
            Tensor steps, Tensor status, Tensor hyper, TensorList lrs, std::vector<int64_t> scopes,
            std::vector<int64_t> groups, std::vector<int64_t> slots, MaybeTensor grad_scale, MaybeTensor found_inf,
            std::optional<double> max_grad_norm) {
  Table table =
      table_of<AdaTam>({&params, &grads, &exp_avgs, &exp_avg_sqs}, scopes, groups, slots, shared, hyper, AdaTam::kName);
  run_lists<AdaTam>(table, params, {shared, steps, status, hyper, lrs, grad_scale, found_inf, max_grad_norm});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torsion, CUDA, m) {
  m.impl("adatam_", TORCH_BOX(&adatam));
  m.impl("adatam_planned_", TORCH_BOX(&planned<AdaTam>));
}

}  // namespace torsion::cuda
