// Negatives: tokens drawn without replacement from distributions over the vocabulary without the target and
// the dominant tokens.
#pragma once

#include "core/sampling.h"
#include "cuda/statistics.h"

namespace pyqe::cuda {

constexpr int kTileWords = kTile / 32;

struct SampleNegatives {
  Logits logits;
  const std::int64_t* targets;   // [n]; -1: none, out of range: nothing is drawn for the row
  const std::int64_t* excluded;  // [n, n_excluded]: the dominant tokens of a row, and then -1
  std::int64_t n_excluded;
  const float* max_logit;       // [n]; NaN: no distribution, nothing is drawn
  float beta;                   // 1 / T of the softmax part
  const float* factor;          // [vocab] or null: 1
  const float* counts;          // [vocab] or null
  const double* tile_counts;    // [tiles]: sums of the counts
  std::int64_t first_row;       // number of the first row, which its random numbers depend on
  const std::int64_t* seed_at;  // null: `seed`
  std::int64_t seed;
  // Scratch
  unsigned* barred;    // [n, tiles, kTileWords]: a bit for each token, 1: not to be drawn
  TileSum* tile_sums;  // [n, tiles]; null if no source has a softmax part
  std::int64_t* ids;   // [n, width], a source's own in a row, padded with -1
  std::int64_t width;  // sum of the sources' counts
};

void sample_negatives(const SampleNegatives& args, const Source* sources, std::int64_t n_sources,
                      Stream stream);

}  // namespace pyqe::cuda
