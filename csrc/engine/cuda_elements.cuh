// One thread's elements in the CUDA runner: 128-bit loads and stores of every stream, and the rounding at the store.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

#include "engine/plan.h"
#include "engine/types.h"
#include "rules/philox_normal.h"

namespace torsion::cuda {

struct Nearest {
  static constexpr bool kRandom = false;
  __device__ __forceinline__ Nearest(uint64_t, uint32_t, uint32_t) {}
  static __device__ __forceinline__ bool takes_vectors(const Row& row) { return row.aligned; }
  __device__ __forceinline__ void draw(int64_t) {}
  __device__ __forceinline__ void draw_one(int64_t) {}
  template <class Q, Role, class R>
  __device__ __forceinline__ Q narrow(R x, int) const {
    return Narrow<Q>::nearest(x);
  }
};

// 16 bits per element: a Philox block serves the eight neighbours that a thread holds of a 16-bit parameter. A shard that
// starts inside a block goes element by element; drawing from two blocks would cost every other row 30 registers.
struct Stochastic {
  static constexpr bool kRandom = true;
  uint64_t seed;
  uint32_t step, stream;
  Philox bits;
  __device__ __forceinline__ Stochastic(uint64_t seed, uint32_t step, uint32_t stream)
      : seed(seed), step(step), stream(stream) {}
  static __device__ __forceinline__ bool takes_vectors(const Row& row) { return row.aligned && row.key % 8 == 0; }

  // For the elements first ... first + 7, where first is a multiple of 8.
  __device__ __forceinline__ void draw(int64_t first) { bits = rounding_block(seed, first, step, stream); }
  __device__ __forceinline__ void draw_one(int64_t element) {
    bits.word[0] = rounding_bits(rounding_block(seed, element, step, stream), int(element & 7));
  }
  template <class Q, Role P, class R>
  __device__ __forceinline__ Q narrow(R x, int v) const {
    if constexpr (P == Role::param)
      return Narrow<Q>::stochastic(x, rounding_bits(bits, v));
    else
      return Narrow<Q>::nearest(x);
  }
};

// DemP's noise of a thread's elements; row by row where units are dead or were cut, else a block of four at a time.
struct NoNoise {
  template <class F>
  __device__ __forceinline__ NoNoise(const Row&, const F&) {}
  static __device__ __forceinline__ bool takes_vectors() { return true; }
  template <class E, int V>
  __device__ __forceinline__ void draw(E (&)[V], int64_t) const {}
  template <class E>
  __device__ __forceinline__ void draw_one(E&, int64_t) const {}
};

template <class R>
struct DempNoise {
  NoiseMap map;
  uint64_t seed;
  uint32_t step;
  bool none;
  template <class F>
  __device__ __forceinline__ DempNoise(const Row& row, const F& f)
      : map{}, seed(f.noise_seed), step(uint32_t(f.perturbation[2])), none(row.noise == 0) {
    if (!none) map = f.noise[row.noise - 1];
  }
  __device__ __forceinline__ bool takes_vectors() const { return none || (!map.live && !map.row_of); }

  // For the elements first ... first + V - 1, where first is a multiple of V.
  template <class E, int V>
  __device__ __forceinline__ void draw(E (&e)[V], int64_t first) const {
#pragma unroll
    for (int v = 0; v < V; ++v) e[v].noise = 0;
    if (none) return;
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      R normal[4];
      normals_of_block(seed, uint64_t(first + v) >> 2, step, uint32_t(map.tensor_id), normal);
#pragma unroll
      for (int lane = 0; lane < 4; ++lane)
        if constexpr (V >= 4)
          e[v + lane].noise = normal[lane];
        else if (lane < V)
          e[lane].noise = first & 2 ? normal[lane + 2] : normal[lane];
    }
  }
  template <class E>
  __device__ __forceinline__ void draw_one(E& e, int64_t i) const {
    e.noise = 0;
    if (none) return;
    const int64_t row = i / map.columns;
    if (map.live && !map.live[row]) return;
    const int64_t element = (map.row_of ? map.row_of[row] : row) * map.columns + (i - row * map.columns);
    R normal[4];
    normals_of_block(seed, uint64_t(element) >> 2, step, uint32_t(map.tensor_id), normal);
    const R low = element & 1 ? normal[1] : normal[0], high = element & 1 ? normal[3] : normal[2];
    e.noise = element & 2 ? high : low;
  }
};

