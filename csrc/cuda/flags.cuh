// Which channels of an activation fire (rules of DemP, arXiv 2403.07688), on CUDA, without torch.
//
//   ever_active, abs_max   !(y <= tau) for some y: warps take parts of a channel, the first part of every channel before
//                          any second one, and leave it at its first hit or once another warp has flagged it
//   sum_le, dormant        fp64 sums: lane, warp, part, channel, all channels, in this order, which only the shape enters
//
// Two layouts, each read in the order of memory: planes (NCHW: a warp has one channel) and rows ([M, C], channels_last: a
// lane has the channels of one 128-bit load). NaN counts as a hit. Flags are plain stores of 1, whoever comes first.
#pragma once
#include "engine/cuda.cuh"
#include "engine/demp.h"
#include "engine/launch.cuh"

namespace torsion::cuda {

struct Look {
  Activation y;
  uint8_t* flags;
  int64_t* count;
  int64_t seen;
  double tau;
  double* partial;  // [channels, parts]
  double* sums;     // [channels], of dormant
  int64_t strips;   // channels, in rows of as many channels as `side` lanes hold
  int64_t parts;    // items of a strip, by as many warps
  int64_t rounds;   // of a part, of kUnroll loads each
  int32_t side;     // lanes that lie side by side in a plane or row, a power of two; the others take the next ones
  Criterion criterion;
  bool vectors;
  __device__ bool magnitudes() const { return criterion == Criterion::abs_max || criterion == Criterion::dormant; }
};

// Elements of a 128-bit load, and loads that a lane issues before it uses one.
template <class T>
constexpr int kWidth = 16 / int(sizeof(T));
constexpr int unroll_of(int width) { return width == 1 ? 8 : 4; }

template <int Threads>
__device__ __forceinline__ bool any_in_warp(bool x) {
  if constexpr (Shape<Threads>::lanes == 1)
    return x;
  else
    return __any_sync(0xffffffffu, x);
}

template <class T, int Width>
__device__ __forceinline__ void read(const T* from, T (&x)[Width]) {
  if constexpr (Width == 1) {
    x[0] = *from;
  } else {
    const uint4 quad = __ldcg(reinterpret_cast<const uint4*>(from));
    memcpy(x, &quad, sizeof quad);
  }
}

template <class T>
__device__ __forceinline__ Maths<T> value_of(T y, bool magnitude) {
  const Maths<T> x = widen(y);
  return magnitude ? (x < 0 ? -x : x) : x;
}

// A lane's way through the planes of a channel.
template <class T, int Width>
struct PlaneWalk {
  const Activation& y;
  const T* channel;
  int64_t o, k, step;
  int planes;
  __device__ __forceinline__ PlaneWalk(const Look& look, int64_t c, int64_t first, int lane, int lanes)
      : y(look.y),
        channel(static_cast<const T*>(y.data) + c * y.channel_stride),
        step(int64_t(look.side) * Width),
        planes(lanes / look.side) {
    const int64_t steps = (y.inner + step - 1) / step;  // of a plane
    o = first / steps * planes + lane / look.side;
    k = first % steps * step + lane % look.side * Width;
    lane_ = lane % look.side * Width;
  }
  __device__ __forceinline__ bool inside() const { return o < y.outer && k < y.inner; }
  __device__ __forceinline__ const T* at() const { return channel + o * y.outer_stride + k; }
  __device__ __forceinline__ void next() {
    k += step;
    if (k - lane_ >= y.inner) {
      k = lane_;
      o += planes;
    }
  }

