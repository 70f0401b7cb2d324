// What a pass over some tokens of a row of logits leaves behind, and how it is put together with what other
// tokens leave. Sums of exponentials are relative to the largest logit seen.
//
// Shared by the CPU's code and CUDA kernels: no exceptions, nothing of the standard library. Everything is
// `static inline`, as in dtype.h.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace pyqe {

// With d = z - max: sum = sum e^d, weighted = sum d e^d, tempered = sum e^(d / T).
struct SoftmaxPartial {
  float max;
  std::int64_t argmax;
  double sum, weighted, tempered;
};

struct SigmoidPartial {
  float max;
  std::int64_t argmax, above;
  double sum;  // of the probabilities
};

// With d = z - max: sum = sum e^(beta d), weighted = sum d e^(beta d), squared = sum d^2 e^(beta d).
struct MomentsPartial {
  float max;
  double sum, weighted, squared;
};

// No token seen.
static PYQE_HOST_DEVICE inline void clear(SoftmaxPartial& partial) {
  partial = {-__builtin_inff(), -1, 0, 0, 0};
}

// The first token is the largest of those of logit -infinity.
static PYQE_HOST_DEVICE inline void clear(SigmoidPartial& partial) { partial = {-__builtin_inff(), 0, 0, 0}; }

static PYQE_HOST_DEVICE inline void clear(MomentsPartial& partial) { partial = {-__builtin_inff(), 0, 0, 0}; }

// Makes `largest`, at least as large as the maximum, the number that the sums are relative to.
//
// With d' = d + shift: e^d' = f e^d for f = e^shift.
static PYQE_HOST_DEVICE inline void rebase(SoftmaxPartial& partial, float largest,
                                           double inverse_temperature) {
  if (partial.max != -__builtin_inff()) {
    const double shift = static_cast<double>(partial.max) - largest, factor = __builtin_exp(shift);
    partial.weighted = factor * (partial.weighted + shift * partial.sum);
    partial.sum *= factor;
    partial.tempered *= __builtin_exp(shift * inverse_temperature);
  }
  partial.max = largest;
}

// The same with f = e^(beta shift), and d'^2 = d^2 + 2 shift d + shift^2.
static PYQE_HOST_DEVICE inline void rebase(MomentsPartial& partial, float largest, double beta) {
  if (partial.max != -__builtin_inff()) {
    const double shift = static_cast<double>(partial.max) - largest, factor = __builtin_exp(beta * shift);
    partial.squared = factor * (partial.squared + shift * (2 * partial.weighted + shift * partial.sum));
    partial.weighted = factor * (partial.weighted + shift * partial.sum);
    partial.sum *= factor;
  }
  partial.max = largest;
}

// Several parts as one, added in their order; of equal maxima the first part's token counts.
static PYQE_HOST_DEVICE inline SoftmaxPartial merged(const SoftmaxPartial* parts, std::int64_t count,
                                                     double inverse_temperature) {
  SoftmaxPartial total;
  clear(total);
  for (std::int64_t i = 0; i < count; ++i) {
    if (parts[i].max > total.max) total.max = parts[i].max, total.argmax = parts[i].argmax;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    SoftmaxPartial part = parts[i];
    rebase(part, total.max, inverse_temperature);
    total.sum += part.sum;
    total.weighted += part.weighted;
    total.tempered += part.tempered;
  }
  return total;
}

static PYQE_HOST_DEVICE inline SigmoidPartial merged(const SigmoidPartial* parts, std::int64_t count) {
  SigmoidPartial total;
  clear(total);
  for (std::int64_t i = 0; i < count; ++i) {
    if (parts[i].max > total.max) total.max = parts[i].max, total.argmax = parts[i].argmax;
    total.above += parts[i].above;
    total.sum += parts[i].sum;
  }
  return total;
}

static PYQE_HOST_DEVICE inline MomentsPartial merged(const MomentsPartial* parts, std::int64_t count,
                                                     double beta) {
  MomentsPartial total;
  clear(total);
  for (std::int64_t i = 0; i < count; ++i) {
    if (parts[i].max > total.max) total.max = parts[i].max;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    MomentsPartial part = parts[i];
    rebase(part, total.max, beta);
    total.sum += part.sum;
    total.weighted += part.weighted;
    total.squared += part.squared;
  }
  return total;
}

// Whether a row has a distribution at all: no NaN, no +infinity, more than -infinity.
static PYQE_HOST_DEVICE inline bool is_distribution(const SoftmaxPartial& total) {
  return __builtin_isfinite(total.max) && !__builtin_isnan(total.sum);
}

// In nats.
static PYQE_HOST_DEVICE inline double entropy_of(const SoftmaxPartial& total) {
  return __builtin_fmax(0.0, __builtin_log(total.sum) - total.weighted / total.sum);
}

static PYQE_HOST_DEVICE inline double probability(float logit, const SoftmaxPartial& total) {
  return __builtin_exp(static_cast<double>(logit) - total.max) / total.sum;
}

}  // namespace pyqe
