// One copy of everything a Lookbehind cycle touches, for the two runners: one table, on which many rules take turns.
#pragma once
#include <algorithm>
#include <list>

#include "rules/cycle.h"
#include "world.h"

namespace torsion::test {

// Addresses of a row. In full precision the parameter itself is the perturbed weights.
enum Slot { kParamSlot, kGradSlot, kStateSlot, kSecondStateSlot, kSlowSlot, kFastSlot, kFirstSlot, kPerturbedSlot };

// Between which of them a pass moves the fast weights.
struct Route {
  int source = kSlowSlot, target = kFastSlot, first = kFirstSlot;
};

template <class Base>
std::vector<int> states_of() {
  std::vector<int> slots;
  for (int k = 2; k < n_streams<Base>; ++k) slots.push_back(k);
  return slots;
}

inline std::vector<int> joined(std::vector<int> a, const std::vector<int>& b, const std::vector<int>& c) {
  a.insert(a.end(), b.begin(), b.end());
  a.insert(a.end(), c.begin(), c.end());
  return a;
}

template <bool Asam, bool Opens>
std::vector<int> streams_of(Ascent<Asam, Opens>*, Route) {
  return {Opens ? kParamSlot : kPerturbedSlot, kGradSlot, kPerturbedSlot, kParamSlot, kSlowSlot};
}
template <class Base, bool Asam>
std::vector<int> streams_of(DescentAscent<Base, Asam>*, Route r) {
  return joined({r.source, r.target, kGradSlot}, states_of<Base>(), {kPerturbedSlot, kParamSlot, kSlowSlot});
}
template <class Base>
std::vector<int> streams_of(Descent<Base>*, Route r) {
  return joined({r.source, r.target, kGradSlot}, states_of<Base>(), {kPerturbedSlot, kParamSlot, kSlowSlot});
}
template <class Base>
std::vector<int> streams_of(DescentBlend<Base>*, Route r) {
  return joined({r.source, kGradSlot}, states_of<Base>(), {kSlowSlot, kParamSlot});
}
template <class Base>
std::vector<int> streams_of(LastDescent<Base>*, Route r) {
  return joined({r.source, r.target, kGradSlot}, states_of<Base>(), {kParamSlot, kSlowSlot, r.first});
}
template <bool Adaptive>
std::vector<int> streams_of(Blend<Adaptive>*, Route r) {
  return {r.source, kSlowSlot, r.first, kParamSlot};
}

inline void set_rule(Common&, const Setup&, int) {}
inline void set_rule(SgdCommon::Hyper& h, const Setup&, int g) {
  h.momentum = .9 - .01 * g;
  h.dampening = .25;
  h.nesterov = g % 2;
}
inline void set_rule(Adam::Hyper& h, const Setup&, int g) {
  h.beta1 = .9;
  h.beta2 = .99 - .01 * g;
  h.eps = 1e-8;
}

inline Setup scaled(Setup s) {
  for (size_t t = 0; t < s.tensors.size(); ++t) s.tensors[t].scaled = t % 3 != 0;
  return s;
}

struct CycleWorld {
  const Setup setup;
  Table table;
  Memory memory;
  std::vector<double> shared;
  std::vector<float> steps;
  Status status{};
  double alpha = .375;
  std::vector<double> alphas;
  float found_inf;
  std::vector<double> sums;
  std::list<std::vector<uint4>> workspaces;          // the last one is in use; those before belong to captures
  std::list<std::vector<std::vector<uint4>>> moved;  // where gradients went

  explicit CycleWorld(const Setup& setup) : setup(setup), found_inf(setup.found_inf.value_or(0)) {
    table.n_scopes = setup.scopes;
    table.n_groups = setup.groups;
    for (size_t t = 0; t < setup.tensors.size(); ++t) add(setup.tensors[t], int32_t(t));
    table.arrange();
    shared.assign(size_t(setup.scopes) * 3, 0.);
    fill(kParamSlot, kGradSlot, 0, setup.exact);
    for (const Row& row : table.rows)
      for (int k : {kStateSlot, kSecondStateSlot})
        for (int64_t i = 0; i < row.n; ++i) put(row.at[k], row.kind, k, i, 0);
  }

  void add(const Spec& spec, int32_t slot) {
    Row row = row_of(spec, slot);
    memory.emplace_back();
    for (int k = 0; k < kMaxStreams; ++k) row.at[k] = allocate(memory.back(), spec, k);
    if (spec.kind == kF32 || spec.kind == kF64) row.at[kPerturbedSlot] = row.at[kParamSlot];
    row.aligned = is_aligned(row, kMaxStreams);
    table.rows.push_back(row);
    steps.push_back(spec.steps);
  }

