// The CPU runner: one parallel region per step, SIMD bodies chosen once, sums in fp64 in an order that depends on
// nothing but the list. Results are bitwise the same for every thread count and instruction set.
//
// A chunk is summed in 16 lanes, in four places if it is full, then halved; chunks are added in order. -ffp-contract=off keeps the levels equal, and
// pointers may be equal (a rule may read and write one array as two streams), so loops say ivdep and never restrict.
#pragma once
#include <omp.h>

#include <array>
#include <cstring>

#include "engine/around.h"
#include "engine/cpu_noise.h"
#include "engine/cpu_rounding.h"
#include "engine/frame.h"
#include "engine/isa.h"

namespace torsion::cpu {

constexpr int kLanes = 16;
constexpr int kPlaces = 4;   // of a full chunk that reduce reads side by side; like the lanes, part of the numerics
constexpr int kAhead = 128;  // elements prefetched ahead

// A piece, and what is worked on after it. A small tensor is over before the hardware has noticed its streams, so each
// line of the next is asked for while this one is computed (1000 x 1024 fp32: 0.83 against 0.91 ms a step).
struct Work {
  const Row &row, &next;
  int64_t begin, end, next_begin;
  const Slots& slots;
  double pre;
  bool long_list;  // longer than a cache
  int64_t piece;
};

constexpr int64_t kLongList = 64;  // pieces

template <class Rule, class T, class Round>
struct Body {
  using M = typename T::Math;
  using E = typename Rule::template Element<M>;
  using C = typename Rule::template Coefficients<M>;
  static constexpr int S = n_streams<Rule>, N = Rule::n_sums;
  static_assert(S <= kMaxStreams);
  // Elements worked on at once, and places of a chunk side by side.
  static constexpr int64_t kSpan = Rule::kDemp ? std::max(Round::kSpan, kNoiseSpan) : Round::kSpan;
  static constexpr int64_t kPlacesOfUpdate = Rule::kDemp ? 1 : Round::kPlaces;
  static constexpr int64_t kAheadOfUpdate = Rule::kDemp ? kSpan : kAhead;
  using Noise = std::conditional_t<Rule::kDemp, SpanNoise<M, kSpan>, NoNoise>;

  // The addresses of the rule's streams in a row.
  struct Streams {
    void* at[S];
    TORSION_INLINE Streams(const Row& row, const Slots& slots) {
      for (int k = 0; k < S; ++k) at[k] = row.at[slots.of[k]];
    }
  };

  template <Pass P>
  static TORSION_INLINE void load(E& e, void* const* at, int64_t i, M pre) {
    int k = 0;
    auto take = [&]<class Of, class X>(Of, X& x) __attribute__((always_inline)) {
      if constexpr (Of::loads(P)) {
        x = widen(static_cast<const typename T::template Of<Of::role>*>(at[k])[i]);
        if constexpr (Of::role == Role::grad) x *= pre;
      }
      ++k;
    };
    Rule::streams(e, take);
  }

  // An array that is only written would be read into the cache first. In a long list its elements are staged, and go
  // around the cache a span at a time (fp32 SGD from memory: the first descent takes 0.87, the last 0.86, the opening
  // ascent 0.89 of the time). Where it is also one that is read, it is in the cache already.
  template <Pass P, class Of>
  static constexpr bool is_staged = Of::stores(P) && !Of::loads(P) && is_stored<Of, T>;
  template <Pass P>
  static constexpr int n_staged = [] {
    E e{};
    int n = 0;
    auto count = [&]<class Of, class X>(Of, X&) { n += is_staged<P, Of>; };
    Rule::streams(e, count);
    return n;
  }();

  template <Pass P>
  struct Stage {
    alignas(64) char bytes[n_staged<P> ? n_staged<P> : 1][kSpan * sizeof(M)];
    bool around[n_staged<P> ? n_staged<P> : 1];

    TORSION_INLINE Stage(const Work& work, void* const* at) {
      E e{};
      int k = 0, n = 0;
      auto decide = [&]<class Of, class X>(Of, X&) __attribute__((always_inline)) {
        if constexpr (is_staged<P, Of>) around[n++] = work.row.aligned && !is_loaded(at, at[k]);
        ++k;
      };
      Rule::streams(e, decide);
    }

