// The centre of a row of logits, as inverse softmax takes it away: the same rule in fp32 and fp64.
#pragma once

#include "cpu/operations.h"

namespace pyqe::cpu {
namespace {

// A sum that carries its rounding error along (Kahan): 100,000 terms as exact as one. Value is a number or a
// vector of numbers.
template <class Value>
struct CompensatedSum {
  Value sum = {}, excess = {};  // the exact sum is nearly sum - excess

  void add(Value term) {
    const Value wanted = term - excess;
    const Value next = sum + wanted;
    excess = (next - sum) - wanted;
    sum = next;
  }
};

// `sum` is that of the logits for the mean, and of the clamped probabilities q for the logsumexp: log q has
// the logsumexp log(sum q), so no exponential is needed. The result is NaN, which spoils the whole row, where
// the row is invalid or has no finite centre.
inline double row_centre(const InverseSoftmax& args, double sum, bool invalid) {
  double centre = 0;
  if (args.center == Center::kMean) centre = sum / static_cast<double>(args.classes);
  if (args.center == Center::kLogSumExp) centre = __builtin_log(sum);
  return invalid || !__builtin_isfinite(centre) ? __builtin_nan("") : centre;
}

}  // namespace
}  // namespace pyqe::cpu
