// The NLL of softmax(beta z) and its derivatives against plain loops in fp64.
#include "cpu/temperature.h"

#include <algorithm>

#include "check.h"
#include "problem.h"

namespace {

using namespace pyqe;
using namespace pyqe::test;

template <class T>
void check_temperature(std::int64_t n, std::int64_t classes, double beta, bool soft) {
  Generator random(static_cast<unsigned>(classes));
  const auto logits = random_operand<T>(random, n, classes, 2);
  auto soft_labels = random_operand<float>(random, n, classes);
  for (float& label : soft_labels.elements) label = std::fabs(label) / static_cast<float>(classes);
  std::uniform_int_distribution<std::int64_t> uniform(0, classes - 1);
  std::vector<std::int64_t> labels(static_cast<std::size_t>(n));
  for (std::int64_t& label : labels) label = uniform(random);

  cpu::TemperatureNll args = {};
  args.logits = logits.matrix();
  if (soft) args.soft_labels = soft_labels.matrix();
  if (!soft) args.labels = labels.data();
  args.n = n, args.classes = classes, args.beta = beta, args.dtype = dtype_of<T>();
  const cpu::TemperatureDerivatives got = cpu::temperature_nll(args, 1),
                                    again = cpu::temperature_nll(args, 3);
  CHECK(got.nll == again.nll && got.first == again.first && got.second == again.second);

  double nll = 0, first = 0, second = 0;
  for (std::int64_t row = 0; row < n; ++row) {
    double largest = -INFINITY, partition = 0, mean = 0, square = 0, target = 0;
    for (std::int64_t c = 0; c < classes; ++c) largest = std::fmax(largest, beta * logits.at(row, c));
    for (std::int64_t c = 0; c < classes; ++c) {
      const double z = logits.at(row, c), p = std::exp(beta * z - largest);
      partition += p, mean += p * z, square += p * z * z;
      if (soft) target += soft_labels.at(row, c) * (z - largest / beta);
    }
    if (!soft) target = logits.at(row, labels[static_cast<std::size_t>(row)]) - largest / beta;
    mean /= partition, square /= partition;
    nll += std::log(partition) - beta * target;
    first += mean - largest / beta - target;
    second += square - mean * mean;
  }
  const double count = static_cast<double>(n), tolerance = 1e-5;
  CHECK_CLOSE(got.nll, nll / count, tolerance);
  CHECK_CLOSE(got.first, first / count, tolerance);
  CHECK_CLOSE(got.second, second / count, tolerance);
}

template <class T>
void check_all_shapes() {
  for (std::int64_t classes : {1, 2, 4, 7, 15, 16, 17, 33, 1000, 9001}) {
    for (const bool soft : {false, true}) {
      check_temperature<T>(19, classes, 0.7, soft);
      check_temperature<T>(200, std::min<std::int64_t>(classes, 1000), -0.3, soft);
    }
  }
}

// Logits that are computed, more rows than are scanned at a time among them.
template <class T>
void check_linear(const Shape& shape, const Transform& transform, double beta) {
  const Problem<T> problem(shape, transform, 5);
  std::vector<std::int64_t> labels;
  for (std::int64_t row = 0; row < shape.n; ++row) labels.push_back(row * 31 % shape.vocab);
  const cpu::LinearTemperatureNll args = {problem.logits(), labels.data(), beta};
  const cpu::TemperatureDerivatives got = cpu::linear_temperature_nll(args, 1),
                                    again = cpu::linear_temperature_nll(args, 3);
  CHECK(got.nll == again.nll && got.first == again.first && got.second == again.second);

  double nll = 0, first = 0, second = 0;
  for (std::int64_t n = 0; n < shape.n; ++n) {
    const std::vector<double> logits = problem.row(n).logits;
    double largest = -INFINITY, partition = 0, mean = 0, variance = 0;
    for (double z : logits) largest = std::fmax(largest, beta * z);
    for (double z : logits) partition += std::exp(beta * z - largest);
    for (double z : logits) mean += std::exp(beta * z - largest) / partition * z;
    for (double z : logits) variance += std::exp(beta * z - largest) / partition * (z - mean) * (z - mean);
    const double target = logits[static_cast<std::size_t>(labels[static_cast<std::size_t>(n)])];
    nll += std::log(partition) + largest - beta * target, first += mean - target, second += variance;
  }
  const double count = static_cast<double>(shape.n), tolerance = 1e-4;
  CHECK_CLOSE(got.nll, nll / count, tolerance);
  CHECK_CLOSE(got.first, first / count, tolerance);
  CHECK_CLOSE(got.second, second / count, tolerance);
}

template <class T>
void check_all_heads() {
  Transform scaled;
  scaled.bias = true, scaled.scale = .5f;
  Transform capped = scaled;
  capped.softcap = 3;
  for (const Transform& transform : {Transform(), scaled, capped}) {
    for (const double beta : {.3, 1., 4., -1., 0.}) {
      check_linear<T>({7, 33, 1025}, transform, beta);
      check_linear<T>({1, 1, 1}, transform, beta);
    }
    check_linear<T>({1030, 8, 40}, transform, .7);
    check_linear<T>({3, 40, 3001}, transform, .7);
  }
}

}  // namespace

TEST(linear_temperature_fp32) { check_all_heads<float>(); }
TEST(linear_temperature_bf16) { check_all_heads<BFloat16>(); }
TEST(linear_temperature_fp16) { check_all_heads<Float16>(); }
TEST(temperature_fp32) { check_all_shapes<float>(); }
TEST(temperature_bf16) { check_all_shapes<BFloat16>(); }
TEST(temperature_fp16) { check_all_shapes<Float16>(); }
