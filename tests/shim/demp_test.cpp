// DemP's ops on CUDA against those on the CPU, on a CPU. `demp_test` runs every check below, `demp_test NAME...` those
// named; each prints one line; the exit status is the number of failures.
#include "cpu/demp.cpp"
#include "checks.h"
#include "cpu/flags.cpp"
#include "cpu/normals.cpp"
#include "world.h"
// After the imitation of CUDA:
#include "cuda/demp.cuh"
#include "cuda/flags.cuh"
#include "detector.h"

namespace torsion::test {
namespace {

constexpr uint64_t kSeed = 0x123456789abcdefu;
constexpr double kSigma = .37;

// ------------------------------------------------------------------------------------------------------------ normals

template <class Q>
void expect_normals(const Q* found, int64_t n, NoiseKey key) {
  std::vector<Maths<Q>> normal(size_t(n + 3) / 4 * 4);
  cpu::normals(key, 0, (n + 3) / 4, normal.data());
  for (int64_t i = 0; i < n; ++i) {
    const Q expected = Narrow<Q>::nearest(normal[size_t(i)]);
    REQUIRE(memcmp(found + i, &expected, sizeof(Q)) == 0, double(i));
  }
}

template <int Threads = 1>
void fill_and_compare(const Spec& spec, int64_t grid) {
  Memory memory(1), blank(1);
  void* at = allocate(memory[0], spec, 0);
  void* none = allocate(blank[0], spec, 0);
  const NoiseKey key{kSeed, 7, 0xfffffff0u};
  cuda::fill_normals<Threads>(at, spec.kind, spec.n, key, grid, nullptr);
  if (spec.kind == kF32) expect_normals(static_cast<float*>(at), spec.n, key);
  if (spec.kind == kF64) expect_normals(static_cast<double*>(at), spec.n, key);
  if (spec.kind == kBF16) expect_normals(static_cast<bf16*>(at), spec.n, key);
  if (spec.kind == kF16) expect_normals(static_cast<f16*>(at), spec.n, key);
  memcpy(none, at, size_t(spec.n) * size_of(spec.kind, 0));
  REQUIRE(first_difference(memory, blank).empty(), first_difference(memory, blank));
}

void normals_of_every_type() {
  for (int32_t kind = kF32; kind <= kF16; ++kind)
    for (int64_t n : {0, 1, 3, 4, 7, 8, 9, 333, 16390})
      for (int offset : {0, 1})
        for (int64_t grid : {1, 3}) fill_and_compare({.n = n, .kind = kind, .offset = offset}, grid);
}

void normals_with_real_threads() {
  for (int32_t kind = kF32; kind <= kF16; ++kind) fill_and_compare<64>({.n = 2051, .kind = kind}, 2);
}

// -------------------------------------------------------------------------------------------------------------- noise

struct Shape {
  int64_t rows, columns;
  int32_t kind = kF32;
  bool row_live = false, column_live = false, row_of = false, column_of = false;
  int64_t groups = 1;
  int offset = 0;
  int64_t original_columns = 0;  // 0: those there are
  int64_t far = 0;               // added to every original row
  bool shuffled = false;         // columns in no order
};

// Parameters with guards, masks and indices.
struct Parameters {
  Memory memory;
  std::vector<NoiseRows> all;
  std::vector<std::vector<uint8_t>> masks;
  std::vector<std::vector<int64_t>> indices;
  std::mt19937 random{3};

  explicit Parameters(const std::vector<Shape>& shapes) {
    std::normal_distribution<double> normal;
    for (const Shape& s : shapes) {
      memory.emplace_back();
      NoiseRows to{};
      to.data = allocate(memory.back(), {.n = s.rows * s.columns, .kind = s.kind, .offset = s.offset}, 0);
      for (int64_t i = 0; i < s.rows * s.columns; ++i) put(to.data, s.kind, 0, i, normal(random));
      to.kind = s.kind;
      to.rows = s.rows;
      to.columns = s.columns;
      to.groups = s.groups;
      to.original_columns = s.original_columns ? s.original_columns : s.column_of ? 3 * s.columns : s.columns;
      if (s.row_live) to.row_live = mask(s.rows);
      if (s.column_live) to.column_live = mask(s.columns);
      if (s.row_of) to.row_of = rows(s);
      if (s.column_of) to.column_of = columns(s);
      to.key = {kSeed, 7, uint32_t(5 + all.size())};
      all.push_back(to);
    }
  }

