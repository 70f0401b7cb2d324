// Negatives: what must never be drawn, how often the rest is, and the same draws on any number of threads.
#include "cpu/sampling.h"

#include <algorithm>
#include <functional>

#include "check.h"
#include "problem.h"

namespace {

using namespace pyqe;
using namespace pyqe::test;

constexpr DominantRule kJump = {DominantKind::kJump, true, .3, .005, 0, 0};
constexpr Source kSources[] = {{1, 0, 0, 4}, {0, 1, 0, 3}, {.5, .2, .3, 2}};  // softmax, unigram, a mixture
constexpr std::int64_t kWidth = 9;

struct Negatives {
  std::vector<std::int64_t> ids, undecided;
};

Negatives sample(const cpu::Logits& logits, const std::vector<std::int64_t>& targets,
                 const std::vector<float>& factor, const std::vector<float>& counts, int threads) {
  const auto n = static_cast<std::size_t>(logits.n);
  Negatives to = {std::vector<std::int64_t>(n * kWidth, -7), std::vector<std::int64_t>(n, -7)};
  cpu::SampleNegatives args = {};
  args.logits = logits;
  args.targets = targets.data();
  args.exclude = kJump, args.members = std::min<std::int64_t>(200, logits.vocab);
  args.sources = kSources, args.n_sources = 3;
  args.beta = 0.5f;
  args.factor = factor.empty() ? nullptr : factor.data();
  args.counts = counts.data();
  args.seed = 11;
  args.ids = to.ids.data(), args.undecided = to.undecided.data();
  cpu::sample_negatives(args, threads);
  return to;
}

template <class AnyProblem>
void check_negatives(const AnyProblem& problem, bool with_factor) {
  const Shape& shape = problem.shape;
  Generator random(5);
  std::uniform_real_distribution<float> positive(0.5f, 2);
  std::vector<float> factor(static_cast<std::size_t>(with_factor ? shape.vocab : 0));
  std::vector<float> counts(static_cast<std::size_t>(shape.vocab));
  for (auto* values : {&factor, &counts})
    std::generate(values->begin(), values->end(), [&] { return positive(random); });
  const std::vector<std::int64_t> targets = random_ids(random, shape.n, shape.vocab);
  const Negatives got = sample(problem.logits(), targets, factor, counts, 1);
  CHECK(same_bits(got.ids, sample(problem.logits(), targets, factor, counts, 3).ids));
  for (std::int64_t n = 0; n < shape.n; ++n) {
    std::vector<double> probs = problem.row(n).logits;
    const double max = *std::max_element(probs.begin(), probs.end());
    double sum = 0;
    for (double& p : probs) sum += p = std::exp(p - max);
    for (double& p : probs) p /= sum;
    std::vector<double> sorted = probs;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    const std::int64_t dominant =
        dominant_size(kJump, sorted.data(), shape.vocab, std::nan(""), 0, shape.vocab);
    const double least = dominant ? sorted[static_cast<std::size_t>(dominant - 1)] : 2;
    CHECK(got.undecided[static_cast<std::size_t>(n)] == 0);
    std::vector<std::int64_t> drawn;
    for (std::int64_t k = 0; k < kWidth; ++k) {
      const std::int64_t id = got.ids[static_cast<std::size_t>(n * kWidth + k)];
      if (id == -1) continue;
      CHECK(id >= 0 && id < shape.vocab && id != targets[static_cast<std::size_t>(n)]);
      CHECK(probs[static_cast<std::size_t>(id)] < least * (1 - 1e-4));
      CHECK(std::find(drawn.begin(), drawn.end(), id) == drawn.end());
      drawn.push_back(id);
    }
    const std::int64_t left = shape.vocab - dominant - 1;
    CHECK(static_cast<std::int64_t>(drawn.size()) >= std::min<std::int64_t>(4, left));
  }
}

template <class T>
void check_all_shapes() {
  unsigned turn = 0;
  for (const Shape& shape : {Shape{0, 7, 5}, Shape{1, 1, 1}, Shape{3, 64, 17}, Shape{7, 33, 1025},
                             Shape{35, 31, 300}, Shape{140, 20, 257}, Shape{5, 1100, 700}}) {
    const Transform transform = {turn % 2 == 0, turn % 3 == 0, false, 1, turn % 3 ? 0 : 3.0f};
    ++turn;
    check_negatives(Problem<T>(shape, transform, turn), turn % 2 == 0);
  }
  for (const Shape& shape : {Shape{1, 0, 1}, Shape{70, 0, 513}, Shape{2, 0, 3001}}) {
    ++turn;
    check_negatives(ExistingProblem<T>(shape, turn), turn % 2 == 0);
  }
}

}  // namespace

TEST(sampling_fp32) { check_all_shapes<float>(); }
TEST(sampling_bf16) { check_all_shapes<BFloat16>(); }
TEST(sampling_fp16) { check_all_shapes<Float16>(); }

// The first draw of each row, from softmax(z / 2) without the target: chi-square with 18 degrees of freedom,
// of which 99.99 % are below 47.
TEST(sampling_frequencies) {
  const std::int64_t n = 4000, vocab = 20;
  const ExistingProblem<float> one({1, 0, vocab}, 3);
  cpu::Logits logits = one.logits();
  logits.logits.stride = 0, logits.n = n;
  const std::vector<std::int64_t> targets(static_cast<std::size_t>(n), 6);
  std::vector<std::int64_t> ids(static_cast<std::size_t>(n)), undecided(static_cast<std::size_t>(n));
  const Source source = {1, 0, 0, 1};
  cpu::SampleNegatives args = {};
  args.logits = logits;
  args.targets = targets.data();
  args.sources = &source, args.n_sources = 1;
  args.beta = 0.5f, args.seed = 1;
  args.ids = ids.data(), args.undecided = undecided.data();
  cpu::sample_negatives(args, 2);
  std::vector<double> weights = one.row(0).logits;
  double sum = 0;
  for (double& w : weights) w = std::exp(w / 2);
  weights[6] = 0;
  for (double w : weights) sum += w;
  double chi_square = 0;
  for (std::int64_t v = 0; v < vocab; ++v) {
    const double expected = static_cast<double>(n) * weights[static_cast<std::size_t>(v)] / sum;
    const double seen = static_cast<double>(std::count(ids.begin(), ids.end(), v));
    if (v == 6) CHECK(seen == 0);
    if (v != 6) chi_square += (seen - expected) * (seen - expected) / expected;
  }
  CHECK(chi_square < 47);
}
