// The CUDA engine against the CPU runner, on a CPU. `engine_test` runs every check below, `engine_test NAME...` those
// named; each prints one line; the exit status is the number of failures.
#include "checks.h"
#include "cpu/normals.cpp"
#include "cycle_world.h"

namespace torsion::test {
namespace {

// Same bits after every step.
template <class Rule, int Threads = 1>
void same(const Setup& setup, int64_t grid, bool split = false, int steps = 2) {
  World<Rule> cpu(setup), device(setup);
  for (int step = 0; step < steps; ++step) {
    cpu.new_gradients(uint32_t(step));
    device.new_gradients(uint32_t(step));
    cpu.step_on_cpu(split);
    device.template step_on_device<Threads>(grid, split);
    const std::string where = cpu.differs(device);
    REQUIRE(where.empty(), std::string(Rule::kName) + " grid " + std::to_string(grid) + ": " + where);
    REQUIRE(!split || cpu.sums == device.sums);
    REQUIRE(device.ticket() == 0);
  }
}

template <class Check>
void for_rules(Check check) {
  check.template operator()<Tam>();
  check.template operator()<AdaTam>();
}

void kinds() {
  for (int32_t kind = 0; kind < kKinds; ++kind)
    for (int64_t grid : {1, 3})
      for_rules([&]<class Rule> { same<Rule>({.tensors = sizes(kind), .shared_double = kind == kF64}, grid); });
}

template <class Check>
void for_rules_with_demp(Check check) {
  check.template operator()<DempStep<Tam>>();
  check.template operator()<DempStep<AdaTam>>();
}

void lasso_and_noise() {
  for (int32_t kind = 0; kind < kKinds; ++kind)
    for_rules_with_demp([&]<class Rule> { same<Rule>({.tensors = sizes(kind), .shared_double = kind == kF64}, 3); });
  const Setup s = mixed();
  for (bool split : {false, true}) for_rules_with_demp([&]<class Rule> { same<Rule>(s, 3, split); });
}

// The same numbers by the plain equations.
void lasso_and_noise_by_hand() {
  const Setup s{.tensors = {{12}, {12}, {12}}};
  World<DempStep<Tam>> with(s);
  World<Tam> without(s);
  with.new_gradients(1);
  without.new_gradients(1);
  const auto number = [](const auto& w, size_t t, int stream, int64_t i) -> float& {
    return static_cast<float*>(w.table.rows[t].at[stream])[i];
  };
  for (size_t t = 1; t < 3; t += 2)  // scaled rows are the odd ones
    for (int64_t i = 0; i < 12; ++i) {
      const float p = number(without, t, 0, i);
      number(without, t, 1, i) += 3.f / 64 * float(int(p > 0) - int(p < 0));
    }
  with.step_on_cpu();
  without.step_on_cpu();
  for (size_t t = 0; t < 3; ++t) {
    const NoiseMap& map = with.table.noise[t];
    for (int64_t i = 0; i < 12; ++i) {
      const int64_t row = i / map.columns, e = (map.row_of ? map.row_of[row] : row) * map.columns + i % map.columns;
      float normal[4];
      normals_of_block(0x123456789abcdefu, uint64_t(e) >> 2, 7u, uint32_t(map.tensor_id), normal);
      const float noise = map.live && !map.live[row] ? 0.f : .125f * normal[e & 3];
      REQUIRE(number(with, t, 0, i) == number(without, t, 0, i) + noise);
      REQUIRE(number(with, t, 2, i) == number(without, t, 2, i));
    }
  }
}

void scopes_groups_kinds() {
  const Setup s = mixed();
  for (int64_t grid : {1, 3}) for_rules([&]<class Rule> { same<Rule>(s, grid); });
}

void clone_first_step() {
  Setup s = mixed();
  s.clone = true;
  for (size_t t = 0; t < s.tensors.size(); t += 3) s.tensors[t].steps = 5;  // joined earlier
  same<Tam>(s, 3, false, 3);
}

void clip_and_scale() {
  Setup s = mixed();
  s.max_norm = 3;
  s.grad_scale = 4.f;
  s.found_inf = 0.f;
  for_rules([&]<class Rule> { same<Rule>(s, 3); });
}

template <class Rule>
void skips(Setup s, bool with_nan, bool split) {
  World<Rule> before(s), device(s);
  before.new_gradients(0);
  device.new_gradients(0);
  if (with_nan)
    for (auto* w : {&before, &device}) put(w->table.rows.back().at[1], w->table.rows.back().kind, 1, 3, NAN);
  device.step_on_device(3, split);
  REQUIRE(device.status.skip == 1 && device.status.skipped == 1);
  REQUIRE(!std::isfinite(device.status.grad_norm));
  before.status = device.status;
  REQUIRE(before.differs(device).empty(), before.differs(device));
  REQUIRE(device.ticket() == 0);
  // The next finite step goes through.
  for (auto* w : {&before, &device}) w->new_gradients(1);
  if (!with_nan) return;
  before.step_on_cpu();
  device.step_on_device(3, split);
  REQUIRE(device.status.skip == 0 && device.status.skipped == 1);
  REQUIRE(before.differs(device).empty(), before.differs(device));
}

void skipped_step() {
  Setup s = mixed();
  s.tensors.push_back({.n = 20000, .kind = kF16, .scope = 4});
  for (bool split : {false, true}) for_rules([&]<class Rule> { skips<Rule>(s, true, split); });
  s.found_inf = 1.f;
  for_rules([&]<class Rule> { skips<Rule>(s, false, false); });
}

void stochastic_rounding() {
  for (int32_t kind : {kBF16Stochastic, kF16Stochastic}) {
    Setup s;
    for (int64_t key : {int64_t(0), int64_t(5), int64_t(8), int64_t(13), (int64_t(1) << 33) + 3, (int64_t(1) << 40)})
      for (int offset : {0, 1}) s.tensors.push_back({.n = 17001, .kind = kind, .offset = offset, .key = key});
    for_rules([&]<class Rule> { same<Rule>(s, 3); });
  }
}

// A shard rounds as its part of the whole tensor does, wherever the cut falls. decay = 1 keeps the sums out of it.
void rounding_of_a_shard() {
  constexpr int64_t n = 40000;
  for (int64_t cut : {8, 5, 16384, 16391}) {
    const Setup whole{.tensors = {{.n = n, .kind = kBF16Stochastic}}};
    const Setup part{.tensors = {{.n = n - cut, .kind = kBF16Stochastic, .key = cut}}};
    World<Tam> a(whole), b(part);
    a.hyper[0].decay = b.hyper[0].decay = 1;
    a.new_gradients(0);
    void* const* from = a.table.rows[0].at;
    void* const* to = b.table.rows[0].at;
    for (int k = 0; k < World<Tam>::S; ++k) {
      const size_t size = size_of(kBF16Stochastic, k);
      memcpy(to[k], static_cast<char*>(from[k]) + size_t(cut) * size, size_t(n - cut) * size);
    }
    a.step_on_device(1);
    b.step_on_device(3);
    REQUIRE(memcmp(to[0], static_cast<uint16_t*>(from[0]) + cut, size_t(n - cut) * 2) == 0, double(cut));
  }
}

void split_phases() {
  for (int64_t grid : {1, 3}) for_rules([&]<class Rule> { same<Rule>(mixed(), grid, true); });
}

// A step captured with a changed table and replayed twice, after the host's table is gone.
void captured_upload() {
  for_rules([]<class Rule> {
    const Setup s = mixed();
    World<Rule> cpu(s), device(s);
    std::vector<std::function<void()>> graph;
    host::counts = {};
    host::graph = &graph;
    device.step_on_device(3);
    host::graph = nullptr;
    REQUIRE(host::counts.copies == 0, "a capture must not copy from host memory");
    REQUIRE(device.differs(World<Rule>(s)).empty());
    const auto rows = device.table.rows;
    for (uint32_t replay = 0; replay < 2; ++replay) {
      device.table.rows = rows;
      for (auto* w : {&cpu, &device}) w->new_gradients(replay);
      device.table.rows.assign(rows.size(), Row{});
      device.table.scope_first.assign(device.table.scope_first.size(), -1);
      for (auto& work : graph) work();
      cpu.step_on_cpu();
      REQUIRE(cpu.differs(device).empty(), cpu.differs(device));
    }
  });
}

void many_groups_and_device_rates() {
  const float narrow = .0625f;
  const double wide = .1;
  for (int32_t groups : {1, 2, 21, 25, 26, 90}) {
    Setup s{.groups = groups};
    s.rates.resize(size_t(groups));
    for (int32_t g = 0; g < groups; ++g) {
      s.tensors.push_back({.n = 50 + g, .group = g});
      if (g % 3 == 0) s.rates[size_t(g)] = {&narrow, false};
      if (g % 3 == 1) s.rates[size_t(g)] = {&wide, true};
    }
    for_rules([&]<class Rule> { same<Rule>(s, 3); });
  }
}

void launches_per_step() {
  Setup s{.tensors = sizes(kF32)};
  World<Tam> w(s);
  w.step_on_device(3);
  host::counts = {};
  w.step_on_device(3);
  REQUIRE(host::counts.launches == 2 && host::counts.copies == 0, double(host::counts.launches));
  const Setup all = mixed();
  World<Tam> m(all);
  m.step_on_device(3);
  host::counts = {};
  m.step_on_device(3);
  REQUIRE(host::counts.launches == 2 * kKinds, double(host::counts.launches));
  m.table.dirty = true;
  host::counts = {};
  m.step_on_device(3);
  REQUIRE(host::counts.launches == 2 * kKinds + 1 && host::counts.copies == 1);
}

void nothing_to_do() {
  for_rules([]<class Rule> {
    same<Rule>({.scopes = 0, .groups = 0}, 1);
    same<Rule>({.tensors = {{0}, {.n = 0, .kind = kBF16}}}, 3);
    same<Rule>({.tensors = {{0}}}, 3, true);
  });
}

// More pieces than a warp sums, more rows than a warp sums.
void long_lists() {
  Setup s{.tensors = {{.n = 257 * kChunk + 5}, {.n = 9 * kChunk}}, .scopes = 2};
  for (int t = 0; t < 300; ++t) s.tensors.push_back({.n = 3, .scope = 1});
  same<Tam>(s, 5, false, 1);
}

// Normal numbers: sums differ from the CPU's in their last bits by the order of addition. Coefficients of float32 maths
// have absorbed that when they are rounded, so the elements still agree bit for bit; float64 elements may not.
void rounding_of_sums() {
  for_rules([]<class Rule> {
    Setup s = mixed();
    s.exact = false;
    World<Rule> cpu(s), device(s);
    for (uint32_t step = 0; step < 3; ++step) {
      cpu.new_gradients(step);
      device.new_gradients(step);
      cpu.step_on_cpu();
      device.step_on_device(3);
    }
    for (size_t i = 0; i < cpu.shared.size(); ++i)
      REQUIRE(std::abs(cpu.shared[i] - device.shared[i]) <= 1e-14, double(i));
    for (size_t t = 0; t < cpu.memory.size(); ++t)
      for (int k = 0; k < World<Rule>::S; ++k) {
        const auto &a = cpu.memory[t][size_t(k)], &b = device.memory[t][size_t(k)];
        if (s.tensors[t].kind != kF64) {
          REQUIRE(memcmp(a.data(), b.data(), a.size() * 16) == 0, double(t));
          continue;
        }
        const auto *x = reinterpret_cast<const double*>(a.data()), *y = reinterpret_cast<const double*>(b.data());
        for (size_t i = 0; i < a.size() * 2; ++i) REQUIRE(std::abs(x[i] - y[i]) <= 1e-13 * std::abs(x[i]), x[i]);
      }
  });
}

void grid_independence() {
  Setup s = mixed();
  s.exact = false;
  s.tensors.push_back({.n = 6 * kChunk + 77});
  for_rules([&]<class Rule> {
    World<Rule> one(s), other(s);
    for (int64_t grid : {2, 3, 7, 1000}) {
      one.new_gradients(uint32_t(grid));
      other.new_gradients(uint32_t(grid));
      one.step_on_device(1);
      other.step_on_device(grid);
      REQUIRE(one.differs(other).empty(), one.differs(other));
    }
  });
}

// Two warps of real threads: barriers, butterflies and queues.
void real_threads() {
  Setup s = mixed();
  s.tensors.resize(9);
  for_rules([&]<class Rule> { same<Rule, 64>(s, 2, false, 1); });
  same<Tam, 64>({.tensors = {{.n = kChunk + 3}, {.n = 5, .kind = kBF16Stochastic, .key = 3}}}, 2, false, 1);
}

// The same for the widest rule of a cycle, and for its restore.
void cycle_with_real_threads() {
  using Rule = DescentAscent<AdaTam, true>;
  Setup s = scaled(mixed());
  s.tensors.resize(7);
  CycleWorld cpu(s), device(s);
  const Route route{.source = kFirstSlot, .target = kFastSlot};
  for (const bool spoiled : {false, true}) {
    for (CycleWorld* w : {&cpu, &device}) {
      w->new_numbers(spoiled);
      if (spoiled) put(w->table.rows[2].at[kGradSlot], w->table.rows[2].kind, kGradSlot, 0, NAN);
    }
    cpu.on_cpu<Rule>(route, !spoiled);
    device.on_device<Rule, 64>(2, route, !spoiled);
    REQUIRE(device.status.skip == (spoiled ? kSkip : kGo));
    REQUIRE(first_difference(cpu.memory, device.memory).empty(), first_difference(cpu.memory, device.memory));
  }
}

template <int Threads>
void kernel_of_ranges(const int64_t* ends, int64_t count, const double* items, double* out) {
  static cuda::Scratch<2, Threads> scratch;
  cuda::sum_ranges<2, Threads>(
      count, scratch,
      [&](int64_t i, int64_t& begin, int64_t& end) {
        begin = i ? ends[i - 1] : 0;
        end = ends[i];
      },
      [&](int64_t, int64_t j, double (&a)[2]) {
        a[0] += items[j];
        a[1] += 2 * items[j];
      },
      [&](int64_t i, int k, double sum) { out[2 * i + k] = sum; });
}

template <int Threads>
void check_ranges(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> ends;
  std::vector<double> items;
  for (int64_t n : lengths) {
    for (int64_t j = 0; j < n; ++j) items.push_back(double(items.size() % 1000));
    ends.push_back(int64_t(items.size()));
  }
  std::vector<double> out(2 * ends.size(), -1);
  cuda::launch<Threads>(kernel_of_ranges<Threads>, 1, nullptr, ends.data(), int64_t(ends.size()), items.data(),
                        out.data());
  for (size_t i = 0, j = 0; i < ends.size(); ++i) {
    double sum = 0;
    for (; int64_t(j) < ends[i]; ++j) sum += items[j];
    REQUIRE(out[2 * i] == sum && out[2 * i + 1] == 2 * sum, double(i));
  }
}

void ranges() {
  std::vector<int64_t> lengths;
  for (int i = 0; i < 150; ++i)
    lengths.push_back(std::vector<int64_t>{1, 0, 8, 9, 256, 257, 1000, 31}[size_t(i * i % 8)]);
  check_ranges<1>(lengths);
  check_ranges<64>(lengths);
  check_ranges<64>(std::vector<int64_t>(70, 300));  // every thread of a round queues for the block
  check_ranges<64>(std::vector<int64_t>(70, 10));
}

// No memory behind it: where a piece far beyond 2^31 elements begins and ends.
void far_pieces() {
  using B = cuda::Body<Tam, F32>;
  Row row{};
  row.n = 5'000'000'003;
  row.aligned = 1;
  const int32_t last = int32_t(chunks_of(row.n)) - 1;
  const B::Span far(row, {}, 300'000, true), end(row, {}, last, true), scalar(row, {}, last, false);
  REQUIRE(far.begin == 4'915'200'000 && far.end == far.begin + kChunk && far.vector_end == far.end);
  REQUIRE(end.begin == int64_t(last) * kChunk && end.end == row.n && end.vector_end == row.n - 3);
  REQUIRE(scalar.vector_end == scalar.begin);
}

const Checks kChecks = {
    {"kinds", kinds},
    {"lasso_and_noise", lasso_and_noise},
    {"lasso_and_noise_by_hand", lasso_and_noise_by_hand},
    {"scopes_groups_kinds", scopes_groups_kinds},
    {"clone_first_step", clone_first_step},
    {"clip_and_scale", clip_and_scale},
    {"skipped_step", skipped_step},
    {"stochastic_rounding", stochastic_rounding},
    {"rounding_of_a_shard", rounding_of_a_shard},
    {"split_phases", split_phases},
    {"captured_upload", captured_upload},
    {"many_groups_and_device_rates", many_groups_and_device_rates},
    {"launches_per_step", launches_per_step},
    {"nothing_to_do", nothing_to_do},
    {"long_lists", long_lists},
    {"rounding_of_sums", rounding_of_sums},
    {"grid_independence", grid_independence},
    {"real_threads", real_threads},
    {"cycle_with_real_threads", cycle_with_real_threads},
    {"ranges", ranges},
    {"far_pieces", far_pieces},
};

}  // namespace
}  // namespace torsion::test

int main(int count, char** names) { return torsion::test::run_checks(torsion::test::kChecks, count, names); }
