// Rules of dominance, from whole distributions and from their largest probabilities alone.
#include "core/dominant.h"

#include <vector>

#include "check.h"

namespace {

using namespace pyqe;

const double kNan = std::nan("");

DominantRule jump(bool last_cut) { return {DominantKind::kJump, last_cut, .3, .005, 0, 0}; }

DominantRule rule(DominantKind kind, double p, double epsilon = 0, std::int64_t k = 0) {
  return {kind, false, 0, epsilon, p, k};
}

std::int64_t size_of(const DominantRule& dominant, const std::vector<double>& probs, double entropy = 0) {
  const auto count = static_cast<std::int64_t>(probs.size());
  return dominant_size(dominant, probs.data(), count, kNan, entropy, count);
}

}  // namespace

// The vectors of "Sigmoid Head for Quality Estimation under Language Ambiguity" and of the boostedprob
// package.
TEST(dominant_golden_vectors) {
  struct Golden {
    std::vector<double> probs;
    std::int64_t first, last;
  };
  for (const Golden& golden : {
           Golden{{.5, .4, .05, .05}, 2, 2},
           Golden{{.6, .2, .1, .05, .03, .01, .005, .005}, 1, 5},
           Golden{{.9, .05, .02, .01, .01, .01}, 1, 3},
           Golden{{.25, .25, .25, .25}, 0, 0},
           Golden{{.3, .28, .25, .1, .04, .02, .01}, 3, 6},
       }) {
    CHECK(size_of(jump(false), golden.probs) == golden.first);
    CHECK(size_of(jump(true), golden.probs) == golden.last);
  }
}

TEST(dominant_other_rules) {
  const std::vector<double> probs = {.5, .3, .1, .06, .04};
  CHECK(size_of(rule(DominantKind::kNone, 0), probs) == 0);
  CHECK(size_of(rule(DominantKind::kTopK, 0, 0, 2), probs) == 2);
  CHECK(size_of(rule(DominantKind::kTopK, 0, 0, 9), probs) == 5);
  CHECK(size_of(rule(DominantKind::kTopP, .85), probs) == 2);  // the token that crosses .85 is left out
  CHECK(size_of(rule(DominantKind::kTopP, .4), probs) == 0);
  CHECK(size_of(rule(DominantKind::kMinP, .5), probs) == 2);
  CHECK(size_of(rule(DominantKind::kEpsilon, 0, .05), probs) == 4);
  CHECK(size_of(rule(DominantKind::kEta, 0, .09), probs, 0) == 3);            // .09 < sqrt(.09)
  CHECK(size_of(rule(DominantKind::kEta, 0, .09), probs, std::log(6)) == 4);  // sqrt(.09) / 6 = .05
}

// Few candidates: the answer, or -1 where the next token could matter.
TEST(dominant_candidates) {
  const double probs[] = {.5, .4, .05};
  CHECK(dominant_size(jump(true), probs, 2, .05, 0, 100) == 2);
  CHECK(dominant_size(jump(true), probs, 1, .45, 0, 100) == 0);
  CHECK(dominant_size(jump(true), probs, 0, .001, 0, 100) == 0);
  CHECK(dominant_size(rule(DominantKind::kTopP, .99), probs, 3, .04, 0, 100) == -1);
  CHECK(dominant_size(rule(DominantKind::kTopP, .92), probs, 3, .04, 0, 100) == 2);
  CHECK(dominant_size(rule(DominantKind::kMinP, .01), probs, 3, .04, 0, 100) == -1);
  CHECK(dominant_size(rule(DominantKind::kEta, 0, .01), probs, 3, .04, 1, 100) == -1);
}
