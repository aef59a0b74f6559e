// From the tensors of an op to a Table and a Frame, with every check the kernels rely on. Host only; shared by the CPU
// and the CUDA instantiation.
#pragma once
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>
#include <vector>

#include "engine/frame.h"

namespace torsion {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

using MaybeTensor = std::optional<Tensor>;

struct StepTensors {
  const Tensor &shared, &steps, &status, &hyper;
  const TensorList& lrs;
  const std::optional<Tensor>&grad_scale, &found_inf;
  std::optional<double> max_grad_norm;
  bool opens = true;
  const Tensor* perturbation = nullptr;  // of DemP: float64 [3] on the device, lambda, sigma and the noise's step
  int64_t noise_seed = 0;
};

inline int32_t kind_of(const Tensor& param, bool stochastic, const char* op, size_t i) {
  switch (param.scalar_type()) {
    case ScalarType::Float:
      return kF32;
    case ScalarType::Double:
      return kF64;
    case ScalarType::BFloat16:
      return stochastic ? kBF16Stochastic : kBF16;
    case ScalarType::Half:
      return stochastic ? kF16Stochastic : kF16;
    default:
      STD_TORCH_CHECK(false, op, ": params[", i, "] must be float32, float64, bfloat16 or float16");
  }
  return kF32;
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d) || (a.size(d) > 1 && a.stride(d) != b.stride(d))) return false;
  return true;
}

// Element i of every stream lies at offset i only if the tensor has neither holes nor overlaps.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous() || t.numel() == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline void check_vector(const Tensor& t, ScalarType dtype, int64_t n, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() >= n, op, ": ", name, " must be contiguous with at least ", n,
                  " elements, has ", t.numel());
}

inline const float* optional_float(const std::optional<Tensor>& t, const char* op, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == 1, op, ": ", name,
                  " must be one float32 number");
  return static_cast<const float*>(t->const_data_ptr());
}

// Checks the tensors that every step takes and points the frame at them.
template <class Rule>
void fill_frame(Frame<Rule>& f, const Table& table, const StepTensors& in, const char* op) {
  using F = Frame<Rule>;
  f.shared_is_double = in.shared.scalar_type() == ScalarType::Double;
  check_vector(in.shared, f.shared_is_double ? ScalarType::Double : ScalarType::Float, int64_t(table.n_scopes) * F::K,
               op, "shared");
  check_vector(in.steps, ScalarType::Float, int64_t(table.row_of.size()), op, "steps");
  check_vector(in.status, ScalarType::Long, 4, op, "status");
  check_vector(in.hyper, ScalarType::Double, int64_t(table.n_groups) * F::H, op, "hyper");
  STD_TORCH_CHECK(in.hyper.is_cpu(), op, ": hyper must be a CPU tensor; a rate on the device goes into lrs");
  f.shared = in.shared.mutable_data_ptr();
  f.steps = static_cast<float*>(in.steps.mutable_data_ptr());
  f.status = static_cast<Status*>(in.status.mutable_data_ptr());
  f.grad_scale = optional_float(in.grad_scale, op, "grad_scale");
  f.found_inf = optional_float(in.found_inf, op, "found_inf");
  f.opens = in.opens;
  if constexpr (Rule::kDemp) {
    STD_TORCH_CHECK(in.perturbation, op, ": a step with DemP needs its numbers");
    check_vector(*in.perturbation, ScalarType::Double, 3, op, "perturbation");
    f.perturbation = static_cast<const double*>(in.perturbation->const_data_ptr());
    f.noise_seed = uint64_t(in.noise_seed);
  }
  f.max_norm = in.max_grad_norm.value_or(std::numeric_limits<double>::infinity());
}

// Which address of a row each stream of the rule takes.
template <class Rule>
Slots read_slots(const std::vector<int64_t>& streams) {
  STD_TORCH_CHECK(streams.size() == size_t(n_streams<Rule>), Rule::kName, ": needs ", n_streams<Rule>, " streams, got ",
                  streams.size());
  Slots slots;
  for (size_t k = 0; k < streams.size(); ++k) {
    STD_TORCH_CHECK(streams[k] >= 0 && streams[k] < kMaxStreams, Rule::kName, ": streams[", k, "] = ", streams[k],
                    " is no slot of a row");
    slots.of[k] = int32_t(streams[k]);
  }
  return slots;
}

inline double read_rate(const Tensor& t, const char* op) {
  STD_TORCH_CHECK(t.numel() == 1, op, ": a learning rate must be one number, has ", t.numel());
  const void* p = t.const_data_ptr();
  if (t.scalar_type() == ScalarType::Double) return *static_cast<const double*>(p);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": a learning rate must be float32 or float64");
  return *static_cast<const float*>(p);
}

