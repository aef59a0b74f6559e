// Many normals at once (rules/philox_normal.h), for every instruction set the same bits. No torch.
#pragma once
#include "engine/demp.h"

namespace torsion::cpu {

// out receives 4 n numbers, those of the blocks first ... first + n - 1, in order. 0.88 ns each on a 2.1 GHz core with
// AVX-512, of which 0.48 for the words; call it for a few hundred blocks at a time, while what they are added to is on
// its way into the cache.
void normals(NoiseKey key, uint64_t first, int64_t n, float* out);
void normals(NoiseKey key, uint64_t first, int64_t n, double* out);

// The same for the blocks offset + block[i]; `block` is readable up to the next multiple of kListed.
constexpr int64_t kListed = 8;
void normals_at(NoiseKey key, const int64_t* block, uint64_t offset, int64_t n, float* out);
void normals_at(NoiseKey key, const int64_t* block, uint64_t offset, int64_t n, double* out);

// out receives 8 n times 16 bits: the stochastic rounding of elements whose noise was added.
void noise_rounding(NoiseKey key, uint64_t first, int64_t n, uint16_t* out);
void noise_rounding_at(NoiseKey key, const int64_t* block, uint64_t offset, int64_t n, uint16_t* out);

}  // namespace torsion::cpu
