// philox_normal_, demp_update_ and active_flags_ on CUDA: registers the ops.
#include "engine/demp_arguments.h"
#include "step.cuh"
// After what declares the checks of CUDA calls:
#include "demp.cuh"
#include "flags.cuh"

namespace torsion::cuda {
namespace {

void philox_normal(Tensor out, int64_t seed, int64_t step, int64_t tensor_id) {
  const char* op = "philox_normal";
  const NoiseKey key = key_of(seed, step, tensor_id, op);
  const int32_t device = out.get_device_index();
  check_device(out, device, op, "out");
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous");
  const int32_t kind = storage_of(out, op, "out");
  const torch::stable::accelerator::DeviceGuard guard(device);
  fill_normals(out.mutable_data_ptr(), kind, out.numel(), key, most_blocks(device), current_stream(device));
}

void demp_update(TensorList params, MaybeList row_live, MaybeList col_live, MaybeList rows, MaybeList cols,
                 std::vector<int64_t> orig_cols, double sigma, int64_t seed, int64_t step,
                 std::vector<int64_t> tensor_ids, MaybeTensor numbers) {
  const NoiseLists in{params, row_live, col_live, rows, cols, orig_cols, tensor_ids};
  in.check_lengths();
  if (params.empty()) return;
  const Where where(params[0]);
  STD_TORCH_CHECK(where.cuda, "demp_update_: params[0] must be on a CUDA device with the others");
  const double* on_device = numbers_of(numbers, where);
  std::vector<NoiseRows> all;
  for (size_t i = 0; i < params.size(); ++i)
    all.push_back(noise_rows(in, i, key_of(seed, step, tensor_ids[i], "demp_update_"), where));
  if (!on_device && sigma == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(where.index);
  add_noise(all, sigma, on_device, most_blocks(where.index), current_stream(where.index));
}

void active_flags(Tensor y, Tensor flags, Tensor count, int64_t channel_dim, std::string criterion, double tau) {
  const Criterion by = criterion_of(criterion);
  const int64_t seen = y.dim() ? y.size(0) : 0;
  const int32_t device = y.get_device_index();
  check_device(y, device, "active_flags_", "y");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Activation view = activation_of(y, flags, count, channel_dim);
  const FlagPlan plan = plan_flags(view, by, tau, static_cast<uint8_t*>(flags.mutable_data_ptr()),
                                   static_cast<int64_t*>(count.mutable_data_ptr()), seen);
  MaybeTensor workspace;
  double* at = nullptr;
  if (plan.workspace) {
    workspace = torch::stable::empty({plan.workspace}, ScalarType::Double, std::nullopt,
                                     torch::stable::Device(torch::headeronly::DeviceType::CUDA, device));
    at = static_cast<double*>(workspace->mutable_data_ptr());
  }
  flag_active(plan, at, most_blocks(device), current_stream(device));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torsion, CUDA, m) {
  m.impl("philox_normal_", TORCH_BOX(&philox_normal));
  m.impl("demp_update_", TORCH_BOX(&demp_update));
  m.impl("active_flags_", TORCH_BOX(&active_flags));
}

}  // namespace torsion::cuda
