// The parts of masked layers that are no product, on a CPU: arguments in, checks, pieces for the threads.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "tensors.h"

namespace torsion::cpu {

int size_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return 4;
    case ScalarType::Double:
      return 8;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      STD_TORCH_CHECK(false, op, ": tensors must be float32, float64, bfloat16 or float16");
  }
  return 0;
}

// [rows, columns] or [rows, columns, inner]; only the rows may lie apart.
Blocks blocks_of(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && (t.dim() == 2 || t.dim() == 3), op, ": ", name, " must be a CPU tensor of 2 or 3 dims");
  Blocks b{};
  b.data = const_cast<void*>(t.const_data_ptr());
  b.rows = t.size(0);
  b.columns = t.size(1);
  b.inner = t.dim() == 3 ? t.size(2) : 1;
  b.row_stride = b.rows > 1 ? t.stride(0) : b.columns * b.inner;
  const bool side_by_side =
      t.numel() == 0 || ((b.columns == 1 || t.stride(1) == b.inner) && (b.inner == 1 || t.stride(2) == 1));
  STD_TORCH_CHECK(side_by_side, op, ": columns of ", name, " must lie side by side");
  return b;
}

const int32_t* list_of(const MaybeTensor& t, int64_t end, const char* op, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Int && t->dim() == 1 && t->is_contiguous(), op, ": ",
                  name, " must be a contiguous CPU tensor of one dim, int32");
  const auto* list = static_cast<const int32_t*>(t->const_data_ptr());
  for (int64_t k = 0; k < t->numel(); ++k)
    STD_TORCH_CHECK(list[k] >= -1 && list[k] < end, op, ": ", name, "[", k, "] = ", list[k], " lies outside [0, ", end,
                    ")");
  return list;
}

void silence(const Blocks& from, const Blocks& to, const Dead& rows, const Dead& columns, int size) {
  by_rows(to, [&](int64_t begin, int64_t end) { silence(from, to, rows, columns, size, begin, end); });
}

bool all_finite(const Blocks& of, int64_t step, int32_t kind) {
  // Waking threads takes longer than a look at few numbers.
  if (of.rows * ((of.columns + step - 1) / step) * of.inner <= kPiece) return all_finite(of, step, kind, 0, of.rows);
  std::atomic<bool> all = true;
  by_rows(of, [&](int64_t begin, int64_t end) {
    if (!all_finite(of, step, kind, begin, end)) all = false;
  });
  return all;
}

struct Scratch::Slots {
  std::array<std::vector<char>, kSlots> slot;
  int next = 0;
};

Scratch::Slots& Scratch::slots() {
  thread_local Slots own;
  return own;
}

Scratch::Scratch() { slots().next = 0; }

Tensor Scratch::empty(const Tensor& like, int64_t rows, int64_t columns) const {
  constexpr size_t kLine = 64;
  const size_t bytes = size_t(rows * columns) * size_t(size_of(like, "scratch")) + kLine;
  Slots& own = slots();
  if (bytes > kMost || own.next == kSlots) return torch::stable::new_empty(like, {rows, columns});
  std::vector<char>& slot = own.slot[size_t(own.next++)];
  if (slot.size() < bytes) slot = std::vector<char>(bytes);
  const size_t address = reinterpret_cast<size_t>(slot.data());
  void* data = slot.data() + (kLine - address % kLine) % kLine;
  return torch::stable::from_blob(data, {rows, columns}, {std::max<int64_t>(1, columns), 1}, like.device(),
                                  like.scalar_type());
}

