#include <cmath>
#include <vector>

#include "core/error.h"
#include "cpu/dispatch.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"

namespace pyqe::cpu {
namespace {

// Rows whose sums are added up by one thread: a fixed number, so that the number of threads changes no bit.
std::int64_t block_rows(std::int64_t classes) {
  constexpr std::int64_t kElements = 8192, kMultiple = 16;  // whole vectors of short rows
  const std::int64_t rows = kElements / classes;
  return rows < kMultiple ? (rows < 1 ? 1 : rows) : rows / kMultiple * kMultiple;
}

void require_labels(const TemperatureNll& args) {
  for (std::int64_t n = 0; n < args.n; ++n) {
    if (args.labels[n] < -1 || args.labels[n] >= args.classes) {
      throw std::out_of_range("labels[" + std::to_string(n) +
                              "]: expected -1 (padding) or a token id in [0, " +
                              std::to_string(args.classes) + "), got " + std::to_string(args.labels[n]));
    }
  }
}

}  // namespace

TemperatureDerivatives temperature_nll(const TemperatureNll& args, int threads) {
  require_at_least("n", args.n, 0);
  require_at_least("classes", args.classes, 1);
  require_at_least("threads", threads, 1);
  if (args.dtype < DType::kFloat32 || args.dtype > DType::kFloat16) {
    throw std::invalid_argument("dtype: expected fp32 (0), bf16 (1) or fp16 (2), got " +
                                std::to_string(static_cast<int>(args.dtype)));
  }
  const std::int64_t rows = block_rows(args.classes), blocks = (args.n + rows - 1) / rows;
  std::vector<TemperatureSums> partial(static_cast<std::size_t>(blocks));
  const std::int64_t bytes = args.n * args.classes * (args.dtype == DType::kFloat32 ? 4 : 2);
  parallel_for(blocks, bytes, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t first = block * rows, last = args.n - first < rows ? args.n : first + rows;
      partial[static_cast<std::size_t>(block)] = kernels().temperature_nll(args, first, last);
    }
  });
  TemperatureSums total = {};
  for (const TemperatureSums& sums : partial) accumulate(total, sums);
  // The kernels take a label that does not exist for NaN, so labels need looking at only where there is one.
  if (args.labels && std::isnan(total.target)) require_labels(args);
  const double sign = args.beta < 0 ? -1 : 1, count = static_cast<double>(args.n);
  // A row with NaN has the mean NaN for sure, but not P: the exponential may turn a NaN's lower bits into a
  // number.
  const double log_partition = std::isnan(total.mean) ? total.mean : total.log_partition;
  return {(log_partition - std::fabs(args.beta) * total.target) / count,
          sign * (total.mean - total.target) / count, total.variance / count};
}

}  // namespace pyqe::cpu
