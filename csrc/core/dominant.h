// Which of the most probable tokens are dominant; see pyqe/dominant.py for the rules and their sources.
//
// Shared by the CPU's code and CUDA kernels, as in partials.h.
#pragma once

#include <cfloat>
#include <cstdint>

#include "core/host_device.h"

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

static PYQE_HOST_DEVICE inline std::int64_t jump_size(const DominantRule& rule, const double* probs,
                                                      std::int64_t count, double next) {
  // A drop of .01 - .005 must not exceed .005 by the rounding of fp32 probabilities.
  constexpr double kRounding = 16 * FLT_EPSILON;
  std::int64_t size = 0;
  for (std::int64_t i = 0; i < count && probs[i] > rule.epsilon; ++i) {
    const double following = i + 1 < count ? probs[i + 1] : next;
    if (__builtin_isnan(following)) break;  // the last token of the vocabulary: no drop after it
    const double drop = probs[i] - following - kRounding * probs[i];
    if (drop > rule.ratio * probs[i] && drop > rule.epsilon) {
      size = i + 1;
      if (!rule.last_cut) break;
    }
  }
  return size;
}

template <class Keep>
static PYQE_HOST_DEVICE inline std::int64_t prefix_size(std::int64_t count, const Keep& keep) {
  std::int64_t size = 0;
  while (size < count && keep(size)) ++size;
  return size;
}

// The number of dominant tokens of a row, given the `count` largest of its `vocab` probabilities in
// descending order, or -1 where those do not suffice to tell. `next` is the largest probability beyond them,
// NaN if that is unknown.
static PYQE_HOST_DEVICE inline std::int64_t dominant_size(const DominantRule& rule, const double* probs,
                                                          std::int64_t count, double next, double entropy,
                                                          std::int64_t vocab) {
  std::int64_t size = 0;
  double cumulative = 0;
  switch (rule.kind) {
    case DominantKind::kNone:
      return 0;
    case DominantKind::kJump:
      return jump_size(rule, probs, count, next);
    case DominantKind::kTopK:
      return count < rule.k ? count : rule.k;
    case DominantKind::kEpsilon:
      return prefix_size(count, [&](std::int64_t i) { return probs[i] > rule.epsilon; });
    case DominantKind::kTopP:
      size = prefix_size(count, [&](std::int64_t i) { return (cumulative += probs[i]) < rule.p; });
      break;
    case DominantKind::kMinP:
      size = prefix_size(count, [&](std::int64_t i) { return probs[i] > rule.p * probs[0]; });
      break;
    case DominantKind::kEta: {
      const double bound =
          __builtin_fmin(rule.epsilon, __builtin_sqrt(rule.epsilon) * __builtin_exp(-entropy));
      size = prefix_size(count, [&](std::int64_t i) { return probs[i] > bound; });
      break;
    }
  }
  return size == count && count < vocab ? -1 : size;
}

}  // namespace pyqe
