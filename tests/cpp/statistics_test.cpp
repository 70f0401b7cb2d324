// Softmax and sigmoid statistics against plain loops in fp64.
#include <algorithm>
#include <functional>

#include "check.h"
#include "cpu/scan_driver.h"
#include "problem.h"
#include "results.h"

namespace {

using namespace pyqe;
using namespace pyqe::test;

// One, few and many rows; dimensions and vocabularies around the widths of vectors, tiles, chunks and
// segments.
constexpr Shape kShapes[] = {{0, 7, 5},    {1, 1, 1},     {3, 64, 17},  {2, 0, 33},     {7, 33, 1025},
                             {35, 31, 97}, {1, 40, 3001}, {18, 65, 40}, {5, 1100, 700}, {33, 130, 64}};
constexpr Shape kExisting[] = {{0, 0, 5}, {1, 0, 1}, {3, 0, 17}, {65, 0, 40}, {2, 0, 3001}, {70, 0, 1025}};

constexpr DominantRule kRules[] = {
    {DominantKind::kNone, false, 0, 0, 0, 0},      {DominantKind::kJump, true, .3, .005, 0, 0},
    {DominantKind::kJump, false, .3, .005, 0, 0},  {DominantKind::kTopK, false, 0, 0, 0, 5},
    {DominantKind::kTopP, false, 0, 0, .9, 0},     {DominantKind::kMinP, false, 0, 0, .1, 0},
    {DominantKind::kEpsilon, false, 0, .01, 0, 0}, {DominantKind::kEta, false, 0, .02, 0, 0}};

std::int64_t members_of(const DominantRule& rule, std::int64_t vocab) {
  std::int64_t bound = vocab;
  if (rule.kind == DominantKind::kNone) bound = 0;
  if (rule.kind == DominantKind::kTopK) bound = rule.k;
  if (rule.kind == DominantKind::kJump || rule.kind == DominantKind::kEpsilon) {
    bound = static_cast<std::int64_t>(1 / rule.epsilon);
  }
  return std::min(bound, vocab);
}

struct Softmax {
  double max, log_sum, entropy = 0, tempered = 0;

  Softmax(const std::vector<double>& logits, double temperature)
      : max(*std::max_element(logits.begin(), logits.end())) {
    double sum = 0, sum_tempered = 0;
    for (double z : logits) sum += std::exp(z - max), sum_tempered += std::exp((z - max) / temperature);
    log_sum = std::log(sum);
    tempered = max / temperature + std::log(sum_tempered);
    for (double z : logits) entropy += std::exp(z - max - log_sum) * (max + log_sum - z);
  }
};

// `logits` and `ids` of `count` tokens: the largest in order, no token twice.
void check_largest(const Row& row, const std::vector<double>& sorted, const float* logits,
                   const std::int64_t* ids, std::int64_t count) {
  std::vector<std::int64_t> seen(ids, ids + count);
  std::sort(seen.begin(), seen.end());
  CHECK(std::adjacent_find(seen.begin(), seen.end()) == seen.end());
  for (std::int64_t i = 0; i < count; ++i) {
    CHECK(ids[i] >= 0 && ids[i] < static_cast<std::int64_t>(row.logits.size()));
    const double own = row.logits[static_cast<std::size_t>(ids[i])];
    CHECK_CLOSE(own, sorted[static_cast<std::size_t>(i)], 2 * row.tolerance);
    if (logits) CHECK_CLOSE(logits[i], own, row.tolerance);
  }
}

void check_tokens(const Row& row, const float* logits, const std::int64_t* ids, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const double expected = ids[i] < 0 ? std::nan("") : row.logits[static_cast<std::size_t>(ids[i])];
    CHECK_CLOSE(logits[i], expected, row.tolerance);
  }
}

