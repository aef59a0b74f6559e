// Whether a planned step still fits its optimizer: the same parameters, state, gradients' layouts and addresses.
//
// On a thousand small tensors this look would cost as much as the update if it asked Python for an address, a dtype and
// strides each; DLPack's C exchange table gives them in one call, without a Python object. What remains is waiting for
// memory: a tensor is a Python object, a TensorImpl, a storage and a dictionary, which the last update has pushed out of
// the near caches, so those of later entries are asked for ahead of time. The addresses for that come from
// Tensor._cdata; they are hints only, never read through, and may be stale.
//
// Anything unexpected (another object, pointer, dtype or layout, a missing or new gradient, a raised exception) means
// "no", and Python then plans anew with full checks and messages. A gradient that merely moved is taken over here.
#pragma once
#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "engine/plan.h"

namespace torsion {

namespace py = pybind11;

class Watch {
 public:
  // streams: the tensors of the row in the rule's order, gradient at 1; empty when the parameter has no gradient.
  // state: the parameter's own dictionary in the optimizer's state, or None. local: tensors are DTensors.
  void add(py::object param, py::object state, const std::vector<py::object>& streams, Table* table, int32_t slot,
           bool local) {
    Entry e;
    e.param = std::move(param);
    e.table = table;
    e.local = local;
    if (!state.is_none()) {
      e.state = state;
      remember(state.cast<py::dict>(), items_);
    }
    e.items_end = items_.size();
    if (!streams.empty()) {
      if (streams.size() > size_t(kMaxStreams)) throw std::invalid_argument("more streams than a row holds");
      e.row = table->row_of.at(size_t(slot));
      e.n_streams = int32_t(streams.size());
      for (size_t k = 0; k < streams.size(); ++k) {
        const py::object t = plain(streams[k], local);
        DLTensor seen;
        if (!look(t, seen)) throw py::error_already_set();
        e.data[k] = address(seen);
        if (k == 0) e.param_dtype = seen.dtype;
        if (k == 1) e.grad_dtype = seen.dtype;
        if (k < 2) e.shape[k] = Shape(seen);
        if (k >= 2) e.tensors[k] = streams[k];
        hint_tensor(t);
      }
      hint(e.state.ptr());
      hint(reinterpret_cast<PyDictObject*>(e.state.ptr())->ma_keys);
      hint(reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(e.state.ptr())->ma_keys) + 64);
    }
    e.hints_end = hints_.size();
    entries_.push_back(std::move(e));
  }

  // Call after the last add: the state dictionary as it is now is what holds() expects.
  void seal(const py::dict& state) {
    state_.clear();
    remember(state, state_);
  }

  bool holds(const py::list& groups, const py::dict& state) {
    const bool same = same_params(groups) && same_items(state.ptr(), state_, 0, state_.size()) && same_tensors();
    PyErr_Clear();
    return same;
  }

  int traverse(visitproc visit, void* arg) const {
    for (const Entry& e : entries_) {
      Py_VISIT(e.param.ptr());
      Py_VISIT(e.state.ptr());
      for (const py::object& o : e.tensors) Py_VISIT(o.ptr());
    }
    for (const py::object& o : items_) Py_VISIT(o.ptr());
    for (const py::object& o : state_) Py_VISIT(o.ptr());
    return 0;
  }

  void clear() {
    entries_.clear();
    items_.clear();
    state_.clear();
  }

 private:
  // Sizes and strides of one tensor, in one piece of memory where they are few.
  struct Shape {
    std::vector<int64_t> numbers;
    Shape() = default;
    explicit Shape(const DLTensor& t) : numbers(t.shape, t.shape + t.ndim) {
      numbers.insert(numbers.end(), t.strides, t.strides + t.ndim);
    }
    bool operator==(const DLTensor& t) const {
      const size_t n = size_t(t.ndim);
      return numbers.size() == 2 * n && std::equal(t.shape, t.shape + n, numbers.begin()) &&
             std::equal(t.strides, t.strides + n, numbers.begin() + int64_t(n));
    }
  };

  struct Entry {
    py::object param, state;
    py::object tensors[kMaxStreams];  // those of the state; parameter and gradient are looked up
    uint64_t data[kMaxStreams] = {};
    Shape shape[2];  // of parameter and gradient
    DLDataType param_dtype{}, grad_dtype{};
    Table* table = nullptr;
    size_t items_end = 0, hints_end = 0;  // in items_ and hints_, where the last entry's end is the beginning
    int32_t row = -1;                     // -1: no gradient
    int32_t n_streams = 0;
    bool local = false;
  };
  static constexpr size_t kAhead = 4;  // entries

  static py::object plain(const py::object& t, bool local) { return local ? py::object(t.attr("_local_tensor")) : t; }

  static void remember(const py::dict& dict, std::vector<py::object>& items) {
    for (auto item : dict) {
      items.push_back(py::reinterpret_borrow<py::object>(item.first));
      items.push_back(py::reinterpret_borrow<py::object>(item.second));
    }
  }

