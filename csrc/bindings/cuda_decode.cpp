#include "bindings/cuda_arguments.h"
#include "cuda/decode.h"

namespace pyqe {
namespace {

void decode(Address hidden, Address weight, Address dots, std::int64_t n, std::int64_t vocab,
            std::int64_t dim, std::int64_t hidden_stride, std::int64_t weight_stride, int dtype,
            Address stream) {
  cuda::Decode args;
  args.hidden = {pointer<const void>(hidden), hidden_stride};
  args.weight = {pointer<const void>(weight), weight_stride};
  args.dots = pointer<float>(dots);
  args.n = n, args.vocab = vocab, args.dim = dim;
  args.dtype = static_cast<DType>(dtype);
  cuda::decode(args, stream_at(stream));
}

}  // namespace

void bind_decode(py::module_& m) {
  m.attr("MAX_DECODE_ROWS") = cuda::kMaxDecodeRows;
  m.def("decode", &decode, py::kw_only(), py::arg("hidden"), py::arg("weight"), py::arg("dots"), py::arg("n"),
        py::arg("vocab"), py::arg("dim"), py::arg("hidden_stride"), py::arg("weight_stride"),
        py::arg("dtype"), py::arg("stream"));
}

}  // namespace pyqe
