// What the bindings of the CUDA kernels share: pointers and the stream cross as integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "cuda/operations.h"

namespace pyqe {

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline cuda::Stream stream_at(Address address) { return reinterpret_cast<cuda::Stream>(address); }

void bind_decode(py::module_& m);
void bind_sampling(py::module_& m);
void bind_statistics(py::module_& m);
void bind_temperature(py::module_& m);
void bind_token_logits(py::module_& m);

}  // namespace pyqe
