// The passes of a Lookbehind cycle: CUDA kernels against the CPU runner, on a CPU. As engine_test.
#include "checks.h"
#include "cycle_world.h"

namespace torsion::test {
namespace {

// k = 3, gradients used twice.
template <class Base, bool Asam, class Runs>
void adaptive_cycle(Runs& runs) {
  runs.template pass<Ascent<Asam, true>>({}, true);
  runs.template pass<DescentAscent<Base, Asam>>({.source = kSlowSlot, .target = kFirstSlot});
  runs.template pass<DescentAscent<Base, Asam>>({.source = kFirstSlot, .target = kFastSlot});
  runs.template pass<Descent<Base>>({.source = kFastSlot, .target = kPerturbedSlot});
  runs.template pass<Blend<true>>({.source = kPerturbedSlot, .first = kFirstSlot});
}

// k = 2, a gradient for each ascent and each descent.
template <class Base, bool Asam, class Runs>
void fixed_cycle(Runs& runs) {
  runs.template pass<Ascent<Asam, true>>({}, true);
  runs.template pass<Descent<Base>>({.source = kSlowSlot, .target = kFastSlot});
  runs.template pass<Ascent<Asam, false>>({});
  runs.template pass<DescentBlend<Base>>({.source = kFastSlot});
}

// The simplest base and the widest; the audit takes all, for which a compiler needs minutes.
template <class Check>
void for_bases(Check check) {
  check.template operator()<Sgd<true>, true>();
  check.template operator()<AdaTam, true>();
#ifdef TORSION_EVERY_BASE
  check.template operator()<Sgd<false>, false>();
  check.template operator()<Sgd<true>, false>();
  check.template operator()<Adam, false>();
  check.template operator()<Adam, true>();
  check.template operator()<Tam, false>();
  check.template operator()<Tam, true>();
#endif
}

// Every pass on numbers of its own, whose sums are exact: the same bits after each.
struct Compared {
  CycleWorld cpu, device;
  int64_t grid;
  bool split;
  uint32_t passes = 0;
  Compared(const Setup& setup, int64_t grid, bool split = false)
      : cpu(setup), device(setup), grid(grid), split(split) {}

