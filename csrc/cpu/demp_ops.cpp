// philox_normal_, demp_update_ and active_flags_ on a CPU: arguments in, checks, pieces for the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "demp.h"
#include "engine/arguments.h"
#include "engine/types.h"
#include "flags.h"
#include "share.h"

namespace torsion::cpu {
namespace {

using MaybeList = std::vector<MaybeTensor>;

constexpr int64_t kPiece = 1 << 16;  // numbers a thread takes at a time

int32_t storage_of(const Tensor& t, const char* op, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  op, ": ", name, " must be float32, float64, bfloat16 or float16");
  return kind_of(t, false, op, 0);
}

NoiseKey key_of(int64_t seed, int64_t step, int64_t tensor_id, const char* op) {
  constexpr int64_t kWord = int64_t(1) << 32;
  STD_TORCH_CHECK(step >= 0 && step < kWord, op, ": step must lie in [0, 2^32), is ", step);
  STD_TORCH_CHECK(tensor_id >= 0 && tensor_id < kWord, op, ": tensor_id must lie in [0, 2^32), is ", tensor_id);
  return {uint64_t(seed), uint32_t(step), uint32_t(tensor_id)};
}

template <class Q, class R>
void write_normals(NoiseKey key, Q* out, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<Q, R>) {
    const int64_t whole = (end - begin) / 4;
    normals(key, uint64_t(begin) / 4, whole, out + begin);
    begin += 4 * whole;
  }
  constexpr int64_t kBuffer = 1024;
  R x[kBuffer];
  for (int64_t i = begin; i < end; i += kBuffer) {
    const int64_t m = std::min(kBuffer, end - i);
    normals(key, uint64_t(i) / 4, (m + 3) / 4, x);
    for (int64_t j = 0; j < m; ++j) out[i + j] = Narrow<Q>::nearest(x[j]);
  }
}

void philox_normal(Tensor out, int64_t seed, int64_t step, int64_t tensor_id) {
  const char* op = "philox_normal";
  const NoiseKey key = key_of(seed, step, tensor_id, op);
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous");
  const int32_t kind = storage_of(out, op, "out");
  const int64_t n = out.numel();
  void* to = out.mutable_data_ptr();
  share((n + kPiece - 1) / kPiece, [&](int64_t k) {
    const int64_t begin = k * kPiece, end = std::min(n, begin + kPiece);
    if (kind == kF32)
      write_normals<float, float>(key, static_cast<float*>(to), begin, end);
    else if (kind == kF64)
      write_normals<double, double>(key, static_cast<double*>(to), begin, end);
    else if (kind == kBF16)
      write_normals<bf16, float>(key, static_cast<bf16*>(to), begin, end);
    else
      write_normals<f16, float>(key, static_cast<f16*>(to), begin, end);
  });
}

template <class X>
const X* optional_data(const MaybeTensor& t, ScalarType dtype, size_t i, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == dtype && t->is_contiguous(), "demp_update_: ", name, "[", i,
                  "] must be a contiguous CPU tensor, ", dtype == ScalarType::Byte ? "uint8" : "int64");
  return static_cast<const X*>(t->const_data_ptr());
}

void check_size(const MaybeTensor& t, int64_t n, size_t i, const char* name) {
  STD_TORCH_CHECK(!t || t->numel() == n, "demp_update_: ", name, "[", i, "] needs ", n, " entries, has ",
                  t ? t->numel() : 0);
}

void check_within(const int64_t* x, int64_t n, int64_t end, size_t i, const char* name) {
  if (!x) return;
  for (int64_t k = 0; k < n; ++k)
    STD_TORCH_CHECK(x[k] >= 0 && x[k] < end, "demp_update_: ", name, "[", i, "] holds ", x[k], ", outside [0, ", end,
                    ")");
}

struct NoiseLists {
  const TensorList& params;
  const MaybeList &row_live, &col_live, &rows, &cols;
  const std::vector<int64_t>&orig_cols, &tensor_ids;
};

