// The CUDA runner's kernels: a step over any list of tensors of one kind in two launches, every scalar on the device.
//
//   reduce   a block takes pieces (16384 elements of one tensor) and leaves each one's sums in `partial`. The last block
//            of the step's last kind, known by an integer ticket, does the scalars:
//            piece -> tensor -> scope and all -> skip or go on -> state of each scope -> coefficients of each tensor
//   update   every stream of every piece, last piece first: what reduce read last is still in L2. When the step is
//            skipped nothing, or the rule's restore
//
// Bytes per element are those in the rule's header. Sums are fp64: per thread, warp, block, piece, in this order, which
// the grid does not enter, so two runs and two grids give the same bits; there are no atomics on floating point.
// Element maths is the text the CPU runner compiles; -fmad=false keeps its roundings.
//
// Block reductions take the block size as a template argument: tests/shim runs these kernels on a CPU, at size 1 too.
#pragma once
#include "engine/cuda_elements.cuh"
#include "engine/frame.h"

namespace torsion::cuda {

constexpr int kThreads = 256;

// What the last block of a reduce, or the block of finalize_kernel, has to do.
enum class Finish : int32_t {
  nothing,  // other kinds follow
  sums,     // add up and stop: other processes add theirs before the step goes on
  step,     // add up, then the scalars of the step
  scalars,  // the scalars, from sums that are there
};

// Which of a rule's streams a reduce loads. A rule that sums nothing has sums of zero and needs none.
struct Positions {
  int at[kMaxStreams] = {}, count = 0;
};
template <class Rule>
constexpr Positions summed_streams() {
  Positions found;
  typename Rule::template Element<float> e{};
  int k = 0;
  auto look = [&](auto of, float&) {
    if (of.loads(kReduce)) found.at[found.count++] = k;
    ++k;
  };
  Rule::streams(e, look);
  return found;
}

template <class Rule>
struct Launch {
  Frame<Rule> frame;
  typename Rule::Hyper* hyper;  // where the groups' numbers of this step are put, and what frame.hyper means from then
  int64_t first, pieces;        // those of this kind
  unsigned* ticket;             // 0 between steps
  Finish finish;
};

// The groups' numbers as they travel: in the kernel's parameters, so that a new learning rate costs no copy. 256 doubles
// are 2 KB of the 4 KB that parameters may take.
template <class Hyper>
struct Numbers {
  static constexpr int H = n_numbers<Hyper>, kGroups = 256 / H;
  static_assert(std::is_base_of_v<Common, Hyper>, "number 0 of a group is its learning rate");
  Hyper value[kGroups];
  const void* rate[kGroups];  // a learning rate that lies on the device; null: the value holds
  uint32_t rate_is_double;    // one bit per group
  int32_t first, groups;      // 0 groups: all are in Launch::hyper already
  static_assert(kGroups <= 32);
};

template <int Threads, class Hyper>
__device__ void resolve(const Numbers<Hyper>& in, Hyper* out) {
  constexpr int H = Numbers<Hyper>::H;
  const auto* value = reinterpret_cast<const double*>(in.value);
  auto* to = reinterpret_cast<double*>(out + in.first);
  for (int k = threadIdx.x; k < in.groups * H; k += Threads) {
    const int group = k / H;
    const void* rate = k % H == 0 ? in.rate[group] : nullptr;
    const bool is_double = in.rate_is_double >> group & 1;
    to[k] = !rate ? value[k] : is_double ? *static_cast<const double*>(rate) : double(*static_cast<const float*>(rate));
  }
}

// A block of 1 is what the host shim runs: one warp of one lane.
template <int Threads>
struct Shape {
  static constexpr int lanes = Threads < 32 ? Threads : 32, warps = Threads / lanes;
  static_assert(Threads == lanes * warps && (lanes & (lanes - 1)) == 0);
};

template <int N, int Threads>
struct Scratch {
  double warp_sums[Shape<Threads>::warps][N];
  int32_t waiting[Threads];
  int32_t for_warp, for_block;
  bool last;
};

// Every lane ends up with the sums over its warp: a butterfly adds the same pairs whichever lane looks.
template <int Threads, int N>
__device__ __forceinline__ void sum_warp(double (&a)[N]) {
#pragma unroll
  for (int distance = Shape<Threads>::lanes / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int k = 0; k < N; ++k) a[k] += __shfl_xor_sync(0xffffffffu, a[k], distance);
}

// store(k, sum) of the block is called by one thread for each k.
template <int Threads, int N, class Store>
__device__ __forceinline__ void sum_block(double (&a)[N], Scratch<N, Threads>& scratch, Store store) {
  constexpr int lanes = Shape<Threads>::lanes, warps = Shape<Threads>::warps;
  sum_warp<Threads>(a);
  if (threadIdx.x % lanes == 0)
#pragma unroll
    for (int k = 0; k < N; ++k) scratch.warp_sums[threadIdx.x / lanes][k] = a[k];
  __syncthreads();
  for (int k = threadIdx.x; k < N; k += Threads) {
    double sum = scratch.warp_sums[0][k];
#pragma unroll
    for (int w = 1; w < warps; ++w) sum += scratch.warp_sums[w][k];
    store(k, sum);
  }
  __syncthreads();
}

// One block sums `count` ranges: range(i) -> [begin, end), add(i, j, a) adds item j to a, store(i, k, sum). A range gets
// a thread, a warp or the block, by its length alone. A thousand small tensors want the first (a warp each would take
// 125 rounds of memory latency), one tensor of 50 M elements the last.
template <int N, int Threads, class Range, class Add, class Store>
__device__ __forceinline__ void sum_ranges(int64_t count, Scratch<N, Threads>& scratch, Range range, Add add,
                                           Store store) {
  constexpr int lanes = Shape<Threads>::lanes, warps = Shape<Threads>::warps;
  constexpr int64_t kThreadItems = 8, kWarpItems = 256;
  auto collect = [&](int64_t i, int first, int stride, double (&a)[N]) {
    int64_t begin, end;
    range(i, begin, end);
#pragma unroll
    for (int k = 0; k < N; ++k) a[k] = 0;
#pragma unroll 4
    for (int64_t j = begin + first; j < end; j += stride) add(i, j, a);
  };
  for (int64_t base = 0; base < count; base += Threads) {
    if (threadIdx.x == 0) scratch.for_warp = scratch.for_block = 0;
    __syncthreads();
    double a[N];
    const int64_t i = base + threadIdx.x;
    if (i < count) {
      int64_t begin, end;
      range(i, begin, end);
      // Long ranges queue up for a warp from the front, for the block from the back; their order changes no sum.
      if (end - begin > kWarpItems)
        scratch.waiting[Threads - 1 - atomicAdd(&scratch.for_block, 1)] = threadIdx.x;
      else if (end - begin > kThreadItems)
        scratch.waiting[atomicAdd(&scratch.for_warp, 1)] = threadIdx.x;
      else {
        collect(i, 0, 1, a);
#pragma unroll
        for (int k = 0; k < N; ++k) store(i, k, a[k]);
      }
    }
    __syncthreads();
    for (int q = threadIdx.x / lanes; q < scratch.for_warp; q += warps) {
      collect(base + scratch.waiting[q], threadIdx.x % lanes, lanes, a);
      sum_warp<Threads>(a);
      if (threadIdx.x % lanes == 0)
#pragma unroll
        for (int k = 0; k < N; ++k) store(base + scratch.waiting[q], k, a[k]);
    }
    for (int q = 0; q < scratch.for_block; ++q) {
      const int64_t wide = base + scratch.waiting[Threads - 1 - q];
      collect(wide, threadIdx.x, Threads, a);
      sum_block<Threads>(a, scratch, [&](int k, double sum) { store(wide, k, sum); });
    }
    __syncthreads();
  }
}

// partial -> row_sums -> sums. Other blocks wrote `partial`, so it is read past this multiprocessor's L1.
template <class Rule, int Threads>
__device__ __forceinline__ void add_up(const Frame<Rule>& f, Scratch<Rule::n_sums, Threads>& scratch) {
  constexpr int N = Rule::n_sums;
  sum_ranges<N, Threads>(
      f.n_rows, scratch,
      [&](int64_t t, int64_t& begin, int64_t& end) {
        begin = f.rows[t].first_piece;
        end = begin + f.rows[t].pieces;
      },
      [&](int64_t, int64_t p, double (&a)[N]) {
#pragma unroll
        for (int k = 0; k < N; ++k) a[k] += __ldcg(f.partial + p * N + k);
      },
      [&](int64_t t, int k, double sum) { f.row_sums[t * N + k] = sum * f.rows[t].weight; });
  // The scopes, and behind them the sum over every row.
  sum_ranges<N, Threads>(
      int64_t(f.n_scopes) + 1, scratch,
      [&](int64_t s, int64_t& begin, int64_t& end) {
        begin = s < f.n_scopes ? f.scope_first[s] : 0;
        end = s < f.n_scopes ? f.scope_first[s + 1] : f.n_rows;
      },
      [&](int64_t s, int64_t t, double (&a)[N]) {
        if (s < f.n_scopes && !f.counts_in_scope(f.rows[t])) return;
#pragma unroll
        for (int k = 0; k < N; ++k) a[k] += f.row_sums[t * N + k];
      },
      [&](int64_t s, int k, double sum) { f.sums[s * N + k] = sum; });
}

// By one block.
template <class Rule, int Threads>
__device__ __forceinline__ void finish(const Launch<Rule>& launch, const Numbers<typename Rule::Hyper>& numbers,
                                       Scratch<Rule::n_sums, Threads>& scratch) {
  Frame<Rule> f = launch.frame;
  f.hyper = launch.hyper;
  resolve<Threads>(numbers, launch.hyper);
  __syncthreads();
  if (launch.finish != Finish::scalars) {
    if constexpr (summed_streams<Rule>().count > 0)
      add_up<Rule, Threads>(f, scratch);
    else
      for (int64_t k = threadIdx.x; k < (int64_t(f.n_scopes) + 1) * Rule::n_sums; k += Threads) f.sums[k] = 0;
    __syncthreads();
  }
  if (launch.finish == Finish::sums) return;
  if (threadIdx.x == 0) f.decide();
  __syncthreads();
  if (f.status->skip) return;
  for (int64_t s = threadIdx.x; s < f.n_scopes; s += Threads) f.advance(int32_t(s));
  __syncthreads();
  for (int64_t t = threadIdx.x; t < f.n_rows; t += Threads) f.set_coefficients(int32_t(t));
}

// Of all blocks of the launch, the one that gets here last sees what the others have written.
__device__ __forceinline__ void take_ticket(unsigned* ticket, bool& last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  __threadfence();
}

// Resident blocks: with room for more, the loads of three streams or the scalars of the last block would spill. DemP's
// reduce holds two loops, and reads one stream more in one of them.
template <class Rule>
constexpr int kResidentReduce = summed_streams<Rule>().count <= 2 && !Rule::kDemp ? 4 : 3;

template <class Rule, class T, int Threads>
__global__ void __launch_bounds__(Threads, kResidentReduce<Rule>)
    reduce_kernel(const __grid_constant__ Launch<Rule> launch,
                  const __grid_constant__ Numbers<typename Rule::Hyper> numbers) {
  using B = Body<Rule, T>;
  constexpr int N = B::N;
  __shared__ Scratch<N, Threads> scratch;
  Frame<Rule> f = launch.frame;
  f.hyper = numbers.groups ? numbers.value : launch.hyper;
  const double inverse_scale = f.scale();
  for (int64_t p = blockIdx.x; p < launch.pieces; p += gridDim.x) {
    const Piece piece = f.pieces[launch.first + p];
    const Row& row = f.rows[piece.row];
    const typename B::Span span(row, f.slots, piece.chunk, row.aligned);
    const auto known = f.template known<typename B::M>(row);
    const auto pre = typename B::M(f.pre(row, inverse_scale));
    double sums[N] = {};
    if (Rule::kDemp && row.scaled)
      B::template reduce<kReduceScaled, Threads>(span, pre, known, sums);
    else
      B::template reduce<kReduce, Threads>(span, pre, known, sums);
    sum_block<Threads>(sums, scratch, [&](int k, double sum) { f.partial[(launch.first + p) * N + k] = sum; });
  }
  if (launch.finish == Finish::nothing) return;
  take_ticket(launch.ticket, scratch.last);
  if (scratch.last) finish<Rule, Threads>(launch, numbers, scratch);
}

// One block: the scalars on their own, after an all-reduce of the sums or for a list without elements.
template <class Rule, int Threads>
__global__ void __launch_bounds__(Threads, 1)
    finalize_kernel(const __grid_constant__ Launch<Rule> launch,
                    const __grid_constant__ Numbers<typename Rule::Hyper> numbers) {
  __shared__ Scratch<Rule::n_sums, Threads> scratch;
  finish<Rule, Threads>(launch, numbers, scratch);
}

// Blocks that the registers must leave room for on a multiprocessor: the most without spilling, as scripts/audit.py holds
// it to. With every load of a step issued at once, two of the widest rule (41 KB) already keep more bytes in flight than
// HBM3e's latency asks for.
template <class Rule>
constexpr int kResidentNarrow = n_streams<Rule> <= 3   ? 5
                                : n_streams<Rule> == 4 ? 4
                                : n_streams<Rule> < 8  ? 3
                                                       : 2;
template <class Rule, class T, class Round>
constexpr int kResident = [] {
  constexpr bool wide = sizeof(typename T::Math) == 8;
  constexpr int fewer = (Round::kRandom || Rule::kDemp || wide ? 2 : 0) + (Rule::kDemp && wide ? 1 : 0);
  return std::max(2, kResidentNarrow<Rule> - fewer);
}();

template <class Rule, class T, class Round, int Threads>
__global__ void __launch_bounds__(Threads, kResident<Rule, T, Round>)
    update_kernel(const __grid_constant__ Launch<Rule> launch) {
  using B = Body<Rule, T>;
  using M = typename T::Math;
  Frame<Rule> f = launch.frame;
  f.hyper = launch.hyper;
  const int64_t skip = f.status->skip;
  if (skip == kSkippedBefore || (skip != kGo && !Rule::kRestores)) return;
  const double inverse_scale = f.scale();
  for (int64_t p = launch.pieces - 1 - int64_t(blockIdx.x); p >= 0; p -= gridDim.x) {
    const Piece piece = f.pieces[launch.first + p];
    const Row& row = f.rows[piece.row];
    if constexpr (Rule::kRestores) {
      if (skip != kGo) {
        const typename B::Span span(row, f.slots, piece.chunk, row.aligned);
        B::template sweep<kRestore, Threads>(span, 0, M(1), Nearest(0, 0, 0), NoNoise(row, f),
                                             [](auto& e) { Rule::restore(e); });
        continue;
      }
    }
    // Copied first: through a reference the conversion reads single bytes.
    const typename Frame<Rule>::Coefficients wide = f.coefficients[piece.row];
    const auto c = cast_numbers<typename B::C, typename Frame<Rule>::Coefficients, M>(wide);
    const Round round(uint64_t(f.hyper[row.group].seed), uint32_t(f.steps[row.tensor]), uint32_t(row.tensor));
    const std::conditional_t<Rule::kDemp, DempNoise<M>, NoNoise> noise(row, f);
    const typename B::Span span(row, f.slots, piece.chunk, Round::takes_vectors(row) && noise.takes_vectors());
    B::template sweep<kUpdate, Threads>(span, row.key, M(f.pre(row, inverse_scale)), round, noise,
                                        [&](auto& e) { Rule::update(e, c); });
  }
}

// An update that adds up what the rule after it needs; the last block does that one's scalars.
template <class Rule, class T, int Threads>
__global__ void __launch_bounds__(Threads, 2)  // with room for a third the sums would spill
    update_and_sum_kernel(const __grid_constant__ Launch<Rule> launch,
                          const __grid_constant__ Launch<typename Rule::After> next,
                          const __grid_constant__ Numbers<typename Rule::After::Hyper> numbers) {
  using B = Body<Rule, T>;
  using M = typename T::Math;
  constexpr int A = n_update_sums<Rule>;
  __shared__ Scratch<A, Threads> scratch;
  Frame<Rule> f = launch.frame;
  f.hyper = launch.hyper;
  const int64_t skip = f.status->skip;
  const double inverse_scale = f.scale();
  for (int64_t p = launch.pieces - 1 - int64_t(blockIdx.x); p >= 0 && skip != kSkippedBefore; p -= gridDim.x) {
    const Piece piece = f.pieces[launch.first + p];
    const Row& row = f.rows[piece.row];
    const typename B::Span span(row, f.slots, piece.chunk, row.aligned);
    const Nearest round(0, 0, 0);
    const NoNoise noise(row, f);
    if (skip != kGo) {
      B::template sweep<kRestore, Threads>(span, 0, M(1), round, noise, [](auto& e) { Rule::restore(e); });
      continue;
    }
    const typename Frame<Rule>::Coefficients wide = f.coefficients[piece.row];
    const auto c = cast_numbers<typename B::C, typename Frame<Rule>::Coefficients, M>(wide);
    double sums[A] = {};
    B::template sweep<kUpdate, Threads>(span, 0, M(f.pre(row, inverse_scale)), round, noise, [&](auto& e) {
      Rule::update(e, c);
      Rule::after(e, Accumulator{sums});
    });
    sum_block<Threads>(sums, scratch, [&](int k, double sum) { next.frame.partial[(launch.first + p) * A + k] = sum; });
  }
  if (next.finish == Finish::nothing) return;
  take_ticket(next.ticket, scratch.last);
  if (scratch.last) finish<typename Rule::After, Threads>(next, numbers, scratch);
}

// More groups than parameters hold: their numbers go ahead, one launch for every Numbers<Hyper>::kGroups of them.
template <class Hyper, int Threads>
__global__ void __launch_bounds__(Threads)
    resolve_kernel(const __grid_constant__ Numbers<Hyper> numbers, Hyper* hyper) {
  resolve<Threads>(numbers, hyper);
}

// Completes an uploaded image: the list of pieces follows from the rows, and is longer than they are. This kernel and the
// next depend on no rule; static keeps those of two object files apart.
template <int Threads>
static __global__ void __launch_bounds__(Threads)
    expand_kernel(const Row* rows, int64_t n_rows, Piece* pieces, unsigned* ticket) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
  for (int64_t t = blockIdx.x; t < n_rows; t += gridDim.x)
    for (int64_t c = threadIdx.x; c < rows[t].pieces; c += Threads)
      pieces[rows[t].first_piece + c] = {int32_t(t), int32_t(c)};
}

// A part of an image inside the parameters: a replayed graph needs no host memory. 3.9 of at most 4 KB.
struct Parcel {
  uint4 quad[243];
  int32_t quads;
};

template <int Threads>
static __global__ void __launch_bounds__(Threads) parcel_kernel(const __grid_constant__ Parcel parcel, uint4* to) {
  for (int k = threadIdx.x; k < parcel.quads; k += Threads) to[k] = parcel.quad[k];
}

}  // namespace torsion::cuda