  template <class Rule>
  void pass(Route route, bool opens = false) {
    ++passes;
    for (CycleWorld* w : {&cpu, &device}) w->new_numbers(passes);
    cpu.on_cpu<Rule>(route, opens, split);
    device.on_device<Rule>(grid, route, opens, split);
    const std::string where = cpu.differs(device);
    REQUIRE(where.empty(), Rule::label() + " grid " + std::to_string(grid) + ": " + where);
    REQUIRE(device.status.skip == kGo && device.ticket() == 0);
  }
};

void kinds() {
  for (int32_t kind = 0; kind < kKinds; ++kind)
    for_bases([&]<class Base, bool Asam> {
      Compared runs(scaled({.tensors = sizes(kind, 20001), .shared_double = kind == kF64}), 3);
      adaptive_cycle<Base, Asam>(runs);
      fixed_cycle<Base, Asam>(runs);
    });
}

void scopes_groups_kinds() {
  for (bool split : {false, true})
    for_bases([&]<class Base, bool Asam> {
      Compared runs(scaled(mixed()), split ? 1 : 3, split);
      adaptive_cycle<Base, Asam>(runs);
      fixed_cycle<Base, Asam>(runs);
    });
}

// The last descent and the blend in three launches: as the runner of the CPU does them, and as the two passes apart do.
// Their sums are of numbers that were rounded, so that the last bits of an alpha depend on their order.
template <class Base>
void closes(const Setup& setup, bool spoiled) {
  CycleWorld cpu(setup), device(setup), apart(setup);
  for (CycleWorld* w : {&cpu, &device, &apart}) {
    w->new_numbers(1);
    if (spoiled) put(w->table.rows[0].at[kGradSlot], w->table.rows[0].kind, kGradSlot, 0, NAN);
  }
  cpu.close_on_cpu<LastDescent<Base>>();
  const int64_t before = host::counts.launches;
  device.close_on_device<LastDescent<Base>>(3);
  const int64_t uploads = 2;  // the images of two new tables
  const bool one_kind = setup.tensors.size() == sizes(kF32).size();
  REQUIRE(!one_kind || host::counts.launches - before - uploads == 3);
  apart.on_cpu<Descent<Base>>({.source = kFastSlot, .target = kPerturbedSlot});
  apart.on_cpu<Blend<true>>({.source = kPerturbedSlot, .first = kFirstSlot});
  const std::string where = cpu.drifts(device);
  REQUIRE(where.empty(), std::string(Base::kName) + ": " + where);
  REQUIRE(cpu.status.skip == device.status.skip && cpu.status.skipped == device.status.skipped);
  REQUIRE(device.ticket() == 0 && cpu.status.skipped == spoiled);
  for (size_t t = 0; t < cpu.alphas.size() && !spoiled; ++t)
    REQUIRE(std::abs(cpu.alphas[t] - device.alphas[t]) <= 1e-15 * 4);
  for (int slot : {kStateSlot, kSecondStateSlot}) REQUIRE(cpu.same(apart, slot));
  if (spoiled) REQUIRE(cpu.drifts(apart).empty());
}

void closing() {
  for (bool spoiled : {false, true}) {
    for (int32_t kind = 0; kind < kKinds; ++kind) {
      std::vector<Spec> tensors = sizes(kind, 20001);
      std::swap(tensors[0], tensors[3]);  // the first has a gradient to spoil
      const Setup s = scaled({.tensors = tensors});
      closes<Sgd<true>>(s, spoiled);
      closes<AdaTam>(s, spoiled);
#ifdef TORSION_EVERY_BASE
      closes<Sgd<false>>(s, spoiled);
      closes<Adam>(s, spoiled);
      closes<Tam>(s, spoiled);
#endif
    }
    Setup several = scaled({.tensors = {{333}, {.n = 20001, .kind = kBF16}, {.n = 7, .kind = kF64}}});
    closes<Sgd<true>>(several, spoiled);
  }
}

void fixed_blend() {
  for (double alpha : {0., .375, .5, 1.}) {
    Compared runs(mixed(), 3);
    runs.cpu.alpha = runs.device.alpha = alpha;
    runs.pass<Blend<false>>({.source = kFastSlot}, true);
  }
}

void clip() {
  Setup s = scaled(mixed());
  s.max_norm = 3;
  s.found_inf = 0.f;
  Compared runs(s, 3);
  adaptive_cycle<AdaTam, true>(runs);
}

void stochastic_rounding() {
  for (int32_t kind : {kBF16Stochastic, kF16Stochastic}) {
    Setup s;
    for (int64_t key : {int64_t(0), int64_t(5), int64_t(8), (int64_t(1) << 33) + 3})
      for (int offset : {0, 1}) s.tensors.push_back({.n = 17001, .kind = kind, .offset = offset, .key = key});
    Compared runs(s, 3);
    adaptive_cycle<Sgd<true>, true>(runs);
    fixed_cycle<Sgd<true>, true>(runs);
  }
}

void many_groups() {
  for (int32_t groups : {17, 18, 90}) {
    Setup s{.groups = groups};
    for (int32_t g = 0; g < groups; ++g) s.tensors.push_back({.n = 50 + g, .group = g, .scaled = g % 2 == 0});
    Compared runs(s, 3);
    adaptive_cycle<AdaTam, true>(runs);
    fixed_cycle<Sgd<true>, true>(runs);
  }
}

void nothing_to_do() {
  for (bool split : {false, true}) {
    Compared none({.scopes = 0, .groups = 0}, 1, split), empty({.tensors = {{0}, {.n = 0, .kind = kBF16}}}, 3, split);
    adaptive_cycle<Sgd<true>, true>(none);
    adaptive_cycle<Sgd<true>, true>(empty);
  }
}

// A cycle on normal numbers, of which pass `bad` meets a gradient that is not finite, or is told of one.
struct Spoiled {
  CycleWorld cpu, device;
  const CycleWorld before;
  int bad;
  bool with_nan, split;
  int passes = 0, skipped = 0;
  Spoiled(const Setup& setup, int bad, bool with_nan, bool split)
      : cpu(setup), device(setup), before(setup), bad(bad), with_nan(with_nan), split(split) {}