  const uint8_t* mask(int64_t n) {
    masks.emplace_back(size_t(n) + 1);  // one more: never without an address
    for (uint8_t& live : masks.back()) live = uint8_t(random() % 3 > 0) * uint8_t(1 + random() % 2);
    return masks.back().data();
  }
  const int64_t* rows(const Shape& s) {
    indices.emplace_back(size_t(s.rows) + 1);
    for (int64_t r = 0; r < s.rows; ++r) indices.back()[size_t(r)] = s.far + r + r / 3;
    return indices.back().data();
  }
  const int64_t* columns(const Shape& s) {
    indices.emplace_back(size_t(s.groups * s.columns) + 1);
    std::vector<int64_t>& all = indices.back();
    for (int64_t g = 0; g < s.groups; ++g)
      for (int64_t c = 0; c < s.columns; ++c) all[size_t(g * s.columns + c)] = 2 * c + c % 2 + g % 2;
    if (s.shuffled) std::shuffle(all.begin(), all.begin() + s.groups * s.columns, random);
    return all.data();
  }

  void on_cpu(double sigma = kSigma, uint32_t step = 7) const {
    for (NoiseRows to : all) {
      to.key.step = step;
      if (to.rows * to.columns > 0) cpu::add_noise(to, sigma, 0, to.rows);
    }
  }
};

template <int Threads = 1>
void same_noise(const std::vector<Shape>& shapes, int64_t grid = 3) {
  const Parameters cpu(shapes), device(shapes);
  cpu.on_cpu();
  cuda::add_noise<Threads>(device.all, kSigma, nullptr, grid, nullptr);
  const std::string where = first_difference(cpu.memory, device.memory);
  REQUIRE(where.empty(), where + " grid " + std::to_string(grid));
}

// Every combination of masks and indices.
std::vector<Shape> with_masks(Shape shape) {
  std::vector<Shape> all;
  for (int k = 0; k < 16; ++k) {
    shape.row_live = k & 1;
    shape.column_live = k & 2;
    shape.row_of = k & 4;
    shape.column_of = k & 8;
    all.push_back(shape);
  }
  return all;
}

void noise_by_masks_and_indices() {
  for (int32_t kind = kF32; kind <= kF16; ++kind)
    for (int offset : {0, 1})
      for (auto [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{
               {50, 333}, {7, 64}, {130, 63}, {40, 9}, {300, 1}, {1, 3}, {0, 3}, {5, 0}, {3, 9000}, {9000, 2}})
        same_noise(with_masks({.rows = rows, .columns = columns, .kind = kind, .offset = offset}));
}

void noise_of_shuffled_columns_and_groups() {
  for (int32_t kind = kF32; kind <= kF16; ++kind)
    for (bool shuffled : {false, true})
      same_noise({{.rows = 12, .columns = 45, .kind = kind, .column_of = true, .groups = 4, .shuffled = shuffled},
                  {.rows = 6,
                   .columns = 5,
                   .kind = kind,
                   .row_live = true,
                   .column_of = true,
                   .groups = 6,
                   .shuffled = shuffled},
                  {.rows = 400,
                   .columns = 100,
                   .kind = kind,
                   .row_of = true,
                   .column_of = true,
                   .groups = 2,
                   .shuffled = shuffled}});
}

void noise_of_cut_columns_without_a_list() {
  for (int32_t kind = kF32; kind <= kF16; ++kind)
    same_noise({{.rows = 40, .columns = 9, .kind = kind, .original_columns = 11},
                {.rows = 40, .columns = 64, .kind = kind, .original_columns = 67}});
}

// Original coordinates beyond 32 bits: the upper half of Philox' counter.
void noise_of_far_elements() {
  for (int32_t kind = kF32; kind <= kF16; ++kind)
    same_noise({{.rows = 40, .columns = 90, .kind = kind, .row_of = true, .far = int64_t(1) << 33},
                {.rows = 40, .columns = 90, .kind = kind, .row_of = true, .column_of = true, .far = int64_t(1) << 40}});
}

// No memory behind it: where elements of a parameter beyond 2^31 rows or columns are looked for.
void places_beyond_32_bits() {
  const int64_t columns = 5'000'000'001, wide = 3'000'000'000;
  cuda::NoiseEntry entry{};
  entry.columns = entry.original_columns = columns;
  entry.group_rows = 1;
  const cuda::NoiseElements<4> at_end(entry, 3, columns - 6, 4, 4), inside(entry, 3, wide, 8, 3);
  for (int64_t v = 0; v < 4; ++v) REQUIRE(at_end.at[v] == 4 * columns - 2 + v, double(v));
  REQUIRE(at_end.live == 15 && inside.live == 7 && inside.at[2] == 3 * columns + wide + 10);
  entry.columns = entry.original_columns = 3;
  const cuda::NoiseElements<8> narrow(entry, wide, 2, 8184, 8);
  for (int64_t v = 0; v < 8; ++v) REQUIRE(narrow.at[v] == 3 * wide + 2 + 8184 + v, double(v));
}

void noise_whatever_the_grid() {
  const std::vector<Shape> shapes{{.rows = 90, .columns = 333}, {.rows = 90, .columns = 333, .row_live = true}};
  for (int64_t grid : {1, 2, 7, 1000}) same_noise(shapes, grid);
}

std::vector<Shape> long_list(int n) {
  std::vector<Shape> shapes;
  for (int t = 0; t < n; ++t)
    shapes.push_back({.rows = 1 + t % 7, .columns = 1 + 97 * t % 211, .kind = t % 4, .row_live = t % 3 == 0});
  return shapes;
}

void noise_of_long_lists() {
  for (int n : {0, 1, 45, 46, 47, 92, 93, 400}) same_noise(long_list(n));
}

void launches_of_a_list() {
  constexpr int most = cuda::NoiseParcel::kEntries;
  for (auto [n, launches] : std::vector<std::pair<int, int>>{{0, 0}, {1, 1}, {most, 1}, {most + 1, 2}}) {
    const Parameters p(std::vector<Shape>(size_t(n), {.rows = 3, .columns = 5}));
    host::counts = {};
    cuda::add_noise<1>(p.all, kSigma, nullptr, 3, nullptr);
    REQUIRE(host::counts.launches == launches && host::counts.copies == 0, double(n));
  }
}

// A captured call goes on with the numbers that are on the device when it is replayed, and needs nothing of the host's.
void captured_noise() {
  const std::vector<Shape> shapes = long_list(60);
  const Parameters cpu(shapes);
  Parameters device(shapes);
  double numbers[2] = {};
  std::vector<std::function<void()>> graph;
  host::counts = {};
  host::graph = &graph;
  cuda::add_noise<1>(device.all, 123., numbers, 3, nullptr);
  host::graph = nullptr;
  REQUIRE(host::counts.copies == 0);
  device.all.clear();
  for (uint32_t step : {uint32_t(0), uint32_t(9), 0xffffffffu}) {
    numbers[0] = .01 * (1 + step % 7);
    numbers[1] = step;
    for (auto& work : graph) work();
    cpu.on_cpu(numbers[0], step);
    REQUIRE(first_difference(cpu.memory, device.memory).empty(), first_difference(cpu.memory, device.memory));
  }
}

// Not even the sign of a zero changes, or a rounding.
void no_noise_with_sigma_zero() {
  const std::vector<Shape> shapes = long_list(20);
  const Parameters before(shapes), device(shapes);
  const double numbers[2] = {0, 5};
  for (const Parameters* p : {&before, &device}) put(p->all[1].data, p->all[1].kind, 0, 0, -0.);
  cuda::add_noise<1>(device.all, 123., numbers, 3, nullptr);
  REQUIRE(first_difference(before.memory, device.memory).empty());
}

void noise_with_real_threads() {
  for (int32_t kind = kF32; kind <= kF16; ++kind)
    same_noise<64>({{.rows = 40, .columns = 63, .kind = kind, .row_live = true, .column_of = true},
                    {.rows = 3, .columns = 3000, .kind = kind}},
                   2);
}

// -------------------------------------------------------------------------------------------------------------- flags

void flags_of_planes() {
  for (int32_t kind = kF32; kind <= kF16; ++kind)
    for (int offset : {0, 1})
      for (int64_t inner : {1, 7, 16, 49, 400})
        for (int64_t gap : {0, 3, 16})
          same_flags({.batch = 3, .channels = 23, .inner = inner, .kind = kind, .gap = gap, .offset = offset});
}

void flags_of_rows() {
  for (int32_t kind = kF32; kind <= kF16; ++kind)
    for (Layout layout : {Layout::rows, Layout::rows_of_batches, Layout::transposed})
      for (int64_t channels : {1, 23, 64, 136})
        for (int offset : {0, 1})
          same_flags({.batch = 5, .channels = channels, .inner = 30, .kind = kind, .layout = layout, .offset = offset});
}

void flags_of_rows_with_gaps() {
  for (int64_t gap : {1, 8})
    for (int64_t inner : {1, 3, 40})
      same_flags({.batch = 9, .channels = 24, .inner = inner, .layout = Layout::rows_of_batches, .gap = gap});
}

// Several parts of a channel, and of a row of channels.
void flags_of_many_parts() {
  same_flags({.batch = 40, .channels = 11, .inner = 900}, 2);
  same_flags({.batch = 40, .channels = 11, .inner = 900, .layout = Layout::rows_of_batches}, 2);
  same_flags({.batch = 1, .channels = 3, .inner = 60000});
}

void flags_with_real_threads() {
  for (int32_t kind : {kF32, kBF16})
    for (Layout layout : {Layout::planes, Layout::rows, Layout::rows_of_batches, Layout::transposed})
      for (int64_t channels : {11, 40})
        for (int64_t inner : {9, 64})
          same_flags<64>({.batch = 4, .channels = channels, .inner = inner, .kind = kind, .layout = layout}, 2);
}

// Warps of several parts that find the same channel, or see it found.
void flags_of_many_parts_with_real_threads() {
  for (Layout layout : {Layout::planes, Layout::rows_of_batches})
    same_flags<64>({.batch = 12, .channels = 11, .inner = 1600, .layout = layout}, 2);
}

void flags_are_never_cleared() {
  for (Criterion criterion : {Criterion::ever_active, Criterion::abs_max, Criterion::sum_le})
    for (Layout layout : {Layout::planes, Layout::rows}) {
      Detector d({.batch = 3, .channels = 20, .inner = 8, .layout = layout});
      for (int64_t c = 0; c < 20; c += 2) d.flagged()[c] = uint8_t(3);
      d.on_device(criterion, 0, 3);
      for (int64_t c = 0; c < 20; c += 2) REQUIRE(d.flagged()[c] == 3, double(c));
    }
}

// Reading would fault.
void flagged_channels_are_not_read() {
  for (Criterion criterion : {Criterion::ever_active, Criterion::abs_max, Criterion::sum_le})
    for (Layout layout : {Layout::planes, Layout::rows, Layout::rows_of_batches}) {
      Detector d({.batch = 3, .channels = 20, .inner = 8, .layout = layout});
      std::fill(d.flagged(), d.flagged() + 20, uint8_t(1));
      d.y.data = reinterpret_cast<const void*>(uintptr_t(16));
      d.on_device(criterion, 0, 3);
    }
}

// Behind the first round of a channel nothing is read once it is found: what lies there does not exist.
void reading_ends_with_the_first_hit() {
  for (Layout layout : {Layout::planes, Layout::rows}) {
    Detector d({.batch = 1, .channels = 8, .inner = 64, .layout = layout});
    for (int64_t i = 0; i < 512; ++i) d.write(i, 1);
    if (layout == Layout::planes) {
      d.y.channels = 1;
      d.y.inner = int64_t(1) << 40;
    } else {
      d.y.outer = int64_t(1) << 40;
    }
    cuda::FlagPlan plan = cuda::plan_flags<1>(d.y, Criterion::ever_active, 0, d.flagged(), &d.count, 1);
    plan.look.parts = 3;  // of about a thousand: the others too end with a look at the flags
    cuda::flag_active<1>(plan, nullptr, 1, nullptr);
    for (int64_t c = 0; c < d.y.channels; ++c) REQUIRE(d.flagged()[c] == 1, double(c));
  }
}

void nothing_seen() {
  for (Criterion criterion : kCriteria)
    for (Seen seen : {Seen{.batch = 0, .channels = 4, .inner = 3}, Seen{.batch = 3, .channels = 4, .inner = 0},
                      Seen{.batch = 3, .channels = 0, .inner = 5}}) {
      Detector d(seen);
      d.on_device(criterion, 0, 3);
      REQUIRE(d.count == 22);
      for (int64_t c = 0; c < seen.channels; ++c) REQUIRE(d.flagged()[c] == 0);
    }
}

// The bits of sums that round are those of any grid.
void sums_whatever_the_grid() {
  for (Layout layout : {Layout::planes, Layout::rows}) {
    Detector d({.batch = 20, .channels = 13, .inner = 900, .kind = kF64, .layout = layout});
    std::mt19937 random(5);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < 20 * 13 * 900; ++i) d.write(i, normal(random));
    std::vector<double> first;
    for (int64_t grid : {1, 2, 7, 1000}) {
      const cuda::FlagPlan plan = cuda::plan_flags<1>(d.y, Criterion::dormant, 0, d.flagged(), &d.count, 1);
      REQUIRE(plan.look.parts > 1);
      std::vector<double> workspace(size_t(plan.workspace), NAN);
      cuda::flag_active<1>(plan, workspace.data(), grid, nullptr);
      if (first.empty()) first = workspace;
      REQUIRE(memcmp(first.data(), workspace.data(), first.size() * 8) == 0, double(grid));
    }
  }
}

void launches_of_a_look() {
  for (auto [criterion, launches] : std::vector<std::pair<Criterion, int>>{
           {Criterion::ever_active, 1}, {Criterion::abs_max, 1}, {Criterion::sum_le, 2}, {Criterion::dormant, 3}}) {
    Detector d({.batch = 3, .channels = 20, .inner = 8});
    host::counts = {};
    d.on_device(criterion, 0, 3);
    REQUIRE(host::counts.launches == launches && host::counts.copies == 0);
  }
}

const Checks kChecks = {
    {"normals_of_every_type", normals_of_every_type},
    {"normals_with_real_threads", normals_with_real_threads},
    {"noise_by_masks_and_indices", noise_by_masks_and_indices},
    {"noise_of_shuffled_columns_and_groups", noise_of_shuffled_columns_and_groups},
    {"noise_of_cut_columns_without_a_list", noise_of_cut_columns_without_a_list},
    {"noise_of_far_elements", noise_of_far_elements},
    {"places_beyond_32_bits", places_beyond_32_bits},
    {"noise_whatever_the_grid", noise_whatever_the_grid},
    {"noise_of_long_lists", noise_of_long_lists},
    {"launches_of_a_list", launches_of_a_list},
    {"captured_noise", captured_noise},
    {"no_noise_with_sigma_zero", no_noise_with_sigma_zero},
    {"noise_with_real_threads", noise_with_real_threads},
    {"flags_of_planes", flags_of_planes},
    {"flags_of_rows", flags_of_rows},
    {"flags_of_rows_with_gaps", flags_of_rows_with_gaps},
    {"flags_of_many_parts", flags_of_many_parts},
    {"flags_with_real_threads", flags_with_real_threads},
    {"flags_of_many_parts_with_real_threads", flags_of_many_parts_with_real_threads},
    {"flags_are_never_cleared", flags_are_never_cleared},
    {"flagged_channels_are_not_read", flagged_channels_are_not_read},
    {"reading_ends_with_the_first_hit", reading_ends_with_the_first_hit},
    {"nothing_seen", nothing_seen},
    {"sums_whatever_the_grid", sums_whatever_the_grid},
    {"launches_of_a_look", launches_of_a_look},
};

}  // namespace
}  // namespace torsion::test

int main(int count, char** names) { return torsion::test::run_checks(torsion::test::kChecks, count, names); }
