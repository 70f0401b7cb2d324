#include <tuple>
#include <vector>

#include "bindings/cuda_arguments.h"
#include "cuda/sampling.h"

namespace pyqe {
namespace {

// Sources as (softmax, unigram, uniform, count).
using Sources = std::vector<std::tuple<double, double, double, std::int64_t>>;

void sample_negatives(const cuda::Logits& logits, const Sources& sources, Address targets, Address excluded,
                      std::int64_t n_excluded, Address max_logit, double beta, Address factor, Address counts,
                      Address tile_counts, std::int64_t first_row, Address seed_at, std::int64_t seed,
                      Address barred, Address tile_sums, Address ids, std::int64_t width, Address stream) {
  std::vector<Source> parts;
  for (const auto& [softmax, unigram, uniform, count] : sources)
    parts.push_back({softmax, unigram, uniform, count});
  cuda::SampleNegatives args = {};
  args.logits = logits;
  args.targets = pointer<const std::int64_t>(targets);
  args.excluded = pointer<const std::int64_t>(excluded), args.n_excluded = n_excluded;
  args.max_logit = pointer<const float>(max_logit);
  args.beta = static_cast<float>(beta);
  args.factor = pointer<const float>(factor), args.counts = pointer<const float>(counts);
  args.tile_counts = pointer<const double>(tile_counts);
  args.first_row = first_row;
  args.seed_at = pointer<const std::int64_t>(seed_at), args.seed = seed;
  args.barred = pointer<unsigned>(barred), args.tile_sums = pointer<TileSum>(tile_sums);
  args.ids = pointer<std::int64_t>(ids), args.width = width;
  cuda::sample_negatives(args, parts.data(), static_cast<std::int64_t>(parts.size()), stream_at(stream));
}

}  // namespace

void bind_sampling(py::module_& m) {
  m.attr("TILE_WORDS") = cuda::kTileWords;
  m.def("sample_negatives", &sample_negatives, py::arg("logits"), py::arg("sources"), py::kw_only(),
        py::arg("targets"), py::arg("excluded"), py::arg("n_excluded"), py::arg("max_logit"), py::arg("beta"),
        py::arg("factor"), py::arg("counts"), py::arg("tile_counts"), py::arg("first_row"),
        py::arg("seed_at"), py::arg("seed"), py::arg("barred"), py::arg("tile_sums"), py::arg("ids"),
        py::arg("width"), py::arg("stream"));
}

}  // namespace pyqe
