// Dot products of a few rows with a whole vocabulary, as generation needs them at every step.
#pragma once

#include "cuda/operations.h"

namespace pyqe::cuda {

// dots[n, v] = sum_d hidden[n, d] weight[v, d]
struct Decode {
  Matrix hidden, weight;  // [n, dim], [vocab, dim]; rows start at multiples of 16 bytes
  float* dots;            // [n, vocab], rows one after the other
  std::int64_t n, vocab, dim;
  DType dtype;  // of both matrices: bfloat16 or float16
};

constexpr std::int64_t kMaxDecodeRows = 64;

void decode(const Decode& args, Stream stream);  // n within the limit, dim a multiple of 8

}  // namespace pyqe::cuda
