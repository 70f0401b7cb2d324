// The operations of the CPU library. Raw pointers; strides in elements; rows are contiguous.
//
// A row of a result depends on nothing but its own inputs and the instruction set: not on the other rows,
// nor on how many there are, nor on the number of threads. A sum over rows adds blocks of a fixed number of
// rows in their order, so it does not depend on the threads either.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace pyqe::cpu {

struct Matrix {
  const void* data;
  std::int64_t stride;  // from one row to the next
};

// logits[n, k] = sum_d hidden[n, d] weight[token_ids[n, k], d] + bias[token_ids[n, k]], NaN where the id is
// -1.
struct TokenLogitsForward {
  Matrix hidden;                  // [n, dim]
  Matrix weight;                  // [vocab, dim]
  const void* bias;               // [vocab] or null
  const std::int64_t* token_ids;  // [n, k]
  float* logits;                  // [n, k]
  std::int64_t n, k, dim, vocab;
  DType dtype;  // of hidden, weight and bias
};

// grad_hidden[n, :] = sum_k grad[n, k] weight[token_ids[n, k], :], without the terms whose id is -1.
struct TokenLogitsBackwardHidden {
  const float* grad;              // [n, k]
  Matrix weight;                  // [vocab, dim]
  const std::int64_t* token_ids;  // [n, k]
  void* grad_hidden;              // [n, dim]
  std::int64_t n, k, dim, vocab;
  DType dtype;  // of weight and grad_hidden
};

// With the pairs (n, k) sorted by token, row r of the result belongs to one token:
// grad_weight[row_ids[r], :] = sum over p = pairs[row_starts[r] .. row_starts[r + 1]) of grad[p] hidden[p /
// k, :].
struct TokenLogitsBackwardWeight {
  const float* grad;               // [n, k]
  Matrix hidden;                   // [n, dim]
  const std::int64_t* pairs;       // flat indices into grad
  const std::int64_t* row_starts;  // [rows + 1]
  const std::int64_t* row_ids;     // [rows], or null: row r is r
  void* grad_weight;               // rows `stride` apart
  std::int64_t stride;
  std::int64_t rows, k, dim;
  DType dtype;  // of hidden and grad_weight
};

// logits = log(max(probs, eps)) - centre, eps being rounded to the dtype. A row with a negative or NaN
// probability becomes NaN as a whole, and so does a row whose centre is not finite: with eps = 0, one zero
// takes the mean to -inf, and only a row of zeros does that to the logsumexp.
enum class Center : int { kNone = 0, kMean = 1, kLogSumExp = 2 };

struct InverseSoftmax {
  Matrix probs;  // [n, classes]
  void* logits;  // [n, classes]
  std::int64_t n, classes;
  double eps;
  Center center;
  DType dtype;  // of probs and logits: fp32 or fp64
};

// All of these raise std::invalid_argument for a bad size or dtype; those with token ids check every id
// before they write anything and raise TokenIdError.
void token_logits_forward(const TokenLogitsForward& args, int threads);
void token_logits_backward_hidden(const TokenLogitsBackwardHidden& args, int threads);
void token_logits_backward_weight(const TokenLogitsBackwardWeight& args, int threads);
void inverse_softmax(const InverseSoftmax& args, int threads);

}  // namespace pyqe::cpu
