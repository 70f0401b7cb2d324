#include <cmath>

#include "core/error.h"
#include "cpu/dispatch.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/row_centre.h"

namespace pyqe::cpu {
namespace {

// fp64 serves small data and references: the C library's logarithm will do, on every processor.
void inverse_softmax_row_fp64(const double* probs, double* logits, const InverseSoftmax& args) {
  CompensatedSum<double> sum;
  bool invalid = false;
  for (std::int64_t c = 0; c < args.classes; ++c) {
    invalid |= !(probs[c] >= 0);
    const double clamped = probs[c] < args.eps ? args.eps : probs[c];
    logits[c] = std::log(clamped);
    sum.add(args.center == Center::kMean ? logits[c] : clamped);
  }
  const double centre = row_centre(args, sum.sum - sum.excess, invalid);
  for (std::int64_t c = 0; c < args.classes; ++c) logits[c] -= centre;
}

void inverse_softmax_fp64(const InverseSoftmax& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t n = begin; n < end; ++n) {
    inverse_softmax_row_fp64(static_cast<const double*>(args.probs.data) + n * args.probs.stride,
                             static_cast<double*>(args.logits) + n * args.classes, args);
  }
}

}  // namespace

void inverse_softmax(const InverseSoftmax& args, int threads) {
  require_at_least("n", args.n, 0);
  require_at_least("classes", args.classes, 0);
  require_at_least("threads", threads, 1);
  if (!(args.eps >= 0)) {
    throw std::invalid_argument("eps: expected 0 or more, got " + std::to_string(args.eps));
  }
  if (args.center < Center::kNone || args.center > Center::kLogSumExp) {
    throw std::invalid_argument("center: expected none (0), mean (1) or logsumexp (2), got " +
                                std::to_string(static_cast<int>(args.center)));
  }
  if (args.dtype != DType::kFloat32 && args.dtype != DType::kFloat64) {
    throw std::invalid_argument("dtype: expected fp32 (0) or fp64 (3), got " +
                                std::to_string(static_cast<int>(args.dtype)));
  }
  const bool fp32 = args.dtype == DType::kFloat32;
  const auto compute = fp32 ? kernels().inverse_softmax : inverse_softmax_fp64;
  const std::int64_t bytes = args.n * args.classes * (fp32 ? 2 * 4 : 2 * 8);
  parallel_for(args.n, bytes, threads,
               [&](std::int64_t begin, std::int64_t end) { compute(args, begin, end); });
}

}  // namespace pyqe::cpu
