#include "cpu/temperature.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/error.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scan_driver.h"

namespace pyqe::cpu {
namespace {

// Rows whose sums are added up by one thread: a fixed number, so that the number of threads changes no bit.
std::int64_t block_rows(std::int64_t classes) {
  constexpr std::int64_t kElements = 8192, kMultiple = 16;  // whole vectors of short rows
  const std::int64_t rows = kElements / classes;
  return rows < kMultiple ? (rows < 1 ? 1 : rows) : rows / kMultiple * kMultiple;
}

void require_labels(const std::int64_t* labels, std::int64_t count, std::int64_t classes) {
  for (std::int64_t n = 0; n < count; ++n) {
    if (labels[n] < -1 || labels[n] >= classes) {
      throw std::out_of_range("labels[" + std::to_string(n) +
                              "]: expected -1 (padding) or a token id in [0, " + std::to_string(classes) +
                              "), got " + std::to_string(labels[n]));
    }
  }
}

TemperatureSums sums_of(const MomentsPartial& total, double label_logit) {
  const double mean = total.weighted / total.sum;
  return {std::log(total.sum), mean, label_logit - total.max, total.squared / total.sum - mean * mean};
}

// Derivatives in beta, the sums being those of |beta| and the logits times its sign.
TemperatureDerivatives mean_of(const TemperatureSums& total, double beta, std::int64_t n) {
  const double sign = beta < 0 ? -1 : 1, count = static_cast<double>(n);
  // A row with NaN has the mean NaN for sure, but not P: the exponential may turn a NaN's lower bits into a
  // number.
  const double log_partition = std::isnan(total.mean) ? total.mean : total.log_partition;
  return {(log_partition - std::fabs(beta) * total.target) / count,
          sign * (total.mean - total.target) / count, total.variance / count};
}

}  // namespace

TemperatureDerivatives temperature_nll(const TemperatureNll& args, int threads) {
  require_at_least("n", args.n, 0);
  require_at_least("classes", args.classes, 1);
  require_at_least("threads", threads, 1);
  const std::int64_t bytes = args.n * args.classes * element_bytes(args.dtype);
  const std::int64_t rows = block_rows(args.classes), blocks = (args.n + rows - 1) / rows;
  std::vector<TemperatureSums> partial(static_cast<std::size_t>(blocks));
  parallel_for(blocks, bytes, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t first = block * rows, last = args.n - first < rows ? args.n : first + rows;
      partial[static_cast<std::size_t>(block)] = kernels().temperature_nll(args, first, last);
    }
  });
  TemperatureSums total = {};
  for (const TemperatureSums& sums : partial) accumulate(total, sums);
  // The kernels take a label that does not exist for NaN, so labels need looking at only where there is one.
  if (args.labels && std::isnan(total.target)) require_labels(args.labels, args.n, args.classes);
  return mean_of(total, args.beta, args.n);
}

TemperatureDerivatives linear_temperature_nll(const LinearTemperatureNll& args, int threads) {
  check_logits(args.logits, threads);
  require_labels(args.labels, args.logits.n, args.logits.vocab);
  const std::size_t rows = static_cast<std::size_t>(args.logits.n);
  std::vector<float> label_logits(rows, std::numeric_limits<float>::quiet_NaN());
  std::vector<TemperatureSums> sums(rows);
  Scan scan = {};
  scan.logits = args.logits;
  if (args.beta < 0) scan.logits.scale *= -1;  // a softcap is odd
  scan.token_ids = args.labels;
  scan.n_tokens = 1;
  scan.token_logits = label_logits.data();
  scan.moments = true;
  // For 0 the smallest number, which makes all tokens but those of logit -infinity alike.
  scan.moments_beta = std::max(static_cast<float>(std::fabs(args.beta)), std::numeric_limits<float>::min());
  run_scan({scan, nullptr}, threads, [&](const Scan& group) {
    for_each_row(group, threads, [&](std::int64_t row) {
      const std::size_t n = static_cast<std::size_t>(group.first_row + row);
      sums[n] = sums_of(merged_moments(group, row), label_logits[n]);
    });
  });
  TemperatureSums total = {};
  for (const TemperatureSums& terms : sums) accumulate(total, terms);
  return mean_of(total, args.beta, args.logits.n);
}

}  // namespace pyqe::cpu