template <class AnyProblem>
void check_softmax(const AnyProblem& problem, const DominantRule& rule, std::int64_t top_k, int threads) {
  const Shape& shape = problem.shape;
  Generator random(7);
  SoftmaxOptions options;
  options.n_tokens = 2, options.token_ids = random_ids(random, shape.n * 2, shape.vocab);
  options.top_k = std::min(top_k, shape.vocab);
  options.rule = rule, options.members = members_of(rule, shape.vocab);
  const SoftmaxResults got = softmax_stats(problem.logits(), options, threads);
  for (std::int64_t n = 0; n < shape.n; ++n) {
    const auto at = static_cast<std::size_t>(n);
    const Row row = problem.row(n);
    const Softmax expected(row.logits, options.temperature);
    const double tolerance =
        2 * row.tolerance + 4 * kFloatEps * (1 + std::fabs(expected.max) + expected.log_sum);
    CHECK_CLOSE(got.max_logit[at], expected.max, row.tolerance);
    CHECK_CLOSE(got.max_logprob[at], -expected.log_sum, tolerance);
    CHECK_CLOSE(got.entropy[at], expected.entropy, tolerance * (4 + expected.entropy));
    CHECK_CLOSE(got.tempered[at], expected.tempered, tolerance);
    CHECK_CLOSE(row.logits[static_cast<std::size_t>(got.argmax[at])], expected.max, 2 * row.tolerance);
    check_tokens(row, &got.token_logits[2 * at], &options.token_ids[2 * at], 2);

    std::vector<double> sorted = row.logits, probs;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    check_largest(row, sorted, got.topk_logits.data() + n * options.top_k,
                  got.topk_ids.data() + n * options.top_k, options.top_k);
    if (rule.kind == DominantKind::kNone || got.size[at] == -1) continue;  // -1: left to the caller
    for (double z : sorted) probs.push_back(std::exp(z - expected.max - expected.log_sum));
    const std::int64_t size =
        std::min(options.members,
                 dominant_size(rule, probs.data(), shape.vocab, std::nan(""), expected.entropy, shape.vocab));
    CHECK(got.size[at] == size);
    const std::int64_t* ids = got.dominant_ids.data() + n * options.members;
    check_largest(row, sorted, nullptr, ids, size);
    CHECK(std::all_of(ids + size, ids + options.members, [](std::int64_t id) { return id == -1; }));
    double mass = 0;
    for (std::int64_t i = 0; i < size; ++i) mass += probs[static_cast<std::size_t>(i)];
    CHECK_CLOSE(got.mass[at], mass, tolerance);
  }
}

template <class AnyProblem>
void check_sigmoid(const AnyProblem& problem, std::int64_t top_k, int threads) {
  const Shape& shape = problem.shape;
  Generator random(8);
  SigmoidOptions options;
  options.n_tokens = 3, options.token_ids = random_ids(random, shape.n * 3, shape.vocab);
  options.top_k = std::min(top_k, shape.vocab);
  const SigmoidResults got = sigmoid_stats(problem.logits(), options, threads);
  for (std::int64_t n = 0; n < shape.n; ++n) {
    const auto at = static_cast<std::size_t>(n);
    const Row row = problem.row(n);
    std::vector<double> sorted = row.logits;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    double sum = 0;
    std::int64_t surely = 0, possibly = 0;
    for (double z : row.logits) {
      sum += 1 / (1 + std::exp(-z));
      surely += z > options.threshold + row.tolerance;
      possibly += z > options.threshold - row.tolerance;
    }
    CHECK_CLOSE(got.max_logit[at], sorted[0], row.tolerance);
    CHECK_CLOSE(got.sum_prob[at], sum, (row.tolerance + 8 * kFloatEps) * sum);
    CHECK_CLOSE(row.logits[static_cast<std::size_t>(got.argmax[at])], sorted[0], 2 * row.tolerance);
    CHECK(got.count_above[at] >= surely && got.count_above[at] <= possibly);
    check_tokens(row, &got.token_logits[3 * at], &options.token_ids[3 * at], 3);
    check_largest(row, sorted, got.topk_logits.data() + n * options.top_k,
                  got.topk_ids.data() + n * options.top_k, options.top_k);
  }
}

template <class T>
void check_all_shapes() {
  unsigned turn = 0;
  for (const Shape& shape : kShapes) {
    Transform transform;
    transform.bias = turn % 2, transform.row_shift = turn % 3 == 1, transform.row_scale = turn % 4 == 2;
    transform.scale = turn % 5 ? 1.0f : 0.5f;
    transform.softcap = turn % 3 == 2 ? 2.5f : 0;
    const Problem<T> problem(shape, transform, ++turn);
    check_softmax(problem, kRules[turn % 8], 4, 1 + turn % 3);
    check_sigmoid(problem, 3, 1 + turn % 3);
  }
  for (const Shape& shape : kExisting) {
    const ExistingProblem<T> problem(shape, ++turn);
    for (const DominantRule& rule : kRules) check_softmax(problem, rule, turn % 4, 1 + turn % 3);
    check_sigmoid(problem, 300, 3);
  }
}

