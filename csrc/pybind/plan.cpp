// torsion._plan: what is not a tensor. Launch tables, the check that a table still fits its optimizer, Philox, build
// facts. The only module that is bound to one Python version; it links nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "engine/frame.h"
#include "engine/plan.h"
#include "rules/cycle.h"
#include "rules/demp_step.h"
#include "rules/philox.h"
#include "watch.h"

namespace py = pybind11;

namespace torsion {
namespace {

void build(Table& table, const std::vector<std::vector<uint64_t>>& pointers, const std::vector<int64_t>& numel,
           const std::vector<int32_t>& kinds, const std::vector<int32_t>& scopes, const std::vector<int32_t>& groups,
           const std::vector<int32_t>& slots, const std::vector<double>& weights, const std::vector<int64_t>& keys,
           int32_t n_scopes, int32_t n_groups, const std::vector<int32_t>& scaled,
           const std::vector<std::vector<int64_t>>& noise) {
  if (pointers.empty() || pointers.size() > size_t(kMaxStreams)) throw std::invalid_argument("1 to 8 streams");
  table.rows.clear();
  table.noise.clear();
  table.n_scopes = n_scopes;
  table.n_groups = n_groups;
  for (size_t i = 0; i < numel.size(); ++i) {
    Row row{};
    for (size_t k = 0; k < pointers.size(); ++k) row.at[k] = reinterpret_cast<void*>(pointers[k].at(i));
    row.n = numel[i];
    row.kind = kinds.at(i);
    row.scope = scopes.at(i);
    row.group = groups.at(i);
    row.tensor = slots.at(i);
    row.weight = weights.empty() ? 1 : weights.at(i);
    row.key = keys.empty() ? 0 : keys.at(i);
    row.scaled = scaled.empty() ? 0 : scaled.at(i);
    if (!noise.empty() && !noise.at(i).empty()) {
      const std::vector<int64_t>& m = noise[i];
      table.noise.push_back(
          {m.at(0), reinterpret_cast<const uint8_t*>(m.at(1)), reinterpret_cast<int64_t*>(m.at(2)), m.at(3)});
      row.noise = int32_t(table.noise.size());
      if (m[0] <= 0) throw std::invalid_argument("row " + std::to_string(i) + " has noise of no columns");
    }
    row.aligned = is_aligned(row, kMaxStreams);
    if (row.kind < 0 || row.kind >= kKinds || row.scope < 0 || row.scope >= n_scopes || row.group < 0 ||
        row.group >= n_groups || row.tensor < 0 || row.n < 0)
      throw std::invalid_argument("row " + std::to_string(i) + " is out of range");
    table.rows.push_back(row);
  }
  table.arrange();
  table.dirty = true;
}

template <class Rule>
py::dict describe() {
  using F = Frame<Rule>;
  py::dict d;
  d["streams"] = n_streams<Rule>;
  d["hyper"] = F::H;
  d["shared"] = F::K;
  d["sums"] = F::N;
  d["coefficients"] = F::C;
  return d;
}

template <class Rule>
int64_t workspace_bytes(const Table& table) {
  using F = Frame<Rule>;
  return Layout(table, F::N, F::C, F::H).end;
}

int64_t most_workspace_bytes(const Table& table) {
  int64_t most = 0;
  CycleRules::each([&]<class Rule>() { most = std::max(most, workspace_bytes<Rule>(table)); });
  ClosingRules::each([&]<class Rule>() { most = std::max(most, workspace_bytes<Rule>(table)); });
  return most;
}

// Name of each rule of a list -> its number there and sizes.
template <class List>
py::dict describe_all() {
  py::dict rules;
  int64_t number = 0;
  List::each([&]<class Rule>() {
    py::dict d = describe<Rule>();
    d["number"] = number++;
    rules[py::str(Rule::label())] = d;
  });
  return rules;
}

py::dict build_facts() {
  py::dict d;
  d["version"] = TORSION_VERSION;
  d["mode"] = TORSION_BUILD_MODE;
  d["torch"] = TORSION_BUILD_TORCH;
  d["compiler"] = TORSION_BUILD_COMPILER;
  d["flags"] = TORSION_BUILD_FLAGS;
  d["nvcc_flags"] = TORSION_BUILD_NVCC_FLAGS;
  d["cuda"] = TORSION_BUILD_CUDA;
  d["cuda_missing"] = TORSION_BUILD_CUDA_MISSING;
  d["cuda_archs"] = TORSION_CUDA_ARCHS;
  d["commit"] = TORSION_BUILD_COMMIT;
  d["sanitize"] = TORSION_BUILD_SANITIZE;
  return d;
}

// Watch holds parameters and state, whose hooks may hold the optimizer: the collector must see through it.
void make_collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) -> int {
    Py_VISIT(Py_TYPE(self));
    return py::detail::is_holder_constructed(self) ? py::cast<Watch&>(py::handle(self)).traverse(visit, arg) : 0;
  };
  type.tp_clear = [](PyObject* self) -> int {
    if (py::detail::is_holder_constructed(self)) py::cast<Watch&>(py::handle(self)).clear();
    return 0;
  };
}

}  // namespace
}  // namespace torsion

