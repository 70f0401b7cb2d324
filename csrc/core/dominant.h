// Which of the most probable tokens are dominant; see pyqe/dominant.py for the rules and their sources.
#pragma once

#include <cstdint>

namespace pyqe {

enum class DominantKind : int {
  kNone = 0,
  kJump = 1,
  kTopK = 2,
  kTopP = 3,
  kMinP = 4,
  kEpsilon = 5,
  kEta = 6
};

struct DominantRule {
  DominantKind kind;
  bool last_cut;  // jump
  double ratio, epsilon, p;
  std::int64_t k;
};

// The number of dominant tokens of a row, given the `count` largest of its `vocab` probabilities in
// descending order, or -1 where those do not suffice to tell. `next` is the largest probability beyond them,
// NaN if that is unknown.
std::int64_t dominant_size(const DominantRule& rule, const double* probs, std::int64_t count, double next,
                           double entropy, std::int64_t vocab);

}  // namespace pyqe