  void hint(const void* at) { hints_.push_back(static_cast<const char*>(at)); }

  void hint_tensor(const py::object& t) {
    const auto impl = t.attr("_cdata").cast<uintptr_t>(),
               storage = t.attr("untyped_storage")().attr("_cdata").cast<uintptr_t>();
    hint(t.ptr());
    for (int line = 0; line < 3; ++line) hint(reinterpret_cast<const char*>(impl) + 64 * line);
    hint(reinterpret_cast<const char*>(storage));
  }

  bool same_params(const py::list& groups) const {
    static const py::object key = py::str("params");
    size_t i = 0;
    for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups.ptr()); ++g) {
      PyObject* params = PyDict_GetItem(PyList_GET_ITEM(groups.ptr(), g), key.ptr());
      if (!params || !PyList_Check(params)) return false;
      for (Py_ssize_t k = 0; k < PyList_GET_SIZE(params); ++k, ++i)
        if (i >= entries_.size() || PyList_GET_ITEM(params, k) != entries_[i].param.ptr()) return false;
    }
    return i == entries_.size();
  }

  static bool same_items(PyObject* dict, const std::vector<py::object>& expected, size_t begin, size_t end) {
    if (begin + size_t(PyDict_Size(dict)) * 2 != end) return false;
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (size_t i = begin; PyDict_Next(dict, &at, &key, &value); i += 2)
      if (key != expected[i].ptr() || value != expected[i + 1].ptr()) return false;
    return true;
  }

  bool same_tensors() {
    size_t items = 0, hints = 0;
    for (size_t i = 0; i < entries_.size(); ++i) {
      for (const size_t end = entries_[std::min(i + kAhead, entries_.size() - 1)].hints_end; hints < end; ++hints)
        __builtin_prefetch(hints_[hints]);
      Entry& e = entries_[i];
      if (e.state && !same_items(e.state.ptr(), items_, items, e.items_end)) return false;
      items = e.items_end;
      const py::object grad = grad_of(e.param);
      if (!grad || grad.is_none() != (e.row < 0)) return false;
      if (e.row < 0) continue;
      if (e.local) {
        const py::object param = local_of(e.param), part = local_of(grad);
        if (!param || !part || !same_streams(e, param, part)) return false;
      } else if (!same_streams(e, e.param, grad)) {
        return false;
      }
    }
    return true;
  }

  static bool same_streams(Entry& e, const py::object& param, const py::object& grad) {
    DLTensor t;
    if (!look(param, t) || address(t) != e.data[0] || !(e.shape[0] == t) || !same(t.dtype, e.param_dtype)) return false;
    for (int32_t k = 2; k < e.n_streams; ++k) {
      const py::object state = e.local ? local_of(e.tensors[k]) : e.tensors[k];
      if (!state || !look(state, t) || address(t) != e.data[k]) return false;
    }
    if (!look(grad, t) || !(e.shape[1] == t) || !same(t.dtype, e.grad_dtype)) return false;
    if (address(t) != e.data[1]) move_grad(e, address(t));
    return true;
  }

  static void move_grad(Entry& e, uint64_t at) {
    Row& row = e.table->rows[size_t(e.row)];
    row.at[1] = reinterpret_cast<void*>(at);
    row.aligned = is_aligned(row, e.n_streams);
    e.data[1] = at;
    e.table->dirty = true;
  }

  static bool look(const py::object& t, DLTensor& out) {
    static const DLPackExchangeAPI* const api = [] {
      const py::object capsule = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
      return static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    }();
    return api->dltensor_from_py_object_no_sync(t.ptr(), &out) == 0;
  }
  static uint64_t address(const DLTensor& t) { return reinterpret_cast<uint64_t>(t.data) + t.byte_offset; }
  static bool same(const DLDataType& a, const DLDataType& b) {
    return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
  }

  // torch's own descriptor, called directly: the lookup by name would cost as much as the call.
  static py::object grad_of(const py::object& param) {
    static PyObject* const descriptor =
        py::object(py::module_::import("torch").attr("_C").attr("TensorBase").attr("grad")).release().ptr();
    return py::reinterpret_steal<py::object>(
        Py_TYPE(descriptor)->tp_descr_get(descriptor, param.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(param.ptr()))));
  }
  static py::object local_of(const py::object& t) {
    static PyObject* const name = py::str("_local_tensor").release().ptr();
    return py::reinterpret_steal<py::object>(PyObject_GetAttr(t.ptr(), name));
  }

  std::vector<Entry> entries_;
  std::vector<py::object> items_;   // keys and values of every entry's state, in the dictionaries' order
  std::vector<py::object> state_;   // and of the optimizer's
  std::vector<const char*> hints_;  // lines that an entry's check will touch
};

}  // namespace torsion
