// Negatives: tokens drawn without replacement from distributions over the vocabulary without the target and
// the dominant tokens.
#pragma once

#include "core/dominant.h"
#include "core/sampling.h"
#include "cpu/scan.h"

namespace pyqe::cpu {

struct SampleNegatives {
  Logits logits;
  const std::int64_t* targets;  // [n], -1 is none
  DominantRule exclude;
  std::int64_t members;  // at most so many tokens are dominant
  const Source* sources;
  std::int64_t n_sources;
  float beta;           // 1 / T of the softmax part
  const float* factor;  // [vocab] or null: 1
  const float* counts;  // [vocab] or null
  std::uint64_t seed;
  std::int64_t* ids;        // [n, sum of counts], padded with -1; a source's own in a row
  std::int64_t* undecided;  // [n]: 1 where the dominant tokens take a second look; nothing is drawn there
};

// Raises std::invalid_argument for a bad size or dtype, TokenIdError for a bad target.
void sample_negatives(const SampleNegatives& args, int threads);

}  // namespace pyqe::cpu
