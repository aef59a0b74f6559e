// Whether a planned step still fits its optimizer. A step costs Python 0.2 us per tensor to look at in C and five times
// that in bytecode, which on a thousand small tensors is more than the update itself.
//
// Anything unexpected (another object, pointer, dtype or layout, a missing or new gradient, a raised exception) means
// "no", and Python then plans anew with full checks and messages. A gradient that merely moved is taken over here.
#pragma once
#include <pybind11/pybind11.h>

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
      for (auto item : state.cast<py::dict>()) {
        e.values.push_back(py::reinterpret_borrow<py::object>(item.first));
        e.values.push_back(py::reinterpret_borrow<py::object>(item.second));
      }
    }
    if (!streams.empty()) {
      e.row = table->row_of.at(size_t(slot));
      for (const py::object& t : streams) {
        const py::object plain = local ? t.attr("_local_tensor") : t;
        e.pointers.push_back(plain.attr("data_ptr")().cast<uint64_t>());
      }
      const py::object grad = local ? streams[1].attr("_local_tensor") : streams[1];
      e.grad_dtype = grad.attr("dtype");
      e.contiguous = grad.attr("is_contiguous")().cast<bool>();
      if (!e.contiguous) e.grad_stride = grad.attr("stride")();
      for (size_t k = 2; k < streams.size(); ++k) e.tensors.push_back(streams[k]);
    }
    const py::object plain = local ? e.param.attr("_local_tensor") : e.param;
    e.numel = plain.attr("numel")().cast<int64_t>();
    entries_.push_back(std::move(e));
  }

  // Call after the last add: the state dictionary as it is now is what holds() expects.
  void seal(const py::dict& state) {
    state_.clear();
    for (auto item : state) {
      state_.push_back(py::reinterpret_borrow<py::object>(item.first));
      state_.push_back(py::reinterpret_borrow<py::object>(item.second));
    }
  }

  bool holds(const py::list& groups, const py::dict& state) {
    const bool same = same_params(groups) && same_items(state.ptr(), state_) && same_tensors();
    PyErr_Clear();
    return same;
  }

  int traverse(visitproc visit, void* arg) const {
    for (const Entry& e : entries_) {
      Py_VISIT(e.param.ptr());
      Py_VISIT(e.state.ptr());
      for (const py::object& o : e.values) Py_VISIT(o.ptr());
      for (const py::object& o : e.tensors) Py_VISIT(o.ptr());
    }
    for (const py::object& o : state_) Py_VISIT(o.ptr());
    return 0;
  }

  void clear() {
    entries_.clear();
    state_.clear();
  }

 private:
  struct Entry {
    py::object param, state, grad_dtype, grad_stride;
    std::vector<py::object> values;   // keys and values of the state dictionary, in its order
    std::vector<py::object> tensors;  // its tensors that are streams
    std::vector<uint64_t> pointers;   // one per stream
    Table* table = nullptr;
    int32_t row = -1;  // -1: no gradient
    int64_t numel = 0;
    bool local = false, contiguous = true;
  };

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

  static bool same_items(PyObject* dict, const std::vector<py::object>& expected) {
    if (size_t(PyDict_Size(dict)) * 2 != expected.size()) return false;
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (size_t i = 0; PyDict_Next(dict, &at, &key, &value); i += 2)
      if (key != expected[i].ptr() || value != expected[i + 1].ptr()) return false;
    return true;
  }

  bool same_tensors() {
    for (Entry& e : entries_) {
      if (e.state && !same_items(e.state.ptr(), e.values)) return false;
      py::object grad = property(e.param.ptr(), names().grad);
      if (!grad) return false;
      if (e.row < 0) {
        if (!grad.is_none()) return false;
        continue;
      }
      if (grad.is_none()) return false;
      py::object param = e.local ? local_of(e.param) : e.param;
      if (e.local) grad = local_of(grad);
      if (!param || !grad || call(param, names().data_ptr) != e.pointers[0] ||
          call(param, names().numel) != uint64_t(e.numel) || !same_kind(e, grad))
        return false;
      for (size_t k = 0; k < e.tensors.size(); ++k) {
        const py::object t = e.local ? local_of(e.tensors[k]) : e.tensors[k];
        if (!t || call(t, names().data_ptr) != e.pointers[k + 2]) return false;
      }
      const uint64_t at = call(grad, names().data_ptr);
      if (at != e.pointers[1]) move_grad(e, at);
    }
    return true;
  }

  static bool same_kind(const Entry& e, const py::object& grad) {
    if (property(grad.ptr(), names().dtype).ptr() != e.grad_dtype.ptr()) return false;
    if (e.contiguous) return call_object(grad, names().is_contiguous).ptr() == Py_True;
    const py::object stride = call_object(grad, names().stride);
    return stride && PyObject_RichCompareBool(stride.ptr(), e.grad_stride.ptr(), Py_EQ) == 1;
  }

  static void move_grad(Entry& e, uint64_t at) {
    Row& row = e.table->rows[size_t(e.row)];
    row.at[1] = reinterpret_cast<void*>(at);
    row.aligned = is_aligned(row, int(e.pointers.size()));
    e.pointers[1] = at;
    e.table->dirty = true;
  }

  // torch's own descriptors, called directly: the lookup by name on every tensor would cost as much as the call.
  struct Names {
    py::object base = py::module_::import("torch").attr("_C").attr("TensorBase");
    py::object grad = base.attr("grad"), dtype = base.attr("dtype"), data_ptr = base.attr("data_ptr"),
               numel = base.attr("numel"), is_contiguous = base.attr("is_contiguous"), stride = base.attr("stride");
    py::str local{"_local_tensor"};
  };
  static const Names& names() {
    static const Names* const n = new Names;  // never freed: the interpreter may be gone when statics are
    return *n;
  }
  static py::object property(PyObject* o, const py::object& descriptor) {
    PyTypeObject* const type = Py_TYPE(descriptor.ptr());
    return py::reinterpret_steal<py::object>(
        type->tp_descr_get(descriptor.ptr(), o, reinterpret_cast<PyObject*>(Py_TYPE(o))));
  }
  static py::object local_of(const py::object& o) {
    return py::reinterpret_steal<py::object>(PyObject_GetAttr(o.ptr(), names().local.ptr()));
  }
  static py::object call_object(const py::object& o, const py::object& method) {
    return py::reinterpret_steal<py::object>(PyObject_CallOneArg(method.ptr(), o.ptr()));
  }
  static uint64_t call(const py::object& o, const py::object& method) {
    const py::object r = call_object(o, method);
    return r ? PyLong_AsUnsignedLongLong(r.ptr()) : ~uint64_t(0);
  }

  std::vector<Entry> entries_;
  std::vector<py::object> state_;
};

}  // namespace torsion
