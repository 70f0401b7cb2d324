#include "bindings/cuda_arguments.h"
#include "cuda/token_logits.h"

namespace pyqe {
namespace {

void token_logits(Address hidden, Address weight, Address bias, Address token_ids, Address logits,
                  std::int64_t n, std::int64_t k, std::int64_t dim, std::int64_t vocab,
                  std::int64_t hidden_stride, std::int64_t weight_stride, int dtype, Address stream) {
  cuda::TokenLogits args;
  args.hidden = {pointer<const void>(hidden), hidden_stride};
  args.weight = {pointer<const void>(weight), weight_stride};
  args.bias = pointer<const void>(bias);
  args.token_ids = pointer<const std::int64_t>(token_ids);
  args.logits = pointer<float>(logits);
  args.n = n, args.k = k, args.dim = dim, args.vocab = vocab;
  args.dtype = static_cast<DType>(dtype);
  cuda::token_logits(args, stream_at(stream));
}

void token_logits_grad_hidden(Address grad, Address weight, Address token_ids, Address grad_hidden,
                              std::int64_t n, std::int64_t k, std::int64_t dim, std::int64_t vocab,
                              std::int64_t weight_stride, int dtype, Address stream) {
  cuda::TokenLogitsGradHidden args;
  args.grad = pointer<const float>(grad);
  args.weight = {pointer<const void>(weight), weight_stride};
  args.token_ids = pointer<const std::int64_t>(token_ids);
  args.grad_hidden = pointer<void>(grad_hidden);
  args.n = n, args.k = k, args.dim = dim, args.vocab = vocab;
  args.dtype = static_cast<DType>(dtype);
  cuda::token_logits_grad_hidden(args, stream_at(stream));
}

void token_logits_grad_rows(Address grad, Address hidden, Address pairs, Address row_starts,
                            Address grad_rows, std::int64_t rows, std::int64_t k, std::int64_t dim,
                            std::int64_t hidden_stride, int dtype, Address stream) {
  cuda::TokenLogitsGradRows args;
  args.grad = pointer<const float>(grad);
  args.hidden = {pointer<const void>(hidden), hidden_stride};
  args.pairs = pointer<const std::int64_t>(pairs);
  args.row_starts = pointer<const std::int64_t>(row_starts);
  args.grad_rows = pointer<void>(grad_rows);
  args.rows = rows, args.k = k, args.dim = dim;
  args.dtype = static_cast<DType>(dtype);
  cuda::token_logits_grad_rows(args, stream_at(stream));
}

}  // namespace

void bind_token_logits(py::module_& m) {
  m.def("token_logits", &token_logits, py::kw_only(), py::arg("hidden"), py::arg("weight"), py::arg("bias"),
        py::arg("token_ids"), py::arg("logits"), py::arg("n"), py::arg("k"), py::arg("dim"), py::arg("vocab"),
        py::arg("hidden_stride"), py::arg("weight_stride"), py::arg("dtype"), py::arg("stream"));
  m.def("token_logits_grad_hidden", &token_logits_grad_hidden, py::kw_only(), py::arg("grad"),
        py::arg("weight"), py::arg("token_ids"), py::arg("grad_hidden"), py::arg("n"), py::arg("k"),
        py::arg("dim"), py::arg("vocab"), py::arg("weight_stride"), py::arg("dtype"), py::arg("stream"));
  m.def("token_logits_grad_rows", &token_logits_grad_rows, py::kw_only(), py::arg("grad"), py::arg("hidden"),
        py::arg("pairs"), py::arg("row_starts"), py::arg("grad_rows"), py::arg("rows"), py::arg("k"),
        py::arg("dim"), py::arg("hidden_stride"), py::arg("dtype"), py::arg("stream"));
}

}  // namespace pyqe
