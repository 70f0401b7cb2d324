#include "core/dominant.h"

#include <cfloat>
#include <cmath>

namespace pyqe {
namespace {

// A drop of .01 - .005 must not exceed .005 by the rounding of fp32 probabilities.
constexpr double kRounding = 16 * FLT_EPSILON;

std::int64_t jump_size(const DominantRule& rule, const double* probs, std::int64_t count, double next) {
  std::int64_t size = 0;
  for (std::int64_t i = 0; i < count && probs[i] > rule.epsilon; ++i) {
    const double following = i + 1 < count ? probs[i + 1] : next;
    if (std::isnan(following)) break;  // the last token of the vocabulary: no drop after it
    const double drop = probs[i] - following - kRounding * probs[i];
    if (drop > rule.ratio * probs[i] && drop > rule.epsilon) {
      size = i + 1;
      if (!rule.last_cut) break;
    }
  }
  return size;
}

template <class Keep>
std::int64_t prefix(std::int64_t count, const Keep& keep) {
  std::int64_t size = 0;
  while (size < count && keep(size)) ++size;
  return size;
}

}  // namespace

std::int64_t dominant_size(const DominantRule& rule, const double* probs, std::int64_t count, double next,
                           double entropy, std::int64_t vocab) {
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
      return prefix(count, [&](std::int64_t i) { return probs[i] > rule.epsilon; });
    case DominantKind::kTopP:
      size = prefix(count, [&](std::int64_t i) { return (cumulative += probs[i]) < rule.p; });
      break;
    case DominantKind::kMinP:
      size = prefix(count, [&](std::int64_t i) { return probs[i] > rule.p * probs[0]; });
      break;
    case DominantKind::kEta: {
      const double bound = std::fmin(rule.epsilon, std::sqrt(rule.epsilon) * std::exp(-entropy));
      size = prefix(count, [&](std::int64_t i) { return probs[i] > bound; });
      break;
    }
  }
  return size == count && count < vocab ? -1 : size;
}

}  // namespace pyqe
