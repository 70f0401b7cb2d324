// Mean NLL of softmax(beta z) and its first two derivatives in beta, of logits z that exist or that a head
// computes.
#pragma once

#include "cpu/scan.h"

namespace pyqe::cpu {

struct TemperatureNll {
  Matrix logits;               // [n, classes]
  const std::int64_t* labels;  // [n], a label of -1 gives NaN; or null, and there are
  Matrix soft_labels;          // [n, classes], fp32
  std::int64_t n, classes;
  double beta;
  DType dtype;  // of logits
};

struct LinearTemperatureNll {
  Logits logits;
  const std::int64_t* labels;  // [n], a label of -1 gives NaN
  double beta;
};

struct TemperatureDerivatives {
  double nll, first, second;
};

// What rows add to them; logits relative to the largest of their row, d.
struct TemperatureSums {
  double log_partition, mean, target, variance;  // log sum exp(beta d), E[d], <label, d>, Var[d]
};

// Internal linkage, as in dtype.h: this header is compiled into files with different instruction sets.
static inline void accumulate(TemperatureSums& sums, const TemperatureSums& terms) {
  sums.log_partition += terms.log_partition;
  sums.mean += terms.mean;
  sums.target += terms.target;
  sums.variance += terms.variance;
}

// These raise std::invalid_argument for a bad size or dtype, std::out_of_range for a label that is neither -1
// nor a class.
TemperatureDerivatives temperature_nll(const TemperatureNll& args, int threads);
TemperatureDerivatives linear_temperature_nll(const LinearTemperatureNll& args, int threads);

}  // namespace pyqe::cpu
