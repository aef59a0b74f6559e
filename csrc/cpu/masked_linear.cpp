// Forward and backward of a masked linear layer on a CPU, without activation or with ReLU: torch's products and what
// surrounds them. For float32 [M, K] x [N, K], beside the three products of the live sizes:
//
//   gathered   x and the weight twice, the incoming gradient; results spread into full ones, zeros included
//   views      where live units come first nothing but the zeros; bits of ReLU in the pass that spreads
//   dense      the weight copied with zeros in place of what is dead, products of the full sizes; where nearly all live,
//              see ops/_policy.py
#include <torch/csrc/stable/library.h>

#include <utility>

#include "tensors.h"

namespace torsion::cpu {
namespace {

constexpr const char* kOp = "masked_linear";

struct Axis {
  int64_t size, live;
  const int32_t* list;  // null: all
  bool prefix;          // the live ones are the first

  bool whole() const { return live == size; }
  bool listed() const { return !prefix; }
};

Axis axis_of(const MaybeTensor& index, int64_t size, const char* name) {
  if (!index) return {size, size, nullptr, true};
  STD_TORCH_CHECK(
      index->is_cpu() && index->scalar_type() == ScalarType::Int && index->dim() == 1 && index->is_contiguous(), kOp,
      ": ", name, " must be a contiguous CPU tensor of one dim, int32");
  const auto* list = static_cast<const int32_t*>(index->const_data_ptr());
  const int64_t kind = check_index(list, index->numel(), size);
  STD_TORCH_CHECK(kind < 0, kOp, ": ", name, "[", kind, "] = ", list[kind],
                  " is not above its predecessor or not in [0, ", size, ")");
  return {size, index->numel(), list, kind == -2};
}

Tensor columns_aligned(Tensor t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t); }

Tensor narrow(Tensor t, int64_t dim, int64_t live) {
  return t.size(dim) == live ? t : torch::stable::narrow(t, dim, 0, live);
}

Tensor gathered(const Scratch& scratch, const Tensor& t, const Axis* rows, const Axis& columns) {
  const int64_t m = rows ? rows->live : t.size(0);
  Tensor out = scratch.empty(t, m, columns.live);
  const Blocks a = blocks_of(t, kOp, "operand"), b = blocks_of(out, kOp, "operand");
  const Choice choice{rows && !rows->whole() ? rows->list : nullptr, columns.whole() ? nullptr : columns.list};
  const int size = size_of(t, kOp);
  by_rows(b, [&](int64_t begin, int64_t end) { gather(a, b, choice, size, begin, end); });
  return out;
}

Tensor block_of(const Scratch& scratch, const Tensor& weight, const Axis& out, const Axis& inp) {
  if (out.prefix && inp.prefix) return narrow(narrow(weight, 0, out.live), 1, inp.live);
  return gathered(scratch, weight, &out, inp);
}

Tensor columns_of(const Scratch& scratch, const Tensor& t, const Axis& ax) {
  return ax.prefix ? narrow(t, 1, ax.live) : gathered(scratch, t, nullptr, ax);
}

Dead dead_of(const Axis& ax) { return {ax.list, ax.live, ax.size}; }

Dead dead_of(const Axis* rows, int64_t n) { return rows ? dead_of(*rows) : Dead(nullptr, n, n); }

// A copy with zeros in dead columns, and in dead rows.
Tensor zeroed(const Scratch& scratch, const Tensor& t, const Axis* rows, const Axis& columns) {
  Tensor out = scratch.empty(t, t.size(0), t.size(1));
  silence(blocks_of(t, kOp, "operand"), blocks_of(out, kOp, "operand"), dead_of(rows, t.size(0)), dead_of(columns),
          size_of(t, kOp));
  return out;
}

void zero_dead(Tensor& t, const Axis* rows, const Axis& columns) {
  const Blocks b = blocks_of(t, kOp, "result");
  silence(b, b, dead_of(rows, t.size(0)), dead_of(columns), size_of(t, kOp));
}

// Whether a product of the full sizes met nothing in `a` but finite numbers. Zeros in the weight silence what is dead as
// long as it is finite, and what is not shows in every column, for 0 Inf and 0 NaN are NaN: one column tells.
bool met_finite(const Tensor& product) {
  return all_finite(blocks_of(product, kOp, "product"), std::max<int64_t>(1, product.size(1)),
                    kind_of(product, false, kOp, 0));
}

Tensor empty_bits(const Tensor& like, int64_t n) {
  return torch::stable::new_empty(like, {(n + 7) / 8}, ScalarType::Byte);
}

// ReLU and its bits of a contiguous tensor.
Tensor relu(Tensor& z) {
  const int64_t n = z.numel();
  Tensor bits = empty_bits(z, n);
  void* data = z.mutable_data_ptr();
  auto* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const int32_t kind = kind_of(z, false, kOp, 0);
  share((n + kPiece - 1) / kPiece,
        [&](int64_t k) { relu_bits(data, to, kind, k * kPiece, std::min(n, (k + 1) * kPiece)); });
  return bits;
}

// z spread over a whole axis, its ReLU taken and packed on the way: one pass, a few rows at a time.
std::pair<Tensor, Tensor> spread_relu(Tensor& z, const Axis& out) {
  const int64_t m = z.size(0);
  Tensor y = torch::stable::new_empty(z, {m, out.size}), bits = empty_bits(z, z.numel());
  const Blocks a = blocks_of(z, kOp, "z"), b = blocks_of(y, kOp, "y");
  const std::vector<int32_t> place = places(out.list, out.live, out.size);
  auto* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const int size = size_of(z, kOp);
  const int32_t kind = kind_of(z, false, kOp, 0);
  by_rows(b, [&](int64_t begin, int64_t end) {
    relu_bits(a.data, to, kind, begin * out.live, end * out.live);
    scatter(a, b, nullptr, place.data(), size, begin, end);
  });
  return {y, bits};
}

Tensor dense_forward(const Scratch& scratch, const Tensor& x, const Tensor& weight, MaybeTensor bias, const Axis& inp,
                     const Axis& out) {
  if (bias && !out.whole()) {
    const Tensor line = torch::stable::view(torch::stable::contiguous(*bias), {1, out.size});
    bias = torch::stable::view(zeroed(scratch, line, nullptr, out), {out.size});
  }
  const Tensor live = zeroed(scratch, weight, &out, inp);
  Tensor y = torch::stable::new_empty(x, {x.size(0), out.size});
  linear_out(y, x, live, bias);
  if (!met_finite(y)) {
    linear_out(y, zeroed(scratch, x, nullptr, inp), live, bias);
    zero_dead(y, nullptr, out);
  }
  return y;
}

std::tuple<Tensor, Tensor> linear_forward(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor in_idx,
                                          MaybeTensor out_idx, bool with_relu, bool x_compact, bool y_compact,
                                          bool dense) {
  const Axis inp = axis_of(in_idx, weight.size(1), "in_idx"), out = axis_of(out_idx, weight.size(0), "out_idx");
  const Scratch scratch;
  const int64_t m = x.size(0);
  x = columns_aligned(x);
  weight = columns_aligned(weight);
  Tensor none = torch::stable::new_empty(x, {0});
  if (dense && (inp.listed() || out.listed())) {
    Tensor y = dense_forward(scratch, x, weight, bias, inp, out);
    return {y, with_relu ? relu(y) : none};
  }
  const Tensor rows = x_compact ? x : columns_of(scratch, x, inp), w = block_of(scratch, weight, out, inp);
  if (bias && !out.whole()) {
    Tensor line = torch::stable::view(torch::stable::contiguous(*bias), {1, out.size});
    bias = torch::stable::view(columns_of(scratch, line, out), {out.live});
  }
  if (y_compact || out.whole()) {
    Tensor y = torch::stable::new_empty(x, {m, out.live});
    linear_out(y, rows, w, bias);
    return {y, with_relu ? relu(y) : none};
  }
  if (out.prefix && (!with_relu || dense)) {
    Tensor y = torch::stable::new_empty(x, {m, out.size});
    linear_out(narrow(y, 1, out.live), rows, w, bias);
    Tensor rest = torch::stable::narrow(y, 1, out.live, out.size - out.live);
    torch::stable::zero_(rest);
    return {y, with_relu ? relu(y) : none};
  }
  Tensor z = scratch.empty(x, m, out.live);
  linear_out(z, rows, w, bias);
  if (with_relu) return spread_relu(z, out);
  Tensor y = torch::stable::new_empty(x, {m, out.size});
  const Blocks a = blocks_of(z, kOp, "z"), b = blocks_of(y, kOp, "y");
  const std::vector<int32_t> place = places(out.list, out.live, out.size);
  const int size = size_of(z, kOp);
  by_rows(b, [&](int64_t begin, int64_t end) { scatter(a, b, nullptr, place.data(), size, begin, end); });
  return {y, none};
}

// dy where the bits are set.
Tensor kept(const Scratch& scratch, Tensor dy, const Tensor& bits) {
  dy = torch::stable::contiguous(dy);
  Tensor dz = scratch.empty(dy, dy.size(0), dy.size(1));
  const int64_t n = dy.numel();
  check_vector(bits, ScalarType::Byte, (n + 7) / 8, kOp, "saved");
  const int size = size_of(dy, kOp);
  const void* from = dy.const_data_ptr();
  void* to = dz.mutable_data_ptr();
  const auto* b = static_cast<const uint8_t*>(bits.const_data_ptr());
  share((n + kPiece - 1) / kPiece,
        [&](int64_t k) { keep_bits(from, to, b, size, k * kPiece, std::min(n, (k + 1) * kPiece)); });
  return dz;
}

// Live columns of dy where the bits are set: one pass, a few rows at a time.
Tensor gathered_kept(const Scratch& scratch, const Tensor& dy, const Axis& out, const Tensor& bits) {
  Tensor dz = scratch.empty(dy, dy.size(0), out.live);
  check_vector(bits, ScalarType::Byte, (dz.numel() + 7) / 8, kOp, "saved");
  const Blocks a = blocks_of(dy, kOp, "dy"), b = blocks_of(dz, kOp, "dz");
  const auto* from = static_cast<const uint8_t*>(bits.const_data_ptr());
  const int size = size_of(dy, kOp);
  by_rows(b, [&](int64_t begin, int64_t end) {
    gather(a, b, {nullptr, out.list}, size, begin, end);
    keep_bits(b.data, b.data, from, size, begin * out.live, end * out.live);
  });
  return dz;
}

// a @ b, spread over whole axes.
Tensor product(const Scratch& scratch, const Tensor& a, const Tensor& b, const Axis* rows, const Axis& columns) {
  const int64_t m = rows ? rows->size : a.size(0), live = rows ? rows->live : m;
  Tensor full = torch::stable::new_empty(a, {m, columns.size});
  if (columns.prefix && (!rows || rows->prefix)) {
    mm_out(narrow(narrow(full, 0, live), 1, columns.live), a, b);
    const Blocks to = blocks_of(full, kOp, "result");
    const int size = size_of(full, kOp);
    by_rows(to, [&](int64_t begin, int64_t end) { zero_beyond(to, live, columns.live, size, begin, end); });
    return full;
  }
  Tensor compact = scratch.empty(a, live, columns.live);
  mm_out(compact, a, b);
  const Blocks from = blocks_of(compact, kOp, "product"), to = blocks_of(full, kOp, "result");
  std::vector<int32_t> row_place, column_place;
  if (rows && !rows->whole()) row_place = places(rows->list, rows->live, rows->size);
  if (!columns.whole()) column_place = places(columns.list, columns.live, columns.size);
  const int size = size_of(full, kOp);
  by_rows(to, [&](int64_t begin, int64_t end) {
    scatter(from, to, rows && !rows->whole() ? row_place.data() : nullptr,
            columns.whole() ? nullptr : column_place.data(), size, begin, end);
  });
  return full;
}

Tensor column_sums(const Tensor& dz) {
  const int64_t first[] = {0};
  return torch::stable::sum(dz, torch::headeronly::IntHeaderOnlyArrayRef(first, 1));
}

struct Wanted {
  bool x, weight, bias;
};

std::tuple<Tensor, Tensor, Tensor> dense_backward(const Scratch& scratch, const Tensor& dy, const Tensor& x,
                                                  const Tensor& weight, const Tensor& bits, const Axis& inp,
                                                  const Axis& out, bool with_relu, Wanted wanted) {
  Tensor dx = torch::stable::new_empty(dy, {0}), dw = dx, db = dx;
  const Tensor dz = with_relu ? kept(scratch, dy, bits) : dy;
  if (wanted.x) {
    const Tensor live = zeroed(scratch, weight, &out, inp);
    dx = torch::stable::new_empty(dy, {dz.size(0), inp.size});
    mm_out(dx, dz, live);
    if (!met_finite(dx)) {
      mm_out(dx, zeroed(scratch, dz, nullptr, out), live);
      zero_dead(dx, nullptr, inp);
    }
  }
  // Here what is dead meets itself alone.
  if (wanted.weight) {
    dw = torch::stable::new_empty(dy, {out.size, inp.size});
    mm_out(dw, torch::stable::transpose(dz, 0, 1), x);
    zero_dead(dw, &out, inp);
  }
  if (wanted.bias) {
    db = column_sums(dz);
    Tensor line = torch::stable::view(db, {1, out.size});
    zero_dead(line, nullptr, out);
  }
  return {dx, dw, db};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor bits, MaybeTensor in_idx,
                                                   MaybeTensor out_idx, bool with_relu, bool x_compact, bool y_compact,
                                                   bool dense, bool want_x, bool want_weight, bool want_bias) {
  const Axis inp = axis_of(in_idx, weight.size(1), "in_idx"), out = axis_of(out_idx, weight.size(0), "out_idx");
  const Wanted wanted{want_x, want_weight, want_bias};
  const Scratch scratch;
  x = columns_aligned(x);
  weight = columns_aligned(weight);
  dy = columns_aligned(dy);
  if (dense && (inp.listed() || out.listed()))
    return dense_backward(scratch, dy, x, weight, bits, inp, out, with_relu, wanted);
  Tensor dz = dy;
  if (y_compact || out.whole())
    dz = with_relu ? kept(scratch, dy, bits) : dy;
  else if (!with_relu)
    dz = columns_of(scratch, dy, out);
  else
    dz = dense ? narrow(kept(scratch, dy, bits), 1, out.live) : gathered_kept(scratch, dy, out, bits);
  const Axis own{inp.live, inp.live, nullptr, true};
  Tensor dx = torch::stable::new_empty(dy, {0}), dw = dx, db = dx;
  if (wanted.x) dx = product(scratch, dz, block_of(scratch, weight, out, inp), nullptr, x_compact ? own : inp);
  if (wanted.weight)
    dw = product(scratch, torch::stable::transpose(dz, 0, 1), x_compact ? x : columns_of(scratch, x, inp), &out, inp);
  if (wanted.bias) {
    const Tensor sums = column_sums(dz);
    db = torch::stable::new_empty(dy, {out.size});
    const size_t size = size_t(size_of(db, kOp));
    const auto* from = static_cast<const char*>(sums.const_data_ptr());
    auto* to = static_cast<char*>(db.mutable_data_ptr());
    memset(to, 0, size_t(out.size) * size);
    for (int64_t k = 0; k < out.live; ++k)
      memcpy(to + size_t(out.prefix ? k : out.list[k]) * size, from + size_t(k) * size, size);
  }
  return {dx, dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torsion, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace torsion::cpu
