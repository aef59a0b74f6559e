// The optimizer ops on CUDA: arguments in, Runner<Rule>::run on the caller's stream.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <mutex>

#include "engine/arguments.h"
#include "engine/launch.cuh"

namespace torsion::cuda {

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int64_t most_blocks(int32_t device) {
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return multiprocessors * kBlocksPerMultiprocessor;
}

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

inline void check_device(const Tensor& t, int32_t device, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, op, ": ", name, " must be on cuda:", device,
                  " with the parameters; move it there with .to()");
}

template <class Rule>
void check_devices(const StepTensors& in, const MaybeTensor& sums, int32_t device) {
  check_device(in.steps, device, Rule::kName, "steps");
  check_device(in.status, device, Rule::kName, "status");
  if (in.grad_scale) check_device(*in.grad_scale, device, Rule::kName, "grad_scale");
  if (in.found_inf) check_device(*in.found_inf, device, Rule::kName, "found_inf");
  if (in.perturbation) check_device(*in.perturbation, device, Rule::kName, "perturbation");
  if (sums) check_device(*sums, device, Rule::kName, "sums");
}

// A graph goes on reading the workspace it was captured with, also when the optimizer has long planned anew and dropped
// it, and nothing says when the graph itself is gone: such a workspace lives as long as the process.
inline void keep_for_graphs(const Tensor& workspace) {
  static std::mutex mutex;
  static auto* const kept = new std::vector<Tensor>;  // not destroyed: at exit the device is gone before statics are
  const std::lock_guard<std::mutex> lock(mutex);
  kept->push_back(workspace);
}

// Where the table lies on the device for this step. An image that a graph reads must never change: a capture of a changed
// table carries its own, in memory from the graph's pool, and one that a graph was captured with is not written again.
template <class Rule>
char* place(Table& table, const MaybeTensor& workspace, MaybeTensor& own, int32_t device, int64_t max_blocks,
            cudaStream_t stream) {
  const int64_t bytes = Runner<Rule>::layout(table).end;
  const bool capturing = is_capturing(stream);
  char* at = nullptr;
  if (workspace) {
    check_device(*workspace, device, Rule::kName, "workspace");
    check_vector(*workspace, ScalarType::Byte, bytes, Rule::kName, "workspace");
    at = static_cast<char*>(workspace->mutable_data_ptr());
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(at) % 16 == 0, Rule::kName, ": workspace must be 16-byte aligned");
  }
  if (at && !table.dirty && table.image == at) {
    if (capturing && table.graph_image != at) {
      keep_for_graphs(*workspace);
      table.graph_image = at;
    }
    return at;
  }
  const bool lasting = at && !capturing && at != table.graph_image;
  if (!lasting) {
    own = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt,
                               torch::stable::Device(torch::headeronly::DeviceType::CUDA, device));
    at = static_cast<char*>(own->mutable_data_ptr());
  }
  Runner<Rule>::upload(table, at, capturing, max_blocks, stream);
  if (lasting) {
    table.dirty = false;
    table.image = at;
  }
  return at;
}

// Arguments of a step as the launches take them.
template <class Rule>
struct Call {
  Frame<Rule> frame{};
  std::vector<typename Rule::Hyper> hyper;
  std::vector<Rate> rates;
  int32_t device;

  Call(const Table& table, const StepTensors& in, const Slots& slots) {
    STD_TORCH_CHECK(in.shared.is_cuda(), Rule::kName, ": shared must be on the device of the parameters");
    device = in.shared.get_device_index();
    fill_frame(frame, table, in, Rule::kName);
    frame.slots = slots;
    rates.resize(size_t(table.n_groups));
    hyper = read_hyper<Rule>(table, in, Rule::kName, [&](size_t group, const Tensor& rate) {
      check_device(rate, device, Rule::kName, "a learning rate tensor");
      const bool is_double = rate.scalar_type() == ScalarType::Double;
      STD_TORCH_CHECK(is_double || rate.scalar_type() == ScalarType::Float, Rule::kName,
                      ": a learning rate must be float32 or float64");
      STD_TORCH_CHECK(rate.numel() == 1, Rule::kName, ": a learning rate must be one number, has ", rate.numel());
      rates[group] = {rate.const_data_ptr(), is_double};
    });
  }
};

template <class Rule>
void run(Table& table, const StepTensors& in, Phase phase, const MaybeTensor& sums, const MaybeTensor& workspace,
         const Slots& slots = {}) {
  Call<Rule> call(table, in, slots);
  check_devices<Rule>(in, sums, call.device);
  if (phase == Phase::reduce || phase == Phase::update) {
    STD_TORCH_CHECK(sums.has_value(), Rule::kName, ": a split step needs sums");
    check_vector(*sums, ScalarType::Double, (int64_t(table.n_scopes) + 1) * Frame<Rule>::N, Rule::kName, "sums");
    call.frame.sums = static_cast<double*>(sums->mutable_data_ptr());
  }
  const torch::stable::accelerator::DeviceGuard guard(call.device);
  const cudaStream_t stream = current_stream(call.device);
  const int64_t max_blocks = most_blocks(call.device);
  MaybeTensor own;
  char* at = place<Rule>(table, workspace, own, call.device, max_blocks, stream);
  Runner<Rule>::run(call.frame, table, at, call.hyper, call.rates, phase, max_blocks, stream);
}

// A table for one call. table_of has held every list to its parameters' devices.
template <class Rule>
void run_lists(Table& table, const TensorList& params, const StepTensors& in) {
  for (const Tensor& param : params) check_device(param, in.shared.get_device_index(), Rule::kName, "a parameter");
  run<Rule>(table, in, Phase::whole, {}, {});
}

template <class Rule>
void planned(int64_t table, Tensor shared, Tensor steps, Tensor status, Tensor hyper, TensorList lrs,
             MaybeTensor grad_scale, MaybeTensor found_inf, std::optional<double> max_grad_norm, int64_t phase,
             MaybeTensor sums, MaybeTensor workspace) {
  run<Rule>(*reinterpret_cast<Table*>(table), {shared, steps, status, hyper, lrs, grad_scale, found_inf, max_grad_norm},
            Phase(phase), sums, workspace);
}

}  // namespace torsion::cuda
