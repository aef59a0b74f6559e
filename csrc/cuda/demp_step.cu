// Steps with DemP's lasso and noise on CUDA: registers the ops of rules/demp_step.h.
#include "rules/demp_step.h"

#include "step.cuh"

namespace torsion::cuda {
namespace {

template <class Rule>
void demp_planned(int64_t table, Tensor shared, Tensor steps, Tensor status, Tensor hyper, TensorList lrs,
                  MaybeTensor grad_scale, MaybeTensor found_inf, std::optional<double> max_grad_norm, int64_t phase,
                  MaybeTensor sums, MaybeTensor workspace, Tensor perturbation, int64_t noise_seed) {
  run<DempStep<Rule>>(
      *reinterpret_cast<Table*>(table),
      {shared, steps, status, hyper, lrs, grad_scale, found_inf, max_grad_norm, true, &perturbation, noise_seed},
      Phase(phase), sums, workspace);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torsion, CUDA, m) {
  m.impl("tam_demp_planned_", TORCH_BOX(&demp_planned<Tam>));
  m.impl("adatam_demp_planned_", TORCH_BOX(&demp_planned<AdaTam>));
}

}  // namespace torsion::cuda
