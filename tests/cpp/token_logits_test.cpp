// Token logits and their gradients against plain loops in fp64.
#include <algorithm>
#include <numeric>

#include "check.h"
#include "cpu/operations.h"
#include "operands.h"

namespace {

using namespace pyqe;
using namespace pyqe::test;

constexpr std::int64_t kDims[] = {0, 1, 7, 8, 15, 16, 31, 32, 33, 63, 65, 127, 129, 577};
constexpr std::int64_t kVocab = 29;

// Four roundings of fp32 of every term, and one of the sum to its dtype.
template <class T>
double allowed(double expected, double magnitude) {
  return 4 * kFloatEps * magnitude + rounding_of<T>(expected);
}

template <class T>
void forward(std::int64_t n, std::int64_t k, std::int64_t dim, int threads) {
  Generator random(static_cast<unsigned>(dim));
  const auto hidden = random_operand<T>(random, n, dim), weight = random_operand<T>(random, kVocab, dim);
  const auto bias = random_operand<T>(random, 1, kVocab);
  const auto ids = random_ids(random, n * k, kVocab);
  std::vector<float> logits(ids.size(), kPoison);
  cpu::token_logits_forward({hidden.matrix(), weight.matrix(), bias.elements.data(), ids.data(),
                             logits.data(), n, k, dim, kVocab, dtype_of<T>()},
                            threads);
  for (std::size_t pair = 0; pair < ids.size(); ++pair) {
    if (ids[pair] < 0) {
      CHECK(std::isnan(logits[pair]));
      continue;
    }
    double sum = bias.at(0, ids[pair]), magnitude = std::fabs(sum);
    for (std::int64_t d = 0; d < dim; ++d) {
      const double term = hidden.at(static_cast<std::int64_t>(pair) / k, d) * weight.at(ids[pair], d);
      sum += term, magnitude += std::fabs(term);
    }
    CHECK_CLOSE(logits[pair], sum, allowed<float>(sum, magnitude));
  }
}

template <class T>
void backward_hidden(std::int64_t n, std::int64_t k, std::int64_t dim, int threads) {
  Generator random(static_cast<unsigned>(dim));
  const auto weight = random_operand<T>(random, kVocab, dim);
  auto grad = random_operand<float>(random, n, k, 1, 0);
  const auto ids = random_ids(random, n * k, kVocab);
  for (std::size_t pair = 0; pair < ids.size(); ++pair) {
    if (ids[pair] < 0) grad.elements[pair] = std::nanf("");  // must not be looked at
  }
  Operand<T> result(n, dim);
  cpu::token_logits_backward_hidden({grad.elements.data(), weight.matrix(), ids.data(),
                                     result.elements.data(), n, k, dim, kVocab, dtype_of<T>()},
                                    threads);
  for (std::int64_t row = 0; row < n; ++row) {
    for (std::int64_t d = 0; d < dim; ++d) {
      double sum = 0, magnitude = 0;
      for (std::int64_t i = 0; i < k; ++i) {
        const std::int64_t id = ids[static_cast<std::size_t>(row * k + i)];
        const double term = id < 0 ? 0 : grad.at(row, i) * weight.at(id, d);
        sum += term, magnitude += std::fabs(term);
      }
      CHECK_CLOSE(result.at(row, d), sum, allowed<T>(sum, magnitude));
    }
  }
}

template <class T>
void backward_weight(std::int64_t n, std::int64_t k, std::int64_t dim, bool dense, int threads) {
  Generator random(static_cast<unsigned>(dim));
  const auto hidden = random_operand<T>(random, n, dim);
  const auto grad = random_operand<float>(random, n, k, 1, 0);
  const auto ids = random_ids(random, n * k, kVocab);
  std::vector<std::int64_t> pairs(ids.size()), starts, tokens;
  std::iota(pairs.begin(), pairs.end(), 0);
  const auto id_of = [&](std::int64_t pair) { return ids[static_cast<std::size_t>(pair)]; };
  pairs.erase(std::remove_if(pairs.begin(), pairs.end(), [&](std::int64_t p) { return id_of(p) < 0; }),
              pairs.end());
  std::stable_sort(pairs.begin(), pairs.end(), [&](auto a, auto b) { return id_of(a) < id_of(b); });
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    if (i && id_of(pairs[i]) == tokens.back()) continue;
    tokens.push_back(id_of(pairs[i]));
    starts.push_back(static_cast<std::int64_t>(i));
  }
  starts.push_back(static_cast<std::int64_t>(pairs.size()));
  const auto rows = static_cast<std::int64_t>(tokens.size());
  Operand<T> result(dense ? kVocab : rows, dim, 2);
  cpu::token_logits_backward_weight(
      {grad.elements.data(), hidden.matrix(), pairs.data(), starts.data(), dense ? tokens.data() : nullptr,
       result.elements.data(), result.stride, rows, k, dim, dtype_of<T>()},
      threads);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t token = tokens[static_cast<std::size_t>(row)];
    for (std::int64_t d = 0; d < dim; ++d) {
      double sum = 0, magnitude = 0;
      for (std::int64_t pair = 0; pair < n * k; ++pair) {
        if (id_of(pair) != token) continue;
        const double term = grad.at(pair / k, pair % k) * hidden.at(pair / k, d);
        sum += term, magnitude += std::fabs(term);
      }
      CHECK_CLOSE(result.at(dense ? token : row, d), sum, allowed<T>(sum, magnitude));
    }
  }
}

