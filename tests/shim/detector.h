// The detectors of active channels on both sides, and activations in every layout for them. After world.h, cpu/flags.cpp
// and cuda/flags.cuh.
#pragma once

namespace torsion::test {

enum class Layout { planes, rows, rows_of_batches, transposed };

struct Seen {
  int64_t batch, channels, inner;
  int32_t kind = kF32;
  Layout layout = Layout::planes;
  int64_t gap = 0;  // elements left out after each batch
  int offset = 0;
};

// An activation, its flags and their count, with guards.
struct Detector {
  Memory memory;
  Activation y{};
  std::vector<uint8_t> flags;
  int64_t count = 5;

  explicit Detector(const Seen& s) {
    memory.emplace_back();
    const int64_t line = s.channels * s.inner + s.gap;
    y.data = allocate(memory[0], {.n = s.batch * line, .kind = s.kind, .offset = s.offset}, 0);
    y.kind = s.kind;
    y.outer = s.batch;
    y.channels = s.channels;
    y.inner = s.inner;
    y.outer_stride = line;
    y.channel_stride = s.layout == Layout::planes ? s.inner : 1;
    y.inner_stride = s.layout == Layout::planes ? 1 : s.inner == 1 ? 0 : s.channels;
    if (s.layout == Layout::rows) {  // as [M, C]
      y.outer = s.batch * s.inner;
      y.inner = 1;
      y.outer_stride = s.channels;
      y.inner_stride = 0;
    }
    if (s.layout == Layout::transposed) {  // [M, C] with the values of a channel side by side
      y.outer = 1;
      y.inner = s.batch * s.inner;
      y.channel_stride = y.inner;
      y.inner_stride = 1;
    }
    flags.assign(size_t(s.channels) + 32, 0x77);
    std::fill(flags.begin() + 16, flags.end() - 16, 0);
    for (int64_t i = 0; i < s.batch * line; ++i) write(i, 9);  // in gaps: nobody may look
    fill();
  }

  void write(int64_t i, double x) { put(const_cast<void*>(y.data), y.kind, 0, i, x); }
  int64_t place(int64_t o, int64_t c, int64_t i) const {
    return o * y.outer_stride + c * y.channel_stride + i * y.inner_stride;
  }

  // Channels of every kind: silent, negative, one hit at the end, at the start or in between, small, with a NaN, infinite.
  // Sums of multiples of 1/64 are exact in any order.
  void fill() {
    std::mt19937 random(11);
    for (int64_t c = 0; c < y.channels; ++c)
      for (int64_t o = 0; o < y.outer; ++o)
        for (int64_t i = 0; i < y.inner; ++i) {
          const int64_t at = o * y.inner + i, last = y.outer * y.inner - 1, kind = c % 10;
          double x = -double(random() % 64) / 64;
          if (kind == 0) x = 0;
          if ((kind == 1 && at == last) || (kind == 2 && at == 0) || (kind == 3 && at == 2 * last / 3)) x = .75;
          if (kind == 4) x = 1. / 64;
          if (kind == 5) x = -x;
          if (kind == 6 && at == last / 2) x = NAN;
          if (kind == 7 && at == last) x = -HUGE_VAL;
          if (kind == 8) x = at % 2 ? .5 : -.5;
          write(place(o, c, i), x);
        }
  }

  uint8_t* flagged() { return flags.data() + 16; }

  void on_cpu(Criterion criterion, double tau) {
    cpu::flag_active(y, criterion, tau, 1, flagged());
    count += 17;
  }

  template <int Threads = 1>
  void on_device(Criterion criterion, double tau, int64_t grid) {
    const cuda::FlagPlan plan = cuda::plan_flags<Threads>(y, criterion, tau, flagged(), &count, 17);
    std::vector<double> workspace(size_t(plan.workspace) + 1, NAN);
    cuda::flag_active<Threads>(plan, plan.workspace ? workspace.data() : nullptr, grid, nullptr);
    REQUIRE(std::isnan(workspace.back()));
  }
};

constexpr Criterion kCriteria[] = {Criterion::ever_active, Criterion::abs_max, Criterion::sum_le, Criterion::dormant};

template <int Threads = 1>
void same_flags(const Seen& seen, int64_t grid = 3) {
  for (Criterion criterion : kCriteria)
    for (double tau : {0., .3, 1.}) {
      if (Threads > 1 && tau != .3) continue;
      Detector cpu(seen), device(seen);
      cpu.on_cpu(criterion, tau);
      device.on_device<Threads>(criterion, tau, grid);
      const std::string what = "criterion " + std::to_string(int(criterion)) + " tau " + std::to_string(tau) +
                               " layout " + std::to_string(int(seen.layout)) + " type " + std::to_string(seen.kind);
      for (size_t c = 0; c < cpu.flags.size(); ++c)
        REQUIRE(cpu.flags[c] == device.flags[c], what + " channel " + std::to_string(int64_t(c) - 16));
      REQUIRE(cpu.count == device.count);
      REQUIRE(first_difference(cpu.memory, device.memory).empty());
    }
}

}  // namespace torsion::test