 private:
  int lane_;
};

// The same through the rows, at the channels from c on.
template <class T, int Width>
struct RowWalk {
  const Activation& y;
  const T* channel;
  int64_t o, i;
  int rows;
  __device__ __forceinline__ RowWalk(const Look& look, int64_t c, int64_t first, int lane, int lanes)
      : y(look.y), channel(static_cast<const T*>(y.data) + c), rows(lanes / look.side) {
    const int64_t row = first * rows + lane / look.side;
    o = row / y.inner;
    i = row % y.inner;
  }
  __device__ __forceinline__ bool inside() const { return o < y.outer; }
  __device__ __forceinline__ const T* at() const { return channel + o * y.outer_stride + i * y.inner_stride; }
  __device__ __forceinline__ void next() {
    i += rows;
    while (i >= y.inner) {
      i -= y.inner;
      ++o;
    }
  }
};

// One round of loads, and then use(value, v) for each of their values.
template <class T, int Width, class Walk, class Use>
__device__ __forceinline__ void take_round(Walk& walk, bool magnitude, Use use) {
  constexpr int kUnroll = unroll_of(Width);
  T x[kUnroll][Width];
  unsigned inside = 0;
#pragma unroll
  for (int j = 0; j < kUnroll; ++j) {
    if (walk.inside()) {
      read(walk.at(), x[j]);
      inside |= 1u << j;
    }
    walk.next();
  }
#pragma unroll
  for (int j = 0; j < kUnroll; ++j)
    if (inside >> j & 1)
#pragma unroll
      for (int v = 0; v < Width; ++v) use(value_of(x[j][v], magnitude), v);
}

// Calls work(strip, part) for the items of a warp; the first part of every strip comes before any second one.
template <int Threads, class Work>
__device__ __forceinline__ void for_items(const Look& look, Work work) {
  constexpr int lanes = Shape<Threads>::lanes, warps = Shape<Threads>::warps;
  const int64_t all = int64_t(gridDim.x) * warps;
  for (int64_t item = int64_t(blockIdx.x) * warps + threadIdx.x / lanes; item < look.strips * look.parts; item += all) {
    const int64_t part = item / look.strips;
    work(item - part * look.strips, part);
  }
}

__device__ __forceinline__ void count_batch(const Look& look) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *look.count += look.seen;
}

// Which of the channels c ... c + Width - 1 are not flagged yet; those of `among` are asked for.
template <int Width>
__device__ __forceinline__ unsigned open_channels(const Look& look, int64_t c, unsigned among) {
  unsigned open = among;
#pragma unroll
  for (int v = 0; v < Width; ++v)
    if ((among >> v & 1) && __ldcg(look.flags + c + v)) open &= ~(1u << v);
  return open;
}

template <class T, int Width, int Threads>
__device__ __forceinline__ void scan_planes(const Look& look) {
  constexpr int lanes = Shape<Threads>::lanes;
  const int lane = int(threadIdx.x) % lanes;
  const Maths<T> tau = Maths<T>(look.tau);
  for_items<Threads>(look, [&](int64_t c, int64_t part) {
    if (any_in_warp<Threads>(__ldcg(look.flags + c))) return;
    PlaneWalk<T, Width> walk(look, c, part * look.rounds * unroll_of(Width), lane, lanes);
#pragma unroll 1
    for (int64_t round = 0; round < look.rounds; ++round) {
      const bool flagged = __ldcg(look.flags + c);
      bool found = false;
      take_round<T, Width>(walk, look.magnitudes(), [&](Maths<T> x, int) { found |= !(x <= tau); });
      if (found && !flagged) __stcg(look.flags + c, uint8_t(1));
      if (any_in_warp<Threads>(found || flagged)) return;
    }
  });
}

template <class T, int Width, int Threads>
__device__ __forceinline__ void scan_rows(const Look& look) {
  constexpr int lanes = Shape<Threads>::lanes;
  const int lane = int(threadIdx.x) % lanes;
  const Maths<T> tau = Maths<T>(look.tau);
  for_items<Threads>(look, [&](int64_t strip, int64_t part) {
    const int64_t c = (strip * look.side + lane % look.side) * Width;
    unsigned open = open_channels<Width>(look, c, c < look.y.channels ? (1u << Width) - 1 : 0);
    RowWalk<T, Width> walk(look, c, part * look.rounds * unroll_of(Width), lane, lanes);
    int64_t look_again = 1;
#pragma unroll 1
    for (int64_t round = 0; any_in_warp<Threads>(open) && round < look.rounds; ++round) {
      if (!open) continue;
      unsigned found = 0;
      take_round<T, Width>(walk, look.magnitudes(), [&](Maths<T> x, int v) { found |= unsigned(!(x <= tau)) << v; });
#pragma unroll
      for (int v = 0; v < Width; ++v)
        if ((found & open) >> v & 1) __stcg(look.flags + c + v, uint8_t(1));
      open &= ~found;
      if (round < look_again) continue;
      look_again = 2 * round;
      open = open_channels<Width>(look, c, open);
    }
  });
}

template <class T, int Width, int Threads>
__device__ __forceinline__ void sum_planes(const Look& look) {
  constexpr int lanes = Shape<Threads>::lanes;
  const int lane = int(threadIdx.x) % lanes;
  for_items<Threads>(look, [&](int64_t c, int64_t part) {
    if (look.criterion == Criterion::sum_le && look.flags[c]) return;
    PlaneWalk<T, Width> walk(look, c, part * look.rounds * unroll_of(Width), lane, lanes);
    double sum[1] = {};
#pragma unroll 1
    for (int64_t round = 0; round < look.rounds; ++round)
      take_round<T, Width>(walk, look.magnitudes(), [&](Maths<T> x, int) { sum[0] += double(x); });
    sum_warp<Threads>(sum);
    if (lane == 0) look.partial[c * look.parts + part] = sum[0];
  });
}

