// Statistics of rows of logits: one read of a row, in segments whose partial results a second kernel merges;
// and the largest tokens of a row, found by the maxima of its tiles.
#pragma once

#include "core/dominant.h"
#include "core/partials.h"
#include "cuda/operations.h"

namespace pyqe::cuda {

// Tokens of a tile, and of a segment, the part of a row that one block reads. Fixed, so that a row's sums are
// the same whatever else is in the call.
constexpr int kTile = 256, kSegment = 8192;

PYQE_HOST_DEVICE inline std::int64_t tiles_of(std::int64_t vocab) { return (vocab + kTile - 1) / kTile; }
PYQE_HOST_DEVICE inline std::int64_t segments_of(std::int64_t vocab) {
  return (vocab + kSegment - 1) / kSegment;
}

// Logits of a second head made of the first one's: z' = scale[n] z + bias[v] + addend[n, v] + shift[n].
struct Correction {
  const float *scale, *shift;  // [n]; scale null: there is no second head
  const float* bias;           // [vocab] or null
  const float* addend;         // [n, vocab] or null
};

struct SoftmaxRequest {
  SoftmaxPartial* partials;  // scratch [n, segments]; null: no softmax statistics
  float* tile_max;           // [n, tiles] or null
  float inverse_temperature;
  // Results [n], or null.
  float *max_logit, *max_logprob;
  std::int64_t* argmax;
  float *entropy, *tempered;
};

struct SigmoidRequest {
  SigmoidPartial* partials;
  float* tile_max;
  float threshold;  // a logit
  float *max_logit, *sum_prob;
  std::int64_t *argmax, *above;
};

struct Statistics {
  Logits logits;
  Correction second;  // sigmoid statistics are of this one, if there is one
  SoftmaxRequest softmax;
  SigmoidRequest sigmoid;
  const std::int64_t* token_ids;  // [n, n_tokens]
  std::int64_t n_tokens;
  float *softmax_tokens, *sigmoid_tokens;  // [n, n_tokens]: logits of the ids
};

// The `count` largest logits of a row with their ids, by descending logit, then ascending id.
struct Candidates {
  Logits logits;
  Correction second;                     // whose logits are asked for, if there is one
  const float* tile_max;                 // [n, tiles]
  const float *max_logit, *max_logprob;  // [n]; NaN: no distribution; the second for the rule
  std::int64_t top_k;
  float* topk_logits;      // [n, top_k]
  std::int64_t* topk_ids;  // [n, top_k]
  DominantRule rule;       // kind none, or one whose sets have no more than `members`
  std::int64_t members;
  std::int64_t *dominant_ids, *size;  // [n, members], [n]
  float* mass;                        // [n]
};

constexpr std::int64_t kMaxCandidates = 1024;  // top_k, and members + 1

void row_statistics(const Statistics& args, Stream stream);
void row_candidates(const Candidates& args, Stream stream);  // top_k and members within the limit

}  // namespace pyqe::cuda
