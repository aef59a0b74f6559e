// What a source file that holds rules of a Lookbehind cycle includes: the definition behind lookbehind.cuh.
#pragma once
#include "lookbehind.cuh"

namespace torsion::cuda {

template <class Rule>
void run_pass(const CyclePass& pass) {
  run<Rule>(pass.table, pass.in, pass.phase, pass.sums, pass.workspace, read_slots<Rule>(pass.streams));
}

template <class Rule>
void run_closing(const CyclePass& last, const CyclePass& next) {
  using After = typename Rule::After;
  Call<Rule> call(last.table, last.in, read_slots<Rule>(last.streams));
  Call<After> after(next.table, next.in, read_slots<After>(next.streams));
  STD_TORCH_CHECK(last.table.pieces.size() == next.table.pieces.size(), Rule::kName, ": the tables differ in pieces");
  check_devices<Rule>(last.in, {}, call.device);
  const torch::stable::accelerator::DeviceGuard guard(call.device);
  const cudaStream_t stream = current_stream(call.device);
  const int64_t max_blocks = most_blocks(call.device);
  MaybeTensor own, own_next;
  char* at = place<Rule>(last.table, last.workspace, own, call.device, max_blocks, stream);
  char* next_at = place<After>(next.table, next.workspace, own_next, call.device, max_blocks, stream);
  Runner<Rule>::run_before(call.frame, last.table, at, call.hyper, call.rates, after.frame, next.table, next_at,
                           after.hyper, max_blocks, stream);
  Runner<After>::run(after.frame, next.table, next_at, after.hyper, after.rates, Phase::closing, max_blocks, stream);
}

}  // namespace torsion::cuda
