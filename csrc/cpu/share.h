// Pieces of work for the threads torch was told to use. The result of a piece must not depend on who does it.
#pragma once
#include <omp.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace torsion::cpu {

inline int threads_for(int64_t pieces) {
  return int(std::max<int64_t>(1, std::min<int64_t>(pieces, torch::stable::get_num_threads())));
}

template <class Work>
void share(int64_t pieces, Work work) {
  const int threads = threads_for(pieces);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t k = 0; k < pieces; ++k) work(k);
}

}  // namespace torsion::cpu