namespace {

Tensor gather_blocks(Tensor from, MaybeTensor rows, MaybeTensor columns) {
  const char* op = "gather_blocks";
  const Blocks a = blocks_of(from, op, "from");
  const Choice choice{list_of(rows, a.rows, op, "rows"), list_of(columns, a.columns, op, "columns")};
  std::vector<int64_t> sizes = {rows ? rows->numel() : a.rows, columns ? columns->numel() : a.columns};
  if (from.dim() == 3) sizes.push_back(a.inner);
  Tensor out = torch::stable::new_empty(from, sizes);
  const Blocks b = blocks_of(out, op, "out");
  const int size = size_of(from, op);
  by_rows(b, [&](int64_t begin, int64_t end) { gather(a, b, choice, size, begin, end); });
  return out;
}

void scatter_blocks(Tensor to, Tensor from, MaybeTensor rows, MaybeTensor columns) {
  const char* op = "scatter_blocks_";
  const Blocks a = blocks_of(from, op, "from"), b = blocks_of(to, op, "to");
  STD_TORCH_CHECK(from.scalar_type() == to.scalar_type() && from.dim() == to.dim() && a.inner == b.inner &&
                      (rows ? rows->numel() : b.rows) == a.rows &&
                      (columns ? columns->numel() : b.columns) == a.columns,
                  op, ": from has the wrong dtype or sizes");
  std::vector<int32_t> row_place, column_place;
  if (rows) row_place = places(list_of(rows, b.rows, op, "rows"), a.rows, b.rows);
  if (columns) column_place = places(list_of(columns, b.columns, op, "columns"), a.columns, b.columns);
  const int size = size_of(to, op);
  by_rows(b, [&](int64_t begin, int64_t end) {
    scatter(a, b, rows ? row_place.data() : nullptr, columns ? column_place.data() : nullptr, size, begin, end);
  });
}

Dead dead_of(const MaybeTensor& live, int64_t size, const char* op, const char* name) {
  const int32_t* list = list_of(live, size, op, name);
  const int64_t n = live ? live->numel() : size;
  STD_TORCH_CHECK(!list || check_index(list, n, size) < 0, op, ": ", name, " must be ascending, without repetitions");
  return {list, n, size};
}

void silence_into(const Tensor& from, const Tensor& to, const MaybeTensor& rows, const MaybeTensor& columns,
                  const char* op) {
  const Blocks a = blocks_of(from, op, "from"), b = blocks_of(to, op, "to");
  const Dead row = dead_of(rows, a.rows, op, "rows"), column = dead_of(columns, a.columns, op, "columns");
  silence(a, b, row, column, size_of(to, op));
}

Tensor silenced_blocks(Tensor from, MaybeTensor rows, MaybeTensor columns) {
  std::vector<int64_t> sizes(from.sizes().begin(), from.sizes().end());
  Tensor out = torch::stable::new_empty(from, sizes);
  silence_into(from, out, rows, columns, "silenced_blocks");
  return out;
}

void silence_blocks(Tensor t, MaybeTensor rows, MaybeTensor columns) {
  silence_into(t, t, rows, columns, "silence_blocks_");
}

// Whether the first channel of each group of [B, C, H, W] is finite.
bool met_finite(Tensor t, int64_t groups) {
  const char* op = "met_finite";
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && groups >= 1 && t.size(1) % groups == 0, op,
                  ": t must be a CPU tensor [B, C, H, W], groups must divide C");
  const int64_t images = t.size(0), channels = t.size(1), pixels = t.size(2) * t.size(3);
  const bool last = t.stride(1) == 1 && t.stride(3) == channels && t.stride(2) == channels * t.size(3) &&
                    t.stride(0) == channels * pixels;
  if (!last) t = torch::stable::contiguous(t);
  Blocks b{const_cast<void*>(t.const_data_ptr()), images, channels, pixels, channels * pixels};
  if (last) b = {b.data, images * pixels, channels, 1, channels};
  return all_finite(b, std::max<int64_t>(1, channels / groups), kind_of(t, false, op, 0));
}

int64_t index_kind(Tensor index, int64_t end) {
  STD_TORCH_CHECK(index.is_cpu() && index.scalar_type() == ScalarType::Int && index.dim() == 1 && index.is_contiguous(),
                  "index_kind: index must be a contiguous CPU tensor of one dim, int32");
  return check_index(static_cast<const int32_t*>(index.const_data_ptr()), index.numel(), end);
}

Tensor relu_bits_op(Tensor z) {
  const char* op = "relu_bits_";
  STD_TORCH_CHECK(z.is_cpu() && is_dense(z), op, ": z must be a CPU tensor without holes");
  size_of(z, op);
  const int64_t n = z.numel();
  Tensor bits = torch::stable::new_empty(z, {(n + 7) / 8}, ScalarType::Byte);
  void* data = z.mutable_data_ptr();
  auto* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const int32_t kind = kind_of(z, false, op, 0);
  share((n + kPiece - 1) / kPiece,
        [&](int64_t k) { relu_bits(data, to, kind, k * kPiece, std::min(n, (k + 1) * kPiece)); });
  return bits;
}

void keep_bits_op(Tensor dz, Tensor bits) {
  const char* op = "keep_bits_";
  const int64_t n = dz.numel();
  STD_TORCH_CHECK(dz.is_cpu() && is_dense(dz), op, ": dz must be a CPU tensor without holes");
  check_vector(bits, ScalarType::Byte, (n + 7) / 8, op, "bits");
  const int size = size_of(dz, op);
  void* data = dz.mutable_data_ptr();
  const auto* from = static_cast<const uint8_t*>(bits.const_data_ptr());
  share((n + kPiece - 1) / kPiece,
        [&](int64_t k) { keep_bits(data, data, from, size, k * kPiece, std::min(n, (k + 1) * kPiece)); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torsion, CPU, m) {
  m.impl("gather_blocks", TORCH_BOX(&gather_blocks));
  m.impl("scatter_blocks_", TORCH_BOX(&scatter_blocks));
  m.impl("silenced_blocks", TORCH_BOX(&silenced_blocks));
  m.impl("silence_blocks_", TORCH_BOX(&silence_blocks));
  m.impl("met_finite", TORCH_BOX(&met_finite));
  m.impl("index_kind", TORCH_BOX(&index_kind));
  m.impl("relu_bits_", TORCH_BOX(&relu_bits_op));
  m.impl("keep_bits_", TORCH_BOX(&keep_bits_op));
}

}  // namespace torsion::cpu
