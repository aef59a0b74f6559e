// DemP's ops on CUDA (arXiv 2403.07688): kernels and launches without torch, the CPU's bits.
//
//   normals   out[e] = xi(e)                                          the bytes of `out`
//   noise     p[r, c] += sigma xi(row_of[r] K + column_of[c])         8 bytes per live float32 element, masks and indices
//   flags     flags[c] = 1 where channel c is live                    dead channels in full, of others what comes before
//                                                                     their first hit, in parts of 2 KB
//
// Everything a launch needs is in its parameters, so that a captured graph keeps it. No atomics; what two warps may both
// store is the same 1.
#pragma once
#include "engine/demp.h"
#include "engine/launch.cuh"
#include "rules/demp.h"

namespace torsion::cuda {

// Elements a thread holds at once: whole Philox blocks, whole 128-bit accesses.
template <class T>
constexpr int kVector = sizeof(T) == 2 ? 8 : 4;
template <class T>
constexpr int kQuads = kVector<T> * int(sizeof(T)) / 16;

// A thread's elements in memory; `whole`: aligned, and all of them are there.
template <class T>
__device__ __forceinline__ void load_elements(const T* from, bool whole, int count, T (&x)[kVector<T>]) {
  if (whole) {
    uint4 quad[kQuads<T>];
#pragma unroll
    for (int j = 0; j < kQuads<T>; ++j) quad[j] = __ldcs(reinterpret_cast<const uint4*>(from) + j);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) memcpy(&x[v], reinterpret_cast<const char*>(quad) + v * sizeof(T), sizeof(T));
    return;
  }
#pragma unroll
  for (int v = 0; v < kVector<T>; ++v)
    if (v < count) x[v] = from[v];
}

template <class T>
__device__ __forceinline__ void store_elements(T* to, bool whole, int count, const T (&x)[kVector<T>]) {
  if (whole) {
    uint4 quad[kQuads<T>];
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) memcpy(reinterpret_cast<char*>(quad) + v * sizeof(T), &x[v], sizeof(T));
#pragma unroll
    for (int j = 0; j < kQuads<T>; ++j) __stcs(reinterpret_cast<uint4*>(to) + j, quad[j]);
    return;
  }
#pragma unroll
  for (int v = 0; v < kVector<T>; ++v)
    if (v < count) to[v] = x[v];
}

inline int64_t blocks_of(int64_t work, int64_t max_blocks) { return std::max<int64_t>(1, std::min(work, max_blocks)); }

// ------------------------------------------------------------------------------------------------------------ normals

// Of the elements first ... first + V - 1, first a multiple of 4.
template <class R, int V>
__device__ __forceinline__ void draw_neighbours(NoiseKey key, int64_t first, R (&normal)[V]) {
#pragma unroll
  for (int v = 0; v < V; v += 4) {
    R four[4];
    normals_of_block(key.seed, uint64_t(first + v) >> 2, key.step, key.tensor_id, four);
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) normal[v + lane] = four[lane];
  }
}

template <class T, int Threads>
__global__ void __launch_bounds__(Threads) normal_kernel(T* out, int64_t n, NoiseKey key, bool aligned) {
  constexpr int V = kVector<T>;
  const int64_t stride = int64_t(gridDim.x) * Threads * V;
  for (int64_t i = (int64_t(blockIdx.x) * Threads + threadIdx.x) * V; i < n; i += stride) {
    Maths<T> normal[V];
    draw_neighbours(key, i, normal);
    T x[V];
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = Narrow<T>::nearest(normal[v]);
    const int count = n - i < V ? int(n - i) : V;
    store_elements(out + i, aligned && count == V, count, x);
  }
}

template <class T, int Threads>
void write_normals(void* out, int64_t n, NoiseKey key, int64_t max_blocks, cudaStream_t stream) {
  if (n == 0) return;
  const int64_t per_block = Threads * kVector<T>;
  launch<Threads>(normal_kernel<T, Threads>, blocks_of((n + per_block - 1) / per_block, max_blocks), stream,
                  static_cast<T*>(out), n, key, reinterpret_cast<uintptr_t>(out) % 16 == 0);
}