template <class T>
void all_shapes() {
  for (std::int64_t dim : kDims) {
    for (std::int64_t n : {0, 1, 9}) {
      for (std::int64_t k : {1, 4}) {
        forward<T>(n, k, dim, 1);
        backward_hidden<T>(n, k, dim, 1);
        backward_weight<T>(n, k, dim, k == 4, 1);
      }
    }
  }
  forward<T>(200, 3, 577, 3);
  backward_hidden<T>(200, 3, 577, 3);
  backward_weight<T>(200, 3, 577, true, 3);
}

}  // namespace

TEST(token_logits_fp32) { all_shapes<float>(); }
TEST(token_logits_bf16) { all_shapes<BFloat16>(); }
TEST(token_logits_fp16) { all_shapes<Float16>(); }

TEST(inverse_softmax_of_any_width) {
  Generator random(1);
  for (std::int64_t classes : {0, 1, 2, 5, 15, 16, 31, 32, 33, 100, 1025}) {
    for (const auto center : {cpu::Center::kNone, cpu::Center::kMean, cpu::Center::kLogSumExp}) {
      auto probs = random_operand<float>(random, 7, classes);
      for (float& p : probs.elements) p = std::fabs(p);
      if (classes) probs(2, classes - 1) = -1;
      Operand<float> logits(7, classes);
      cpu::inverse_softmax(
          {probs.matrix(), logits.elements.data(), 7, classes, 1e-6, center, DType::kFloat32}, 2);
      for (std::int64_t row = 0; row < 7; ++row) {
        double logs = 0, sum = 0;
        for (std::int64_t c = 0; c < classes; ++c) {
          const double p = std::max(probs.at(row, c), 1e-6);
          logs += std::log(p), sum += p;
        }
        const double mean = logs / static_cast<double>(classes);
        const double centre =
            center == cpu::Center::kNone ? 0 : (center == cpu::Center::kMean ? mean : std::log(sum));
        for (std::int64_t c = 0; c < classes; ++c) {
          const double z = std::log(std::max(probs.at(row, c), 1e-6));
          const double tolerance = 4 * kFloatEps * (1 + std::fabs(z) + std::fabs(centre));
          CHECK_CLOSE(logits.at(row, c), row == 2 ? std::nan("") : z - centre, tolerance);
        }
      }
    }
  }
}