template <class T, int Width, int Threads>
__device__ __forceinline__ void sum_rows(const Look& look) {
  constexpr int lanes = Shape<Threads>::lanes;
  const int lane = int(threadIdx.x) % lanes;
  for_items<Threads>(look, [&](int64_t strip, int64_t part) {
    const int64_t c = (strip * look.side + lane % look.side) * Width;
    const unsigned mine = c < look.y.channels ? (1u << Width) - 1 : 0;
    const bool wanted = look.criterion == Criterion::sum_le ? open_channels<Width>(look, c, mine) : mine;
    RowWalk<T, Width> walk(look, c, part * look.rounds * unroll_of(Width), lane, lanes);
    double sum[Width] = {};
#pragma unroll 1
    for (int64_t round = 0; wanted && round < look.rounds; ++round)
      take_round<T, Width>(walk, look.magnitudes(), [&](Maths<T> x, int v) { sum[v] += double(x); });
    for (int distance = look.side; distance < lanes; distance *= 2)
#pragma unroll
      for (int v = 0; v < Width; ++v) sum[v] += __shfl_xor_sync(0xffffffffu, sum[v], distance);
    if (lane >= look.side || !mine) return;
#pragma unroll
    for (int v = 0; v < Width; ++v) look.partial[(c + v) * look.parts + part] = sum[v];
  });
}

#define TORSION_LOOK(name, way)                                                        \
  template <class T, int Threads>                                                      \
  __global__ void __launch_bounds__(Threads) name(const __grid_constant__ Look look) { \
    count_batch(look);                                                                 \
    if (look.vectors)                                                                  \
      way<T, kWidth<T>, Threads>(look);                                                \
    else                                                                               \
      way<T, 1, Threads>(look);                                                        \
  }
TORSION_LOOK(plane_flags_kernel, scan_planes)
TORSION_LOOK(row_flags_kernel, scan_rows)
TORSION_LOOK(plane_sums_kernel, sum_planes)
TORSION_LOOK(row_sums_kernel, sum_rows)
#undef TORSION_LOOK

// A warp adds up the parts of a channel; sum_le is then decided.
template <int Threads>
__global__ void __launch_bounds__(Threads) channel_sums_kernel(const __grid_constant__ Look look) {
  constexpr int lanes = Shape<Threads>::lanes, warps = Shape<Threads>::warps;
  const int lane = int(threadIdx.x) % lanes;
  const int64_t all = int64_t(gridDim.x) * warps;
  for (int64_t c = int64_t(blockIdx.x) * warps + threadIdx.x / lanes; c < look.y.channels; c += all) {
    if (look.criterion == Criterion::sum_le && any_in_warp<Threads>(__ldcg(look.flags + c))) continue;
    double sum[1] = {};
#pragma unroll 4
    for (int64_t part = lane; part < look.parts; part += lanes) sum[0] += look.partial[c * look.parts + part];
    sum_warp<Threads>(sum);
    if (lane != 0) continue;
    if (look.criterion == Criterion::dormant)
      look.sums[c] = sum[0];
    else if (!(sum[0] <= look.tau))
      __stcg(look.flags + c, uint8_t(1));
  }
}

// One block: mean |y| of the channel against the mean of that over the channels; those that are not finite are live and
// left out.
template <int Threads>
__global__ void __launch_bounds__(Threads) dormant_kernel(const __grid_constant__ Look look) {
  __shared__ Scratch<2, Threads> scratch;
  __shared__ double all[2];  // the total of those that are finite, and how many they are
  double own[2] = {};
  for (int64_t c = threadIdx.x; c < look.y.channels; c += Threads)
    if (std::isfinite(look.sums[c])) {
      own[0] += look.sums[c];
      own[1] += 1;
    }
  sum_block<Threads>(own, scratch, [&](int k, double sum) { all[k] = sum; });
  for (int64_t c = threadIdx.x; c < look.y.channels; c += Threads)
    if (!std::isfinite(look.sums[c]) || look.sums[c] * all[1] > look.tau * all[0]) look.flags[c] = 1;
}

// An activation made ready, and how many doubles of workspace it needs.
struct FlagPlan {
  Look look;
  bool planes;
  int64_t workspace;
  bool sums() const { return look.criterion == Criterion::sum_le || look.criterion == Criterion::dormant; }
};