// `kind` is one of the four that do not round at random.
template <int Threads = kThreads>
void fill_normals(void* out, int32_t kind, int64_t n, NoiseKey key, int64_t max_blocks, cudaStream_t stream) {
  constexpr decltype(&write_normals<float, Threads>) kWrite[] = {
      write_normals<float, Threads>, write_normals<double, Threads>, write_normals<bf16, Threads>,
      write_normals<f16, Threads>};
  kWrite[kind](out, n, key, max_blocks, stream);
}

// -------------------------------------------------------------------------------------------------------------- noise

// NoiseRows as a kernel reads them.
struct NoiseEntry {
  void* data;
  const uint8_t *row_live, *column_live;
  const int64_t *row_of, *column_of;
  int64_t n, columns, original_columns;
  int64_t group_rows;  // rows that share a line of column_of
  int64_t first_piece;
  uint32_t tensor_id;
  bool aligned;
  bool whole;  // element i is element i of the uncut tensor, and live
};

constexpr int64_t kNoisePiece = 8192;  // elements a block takes at a time, a multiple of every kVector

// Parameters of one launch: entries of one storage type.
struct NoiseParcel {
  static constexpr int kEntries = 46;
  NoiseEntry entry[kEntries];
  const double* numbers;  // sigma and step, where only the device knows them; else null
  double sigma;
  uint64_t seed;
  int64_t pieces;
  uint32_t step;
  int32_t count;
};
static_assert(sizeof(NoiseParcel) <= 4096, "kernel parameters");

__device__ __forceinline__ int entry_of(const NoiseParcel& parcel, int64_t piece) {
  int low = 0, high = parcel.count;  // of the entries from `high` on none begins at or before the piece
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (parcel.entry[middle].first_piece <= piece)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The row that a thread is in.
struct NoiseLine {
  bool live;
  int64_t base;           // number of its first element in the uncut tensor
  const int64_t* column;  // numbers of its columns there; null: their own
  __device__ __forceinline__ NoiseLine(const NoiseEntry& entry, int64_t row)
      : live(!entry.row_live || entry.row_live[row]),
        base((entry.row_of ? entry.row_of[row] : row) * entry.original_columns),
        column(entry.column_of ? entry.column_of + row / entry.group_rows * entry.columns : nullptr) {}
};

// Which elements of the uncut tensor a thread's are, and a bit for each that is live.
template <int V>
struct NoiseElements {
  int64_t at[V];
  unsigned live = 0;

  // `begin` of the piece is element (row, column); the thread's lie `offset` further on.
  __device__ __forceinline__ NoiseElements(const NoiseEntry& entry, int64_t row, int64_t column, int offset,
                                           int count) {
    int64_t c = column + offset;
    // A piece is shorter than a row of 2^31: at most one row further, which spares a division of 64 bits.
    const int64_t ahead =
        entry.columns <= INT32_MAX ? int64_t(uint32_t(c) / uint32_t(entry.columns)) : c >= entry.columns;
    int64_t r = row + ahead;
    c -= ahead * entry.columns;
    NoiseLine line(entry, r);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      at[v] = 0;
      if (v >= count) continue;
      if (c == entry.columns) {
        c = 0;
        line = NoiseLine(entry, ++r);
      }
      if (line.live && (!entry.column_live || entry.column_live[c])) {
        live |= 1u << v;
        at[v] = line.base + (line.column ? line.column[c] : c);
      }
      ++c;
    }
  }

  // Calls draw(block) once for each run of live elements in one block of 1 << Shift, give(v, lane) for each of them.
  template <int Shift, class Draw, class Give>
  __device__ __forceinline__ void by_blocks(Draw draw, Give give) const {
    unsigned left = live;
    while (left) {
      int64_t block = 0;
#pragma unroll
      for (int v = V - 1; v >= 0; --v)
        if (left >> v & 1) block = at[v] >> Shift;
      draw(uint64_t(block));
#pragma unroll
      for (int v = 0; v < V; ++v)
        if ((left >> v & 1) && at[v] >> Shift == block) {
          give(v, int(at[v]) & ((1 << Shift) - 1));
          left &= ~(1u << v);
        }
    }
  }
};