    static TORSION_INLINE bool is_loaded(void* const* at, const void* array) {
      E e{};
      int k = 0;
      bool found = false;
      auto compare = [&]<class Of, class X>(Of, X&) __attribute__((always_inline)) {
        found = found || (Of::loads(P) && at[k] == array);
        ++k;
      };
      Rule::streams(e, compare);
      return found;
    }

    TORSION_INLINE void flush(void* const* at, int64_t i) const {
      E e{};
      int k = 0, n = 0;
      auto write = [&]<class Of, class X>(Of, X&) __attribute__((always_inline)) {
        if constexpr (is_staged<P, Of>) {
          using Q = typename T::template Of<Of::role>;
          char* const to = reinterpret_cast<char*>(static_cast<Q*>(at[k]) + i);
          if (around[n])
            write_around(to, bytes[n], kSpan * sizeof(Q));
          else
            memcpy(to, bytes[n], kSpan * sizeof(Q));
          ++n;
        }
        ++k;
      };
      Rule::streams(e, write);
    }
  };

  // Element i of the arrays is element j of the span.
  template <Pass P, bool Staged>
  static TORSION_INLINE void store(E& e, void* const* at, int64_t i, const typename Round::Block& round, int64_t j,
                                   char (*stage)[kSpan * sizeof(M)]) {
    int k = 0, n = 0;
    auto give = [&]<class Of, class X>(Of, X& x) __attribute__((always_inline)) {
      if constexpr (Of::stores(P) && is_stored<Of, T>) {
        using Q = typename T::template Of<Of::role>;
        const Q q = round.template narrow<Q, Of::role>(x, j);
        if constexpr (Staged && is_staged<P, Of>)
          reinterpret_cast<Q*>(stage[n++])[j] = q;
        else
          static_cast<Q*>(at[k])[i] = q;
      }
      ++k;
    };
    Rule::streams(e, give);
  }

  struct Lane {
    double (*sums)[kLanes];
    int lane;
    TORSION_INLINE double& operator[](int k) const { return sums[k][lane]; }
  };

  // Asks for `count` elements of each stream of the pass, from element i on.
  template <Pass P>
  static TORSION_INLINE void prefetch(void* const* at, int64_t i, int64_t count) {
    E e{};
    int k = 0;
    auto ask = [&]<class Of, class X>(Of, X&) __attribute__((always_inline)) {
      using Q = typename T::template Of<Of::role>;
      constexpr bool writes = Of::stores(P);  // without optimisation the call is no constant
      if constexpr (Of::loads(P))
        for (int64_t line = 0; line < count * int64_t(sizeof(Q)); line += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(static_cast<const Q*>(at[k]) + i) + line, writes);
      ++k;
    };
    Rule::streams(e, ask);
  }

  using Known = typename Rule::template Known<M>;

