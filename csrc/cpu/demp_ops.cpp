// philox_normal_, demp_update_ and active_flags_ on a CPU: arguments in, checks, pieces for the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "demp.h"
#include "engine/demp_arguments.h"
#include "engine/types.h"
#include "flags.h"
#include "normals.h"
#include "share.h"

namespace torsion::cpu {
namespace {

constexpr int64_t kPiece = 1 << 16;  // numbers a thread takes at a time

template <class Q, class R>
void write_normals(const RoundKeys& keys, Q* out, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<Q, R>) {
    const int64_t whole = (end - begin) / 4;
    normals(keys, uint64_t(begin) / 4, whole, out + begin);
    begin += 4 * whole;
  }
  constexpr int64_t kBuffer = 1024;
  R x[kBuffer];
  for (int64_t i = begin; i < end; i += kBuffer) {
    const int64_t m = std::min(kBuffer, end - i);
    normals(keys, uint64_t(i) / 4, (m + 3) / 4, x);
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

void check_within(const int64_t* x, int64_t n, int64_t end, size_t i, const char* name) {
  if (!x) return;
  for (int64_t k = 0; k < n; ++k)
    STD_TORCH_CHECK(x[k] >= 0 && x[k] < end, "demp_update_: ", name, "[", i, "] holds ", x[k], ", outside [0, ", end,
                    ")");
}

// What the host knows, a wrong index or number, is refused before anything is written.
void check_places(const NoiseRows& to, size_t i) {
  check_within(to.column_of, to.groups * to.columns, to.original_columns, i, "cols");
  const int64_t most = std::numeric_limits<int64_t>::max() / std::max<int64_t>(1, to.original_columns);
  check_within(to.row_of, to.rows, most, i, "rows");
}

void read_numbers(const double* numbers, double& sigma, int64_t& step) {
  if (!numbers) return;
  STD_TORCH_CHECK(std::isfinite(numbers[0]) && numbers[0] >= 0,
                  "demp_update_: sigma must be finite and not negative, is ", numbers[0]);
  STD_TORCH_CHECK(numbers[1] >= 0 && numbers[1] < 0x1p32, "demp_update_: step must lie in [0, 2^32), is ", numbers[1]);
  sigma = numbers[0];
  step = int64_t(numbers[1]);
}

void demp_update(TensorList params, MaybeList row_live, MaybeList col_live, MaybeList rows, MaybeList cols,
                 std::vector<int64_t> orig_cols, double sigma, int64_t seed, int64_t step,
                 std::vector<int64_t> tensor_ids, MaybeTensor numbers) {
  const NoiseLists in{params, row_live, col_live, rows, cols, orig_cols, tensor_ids};
  in.check_lengths();
  if (params.empty()) return;
  const Where where(params[0]);
  read_numbers(numbers_of(numbers, where), sigma, step);
  struct Piece {
    size_t of;
    int64_t begin, end;
  };
  std::vector<NoiseRows> all;
  std::vector<Piece> pieces;
  for (size_t i = 0; i < params.size(); ++i) {
    all.push_back(noise_rows(in, i, key_of(seed, step, tensor_ids[i], "demp_update_"), where));
    const NoiseRows& to = all.back();
    check_places(to, i);
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

void active_flags(Tensor y, Tensor flags, Tensor count, int64_t channel_dim, std::string criterion, double tau) {
  const Criterion by = criterion_of(criterion);
  const int64_t seen = y.dim() ? y.size(0) : 0;
  const Activation view = activation_of(y, flags, count, channel_dim);
  flag_active(view, by, tau, int(torch::stable::get_num_threads()), static_cast<uint8_t*>(flags.mutable_data_ptr()));
  *static_cast<int64_t*>(count.mutable_data_ptr()) += seen;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torsion, CPU, m) {
  m.impl("philox_normal_", TORCH_BOX(&philox_normal));
  m.impl("demp_update_", TORCH_BOX(&demp_update));
  m.impl("active_flags_", TORCH_BOX(&active_flags));
}

}  // namespace torsion::cpu
