// One copy of everything a step touches, so that two runners can start from the same bits and be compared afterwards.
#pragma once
#include <cmath>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "cuda_on_host.h"
// After the imitation of CUDA:
#include "engine/cpu.h"
#include "engine/launch.cuh"
#include "rules/demp_step.h"

namespace torsion::test {

struct Spec {
  int64_t n;
  int32_t kind = kF32, scope = 0, group = 0;
  int offset = 0;  // elements by which every stream is moved away from alignment
  int64_t key = 0;
  double weight = 1;
  float steps = 0;
  bool scaled = false;
};

struct Setup {
  std::vector<Spec> tensors;
  int32_t scopes = 1, groups = 1;
  bool clone = false, shared_double = false;
  // Gradients and momenta are small multiples of 1/64, so that every sum is exact and its order cannot matter. Else they
  // are normal and the momenta evolve.
  bool exact = true;
  double max_norm = std::numeric_limits<double>::infinity();
  std::optional<float> grad_scale, found_inf;
  std::vector<cuda::Rate> rates;
};

inline size_t size_of(int32_t kind, int stream) {
  if (kind == kF64) return 8;
  return kind == kF32 || stream >= 2 ? 4 : 2;
}

inline void put(void* at, int32_t kind, int stream, int64_t i, double x) {
  if (kind == kF64)
    static_cast<double*>(at)[i] = x;
  else if (kind == kF32 || stream >= 2)
    static_cast<float*>(at)[i] = float(x);
  else if (kind == kBF16 || kind == kBF16Stochastic)
    static_cast<bf16*>(at)[i] = Narrow<bf16>::nearest(float(x));
  else
    static_cast<f16*>(at)[i] = Narrow<f16>::nearest(float(x));
}

// [tensor][stream], guards on both sides.
using Memory = std::vector<std::vector<std::vector<uint4>>>;
constexpr int kGuard = 2;

inline void* allocate(std::vector<std::vector<uint4>>& streams, const Spec& spec, int stream) {
  const size_t size = size_of(spec.kind, stream);
  streams.emplace_back((size_t(spec.n) + size_t(spec.offset)) * size / 16 + 1 + 2 * kGuard,
                       uint4{0x5a5a5a5a, 0x5a5a5a5a, 0x5a5a5a5a, 0x5a5a5a5a});
  return reinterpret_cast<char*>(streams.back().data() + kGuard) + size_t(spec.offset) * size;
}

inline std::string first_difference(const Memory& one, const Memory& other) {
  for (size_t t = 0; t < one.size(); ++t)
    for (size_t k = 0; k < one[t].size(); ++k) {
      const auto &a = one[t][k], &b = other[t][k];
      if (memcmp(a.data(), b.data(), a.size() * 16) == 0) continue;
      const auto *x = reinterpret_cast<const char*>(a.data()), *y = reinterpret_cast<const char*>(b.data());
      size_t i = 0;
      while (x[i] == y[i]) ++i;
      return "tensor " + std::to_string(t) + " stream " + std::to_string(k) + " byte " +
             std::to_string(int64_t(i) - 16 * kGuard);
    }
  return {};
}

inline Row row_of(const Spec& spec, int32_t slot) {
  Row row{};
  row.n = spec.n;
  row.key = spec.key;
  row.weight = spec.weight;
  row.kind = spec.kind;
  row.tensor = slot;
  row.scope = spec.scope;
  row.group = spec.group;
  row.scaled = spec.scaled;
  return row;
}

inline Common common_numbers(int g) {
  return {.lr = .1 / (1 + g),
          .weight_decay = .01 * g,
          .decoupled = double(g % 2),
          .maximize = double(g % 3 == 1),
          .stochastic = 0,
          .seed = 1e12 + g};
}

// Odd sizes, a piece exactly, several pieces, and misaligned tensors on both sides of a piece.
inline std::vector<Spec> sizes(int32_t kind, int64_t largest = 50001) {
  return {{0, kind},
          {1, kind},
          {7, kind},
          {333, kind},
          {16384, kind},
          {largest, kind},
          {.n = 333, .kind = kind, .offset = 1},
          {.n = 16390, .kind = kind, .offset = 1}};
}

inline Setup mixed() {
  Setup s{.scopes = 5, .groups = 3, .shared_double = true};
  for (int t = 0; t < 26; ++t)  // scope 3 stays empty; the scopes come out of order
    s.tensors.push_back({.n = 37 * t % 200 * (t % 5 == 0 ? 90 : 1),
                         .kind = t % kKinds,
                         .scope = (t * 7) % 5 == 3 ? 4 : (t * 7) % 5,
                         .group = t % 3,
                         .offset = t % 4 == 1,
                         .weight = t % 7 == 0 ? .5 : 1.});
  return s;
}

inline void set_rule(Tam::Hyper& h, const Setup& s, int g) {
  h.momentum = .9 - .01 * g;
  h.decay = .875;
  h.eps_damping = 1e-8;
  h.clone = s.clone;
}
inline void set_rule(AdaTam::Hyper& h, const Setup&, int g) {
  h.beta1 = .9;
  h.beta2 = .99;
  h.eps = 1e-8;
  h.decay = .875;
  h.eps_damping = 1e-8;
  h.bias_correction = g % 2;
}

template <class Rule>
struct World {
  using F = Frame<Rule>;
  static constexpr int S = n_streams<Rule>;

  const Setup& setup;
  Table table;
  Memory memory;
  std::vector<double> shared;
  std::vector<float> steps;
  Status status{};
  std::vector<typename Rule::Hyper> hyper;
  std::vector<double> sums;
  std::vector<uint4> workspace;
  std::vector<std::vector<uint8_t>> live;
  std::vector<std::vector<int64_t>> original_rows;
  double perturbation[3] = {3. / 64, .125, 7};