// The groups' numbers; a NaN rate takes the next of `lrs`. on_device(group, tensor) is told of rates the host can't read.
template <class Rule, class OnDevice>
std::vector<typename Rule::Hyper> read_hyper(const Table& table, const StepTensors& in, const char* op,
                                             OnDevice on_device) {
  std::vector<typename Rule::Hyper> hyper(size_t(table.n_groups));
  if (hyper.empty()) return hyper;
  memcpy(hyper.data(), in.hyper.const_data_ptr(), hyper.size() * sizeof(typename Rule::Hyper));
  size_t next = 0;
  for (size_t g = 0; g < hyper.size(); ++g) {
    if (!std::isnan(hyper[g].lr)) continue;
    STD_TORCH_CHECK(next < in.lrs.size(), op, ": hyper asks for more learning rates than lrs holds (", in.lrs.size(),
                    ")");
    const Tensor& rate = in.lrs[next++];
    if (rate.is_cpu())
      hyper[g].lr = read_rate(rate, op);
    else
      on_device(g, rate);
  }
  return hyper;
}

// A table for one call, from lists. streams are in the order of Rule::streams.
template <class Rule>
Table table_of(const std::vector<const TensorList*>& streams, const std::vector<int64_t>& scopes,
               const std::vector<int64_t>& groups, const std::vector<int64_t>& slots, const Tensor& shared,
               const Tensor& hyper, const char* op) {
  using F = Frame<Rule>;
  const TensorList& params = *streams[0];
  const size_t n = params.size();
  for (const TensorList* list : streams)
    STD_TORCH_CHECK(list->size() == n, op, ": lists differ in length: ", n, " params, a list of ", list->size());
  STD_TORCH_CHECK(scopes.size() == n && groups.size() == n && slots.size() == n, op,
                  ": scopes, groups and slots need one entry per tensor");
  Table table;
  static_assert(F::K > 0);
  table.n_scopes = narrow_count(shared.numel() / F::K);
  table.n_groups = narrow_count(hyper.numel() / F::H);
  STD_TORCH_CHECK(hyper.is_cpu() && hyper.scalar_type() == ScalarType::Double && hyper.is_contiguous(), op,
                  ": hyper must be a contiguous float64 CPU tensor");
  const auto* numbers = static_cast<const typename Rule::Hyper*>(hyper.const_data_ptr());
  for (size_t i = 0; i < n; ++i) {
    const Tensor& param = params[i];
    STD_TORCH_CHECK(scopes[i] >= 0 && scopes[i] < table.n_scopes, op, ": scopes[", i, "] = ", scopes[i],
                    " is outside shared");
    STD_TORCH_CHECK(groups[i] >= 0 && groups[i] < table.n_groups, op, ": groups[", i, "] = ", groups[i],
                    " is outside hyper");
    STD_TORCH_CHECK(slots[i] >= 0, op, ": slots[", i, "] is negative");
    STD_TORCH_CHECK(is_dense(param), op, ": params[", i, "] has holes or overlaps in memory; pass a contiguous copy");
    Row row{};
    row.kind = kind_of(param, numbers[groups[i]].stochastic != 0, op, i);
    const ScalarType state = row.kind == kF64 ? ScalarType::Double : ScalarType::Float;
    for (size_t k = 0; k < streams.size(); ++k) {
      const Tensor& t = (*streams[k])[i];
      STD_TORCH_CHECK(t.scalar_type() == (k < 2 ? param.scalar_type() : state), op, ": list ", k, ", tensor ", i,
                      " has the wrong dtype: gradients have the parameter's, state is float32 (float64 for float64)");
      STD_TORCH_CHECK(same_layout(t, param), op, ": list ", k, ", tensor ", i,
                      " differs from its parameter in sizes or strides");
      STD_TORCH_CHECK(t.get_device_index() == param.get_device_index() && t.is_cuda() == shared.is_cuda(), op,
                      ": list ", k, ", tensor ", i, " is on another device");
      row.at[k] = const_cast<void*>(t.const_data_ptr());
    }
    row.n = param.numel();
    row.weight = 1;
    row.tensor = narrow_count(slots[i]);
    row.scope = int32_t(scopes[i]);
    row.group = int32_t(groups[i]);
    row.aligned = is_aligned(row, int(streams.size()));
    table.rows.push_back(row);
  }
  table.arrange();
  return table;
}

}  // namespace torsion