  template <class Rule>
  void pass(Route route, bool opens = false) {
    const bool spoils = passes == bad;
    for (CycleWorld* w : {&cpu, &device}) {
      w->new_gradients(uint32_t(passes));
      Row& row = w->table.rows.back();
      if (spoils && with_nan) put(row.at[kGradSlot], row.kind, kGradSlot, row.n - 1, NAN);
      w->found_inf = spoils && !with_nan;
      if (passes > bad) w->fill(kSlowSlot, kSlowSlot + 1, 0, true);  // a second restore would show
    }
    const CycleWorld was = device;
    cpu.on_cpu<Rule>(route, opens, split);
    device.on_device<Rule>(3, route, opens, split);
    skipped += spoils;
    const std::string where = cpu.drifts(device);
    REQUIRE(where.empty(), Rule::label() + ": " + where);
    REQUIRE(device.status.skip == (passes < bad ? kGo : spoils ? kSkip : kSkippedBefore), Rule::label());
    REQUIRE(device.status.skipped == skipped && device.ticket() == 0, Rule::label());
    if (spoils) {
      REQUIRE(device.same(before, kParamSlot), Rule::label() + " did not restore");
      REQUIRE(device.same(was, kStateSlot) && device.same(was, kSecondStateSlot) && device.steps == was.steps);
    } else if (passes > bad) {
      REQUIRE(first_difference(device.memory, was.memory).empty() && device.steps == was.steps, Rule::label());
    }
    ++passes;
  }
};

void skipped_cycle() {
  Setup s = scaled(mixed());
  s.exact = false;
  s.found_inf = 0.f;
  s.tensors.push_back({.n = 20000, .kind = kF16, .scope = 4});
  for (bool split : {false, true})
    for (bool with_nan : {false, true})
      for (int bad = 0; bad < 4; ++bad) {
        Spoiled adaptive(s, bad, with_nan, split), fixed(s, bad, with_nan, split);
        adaptive_cycle<AdaTam, true>(adaptive);
        fixed_cycle<Sgd<true>, true>(fixed);
        adaptive.bad = fixed.bad = 99;  // the next outer step goes through
        adaptive_cycle<AdaTam, true>(adaptive);
        fixed_cycle<Sgd<true>, true>(fixed);
      }
}

// Whatever the grid, the same bits.
struct Gridded {
  CycleWorld one, other;
  int64_t grid;
  uint32_t passes = 0;
  Gridded(const Setup& setup, int64_t grid) : one(setup), other(setup), grid(grid) {}
  template <class Rule>
  void pass(Route route, bool opens = false) {
    ++passes;
    for (CycleWorld* w : {&one, &other}) w->new_gradients(passes);
    one.on_device<Rule>(1, route, opens);
    other.on_device<Rule>(grid, route, opens);
    REQUIRE(one.differs(other).empty(), Rule::label() + ": " + one.differs(other));
  }
};

void grid_independence() {
  Setup s = scaled(mixed());
  s.exact = false;
  s.tensors.push_back({.n = 6 * kChunk + 77});
  for (int64_t grid : {3, 1000}) {
    Gridded runs(s, grid);
    adaptive_cycle<Sgd<true>, true>(runs);
  }
}

// An outer step whose gradients lie elsewhere in each phase, captured and replayed twice, after the host's table is gone.
struct Captured {
  CycleWorld& world;
  std::vector<std::vector<void*>>& gradients;
  template <class Rule>
  void pass(Route route, bool opens = false) {
    gradients.push_back(world.move_gradients());
    world.on_device<Rule>(3, route, opens);
  }
};

struct Replayed {
  CycleWorld& cpu;
  uint32_t seed;
  template <class Rule>
  void pass(Route route, bool opens = false) {
    cpu.new_gradients(++seed);
    cpu.on_cpu<Rule>(route, opens);
  }
};

void captured_cycle() {
  Setup s = scaled(mixed());
  s.exact = false;
  CycleWorld cpu(s), device(s);
  std::vector<std::vector<void*>> gradients;
  std::vector<std::function<void()>> graph;
  host::counts = {};
  host::graph = &graph;
  Captured capture{device, gradients};
  adaptive_cycle<AdaTam, true>(capture);
  host::graph = nullptr;
  REQUIRE(host::counts.copies == 0, "a capture must not copy from host memory");
  const auto rows = device.table.rows;
  for (uint32_t replay = 0; replay < 2; ++replay) {
    for (uint32_t phase = 0; phase < gradients.size(); ++phase) {
      device.table.rows = rows;
      device.take_gradients(gradients[phase]);
      device.new_gradients(10 * replay + phase + 1);
    }
    device.table.rows.assign(rows.size(), Row{});
    device.table.scope_first.assign(device.table.scope_first.size(), -1);
    for (auto& work : graph) work();
    Replayed runs{cpu, 10 * replay};
    adaptive_cycle<AdaTam, true>(runs);
    for (auto& streams : cpu.memory) std::fill(streams[kGradSlot].begin(), streams[kGradSlot].end(), uint4{});
    for (auto& streams : device.memory) std::fill(streams[kGradSlot].begin(), streams[kGradSlot].end(), uint4{});
    REQUIRE(cpu.drifts(device).empty(), cpu.drifts(device));
  }
}

// Two launches a pass, none of them for a table that stayed.
struct Counted {
  CycleWorld world;
  int expected;
  template <class Rule>
  void pass(Route route, bool opens = false) {
    host::counts = {};
    world.on_device<Rule>(3, route, opens);
    REQUIRE(host::counts.launches == expected && host::counts.copies == 0, Rule::label());
  }
};

void launches_per_pass() {
  const Setup one{.tensors = sizes(kF32)}, all = mixed();
  Counted alike{CycleWorld(one), 2}, each{CycleWorld(all), 2 * kKinds};
  for (Counted* runs : {&alike, &each}) {
    runs->world.on_device<Ascent<true, true>>(3, {}, true);
    adaptive_cycle<Sgd<true>, true>(*runs);
    fixed_cycle<Sgd<true>, true>(*runs);
  }
  Counted blend{CycleWorld(one), 2};
  blend.world.on_device<Ascent<true, true>>(3, {}, true);
  blend.pass<Blend<false>>({}, true);
}

const Checks kChecks = {
    {"kinds", kinds},
    {"scopes_groups_kinds", scopes_groups_kinds},
    {"fixed_blend", fixed_blend},
    {"clip", clip},
    {"closing", closing},
    {"stochastic_rounding", stochastic_rounding},
    {"many_groups", many_groups},
    {"nothing_to_do", nothing_to_do},
    {"skipped_cycle", skipped_cycle},
    {"grid_independence", grid_independence},
    {"captured_cycle", captured_cycle},
    {"launches_per_pass", launches_per_pass},
};

}  // namespace
}  // namespace torsion::test

int main(int count, char** names) { return torsion::test::run_checks(torsion::test::kChecks, count, names); }
