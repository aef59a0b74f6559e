// From the tensors of DemP's ops to what engine/demp.h says, with every check the kernels rely on. Host only; shared by
// the CPU and the CUDA instantiation.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <string>

#include "engine/arguments.h"
#include "engine/demp.h"

namespace torsion {

using MaybeList = std::vector<MaybeTensor>;

// Where an op runs; every tensor has to be there.
struct Where {
  bool cuda;
  int32_t index;
  explicit Where(const Tensor& t) : cuda(t.is_cuda()), index(t.get_device_index()) {}
  bool holds(const Tensor& t) const { return cuda ? t.is_cuda() && t.get_device_index() == index : t.is_cpu(); }
  std::string name() const { return cuda ? "cuda:" + std::to_string(index) : "the CPU"; }
};

inline int32_t storage_of(const Tensor& t, const char* op, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  op, ": ", name, " must be float32, float64, bfloat16 or float16");
  return kind_of(t, false, op, 0);
}

inline NoiseKey key_of(int64_t seed, int64_t step, int64_t tensor_id, const char* op) {
  constexpr int64_t kWord = int64_t(1) << 32;
  STD_TORCH_CHECK(step >= 0 && step < kWord, op, ": step must lie in [0, 2^32), is ", step);
  STD_TORCH_CHECK(tensor_id >= 0 && tensor_id < kWord, op, ": tensor_id must lie in [0, 2^32), is ", tensor_id);
  return {uint64_t(seed), uint32_t(step), uint32_t(tensor_id)};
}

template <class X>
const X* optional_data(const MaybeTensor& t, ScalarType dtype, const Where& where, size_t i, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(where.holds(*t) && t->scalar_type() == dtype && t->is_contiguous(), "demp_update_: ", name, "[", i,
                  "] must be contiguous on ", where.name(), ", ", dtype == ScalarType::Byte ? "uint8" : "int64");
  return static_cast<const X*>(t->const_data_ptr());
}

inline void check_size(const MaybeTensor& t, int64_t n, size_t i, const char* name) {
  STD_TORCH_CHECK(!t || t->numel() == n, "demp_update_: ", name, "[", i, "] needs ", n, " entries, has ",
                  t ? t->numel() : 0);
}

struct NoiseLists {
  const TensorList& params;
  const MaybeList &row_live, &col_live, &rows, &cols;
  const std::vector<int64_t>&orig_cols, &tensor_ids;

  void check_lengths() const {
    const size_t n = params.size();
    for (size_t size :
         {row_live.size(), col_live.size(), rows.size(), cols.size(), orig_cols.size(), tensor_ids.size()})
      STD_TORCH_CHECK(size == n, "demp_update_: lists differ in length: ", n, " params, a list of ", size);
  }
};

// Parameter i. What stands in rows and cols is not looked at: it is in no address.
inline NoiseRows noise_rows(const NoiseLists& in, size_t i, NoiseKey key, const Where& where) {
  const Tensor& p = in.params[i];
  STD_TORCH_CHECK(where.holds(p) && p.is_contiguous(), "demp_update_: params[", i, "] must be contiguous on ",
                  where.name());
  NoiseRows to{};
  to.data = const_cast<void*>(p.const_data_ptr());
  to.kind = kind_of(p, false, "demp_update_", i);
  to.rows = p.dim() ? p.size(0) : 1;
  to.columns = to.rows ? p.numel() / to.rows : 0;
  to.groups = in.cols[i] && in.cols[i]->dim() == 2 ? in.cols[i]->size(0) : 1;
  to.original_columns = in.orig_cols[i];
  to.key = key;
  STD_TORCH_CHECK(to.groups > 0 && to.rows % to.groups == 0, "demp_update_: cols[", i, "] has ", to.groups,
                  " lines, which do not divide the ", to.rows, " rows of params[", i, "]");
  check_size(in.row_live[i], to.rows, i, "row_live");
  check_size(in.col_live[i], to.columns, i, "col_live");
  check_size(in.rows[i], to.rows, i, "rows");
  check_size(in.cols[i], to.groups * to.columns, i, "cols");
  to.row_live = optional_data<uint8_t>(in.row_live[i], ScalarType::Byte, where, i, "row_live");
  to.column_live = optional_data<uint8_t>(in.col_live[i], ScalarType::Byte, where, i, "col_live");
  to.row_of = optional_data<int64_t>(in.rows[i], ScalarType::Long, where, i, "rows");
  to.column_of = optional_data<int64_t>(in.cols[i], ScalarType::Long, where, i, "cols");
  STD_TORCH_CHECK(to.column_of || to.columns <= to.original_columns, "demp_update_: orig_cols[", i,
                  "] = ", to.original_columns, " is less than the ", to.columns, " columns of params[", i, "]");
  return to;
}

