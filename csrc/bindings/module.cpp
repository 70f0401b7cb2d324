// pyqe._C: the only place where Python and C++ meet. Pointers cross as integers, with sizes, strides in
// elements and a dtype code, because bf16 has no NumPy dtype and this library does not depend on torch.
// Pointers are trusted: pyqe's Python side checks shapes, dtypes and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/operations.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace pyqe {
namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cpu::Matrix matrix(Address address, std::int64_t stride) { return {pointer<const void>(address), stride}; }

void token_logits_forward(Address hidden, Address weight, Address bias, Address token_ids, Address out,
                          std::int64_t n, std::int64_t k, std::int64_t dim, std::int64_t vocab,
                          std::int64_t hidden_stride, std::int64_t weight_stride, int dtype, int threads) {
  cpu::TokenLogitsForward args;
  args.hidden = matrix(hidden, hidden_stride);
  args.weight = matrix(weight, weight_stride);
  args.bias = pointer<const void>(bias);
  args.token_ids = pointer<const std::int64_t>(token_ids);
  args.logits = pointer<float>(out);
  args.n = n, args.k = k, args.dim = dim, args.vocab = vocab;
  args.dtype = static_cast<DType>(dtype);
  cpu::token_logits_forward(args, threads);
}

void token_logits_backward_hidden(Address grad, Address weight, Address token_ids, Address grad_hidden,
                                  std::int64_t n, std::int64_t k, std::int64_t dim, std::int64_t vocab,
                                  std::int64_t weight_stride, int dtype, int threads) {
  cpu::TokenLogitsBackwardHidden args;
  args.grad = pointer<const float>(grad);
  args.weight = matrix(weight, weight_stride);
  args.token_ids = pointer<const std::int64_t>(token_ids);
  args.grad_hidden = pointer<void>(grad_hidden);
  args.n = n, args.k = k, args.dim = dim, args.vocab = vocab;
  args.dtype = static_cast<DType>(dtype);
  cpu::token_logits_backward_hidden(args, threads);
}

void token_logits_backward_weight(Address grad, Address hidden, Address pairs, Address row_starts,
                                  Address row_ids, Address out, std::int64_t rows, std::int64_t k,
                                  std::int64_t dim, std::int64_t hidden_stride, std::int64_t out_stride,
                                  int dtype, int threads) {
  cpu::TokenLogitsBackwardWeight args;
  args.grad = pointer<const float>(grad);
  args.hidden = matrix(hidden, hidden_stride);
  args.pairs = pointer<const std::int64_t>(pairs);
  args.row_starts = pointer<const std::int64_t>(row_starts);
  args.row_ids = pointer<const std::int64_t>(row_ids);
  args.grad_weight = pointer<void>(out);
  args.stride = out_stride;
  args.rows = rows, args.k = k, args.dim = dim;
  args.dtype = static_cast<DType>(dtype);
  cpu::token_logits_backward_weight(args, threads);
}

void inverse_softmax(Address probs, Address out, std::int64_t n, std::int64_t classes,
                     std::int64_t probs_stride, double eps, int center, int dtype, int threads) {
  cpu::InverseSoftmax args;
  args.probs = matrix(probs, probs_stride);
  args.logits = pointer<void>(out);
  args.n = n, args.classes = classes;
  args.eps = eps;
  args.center = static_cast<cpu::Center>(center);
  args.dtype = static_cast<DType>(dtype);
  cpu::inverse_softmax(args, threads);
}

std::tuple<double, double, double> temperature_nll(Address logits, Address labels, Address soft_labels,
                                                   std::int64_t n, std::int64_t classes, double beta,
                                                   std::int64_t logits_stride,
                                                   std::int64_t soft_labels_stride, int dtype, int threads) {
  cpu::TemperatureNll args;
  args.logits = matrix(logits, logits_stride);
  args.labels = pointer<const std::int64_t>(labels);
  args.soft_labels = matrix(soft_labels, soft_labels_stride);
  args.n = n, args.classes = classes;
  args.beta = beta;
  args.dtype = static_cast<DType>(dtype);
  const cpu::TemperatureDerivatives result = cpu::temperature_nll(args, threads);
  return {result.nll, result.first, result.second};
}

int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

std::map<std::string, std::string> build_info() {
  std::string isas;
  for (const std::string& name : cpu::compiled_isas()) isas += (isas.empty() ? "" : " ") + name;
#ifdef _OPENMP
  const char* openmp = "yes";
#else
  const char* openmp = "no";
#endif
  return {{"version", PYQE_VERSION},
          {"compiler", PYQE_COMPILER},
          {"build_type", PYQE_BUILD_TYPE},
          {"openmp", openmp},
          {"isas", isas}};
}

}  // namespace
}  // namespace pyqe

PYBIND11_MODULE(_C, module) {
  using namespace pyqe;
  using py::arg;
  // The arguments are plain numbers, so the operations run without the GIL from start to end.
  using WithoutGil = py::call_guard<py::gil_scoped_release>;

  module.def("cpu_isa", cpu::isa);
  module.def("cpu_isas", cpu::available_isas);
  module.def("cpu_features", cpu::cpu_features);
  module.def("build_info", build_info);
  module.def("max_threads", max_threads);

  module.def("token_logits_forward", token_logits_forward, WithoutGil(), arg("hidden"), arg("weight"),
             arg("bias"), arg("token_ids"), arg("out"), py::kw_only(), arg("n"), arg("k"), arg("dim"),
             arg("vocab"), arg("hidden_stride"), arg("weight_stride"), arg("dtype"), arg("threads"));
  module.def("token_logits_backward_hidden", token_logits_backward_hidden, WithoutGil(), arg("grad"),
             arg("weight"), arg("token_ids"), arg("grad_hidden"), py::kw_only(), arg("n"), arg("k"),
             arg("dim"), arg("vocab"), arg("weight_stride"), arg("dtype"), arg("threads"));
  module.def("token_logits_backward_weight", token_logits_backward_weight, WithoutGil(), arg("grad"),
             arg("hidden"), arg("pairs"), arg("row_starts"), arg("row_ids"), arg("out"), py::kw_only(),
             arg("rows"), arg("k"), arg("dim"), arg("hidden_stride"), arg("out_stride"), arg("dtype"),
             arg("threads"));
  module.def("inverse_softmax", inverse_softmax, WithoutGil(), arg("probs"), arg("out"), py::kw_only(),
             arg("n"), arg("classes"), arg("probs_stride"), arg("eps"), arg("center"), arg("dtype"),
             arg("threads"));
  module.def("temperature_nll", temperature_nll, WithoutGil(), arg("logits"), arg("labels"),
             arg("soft_labels"), py::kw_only(), arg("n"), arg("classes"), arg("beta"), arg("logits_stride"),
             arg("soft_labels_stride"), arg("dtype"), arg("threads"));
}