const SoftmaxOptions kTop5 = [] {
  SoftmaxOptions options;
  options.top_k = 5, options.rule = kRules[1], options.members = 200;
  return options;
}();

cpu::Logits row_of(cpu::Logits logits, std::int64_t n) {
  const std::int64_t bytes = cpu::element_bytes(logits.dtype);
  const auto advance = [&](cpu::Matrix& matrix) {
    if (matrix.data) matrix.data = static_cast<const char*>(matrix.data) + n * matrix.stride * bytes;
  };
  advance(logits.logits), advance(logits.hidden);
  if (logits.row_scale) logits.row_scale += n;
  if (logits.row_shift) logits.row_shift += n;
  logits.n = 1;
  return logits;
}

void check_same_row(const SoftmaxResults& a, std::size_t i, const SoftmaxResults& b, std::size_t j) {
  CHECK(same_bits(&a.max_logit[i], &b.max_logit[j], 1) && same_bits(&a.max_logprob[i], &b.max_logprob[j], 1));
  CHECK(same_bits(&a.entropy[i], &b.entropy[j], 1) && same_bits(&a.tempered[i], &b.tempered[j], 1));
  CHECK(a.argmax[i] == b.argmax[j] && a.size[i] == b.size[j] && same_bits(&a.mass[i], &b.mass[j], 1));
  CHECK(same_bits(&a.topk_logits[5 * i], &b.topk_logits[5 * j], 5));
  CHECK(same_bits(&a.topk_ids[5 * i], &b.topk_ids[5 * j], 5));
}

// A row gives the same bits alone and among others, on any number of threads.
template <class AnyProblem>
void check_same_bits(const AnyProblem& problem) {
  const cpu::Logits logits = problem.logits();
  const SigmoidOptions sigmoid_options = {{}, 0, 5, 0.5f};
  const SoftmaxResults softmax = softmax_stats(logits, kTop5, 1);
  const SigmoidResults sigmoid = sigmoid_stats(logits, sigmoid_options, 1);
  for (int threads : {2, 3}) {
    CHECK(same_bits(softmax_stats(logits, kTop5, threads), softmax));
    CHECK(same_bits(sigmoid_stats(logits, sigmoid_options, threads), sigmoid));
  }
  for (std::int64_t n : {std::int64_t{0}, logits.n / 2, logits.n - 1}) {
    check_same_row(softmax_stats(row_of(logits, n), kTop5, 1), 0, softmax, static_cast<std::size_t>(n));
    const SigmoidResults alone = sigmoid_stats(row_of(logits, n), sigmoid_options, 1);
    CHECK(same_bits(&alone.sum_prob[0], &sigmoid.sum_prob[static_cast<std::size_t>(n)], 1));
  }
}

// Rows 1, 2 and 3 have no distribution.
void check_bad_rows(const cpu::Logits& clean, const cpu::Logits& bad) {
  const SoftmaxResults expected = softmax_stats(clean, kTop5, 1), got = softmax_stats(bad, kTop5, 1);
  for (std::size_t n = 0; n < static_cast<std::size_t>(clean.n); ++n) {
    if (n == 0 || n > 3) {
      check_same_row(got, n, expected, n);
      continue;
    }
    CHECK(std::isnan(got.max_logit[n]) && std::isnan(got.max_logprob[n]) && std::isnan(got.entropy[n]));
    CHECK(std::isnan(got.tempered[n]) && std::isnan(got.mass[n]) && got.argmax[n] == -1 && got.size[n] == 0);
    CHECK(got.topk_ids[5 * n] == -1 && std::isnan(got.topk_logits[5 * n]));
  }
  const SigmoidResults sigmoid = sigmoid_stats(bad, {{}, 0, 5, 0.5f}, 1);
  CHECK(std::isnan(sigmoid.max_logit[1]) && std::isnan(sigmoid.sum_prob[1]) && sigmoid.argmax[1] == -1);
  CHECK(sigmoid.count_above[1] == -1 && sigmoid.topk_ids[5] == -1);
}