PYBIND11_MODULE(_plan, m) {
  using namespace torsion;
  m.doc() = "Launch tables, the check that one still fits its optimizer, Philox, build facts.";
  m.attr("CHUNK") = kChunk;

  py::class_<Table>(m, "Table", "The tensors of one device, cut into chunks; the planned ops take its address.")
      .def(py::init<>())
      .def("build", &build, py::arg("pointers"), py::arg("numel"), py::arg("kinds"), py::arg("scopes"),
           py::arg("groups"), py::arg("slots"), py::arg("weights"), py::arg("keys"), py::arg("n_scopes"),
           py::arg("n_groups"), py::arg("scaled") = std::vector<int32_t>(),
           py::arg("noise") = std::vector<std::vector<int64_t>>())
      .def_property_readonly("address", [](Table& t) { return reinterpret_cast<uintptr_t>(&t); })
      .def_property_readonly("rows", [](const Table& t) { return t.rows.size(); })
      .def_property_readonly("pieces", [](const Table& t) { return t.pieces.size(); })
      .def_property(
          "dirty", [](const Table& t) { return t.dirty; }, [](Table& t, bool d) { t.dirty = d; })
      .def("piece",
           [](const Table& t, size_t i) {
             const Piece& p = t.pieces.at(i);
             const Row& row = t.rows[size_t(p.row)];
             const int64_t begin = p.chunk * kChunk;
             return py::make_tuple(row.tensor, begin, std::min(row.n, begin + kChunk));
           })
      .def("workspace_bytes", [](const Table& t, const std::string& rule) {
        if (rule == Tam::kName) return workspace_bytes<Tam>(t);
        if (rule == AdaTam::kName) return workspace_bytes<AdaTam>(t);
        if (rule == "tam_demp") return workspace_bytes<DempStep<Tam>>(t);
        if (rule == "adatam_demp") return workspace_bytes<DempStep<AdaTam>>(t);
        if (rule == "lookbehind") return most_workspace_bytes(t);
        throw std::invalid_argument("no rule named " + rule);
      });

  py::class_<Watch>(m, "Watch", py::custom_type_setup(&make_collectable),
                    "Remembers what a step was planned for, and tells cheaply whether it still holds.")
      .def(py::init<>())
      .def("add", &Watch::add, py::arg("param"), py::arg("state"), py::arg("streams"), py::arg("table"),
           py::arg("slot"), py::arg("local"), py::keep_alive<1, 5>())
      .def("seal", &Watch::seal, py::arg("state"))
      .def("holds", &Watch::holds, py::arg("groups"), py::arg("state"));

  m.def("philox", [](uint64_t seed, uint64_t index, uint32_t step, uint32_t stream) {
    const Philox r = philox(seed, index, step, stream);
    return py::make_tuple(r.word[0], r.word[1], r.word[2], r.word[3]);
  });
  m.def("rules", [] {
    py::dict d;
    d[Tam::kName] = describe<Tam>();
    d[AdaTam::kName] = describe<AdaTam>();
    return d;
  });
  m.def("cycle_rules", &describe_all<CycleRules>);
  m.def("closing_rules", &describe_all<ClosingRules>);
  m.def("build_facts", &build_facts);
}
