// Enough of CUDA for g++ to compile csrc/engine/launch.cuh and to run its kernels: blocks one after another, the threads
// of a block as host threads (none at block size 1). Streams, copies and graph capture are imitated as far as used.
#pragma once
#include <barrier>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x;
};
inline thread_local Index threadIdx;
inline Index blockIdx, gridDim;

namespace host {

struct Counts {
  int launches = 0, copies = 0;
};
inline Counts counts;
inline std::vector<std::function<void()>>* graph = nullptr;  // where a capture records

inline std::unique_ptr<std::barrier<>> block;  // null at block size 1
inline std::vector<std::unique_ptr<std::barrier<>>> warps;
inline double lanes[64][32];

inline void do_or_record(std::function<void()> work) {
  if (graph)
    graph->push_back(std::move(work));
  else
    work();
}

template <class Work>
void run_grid(int64_t blocks, int threads, Work work) {
  gridDim.x = unsigned(blocks);
  for (unsigned b = 0; b < gridDim.x; ++b) {
    blockIdx.x = b;
    if (threads == 1) {
      threadIdx.x = 0;
      work();
      continue;
    }
    block = std::make_unique<std::barrier<>>(threads);
    warps.clear();
    for (int w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t)
      team.emplace_back([&, t] {
        threadIdx.x = unsigned(t);
        work();
      });
    for (std::thread& t : team) t.join();
    block.reset();
  }
}

}  // namespace host

inline void __syncthreads() {
  if (host::block) host::block->arrive_and_wait();
}
inline double __shfl_xor_sync(unsigned, double value, int distance) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  host::lanes[warp][lane] = value;
  host::warps[warp]->arrive_and_wait();
  const double other = host::lanes[warp][lane ^ unsigned(distance)];
  host::warps[warp]->arrive_and_wait();
  return other;
}
inline bool __any_sync(unsigned, bool mine) {
  const unsigned warp = threadIdx.x / 32;
  host::lanes[warp][threadIdx.x % 32] = mine;
  host::warps[warp]->arrive_and_wait();
  bool any = false;
  for (const double one : host::lanes[warp]) any = any || one != 0;
  host::warps[warp]->arrive_and_wait();
  return any;
}
inline void __threadfence() {}
// What passes by the L1 may be another warp's, which on the host is another thread's.
template <class T>
T __ldcg(const T* p) {
  T value;
  if constexpr (sizeof(T) <= 8)
    __atomic_load(p, &value, __ATOMIC_RELAXED);
  else
    value = *p;
  return value;
}
template <class T>
void __stcg(T* p, T value) {
  __atomic_store(p, &value, __ATOMIC_RELAXED);
}
template <class T>
T __ldca(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T, class U>
T atomicAdd(T* p, U value) {
  return __atomic_fetch_add(p, T(value), __ATOMIC_SEQ_CST);
}

using cudaError_t = int;
using cudaStream_t = void*;
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  ++host::counts.copies;
  // As in a graph: the copy of a capture reads the host's memory when it is replayed, not now.
  host::do_or_record([=] { memcpy(to, from, bytes); });
  return 0;
}
#define STD_CUDA_CHECK(call) \
  if ((call) != 0) throw std::runtime_error(#call)

namespace torsion::cuda {

template <int Threads, class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, cudaStream_t, const A&... arguments) {
  static_assert((sizeof(P) + ... + 0) <= 4096, "kernel parameters");
  ++host::counts.launches;
  host::do_or_record([=] { host::run_grid(blocks, Threads, [&] { kernel(arguments...); }); });
}

}  // namespace torsion::cuda
