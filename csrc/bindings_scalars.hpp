// Scalar arguments: pybind11's own conversions refuse a wrong one without naming it, and take True for 1.
// Included by bindings*.cpp alone.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "common/check.hpp"

namespace urlfast {
namespace py = pybind11;

inline std::string type_name(py::handle object) {
  return py::str(py::type::handle_of(object).attr("__qualname__")).cast<std::string>();
}

// What came, for a message: short, in one line, without asking an array for its values.
inline std::string shown(py::handle object) {
  PyObject* o = object.ptr();
  if (o == Py_None || PyBool_Check(o) || PyLong_Check(o) || PyFloat_Check(o) || PyUnicode_Check(o)) {
    const auto ascii = py::reinterpret_steal<py::object>(PyObject_ASCII(o));
    if (ascii) {
      auto out = ascii.cast<std::string>();
      return out.size() <= 80 ? out : out.substr(0, 77) + "...";
    }
    PyErr_Clear();  // an int of too many digits
  }
  return type_name(object);
}

// What a foreign library says: torch appends its C++ stack, pybind11 the Python one.
inline std::string first_line(const char* message) { return {message, std::strcspn(message, "\n")}; }

[[noreturn]] inline void refuse_type(const char* argument, const char* accepted, py::handle got) {
  throw py::type_error(text(argument, ": must be ", accepted, ", got ", shown(got)));
}

inline bool is_bool(py::handle object) {
  const char* type = Py_TYPE(object.ptr())->tp_name;
  return PyBool_Check(object.ptr()) || !std::strcmp(type, "numpy.bool") || !std::strcmp(type, "numpy.bool_");
}

// An int, or what stands for one (NumPy's integers); True is none.
inline py::object index_of(py::handle object, const char* argument, const char* accepted) {
  if (is_bool(object)) refuse_type(argument, accepted, object);
  auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    refuse_type(argument, accepted, object);
  }
  return index;
}

inline void convert(py::handle object, const char* argument, const char* accepted, int64_t& out) {
  const py::object index = index_of(object, argument, accepted ? accepted : "an int");
  int overflow = 0;
  out = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  require(!overflow, argument, "must lie in -2^63..2^63-1, got ", overflow ? shown(index) : "");
}

inline void convert(py::handle object, const char* argument, const char* accepted, uint64_t& out) {
  const py::object index = index_of(object, argument, accepted ? accepted : "an int");
  out = PyLong_AsUnsignedLongLong(index.ptr());
  if (out == uint64_t(-1) && PyErr_Occurred()) {
    PyErr_Clear();
    require(false, argument, "must lie in 0..2^64-1, got ", shown(index));
  }
}

inline void convert(py::handle object, const char* argument, const char* accepted, double& out) {
  if (!accepted) accepted = "a number";
  if (is_bool(object)) refuse_type(argument, accepted, object);
  out = PyFloat_AsDouble(object.ptr());
  if (out == -1. && PyErr_Occurred()) {
    const bool type = PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_ValueError),
               large = PyErr_ExceptionMatches(PyExc_OverflowError);
    if (!type && !large) throw py::error_already_set();
    PyErr_Clear();
    require(!large, argument, "must lie in the range of float64, got ", large ? shown(object) : "");
    refuse_type(argument, accepted, object);
  }
}

inline void convert(py::handle object, const char* argument, const char* accepted, bool& out) {
  if (!is_bool(object)) refuse_type(argument, accepted ? accepted : "a bool", object);
  out = PyObject_IsTrue(object.ptr()) == 1;
}

inline void convert(py::handle object, const char* argument, const char* accepted, std::string& out) {
  Py_ssize_t size = 0;
  const char* utf8 = PyUnicode_Check(object.ptr()) ? PyUnicode_AsUTF8AndSize(object.ptr(), &size) : nullptr;
  if (!utf8) {
    PyErr_Clear();  // a lone surrogate
    refuse_type(argument, accepted ? accepted : "a str", object);
  }
  out.assign(utf8, size_t(size));
}

inline void convert(py::handle object, const char* argument, const char* accepted, py::dict& out) {
  if (!py::isinstance<py::dict>(object)) refuse_type(argument, accepted ? accepted : "a dict", object);
  out = py::reinterpret_borrow<py::dict>(object);
}

// An argument as it came, borrowed from the call; as("k") is its value, or a TypeError or ValueError that names it.
template <class T>
struct Given {
  py::handle object;
  T as(const char* argument, const char* accepted = nullptr) const {
    T out{};
    convert(object, argument, accepted, out);
    return out;
  }
};

// state[key], for a load_state_dict.
template <class T>
T state_item(const py::dict& state, const char* key, const char* whose) {
  require(state.contains(key), "state", "has no '", key, "': not ", whose, " state_dict");
  const auto refuse = [key] { throw std::invalid_argument(text("state: '", key, "' has the wrong type")); };
  try {
    return py::object(state[key]).cast<T>();
  } catch (const py::cast_error&) {
    refuse();
  } catch (const py::type_error&) {
    refuse();
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError) && !error.matches(PyExc_ValueError)) throw;
    refuse();
  }
  return {};  // not reached
}

// An object of our own, with its C++ part: where __init__ was refused or never called pybind11 would hand a method
// memory that nobody has written.
template <class T>
struct MadeCaster : py::detail::type_caster_base<T> {
  bool load(py::handle source, bool convert) {
    if (source && PyType_IsSubtype(Py_TYPE(source.ptr()), this->typeinfo->type)) {
      auto* made = reinterpret_cast<py::detail::instance*>(source.ptr());
      bool whole = made->simple_layout && made->simple_holder_constructed;
      if (!made->simple_layout)
        for (const auto& part : py::detail::values_and_holders(made))
          whole |= part.type == this->typeinfo && part.holder_constructed();
      if (!whole) throw std::runtime_error(type_name(source) + ": its __init__ was refused, or never called");
    }
    return py::detail::type_caster_base<T>::load(source, convert);
  }
};

}  // namespace urlfast

#define URLFAST_MADE(T) \
  template <>           \
  struct pybind11::detail::type_caster<T> : urlfast::MadeCaster<T> {};

namespace pybind11::detail {
template <class T>
struct type_caster<urlfast::Given<T>> {
  PYBIND11_TYPE_CASTER(urlfast::Given<T>, make_caster<T>::name);
  bool load(handle source, bool) {
    value.object = source;
    return true;
  }
};
}  // namespace pybind11::detail