  template <Pass P>
  static TORSION_INLINE void add_lanes(void* const* at, int64_t i, M pre, const Known& known, double (*a)[kLanes]) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) {
      E e{};
      load<P>(e, at, i + l, pre);
      Rule::reduce(e, known, Lane{a, l});
    }
  }

  static TORSION_INLINE void reduce(const Work& work, const Frame<Rule>& f, double* out) {
    const Known known = f.template known<M>(work.row);
    if (Rule::kDemp && work.row.scaled)
      sum<kReduceScaled>(work, known, out);
    else
      sum<kReduce>(work, known, out);
  }

  template <Pass P>
  static TORSION_INLINE void sum(const Work& work, const Known& known, double* out) {
    const Streams own(work.row, work.slots), next(work.next, work.slots);
    void* const* const at = own.at;
    const int64_t begin = work.begin, end = work.end;
    const M pre = M(work.pre);
    double a[N][kLanes] = {};
    int64_t i = begin;
    if (end - begin == kChunk) {
      // Cores that need no help with an update are done here before what they ask for a little ahead has come.
      const int64_t ahead = finds_streams() ? 4 * kAhead : kAhead;
      // Several places at once and a prefetch: one place leaves most of the misses a core can have outstanding unused
      // (fp32 from memory: reduce 0.53 against 0.69 ns per element, update 0.75 against 0.92).
      for (; i < begin + kChunk / kPlaces; i += kLanes)
        for (int64_t place = 0; place < kChunk; place += kChunk / kPlaces) {
          prefetch<P>(at, i + place + ahead, kLanes);
          add_lanes<P>(at, i + place, pre, known, a);
        }
    } else {
      for (; i + kLanes <= end; i += kLanes) {
        prefetch<P>(next.at, work.next_begin + i - begin, kLanes);
        add_lanes<P>(at, i, pre, known, a);
      }
      for (int l = 0; i < end; ++i, ++l) {
        E e{};
        load<P>(e, at, i, pre);
        Rule::reduce(e, known, Lane{a, l});
      }
    }
    fold(a, out);
  }

  // Loads, computes and stores every element of a piece.
  template <Pass P, class OfSpan, class Compute>
  struct Sweep {
    const Work& work;
    typename Round::Block& round;
    OfSpan& noise;
    const Compute& compute;
    double (*lanes)[kLanes];
    const Streams own{work.row, work.slots};
    const M pre = M(work.pre);
    Stage<P> stage{work, own.at};

    template <bool Staged>
    TORSION_INLINE void element(int64_t i, int64_t first, int lane) {
      E e{};
      load<P>(e, own.at, i, pre);
      noise.give(e, i - first);
      compute(e);
      if constexpr (P == kUpdate && sums_in_update<Rule>) Rule::after(e, Lane{lanes, lane});
      store<P, Staged>(e, own.at, i, round, i - first, stage.bytes);
    }

    template <bool Staged, class Ask>
    TORSION_INLINE void span(int64_t first, int64_t end, Ask ask) {
      round.fill(first);
      noise.fill(first, end, ask);
      if constexpr (P == kUpdate && sums_in_update<Rule>) {
        // Lane by lane, as in a reduce.
        int64_t i = first;
        for (; i + kLanes <= end; i += kLanes) {
#pragma GCC ivdep
          for (int l = 0; l < kLanes; ++l) element<Staged>(i + l, first, l);
        }
        for (int l = 0; i < end; ++i, ++l) element<Staged>(i, first, l);
      } else {
#pragma GCC ivdep
        for (int64_t i = first; i < end; ++i) element<Staged>(i, first, 0);
      }
      if constexpr (Staged) stage.flush(own.at, first);
    }

    template <bool Staged>
    TORSION_INLINE void whole() {
      constexpr int64_t kPlace = kChunk / kPlacesOfUpdate;
      static_assert(kPlace % kSpan == 0);
      const bool alone = finds_streams();
      auto ask = [&](int64_t i, int64_t n, bool meanwhile) __attribute__((always_inline)) {
        if (meanwhile || !alone) prefetch<P>(own.at, i + kAheadOfUpdate, n);
      };
      for (int64_t i = work.begin; i < work.begin + kPlace; i += kSpan)
        for (int64_t x = i; x < i + kChunk; x += kPlace) span<Staged>(x, x + kSpan, ask);
    }

    TORSION_INLINE void operator()() {
      if (work.end - work.begin < kChunk) {
        const Streams next(work.next, work.slots);
        auto ask = [&](int64_t i, int64_t n, bool)
                       __attribute__((always_inline)) { prefetch<P>(next.at, work.next_begin + i - work.begin, n); };
        for (int64_t i = work.begin; i < work.end; i += kSpan) span<false>(i, std::min(work.end, i + kSpan), ask);
      } else if (n_staged<P> > 0 && work.long_list) {
        whole<(n_staged<P> > 0)>();
        end_of_writes_around();
      } else {
        whole<false>();
      }
    }
  };

  template <Pass P, class OfSpan, class Compute>
  static TORSION_INLINE void sweep(const Work& work, typename Round::Block& round, OfSpan& noise,
                                   const Compute& compute, double (*lanes)[kLanes] = nullptr) {
    Sweep<P, OfSpan, Compute>{work, round, noise, compute, lanes}();
  }

  static TORSION_INLINE void update(const Work& work, const Frame<Rule>& f, int32_t t) {
    const typename Rule::template Coefficients<double> wide = f.coefficients[t];
    const C c = cast_numbers<C, typename Rule::template Coefficients<double>, M>(wide);
    auto round = Round::block(work.row, uint64_t(f.hyper[work.row.group].seed), uint32_t(f.steps[work.row.tensor]));
    Noise noise(work.row, f);
    constexpr int A = n_update_sums<Rule>;
    double lanes[A ? A : 1][kLanes] = {};
    sweep<kUpdate>(work, round, noise, [&](E& e) __attribute__((always_inline)) { Rule::update(e, c); }, lanes);
    if constexpr (A > 0) fold(lanes, f.after + (work.piece * A));
  }

  // Adds up the lanes of each sum.
  template <int K>
  static TORSION_INLINE void fold(double (&a)[K][kLanes], double* out) {
    for (int s = 0; s < K; ++s) {
      for (int width = kLanes / 2; width; width /= 2)
        for (int l = 0; l < width; ++l) a[s][l] += a[s][l + width];
      out[s] = a[s][0];
    }
  }

  static TORSION_INLINE void restore(const Work& work) {
    if constexpr (Rule::kRestores) {
      Nearest::Block round;
      NoNoise noise;
      Body<Rule, T, Nearest>::template sweep<kRestore>(work, round, noise,
                                                       [](E& e) __attribute__((always_inline)) { Rule::restore(e); });
    }
  }
};