  // Gradients in new memory from now on; returns where, by row.
  std::vector<void*> move_gradients() {
    std::vector<void*> at;
    moved.emplace_back();
    for (const Row& row : table.rows)
      at.push_back(allocate(moved.back(), setup.tensors[size_t(row.tensor)], kGradSlot));
    take_gradients(at);
    return at;
  }
  void take_gradients(const std::vector<void*>& at) {
    for (size_t t = 0; t < at.size(); ++t) table.rows[t].at[kGradSlot] = at[t];
    table.dirty = true;
  }

  // New numbers for the slots [first, last): small multiples of 1/64, so that the order of a sum cannot matter, or normal.
  void fill(int first, int last, uint32_t seed, bool exact) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::uniform_int_distribution<int> grid(-128, 128);
    for (Row& row : table.rows)
      for (int k = first; k < last; ++k)
        for (int64_t i = 0; i < row.n; ++i) {
          const double x = exact ? grid(random) / 64. : normal(random);
          put(row.at[k], row.kind, k, i, k == kSecondStateSlot ? x * x : x);
        }
  }
  void new_gradients(uint32_t seed) { fill(kGradSlot, kGradSlot + 1, 100 + seed, setup.exact); }
  void new_numbers(uint32_t seed) { fill(0, kMaxStreams, 200 + seed, true); }

  template <class Hyper>
  std::vector<Hyper> hyper() const {
    std::vector<Hyper> all;
    for (int g = 0; g < setup.groups; ++g) {
      Hyper h{};
      static_cast<Common&>(h) = common_numbers(g);
      set_rule(h, setup, g);
      h.rho = .125;
      h.eta = .25;
      h.alpha = alpha;
      all.push_back(h);
    }
    return all;
  }

  template <class Rule>
  Frame<Rule> frame(Route route, bool opens) {
    Frame<Rule> f{};
    f.shared = shared.data();
    f.shared_is_double = setup.shared_double;
    f.steps = steps.data();
    f.status = &status;
    f.found_inf = setup.found_inf ? &found_inf : nullptr;
    f.max_norm = setup.max_norm;
    f.opens = opens;
    const auto streams = streams_of(static_cast<Rule*>(nullptr), route);
    std::copy(streams.begin(), streams.end(), f.slots.of);
    return f;
  }

  template <class Rule, class F, class Run>
  void in_phases(F& f, bool split, Run run) {
    if (!split) return run(Phase::whole);
    sums.assign((size_t(setup.scopes) + 1) * Rule::n_sums, -1.);
    f.sums = sums.data();
    run(Phase::reduce);
    run(Phase::update);
  }

  template <class Rule>
  void on_cpu(Route route, bool opens = false, bool split = false) {
    auto f = frame<Rule>(route, opens);
    const auto numbers = hyper<typename Rule::Hyper>();
    f.hyper = numbers.data();
    cpu::Runner<Rule>::bind(f, table);
    in_phases<Rule>(f, split, [&](Phase phase) { cpu::Runner<Rule>::run(f, int64_t(table.pieces.size()), 1, phase); });
  }

  template <class Rule, int Threads = 1>
  void on_device(int64_t grid, Route route, bool opens = false, bool split = false) {
    using Runner = cuda::Runner<Rule, Threads>;
    auto f = frame<Rule>(route, opens);
    char* at = placed<Rule, Threads>(grid);
    const auto numbers = hyper<typename Rule::Hyper>();
    const std::vector<cuda::Rate> rates(numbers.size());
    in_phases<Rule>(f, split, [&](Phase phase) { Runner::run(f, table, at, numbers, rates, phase, grid, nullptr); });
  }

  // The last descent and the blend after it, with an alpha for each tensor.
  template <class Rule>
  Table table_of_alphas() {
    Table next = table;
    for (Row& row : next.rows) row.scope = row.tensor;
    next.n_scopes = int32_t(next.rows.size());
    next.arrange();
    alphas.assign(next.rows.size(), -1.);
    return next;
  }
  template <class Rule>
  Frame<typename Rule::After> frame_after() {
    auto f = frame<typename Rule::After>({.source = kPerturbedSlot, .first = kFirstSlot}, false);
    f.shared = alphas.data();
    f.shared_is_double = true;
    f.found_inf = nullptr;
    return f;
  }
  static constexpr Route kLast{.source = kFastSlot, .target = kPerturbedSlot, .first = kFirstSlot};

