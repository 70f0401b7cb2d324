// What one instruction set offers: a table of functions, each computing the items [begin, end) of an
// operation on the calling thread. A new level is one more table and one more line in dispatch.cpp.
#pragma once

#include "cpu/operations.h"

namespace pyqe::cpu {

struct Kernels {
  void (*token_logits_forward)(const TokenLogitsForward&, std::int64_t begin,
                               std::int64_t end);  // pairs (n, k)
  void (*token_logits_backward_hidden)(const TokenLogitsBackwardHidden&, std::int64_t begin,
                                       std::int64_t end);  // rows of grad_hidden
  void (*token_logits_backward_weight)(const TokenLogitsBackwardWeight&, std::int64_t begin,
                                       std::int64_t end);  // rows of grad_weight
  void (*inverse_softmax)(const InverseSoftmax&, std::int64_t begin, std::int64_t end);  // rows, fp32 only
  TemperatureSums (*temperature_nll)(const TemperatureNll&, std::int64_t begin, std::int64_t end);  // rows
};

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

}  // namespace pyqe::cpu