NoiseRows noise_rows(const NoiseLists& in, size_t i, NoiseKey key) {
  const Tensor& p = in.params[i];
  STD_TORCH_CHECK(p.is_cpu() && p.is_contiguous(), "demp_update_: params[", i, "] must be a contiguous CPU tensor");
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
  to.row_live = optional_data<uint8_t>(in.row_live[i], ScalarType::Byte, i, "row_live");
  to.column_live = optional_data<uint8_t>(in.col_live[i], ScalarType::Byte, i, "col_live");
  to.row_of = optional_data<int64_t>(in.rows[i], ScalarType::Long, i, "rows");
  to.column_of = optional_data<int64_t>(in.cols[i], ScalarType::Long, i, "cols");
  STD_TORCH_CHECK(to.column_of || to.columns <= to.original_columns, "demp_update_: orig_cols[", i,
                  "] = ", to.original_columns, " is less than the ", to.columns, " columns of params[", i, "]");
  check_within(to.column_of, to.groups * to.columns, to.original_columns, i, "cols");
  const int64_t most = std::numeric_limits<int64_t>::max() / std::max<int64_t>(1, to.original_columns);
  check_within(to.row_of, to.rows, most, i, "rows");
  return to;
}

void demp_update(TensorList params, MaybeList row_live, MaybeList col_live, MaybeList rows, MaybeList cols,
                 std::vector<int64_t> orig_cols, double sigma, int64_t seed, int64_t step,
                 std::vector<int64_t> tensor_ids) {
  const size_t n = params.size();
  for (size_t size : {row_live.size(), col_live.size(), rows.size(), cols.size(), orig_cols.size(), tensor_ids.size()})
    STD_TORCH_CHECK(size == n, "demp_update_: lists differ in length: ", n, " params, a list of ", size);
  const NoiseLists in{params, row_live, col_live, rows, cols, orig_cols, tensor_ids};
  struct Piece {
    size_t of;
    int64_t begin, end;
  };
  std::vector<NoiseRows> all;
  std::vector<Piece> pieces;
  for (size_t i = 0; i < n; ++i) {
    all.push_back(noise_rows(in, i, key_of(seed, step, tensor_ids[i], "demp_update_")));
    const NoiseRows& to = all.back();
    if (!to.columns) continue;
    // Whole multiples of eight rows: rows of a piece share the lists of blocks that they need.
    const int64_t rows_each = std::max<int64_t>(8, kPiece / to.columns / 8 * 8);
    for (int64_t r = 0; r < to.rows; r += rows_each) pieces.push_back({i, r, std::min(to.rows, r + rows_each)});
  }
  if (sigma == 0) return;
  share(int64_t(pieces.size()), [&](int64_t k) {
    const Piece& piece = pieces[size_t(k)];
    add_noise(all[piece.of], sigma, piece.begin, piece.end);
  });
}

// Dims [from, to) as one: false where their strides do not allow it. A dim of one element has no stride.
bool merge(const Tensor& t, int64_t from, int64_t to, int64_t& size, int64_t& stride) {
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
bool is_readable(const Tensor& y, int64_t dim, Activation& to) {
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

Criterion criterion_of(const std::string& name) {
  for (auto [known, criterion] : {std::pair{"ever_active", Criterion::ever_active},
                                  {"abs_max", Criterion::abs_max},
                                  {"sum_le", Criterion::sum_le},
                                  {"dormant", Criterion::dormant}})
    if (name == known) return criterion;
  STD_TORCH_CHECK(false, "active_flags_: criterion '", name, "' is none of ever_active, abs_max, sum_le, dormant");
  return Criterion::ever_active;
}

void active_flags(Tensor y, Tensor flags, Tensor count, int64_t channel_dim, std::string criterion, double tau) {
  const char* op = "active_flags_";
  const Criterion by = criterion_of(criterion);
  const int64_t dims = y.dim(), dim = channel_dim < 0 ? channel_dim + dims : channel_dim;
  STD_TORCH_CHECK(dim >= 0 && dim < dims, op, ": channel_dim = ", channel_dim, " is no dim of y, which has ", dims);
  STD_TORCH_CHECK(y.is_cpu() && flags.is_cpu() && count.is_cpu(), op, ": y, flags and count must be on one device");
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
  flag_active(view, by, tau, int(torch::stable::get_num_threads()), static_cast<uint8_t*>(flags.mutable_data_ptr()));
  *static_cast<int64_t*>(count.mutable_data_ptr()) += y.size(0);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torsion, CPU, m) {
  m.impl("philox_normal_", TORCH_BOX(&philox_normal));
  m.impl("demp_update_", TORCH_BOX(&demp_update));
  m.impl("active_flags_", TORCH_BOX(&active_flags));
}

}  // namespace torsion::cpu
