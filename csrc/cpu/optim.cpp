// The optimizer ops on a CPU: arguments in, Runner<Rule>::run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "engine/arguments.h"
#include "engine/cpu.h"
#include "rules/adatam.h"
#include "rules/tam.h"

namespace torsion {
namespace {

using MaybeTensor = std::optional<Tensor>;

template <class Rule>
void run(Table& table, const StepTensors& in, cpu::Phase phase, const MaybeTensor& sums) {
  using F = Frame<Rule>;
  F f{};
  fill_frame(f, table, in, Rule::kName);
  const auto hyper = read_hyper<Rule>(table, in, Rule::kName, [](size_t, const Tensor&) {
    STD_TORCH_CHECK(false, Rule::kName, ": parameters are on the CPU, so the learning rate tensor must be too");
  });
  f.hyper = hyper.data();
  cpu::Runner<Rule>::bind(f, table);
  if (phase != cpu::Phase::whole) {
    STD_TORCH_CHECK(sums.has_value(), Rule::kName, ": a split step needs sums");
    check_vector(*sums, ScalarType::Double, (int64_t(table.n_scopes) + 1) * F::N, Rule::kName, "sums");
    f.sums = static_cast<double*>(sums->mutable_data_ptr());
  }
  cpu::Runner<Rule>::run(f, int64_t(table.pieces.size()), int(torch::stable::get_num_threads()), phase);
}

void tam(TensorList params, TensorList grads, TensorList momentum_buffers, Tensor shared, Tensor steps, Tensor status,
         Tensor hyper, TensorList lrs, std::vector<int64_t> scopes, std::vector<int64_t> groups,
         std::vector<int64_t> slots, MaybeTensor grad_scale, MaybeTensor found_inf,
         std::optional<double> max_grad_norm) {
  Table table = table_of<Tam>({&params, &grads, &momentum_buffers}, scopes, groups, slots, shared, hyper, Tam::kName);
  run<Tam>(table, {shared, steps, status, hyper, lrs, grad_scale, found_inf, max_grad_norm}, cpu::Phase::whole, {});
}

void adatam(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, Tensor shared,
            Tensor steps, Tensor status, Tensor hyper, TensorList lrs, std::vector<int64_t> scopes,
            std::vector<int64_t> groups, std::vector<int64_t> slots, MaybeTensor grad_scale, MaybeTensor found_inf,
            std::optional<double> max_grad_norm) {
  Table table =
      table_of<AdaTam>({&params, &grads, &exp_avgs, &exp_avg_sqs}, scopes, groups, slots, shared, hyper, AdaTam::kName);
  run<AdaTam>(table, {shared, steps, status, hyper, lrs, grad_scale, found_inf, max_grad_norm}, cpu::Phase::whole, {});
}

template <class Rule>
void planned(int64_t table, Tensor shared, Tensor steps, Tensor status, Tensor hyper, TensorList lrs,
             MaybeTensor grad_scale, MaybeTensor found_inf, std::optional<double> max_grad_norm, int64_t phase,
             MaybeTensor sums, MaybeTensor) {
  run<Rule>(*reinterpret_cast<Table*>(table), {shared, steps, status, hyper, lrs, grad_scale, found_inf, max_grad_norm},
            cpu::Phase(phase), sums);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torsion, CPU, m) {
  m.impl("tam_", TORCH_BOX(&tam));
  m.impl("adatam_", TORCH_BOX(&adatam));
  m.impl("tam_planned_", TORCH_BOX(&planned<Tam>));
  m.impl("adatam_planned_", TORCH_BOX(&planned<AdaTam>));
}

}  // namespace torsion