inline bool takes_vectors(const Activation& y, bool planes) {
  const int64_t width = y.kind == kF64 ? 2 : y.kind == kF32 ? 4 : 8;
  const int64_t other = planes ? (y.channels > 1 ? y.channel_stride : 0) : (y.inner > 1 ? y.inner_stride : 0);
  return reinterpret_cast<uintptr_t>(y.data) % 16 == 0 && (planes ? y.inner : y.channels) % width == 0 &&
         (y.outer == 1 || y.outer_stride % width == 0) && other % width == 0;
}

template <int Threads = kThreads>
FlagPlan plan_flags(Activation y, Criterion criterion, double tau, uint8_t* flags, int64_t* count, int64_t seen) {
  constexpr int lanes = Shape<Threads>::lanes;
  constexpr int64_t kRounds = 8, kMostParts = 1024;
  FlagPlan plan{};
  plan.planes = y.inner_stride == 1;
  if (!plan.planes && (y.inner == 1 || y.outer_stride == y.inner * y.inner_stride)) {
    // Rows that follow one another evenly are one run of them.
    if (y.inner == 1) y.inner_stride = y.outer_stride;
    y.inner *= y.outer;
    y.outer = 1;
  }
  Look& look = plan.look;
  look.y = y;
  look.flags = flags;
  look.count = count;
  look.seen = seen;
  look.tau = tau;
  look.criterion = criterion;
  if (y.outer * y.channels * y.inner == 0) return plan;
  look.vectors = takes_vectors(y, plan.planes);
  const int width = !look.vectors ? 1 : y.kind == kF64 ? 2 : y.kind == kF32 ? 4 : 8;
  const int64_t across = plan.planes ? y.inner : y.channels;
  look.side = 1;
  while (look.side < lanes && int64_t(look.side) * width < across) look.side *= 2;
  const int64_t together = lanes / look.side, per_strip = int64_t(look.side) * width;
  const int64_t lines = plan.planes ? (y.outer + together - 1) / together * ((across + per_strip - 1) / per_strip)
                                    : (y.outer * y.inner + together - 1) / together;
  const int64_t rounds = (lines + unroll_of(width) - 1) / unroll_of(width);
  look.strips = plan.planes ? y.channels : (across + per_strip - 1) / per_strip;
  look.rounds = std::max(kRounds, (rounds + kMostParts - 1) / kMostParts);
  look.parts = (rounds + look.rounds - 1) / look.rounds;
  plan.workspace = plan.sums() ? y.channels * (look.parts + 1) : 0;
  return plan;
}

// One launch, two for sum_le, three for dormant.
template <int Threads = kThreads>
void flag_active(FlagPlan plan, double* workspace, int64_t max_blocks, cudaStream_t stream) {
  constexpr int64_t warps = Shape<Threads>::warps;
  using Kernel = void (*)(Look);
  constexpr Kernel kKernel[4][4] = {{plane_flags_kernel<float, Threads>, plane_flags_kernel<double, Threads>,
                                     plane_flags_kernel<bf16, Threads>, plane_flags_kernel<f16, Threads>},
                                    {row_flags_kernel<float, Threads>, row_flags_kernel<double, Threads>,
                                     row_flags_kernel<bf16, Threads>, row_flags_kernel<f16, Threads>},
                                    {plane_sums_kernel<float, Threads>, plane_sums_kernel<double, Threads>,
                                     plane_sums_kernel<bf16, Threads>, plane_sums_kernel<f16, Threads>},
                                    {row_sums_kernel<float, Threads>, row_sums_kernel<double, Threads>,
                                     row_sums_kernel<bf16, Threads>, row_sums_kernel<f16, Threads>}};
  Look& look = plan.look;
  look.partial = workspace;
  look.sums = plan.workspace ? workspace + look.y.channels * look.parts : nullptr;
  const auto blocks_for = [&](int64_t of_warps) {
    return std::max<int64_t>(1, std::min((of_warps + warps - 1) / warps, max_blocks));
  };
  const Kernel scan = kKernel[2 * plan.sums() + !plan.planes][look.y.kind];
  launch<Threads>(scan, blocks_for(look.strips * look.parts), stream, look);
  if (!plan.workspace) return;
  launch<Threads>(channel_sums_kernel<Threads>, blocks_for(look.y.channels), stream, look);
  if (look.criterion == Criterion::dormant) launch<Threads>(dormant_kernel<Threads>, 1, stream, look);
}

}  // namespace torsion::cuda
