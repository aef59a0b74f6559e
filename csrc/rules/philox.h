// Philox4x32-10 (Salmon et al. 2011): four 32-bit words from a counter, so that a random number belongs to an element
// and not to a thread. key = seed; counter = (index, step, stream); stream is the tensor's number in its optimizer.
#pragma once
#include "contract.h"

namespace torsion {

struct Philox {
  uint32_t word[4];
};

TORSION_HD Philox philox(uint64_t seed, uint64_t index, uint32_t step, uint32_t stream) {
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = step, c3 = stream;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Stochastic rounding takes 16 bits per element, so one block serves the eight elements 8k ... 8k+7.
TORSION_HD Philox rounding_block(uint64_t seed, int64_t element, uint32_t step, uint32_t stream) {
  return philox(seed, uint64_t(element) >> 3, step, stream);
}

// Selects, not an index: a dynamic index would put the four words into local memory on a GPU.
TORSION_HD uint32_t rounding_bits(const Philox& block, int lane) {
  const uint32_t low = lane & 2 ? block.word[1] : block.word[0], high = lane & 2 ? block.word[3] : block.word[2];
  return ((lane & 4 ? high : low) >> (16 * (lane & 1))) & 0xffffu;
}

}  // namespace torsion
