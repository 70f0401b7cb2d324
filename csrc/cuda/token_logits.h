// Logits of given tokens, and their gradients.
#pragma once

#include "cuda/operations.h"

namespace pyqe::cuda {

// logits[n, k] = <hidden[n], weight[id]> + bias[id]
struct TokenLogits {
  Matrix hidden, weight;  // [n, dim], [vocab, dim]
  const void* bias;       // [vocab] or null
  const std::int64_t* token_ids;
  float* logits;
  std::int64_t n, k, dim, vocab;
  DType dtype;  // of hidden, weight and bias
};

// grad_hidden[n] = sum over k, in that order, of grad[n, k] weight[id]. Padding adds nothing.
struct TokenLogitsGradHidden {
  const float* grad;  // [n, k]
  Matrix weight;
  const std::int64_t* token_ids;  // [n, k]
  void* grad_hidden;              // [n, dim]
  std::int64_t n, k, dim, vocab;
  DType dtype;  // of weight and grad_hidden
};

// grad_rows[r] = sum of grad[pair] hidden[pair / k] over the pairs from row_starts[r] to row_starts[r + 1]
struct TokenLogitsGradRows {
  const float* grad;  // [n, k], by pair
  Matrix hidden;
  const std::int64_t *pairs, *row_starts;
  void* grad_rows;  // [rows, dim]
  std::int64_t rows, k, dim;
  DType dtype;  // of hidden and grad_rows
};

void token_logits(const TokenLogits& args, Stream stream);
void token_logits_grad_hidden(const TokenLogitsGradHidden& args, Stream stream);
void token_logits_grad_rows(const TokenLogitsGradRows& args, Stream stream);

}  // namespace pyqe::cuda
