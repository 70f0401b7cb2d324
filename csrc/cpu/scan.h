// The scan: one pass over the logits of all rows, in pieces that never leave the cache, into a few numbers
// per row.
//
// The vocabulary is cut into segments of kSegment tokens. A work item is one segment for a group of rows; it
// leaves a partial result per row, and the partial results of a row are merged in the order of the
// vocabulary. As the segments are the same always, so is every bit of the result, whatever the number of
// threads or of rows.
#pragma once

#include "core/partials.h"
#include "core/sampling.h"
#include "cpu/operations.h"

namespace pyqe::cpu {

constexpr std::int64_t kSegment = 1024, kTile = 256;

// Where the logits of n rows over `vocab` tokens come from: a matrix of them, or
//   z = scale (row_scale[n] <hidden[n], weight[v]> + bias[v]) + row_shift[n]
// and then softcap tanh(z / softcap).
struct Logits {
  Matrix logits;           // [n, vocab], or null: hidden and weight
  Matrix hidden;           // [n, dim]
  Matrix weight;           // [vocab, dim]
  const void* bias;        // [vocab] or null
  const float* row_scale;  // [n] or null
  const float* row_shift;  // [n] or null
  float scale, softcap;    // softcap 0: none
  std::int64_t n, dim, vocab;
  DType dtype;  // of logits, hidden, weight and bias
};

// Tokens that may be among the largest of their row. All above `floor` are kept; what is left out or thrown
// away is at most `dropped`.
struct Candidate {
  float logit;
  std::int32_t id;
};

struct Candidates {
  Candidate* items;
  std::int64_t size, capacity;
  float floor, dropped;
  // The part of the softmax seen so far by the thread that holds the list.
  float max;
  double sum;
};

// A second row of logits from the first, z' = scale[n] z + bias[v] + shift[n] + <projected[n], factors[v]>: a
// Sigmoid Head on top of the LM's logits.
struct Correction {
  const float *scale, *shift;  // [n]
  const float* bias;           // [vocab] or null
  const float* projected;      // [n, rank]
  Matrix factors;              // [vocab, rank], fp32
  std::int64_t rank;           // 0: none
};

struct Scan {
  Logits logits;
  const Scan* second;  // what is to be made of corrected logits, in the same pass; or null
  Correction correction;
  const float* packed_rows;  // what pack_rows made of all rows of the group

  bool softmax, entropy, sigmoid;
  float inverse_temperature;  // 0: no sum at a second temperature
  float threshold;            // a logit; NaN: no count
  bool moments;
  float moments_beta;  // > 0

  const std::int64_t* token_ids;  // [n, n_tokens]; -1 is none
  std::int64_t n_tokens;
  float* token_logits;  // [n, n_tokens]
  float* copy;          // [n, vocab]: the logits themselves

  // Results for rows [first_row, first_row + rows) of the group. Null: not wanted.
  std::int64_t first_row, rows, segments;
  SoftmaxPartial* softmax_partials;             // [rows, segments]
  SigmoidPartial* sigmoid_partials;             // [rows, segments]
  MomentsPartial* moments_partials;             // [rows, segments]
  Candidates* lists;                            // [threads, rows]
  TileSum* tile_sums;                           // [rows, tiles]
  float tile_beta;                              // 1 / T of tile_sums
  const float* factors;                         // [vocab], of the terms of tile_sums; null: 1
  void (*make_room)(const Scan&, Candidates&);  // throws out what cannot matter, or makes the list longer
  void (*raise_floor)(const Scan&, Candidates&, float max, double sum);
  void* keeper;  // of make_room; null: no candidates
};

// How rows are packed: `rows` to a panel, `depth` words each; see product.h.
struct PanelShape {
  std::int64_t rows, depth;
};

}  // namespace pyqe::cpu
