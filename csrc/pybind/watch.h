// Whether a planned step still fits its optimizer: the same parameters, state, gradients' layouts and addresses.
//
// On a thousand small tensors this look would cost as much as the update if it asked Python for an address, a dtype and
// strides each; DLPack's C exchange table gives them in one call, without a Python object.
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
      e.row = table->row_of.at(size_t(slot));
      for (size_t k = 0; k < streams.size(); ++k) {
        DLTensor seen;
        if (!look(local ? py::object(streams[k].attr("_local_tensor")) : streams[k], seen))
          throw py::error_already_set();
        streams_.push_back({k < 2 ? py::object() : streams[k], address(seen)});
        if (k == 0) {
          e.dtype[0] = seen.dtype;
          numbers_.insert(numbers_.end(), seen.shape, seen.shape + seen.ndim);
        }
        if (k < 2) numbers_.insert(numbers_.end(), seen.strides, seen.strides + seen.ndim);
        if (k == 1) e.dtype[1] = seen.dtype;
      }
    }
    e.streams_end = streams_.size();
    e.numbers_end = numbers_.size();
    entries_.push_back(std::move(e));
  }

  // Call after the last add: the state dictionary as it is now is what holds() expects.
  void seal(const py::dict& state) {
    state_.clear();
    remember(state, state_);
    entries_.shrink_to_fit();
    streams_.shrink_to_fit();
    items_.shrink_to_fit();
    numbers_.shrink_to_fit();
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
    }
    for (const Stream& stream : streams_) Py_VISIT(stream.tensor.ptr());
    for (const py::object& o : items_) Py_VISIT(o.ptr());
    for (const py::object& o : state_) Py_VISIT(o.ptr());
    return 0;
  }

  void clear() {
    entries_.clear();
    streams_.clear();
    items_.clear();
    state_.clear();
  }

 private:
  struct Stream {
    py::object tensor;  // one of the state's; null for parameter and gradient, which are looked up
    uint64_t data;
  };

  // What belongs to an entry in the flat lists below ends at its *_end and begins where the entry before ends.
  struct Entry {
    py::object param, state;
    Table* table = nullptr;
    size_t streams_end = 0, items_end = 0, numbers_end = 0;
    DLDataType dtype[2] = {};  // of parameter and gradient
    int32_t row = -1;          // -1: no gradient
    bool local = false;
  };

  static void remember(const py::dict& dict, std::vector<py::object>& items) {
    for (auto item : dict) {
      items.push_back(py::reinterpret_borrow<py::object>(item.first));
      items.push_back(py::reinterpret_borrow<py::object>(item.second));
    }
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
    size_t items = 0, streams = 0, numbers = 0;
    for (Entry& e : entries_) {
      if (e.state && !same_items(e.state.ptr(), items_, items, e.items_end)) return false;
      const py::object grad = grad_of(e.param);
      if (!grad || grad.is_none() != (e.row < 0)) return false;
      if (e.row >= 0) {
        const py::object param = e.local ? local_of(e.param) : e.param, part = e.local ? local_of(grad) : grad;
        if (!param || !part || !same_streams(e, streams, numbers, param, part)) return false;
      }
      items = e.items_end;
      streams = e.streams_end;
      numbers = e.numbers_end;
    }
    return true;
  }

  // An entry's numbers are its parameter's sizes and strides, then the gradient's strides: their sizes are the same.
  bool same_streams(Entry& e, size_t first, size_t numbers, const py::object& param, const py::object& grad) {
    Stream* const streams = streams_.data() + first;
    const int64_t* const shape = numbers_.data() + numbers;
    const size_t n = e.streams_end - first, dims = (e.numbers_end - numbers) / 3;
    const auto as_before = [&](const DLTensor& t, int which) {
      return size_t(t.ndim) == dims && std::equal(t.shape, t.shape + dims, shape) &&
             std::equal(t.strides, t.strides + dims, shape + (1 + which) * dims) && same(t.dtype, e.dtype[which]);
    };
    DLTensor t;
    if (!look(param, t) || address(t) != streams[0].data || !as_before(t, 0)) return false;
    for (size_t k = 2; k < n; ++k) {
      const py::object state = e.local ? local_of(streams[k].tensor) : streams[k].tensor;
      if (!state || !look(state, t) || address(t) != streams[k].data) return false;
    }
    if (!look(grad, t) || !as_before(t, 1)) return false;
    if (address(t) == streams[1].data) return true;
    Row& row = e.table->rows[size_t(e.row)];
    row.at[1] = reinterpret_cast<void*>(address(t));
    row.aligned = is_aligned(row, kMaxStreams);
    streams[1].data = address(t);
    e.table->dirty = true;
    return true;
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
  std::vector<Stream> streams_;
  std::vector<py::object> items_;  // keys and values of every entry's state, in the dictionaries' order
  std::vector<py::object> state_;  // and of the optimizer's
  std::vector<int64_t> numbers_;   // sizes and strides
};

}  // namespace torsion
