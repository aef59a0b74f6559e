// The optimizer ops on a CPU: arguments in, Runner<Rule>::run.
#include <torch/csrc/stable/library.h>

#include "rules/adatam.h"
#include "rules/tam.h"
#include "step.h"

namespace torsion::cpu {
namespace {

void tam(TensorList params, TensorList grads, TensorList momentum_buffers, Tensor shared, Tensor steps, Tensor status,
         Tensor hyper, TensorList lrs, std::vector<int64_t> scopes, std::vector<int64_t> groups,
         std::vector<int64_t> slots, MaybeTensor grad_scale, MaybeTensor found_inf,
         std::optional<double> max_grad_norm) {
  Table table = table_of<Tam>({&params, &grads, &momentum_buffers}, scopes, groups, slots, shared, hyper, Tam::kName);
  run<Tam>(table, {shared, steps, status, hyper, lrs, grad_scale, found_inf, max_grad_norm}, Phase::whole, {});
}

void adatam(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, Tensor shared,
            Tensor steps, Tensor status, Tensor hyper, TensorList lrs, std::vector<int64_t> scopes,
            std::vector<int64_t> groups, std::vector<int64_t> slots, MaybeTensor grad_scale, MaybeTensor found_inf,
            std::optional<double> max_grad_norm) {
  Table table =
      table_of<AdaTam>({&params, &grads, &exp_avgs, &exp_avg_sqs}, scopes, groups, slots, shared, hyper, AdaTam::kName);
  run<AdaTam>(table, {shared, steps, status, hyper, lrs, grad_scale, found_inf, max_grad_norm}, Phase::whole, {});
}

template <class Rule>
void planned(int64_t table, Tensor shared, Tensor steps, Tensor status, Tensor hyper, TensorList lrs,
             MaybeTensor grad_scale, MaybeTensor found_inf, std::optional<double> max_grad_norm, int64_t phase,
             MaybeTensor sums, MaybeTensor) {
  run<Rule>(*reinterpret_cast<Table*>(table), {shared, steps, status, hyper, lrs, grad_scale, found_inf, max_grad_norm},
            Phase(phase), sums);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torsion, CPU, m) {
  m.impl("tam_", TORCH_BOX(&tam));
  m.impl("adatam_", TORCH_BOX(&adatam));
  m.impl("tam_planned_", TORCH_BOX(&planned<Tam>));
  m.impl("adatam_planned_", TORCH_BOX(&planned<AdaTam>));
}

}  // namespace torsion::cpu
