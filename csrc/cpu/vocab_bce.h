// Binary cross-entropy over the whole vocabulary, with its gradients, in one pass over the logits.
//
// With z = row_scale[n] <hidden[n], weight[v]> + bias[v] + row_shift[n] and label y (1 for the target, else
// 0),
//   losses[n] = sum over v not excluded of  y pos_weight softplus(-z) + (1 - y) softplus(z)
//   total = sum_n row_weights[n] losses[n],  g[n, v] = d total / d z
//   grad_hidden = (row_scale g) weight,  grad_weight = (row_scale g)^T hidden.
//
// The vocabulary goes through in blocks of kBlock tokens. The logits of a block become its gradients g, which
// stay in a buffer until both products have been taken: grad_weight's rows are then finished, and grad_hidden
// has grown by one term. Every sum has a fixed order, whatever the number of threads or of rows around it.
#pragma once

#include "cpu/scan.h"

namespace pyqe::cpu {

struct VocabBce {
  Logits logits;                    // linear, without softcap
  const std::int64_t* targets;      // [n], -1 is none
  const std::int64_t* exclude_ids;  // [n, n_exclude]; -1 is none, and so is the target
  std::int64_t n_exclude;
  const float* row_weights;  // [n]
  float pos_weight;
  float *total, *losses;  // [], [n]
  void *grad_hidden, *grad_weight,
      *grad_bias;                  // [n, dim], [vocab, dim], [vocab] in the dtype of the logits, or null
  float *grad_scale, *grad_shift;  // [n] or null
};

// Raises std::invalid_argument for a bad size or dtype, TokenIdError for a bad id.
void vocab_bce(const VocabBce& args, int threads);

// --- what one instruction set computes
// -----------------------------------------------------------------------

constexpr std::int64_t kBlock = 1024;     // tokens whose products with weight are one sum in grad_hidden
constexpr std::int64_t kRowBlock = 1024;  // rows whose products with hidden are one sum in grad_weight

// How an instruction set cuts the work.
struct VocabBceShape {
  std::int64_t panel_rows;
  std::int64_t gradient_words;  // floats of a row of gradients of a block, with some to spare at its end
  std::int64_t
      row_block_steps;   // steps of a panel of kRowBlock rows of hidden, or of all where there are fewer
  std::int64_t columns;  // of hidden that an item of grad_hidden computes
  std::int64_t tokens;   // that an item of grad_weight computes
};

// Sums over some tokens of a row: of the losses, of g, and of g times the bare product.
struct RowSums {
  double loss, shift, scale;
};

struct VocabBcePass {
  const VocabBce* args;
  VocabBceShape shape;
  const std::int64_t* excluded;  // exclude_ids, each row in ascending order
  const float* packed_rows;      // hidden, for the logits
  float* packed_columns;         // hidden, for grad_weight: [row block][panel][step][column]
  float* gradients[2];           // row_scale g of an even and an odd group of blocks: [block][row][token]
  float* grad_hidden;            // [n, dim] in fp32, rows `grad_hidden_stride` apart
  RowSums* row_sums;             // [tiles, n]
  std::int64_t padded_dim, grad_hidden_stride, gradient_rows, group_blocks, item_rows;
};

// The kinds of work, each cut into items; what an item is, see vocab_bce_kernels.h.
enum class VocabBceWork { kPackColumns, kLogits, kGradHidden, kGradWeight, kFinish };

}  // namespace pyqe::cpu