  template <class Rule>
  void close_on_cpu() {
    using After = typename Rule::After;
    Table next = table_of_alphas<Rule>();
    auto f = frame<Rule>(kLast, false);
    auto g = frame_after<Rule>();
    const auto numbers = hyper<typename Rule::Hyper>();
    const auto next_numbers = hyper<typename After::Hyper>();
    f.hyper = numbers.data();
    g.hyper = next_numbers.data();
    cpu::Runner<Rule>::bind(f, table);
    cpu::Runner<After>::bind(g, next);
    f.after = g.partial;
    cpu::Runner<Rule>::run(f, int64_t(table.pieces.size()), 1, Phase::whole);
    cpu::Runner<After>::run(g, int64_t(next.pieces.size()), 1, Phase::closing);
  }

  template <class Rule, int Threads = 1>
  void close_on_device(int64_t grid) {
    using After = typename Rule::After;
    using Next = cuda::Runner<After, Threads>;
    Table next = table_of_alphas<Rule>();
    std::vector<uint4> memory(size_t(Next::layout(next).end) / 16, uint4{~0u, ~0u, ~0u, ~0u});
    char* next_at = reinterpret_cast<char*>(memory.data());
    Next::upload(next, next_at, false, grid, nullptr);
    char* at = placed<Rule, Threads>(grid);
    const auto numbers = hyper<typename Rule::Hyper>();
    const auto next_numbers = hyper<typename After::Hyper>();
    const std::vector<cuda::Rate> rates(numbers.size());
    const auto g = frame_after<Rule>();
    cuda::Runner<Rule, Threads>::run_before(frame<Rule>(kLast, false), table, at, numbers, rates, g, next, next_at,
                                            next_numbers, grid, nullptr);
    Next::run(g, next, next_at, next_numbers, rates, Phase::closing, grid, nullptr);
  }

  // The table on the device, of a size for every rule; a capture of a changed table has one of its own.
  template <class Rule, int Threads>
  char* placed(int64_t grid) {
    if (workspaces.empty() || (table.dirty && host::graph)) {
      int64_t bytes = 0;
      const auto grow = [&]<class Any>() { bytes = std::max(bytes, cuda::Runner<Any, Threads>::layout(table).end); };
      CycleRules::each(grow);
      ClosingRules::each(grow);
      workspaces.emplace_back(size_t(bytes) / 16, uint4{~0u, ~0u, ~0u, ~0u});
    }
    char* at = reinterpret_cast<char*>(workspaces.back().data());
    if (table.dirty) cuda::Runner<Rule, Threads>::upload(table, at, host::graph != nullptr, grid, nullptr);
    table.dirty = false;
    return at;
  }

  unsigned ticket() {
    unsigned value;
    const auto* at = reinterpret_cast<const char*>(workspaces.back().data());
    memcpy(&value, at + cuda::Runner<Blend<true>, 1>::layout(table).ticket, sizeof value);
    return value;
  }

  bool same(const CycleWorld& other, int slot) const {
    for (size_t t = 0; t < memory.size(); ++t) {
      const auto &a = memory[t][size_t(slot)], &b = other.memory[t][size_t(slot)];
      if (memcmp(a.data(), b.data(), a.size() * 16) != 0) return false;
    }
    return true;
  }

  // Of tensors whose sums were not exact: the same bits where coefficients are float32, which absorb the last bits of a
  // sum, and 1e-12 of float64 numbers near 1. Empty, or the first difference.
  std::string drifts(const CycleWorld& other) const {
    for (size_t t = 0; t < memory.size(); ++t)
      for (size_t k = 0; k < memory[t].size(); ++k) {
        const auto &a = memory[t][k], &b = other.memory[t][k];
        const std::string where = "tensor " + std::to_string(t) + " slot " + std::to_string(k);
        if (setup.tensors[t].kind != kF64) {
          if (memcmp(a.data(), b.data(), a.size() * 16) != 0) return where;
          continue;
        }
        const auto *x = reinterpret_cast<const double*>(a.data()), *y = reinterpret_cast<const double*>(b.data());
        for (size_t i = 0; i < a.size() * 2; ++i)
          if (!(x[i] == y[i] || std::isnan(x[i]) || std::abs(x[i] - y[i]) <= 1e-12 * std::max(1., std::abs(x[i]))))
            return where;
      }
    return steps == other.steps ? std::string() : "steps";
  }

  // Empty when everything has the same bits, guards included; else the first difference.
  std::string differs(const CycleWorld& other) const {
    if (const std::string where = first_difference(memory, other.memory); !where.empty()) return where;
    if (!shared.empty() && memcmp(shared.data(), other.shared.data(), shared.size() * 8) != 0) return "shared";
    if (steps != other.steps) return "steps";
    if (memcmp(&status, &other.status, sizeof status) != 0) return "status";
    if (sums != other.sums) return "sums";
    return {};
  }
};

}  // namespace torsion::test
