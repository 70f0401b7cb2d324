#include "bindings/cuda_arguments.h"
#include "cuda/temperature.h"

namespace pyqe {
namespace {

void temperature_rows(const cuda::Logits& logits, Address labels, Address soft_labels,
                      std::int64_t soft_labels_stride, Address beta, Address partials, Address terms,
                      std::int64_t terms_stride, Address stream) {
  cuda::TemperatureRows args;
  args.logits = logits;
  args.labels = pointer<const std::int64_t>(labels);
  args.soft_labels = {pointer<const void>(soft_labels), soft_labels_stride};
  args.beta = pointer<const double>(beta);
  args.partials = pointer<cuda::TemperatureSums>(partials);
  args.terms = pointer<double>(terms);
  args.terms_stride = terms_stride;
  cuda::temperature_rows(args, stream_at(stream));
}

void temperature_means(Address terms, std::int64_t stride, std::int64_t count, Address nll, Address first,
                       Address second, Address stream) {
  cuda::temperature_means({pointer<const double>(terms), stride, count, pointer<double>(nll),
                           pointer<double>(first), pointer<double>(second)},
                          stream_at(stream));
}

// Bytes of scratch for each row.
std::int64_t temperature_scratch(std::int64_t vocab) {
  const std::int64_t parts = cuda::temperature_parts(vocab);
  return parts > 1 ? parts * static_cast<std::int64_t>(sizeof(cuda::TemperatureSums)) : 0;
}

}  // namespace

void bind_temperature(py::module_& m) {
  m.def("temperature_rows", &temperature_rows, py::arg("logits"), py::kw_only(), py::arg("labels"),
        py::arg("soft_labels"), py::arg("soft_labels_stride"), py::arg("beta"), py::arg("partials"),
        py::arg("terms"), py::arg("terms_stride"), py::arg("stream"));
  m.def("temperature_means", &temperature_means, py::kw_only(), py::arg("terms"), py::arg("stride"),
        py::arg("count"), py::arg("nll"), py::arg("first"), py::arg("second"), py::arg("stream"));
  m.def("temperature_scratch", &temperature_scratch, py::arg("vocab"));
}

}  // namespace pyqe