template <class T>
void check_bad_hidden_states() {
  const Shape shape = {9, 33, 1500};
  const Problem<T> clean(shape, {}, 3);
  Problem<T> bad = clean;
  bad.hidden(1, 32) = narrowed<T>(std::nan(""));
  bad.hidden(2, 0) = narrowed<T>(static_cast<double>(INFINITY));
  bad.hidden(3, 5) = narrowed<T>(-static_cast<double>(INFINITY));
  check_bad_rows(clean.logits(), bad.logits());
}

}  // namespace

TEST(statistics_fp32) { check_all_shapes<float>(); }
TEST(statistics_bf16) { check_all_shapes<BFloat16>(); }
TEST(statistics_fp16) { check_all_shapes<Float16>(); }

TEST(statistics_same_bits_for_any_batch_and_threads) {
  const Shape few = {35, 64, 2100}, wide = {70, 0, 2500};
  const Transform transform = {true, true, true, 1.5f, 0};
  check_same_bits(Problem<float>(few, transform, 1));
  check_same_bits(Problem<BFloat16>(few, transform, 2));
  check_same_bits(Problem<Float16>(few, transform, 3));
  check_same_bits(ExistingProblem<float>(wide, 4));
  check_same_bits(ExistingProblem<BFloat16>(wide, 5));
}

TEST(statistics_of_bad_rows) {
  check_bad_hidden_states<float>();
  check_bad_hidden_states<BFloat16>();
  check_bad_hidden_states<Float16>();
  const ExistingProblem<float> clean({6, 0, 1100}, 6);
  ExistingProblem<float> bad = clean;
  bad.operand(1, 1099) = std::nanf("");
  bad.operand(2, 3) = INFINITY;
  for (std::int64_t v = 0; v < 1100; ++v) bad.operand(3, v) = -INFINITY;
  check_bad_rows(clean.logits(), bad.logits());
}

TEST(statistics_of_extreme_logits) {
  ExistingProblem<float> problem({3, 0, 40}, 7);
  for (std::int64_t v = 0; v < 40; ++v) {
    problem.operand(0, v) = v == 39 ? 1e4f : -1e4f;
    problem.operand(1, v) = v < 20 ? -INFINITY : -3e38f;
    problem.operand(2, v) = v ? -INFINITY : 0;
  }
  const SoftmaxResults got = softmax_stats(problem.logits(), kTop5, 1);
  CHECK(got.argmax[0] == 39 && got.argmax[1] == 20 && got.argmax[2] == 0);
  CHECK_CLOSE(got.entropy[0], 0, 0);
  CHECK_CLOSE(got.entropy[1], std::log(20), 1e-6);
  CHECK_CLOSE(got.max_logprob[2], 0, 0);
  CHECK(got.size[2] == 1);
  CHECK_CLOSE(got.mass[2], 1, 0);
}

TEST(statistics_copied_logits) {
  const Problem<BFloat16> problem({19, 45, 1300}, {true, false, false, 1, 3}, 8);
  std::vector<float> copy(19 * 1300, kPoison);
  cpu::copy_logits(problem.logits(), copy.data(), 2);
  for (std::int64_t n = 0; n < 19; ++n) {
    const Row row = problem.row(n);
    for (std::size_t v = 0; v < 1300; ++v) {
      CHECK_CLOSE(copy[static_cast<std::size_t>(n) * 1300 + v], row.logits[v], row.tolerance);
    }
  }
}

// The first stage of a draw from softmax(z / 2).
TEST(statistics_tile_sums) {
  const Problem<float> problem({5, 20, 1800}, {}, 9);
  const std::int64_t tiles = (1800 + cpu::kTile - 1) / cpu::kTile;
  std::vector<TileSum> sums(static_cast<std::size_t>(5 * tiles));
  cpu::Scan scan = {};
  scan.logits = problem.logits();
  scan.tile_beta = 0.5f;
  scan.tile_sums = sums.data();
  cpu::run_scan({scan, nullptr}, 3, [](const cpu::Scan&) {});
  for (std::int64_t n = 0; n < 5; ++n) {
    const Row row = problem.row(n);
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const TileSum& got = sums[static_cast<std::size_t>(n * tiles + tile)];
      double sum = 0;
      for (std::int64_t v = tile * cpu::kTile; v < std::min<std::int64_t>(1800, (tile + 1) * cpu::kTile);
           ++v) {
        sum += std::exp(row.logits[static_cast<std::size_t>(v)] / 2);
      }
      CHECK_CLOSE(std::log(static_cast<double>(got.sum)) + got.max / 2.0, std::log(sum), 2 * row.tolerance);
    }
  }
}
