// The CUDA kernels. Every function starts work on a stream and returns; nothing waits for the device and
// nothing is allocated. Pointers are the device's, strides are in elements, results that are not wanted null.
//
// Ids: -1 is padding, and like every id out of range it gives NaN and is never used as an address. In
// gradients padding counts for nothing; an id out of range makes its row of grad_hidden NaN and adds to no
// row of the weight's.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cuda/runtime.h"

namespace pyqe::cuda {

struct Matrix {
  const void* data;
  std::int64_t stride;  // from one row to the next
};

// Logits of n rows: z = softcap tanh(scale (row_scale[n] x[n, v] + bias[v] + addend[n, v] + row_shift[n]) /
// softcap).
struct Logits {
  Matrix matrix;                       // x, [n, vocab]
  const float* bias;                   // [vocab] or null
  const float* addend;                 // [n, vocab], rows one after the other, or null
  const float *row_scale, *row_shift;  // [n] or null
  float scale, softcap;                // softcap 0: none
  std::int64_t n, vocab;
  DType dtype;  // of x
};

// logits = log(max(probs, eps)) - centre; a row with a negative or NaN probability, or with a centre that is
// not finite, becomes NaN.
enum class Center : int { kNone = 0, kMean = 1, kLogSumExp = 2 };

struct InverseSoftmax {
  Matrix probs;   // [n, classes]
  float* logits;  // [n, classes]
  std::int64_t n, classes;
  float eps;
  Center center;
  DType dtype;  // of probs
};

void inverse_softmax(const InverseSoftmax& args, Stream stream);

}  // namespace pyqe::cuda
