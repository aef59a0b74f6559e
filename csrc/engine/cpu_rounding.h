// How the CPU runner rounds what it stores: to the nearest, or at random by Philox's bits.
#pragma once
#include "engine/isa.h"
#include "engine/plan.h"
#include "engine/types.h"
#include "rules/philox.h"

namespace torsion::cpu {

// Elements whose rounding noise is made at once.
constexpr int kBlock = 1024;

struct Nearest {
  static constexpr int64_t kPlaces = 2, kSpan = 128;  // more of either is slower for rules with four arrays
  struct Block {
    TORSION_INLINE void fill(int64_t) {}
    template <class Q, Role, class R>
    TORSION_INLINE Q narrow(R x, int64_t) const {
      return Narrow<Q>::nearest(x);
    }
  };
  TORSION_INLINE static Block block(const Row&, uint64_t, uint32_t) { return {}; }
};

// Noise is filled in two plain loops, so that both vectorise; drawing inside the update loop would not.
struct Stochastic {
  static constexpr int64_t kPlaces = 1, kSpan = kBlock;
  struct Block {
    uint64_t seed;
    int64_t key;
    uint32_t step, stream;
    alignas(64) uint32_t words[4][kBlock / 8 + 1];
    alignas(64) uint16_t noise[kBlock + 8];
    TORSION_INLINE void fill(int64_t first) {
      const int64_t start = (key + first) & ~int64_t(7);
#pragma GCC ivdep
      for (int j = 0; j < kBlock / 8 + 1; ++j) {
        const Philox r = rounding_block(seed, start + 8 * int64_t(j), step, stream);
        words[0][j] = r.word[0];
        words[1][j] = r.word[1];
        words[2][j] = r.word[2];
        words[3][j] = r.word[3];
      }
      for (int j = 0; j < kBlock / 8 + 1; ++j)
        for (int lane = 0; lane < 8; ++lane) noise[8 * j + lane] = uint16_t(words[lane >> 1][j] >> (16 * (lane & 1)));
    }
    template <class Q, Role P, class R>
    TORSION_INLINE Q narrow(R x, int64_t i) const {
      if constexpr (P == Role::param)
        return Narrow<Q>::stochastic(x, noise[i + (key & 7)]);
      else
        return Narrow<Q>::nearest(x);
    }
  };
  TORSION_INLINE static Block block(const Row& row, uint64_t seed, uint32_t step) {
    Block b;
    b.seed = seed;
    b.key = row.key;
    b.step = step;
    b.stream = uint32_t(row.tensor);
    return b;
  }
};

}  // namespace torsion::cpu
