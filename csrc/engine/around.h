// Stores that go around the cache, which would read first what is only written. No torch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "engine/isa.h"

namespace torsion::cpu {

// 16 bytes at a time; both ends are aligned to that.
TORSION_INLINE void write_around(char* to, const char* from, size_t bytes) {
#ifdef __SSE__
  using Quad = float __attribute__((vector_size(16), may_alias));
  for (size_t b = 0; b < bytes; b += 16)
    __builtin_ia32_movntps(reinterpret_cast<float*>(to + b), *reinterpret_cast<const Quad*>(from + b));
#else
  memcpy(to, from, bytes);
#endif
}

// From any byte to any.
inline void zero_around(char* to, size_t bytes) {
  const size_t head = std::min(bytes, size_t(-reinterpret_cast<uintptr_t>(to) % 16)), body = (bytes - head) / 16 * 16;
  alignas(16) static constexpr char kNone[16] = {};
  memset(to, 0, head);
  for (size_t b = head; b < head + body; b += 16) write_around(to + b, kNone, 16);
  memset(to + head + body, 0, bytes - head - body);
}

TORSION_INLINE void end_of_writes_around() {
#ifdef __SSE__
  __builtin_ia32_sfence();
#endif
}

}  // namespace torsion::cpu
