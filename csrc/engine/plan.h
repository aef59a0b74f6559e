// How a list of tensors is cut into chunks that a runner works through: plain data, no torch, 64-bit sizes.
//
// The chunk is part of the numerics (sums are per chunk, then per tensor, then per scope, in this order), so it is the
// same for every machine, thread count and grid, and never a tuning knob.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace torsion {

constexpr int64_t kChunk = 16384;
constexpr int kMaxStreams = 8;

// Storage of parameter and gradient; state is float, or double with f64. Stochastic kinds round the parameter at random.
enum Kind : int32_t { kF32, kF64, kBF16, kF16, kBF16Stochastic, kF16Stochastic, kKinds };

// A step in one go, or split where other processes must add their sums in between; `closing`: the pass before has left the
// sums of its pieces, with CUDA also the scalars.
enum class Phase : int64_t { whole, reduce, update, closing };

struct Row {
  void* at[kMaxStreams];  // Slots says which stream of a rule each one is
  int64_t n;
  int64_t key;  // number of the first element in the unsharded tensor: where its random numbers start
  int64_t first_piece;
  double weight;  // part of the tensor's sums that this process adds: below 1 where other ranks hold the same elements
  int32_t pieces;
  int32_t kind;
  int32_t tensor;  // slot in `steps` and the random stream
  int32_t scope;
  int32_t group;
  int32_t aligned;  // every pointer is a multiple of 16 bytes
  int32_t scaled;   // a flag that the rule may ask for
  int32_t noise;    // which of the table's NoiseMaps the tensor has, counted from 1; 0: no noise
};

// Where a tensor's noise comes from: seen as [rows, columns], element (r, c) has the noise of element
// row_of[r] * columns + c of the uncut tensor. Null: all rows are live, or where they were.
struct NoiseMap {
  int64_t columns;
  const uint8_t* live;    // [rows]
  const int64_t* row_of;  // [rows]
  int64_t tensor_id;
};

// Which of a row's addresses each stream of a rule takes: rules of one family share a table.
struct Slots {
  int32_t of[kMaxStreams] = {0, 1, 2, 3, 4, 5, 6, 7};
};

struct Piece {
  int32_t row, chunk;
};

enum Skip : int64_t { kGo, kSkip, kSkippedBefore };

// The last outcome of a step, kept on its device so that nobody has to wait for it. Python sees int64[4].
struct Status {
  int64_t skipped;   // steps skipped so far; one that spans several passes counts once
  double grad_norm;  // of all gradients, unscaled, before clipping
  int64_t skip;      // a Skip
  double clip;       // factor of the gradient in this step
};

inline int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }

// A piece's chunk number and a row's piece count are 32 bits; this is where 2^45 elements would be refused.
inline int32_t narrow_count(int64_t n) {
  if (n < 0 || n > INT32_MAX) throw std::overflow_error("torsion: more than 2^31 chunks in one launch table");
  return int32_t(n);
}

struct Table {
  std::vector<Row> rows;      // those of a scope side by side
  std::vector<Piece> pieces;  // those of a kind side by side, a row's in order
  std::vector<int32_t> scope_first;
  std::vector<int32_t> row_of;  // slot -> row, -1 where the slot has none
  std::vector<NoiseMap> noise;
  int64_t kind_first[kKinds + 1] = {};
  int32_t n_scopes = 0, n_groups = 0;
  std::vector<double> workspace;  // the CPU runner's partial sums and coefficients, kept between steps
  bool dirty = true;              // the image on the device, if any, is older than rows, pieces and scope_first
  // Where the image lies on the device, and where a captured CUDA graph reads one, which is not written again.
  const void* image = nullptr;
  const void* graph_image = nullptr;

  // Sorts the rows by scope, cuts them into pieces, kind by kind. Keeps the given order inside a scope.
  void arrange() {
    std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.scope < b.scope; });
    const int32_t n_rows = narrow_count(int64_t(rows.size()));
    scope_first.assign(n_scopes + 1, n_rows);
    for (int32_t t = n_rows - 1; t >= 0; --t) scope_first[rows[t].scope] = t;
    for (int32_t s = n_scopes - 1; s >= 0; --s) scope_first[s] = std::min(scope_first[s], scope_first[s + 1]);
    row_of.clear();
    for (int32_t t = 0; t < n_rows; ++t) {
      if (rows[t].tensor >= int32_t(row_of.size())) row_of.resize(size_t(rows[t].tensor) + 1, -1);
      row_of[size_t(rows[t].tensor)] = t;
    }
    int64_t total = 0;
    for (const Row& row : rows) total += chunks_of(row.n);
    pieces.clear();
    pieces.reserve(size_t(narrow_count(total)));
    for (int kind = 0; kind < kKinds; ++kind) {
      kind_first[kind] = int64_t(pieces.size());
      for (int32_t t = 0; t < n_rows; ++t) {
        Row& row = rows[t];
        if (row.kind != kind) continue;
        row.first_piece = int64_t(pieces.size());
        row.pieces = narrow_count(chunks_of(row.n));
        for (int32_t c = 0; c < row.pieces; ++c) pieces.push_back({t, c});
      }
    }
    kind_first[kKinds] = int64_t(pieces.size());
  }
};

inline bool is_aligned(const Row& row, int n_streams) {
  uintptr_t all = 0;
  for (int k = 0; k < n_streams; ++k) all |= reinterpret_cast<uintptr_t>(row.at[k]);
  return all % 16 == 0;
}

// Where the parts of a device table lie, in bytes from its start. The image (rows, scope_first, noise) is written by the host;
// the rest is the kernels' own.
struct Layout {
  int64_t rows, scope_first, noise, image_end, pieces, ticket, partial, row_sums, sums, coefficients, hyper, end;
  Layout(const Table& t, int n_sums, int n_coefficients, int n_hyper) {
    int64_t at = 0;
    auto take = [&](int64_t bytes) {
      const int64_t here = at;
      at = (at + bytes + 15) / 16 * 16;
      return here;
    };
    // 16-byte steps keep every part aligned for 128-bit loads.
    rows = take(int64_t(t.rows.size()) * int64_t(sizeof(Row)));
    scope_first = take(int64_t(t.scope_first.size()) * 4);
    noise = take(int64_t(t.noise.size()) * int64_t(sizeof(NoiseMap)));
    image_end = at;
    pieces = take(int64_t(t.pieces.size()) * int64_t(sizeof(Piece)));
    ticket = take(16);  // up to here alike for all rules, which may take turns on one table
    partial = take(int64_t(t.pieces.size()) * n_sums * 8);
    row_sums = take(int64_t(t.rows.size()) * n_sums * 8);
    sums = take((int64_t(t.n_scopes) + 1) * n_sums * 8);
    coefficients = take(int64_t(t.rows.size()) * n_coefficients * 8);
    hyper = take(int64_t(t.n_groups) * n_hyper * 8);
    end = at;
  }
};

}  // namespace torsion