template <class R>
__device__ __forceinline__ R one_of(const R (&four)[4], int lane) {
  const R low = lane & 1 ? four[1] : four[0], high = lane & 1 ? four[3] : four[2];
  return lane & 2 ? high : low;
}

// The noise of a thread's elements, and for the 16-bit types the bits that round them.
template <class T>
struct NoiseDraw {
  static constexpr int V = kVector<T>;
  static constexpr bool kRounded = sizeof(T) == 2;
  using R = Maths<T>;
  NoiseKey key;
  R normal[V];
  uint32_t bits[kRounded ? V : 1];

  __device__ __forceinline__ void neighbours(int64_t first) {
    draw_neighbours(key, first, normal);
    if constexpr (kRounded) {
      const Philox block = noise_rounding_block(key.seed, uint64_t(first) >> 3, key.step, key.tensor_id);
#pragma unroll
      for (int v = 0; v < V; ++v) bits[v] = rounding_bits(block, v);
    }
  }

  __device__ __forceinline__ void each(const NoiseElements<V>& e) {
    R four[4];
    e.template by_blocks<2>([&](uint64_t block) { normals_of_block(key.seed, block, key.step, key.tensor_id, four); },
                            [&](int v, int lane) { normal[v] = one_of(four, lane); });
    if constexpr (kRounded) {
      Philox rounding;
      e.template by_blocks<3>(
          [&](uint64_t block) { rounding = noise_rounding_block(key.seed, block, key.step, key.tensor_id); },
          [&](int v, int lane) { bits[v] = rounding_bits(rounding, lane); });
    }
  }

  __device__ __forceinline__ void add(T& p, R sigma, int v) const {
    const R x = demp_noise(widen(p), sigma, normal[v]);
    if constexpr (kRounded)
      p = Narrow<T>::stochastic(x, bits[v]);
    else
      p = x;
  }
};

template <class T, int Threads>
__device__ __forceinline__ void add_to_whole(const NoiseEntry& entry, int64_t begin, int64_t end, NoiseKey key,
                                             Maths<T> sigma) {
  constexpr int V = kVector<T>;
#pragma unroll 1
  for (int64_t i = begin + int64_t(threadIdx.x) * V; i < end; i += Threads * V) {
    T* const at = static_cast<T*>(entry.data) + i;
    const int count = end - i < V ? int(end - i) : V;
    const bool whole = entry.aligned && count == V;
    T p[V];
    load_elements(at, whole, count, p);
    NoiseDraw<T> draw{key};
    draw.neighbours(i);
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (v < count) draw.add(p[v], sigma, v);
    store_elements(at, whole, count, p);
  }
}

template <class T, int Threads>
__device__ __forceinline__ void add_to_live(const NoiseEntry& entry, int64_t begin, int64_t end, NoiseKey key,
                                            Maths<T> sigma) {
  constexpr int V = kVector<T>;
  const int64_t row = begin / entry.columns, column = begin - row * entry.columns;
#pragma unroll 1
  for (int offset = int(threadIdx.x) * V; offset < end - begin; offset += Threads * V) {
    T* const at = static_cast<T*>(entry.data) + begin + offset;
    const int64_t left = end - begin - offset;
    const int count = left < V ? int(left) : V;
    const NoiseElements<V> elements(entry, row, column, offset, count);
    if (!elements.live) continue;
    const bool whole = entry.aligned && count == V;
    T p[V];
    load_elements(at, whole, count, p);
    NoiseDraw<T> draw{key};
    draw.each(elements);
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (elements.live >> v & 1) draw.add(p[v], sigma, v);
    store_elements(at, whole, count, p);
  }
}