struct Accumulator {
  double* sums;
  __device__ __forceinline__ double& operator[](int k) const { return sums[k]; }
};

template <class Rule, class T>
struct Body {
  using M = typename T::Math;
  using E = typename Rule::template Element<M>;
  using C = typename Rule::template Coefficients<M>;
  using Known = typename Rule::template Known<M>;
  template <class S>
  using Storage = typename T::template Of<S::role>;
  static constexpr int S = n_streams<Rule>, N = Rule::n_sums;
  static_assert(S <= kMaxStreams);

  // Elements a thread holds at once: 16 bytes of the narrowest stream, several times 16 of the others.
  static constexpr int V =
      16 / int(std::min({sizeof(typename T::template Of<Role::param>), sizeof(typename T::template Of<Role::grad>),
                         sizeof(typename T::template Of<Role::state>)}));
  template <class Q>
  static constexpr int quads = V * int(sizeof(Q)) / 16;
  struct Raw {
    uint4 quad[S][V * sizeof(M) / 16];
  };

  template <Pass P, class Of>
  static constexpr bool stores = Of::stores(P) && is_stored<Of, T>;

  // A plain uint4 load is split by nvcc into four; these intrinsics are not. reduce caches what update reads again,
  // update streams: nothing is read a third time before the next step.
  template <Pass P>
  static __device__ __forceinline__ uint4 load_quad(const uint4* p) {
    if constexpr (P == kReduce)
      return __ldca(p);
    else
      return __ldcs(p);
  }