  explicit World(const Setup& setup) : setup(setup) {
    table.n_scopes = setup.scopes;
    table.n_groups = setup.groups;
    for (size_t t = 0; t < setup.tensors.size(); ++t) add(setup.tensors[t], int32_t(t));
    table.arrange();
    shared.assign(size_t(setup.scopes) * F::K, 0.);
    sums.assign((size_t(setup.scopes) + 1) * F::N, -1.);
    for (int g = 0; g < setup.groups; ++g) {
      typename Rule::Hyper h{};
      static_cast<Common&>(h) = common_numbers(g);
      set_rule(h, setup, g);
      hyper.push_back(h);
    }
    fill(0, 1, 0);
    fill(2, S, 1);
  }

  void add(const Spec& spec, int32_t slot) {
    Row row = row_of(spec, slot);
    memory.emplace_back();
    for (int k = 0; k < S; ++k) row.at[k] = allocate(memory.back(), spec, k);
    row.aligned = is_aligned(row, S);
    if constexpr (Rule::kDemp) make_noise(row, slot);
    table.rows.push_back(row);
    steps.push_back(spec.steps);
  }

  // Of six tensors one without noise, two all of whose rows are live; the others have dead rows, were cut, or both.
  void make_noise(Row& row, int32_t slot) {
    row.scaled = slot % 2;
    if (slot % 6 == 5) return;
    const int64_t columns = row.n % 5 == 0 ? 5 : row.n % 3 == 0 ? 3 : 1, rows = row.n / columns;
    live.emplace_back(size_t(rows));
    original_rows.emplace_back(size_t(rows));
    for (int64_t r = 0; r < rows; ++r) {
      live.back()[size_t(r)] = r % 4 != 1;
      original_rows.back()[size_t(r)] = r + r / 3;
    }
    table.noise.push_back({columns, slot % 6 >= 2 && slot % 6 != 3 ? live.back().data() : nullptr,
                           slot % 6 >= 3 ? original_rows.back().data() : nullptr, 100 + slot});
    row.noise = int32_t(table.noise.size());
  }

  // New numbers for the streams [first, last); state beyond the momentum starts at a square.
  void fill(int first, int last, uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::uniform_int_distribution<int> grid(-128, 128);
    for (Row& row : table.rows)
      for (int k = first; k < last; ++k)
        for (int64_t i = 0; i < row.n; ++i) {
          const double x = setup.exact ? grid(random) / 64. : normal(random);
          put(row.at[k], row.kind, k, i, k == 3 ? x * x : x);
        }
  }

  void new_gradients(uint32_t seed) {
    fill(1, 2, 100 + seed);
    if (setup.exact) fill(2, 3, 200 + seed);
  }

  F frame() {
    F f{};
    f.shared = shared.data();
    f.shared_is_double = setup.shared_double;
    f.steps = steps.data();
    f.status = &status;
    f.grad_scale = setup.grad_scale ? &*setup.grad_scale : nullptr;
    f.found_inf = setup.found_inf ? &*setup.found_inf : nullptr;
    f.max_norm = setup.max_norm;
    f.opens = true;
    f.perturbation = perturbation;
    f.noise_seed = 0x123456789abcdefu;
    return f;
  }

  void step_on_cpu(bool split = false) {
    F f = frame();
    auto resolved = hyper;
    for (size_t g = 0; g < setup.rates.size(); ++g)
      if (const auto& rate = setup.rates[g]; rate.at)
        resolved[g].lr = rate.is_double ? *static_cast<const double*>(rate.at) : *static_cast<const float*>(rate.at);
    f.hyper = resolved.data();
    cpu::Runner<Rule>::bind(f, table);
    const auto run = [&](Phase phase) { cpu::Runner<Rule>::run(f, int64_t(table.pieces.size()), 1, phase); };
    if (!split) return run(Phase::whole);
    f.sums = sums.data();
    run(Phase::reduce);
    run(Phase::update);
  }

  template <int Threads = 1>
  void step_on_device(int64_t grid, bool split = false) {
    using Runner = cuda::Runner<Rule, Threads>;
    char* at = device<Threads>();
    if (table.dirty) Runner::upload(table, at, host::graph != nullptr, grid, nullptr);
    table.dirty = false;
    F f = frame();
    auto rates = setup.rates;
    rates.resize(hyper.size());
    const auto run = [&](Phase phase) { Runner::run(f, table, at, hyper, rates, phase, grid, nullptr); };
    if (!split) return run(Phase::whole);
    f.sums = sums.data();
    run(Phase::reduce);
    run(Phase::update);
  }

  template <int Threads = 1>
  char* device() {
    const size_t quads = size_t(cuda::Runner<Rule, Threads>::layout(table).end) / 16;
    if (workspace.size() != quads) workspace.assign(quads, uint4{~0u, ~0u, ~0u, ~0u});
    return reinterpret_cast<char*>(workspace.data());
  }

  unsigned ticket() {
    unsigned value;
    memcpy(&value, device() + cuda::Runner<Rule, 1>::layout(table).ticket, sizeof value);
    return value;
  }

  // Empty when everything has the same bits, guards included; else the first difference.
  std::string differs(const World& other) const {
    if (const std::string where = first_difference(memory, other.memory); !where.empty()) return where;
    if (shared.size() && memcmp(shared.data(), other.shared.data(), shared.size() * 8) != 0) return "shared";
    if (steps != other.steps) return "steps";
    if (memcmp(&status, &other.status, sizeof status) != 0) return "status";
    return {};
  }
};

}  // namespace torsion::test
