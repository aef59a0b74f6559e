// TAM on CUDA: registers the ops of rules/tam.h.
#include "rules/tam.h"

#include "step.cuh"

namespace torsion::cuda {
namespace {

void tam(TensorList params, TensorList grads, TensorList momentum_buffers, Tensor shared, Tensor steps, Tensor status,
         Tensor hyper, TensorList lrs, std::vector<int64_t> scopes, std::vector<int64_t> groups,
         std::vector<int64_t> slots, MaybeTensor grad_scale, MaybeTensor found_inf,
         std::optional<double> max_grad_norm) {
  Table table = table_of<Tam>({&params, &grads, &momentum_buffers}, scopes, groups, slots, shared, hyper, Tam::kName);
  run_lists<Tam>(table, params, {shared, steps, status, hyper, lrs, grad_scale, found_inf, max_grad_norm});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torsion, CUDA, m) {
  m.impl("tam_", TORCH_BOX(&tam));
  m.impl("tam_planned_", TORCH_BOX(&planned<Tam>));
}

}  // namespace torsion::cuda
