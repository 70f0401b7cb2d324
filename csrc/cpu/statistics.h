// Statistics of rows of logits. What is not wanted is null, or of width 0.
//
// A row without a distribution (NaN or +infinity in it, or nothing but -infinity; NaN alone for the sigmoid)
// has NaN for numbers and -1 for ids.
#pragma once

#include "core/dominant.h"
#include "cpu/scan.h"

namespace pyqe::cpu {

struct SoftmaxStats {
  Logits logits;
  const std::int64_t* token_ids;  // [n, n_tokens], -1 is none
  std::int64_t n_tokens, top_k;
  double temperature;
  DominantRule rule;
  std::int64_t members;                                 // width of dominant_ids
  float *max_logit, *max_logprob, *entropy, *tempered;  // [n]; the last two may be null
  std::int64_t* argmax;                                 // [n]
  float* token_logits;                                  // [n, n_tokens]
  float* topk_logits;                                   // [n, top_k]
  std::int64_t* topk_ids;                               // [n, top_k]
  std::int64_t *dominant_ids, *size;  // [n, members]; [n], -1 where the row needs a second look
  float* mass;                        // [n]
};

struct SigmoidStats {
  Logits logits;
  const std::int64_t* token_ids;
  std::int64_t n_tokens, top_k;
  float threshold;  // a logit
  float *max_logit, *sum_prob;
  std::int64_t *argmax, *count_above;  // the latter may be null
  float* token_logits;
  float* topk_logits;
  std::int64_t* topk_ids;
};

// These raise std::invalid_argument for a bad size or dtype, TokenIdError for a bad id.
void softmax_stats(const SoftmaxStats& args, int threads);
void sigmoid_stats(const SigmoidStats& args, int threads);
// Both in one pass, the sigmoid ones of corrected logits.
void joint_stats(const SoftmaxStats& softmax, const SigmoidStats& sigmoid, const Correction& correction,
                 int threads);

// The logits themselves, to [n, vocab].
void copy_logits(const Logits& logits, float* to, int threads);

}  // namespace pyqe::cpu
