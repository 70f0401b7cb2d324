// Binary cross-entropy over the vocabulary, over one instruction set; see vocab_bce.h.
#pragma once

#include "cpu/scan_kernels.h"
#include "cpu/scratch.h"
#include "cpu/vocab_bce.h"

namespace pyqe::cpu {
namespace {

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

inline std::int64_t rounded_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step * step;
}

// The types that elements T meet in.
template <class Isa, class T>
struct VocabBceTypes {
  using Product = typename ProductOf<Isa, T>::Type;
  using Gradient = typename Product::Element;  // bf16 where it is multiplied in pairs, else fp32
  using GradientProduct = typename ProductOf<Isa, Gradient>::Type;
  // Half a cache line to spare: what reads whole vectors may, and rows do not fight for one set of the L1.
  static constexpr std::int64_t kStride = kBlock + 32;
  static constexpr std::int64_t kWords = kStride * static_cast<std::int64_t>(sizeof(Gradient)) / 4;
};

template <class Isa, class T>
VocabBceShape vocab_bce_shape_of(std::int64_t n, std::int64_t dim) {
  using Types = VocabBceTypes<Isa, T>;
  using Product = typename Types::Product;
  const std::int64_t most = chunk_columns<Product>(Product::depth(kBlock)), items = (dim + most - 1) / most;
  VocabBceShape shape;
  shape.panel_rows = Product::kRows;
  shape.gradient_words = Types::kWords;
  shape.row_block_steps = Product::depth(smaller(n, kRowBlock));
  shape.columns = items ? rounded_up((dim + items - 1) / items, Product::kColumns) : Product::kColumns;
  shape.tokens = 128 / Product::kRows * Product::kRows;
  return shape;
}

template <class Isa>
VocabBceShape vocab_bce_shape(DType dtype, std::int64_t n, std::int64_t dim) {
  VocabBceShape shape = {};
  with_element_type(dtype, [&](auto element) { shape = vocab_bce_shape_of<Isa, decltype(element)>(n, dim); });
  return shape;
}

// Gradients of a block in a group, from one row on.
template <class Gradient>
Gradient* gradients_at(const VocabBcePass& pass, std::int64_t group, std::int64_t block, std::int64_t row) {
  const std::int64_t rows = block * pass.gradient_rows + row;
  return reinterpret_cast<Gradient*>(pass.gradients[group % 2] + rows * pass.shape.gradient_words);
}

// --- logits ------------------------------------------------------------------------------------------------

// Where in ascending ids the first one stands that is not below `id`.
inline std::int64_t first_at_least(const std::int64_t* ids, std::int64_t count, std::int64_t id) {
  std::int64_t begin = 0;
  while (begin < count) {
    const std::int64_t middle = (begin + count) / 2;
    ids[middle] < id ? begin = middle + 1 : count = middle;
  }
  return begin;
}

// One row of a tile: tokens [0, count) are those that count as negatives, at z; `dots` are the bare products.
template <class Gradient>
struct RowOfTile {
  const float *z, *dots;
  std::int64_t count;  // whole vectors
  float weight, scale;
  Gradient* gradients;  // null: not wanted
  float* bias_sums;     // sums of g by token, or null
};

template <class Isa, class Gradient>
RowSums add_negatives(const RowOfTile<Gradient>& row) {
  using F32 = typename Isa::F32;
  const F32 weight = broadcast<Isa>(row.weight), scale = broadcast<Isa>(row.scale);
  F32 loss = {}, shift_sum = {}, scale_sum = {};
  for (std::int64_t i = 0; i < row.count; i += Isa::kWidth) {
    const Softplus<Isa> negative = softplus<Isa>(load_vector<Isa>(row.z + i));
    const F32 g = weight * negative.slope;
    loss += negative.value;
    shift_sum += g;
    scale_sum = Isa::fma(g, load_vector<Isa>(row.dots + i), scale_sum);
    if (row.bias_sums) narrow<Isa>(row.bias_sums + i, load_vector<Isa>(row.bias_sums + i) + g);
    if (row.gradients) narrow<Isa>(row.gradients + i, g * scale);
  }
  return {static_cast<double>(Isa::sum(loss)), static_cast<double>(Isa::sum(shift_sum)),
          static_cast<double>(Isa::sum(scale_sum))};
}

// The target, at place i of the tile, with the logit z; it has been left out of the negatives.
template <class Isa, class Gradient>
void add_positive(const RowOfTile<Gradient>& row, float z, std::int64_t i, float pos_weight, RowSums& sums) {
  const Softplus<Isa> positive = softplus<Isa>(broadcast<Isa>(-z));
  const float g = row.weight * (-pos_weight * positive.slope[0]);
  sums.loss += static_cast<double>(pos_weight * positive.value[0]);
  sums.shift += static_cast<double>(g);
  sums.scale += static_cast<double>(g) * row.dots[i];
  if (row.bias_sums) row.bias_sums[i] += g;
  if (!row.gradients) return;
  Gradient rounded[Isa::kWidth];
  narrow<Isa>(rounded, broadcast<Isa>(g * row.scale));
  row.gradients[i] = rounded[0];
}

// Logits of the tokens [first_id, first_id + count) for one row, whose products are `dots`.
template <class Isa, class Gradient>
RowSums add_row(const VocabBce& args, const std::int64_t* excluded, std::int64_t n, const float* bias,
                std::int64_t first_id, std::int64_t count, RowOfTile<Gradient> row) {
  float z[kTile];
  const std::int64_t target = args.targets[n] - first_id;
  const bool here = args.targets[n] >= 0 && target >= 0 && target < count;
  __builtin_memcpy(z, row.dots, static_cast<std::size_t>(row.count) * sizeof(float));
  transform<Isa>(args.logits, n, bias, z, row.count);
  const float positive = here ? z[target] : 0;
  // At -infinity loss and gradient are exactly 0.
  if (here) z[target] = -kInfinity;
  for (std::int64_t i = count; i < row.count; ++i) z[i] = -kInfinity;
  const std::int64_t* ids = excluded + n * args.n_exclude;
  for (std::int64_t i = first_at_least(ids, args.n_exclude, first_id); i < args.n_exclude; ++i) {
    if (ids[i] >= first_id + count) break;
    z[ids[i] - first_id] = -kInfinity;
  }
  row.z = z;
  RowSums sums = add_negatives<Isa>(row);
  if (here) add_positive<Isa>(row, positive, target, args.pos_weight, sums);
  return sums;
}

template <class Isa, class T>
void store_row(const float* from, std::int64_t count, T* to) {
  std::int64_t i = 0;
  for (; i + Isa::kWidth <= count; i += Isa::kWidth) narrow<Isa>(to + i, load_vector<Isa>(from + i));
  if (i == count) return;
  T end[Isa::kWidth];
  narrow<Isa>(end, load_vector<Isa>(from + i));  // the buffers are whole vectors long
  __builtin_memcpy(to + i, end, static_cast<std::size_t>(count - i) * sizeof(T));
}

// Item: one tile of kTile tokens of a group, for all rows.
template <class Isa, class T>
void vocab_bce_logits(const VocabBcePass& pass, std::int64_t group, std::int64_t item) {
  using Types = VocabBceTypes<Isa, T>;
  using Gradient = typename Types::Gradient;
  constexpr std::int64_t kRows = Types::Product::kRows, kTiles = kBlock / kTile;
  const VocabBce& args = *pass.args;
  const Logits& from = args.logits;
  const bool products = args.grad_hidden || args.grad_weight;
  const std::int64_t tile_index = group * pass.group_blocks * kTiles + item, first = tile_index * kTile;
  const std::int64_t last = smaller(first + kTile, from.vocab);
  LinearTile<Isa, T> tile{from, 0};
  RowSums* sums = pass.row_sums + tile_index * from.n;
  for (std::int64_t id = first; id < last; id += smaller(tile.columns, kTile)) {
    const std::int64_t count = smaller(last - id, smaller(tile.columns, kTile));
    tile.load(id, count);
    float bias_sums[kTile] = {};
    for (std::int64_t row = 0; row < from.n; row += kRows) {
      const std::int64_t rows = smaller(from.n - row, kRows);
      tile.multiply(pass.packed_rows + row * tile.depth, rows, count);
      for (std::int64_t r = 0; r < rows; ++r) {
        RowOfTile<Gradient> part = {};
        part.dots = tile.products + r * tile.columns;
        part.count = rounded_up(count, Types::Product::kColumns);
        part.weight = args.row_weights[row + r];
        part.scale = from.row_scale ? from.row_scale[row + r] : 1;
        if (products) {
          part.gradients = gradients_at<Gradient>(pass, group, item / kTiles, row + r) + id % kBlock;
        }
        if (args.grad_bias) part.bias_sums = bias_sums;
        const RowSums more =
            add_row<Isa>(args, pass.excluded, row + r, from.bias ? tile.bias : nullptr, id, count, part);
        RowSums& total = sums[row + r];
        total = id == first
                    ? more
                    : RowSums{total.loss + more.loss, total.shift + more.shift, total.scale + more.scale};
      }
    }
    if (args.grad_bias) store_row<Isa>(bias_sums, count, static_cast<T*>(args.grad_bias) + id);
  }
}

// --- gradients ---------------------------------------------------------------------------------------------

// to[r, c] += from[r, c]; whole vectors.
template <class Isa>
void add_rows(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns, float* to,
              std::int64_t stride) {
  for (std::int64_t r = 0; r < rows; ++r, from += from_stride, to += stride) {
    for (std::int64_t c = 0; c < columns; c += Isa::kWidth) {
      narrow<Isa>(to + c, load_vector<Isa>(to + c) + load_vector<Isa>(from + c));
    }
  }
}

// Item: shape.columns columns of grad_hidden, for pass.item_rows rows. Adds what the blocks of a group give.
template <class Isa, class T>
void vocab_bce_grad_hidden(const VocabBcePass& pass, std::int64_t group, std::int64_t item) {
  using Types = VocabBceTypes<Isa, T>;
  using Product = typename Types::Product;
  constexpr std::int64_t kRows = Product::kRows, kColumns = Product::kColumns;
  const Logits& from = pass.args->logits;
  const std::int64_t items = (from.dim + pass.shape.columns - 1) / pass.shape.columns;
  const std::int64_t first = item % items * pass.shape.columns;
  const std::int64_t columns = smaller(pass.shape.columns, from.dim - first);
  const std::int64_t begin = item / items * pass.item_rows, end = smaller(begin + pass.item_rows, from.n);
  float* packed = scratch(Product::depth(kBlock) * pass.shape.columns + kRows * kColumns);
  float* products = packed + Product::depth(kBlock) * pass.shape.columns;
  const typename Product::Session session = {};
  (void)session;
  for (std::int64_t block = 0; block < pass.group_blocks; ++block) {
    const std::int64_t id = (group * pass.group_blocks + block) * kBlock;
    if (id >= from.vocab) return;
    const std::int64_t count = smaller(kBlock, from.vocab - id), steps = Product::depth(count);
    Product::pack_transposed_columns({&from.weight, nullptr, id}, count, first, columns, steps, packed);
    for (std::int64_t row = begin; row < end; row += kRows) {
      const std::int64_t rows = smaller(end - row, kRows);
      const auto* gradients =
          reinterpret_cast<const float*>(gradients_at<typename Types::Gradient>(pass, group, block, row));
      float* to = pass.grad_hidden + row * pass.grad_hidden_stride + first;
      for (std::int64_t c = 0; c < columns; c += kColumns) {
        Product::template multiply<Types::kWords>(rows, gradients, packed + c * steps, steps, products,
                                                  kColumns);
        add_rows<Isa>(products, kColumns, rows, kColumns, to + c, pass.grad_hidden_stride);
      }
    }
  }
}

// Columns of all row blocks of hidden lie in panels one block behind the other.
inline float* packed_columns_at(const VocabBcePass& pass, std::int64_t row_block, std::int64_t column,
                                std::int64_t steps) {
  return pass.packed_columns + row_block * pass.shape.row_block_steps * pass.padded_dim + column * steps;
}

// Item: one row block of hidden.
template <class Isa, class T>
void vocab_bce_pack_columns(const VocabBcePass& pass, std::int64_t item) {
  using Product = typename VocabBceTypes<Isa, T>::Product;
  const Logits& from = pass.args->logits;
  const std::int64_t row = item * kRowBlock, count = smaller(kRowBlock, from.n - row);
  const std::int64_t steps = Product::depth(count);
  Product::pack_transposed_columns({&from.hidden, nullptr, row}, count, 0, from.dim, steps,
                                   packed_columns_at(pass, item, 0, steps));
}

// Item: shape.tokens rows of grad_weight.
template <class Isa, class T>
void vocab_bce_grad_weight(const VocabBcePass& pass, std::int64_t group, std::int64_t item) {
  using Types = VocabBceTypes<Isa, T>;
  using Product = typename Types::Product;
  using Gradient = typename Types::Gradient;
  constexpr std::int64_t kRows = Product::kRows, kColumns = Product::kColumns;
  const Logits& from = pass.args->logits;
  const std::int64_t items = (kBlock + pass.shape.tokens - 1) / pass.shape.tokens, block = item / items;
  const std::int64_t within = item % items * pass.shape.tokens;
  const std::int64_t id = (group * pass.group_blocks + block) * kBlock + within;
  const std::int64_t tokens = smaller(smaller(pass.shape.tokens, kBlock - within), from.vocab - id);
  if (tokens <= 0) return;
  const std::int64_t row_blocks = (from.n + kRowBlock - 1) / kRowBlock, depth = pass.shape.row_block_steps;
  // Half of what the scan keeps in the second-level cache: sums and gradients lie there as well.
  const std::int64_t most = chunk_columns<Product>(2 * Product::depth(smaller(from.n, kRowBlock)));
  const std::int64_t panel_tokens = rounded_up(tokens, kRows),
                     packed_words = row_blocks * depth * panel_tokens;
  float* packed = scratch(packed_words + (panel_tokens + kRows) * most);
  float *sums = packed + packed_words, *products = sums + panel_tokens * most;
  const typename Product::Session session = {};
  (void)session;
  const auto rows_of = [&](std::int64_t row_block) {
    return smaller(kRowBlock, from.n - row_block * kRowBlock);
  };
  for (std::int64_t b = 0; b < row_blocks; ++b) {
    for (std::int64_t t = 0; t < tokens; t += kRows) {
      Types::GradientProduct::pack_transposed_rows(
          gradients_at<Gradient>(pass, group, block, b * kRowBlock) + within + t, Types::kStride, rows_of(b),
          packed + (b * panel_tokens + t) * depth);
    }
  }
  for (std::int64_t first = 0; first < from.dim; first += most) {
    const std::int64_t columns = smaller(most, from.dim - first);
    __builtin_memset(sums, 0, static_cast<std::size_t>(panel_tokens * most) * sizeof(float));
    for (std::int64_t b = 0; b < row_blocks; ++b) {
      const std::int64_t steps = Product::depth(rows_of(b));
      for (std::int64_t t = 0; t < tokens; t += kRows) {
        const std::int64_t rows = smaller(tokens - t, kRows);
        for (std::int64_t c = 0; c < columns; c += kColumns) {
          Product::multiply(rows, packed + (b * panel_tokens + t) * depth,
                            packed_columns_at(pass, b, first + c, steps), steps, products, kColumns);
          add_rows<Isa>(products, kColumns, rows, kColumns, sums + t * most + c, most);
        }
      }
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      store_row<Isa>(sums + t * most, columns,
                     static_cast<T*>(pass.args->grad_weight) + (id + t) * from.dim + first);
    }
  }
}

// Item: one row of grad_hidden, in the dtype of hidden.
template <class Isa, class T>
void vocab_bce_finish(const VocabBcePass& pass, std::int64_t item) {
  const std::int64_t dim = pass.args->logits.dim;
  store_row<Isa>(pass.grad_hidden + item * pass.grad_hidden_stride, dim,
                 static_cast<T*>(pass.args->grad_hidden) + item * dim);
}

template <class Isa, class T>
void vocab_bce(const VocabBcePass& pass, VocabBceWork work, std::int64_t group, std::int64_t item) {
  switch (work) {
    case VocabBceWork::kPackColumns:
      return vocab_bce_pack_columns<Isa, T>(pass, item);
    case VocabBceWork::kLogits:
      return vocab_bce_logits<Isa, T>(pass, group, item);
    case VocabBceWork::kGradHidden:
      return vocab_bce_grad_hidden<Isa, T>(pass, group, item);
    case VocabBceWork::kGradWeight:
      return vocab_bce_grad_weight<Isa, T>(pass, group, item);
    case VocabBceWork::kFinish:
      return vocab_bce_finish<Isa, T>(pass, item);
  }
}

}  // namespace
}  // namespace pyqe::cpu
