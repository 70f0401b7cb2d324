// The NLL of softmax(beta z) with its first two derivatives in beta.
#pragma once

#include "cuda/operations.h"

namespace pyqe::cuda {

// Columns that one warp reads: fixed, so that a row's sums are the same whatever else is in the call.
constexpr int kTemperaturePart = 2048;

PYQE_HOST_DEVICE inline std::int64_t temperature_parts(std::int64_t vocab) {
  return (vocab + kTemperaturePart - 1) / kTemperaturePart;
}

// With d = z - max and p = exp(beta d), the sums of p, p d, p d^2, and, for labels y, of y and y d.
struct TemperatureSums {
  float max = -INFINITY;
  double weight = 0, first = 0, second = 0, labels = 0, target = 0;
};

struct TemperatureRows {
  Logits logits;
  const std::int64_t* labels;  // [n], or null where there are soft ones
  Matrix soft_labels;          // float [n, vocab]
  const double* beta;          // the device's
  TemperatureSums* partials;   // scratch [n, parts] where there is more than one part, else null
  double* terms;               // [3, n]: NLL, first and second derivative of each row
  std::int64_t terms_stride;
};

void temperature_rows(const TemperatureRows& args, Stream stream);

// The mean of `count` rows' terms [3, count], a number for each.
struct TemperatureMeans {
  const double* terms;
  std::int64_t stride, count;
  double *nll, *first, *second;
};

void temperature_means(const TemperatureMeans& args, Stream stream);

}  // namespace pyqe::cuda
