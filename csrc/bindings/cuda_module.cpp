// pyqe._cuda: the CUDA kernels for Python. Pointers cross as integers, as in module.cpp; so does the stream.
// The module links the CUDA runtime statically: it imports where no driver is, and says that there is no
// device.
#include <string>

#include "bindings/cuda_arguments.h"

namespace pyqe {
namespace {

#ifndef PYQE_CUDA_EMULATED
// Compute capability 8.0: asynchronous copies into shared memory, bfloat16 on tensor cores.
constexpr int kLeastMajor = 8;

// Why a device cannot be used, or an empty string.
std::string obstacle_of(int device) {
  cudaDeviceProp facts;
  const cudaError_t error = cudaGetDeviceProperties(&facts, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (facts.major >= kLeastMajor) return "";
  return std::string(facts.name) + " has compute capability " + std::to_string(facts.major) + "." +
         std::to_string(facts.minor) + ", the kernels need " + std::to_string(kLeastMajor) + ".0";
}
#endif

// Why nothing can be run, or an empty string. One device that can be used is enough.
std::string obstacle() {
#ifdef PYQE_CUDA_EMULATED
  return "";
#else
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaErrorInsufficientDriver) return "no NVIDIA driver, or one too old for this CUDA version";
  if (error != cudaSuccess) return cudaGetErrorString(error);
  std::string found = "no CUDA device";
  for (int device = 0; device < devices; ++device) {
    found = obstacle_of(device);
    if (found.empty()) break;
  }
  return found;
#endif
}

void inverse_softmax(Address probs, Address logits, std::int64_t n, std::int64_t classes, std::int64_t stride,
                     float eps, int center, int dtype, Address stream) {
  cuda::InverseSoftmax args;
  args.probs = {pointer<const void>(probs), stride};
  args.logits = pointer<float>(logits);
  args.n = n, args.classes = classes;
  args.eps = eps;
  args.center = static_cast<cuda::Center>(center);
  args.dtype = static_cast<DType>(dtype);
  cuda::inverse_softmax(args, stream_at(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels; see pyqe/backends/cuda.py";
  m.def("obstacle", &obstacle);
  bind_decode(m);
  bind_sampling(m);
  bind_statistics(m);
  bind_temperature(m);
  bind_token_logits(m);
  m.def("inverse_softmax", &inverse_softmax, py::kw_only(), py::arg("probs"), py::arg("logits"), py::arg("n"),
        py::arg("classes"), py::arg("stride"), py::arg("eps"), py::arg("center"), py::arg("dtype"),
        py::arg("stream"));
}

}  // namespace pyqe
