// The CUDA runner's host side: where a table lies on the device, how it gets there, and the launches of a step.
//
// A step is one reduce and one update launch for each kind (storage type) in the table, whatever the number of tensors;
// a table that changed costs one copy and one launch more. Everything goes to the caller's stream, nothing waits.
#pragma once
#include <array>
#include <bit>

#include "engine/cuda.cuh"

namespace torsion::cuda {

// Blocks of a launch: enough waves for the hardware to even out the ends. No result depends on it.
constexpr int64_t kBlocksPerMultiprocessor = 32;

#ifdef __CUDACC__
template <int Threads, class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, cudaStream_t stream, const A&... arguments) {
  kernel<<<unsigned(blocks), Threads, 0, stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
#endif

struct Rate {  // a learning rate on the device; null: the group's number holds
  const void* at = nullptr;
  bool is_double = false;
};

// The rule whose reduce kernels a rule takes: its own, or Rule::Summed, whose sums and scalars are the same text.
template <class Rule>
struct SummedBy {
  using type = Rule;
};
template <class Rule>
  requires requires { typename Rule::Summed; }
struct SummedBy<Rule> {
  using type = typename Rule::Summed;
};

template <class Rule, int Threads = kThreads>
struct Runner {
  using F = Frame<Rule>;
  using Hyper = typename Rule::Hyper;
  using Summed = typename SummedBy<Rule>::type;
  using Kernel = void (*)(Launch<Summed>, Numbers<Hyper>);
  using UpdateKernel = void (*)(Launch<Rule>);

  static Layout layout(const Table& t) { return Layout(t, F::N, F::C, F::H); }

  // In a capture the bytes travel in kernel parameters: the copy node of a graph would read the host's memory again at
  // each replay. Else a copy from pageable memory, which the driver stages before it returns.
  static void send(const void* from, int64_t bytes, char* to, bool capturing, cudaStream_t stream) {
    if (!capturing) {
      if (bytes > 0) STD_CUDA_CHECK(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyHostToDevice, stream));
      return;
    }
    for (int64_t at = 0; at < bytes; at += int64_t(sizeof(Parcel::quad))) {
      Parcel parcel{};
      const int64_t part = std::min(bytes - at, int64_t(sizeof(Parcel::quad)));
      memcpy(parcel.quad, static_cast<const char*>(from) + at, size_t(part));
      parcel.quads = int32_t(part / 16);  // both limits are multiples of 16
      launch<Threads>(parcel_kernel<Threads>, 1, stream, parcel, reinterpret_cast<uint4*>(to + at));
    }
  }

  static void upload(const Table& t, char* workspace, bool capturing, int64_t max_blocks, cudaStream_t stream) {
    const Layout at = layout(t);
    std::vector<char> image(size_t(at.image_end));
    if (!t.rows.empty()) memcpy(image.data() + at.rows, t.rows.data(), t.rows.size() * sizeof(Row));
    if (!t.scope_first.empty()) memcpy(image.data() + at.scope_first, t.scope_first.data(), t.scope_first.size() * 4);
    if (!t.noise.empty()) memcpy(image.data() + at.noise, t.noise.data(), t.noise.size() * sizeof(NoiseMap));
    send(image.data(), at.image_end, workspace, capturing, stream);
    launch<Threads>(expand_kernel<Threads>, blocks_for(int64_t(t.rows.size()), max_blocks), stream,
                    reinterpret_cast<const Row*>(workspace + at.rows), int64_t(t.rows.size()),
                    reinterpret_cast<Piece*>(workspace + at.pieces),
                    reinterpret_cast<unsigned*>(workspace + at.ticket));
  }

  // Points the frame's arrays into the workspace.
  static Launch<Rule> bind(F f, const Table& t, char* workspace) {
    const Layout at = layout(t);
    f.rows = reinterpret_cast<const Row*>(workspace + at.rows);
    f.pieces = reinterpret_cast<const Piece*>(workspace + at.pieces);
    f.scope_first = reinterpret_cast<const int32_t*>(workspace + at.scope_first);
    f.noise = reinterpret_cast<const NoiseMap*>(workspace + at.noise);
    f.n_rows = int32_t(t.rows.size());
    f.n_scopes = t.n_scopes;
    f.partial = reinterpret_cast<double*>(workspace + at.partial);
    f.row_sums = reinterpret_cast<double*>(workspace + at.row_sums);
    if (!f.sums) f.sums = reinterpret_cast<double*>(workspace + at.sums);
    f.coefficients = reinterpret_cast<typename F::Coefficients*>(workspace + at.coefficients);
    Launch<Rule> l{};
    l.frame = f;
    l.hyper = reinterpret_cast<Hyper*>(workspace + at.hyper);
    l.ticket = reinterpret_cast<unsigned*>(workspace + at.ticket);
    return l;
  }

  // frame.sums is the caller's tensor in a split step, else null.
  static void run(const F& frame, const Table& t, char* workspace, const std::vector<Hyper>& hyper,
                  const std::vector<Rate>& rates, Phase phase, int64_t max_blocks, cudaStream_t stream) {
    Launch<Rule> l = bind(frame, t, workspace);
    if (phase == Phase::closing) return update(l, t, max_blocks, stream);
    const Numbers<Hyper> numbers = pass_numbers(hyper, rates, l.hyper, stream);
    const Finish last = phase == Phase::whole ? Finish::step : phase == Phase::reduce ? Finish::sums : Finish::scalars;
    sum(l, numbers, t, last, phase != Phase::update, max_blocks, stream);
    if (phase != Phase::reduce) update(l, t, max_blocks, stream);
  }

  // A whole step whose update sums for the rule after it, over the table `next`, and does its scalars.
  template <class After>
  static void run_before(const F& frame, const Table& t, char* workspace, const std::vector<Hyper>& hyper,
                         const std::vector<Rate>& rates, const Frame<After>& next_frame, const Table& next,
                         char* next_workspace, const std::vector<typename After::Hyper>& next_hyper, int64_t max_blocks,
                         cudaStream_t stream) {
    using Next = Runner<After, Threads>;
    Launch<Rule> l = bind(frame, t, workspace);
    Launch<After> n = Next::bind(next_frame, next, next_workspace);
    const Numbers<Hyper> numbers = pass_numbers(hyper, rates, l.hyper, stream);
    const auto next_numbers = Next::pass_numbers(next_hyper, std::vector<Rate>(next_hyper.size()), n.hyper, stream);
    sum(l, numbers, t, Finish::step, true, max_blocks, stream);
    int remaining = 0;
    for (int kind = 0; kind < kKinds; ++kind) remaining += t.kind_first[kind] != t.kind_first[kind + 1];
    for (int kind = kKinds - 1; kind >= 0; --kind) {
      if (!take_kind(l, t, kind)) continue;
      n.finish = --remaining ? Finish::nothing : Finish::step;
      launch<Threads>(kUpdate[kind], blocks_for(l.pieces, max_blocks), stream, l, n, next_numbers);
    }
  }

  static Numbers<Hyper> pass_numbers(const std::vector<Hyper>& hyper, const std::vector<Rate>& rates, Hyper* device,
                                     cudaStream_t stream) {
    constexpr size_t most = Numbers<Hyper>::kGroups;
    if (hyper.size() <= most) return pack(hyper, rates, 0, hyper.size());
    for (size_t first = 0; first < hyper.size(); first += most)
      launch<Threads>(resolve_kernel<Hyper, Threads>, 1, stream,
                      pack(hyper, rates, first, std::min(most, hyper.size() - first)), device);
    return {};
  }

 private:
  // What the last of the launches has to do is `last`.
  static void sum(const Launch<Rule>& l, const Numbers<Hyper>& numbers, const Table& t, Finish last, bool reduces,
                  int64_t max_blocks, cudaStream_t stream) {
    const int last_kind = last_kind_of(t);
    Launch<Summed> sums = for_summing(l);
    if (reduces && last_kind >= 0 && summed_streams<Rule>().count > 0) {
      reduce(sums, numbers, t, last_kind, last, max_blocks, stream);
    } else {
      sums.finish = last;
      launch<Threads>(finalize_kernel<Summed, Threads>, 1, stream, sums, numbers);
    }
  }

  static void update(Launch<Rule>& l, const Table& t, int64_t max_blocks, cudaStream_t stream) {
    if constexpr (!sums_in_update<Rule>)
      for (int kind = last_kind_of(t); kind >= 0; --kind)
        if (take_kind(l, t, kind)) launch<Threads>(kUpdate[kind], blocks_for(l.pieces, max_blocks), stream, l);
  }

  using Random = std::conditional_t<Rule::kRounds, Stochastic, Nearest>;
  static constexpr Kernel kReduce[kKinds] = {reduce_kernel<Summed, F32, Threads>,  reduce_kernel<Summed, F64, Threads>,
                                             reduce_kernel<Summed, BF16, Threads>, reduce_kernel<Summed, F16, Threads>,
                                             reduce_kernel<Summed, BF16, Threads>, reduce_kernel<Summed, F16, Threads>};
  static constexpr auto update_kernels() {
    if constexpr (sums_in_update<Rule>) {
      using Kernel = void (*)(Launch<Rule>, Launch<typename Rule::After>, Numbers<typename Rule::After::Hyper>);
      return std::array<Kernel, kKinds>{
          update_and_sum_kernel<Rule, F32, Threads>,  update_and_sum_kernel<Rule, F64, Threads>,
          update_and_sum_kernel<Rule, BF16, Threads>, update_and_sum_kernel<Rule, F16, Threads>,
          update_and_sum_kernel<Rule, BF16, Threads>, update_and_sum_kernel<Rule, F16, Threads>};
    } else {
      return std::array<UpdateKernel, kKinds>{
          update_kernel<Rule, F32, Nearest, Threads>,  update_kernel<Rule, F64, Nearest, Threads>,
          update_kernel<Rule, BF16, Nearest, Threads>, update_kernel<Rule, F16, Nearest, Threads>,
          update_kernel<Rule, BF16, Random, Threads>,  update_kernel<Rule, F16, Random, Threads>};
    }
  }
  static constexpr auto kUpdate = update_kernels();

  // `last` is what the last of the launches has to do.
  static void reduce(Launch<Summed>& l, const Numbers<Hyper>& numbers, const Table& t, int last_kind, Finish last,
                     int64_t max_blocks, cudaStream_t stream) {
    if constexpr (summed_streams<Rule>().count > 0) {
      for (int kind = 0; kind <= last_kind; ++kind) {
        if (!take_kind(l, t, kind)) continue;
        l.finish = kind == last_kind ? last : Finish::nothing;
        launch<Threads>(kReduce[kind], blocks_for(l.pieces, max_blocks), stream, l, numbers);
      }
    }
  }

  static Launch<Summed> for_summing(const Launch<Rule>& l) {
    if constexpr (std::is_same_v<Summed, Rule>) {
      return l;
    } else {
      using G = Frame<Summed>;
      constexpr Positions from = summed_streams<Rule>(), to = summed_streams<Summed>();
      static_assert(std::is_same_v<typename Summed::Hyper, Hyper> && F::N == G::N && F::C == G::C && F::K == G::K);
      static_assert(from.count == to.count);
      auto sums = std::bit_cast<Launch<Summed>>(l);
      for (int k = 0; k < from.count; ++k) sums.frame.slots.of[to.at[k]] = l.frame.slots.of[from.at[k]];
      return sums;
    }
  }

  static int64_t blocks_for(int64_t work, int64_t max_blocks) {
    return std::max<int64_t>(1, std::min(work, max_blocks));
  }

  static int last_kind_of(const Table& t) {
    int kind = kKinds - 1;
    while (kind >= 0 && t.kind_first[kind] == t.kind_first[kind + 1]) --kind;
    return kind;
  }

  template <class Any>
  static bool take_kind(Launch<Any>& l, const Table& t, int kind) {
    l.first = t.kind_first[kind];
    l.pieces = t.kind_first[kind + 1] - l.first;
    return l.pieces > 0;
  }

  static Numbers<Hyper> pack(const std::vector<Hyper>& hyper, const std::vector<Rate>& rates, size_t first,
                             size_t count) {
    Numbers<Hyper> n{};
    n.first = int32_t(first);
    n.groups = int32_t(count);
    for (size_t g = 0; g < count; ++g) {
      n.value[g] = hyper[first + g];
      n.rate[g] = rates[first + g].at;
      n.rate_is_double |= uint32_t(rates[first + g].is_double) << g;
    }
    return n;
  }
};

}  // namespace torsion::cuda
