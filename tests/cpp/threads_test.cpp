// Calls from several threads at once, each with a team of its own, and what a team does with an exception.
#include <stdexcept>
#include <thread>

#include "check.h"
#include "cpu/parallel.h"
#include "problem.h"
#include "results.h"

namespace {

using namespace pyqe;
using namespace pyqe::test;

constexpr int kCallers = 4;

template <class Body>
void on_callers(const Body& body) {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) callers.emplace_back([&body, caller] { body(caller); });
  for (std::thread& caller : callers) caller.join();
}

template <class AnyProblem>
void check_callers(const std::vector<AnyProblem>& problems) {
  SoftmaxOptions options;
  options.top_k = 3, options.rule = {DominantKind::kJump, true, .3, .005, 0, 0}, options.members = 200;
  for (int threads : {1, 3}) {
    std::vector<SoftmaxResults> softmax(kCallers);
    std::vector<SigmoidResults> sigmoid(kCallers);
    on_callers([&](int caller) {
      const auto at = static_cast<std::size_t>(caller);
      softmax[at] = softmax_stats(problems[at].logits(), options, threads);
      sigmoid[at] = sigmoid_stats(problems[at].logits(), {}, threads);
    });
    for (std::size_t caller = 0; caller < kCallers; ++caller) {
      CHECK(same_bits(softmax_stats(problems[caller].logits(), options, 1), softmax[caller]));
      CHECK(same_bits(sigmoid_stats(problems[caller].logits(), {}, 1), sigmoid[caller]));
    }
  }
}

}  // namespace

// First of all: the callers choose the instruction set together.
TEST(threads_linear) {
  std::vector<Problem<BFloat16>> problems;
  for (unsigned caller = 0; caller < kCallers; ++caller) {
    problems.emplace_back(Shape{40 + caller, 64, 2100}, Transform{true, true, true, 1, 5}, caller);
  }
  check_callers(problems);
}

TEST(threads_existing) {
  std::vector<ExistingProblem<float>> problems;
  for (unsigned caller = 0; caller < kCallers; ++caller) {
    problems.emplace_back(Shape{caller == 0 ? 2 : 70, 0, 20000 >> caller}, caller);  // cut up, and row by row
  }
  check_callers(problems);
}

TEST(threads_token_logits) {
  const std::int64_t n = 300, k = 2, dim = 200, vocab = 40;
  Generator random(1);
  const auto hidden = random_operand<Float16>(random, n, dim),
             weight = random_operand<Float16>(random, vocab, dim);
  const auto grad = random_operand<float>(random, n, k, 1, 0);
  const auto ids = random_ids(random, n * k, vocab);
  std::vector<std::vector<float>> logits(kCallers);
  std::vector<Operand<Float16>> grads(kCallers, Operand<Float16>(n, dim));
  on_callers([&](int caller) {
    const auto at = static_cast<std::size_t>(caller);
    logits[at].assign(ids.size(), kPoison);
    cpu::token_logits_forward({hidden.matrix(), weight.matrix(), nullptr, ids.data(), logits[at].data(), n, k,
                               dim, vocab, DType::kFloat16},
                              1 + caller);
    cpu::token_logits_backward_hidden({grad.elements.data(), weight.matrix(), ids.data(),
                                       grads[at].elements.data(), n, k, dim, vocab, DType::kFloat16},
                                      1 + caller);
  });
  for (std::size_t caller = 1; caller < kCallers; ++caller) {
    CHECK(same_bits(logits[caller], logits[0]));
    CHECK(same_bits(grads[caller].elements, grads[0].elements));
  }
}

TEST(threads_exception_leaves_the_team) {
  constexpr std::int64_t kManyBytes = 1 << 20;
  std::vector<int> seen(100);
  bool caught = false;
  try {
    cpu::parallel_each(100, kManyBytes, 3, [&](std::int64_t item, int) {
      seen[static_cast<std::size_t>(item)] = 1;
      if (item % 10 == 3) throw std::runtime_error("from a thread of the team");
    });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  CHECK(caught);
  CHECK(seen[99] == 1);
}