template <class Rule>
struct PieceFunctions {
  void (*reduce)(const Work&, const Frame<Rule>&, double*);
  void (*update)(const Work&, const Frame<Rule>&, int32_t);
  void (*restore)(const Work&);
};

template <class Rule, class T, class Round>
struct Levels {
  using B = Body<Rule, T, Round>;
#define TORSION_LEVEL(name, attribute)                                                                                 \
  attribute __attribute__((noinline)) static void reduce_##name(const Work& work, const Frame<Rule>& f, double* out) { \
    B::reduce(work, f, out);                                                                                           \
  }                                                                                                                    \
  attribute __attribute__((noinline)) static void update_##name(const Work& work, const Frame<Rule>& f, int32_t t) {   \
    B::update(work, f, t);                                                                                             \
  }
  TORSION_LEVEL(base, )
#ifdef TORSION_X86_LEVELS
  TORSION_LEVEL(v3, __attribute__((target("arch=x86-64-v3"))))
  TORSION_LEVEL(v4, __attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))))
#endif
#undef TORSION_LEVEL
  __attribute__((noinline)) static void restore(const Work& work) { B::restore(work); }

  static PieceFunctions<Rule> pick() {
#ifdef TORSION_X86_LEVELS
    if (isa_level() == 2) return {reduce_v4, update_v4, restore};
    if (isa_level() == 1) return {reduce_v3, update_v3, restore};
#endif
    return {reduce_base, update_base, restore};
  }
};

template <class Rule>
const PieceFunctions<Rule>& piece_functions(int32_t kind) {
  using Round = std::conditional_t<Rule::kRounds, Stochastic, Nearest>;
  static const std::array<PieceFunctions<Rule>, kKinds> table = {
      Levels<Rule, F32, Nearest>::pick(), Levels<Rule, F64, Nearest>::pick(), Levels<Rule, BF16, Nearest>::pick(),
      Levels<Rule, F16, Nearest>::pick(), Levels<Rule, BF16, Round>::pick(),  Levels<Rule, F16, Round>::pick(),
  };
  return table[size_t(kind)];
}

using torsion::Phase;

template <class Rule>
struct Runner {
  using F = Frame<Rule>;
  static constexpr int N = F::N;

  static int64_t workspace_size(const Table& t) {
    return int64_t(t.pieces.size()) * N + int64_t(t.rows.size()) * (N + F::C) + (int64_t(t.n_scopes) + 1) * N;
  }

