// Selecting and spreading blocks of memory: what masked layers need around a dense product, on a CPU. No torch.
//
// A matrix is [rows, columns] of blocks of `inner` numbers: one for a linear layer, kh kw for a filter, H W for a channel.
// A list of rows or columns is ascending; -1 in a list of columns stands for a block of zeros.
#pragma once
#include <cstdint>
#include <vector>

namespace torsion::cpu {

struct Blocks {
  void* data;
  int64_t rows, columns, inner;
  int64_t row_stride;  // numbers; columns and the numbers of a block lie side by side
};

struct Choice {
  const int32_t* rows;     // null: all
  const int32_t* columns;  // null: all
};

// to[a, b] = from[rows[a], columns[b]] for the rows [begin, end) of `to`.
void gather(const Blocks& from, const Blocks& to, Choice choice, int size, int64_t begin, int64_t end);

// The other way round, and zero everywhere else. `place` says for each row of `to` which of `from` it receives, -1: none.
// `column_place` likewise, null: all in order.
void scatter(const Blocks& from, const Blocks& to, const int32_t* place, const int32_t* column_place, int size,
             int64_t begin, int64_t end);

// Zeros where a row lies beyond the first `rows` or a column beyond the first `columns`, for the rows [begin, end).
void zero_beyond(const Blocks& of, int64_t rows, int64_t columns, int size, int64_t begin, int64_t end);

// Which of the listed ones each of n is, -1: none.
std::vector<int32_t> places(const int32_t* list, int64_t listed, int64_t n);

// -1: ascending, unique and within [0, end); -2: 0, 1, 2, ... besides; else the first entry that is none of it.
int64_t check_index(const int32_t* index, int64_t n, int64_t end);

// z = max(z, 0) for the numbers [begin, end), begin a multiple of 8; bit i & 7 of byte i >> 3 says that z was above 0, or
// NaN, whose gradient torch lets through too.
void relu_bits(void* z, uint8_t* bits, int32_t kind, int64_t begin, int64_t end);

// to = from where the bit is set, else 0; both may be one array.
void keep_bits(const void* from, void* to, const uint8_t* bits, int size, int64_t begin, int64_t end);

// What is dead where the listed units live: a flag for each unit, and the dead ones one after another. A list as long as
// the axis lists all and is not read.
struct Dead {
  std::vector<uint8_t> is;
  std::vector<int64_t> list;
  Dead(const int32_t* live, int64_t listed, int64_t size);
};

// to = from with zeros in dead rows and columns, for the rows [begin, end); both may be one matrix.
void silence(const Blocks& from, const Blocks& to, const Dead& rows, const Dead& columns, int size, int64_t begin,
             int64_t end);

// Whether every step-th column of the rows [begin, end) holds no Inf and no NaN.
bool all_finite(const Blocks& of, int64_t step, int32_t kind, int64_t begin, int64_t end);

}  // namespace torsion::cpu