// Blocks that the registers must leave room for on a multiprocessor: the most without spilling. The noise of a cut tensor
// takes a block of random numbers for nearly each element, whose latency is for other warps to hide.
template <class T>
constexpr int kResidentNoise = sizeof(T) == 4   ? 4
                               : sizeof(T) == 8 ? 3
                                                : 2;

template <class T, int Threads>
__global__ void __launch_bounds__(Threads, kResidentNoise<T>) noise_kernel(const __grid_constant__ NoiseParcel parcel) {
  const double* numbers = parcel.numbers;
  const double sigma = numbers ? numbers[0] : parcel.sigma;
  if (sigma == 0) return;
  const uint32_t step = numbers ? uint32_t(numbers[1]) : parcel.step;
  for (int64_t piece = blockIdx.x; piece < parcel.pieces; piece += gridDim.x) {
    const NoiseEntry& entry = parcel.entry[entry_of(parcel, piece)];
    const int64_t begin = (piece - entry.first_piece) * kNoisePiece;
    const int64_t end = begin + kNoisePiece < entry.n ? begin + kNoisePiece : entry.n;
    const NoiseKey key{parcel.seed, step, entry.tensor_id};
    if (entry.whole)
      add_to_whole<T, Threads>(entry, begin, end, key, Maths<T>(sigma));
    else
      add_to_live<T, Threads>(entry, begin, end, key, Maths<T>(sigma));
  }
}

inline NoiseEntry entry_for(const NoiseRows& to, int64_t first_piece) {
  NoiseEntry entry{};
  entry.data = to.data;
  entry.row_live = to.row_live;
  entry.column_live = to.column_live;
  entry.row_of = to.row_of;
  entry.column_of = to.column_of;
  entry.n = to.rows * to.columns;
  entry.columns = to.columns;
  entry.original_columns = to.original_columns;
  entry.group_rows = to.rows / to.groups;
  entry.first_piece = first_piece;
  entry.tensor_id = to.key.tensor_id;
  entry.aligned = reinterpret_cast<uintptr_t>(to.data) % 16 == 0;
  entry.whole = !to.row_live && !to.column_live && !to.row_of && !to.column_of && to.columns == to.original_columns;
  return entry;
}

// Of one launch for the parameters of a storage type, or one for every NoiseParcel::kEntries of them. `numbers` on the
// device stand for sigma and the keys' step; seed and step are the same in every key.
template <int Threads = kThreads>
void add_noise(const std::vector<NoiseRows>& all, double sigma, const double* numbers, int64_t max_blocks,
               cudaStream_t stream) {
  constexpr void (*kKernel[])(NoiseParcel) = {noise_kernel<float, Threads>, noise_kernel<double, Threads>,
                                              noise_kernel<bf16, Threads>, noise_kernel<f16, Threads>};
  for (int32_t kind = kF32; kind <= kF16; ++kind) {
    NoiseParcel parcel{};
    auto send = [&] {
      if (parcel.count) launch<Threads>(kKernel[kind], blocks_of(parcel.pieces, max_blocks), stream, parcel);
      parcel.count = 0;
      parcel.pieces = 0;
    };
    parcel.numbers = numbers;
    parcel.sigma = sigma;
    for (const NoiseRows& to : all) {
      if (to.kind != kind || to.rows * to.columns == 0) continue;
      parcel.seed = to.key.seed;
      parcel.step = to.key.step;
      parcel.entry[parcel.count++] = entry_for(to, parcel.pieces);
      parcel.pieces += (to.rows * to.columns + kNoisePiece - 1) / kNoisePiece;
      if (parcel.count == NoiseParcel::kEntries) send();
    }
    send();
  }
}

}  // namespace torsion::cuda