  // Points the frame's arrays into the table's workspace.
  static void bind(F& f, Table& t) {
    t.workspace.resize(size_t(workspace_size(t)));
    double* at = t.workspace.data();
    f.rows = t.rows.data();
    f.pieces = t.pieces.data();
    f.noise = t.noise.data();
    f.scope_first = t.scope_first.data();
    f.n_rows = int32_t(t.rows.size());
    f.n_scopes = t.n_scopes;
    f.partial = at;
    f.row_sums = f.partial + t.pieces.size() * N;
    f.sums = f.row_sums + t.rows.size() * N;
    f.coefficients = reinterpret_cast<typename F::Coefficients*>(f.sums + (int64_t(t.n_scopes) + 1) * N);
  }

  static void add_up(F& f) {
    double* all = f.sums + int64_t(f.n_scopes) * N;
    std::fill(f.sums, all + N, 0.);
    for (int32_t t = 0; t < f.n_rows; ++t) {
      const Row& row = f.rows[t];
      double* sum = f.row_sums + int64_t(t) * N;
      std::fill(sum, sum + N, 0.);
      for (int64_t p = row.first_piece; p < row.first_piece + row.pieces; ++p)
        for (int k = 0; k < N; ++k) sum[k] += f.partial[p * N + k];
      double* scope = f.sums + int64_t(row.scope) * N;
      const bool counts = f.counts_in_scope(row);
      for (int k = 0; k < N; ++k) {
        sum[k] *= row.weight;
        all[k] += sum[k];
        if (counts) scope[k] += sum[k];
      }
    }
  }

  static void finalize(F& f) {
    f.decide();
    if (f.status->skip) return;
    for (int32_t s = 0; s < f.n_scopes; ++s) f.advance(s);
    for (int32_t t = 0; t < f.n_rows; ++t) f.set_coefficients(t);
  }

  static void run(F& f, int64_t n_pieces, int threads, Phase phase) {
    const double inverse_scale = f.scale();
    auto work_of = [&](int64_t k) {
      const Piece &p = f.pieces[k], &next = f.pieces[std::min(k + 1, n_pieces - 1)];
      const Row& row = f.rows[p.row];
      return Work{row,
                  f.rows[next.row],
                  int64_t(p.chunk) * kChunk,
                  std::min(row.n, (int64_t(p.chunk) + 1) * kChunk),
                  int64_t(next.chunk) * kChunk,
                  f.slots,
                  f.pre(row, inverse_scale),
                  n_pieces >= kLongList,
                  k};
    };
    auto team = [&](int rank, int size) {
      const int64_t a = n_pieces * rank / size, z = n_pieces * (rank + 1) / size;
      if (phase == Phase::closing) {
        if (rank == 0 && f.status->skip == kGo) add_up(f);
      } else if (phase != Phase::update) {
        for (int64_t k = a; k < z; ++k) {
          const Work work = work_of(k);
          piece_functions<Rule>(work.row.kind).reduce(work, f, f.partial + k * N);
        }
        if (size > 1) {
#pragma omp barrier
        }
        if (rank == 0) add_up(f);
      }
      if (phase == Phase::reduce) return;
      if (rank == 0) finalize(f);
      if (size > 1) {
#pragma omp barrier
      }
      if (f.status->skip == kSkippedBefore || (f.status->skip != kGo && !Rule::kRestores)) return;
      for (int64_t k = a; k < z; ++k) {
        const Work work = work_of(k);
        if (f.status->skip)
          piece_functions<Rule>(work.row.kind).restore(work);
        else
          piece_functions<Rule>(work.row.kind).update(work, f, f.pieces[k].row);
      }
    };
    // No more threads than pieces: waking one for nothing costs more than a small step.
    const int size = int(std::max<int64_t>(1, std::min<int64_t>(threads, n_pieces)));
    if (size == 1) {
      team(0, 1);
    } else {
#pragma omp parallel num_threads(size)
      team(omp_get_thread_num(), omp_get_num_threads());
    }
  }
};

}  // namespace torsion::cpu
