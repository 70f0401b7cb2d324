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
#include "cpu/sampling.h"
#include "cpu/statistics.h"
#include "cpu/temperature.h"
#include "cpu/vocab_bce.h"

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

cpu::Logits existing_logits(Address logits, std::int64_t n, std::int64_t vocab, std::int64_t stride,
                            int dtype) {
  cpu::Logits from = {};
  from.logits = matrix(logits, stride);
  from.n = n, from.vocab = vocab;
  from.dtype = static_cast<DType>(dtype);
  return from;
}

cpu::Logits linear_logits(Address hidden, Address weight, Address bias, Address row_scale, Address row_shift,
                          double scale, double softcap, std::int64_t n, std::int64_t dim, std::int64_t vocab,
                          std::int64_t hidden_stride, std::int64_t weight_stride, int dtype) {
  cpu::Logits from = {};
  from.hidden = matrix(hidden, hidden_stride);
  from.weight = matrix(weight, weight_stride);
  from.bias = pointer<const void>(bias);
  from.row_scale = pointer<const float>(row_scale);
  from.row_shift = pointer<const float>(row_shift);
  from.scale = static_cast<float>(scale), from.softcap = static_cast<float>(softcap);
  from.n = n, from.dim = dim, from.vocab = vocab;
  from.dtype = static_cast<DType>(dtype);
  return from;
}

DominantRule dominant_rule(int kind, bool last_cut, double ratio, double epsilon, double p, std::int64_t k) {
  return {static_cast<DominantKind>(kind), last_cut, ratio, epsilon, p, k};
}

cpu::SoftmaxStats softmax_request(const cpu::Logits& logits, const DominantRule& rule, Address token_ids,
                                  Address token_logits, std::int64_t n_tokens, Address max_logit,
                                  Address max_logprob, Address argmax, Address entropy, Address tempered,
                                  double temperature, Address topk_logits, Address topk_ids,
                                  std::int64_t top_k, Address dominant_ids, Address size, Address mass,
                                  std::int64_t members) {
  cpu::SoftmaxStats args = {};
  args.logits = logits;
  args.rule = rule;
  args.token_ids = pointer<const std::int64_t>(token_ids);
  args.token_logits = pointer<float>(token_logits);
  args.n_tokens = n_tokens, args.top_k = top_k, args.members = members;
  args.temperature = temperature;
  args.max_logit = pointer<float>(max_logit), args.max_logprob = pointer<float>(max_logprob);
  args.argmax = pointer<std::int64_t>(argmax);
  args.entropy = pointer<float>(entropy), args.tempered = pointer<float>(tempered);
  args.topk_logits = pointer<float>(topk_logits), args.topk_ids = pointer<std::int64_t>(topk_ids);
  args.dominant_ids = pointer<std::int64_t>(dominant_ids), args.size = pointer<std::int64_t>(size);
  args.mass = pointer<float>(mass);
  return args;
}

cpu::SigmoidStats sigmoid_request(const cpu::Logits& logits, Address token_ids, Address token_logits,
                                  std::int64_t n_tokens, Address max_logit, Address argmax, Address sum_prob,
                                  Address count_above, double threshold, Address topk_logits,
                                  Address topk_ids, std::int64_t top_k) {
  cpu::SigmoidStats args = {};
  args.logits = logits;
  args.token_ids = pointer<const std::int64_t>(token_ids);
  args.token_logits = pointer<float>(token_logits);
  args.n_tokens = n_tokens, args.top_k = top_k;
  args.threshold = static_cast<float>(threshold);
  args.max_logit = pointer<float>(max_logit), args.sum_prob = pointer<float>(sum_prob);
  args.argmax = pointer<std::int64_t>(argmax), args.count_above = pointer<std::int64_t>(count_above);
  args.topk_logits = pointer<float>(topk_logits), args.topk_ids = pointer<std::int64_t>(topk_ids);
  return args;
}

void joint_stats(const cpu::SoftmaxStats& softmax, const cpu::SigmoidStats& sigmoid, Address scale,
                 Address shift, Address bias, Address projected, Address factors, std::int64_t rank,
                 int threads) {
  cpu::Correction correction = {};
  correction.scale = pointer<const float>(scale), correction.shift = pointer<const float>(shift);
  correction.bias = pointer<const float>(bias);
  correction.projected = pointer<const float>(projected);
  correction.factors = matrix(factors, rank);
  correction.rank = rank;
  cpu::joint_stats(softmax, sigmoid, correction, threads);
}

std::tuple<double, double, double> linear_temperature_nll(const cpu::Logits& logits, Address labels,
                                                          double beta, int threads) {
  const cpu::LinearTemperatureNll args = {logits, pointer<const std::int64_t>(labels), beta};
  const cpu::TemperatureDerivatives result = cpu::linear_temperature_nll(args, threads);
  return {result.nll, result.first, result.second};
}

void copy_logits(const cpu::Logits& logits, Address to, int threads) {
  cpu::copy_logits(logits, pointer<float>(to), threads);
}

// Sources as (softmax, unigram, uniform, count).
using Sources = std::vector<std::tuple<double, double, double, std::int64_t>>;

