// Tensors, lists of live units and products of torch, as the masked layers need them on a CPU.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <array>

#include "blocks.h"
#include "engine/arguments.h"
#include "share.h"

namespace torsion::cpu {

constexpr int64_t kPiece = 1 << 16;  // numbers a thread takes at a time

int size_of(const Tensor& t, const char* op);

// [rows, columns] or [rows, columns, inner]; only the rows may lie apart.
Blocks blocks_of(const Tensor& t, const char* op, const char* name);

// A list of ascending, unique units, or -1 in between where `padded`; null: all.
const int32_t* list_of(const MaybeTensor& t, int64_t end, const char* op, const char* name);

// Calls work(begin, end) on parts of the rows of `to`, multiples of eight, for bits are packed by eights.
template <class Work>
void by_rows(const Blocks& to, Work work) {
  const int64_t each = std::max<int64_t>(8, kPiece / std::max<int64_t>(1, to.columns * to.inner) / 8 * 8);
  share((to.rows + each - 1) / each, [&](int64_t k) { work(k * each, std::min(to.rows, (k + 1) * each)); });
}

// silence() of whole matrices, by several threads.
void silence(const Blocks& from, const Blocks& to, const Dead& rows, const Dead& columns, int size);

// Whether every step-th column is finite, by several threads.
bool all_finite(const Blocks& of, int64_t step, int32_t kind);

// Tensors that live for one call, in memory that a thread keeps from call to call: fresh pages cost as much as what is
// done with them (0.4 ms for 4 MB). One at the beginning of an op, which then must not call another that has one.
class Scratch {
 public:
  Scratch();

  // Uninitialised [rows, columns] of the dtype of `like`. What is large, or more than kSlots, comes from the heap.
  Tensor empty(const Tensor& like, int64_t rows, int64_t columns) const;

 private:
  static constexpr size_t kMost = size_t(16) << 20;  // bytes of a slot
  static constexpr int kSlots = 6;
  struct Slots;
  static Slots& slots();
};

inline void mm_out(Tensor out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// x @ weight^T + bias
inline void linear_out(Tensor out, const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(weight), from(bias), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace torsion::cpu
