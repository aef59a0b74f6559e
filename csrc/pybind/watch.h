// Whether a planned step still fits its optimizer: the same parameters, state, gradients' layouts and addresses.
//
// On a thousand small tensors this look costs as much as the update, and nearly all of it is waiting for memory: each
// tensor is a Python object, a TensorImpl, a storage and a dictionary, which the last update has pushed out of the near
// caches. So the walk calls torch's descriptors directly and asks for the objects of later entries ahead of time. The
// addresses for that come from Tensor._cdata; they are hints only, never read through, and may be stale.
//
// Anything unexpected (another object, pointer, dtype or layout, a missing or new gradient, a raised exception) means
// "no", and Python then plans anew with full checks and messages. A gradient that merely moved is taken over here.
#pragma once
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
        e.pointers[k] = plain(streams[k], local).attr("data_ptr")().cast<uint64_t>();
        if (k >= 2) e.tensors[k] = streams[k];
        hint_tensor(plain(streams[k], local));
      }
      const py::object grad = plain(streams[1], local);
      e.grad_dtype = grad.attr("dtype");
      e.contiguous = grad.attr("is_contiguous")().cast<bool>();
      if (!e.contiguous) e.grad_stride = grad.attr("stride")();
      hint(e.state.ptr());
      hint(reinterpret_cast<PyDictObject*>(e.state.ptr())->ma_keys);
      hint(reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(e.state.ptr())->ma_keys) + 64);
    }
    e.hints_end = hints_.size();
    e.numel = plain(e.param, local).attr("numel")().cast<int64_t>();
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
  struct Entry {
    py::object param, state, grad_dtype, grad_stride;
    py::object tensors[kMaxStreams];  // those of the state; parameter and gradient are looked up
    uint64_t pointers[kMaxStreams] = {};
    Table* table = nullptr;
    int64_t numel = 0;
    size_t items_end = 0, hints_end = 0;  // in items_ and hints_, where the last entry's end is the beginning
    int32_t row = -1;                     // -1: no gradient
    int32_t n_streams = 0;
    bool local = false, contiguous = true;
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
      for (int32_t k = 2; k < e.n_streams; ++k) {
        const py::object t = e.local ? local_of(e.tensors[k]) : e.tensors[k];
        if (!t || call(t, names().data_ptr) != e.pointers[k]) return false;
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
    row.aligned = is_aligned(row, e.n_streams);
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
  std::vector<py::object> items_;   // keys and values of every entry's state, in the dictionaries' order
  std::vector<py::object> state_;   // and of the optimizer's
  std::vector<const char*> hints_;  // lines that an entry's check will touch
};

}  // namespace torsion
