// Binds launchers to Python: a launcher takes one struct of parameters, whose fields become positional arguments, and
// what else it needs (device and stream, or the CPU variant). Pointers are passed as integers, 0 for null. What a
// launcher says is wrong is raised as RuntimeError. The GIL is released while it runs.
//
// This is Python's own calling convention and not pybind11's: for twenty integers that is 2 us less of each call.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/dtype.h"
#include "common/rows.h"

namespace fastlm {

// Each returns whether the argument was of the right type; if not, Python's error is set.
inline bool read_argument(PyObject* argument, bool& value) {
  const int truth = PyObject_IsTrue(argument);
  value = truth > 0;
  return truth >= 0;
}

inline bool read_argument(PyObject* argument, double& value) {
  value = PyFloat_AsDouble(argument);
  return value != -1.0 || !PyErr_Occurred();
}

inline bool read_argument(PyObject* argument, int64_t& value) {
  value = PyLong_AsLongLong(argument);
  return value != -1 || !PyErr_Occurred();
}

inline bool read_argument(PyObject* argument, int& value) {
  int64_t wide;
  if (!read_argument(argument, wide)) return false;
  value = static_cast<int>(wide);
  return true;
}

inline bool read_argument(PyObject* argument, DType& value) {
  int64_t code;
  if (!read_argument(argument, code)) return false;
  value = static_cast<DType>(code);
  if (code >= 0 && code <= static_cast<int64_t>(DType::kFloat64)) return true;
  PyErr_Format(PyExc_ValueError, "no dtype has the code %lld", static_cast<long long>(code));
  return false;
}

template <typename T>
bool read_argument(PyObject* argument, T*& value) {
  value = static_cast<T*>(PyLong_AsVoidPtr(argument));
  return value != nullptr || !PyErr_Occurred();
}

// A tuple of four, or an int: the first, the others being `rest`.
inline bool read_four(PyObject* argument, int64_t rest, Four& four) {
  const bool is_tuple = PyTuple_CheckExact(argument);
  if (is_tuple && PyTuple_GET_SIZE(argument) != kMaxRowDims) {
    PyErr_SetString(PyExc_TypeError, "expected a tuple of four ints");
    return false;
  }
  for (int d = 0; d < kMaxRowDims; ++d) {
    four.at[d] = rest;
    if ((is_tuple || d == 0) && !read_argument(is_tuple ? PyTuple_GET_ITEM(argument, d) : argument, four.at[d])) {
      return false;
    }
  }
  return true;
}

inline bool read_argument(PyObject* argument, Four& strides) { return read_four(argument, 0, strides); }
inline bool read_argument(PyObject* argument, Rows& rows) { return read_four(argument, 1, rows.sizes); }

// A launch that is made later, and again: its parameters, read once.
struct Later {
  virtual ~Later() = default;
  virtual const char* run() const = 0;
};

constexpr const char* kLater = "fastlm.Later";

// Python functions: `call` calls `launch`, `later` gives a capsule of a Later for run_all.
template <auto launch, typename Params, typename... Extra>
struct Bound : Later {
  Params params;
  std::tuple<Extra...> extra;

  const char* run() const override {
    return std::apply([&](auto... value) { return launch(params, value...); }, extra);
  }

  // Whether the arguments are right; if not, Python's error is set.
  bool read(PyObject* name, PyObject* const* arguments, Py_ssize_t count) {
    constexpr auto fields = Params::fields();
    constexpr Py_ssize_t kFields = std::tuple_size_v<decltype(fields)>;
    if (count != kFields + static_cast<Py_ssize_t>(sizeof...(Extra))) {
      PyErr_Format(PyExc_TypeError, "%U takes %zd arguments, got %zd", name, kFields + sizeof...(Extra), count);
      return false;
    }
    const auto read = [&arguments](auto&... value) { return (read_argument(*arguments++, value) && ...); };
    return std::apply([&](auto... field) { return read(params.*field...); }, fields) && std::apply(read, extra);
  }

  static PyObject* call(PyObject* name, PyObject* const* arguments, Py_ssize_t count) {
    Bound bound;
    if (!bound.read(name, arguments, count)) return nullptr;
    const char* error;
    Py_BEGIN_ALLOW_THREADS;
    error = bound.run();
    Py_END_ALLOW_THREADS;
    if (error != nullptr) return PyErr_Format(PyExc_RuntimeError, "%U: %s", name, error);
    Py_RETURN_NONE;
  }

  static PyObject* later(PyObject* name, PyObject* const* arguments, Py_ssize_t count) {
    auto bound = std::make_unique<Bound>();
    if (!bound->read(name, arguments, count)) return nullptr;
    const auto destroy = [](PyObject* capsule) { delete static_cast<Later*>(PyCapsule_GetPointer(capsule, kLater)); };
    return PyCapsule_New(static_cast<Later*>(bound.release()), kLater, destroy);
  }
};

// Makes the launches of a list, in order, until one says that something is wrong.
inline void run_all(const pybind11::list& launches) {
  std::vector<const Later*> all;
  for (const pybind11::handle launch : launches) {
    all.push_back(static_cast<const Later*>(PyCapsule_GetPointer(launch.ptr(), kLater)));
    if (all.back() == nullptr) throw pybind11::error_already_set();
  }
  const char* error = nullptr;
  {
    pybind11::gil_scoped_release release;
    for (size_t n = 0; n < all.size() && error == nullptr; ++n) error = all[n]->run();
  }
  if (error != nullptr) throw std::runtime_error(error);
}

inline void add_function(pybind11::module_& m, PyMethodDef& method) {
  m.attr(method.ml_name) =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, pybind11::str(method.ml_name).ptr()));
}

template <auto launch, typename Params, typename... Extra>
void bind(pybind11::module_& m, const char* name, const char* (*)(const Params&, Extra...)) {
  using B = Bound<launch, Params, Extra...>;
  const auto function = [](auto* call) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call));  // of METH_FASTCALL's type
  };
  static const std::string later_name = std::string(name) + "_later";
  static PyMethodDef method = {
      name, function(&B::call), METH_FASTCALL,
      "A launcher; its arguments are the fields of its parameters' struct, then what else it needs."};
  static PyMethodDef later = {later_name.c_str(), function(&B::later), METH_FASTCALL,
                              "The launch with these arguments, for run_all; what they point to must live as long."};
  add_function(m, method);
  add_function(m, later);
}

// bind<launch>(m, "launch"): m.launch, with the fields of the launcher's parameters as arguments, and m.launch_later.
template <auto launch>
void bind(pybind11::module_& m, const char* name) {
  bind<launch>(m, name, launch);
}

}  // namespace fastlm