// Sigma and the step where they lie beside the parameters, null where they came as numbers.
inline const double* numbers_of(const MaybeTensor& numbers, const Where& where) {
  if (!numbers) return nullptr;
  STD_TORCH_CHECK(where.holds(*numbers), "demp_update_: numbers must be on ", where.name(), " with the parameters");
  check_vector(*numbers, ScalarType::Double, 2, "demp_update_", "numbers");
  return static_cast<const double*>(numbers->const_data_ptr());
}

inline Criterion criterion_of(const std::string& name) {
  for (auto [known, criterion] : {std::pair{"ever_active", Criterion::ever_active},
                                  {"abs_max", Criterion::abs_max},
                                  {"sum_le", Criterion::sum_le},
                                  {"dormant", Criterion::dormant}})
    if (name == known) return criterion;
  STD_TORCH_CHECK(false, "active_flags_: criterion '", name, "' is none of ever_active, abs_max, sum_le, dormant");
  return Criterion::ever_active;
}

// Dims [from, to) as one: false where their strides do not allow it. A dim of one element has no stride.
inline bool merge(const Tensor& t, int64_t from, int64_t to, int64_t& size, int64_t& stride) {
  size = 1;
  stride = 1;
  for (int64_t d = to - 1; d >= from; --d) {
    if (t.size(d) == 1) continue;
    if (size == 1)
      stride = t.stride(d);
    else if (t.stride(d) != stride * size)
      return false;
    size *= t.size(d);
  }
  return true;
}

// Whether the kernels can read y as it lies.
inline bool is_readable(const Tensor& y, int64_t dim, Activation& to) {
  to.data = y.const_data_ptr();
  to.channels = y.size(dim);
  to.channel_stride = to.channels > 1 ? y.stride(dim) : 1;
  if (!merge(y, 0, dim, to.outer, to.outer_stride) || !merge(y, dim + 1, y.dim(), to.inner, to.inner_stride))
    return false;
  if (to.inner == 1 && (to.channel_stride != 1 || to.channels == 1)) {
    // [M, C] transposed: the values of a channel are a plane, spread over what was outside.
    std::swap(to.outer, to.inner);
    std::swap(to.outer_stride, to.inner_stride);
  }
  if (to.inner == 1) to.inner_stride = to.channel_stride == 1 ? 0 : 1;
  return to.inner_stride == 1 || to.channel_stride == 1;
}

// The activation as the kernels read it; `y` becomes a copy where they cannot read it as it lies.
inline Activation activation_of(Tensor& y, const Tensor& flags, const Tensor& count, int64_t channel_dim) {
  const char* op = "active_flags_";
  const int64_t dims = y.dim(), dim = channel_dim < 0 ? channel_dim + dims : channel_dim;
  STD_TORCH_CHECK(dim >= 0 && dim < dims, op, ": channel_dim = ", channel_dim, " is no dim of y, which has ", dims);
  const Where where(y);
  STD_TORCH_CHECK(where.holds(flags) && where.holds(count), op, ": flags and count must be on ", where.name(),
                  " with y");
  STD_TORCH_CHECK(flags.scalar_type() == ScalarType::Byte && flags.is_contiguous() && flags.numel() == y.size(dim), op,
                  ": flags must be contiguous uint8 with one entry for each of the ", y.size(dim), " channels, has ",
                  flags.numel());
  check_vector(count, ScalarType::Long, 1, op, "count");
  Activation view{};
  view.kind = storage_of(y, op, "y");
  if (!is_readable(y, dim, view)) {
    y = torch::stable::contiguous(y);
    is_readable(y, dim, view);
  }
  return view;
}

}  // namespace torsion
