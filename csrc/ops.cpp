// Every op of the package. Shapes: a step updates n tensors that belong to groups (rows of `hyper`) and share cosines
// by scope (rows of `shared`). The documentation users read stands in python/torsion/ops.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torsion, m) {
  m.def(
      "tam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!) shared, Tensor(d!) steps, "
      "Tensor(e!) status, Tensor hyper, Tensor[] lrs, int[] scopes, int[] groups, int[] slots, Tensor? grad_scale, "
      "Tensor? found_inf, float? max_grad_norm) -> ()");
  m.def(
      "adatam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(f!)[] exp_avg_sqs, "
      "Tensor(c!) shared, Tensor(d!) steps, Tensor(e!) status, Tensor hyper, Tensor[] lrs, int[] scopes, "
      "int[] groups, int[] slots, Tensor? grad_scale, Tensor? found_inf, float? max_grad_norm) -> ()");
  // The same steps over a launch table that torsion._plan keeps: no list crosses the dispatcher. phase 0 is a whole
  // step; 1 leaves the sums in `sums` for an all-reduce, 2 continues from them. `workspace` is the table on the device.
  m.def(
      "tam_planned_(int table, Tensor(c!) shared, Tensor(d!) steps, Tensor(e!) status, Tensor hyper, Tensor[] lrs, "
      "Tensor? grad_scale, Tensor? found_inf, float? max_grad_norm, int phase, Tensor(g!)? sums, "
      "Tensor(h!)? workspace) -> ()");
  m.def(
      "adatam_planned_(int table, Tensor(c!) shared, Tensor(d!) steps, Tensor(e!) status, Tensor hyper, Tensor[] lrs, "
      "Tensor? grad_scale, Tensor? found_inf, float? max_grad_norm, int phase, Tensor(g!)? sums, "
      "Tensor(h!)? workspace) -> ()");
  // The same with DemP: lasso on scaled rows, noise on rows with a map. `perturbation` is float64 [3] on the device:
  // lambda, sigma, and the step that the noise belongs to.
  m.def(
      "tam_demp_planned_(int table, Tensor(c!) shared, Tensor(d!) steps, Tensor(e!) status, Tensor hyper, "
      "Tensor[] lrs, Tensor? grad_scale, Tensor? found_inf, float? max_grad_norm, int phase, Tensor(g!)? sums, "
      "Tensor(h!)? workspace, Tensor perturbation, int noise_seed) -> ()");
  m.def(
      "adatam_demp_planned_(int table, Tensor(c!) shared, Tensor(d!) steps, Tensor(e!) status, Tensor hyper, "
      "Tensor[] lrs, Tensor? grad_scale, Tensor? found_inf, float? max_grad_norm, int phase, Tensor(g!)? sums, "
      "Tensor(h!)? workspace, Tensor perturbation, int noise_seed) -> ()");
  // One pass of a Lookbehind cycle, by its number in rules/cycle.h. `streams` says which address of a row each stream
  // of the rule takes; `opens` begins an outer step, which later passes do not touch again once it is skipped.
  m.def(
      "lookbehind_planned_(int table, int rule, int[] streams, bool opens, Tensor(c!) shared, Tensor(d!) steps, "
      "Tensor(e!) status, Tensor hyper, Tensor[] lrs, Tensor? found_inf, float? max_grad_norm, int phase, "
      "Tensor(g!)? sums, Tensor(h!)? workspace) -> ()");
  // The end of a cycle with an adaptive alpha: the last descent, by its number in ClosingRules, whose update sums what the
  // angle needs, and the blend over the table `next`.
  m.def(
      "lookbehind_closing_planned_(int table, int rule, int[] streams, Tensor(c!) shared, Tensor(d!) steps, "
      "Tensor(e!) status, Tensor hyper, Tensor[] lrs, Tensor? found_inf, float? max_grad_norm, "
      "Tensor(h!)? workspace, int next, int[] next_streams, Tensor(i!) alphas, Tensor next_hyper, "
      "Tensor(j!)? next_workspace) -> ()");
  // DemP. philox_normal_ fills `out`; demp_update_ adds noise to the live entries of n parameters (ops/noise.py);
  // `numbers` is float64 [2] beside them and stands for sigma and step.
  m.def("philox_normal_(Tensor(a!) out, int seed, int step, int tensor_id) -> ()");
  m.def(
      "demp_update_(Tensor(a!)[] params, Tensor?[] row_live, Tensor?[] col_live, Tensor?[] rows, Tensor?[] cols, "
      "int[] orig_cols, float sigma, int seed, int step, int[] tensor_ids, Tensor? numbers=None) -> ()");
  m.def(
      "active_flags_(Tensor y, Tensor(a!) flags, Tensor(b!) count, int channel_dim=1, str criterion=\"ever_active\", "
      "float tau=0.0) -> ()");
  // What masked layers do beside their products; [rows, columns] or [rows, columns, inner] (cpu/blocks.h).
  m.def(
      "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? in_idx, Tensor? out_idx, bool relu, "
      "bool x_compact, bool y_compact, bool dense) -> (Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor bits, Tensor? in_idx, Tensor? out_idx, bool relu, "
      "bool x_compact, bool y_compact, bool dense, bool want_x, bool want_weight, bool want_bias) -> (Tensor, Tensor, "
      "Tensor)");
  m.def("gather_blocks(Tensor from_, Tensor? rows, Tensor? columns) -> Tensor");
  m.def("scatter_blocks_(Tensor(a!) to, Tensor from_, Tensor? rows, Tensor? columns) -> ()");
  m.def("silenced_blocks(Tensor from_, Tensor? rows, Tensor? columns) -> Tensor");
  m.def("silence_blocks_(Tensor(a!) t, Tensor? rows, Tensor? columns) -> ()");
  m.def("met_finite(Tensor t, int groups) -> bool");
  m.def("index_kind(Tensor index, int end) -> int");
  m.def("relu_bits_(Tensor(a!) z) -> Tensor");
  m.def("keep_bits_(Tensor(a!) dz, Tensor bits) -> ()");
}

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