  // All loads are issued before the first value is used: the bytes in flight are what hides the latency.
  template <Pass P>
  static __device__ __forceinline__ void load(E (&e)[V], void* const* at, int64_t i, M pre) {
    Raw raw;
    int k = 0;
    auto fetch = [&]<class Of>(Of, M&) {
      using Q = Storage<Of>;
      if constexpr (Of::loads(P)) {
        const auto* from = reinterpret_cast<const uint4*>(static_cast<const Q*>(at[k]) + i);
#pragma unroll
        for (int j = 0; j < quads<Q>; ++j) raw.quad[k][j] = load_quad<P>(from + j);
      }
      ++k;
    };
    Rule::streams(e[0], fetch);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      k = 0;
      auto take = [&]<class Of>(Of, M& x) {
        using Q = Storage<Of>;
        if constexpr (Of::loads(P)) {
          Q q;
          memcpy(&q, reinterpret_cast<const char*>(raw.quad[k]) + v * sizeof(Q), sizeof(Q));
          x = widen(q);
          if constexpr (Of::role == Role::grad) x *= pre;
        }
        ++k;
      };
      Rule::streams(e[v], take);
    }
  }

  template <Pass P, class Round>
  static __device__ __forceinline__ void store(E (&e)[V], void* const* at, int64_t i, const Round& round) {
    Raw raw;
    int k = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      k = 0;
      auto give = [&]<class Of>(Of, M& x) {
        using Q = Storage<Of>;
        if constexpr (stores<P, Of>) {
          const Q q = round.template narrow<Q, Of::role>(x, v);
          memcpy(reinterpret_cast<char*>(raw.quad[k]) + v * sizeof(Q), &q, sizeof(Q));
        }
        ++k;
      };
      Rule::streams(e[v], give);
    }
    k = 0;
    auto flush = [&]<class Of>(Of, M&) {
      using Q = Storage<Of>;
      if constexpr (stores<P, Of>) {
        auto* to = reinterpret_cast<uint4*>(static_cast<Q*>(at[k]) + i);
#pragma unroll
        for (int j = 0; j < quads<Q>; ++j) __stcs(to + j, raw.quad[k][j]);
      }
      ++k;
    };
    Rule::streams(e[0], flush);
  }

  template <Pass P>
  static __device__ __forceinline__ void load_one(E& e, void* const* at, int64_t i, M pre) {
    int k = 0;
    auto take = [&]<class Of>(Of, M& x) {
      if constexpr (Of::loads(P)) {
        x = widen(static_cast<const Storage<Of>*>(at[k])[i]);
        if constexpr (Of::role == Role::grad) x *= pre;
      }
      ++k;
    };
    Rule::streams(e, take);
  }

  template <Pass P, class Round>
  static __device__ __forceinline__ void store_one(E& e, void* const* at, int64_t i, const Round& round) {
    int k = 0;
    auto give = [&]<class Of>(Of, M& x) {
      using Q = Storage<Of>;
      if constexpr (stores<P, Of>) static_cast<Q*>(at[k])[i] = round.template narrow<Q, Of::role>(x, 0);
      ++k;
    };
    Rule::streams(e, give);
  }

  // A piece of a row: [begin, vector_end) by 128-bit accesses, the rest, or all of a misaligned row, one by one.
  struct Span {
    void* at[S];
    int64_t begin, vector_end, end;
    __device__ __forceinline__ Span(const Row& row, const Slots& slots, int32_t chunk, bool vectors) {
#pragma unroll
      for (int k = 0; k < S; ++k) at[k] = row.at[slots.of[k]];
      begin = int64_t(chunk) * kChunk;
      end = begin + kChunk < row.n ? begin + kChunk : row.n;
      vector_end = vectors ? begin + (end - begin) / V * V : begin;
    }
  };

  template <Pass P, int Threads>
  static __device__ __forceinline__ void reduce(const Span& span, M pre, const Known& known, double (&sums)[N]) {
    const Accumulator into{sums};
#pragma unroll 2
    for (int64_t i = span.begin + int64_t(threadIdx.x) * V; i < span.vector_end; i += Threads * V) {
      E e[V];
      load<P>(e, span.at, i, pre);
      if constexpr (Rule::kDemp && P == kReduce)
#pragma unroll
        for (int v = 0; v < V; ++v) e[v].param = 0;  // its sign counts 0 times here
#pragma unroll
      for (int v = 0; v < V; ++v) Rule::reduce(e[v], known, into);
    }
    for (int64_t i = span.vector_end + threadIdx.x; i < span.end; i += Threads) {
      E e;
      load_one<P>(e, span.at, i, pre);
      if constexpr (Rule::kDemp && P == kReduce) e.param = 0;
      Rule::reduce(e, known, into);
    }
  }

  // Loads, computes and stores every element of a piece; `key` is the number of the row's first element.
  template <Pass P, int Threads, class Round, class Noise, class Compute>
  static __device__ __forceinline__ void sweep(const Span& span, int64_t key, M pre, Round round, const Noise& noise,
                                               Compute compute) {
#pragma unroll 1
    for (int64_t i = span.begin + int64_t(threadIdx.x) * V; i < span.vector_end; i += Threads * V) {
      E e[V];
      load<P>(e, span.at, i, pre);
      round.draw(key + i);
      noise.draw(e, i);
#pragma unroll
      for (int v = 0; v < V; ++v) compute(e[v]);
      store<P>(e, span.at, i, round);
    }
#pragma unroll 1
    for (int64_t i = span.vector_end + threadIdx.x; i < span.end; i += Threads) {
      E e;
      load_one<P>(e, span.at, i, pre);
      round.draw_one(key + i);
      noise.draw_one(e, i);
      compute(e);
      store_one<P>(e, span.at, i, round);
    }
  }
};

}  // namespace torsion::cuda