void sample_negatives(const cpu::Logits& logits, const DominantRule& exclude, const Sources& sources,
                      Address targets, std::int64_t members, double beta, Address factor, Address counts,
                      std::uint64_t seed, Address ids, Address undecided, int threads) {
  std::vector<Source> parts;
  for (const auto& [softmax, unigram, uniform, count] : sources)
    parts.push_back({softmax, unigram, uniform, count});
  cpu::SampleNegatives args = {};
  args.logits = logits;
  args.exclude = exclude;
  args.sources = parts.data(), args.n_sources = static_cast<std::int64_t>(parts.size());
  args.targets = pointer<const std::int64_t>(targets);
  args.members = members;
  args.beta = static_cast<float>(beta);
  args.factor = pointer<const float>(factor), args.counts = pointer<const float>(counts);
  args.seed = seed;
  args.ids = pointer<std::int64_t>(ids), args.undecided = pointer<std::int64_t>(undecided);
  const py::gil_scoped_release release;
  cpu::sample_negatives(args, threads);
}

void vocab_bce(const cpu::Logits& logits, Address targets, Address exclude_ids, std::int64_t n_exclude,
               Address row_weights, double pos_weight, Address total, Address losses, Address grad_hidden,
               Address grad_weight, Address grad_bias, Address grad_scale, Address grad_shift, int threads) {
  cpu::VocabBce args = {};
  args.logits = logits;
  args.targets = pointer<const std::int64_t>(targets);
  args.exclude_ids = pointer<const std::int64_t>(exclude_ids);
  args.n_exclude = n_exclude;
  args.row_weights = pointer<const float>(row_weights);
  args.pos_weight = static_cast<float>(pos_weight);
  args.total = pointer<float>(total), args.losses = pointer<float>(losses);
  args.grad_hidden = pointer<void>(grad_hidden), args.grad_weight = pointer<void>(grad_weight);
  args.grad_bias = pointer<void>(grad_bias);
  args.grad_scale = pointer<float>(grad_scale), args.grad_shift = pointer<float>(grad_shift);
  cpu::vocab_bce(args, threads);
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
  // What the operations get holds no Python object, so they run without the GIL from start to end.
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

  py::class_<cpu::Logits>(module, "Logits");
  module.def("existing_logits", existing_logits, arg("logits"), py::kw_only(), arg("n"), arg("vocab"),
             arg("stride"), arg("dtype"));
  module.def("linear_logits", linear_logits, arg("hidden"), arg("weight"), arg("bias"), arg("row_scale"),
             arg("row_shift"), py::kw_only(), arg("scale"), arg("softcap"), arg("n"), arg("dim"),
             arg("vocab"), arg("hidden_stride"), arg("weight_stride"), arg("dtype"));
  py::class_<DominantRule>(module, "DominantRule");
  module.def("dominant_rule", dominant_rule, py::kw_only(), arg("kind"), arg("last_cut"), arg("ratio"),
             arg("epsilon"), arg("p"), arg("k"));
  py::class_<cpu::SoftmaxStats>(module, "SoftmaxRequest");
  py::class_<cpu::SigmoidStats>(module, "SigmoidRequest");
  module.def("softmax_request", softmax_request, arg("logits"), arg("rule"), py::kw_only(), arg("token_ids"),
             arg("token_logits"), arg("n_tokens"), arg("max_logit"), arg("max_logprob"), arg("argmax"),
             arg("entropy"), arg("tempered"), arg("temperature"), arg("topk_logits"), arg("topk_ids"),
             arg("top_k"), arg("dominant_ids"), arg("size"), arg("mass"), arg("members"));
  module.def("sigmoid_request", sigmoid_request, arg("logits"), py::kw_only(), arg("token_ids"),
             arg("token_logits"), arg("n_tokens"), arg("max_logit"), arg("argmax"), arg("sum_prob"),
             arg("count_above"), arg("threshold"), arg("topk_logits"), arg("topk_ids"), arg("top_k"));
  module.def("softmax_stats", cpu::softmax_stats, WithoutGil(), arg("request"), py::kw_only(),
             arg("threads"));
  module.def("sigmoid_stats", cpu::sigmoid_stats, WithoutGil(), arg("request"), py::kw_only(),
             arg("threads"));
  module.def("joint_stats", joint_stats, WithoutGil(), arg("softmax"), arg("sigmoid"), py::kw_only(),
             arg("scale"), arg("shift"), arg("bias"), arg("projected"), arg("factors"), arg("rank"),
             arg("threads"));
  module.def("linear_temperature_nll", linear_temperature_nll, WithoutGil(), arg("logits"), py::kw_only(),
             arg("labels"), arg("beta"), arg("threads"));
  module.def("copy_logits", copy_logits, WithoutGil(), arg("logits"), arg("to"), py::kw_only(),
             arg("threads"));
  module.def("sample_negatives", sample_negatives, arg("logits"), arg("exclude"), arg("sources"),
             py::kw_only(), arg("targets"), arg("members"), arg("beta"), arg("factor"), arg("counts"),
             arg("seed"), arg("ids"), arg("undecided"), arg("threads"));
  module.def("vocab_bce", vocab_bce, WithoutGil(), arg("logits"), py::kw_only(), arg("targets"),
             arg("exclude_ids"), arg("n_exclude"), arg("row_weights"), arg("pos_weight"), arg("total"),
             arg("losses"), arg("grad_hidden"), arg("grad_weight"), arg("grad_bias"), arg("grad_scale"),
             arg("grad_shift"), arg("threads"));
}
