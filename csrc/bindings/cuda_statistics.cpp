#include "bindings/cuda_arguments.h"
#include "cuda/statistics.h"

namespace pyqe {
namespace {

cuda::Logits logits(Address matrix, std::int64_t stride, std::int64_t n, std::int64_t vocab, int dtype,
                    Address bias, Address row_scale, Address row_shift, float scale, float softcap) {
  cuda::Logits result = {};
  result.matrix = {pointer<const void>(matrix), stride};
  result.bias = pointer<const float>(bias);
  result.row_scale = pointer<const float>(row_scale);
  result.row_shift = pointer<const float>(row_shift);
  result.scale = scale, result.softcap = softcap;
  result.n = n, result.vocab = vocab;
  result.dtype = static_cast<DType>(dtype);
  return result;
}

cuda::Correction correction(Address scale, Address shift, Address bias, Address addend) {
  return {pointer<const float>(scale), pointer<const float>(shift), pointer<const float>(bias),
          pointer<const float>(addend)};
}

cuda::SoftmaxRequest softmax_request(Address partials, Address tile_max, float inverse_temperature,
                                     Address max_logit, Address max_logprob, Address argmax, Address entropy,
                                     Address tempered) {
  return {pointer<SoftmaxPartial>(partials), pointer<float>(tile_max),    inverse_temperature,
          pointer<float>(max_logit),         pointer<float>(max_logprob), pointer<std::int64_t>(argmax),
          pointer<float>(entropy),           pointer<float>(tempered)};
}

cuda::SigmoidRequest sigmoid_request(Address partials, Address tile_max, float threshold, Address max_logit,
                                     Address sum_prob, Address argmax, Address above) {
  return {pointer<SigmoidPartial>(partials), pointer<float>(tile_max), threshold,
          pointer<float>(max_logit),         pointer<float>(sum_prob), pointer<std::int64_t>(argmax),
          pointer<std::int64_t>(above)};
}

void row_statistics(const cuda::Logits& logits, const cuda::Correction& second,
                    const cuda::SoftmaxRequest& softmax, const cuda::SigmoidRequest& sigmoid,
                    Address token_ids, std::int64_t n_tokens, Address softmax_tokens, Address sigmoid_tokens,
                    Address stream) {
  const cuda::Statistics args = {logits,
                                 second,
                                 softmax,
                                 sigmoid,
                                 pointer<const std::int64_t>(token_ids),
                                 n_tokens,
                                 pointer<float>(softmax_tokens),
                                 pointer<float>(sigmoid_tokens)};
  cuda::row_statistics(args, stream_at(stream));
}

DominantRule rule(int kind, bool last_cut, double ratio, double epsilon, double p, std::int64_t k) {
  return {static_cast<DominantKind>(kind), last_cut, ratio, epsilon, p, k};
}

void row_candidates(const cuda::Logits& logits, const cuda::Correction& second, Address tile_max,
                    Address max_logit, Address max_logprob, std::int64_t top_k, Address topk_logits,
                    Address topk_ids, const DominantRule& rule, std::int64_t members, Address dominant_ids,
                    Address size, Address mass, Address stream) {
  const cuda::Candidates args = {logits,
                                 second,
                                 pointer<const float>(tile_max),
                                 pointer<const float>(max_logit),
                                 pointer<const float>(max_logprob),
                                 top_k,
                                 pointer<float>(topk_logits),
                                 pointer<std::int64_t>(topk_ids),
                                 rule,
                                 members,
                                 pointer<std::int64_t>(dominant_ids),
                                 pointer<std::int64_t>(size),
                                 pointer<float>(mass)};
  cuda::row_candidates(args, stream_at(stream));
}

}  // namespace

void bind_statistics(py::module_& m) {
  // module_local: pyqe._C has a DominantRule too, and tests load the emulator's module beside the GPU's
  py::class_<cuda::Logits>(m, "Logits", py::module_local());
  py::class_<cuda::Correction>(m, "Correction", py::module_local());
  py::class_<cuda::SoftmaxRequest>(m, "SoftmaxRequest", py::module_local());
  py::class_<cuda::SigmoidRequest>(m, "SigmoidRequest", py::module_local());
  py::class_<DominantRule>(m, "DominantRule", py::module_local());
  m.attr("TILE") = cuda::kTile;
  m.attr("SEGMENT") = cuda::kSegment;
  m.attr("MAX_CANDIDATES") = cuda::kMaxCandidates;
  m.attr("SOFTMAX_PARTIAL_BYTES") = sizeof(SoftmaxPartial);
  m.attr("SIGMOID_PARTIAL_BYTES") = sizeof(SigmoidPartial);
  m.def("logits", &logits, py::arg("matrix"), py::arg("stride"), py::arg("n"), py::arg("vocab"),
        py::arg("dtype"), py::arg("bias") = 0, py::arg("row_scale") = 0, py::arg("row_shift") = 0,
        py::arg("scale") = 1.0f, py::arg("softcap") = 0.0f);
  m.def("correction", &correction, py::arg("scale") = 0, py::arg("shift") = 0, py::arg("bias") = 0,
        py::arg("addend") = 0);
  m.def("softmax_request", &softmax_request, py::arg("partials") = 0, py::arg("tile_max") = 0,
        py::arg("inverse_temperature") = 0.0f, py::arg("max_logit") = 0, py::arg("max_logprob") = 0,
        py::arg("argmax") = 0, py::arg("entropy") = 0, py::arg("tempered") = 0);
  m.def("sigmoid_request", &sigmoid_request, py::arg("partials") = 0, py::arg("tile_max") = 0,
        py::arg("threshold") = 0.0f, py::arg("max_logit") = 0, py::arg("sum_prob") = 0, py::arg("argmax") = 0,
        py::arg("above") = 0);
  m.def("row_statistics", &row_statistics, py::arg("logits"), py::arg("second"), py::arg("softmax"),
        py::arg("sigmoid"), py::kw_only(), py::arg("token_ids"), py::arg("n_tokens"),
        py::arg("softmax_tokens"), py::arg("sigmoid_tokens"), py::arg("stream"));
  m.def("rule", &rule);
  m.def("row_candidates", &row_candidates, py::arg("logits"), py::arg("second"), py::kw_only(),
        py::arg("tile_max"), py::arg("max_logit"), py::arg("max_logprob"), py::arg("top_k"),
        py::arg("topk_logits"), py::arg("topk_ids"), py::arg("rule"), py::arg("members"),
        py::arg("dominant_ids"), py::arg("size"), py::arg("mass"), py::arg("stream"));
}

}  // namespace pyqe
