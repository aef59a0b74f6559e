// Which instruction set the CPU kernels use.
#pragma once
#include <algorithm>
#include <cstdlib>
#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#define TORSION_INLINE inline __attribute__((always_inline))

namespace torsion::cpu {

// x86-64-v4, v3 and the baseline; TORSION_ISA=0|1|2 forces a lower one, so that tests can compare their bits.
// TORSION_ONE_LEVEL leaves all but the baseline out, for programs that are compiled often.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(TORSION_ONE_LEVEL)
#define TORSION_X86_LEVELS 1
inline int isa_level() {
  static const int level = [] {
    const int have = __builtin_cpu_supports("x86-64-v4") ? 2 : __builtin_cpu_supports("x86-64-v3") ? 1 : 0;
    const char* forced = std::getenv("TORSION_ISA");
    return forced ? std::min(have, std::atoi(forced)) : have;
  }();
  return level;
}
#else
inline int isa_level() { return 0; }
#endif

// Whether a core's own prefetchers keep up with the eight or more streams of an update. Requests beside them get in their
// way then: AMD's Zen 5 takes 0.74 ns per element of AdaTAMW from memory without, 0.87 with them; an Intel Xeon 0.92
// without, 0.75 with them.
inline bool finds_streams() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool finds = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool told = __get_cpuid(1, &a, &b, &c, &d) != 0;
    const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff);
    return told && __builtin_cpu_is("amd") && family >= 0x1a;
  }();
  return finds;
#else
  return false;
#endif
}

// What a function of each level carries, in front of its body.
#define TORSION_V3 __attribute__((target("arch=x86-64-v3")))
#define TORSION_V4 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))

}  // namespace torsion::cpu
